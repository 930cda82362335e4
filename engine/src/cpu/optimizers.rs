//! One step of an optimizer, in torch's order of operations.

use rayon::prelude::*;

use super::TASK;
use crate::backend::{AdamWStep, SgdStep};

/// AdamW (Loshchilov and Hutter, 2019); m and v are the running means of gradients and of their squares.
pub(super) fn adamw(param: &mut [f32], grad: &[f32], m: &mut [f32], v: &mut [f32], s: &AdamWStep) {
    let decay = (1.0 - s.lr * s.weight_decay) as f32;
    let beta2 = s.beta2 as f32;
    let (new1, new2) = ((1.0 - s.beta1) as f32, (1.0 - s.beta2) as f32);
    let correction1 = 1.0 - s.beta1.powf(s.step as f64);
    let correction2 = (1.0 - s.beta2.powf(s.step as f64)).sqrt() as f32;
    let step_size = (s.lr / correction1) as f32;
    let eps = s.eps as f32;
    let moments = m.par_chunks_mut(TASK).zip(v.par_chunks_mut(TASK));
    param.par_chunks_mut(TASK).zip(grad.par_chunks(TASK)).zip(moments).for_each(|((param, grad), (m, v))| {
        for (((p, g), m), v) in param.iter_mut().zip(grad).zip(m).zip(v) {
            let g = g * s.grad_scale;
            *p *= decay;
            *m += (g - *m) * new1;
            *v = *v * beta2 + new2 * g * g;
            *p -= step_size * (*m / (v.sqrt() / correction2 + eps));
        }
    });
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
