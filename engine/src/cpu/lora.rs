//! The low-rank update scale · dropout(x) · Aᵀ · Bᵀ and its gradients: x [tokens, in], A [rank, in], B [out, rank]. What it
//! adds to the layer's output and to the gradient of its input is part of the layer's own products.
//!
//! The dropout mask is a function of a key and the element's index (Philox), so it is drawn
//! again in the backward pass instead of kept, and does not depend on the number of threads.

use rayon::prelude::*;

use super::gemm::{Operand, Output, gemm};
use super::simd::vectorize;
use crate::backend::Dropout;
use crate::cpu::view::{View, ViewMut};
use crate::random::philox;

/// Sizes of one adapted layer in one micro-batch.
#[derive(Clone, Copy)]
pub(super) struct Shape {
    pub(super) tokens: usize,
    pub(super) input: usize,
    pub(super) output: usize,
    pub(super) rank: usize,
}

/// Up to this rank, the gradients of A and B are products of so few rows that their other side is not packed.
const FEW_ROWS: usize = 32;
/// Rows of B's gradient that one task adds.
const TASK_ROWS: usize = 64;

/// hidden [tokens, rank] = x · Aᵀ. `x` has dropout applied.
pub(super) fn hidden(s: Shape, x: &[f32], a: &[f32], hidden: &mut [f32]) {
    let a = View::new(a, s.rank, s.input);
    gemm(ViewMut::new(hidden, s.tokens, s.rank), Output::Set, 1.0, View::new(x, s.tokens, s.input), a.t());
}

/// What [`backward`] reads.
pub(super) struct Backward<'a> {
    pub(super) x: &'a [f32],
    pub(super) hidden: &'a [f32],
    pub(super) b: &'a [f32],
    pub(super) scale: f32,
    pub(super) dy: &'a [f32],
}

/// d_hidden = scale · dy · B; dA += d_hiddenᵀ · x; dB += scale · dyᵀ · hidden. `x` has dropout applied; `scratch` is as large
/// as B.
pub(super) fn backward(
    s: Shape,
    f: &Backward<'_>,
    d_hidden: &mut [f32],
    d_a: &mut [f32],
    d_b: &mut [f32],
    scratch: &mut [f32],
) {
    let dy = View::new(f.dy, s.tokens, s.output);
    gemm(ViewMut::new(d_hidden, s.tokens, s.rank), Output::Set, f.scale, dy, View::new(f.b, s.output, s.rank));
    let operand = |view| if s.rank <= FEW_ROWS { Operand::InPlace(view) } else { Operand::View(view) };
    let transposed = View::new(d_hidden, s.tokens, s.rank).t();
    let x = View::new(f.x, s.tokens, s.input);
    gemm(ViewMut::new(d_a, s.rank, s.input), Output::Add, 1.0, transposed, operand(x));
    // dBᵀ = hiddenᵀ · dy reads the long rows of dy in order; dyᵀ · hidden would jump from one to the next.
    let hidden = View::new(f.hidden, s.tokens, s.rank).t();
    gemm(ViewMut::new(scratch, s.rank, s.output), Output::Set, f.scale, hidden, operand(dy));
    d_b.par_chunks_mut(TASK_ROWS * s.rank).enumerate().for_each(|(task, d_b)| {
        for (i, d_b) in d_b.chunks_exact_mut(s.rank).enumerate() {
            let column = scratch[task * TASK_ROWS + i..].iter().step_by(s.output);
            d_b.iter_mut().zip(column).for_each(|(d_b, x)| *d_b += x);
        }
    });
}

/// dx += d_hidden · A, where the mask kept x; `scratch` is as large as x.
pub(super) fn dropped_input_gradient(
    s: Shape,
    d_hidden: &[f32],
    a: &[f32],
    dx: &mut [f32],
    dropout: Dropout,
    scratch: &mut [f32],
) {
    let (d_hidden, a) = (View::new(d_hidden, s.tokens, s.rank), View::new(a, s.rank, s.input));
    gemm(ViewMut::new(scratch, s.tokens, s.input), Output::Set, 1.0, d_hidden, a);
    masked(dropout, scratch, dx, |dx, masked| *dx += masked);
}

/// y = x with a share of elements zeroed and the others divided by 1 − p.
pub(super) fn drop_out(dropout: Dropout, x: &[f32], y: &mut [f32]) {
    masked(dropout, x, y, |y, masked| *y = masked);
}

/// Elements that one task masks; a multiple of 4.
const TASK: usize = 8192;

fn masked(dropout: Dropout, x: &[f32], y: &mut [f32], put: impl Fn(&mut f32, f32) + Sync) {
    // An element is kept if its 32 random bits are at or above p · 2³².
    let threshold = (f64::from(dropout.p) * 2f64.powi(32)) as u32;
    let scale = 1.0 / (1.0 - dropout.p);
    y.par_chunks_mut(TASK).zip(x.par_chunks(TASK)).enumerate().for_each(|(task, (y, x))| {
        vectorize(
            #[inline(always)]
            || {
                for (i, (y, x)) in y.chunks_mut(4).zip(x.chunks(4)).enumerate() {
                    let bits = philox((task * TASK / 4 + i) as u64, dropout.key);
                    for ((y, x), bits) in y.iter_mut().zip(x).zip(bits) {
                        put(y, if bits >= threshold { x * scale } else { 0.0 });
                    }
                }
            },
        )
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dropout_keeps_the_mean_and_drops_the_share() {
        let x = vec![1.0f32; 100_000];
        let mut y = vec![0.0; x.len()];
        drop_out(Dropout { p: 0.25, key: 7 }, &x, &mut y);
        let dropped = y.iter().filter(|y| **y == 0.0).count() as f64 / y.len() as f64;
        assert!((dropped - 0.25).abs() < 0.005, "{dropped}");
        assert!(y.iter().all(|y| *y == 0.0 || (*y - 4.0 / 3.0).abs() < 1e-6));
        let mut other = vec![0.0; x.len()];
        drop_out(Dropout { p: 0.25, key: 8 }, &x, &mut other);
        assert_ne!(y, other);
    }
}
