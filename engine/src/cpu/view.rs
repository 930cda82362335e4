//! Matrices where they lie, to read and to write.

use rayon::prelude::*;

use super::bf16;
use super::simd::vectorize;

/// Rows of A that one task rounds to bf16.
const ROUNDED_ROWS: usize = 32;

/// A matrix to read: element (i, j) is `data[i * row_stride + j * col_stride]`.
#[derive(Clone, Copy)]
pub(crate) struct View<'a> {
    pub(super) data: &'a [f32],
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) row_stride: usize,
    pub(super) col_stride: usize,
}

impl<'a> View<'a> {
    /// A dense row-major matrix.
    pub(crate) fn new(data: &'a [f32], rows: usize, cols: usize) -> Self {
        Self::strided(data, rows, cols, cols)
    }

    /// A row-major matrix whose rows start `row_stride` apart.
    pub(crate) fn strided(data: &'a [f32], rows: usize, cols: usize, row_stride: usize) -> Self {
        assert!(cols <= row_stride || rows <= 1, "rows overlap");
        assert!(rows == 0 || (rows - 1) * row_stride + cols <= data.len(), "view past the end");
        View { data, rows, cols, row_stride, col_stride: 1 }
    }

    /// The same elements with rows and columns exchanged.
    pub(crate) fn t(self) -> Self {
        View { rows: self.cols, cols: self.rows, row_stride: self.col_stride, col_stride: self.row_stride, ..self }
    }

    /// `count` elements of a column of a transposed matrix, from row `from` on.
    #[inline(always)]
    pub(super) fn column(&self, col: usize, from: usize, count: usize) -> &'a [f32] {
        assert_eq!(self.row_stride, 1, "one stride is 1");
        &self.data[col * self.col_stride + from..][..count]
    }

    /// The same matrix rounded, in pairs along its rows or with `pairs` false in floats, written to `words`.
    pub(super) fn round<'w>(&self, pairs: bool, words: &'w mut [f32]) -> View<'w> {
        let view = *self;
        let width = view.cols.div_ceil(2);
        let words_of_pair = if pairs { 1 } else { 2 };
        if view.col_stride == 1 {
            let row = |i: usize| &view.data[i * view.row_stride..][..view.cols];
            let rows = words.par_chunks_mut(ROUNDED_ROWS * words_of_pair * width).enumerate();
            rows.for_each_init(Vec::new, |scratch, (task, words)| {
                scratch.resize(width, 0.0);
                vectorize(
                    #[inline(always)]
                    || {
                        for (i, words) in words.chunks_exact_mut(words_of_pair * width).enumerate() {
                            let row = row(task * ROUNDED_ROWS + i);
                            if pairs {
                                bf16::neighbours(row, words);
                            } else {
                                bf16::neighbours(row, scratch);
                                bf16::unpair_neighbours(scratch, words);
                            }
                        }
                    },
                )
            });
            return View::new(words, view.rows, words_of_pair * width);
        }
        let zeros = vec![0.0; view.rows];
        let column = |k: usize| if k < view.cols { view.column(k, 0, view.rows) } else { &zeros };
        words.par_chunks_mut(words_of_pair * view.rows).enumerate().for_each_init(
            Vec::new,
            |scratch, (pair, words)| {
                scratch.resize(view.rows, 0.0);
                vectorize(
                    #[inline(always)]
                    || {
                        let (first, second) = (column(2 * pair), column(2 * pair + 1));
                        if pairs {
                            bf16::rows(first, second, words);
                        } else {
                            bf16::rows(first, second, scratch);
                            bf16::unpair_rows(scratch, words);
                        }
                    },
                )
            },
        );
        View::new(words, words_of_pair * width, view.rows).t()
    }
}

/// A row-major matrix to write, rows `row_stride` apart.
pub(crate) struct ViewMut<'a> {
    pub(super) data: &'a mut [f32],
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) row_stride: usize,
}

impl<'a> ViewMut<'a> {
    /// A dense row-major matrix.
    pub(crate) fn new(data: &'a mut [f32], rows: usize, cols: usize) -> Self {
        Self::strided(data, rows, cols, cols)
    }

    /// A row-major matrix whose rows start `row_stride` apart.
    pub(crate) fn strided(data: &'a mut [f32], rows: usize, cols: usize, row_stride: usize) -> Self {
        assert!(cols <= row_stride || rows <= 1, "rows overlap");
        assert!(rows == 0 || (rows - 1) * row_stride + cols <= data.len(), "view past the end");
        ViewMut { data, rows, cols, row_stride }
    }
}
