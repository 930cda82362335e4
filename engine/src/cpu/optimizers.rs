//! One step of an optimizer, in torch's order of operations.

use rayon::prelude::*;

use super::TASK;
use crate::backend::{AdamWStep, SgdStep};
use crate::quantize::{Blockwise, STATE_BLOCK};

/// AdamW (Loshchilov and Hutter, 2019); m and v are the running means of gradients and of their squares.
pub(super) fn adamw(param: &mut [f32], grad: &[f32], m: &mut [f32], v: &mut [f32], s: &AdamWStep) {
    let update = adamw_update(s);
    let moments = m.par_chunks_mut(TASK).zip(v.par_chunks_mut(TASK));
    let tasks = param.par_chunks_mut(TASK).zip(grad.par_chunks(TASK)).zip(moments);
    tasks.for_each(|((param, grad), (m, v))| update(param, grad, m, v));
}

/// The same with m and v in 8 bits.
pub(super) fn adamw_8bit(param: &mut [f32], grad: &[f32], (m, v): (&mut Blockwise, &mut Blockwise), s: &AdamWStep) {
    let update = adamw_update(s);
    let tasks = param.par_chunks_mut(STATE_BLOCK).zip(grad.par_chunks(STATE_BLOCK));
    tasks.zip(m.blocks().zip(v.blocks())).for_each(|((param, grad), (mut m, mut v))| {
        let (mut plain_m, mut plain_v) = ([0.0; STATE_BLOCK], [0.0; STATE_BLOCK]);
        let (plain_m, plain_v) = (&mut plain_m[..param.len()], &mut plain_v[..param.len()]);
        m.read(plain_m);
        v.read(plain_v);
        update(param, grad, plain_m, plain_v);
        m.write(plain_m);
        v.write(plain_v);
    });
}

/// What a step does to some values: param, grad, m and v.
fn adamw_update(s: &AdamWStep) -> impl Fn(&mut [f32], &[f32], &mut [f32], &mut [f32]) + Sync {
    let decay = (1.0 - s.lr * s.weight_decay) as f32;
    let beta2 = s.beta2 as f32;
    let (new1, new2) = ((1.0 - s.beta1) as f32, (1.0 - s.beta2) as f32);
    let correction1 = 1.0 - s.beta1.powf(s.step as f64);
    let correction2 = (1.0 - s.beta2.powf(s.step as f64)).sqrt() as f32;
    let step_size = (s.lr / correction1) as f32;
    let (eps, grad_scale) = (s.eps as f32, s.grad_scale);
    move |param, grad, m, v| {
        for (((p, g), m), v) in param.iter_mut().zip(grad).zip(m).zip(v) {
            let g = g * grad_scale;
            *p *= decay;
            *m += (g - *m) * new1;
            *v = *v * beta2 + new2 * g * g;
            *p -= step_size * (*m / (v.sqrt() / correction2 + eps));
        }
    }
}

/// Stochastic gradient descent.
pub(super) fn sgd(param: &mut [f32], grad: &[f32], momentum: Option<&mut [f32]>, s: &SgdStep) {
    let (lr, decay, kept) = (s.lr as f32, s.weight_decay as f32, s.momentum as f32);
    let direction = |p: f32, g: f32| g * s.grad_scale + decay * p;
    let tasks = param.par_chunks_mut(TASK).zip(grad.par_chunks(TASK));
    match momentum {
        None => tasks.for_each(|(param, grad)| {
            param.iter_mut().zip(grad).for_each(|(p, g)| *p -= lr * direction(*p, *g));
        }),
        Some(momentum) => tasks.zip(momentum.par_chunks_mut(TASK)).for_each(|((param, grad), momentum)| {
            for ((p, g), b) in param.iter_mut().zip(grad).zip(momentum) {
                *b = kept * *b + direction(*p, *g);
                *p -= lr * *b;
            }
        }),
    }
}
