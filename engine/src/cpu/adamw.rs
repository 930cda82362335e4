//! One step of AdamW (Loshchilov and Hutter, 2019), in torch's order of operations.

use crate::backend::AdamWStep;

pub(super) fn step(param: &mut [f32], grad: &[f32], m: &mut [f32], v: &mut [f32], s: &AdamWStep) {
    let decay = (1.0 - s.lr * s.weight_decay) as f32;
    let beta2 = s.beta2 as f32;
    let (new1, new2) = ((1.0 - s.beta1) as f32, (1.0 - s.beta2) as f32);
    let correction1 = 1.0 - s.beta1.powf(s.step as f64);
    let correction2 = (1.0 - s.beta2.powf(s.step as f64)).sqrt() as f32;
    let step_size = (s.lr / correction1) as f32;
    let eps = s.eps as f32;
    for (((p, g), m), v) in param.iter_mut().zip(grad).zip(m).zip(v) {
        let g = g * s.grad_scale;
        *p *= decay;
        *m += (g - *m) * new1;
        *v = *v * beta2 + new2 * g * g;
        *p -= step_size * (*m / (v.sqrt() / correction2 + eps));
    }
}
