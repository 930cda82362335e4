//! LLM.int8() (Dettmers et al., 2022): y = x · Wᵀ with both in 8 bits. Each row of x is rounded to 127 steps of its
//! largest magnitude; features in which any row has an outlier are left out of that, and multiplied as they are.
//!
//! The products of codes are summed in f32, which is exact up to rows of 1,040 features and rounds beyond.

use rayon::prelude::*;

use super::gemm::{Operand, Output, View, ViewMut, gemm};
use super::weight::Matrix;
use crate::quantize::{EightBit, OUTLIER};

/// y (+)= x · Wᵀ; x [tokens, cols].
pub(super) fn linear(x: &[f32], w: &EightBit, output: Output, y: &mut [f32]) {
    let tokens = x.len() / w.cols;
    let outliers: Vec<usize> =
        (0..w.cols).filter(|&j| x.iter().skip(j).step_by(w.cols).any(|x| x.abs() >= OUTLIER)).collect();
    let mut codes = x.to_vec();
    let scales: Vec<f32> = codes.par_chunks_mut(w.cols).map(|row| round(row, &outliers)).collect();
    let mut product = vec![0.0; tokens * w.rows];
    let c = ViewMut::new(&mut product, tokens, w.rows);
    gemm(c, Output::Set, 1.0, View::new(&codes, tokens, w.cols), Operand::StoredTransposed(Matrix::codes(w)));
    let rows = y.par_chunks_mut(w.rows).zip(product.par_chunks(w.rows)).zip(scales);
    rows.for_each(|((y, product), scale)| {
        for ((y, product), absmax) in y.iter_mut().zip(product).zip(&w.absmax) {
            let value = product * (scale * absmax / (127.0 * 127.0));
            *y = if output == Output::Add { *y + value } else { value };
        }
    });
    if outliers.is_empty() {
        return;
    }
    let columns = |x: &[f32]| outliers.iter().map(|&j| x[j]).collect::<Vec<f32>>();
    let x: Vec<f32> = x.par_chunks(w.cols).flat_map_iter(columns).collect();
    let weights: Vec<f32> = (0..w.rows)
        .flat_map(|row| {
            let codes = &w.codes[row * w.cols..];
            outliers.iter().map(move |&j| f32::from(codes[j]) * (w.absmax[row] / 127.0))
        })
        .collect();
    let (x, weights) = (View::new(&x, tokens, outliers.len()), View::new(&weights, w.rows, outliers.len()));
    gemm(ViewMut::new(y, tokens, w.rows), Output::Add, 1.0, x, weights.t());
}

/// Replaces a row by its codes, zero at outliers; returns its largest other magnitude.
fn round(row: &mut [f32], outliers: &[usize]) -> f32 {
    let largest = row.iter().map(|x| x.abs()).filter(|x| *x < OUTLIER).fold(0.0, f32::max);
    let factor = if largest > 0.0 { 127.0 / largest } else { 0.0 };
    row.iter_mut().for_each(|x| *x = (*x * factor).round_ties_even());
    outliers.iter().for_each(|&j| row[j] = 0.0);
    largest
}
