//! RMSNorm (Zhang and Sennrich, 2019), row by row: y = x · w / √(mean(x²) + eps), x [tokens, n], w [n].

use rayon::prelude::*;

use super::simd::{dot, sum, vectorize};

/// Rows that one task computes.
const TASK_ROWS: usize = 16;

pub(super) fn forward(x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) {
    let n = weight.len();
    let block = TASK_ROWS * n;
    y.par_chunks_mut(block).zip(x.par_chunks(block)).for_each(|(y, x)| {
        vectorize(
            #[inline(always)]
            || {
                for (y, x) in y.chunks_exact_mut(n).zip(x.chunks_exact(n)) {
                    let scale = inverse_rms(x, eps);
                    for ((y, x), w) in y.iter_mut().zip(x).zip(weight) {
                        *y = x * scale * w;
                    }
                }
            },
        )
    });
}

/// dx += s·(w∘dy − x · s²/n · Σ x∘w∘dy), where s = 1/√(mean(x²) + eps).
pub(super) fn backward(x: &[f32], weight: &[f32], eps: f32, dy: &[f32], dx: &mut [f32]) {
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
                    let scale = inverse_rms(x, eps);
                    let correlation = sum(n, |i| x[i] * (w[i] * dy[i]));
                    let pull = correlation * scale * scale / n as f32;
                    for i in 0..n {
                        dx[i] += scale * (w[i] * dy[i] - x[i] * pull);
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
