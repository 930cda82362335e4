//! RMSNorm (Zhang and Sennrich, 2019): y = x · (offset + w) / √(mean(x²) + eps), over stretches of x as long as w.

use rayon::prelude::*;

use super::simd::{dot, sum, vectorize};
use crate::backend::RmsNorm;

/// Rows that one task computes.
const TASK_ROWS: usize = 16;

pub(super) fn forward(x: &[f32], weight: &[f32], norm: RmsNorm, y: &mut [f32]) {
    let n = weight.len();
    let block = TASK_ROWS * n;
    y.par_chunks_mut(block).zip(x.par_chunks(block)).for_each(|(y, x)| {
        vectorize(
            #[inline(always)]
            || {
                for (y, x) in y.chunks_exact_mut(n).zip(x.chunks_exact(n)) {
                    let scale = inverse_rms(x, norm.eps);
                    for ((y, x), w) in y.iter_mut().zip(x).zip(weight) {
                        *y = x * scale * (norm.offset + w);
                    }
                }
            },
        )
    });
}

/// dx += s·(w∘dy − x · s²/n · Σ x∘w∘dy), where s = 1/√(mean(x²) + eps) and w has its offset.
pub(super) fn backward(x: &[f32], weight: &[f32], norm: RmsNorm, dy: &[f32], dx: &mut [f32]) {
    let n = weight.len();
    let block = TASK_ROWS * n;
    let rows = dx.par_chunks_mut(block).zip(x.par_chunks(block)).zip(dy.par_chunks(block));
    rows.for_each(|((dx, x), dy)| {
        vectorize(
            #[inline(always)]
            || {
                let rows = dx.chunks_exact_mut(n).zip(x.chunks_exact(n)).zip(dy.chunks_exact(n));
                for ((dx, x), dy) in rows {
                    let (dx, x, dy, w) = (&mut dx[..n], &x[..n], &dy[..n], &weight[..n]);
                    let scale = inverse_rms(x, norm.eps);
                    let correlation = sum(n, |i| x[i] * ((norm.offset + w[i]) * dy[i]));
                    let pull = correlation * scale * scale / n as f32;
                    for i in 0..n {
                        dx[i] += scale * ((norm.offset + w[i]) * dy[i] - x[i] * pull);
                    }
                }
            },
        )
    });
}

/// Weights whose gradient one task adds up.
const TASK_WEIGHTS: usize = 64;

/// dw += Σ over stretches of s · x∘dy.
pub(super) fn weight_backward(x: &[f32], norm: RmsNorm, dy: &[f32], d_weight: &mut [f32]) {
    let n = d_weight.len();
    let scales: Vec<f32> = x
        .par_chunks(n)
        .map(|x| {
            vectorize(
                #[inline(always)]
                || inverse_rms(x, norm.eps),
            )
        })
        .collect();
    d_weight.par_chunks_mut(TASK_WEIGHTS).enumerate().for_each(|(task, d_weight)| {
        let from = task * TASK_WEIGHTS;
        vectorize(
            #[inline(always)]
            || {
                for ((x, dy), scale) in x.chunks_exact(n).zip(dy.chunks_exact(n)).zip(&scales) {
                    let (x, dy) = (&x[from..], &dy[from..]);
                    for ((d, x), dy) in d_weight.iter_mut().zip(x).zip(dy) {
                        *d += scale * x * dy;
                    }
                }
            },
        )
    });
}

#[inline(always)]
fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    1.0 / (dot(x, x) / x.len() as f32 + eps).sqrt()
}
