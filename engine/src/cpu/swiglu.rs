//! SwiGLU (Shazeer, 2020), element by element: y = silu(gate) · up, silu(g) = g / (1 + e⁻ᵍ).

use rayon::prelude::*;

use super::simd::{exp, vectorize};

/// Elements that one task computes.
const TASK: usize = 8192;

pub(super) fn forward(gate: &[f32], up: &[f32], y: &mut [f32]) {
    let tasks = y.par_chunks_mut(TASK).zip(gate.par_chunks(TASK)).zip(up.par_chunks(TASK));
    tasks.for_each(|((y, gate), up)| {
        vectorize(
            #[inline(always)]
            || {
                for ((y, g), u) in y.iter_mut().zip(gate).zip(up) {
                    *y = g * sigmoid(*g) * u;
                }
            },
        )
    });
}

/// d_gate = dy · up · s·(1 + g·(1 − s)), d_up = dy · g·s, where s = sigmoid(g).
pub(super) fn backward(gate: &[f32], up: &[f32], dy: &[f32], d_gate: &mut [f32], d_up: &mut [f32]) {
    let inputs = gate.par_chunks(TASK).zip(up.par_chunks(TASK)).zip(dy.par_chunks(TASK));
    let outputs = d_gate.par_chunks_mut(TASK).zip(d_up.par_chunks_mut(TASK));
    outputs.zip(inputs).for_each(|((d_gate, d_up), ((gate, up), dy))| {
        vectorize(
            #[inline(always)]
            || {
                let n = gate.len();
                let (up, dy, d_gate, d_up) = (&up[..n], &dy[..n], &mut d_gate[..n], &mut d_up[..n]);
                for i in 0..n {
                    let s = sigmoid(gate[i]);
                    let silu = gate[i] * s;
                    d_gate[i] = dy[i] * up[i] * (s + silu * (1.0 - s));
                    d_up[i] = dy[i] * silu;
                }
            },
        )
    });
}

#[inline(always)]
fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}
