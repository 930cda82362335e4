//! One step of an optimizer, in torch's order of operations.

use rayon::prelude::*;

use super::TASK;
use super::columns::TASK_COLUMNS;
use crate::backend::{AdafactorStep, AdamWStep, SgdStep};
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

/// The running mean of squared gradients, of each row and column of a matrix or of each element.
pub(super) enum Squares<'a> {
    Factored { row: &'a mut [f32], col: &'a mut [f32] },
    Whole(&'a mut [f32]),
}

/// Adafactor (Shazeer and Stern, 2018). Sums have an order of their own, whatever the number of threads.
pub(super) fn adafactor(param: &mut [f32], grad: &[f32], squares: Squares<'_>, s: &AdafactorStep) {
    let beta2 = 1.0 - (s.step as f64).powf(s.decay_rate);
    let (kept, new, eps) = (beta2 as f32, (1.0 - beta2) as f32, s.eps as f32);
    let square = |g: f32| (g * s.grad_scale) * (g * s.grad_scale) + eps;
    // An element's update is its gradient times its row's factor and its column's, or its own.
    let (width, rows, factors) = match squares {
        Squares::Whole(squares) => {
            squares.par_chunks_mut(TASK).zip(grad.par_chunks(TASK)).for_each(|(squares, grad)| {
                squares.iter_mut().zip(grad).for_each(|(v, g)| *v = *v * kept + square(*g) * new);
            });
            let factors: Vec<f32> = squares.iter().map(|v| 1.0 / v.sqrt()).collect();
            (grad.len(), vec![1.0], factors)
        }
        Squares::Factored { row, col } => {
            let width = col.len();
            row.par_iter_mut().zip(grad.par_chunks(width)).for_each(|(v, grad)| {
                let mean = grad.iter().map(|g| f64::from(square(*g))).sum::<f64>() / width as f64;
                *v = *v * kept + mean as f32 * new;
            });
            col.par_chunks_mut(TASK_COLUMNS).enumerate().for_each(|(task, col)| {
                let mut sums = [0f64; TASK_COLUMNS];
                for grad in grad.chunks_exact(width) {
                    let grad = &grad[task * TASK_COLUMNS..];
                    sums.iter_mut().zip(grad).for_each(|(sum, g)| *sum += f64::from(square(*g)));
                }
                let height = row.len() as f64;
                col.iter_mut().zip(sums).for_each(|(v, sum)| *v = *v * kept + (sum / height) as f32 * new);
            });
            let mean = (row.iter().map(|v| f64::from(*v)).sum::<f64>() / row.len() as f64) as f32;
            let rows = row.iter().map(|v| 1.0 / (v / mean).sqrt()).collect();
            (width, rows, col.iter().map(|v| 1.0 / v.sqrt()).collect())
        }
    };
    let update = |row: f32, (factor, g): (&f32, &f32)| row * factor * g * s.grad_scale;
    let sums = grad
        .par_chunks(width)
        .zip(&rows)
        .map(|(grad, row)| factors.iter().zip(grad).map(|pair| f64::from(update(*row, pair)).powi(2)).sum::<f64>());
    let rms = (sums.collect::<Vec<f64>>().iter().sum::<f64>() / grad.len() as f64).sqrt();
    let step_size = (s.lr / (rms / s.clip_threshold).max(1.0)) as f32;
    let decay = (1.0 - s.lr * s.weight_decay) as f32;
    param.par_chunks_mut(width).zip(grad.par_chunks(width)).zip(&rows).for_each(|((param, grad), row)| {
        for (p, pair) in param.iter_mut().zip(factors.iter().zip(grad)) {
            *p = *p * decay - step_size * update(*row, pair);
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

#[cfg(test)]
mod tests {
    use std::path::Path;

    use safetensors::SafeTensors;

    use super::*;
    use crate::backend::{Backend, SecondMoment};
    use crate::cpu::Cpu;
    use crate::random;

    fn adamw_step(step: u64) -> AdamWStep {
        AdamWStep { lr: 1e-3, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0, step, grad_scale: 1.0 }
    }

    #[test]
    fn a_weight_without_gradient_stays_where_it_is_in_8_bits() {
        let mut param: Vec<f32> = random::normal(1000, 1);
        let (before, mut m, mut v) = (param.clone(), Blockwise::zeros(1000, true), Blockwise::zeros(1000, false));
        for step in 1..=1000 {
            let mut grad = random::normal(1000, 2 * step);
            grad.iter_mut().step_by(3).for_each(|grad| *grad = 0.0);
            adamw_8bit(&mut param, &grad, (&mut m, &mut v), &adamw_step(step));
        }
        for (i, (after, before)) in param.iter().zip(before).enumerate() {
            assert_eq!(*after == before, i % 3 == 0, "{i}: {before} became {after}");
        }
    }

    /// The largest step of each element in learning rates, and where it ends, over 1,000 steps.
    fn thousand_steps(
        gradient: impl Fn(u64) -> Vec<f32>,
        mut step: impl FnMut(&mut [f32], &[f32], u64),
    ) -> [Vec<f32>; 2] {
        let mut param = vec![0.0; STATE_BLOCK];
        let mut largest = vec![0f32; STATE_BLOCK];
        for number in 1..=1000 {
            let before = param.clone();
            step(&mut param, &gradient(number), number);
            for ((largest, after), before) in largest.iter_mut().zip(&param).zip(before) {
                *largest = largest.max((after - before).abs() / 1e-3);
            }
        }
        [largest, param]
    }

    /// A block whose gradients go from 10⁻⁸ to 1: no step in 8 bits may be much larger than any in f32, the weights with
    /// gradients above 10⁻³ of the largest must end where f32 leaves them, and the smaller ones not beyond.
    #[test]
    fn adamw_in_8_bits_follows_f32_where_gradients_of_a_block_differ_by_ten_to_the_eighth() {
        let scale = |i: usize| 10f32.powf(8.0 * i as f32 / (STATE_BLOCK - 1) as f32 - 8.0);
        let noise = |step: u64| random::normal(STATE_BLOCK, 1000 + step);
        let of = |gradient: fn(f32, u64) -> f32| {
            move |step: u64| -> Vec<f32> {
                noise(step).iter().enumerate().map(|(i, x)| scale(i) * gradient(*x, step)).collect()
            }
        };
        for (name, gradient) in [
            ("noise", of(|x, _| x)),
            ("drift", of(|x, _| 1.0 + 2.0 * x)),
            ("the same", of(|_, _| 1.0)),
            ("seldom", of(|x, _| if x > 1.6 { 1.0 } else { 0.0 })),
            ("at first", of(|x, step| if step <= 100 { x } else { 0.0 })),
        ] {
            let (mut m, mut v) = (vec![0.0; STATE_BLOCK], vec![0.0; STATE_BLOCK]);
            let plain = |p: &mut [f32], g: &[f32], step| adamw(p, g, &mut m, &mut v, &adamw_step(step));
            let [_, exact] = thousand_steps(gradient, plain);
            let (mut m, mut v) = (Blockwise::zeros(STATE_BLOCK, true), Blockwise::zeros(STATE_BLOCK, false));
            let eight_bit = |p: &mut [f32], g: &[f32], step| adamw_8bit(p, g, (&mut m, &mut v), &adamw_step(step));
            let [steps, ours] = thousand_steps(gradient, eight_bit);

            let largest = steps.iter().copied().fold(0.0, f32::max);
            assert!(largest < 3.0, "{name}: a step of {largest} learning rates");
            // Eight decades, from the smallest gradients on: how far f32 went, and how far off 8 bits are.
            let mean = |values: &mut dyn Iterator<Item = f32>| values.sum::<f32>() / (STATE_BLOCK / 8) as f32;
            let decade = |d: usize| d * STATE_BLOCK / 8..(d + 1) * STATE_BLOCK / 8;
            let went: Vec<f32> = (0..8).map(|d| mean(&mut exact[decade(d)].iter().map(|p| p.abs()))).collect();
            let off: Vec<f32> = (0..8)
                .map(|d| mean(&mut exact[decade(d)].iter().zip(&ours[decade(d)]).map(|(a, b)| (a - b).abs())))
                .collect();
            for d in 0..8 {
                let most = if d < 5 { 1.1 } else { 0.35 };
                assert!(off[d] < most * went[d], "{name}, decade {d}: off by {} of {}", off[d], went[d]);
            }
        }
    }

    #[test]
    fn three_steps_of_adafactor_are_those_of_transformers() {
        let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/quantized/adafactor.safetensors");
        let bytes = std::fs::read(fixture).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let floats = |name: &str| -> Vec<f32> {
            let data = file.tensor(name).unwrap().data().chunks_exact(4);
            data.map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
        };
        let close = |what: &str, ours: &[f32], theirs: &[f32]| {
            assert_eq!(ours.len(), theirs.len());
            let far = ours.iter().zip(theirs).find(|(a, b)| (*a - *b).abs() > 2e-6 * b.abs().max(0.05));
            assert!(far.is_none(), "{what}: {far:?}");
        };
        let (cpu, cols) = (Cpu::default(), 101);
        for (name, rows) in [("matrix", 43), ("vector", 1)] {
            let mut param = cpu.upload(&floats(name), rows, cols);
            let mut squares = [cpu.zeros(1, if rows > 1 { rows } else { cols }), cpu.zeros(1, cols)];
            for step in 1..=3 {
                let grad = cpu.upload(&floats(&format!("{name}.grad{}", step - 1)), rows, cols);
                let (lr, weight_decay, grad_scale) = (0.01, 0.1, 1.0);
                let (decay_rate, eps, clip_threshold) = (-0.8, 1e-30, 1.0);
                let step = AdafactorStep { lr, decay_rate, eps, clip_threshold, weight_decay, step, grad_scale };
                let [row, col] = &mut squares;
                let moment = if rows > 1 { SecondMoment::Factored { row, col } } else { SecondMoment::Whole(row) };
                cpu.adafactor(&mut param, &grad, moment, &step);
            }
            let names: &[&str] = if rows > 1 { &["exp_avg_sq_row", "exp_avg_sq_col"] } else { &["exp_avg_sq"] };
            for (part, ours) in names.iter().zip(&squares) {
                let theirs = floats(&format!("{name}.{part}"));
                let relative: Vec<f32> = ours.values().iter().zip(&theirs).map(|(a, b)| a / b).collect();
                close(part, &relative, &vec![1.0; theirs.len()]);
            }
            close(name, param.values(), &floats(&format!("{name}.after")));
        }
    }
}
