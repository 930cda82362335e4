//! Operations with one value for each column of a row-major matrix: biases, factors, and sums over rows.

use rayon::prelude::*;

use super::simd::vectorize;

/// Columns whose sums one task adds up, row after row, so that the bits don't depend on the number of threads.
pub(super) const TASK_COLUMNS: usize = 64;

/// y[i] += values in every row.
pub(super) fn add_to_rows(y: &mut [f32], width: usize, values: &[f32]) {
    y.par_chunks_mut(width).for_each(|y| y.iter_mut().zip(values).for_each(|(y, value)| *y += value));
}

/// scaled = y · factors in every row.
pub(super) fn scale(y: &[f32], factors: &[f32], scaled: &mut [f32]) {
    let width = factors.len();
    scaled.par_chunks_mut(width).zip(y.par_chunks(width)).for_each(|(scaled, y)| {
        scaled.iter_mut().zip(y).zip(factors).for_each(|((scaled, y), factor)| *scaled = y * factor);
    });
}

/// sums += Σ over rows of x.
pub(super) fn add_sums(x: &[f32], width: usize, sums: &mut [f32]) {
    sums.par_chunks_mut(TASK_COLUMNS).enumerate().for_each(|(task, sums)| {
        vectorize(
            #[inline(always)]
            || {
                for x in x.chunks_exact(width) {
                    sums.iter_mut().zip(&x[task * TASK_COLUMNS..]).for_each(|(sum, x)| *sum += x);
                }
            },
        )
    });
}

/// sums += factors · Σ over rows of x·y.
pub(super) fn add_products(x: &[f32], y: &[f32], factors: &[f32], sums: &mut [f32]) {
    let width = factors.len();
    let tasks = sums.par_chunks_mut(TASK_COLUMNS).zip(factors.par_chunks(TASK_COLUMNS)).enumerate();
    tasks.for_each(|(task, (sums, factors))| {
        let from = task * TASK_COLUMNS;
        let mut products = [0.0; TASK_COLUMNS];
        vectorize(
            #[inline(always)]
            || {
                for (x, y) in x.chunks_exact(width).zip(y.chunks_exact(width)) {
                    let pairs = x[from..].iter().zip(&y[from..]);
                    products.iter_mut().zip(pairs).for_each(|(product, (x, y))| *product += x * y);
                }
            },
        );
        sums.iter_mut().zip(factors).zip(products).for_each(|((sum, factor), product)| *sum += factor * product);
    });
}
