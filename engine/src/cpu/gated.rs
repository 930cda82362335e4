//! The gated product of an MLP (Shazeer, 2020), element by element: y = activation(gate) · up.

use rayon::prelude::*;

use super::simd::{exp, tanh, vectorize};
use crate::config::Activation;

/// Elements that one task computes.
const TASK: usize = 8192;

pub(super) fn forward(activation: Activation, gate: &[f32], up: &[f32], y: &mut [f32]) {
    match activation {
        Activation::Silu => forward_with(silu, gate, up, y),
        Activation::GeluTanh => forward_with(gelu_tanh, gate, up, y),
    }
}

/// gate becomes d_gate = dy · up · activation'(gate), and up becomes d_up = dy · activation(gate).
pub(super) fn backward(activation: Activation, gate: &mut [f32], up: &mut [f32], dy: &[f32]) {
    match activation {
        Activation::Silu => backward_with(silu, gate, up, dy),
        Activation::GeluTanh => backward_with(gelu_tanh, gate, up, dy),
    }
}

/// `f` gives an activation's value and derivative.
#[inline(always)]
fn forward_with(f: impl Fn(f32) -> [f32; 2] + Sync, gate: &[f32], up: &[f32], y: &mut [f32]) {
    let tasks = y.par_chunks_mut(TASK).zip(gate.par_chunks(TASK)).zip(up.par_chunks(TASK));
    tasks.for_each(|((y, gate), up)| {
        vectorize(
            #[inline(always)]
            || {
                for ((y, g), u) in y.iter_mut().zip(gate).zip(up) {
                    *y = f(*g)[0] * u;
                }
            },
        )
    });
}

#[inline(always)]
fn backward_with(f: impl Fn(f32) -> [f32; 2] + Sync, gate: &mut [f32], up: &mut [f32], dy: &[f32]) {
    let tasks = gate.par_chunks_mut(TASK).zip(up.par_chunks_mut(TASK)).zip(dy.par_chunks(TASK));
    tasks.for_each(|((gate, up), dy)| {
        vectorize(
            #[inline(always)]
            || {
                for ((gate, up), dy) in gate.iter_mut().zip(up).zip(dy) {
                    let [value, slope] = f(*gate);
                    *gate = dy * *up * slope;
                    *up = dy * value;
                }
            },
        )
    });
}

#[inline(always)]
fn silu(x: f32) -> [f32; 2] {
    let s = 1.0 / (1.0 + exp(-x));
    let y = x * s;
    [y, s + y * (1.0 - s)]
}

/// ½x·(1 + tanh(√(2/π)·(x + 0.044715·x³))).
#[inline(always)]
fn gelu_tanh(x: f32) -> [f32; 2] {
    const ROOT: f32 = 0.797_884_6;
    const CUBE: f32 = 0.044_715;
    let t = tanh(ROOT * (x + CUBE * x * x * x));
    let inner = ROOT * (1.0 + 3.0 * CUBE * x * x);
    [0.5 * x * (1.0 + t), 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * inner]
}
