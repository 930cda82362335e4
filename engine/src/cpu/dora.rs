//! DoRA's factors (Liu et al., 2024): magnitude / ‖W + scale·B·A‖, the norm over each row.

use rayon::prelude::*;

use super::gemm::{Output, gemm_serial};
use super::simd::{dot, vectorize};
use super::tensor::Tensor;
use super::weight::Matrix;
use crate::backend::LoraRef;
use crate::cpu::view::{View, ViewMut};

/// Rows of W that one task takes.
const TASK_ROWS: usize = 32;

pub(super) fn factors(w: Matrix<'_>, lora: &LoraRef<'_, Tensor>, magnitude: &[f32], factors: &mut [f32]) {
    let a = View::new(lora.a.values(), lora.a.rows(), lora.a.cols());
    let rank = lora.a.rows();
    let tasks = factors.par_chunks_mut(TASK_ROWS).zip(magnitude.par_chunks(TASK_ROWS)).enumerate();
    tasks.for_each(|(task, (factors, magnitude))| {
        let (first, rows) = (task * TASK_ROWS, factors.len());
        let mut adapted = vec![0.0; rows * w.cols];
        for (i, row) in adapted.chunks_exact_mut(w.cols).enumerate() {
            w.widen(first + i, 0, row);
        }
        let b = View::new(&lora.b.values()[first * rank..], rows, rank);
        gemm_serial(ViewMut::new(&mut adapted, rows, w.cols), Output::Add, lora.scale, b, a);
        for ((factor, magnitude), row) in factors.iter_mut().zip(magnitude).zip(adapted.chunks_exact(w.cols)) {
            *factor = magnitude
                / vectorize(
                    #[inline(always)]
                    || dot(row, row),
                )
                .sqrt();
        }
    });
}
