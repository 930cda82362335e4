//! Panels of B: as many columns as a tile takes, row by row, so that the micro-kernel reads them in order.

use super::super::bf16;
use super::super::transpose::{COLUMNS, interleave};
use super::{MAX_K_BLOCK, Operand};
use crate::backend::Precision;

/// Floats of scratch that [`Panel::pack`] needs: columns before they are interleaved, and two rows before they are
/// rounded.
const PACKING: usize = (COLUMNS + 2) * MAX_K_BLOCK;
/// The same of [`Panel::pack_unpaired`]: the panel in pairs, too.
pub(super) const SCRATCH: usize = PACKING + MAX_WIDTH * MAX_K_BLOCK;
/// Columns of a panel at most: two vectors.
const MAX_WIDTH: usize = 32;

/// Where a panel [depth, width] comes from: rows `k0 ..` of B (pairs of rows in bf16) and columns `col .. col + cols`;
/// missing columns become zero.
#[derive(Clone, Copy)]
pub(super) struct Panel<'a> {
    pub(super) b: Operand<'a>,
    pub(super) precision: Precision,
    pub(super) k0: usize,
    pub(super) col: usize,
    pub(super) cols: usize,
    pub(super) width: usize,
}

impl Panel<'_> {
    #[inline(always)]
    pub(super) fn pack(self, panel: &mut [f32], scratch: &mut [f32]) {
        if self.cols < self.width {
            panel.fill(0.0);
        }
        match self.precision {
            Precision::F32 => self.pack_floats(panel, scratch),
            Precision::Bf16 => self.pack_pairs(panel, scratch),
        }
    }

    /// Packs what is to be in pairs, and takes these apart.
    #[inline(always)]
    pub(super) fn pack_unpaired(self, panel: &mut [f32], scratch: &mut [f32]) {
        let (scratch, words) = scratch.split_at_mut(PACKING);
        let words = &mut words[..panel.len() / 2];
        self.pack(words, scratch);
        for (words, rows) in words.chunks_exact(self.width).zip(panel.chunks_exact_mut(2 * self.width)) {
            bf16::unpair_rows(words, rows);
        }
    }

    #[inline(always)]
    fn pack_floats(self, panel: &mut [f32], scratch: &mut [f32]) {
        let Panel { b, k0, col, cols, width, .. } = self;
        let depth = panel.len() / width;
        match &b {
            Operand::View(view) | Operand::InPlace(view) if view.col_stride == 1 => self.rows(panel, |k, out| {
                // With the constant length this is two vector moves; with the other, a call of memcpy.
                let row = &view.data[(k0 + k) * view.row_stride + col..];
                if out.len() == width { out.copy_from_slice(&row[..width]) } else { out.copy_from_slice(&row[..cols]) }
            }),
            Operand::Stored(w) => self.rows(panel, |k, out| w.widen(k0 + k, col, out)),
            Operand::View(view) | Operand::InPlace(view) => {
                // A transposed matrix: its columns are contiguous.
                let whole = cols / COLUMNS * COLUMNS;
                for j in (0..whole).step_by(COLUMNS) {
                    let columns = std::array::from_fn(|i| view.column(col + j + i, k0, depth));
                    interleave(&columns, &mut panel[j..], width);
                }
                (whole..cols).for_each(|j| place(panel, width, j, view.column(col + j, k0, depth)));
            }
            Operand::StoredTransposed(w) => self.columns(panel, scratch, |j, out| w.widen(j, k0, out)),
        }
    }

    #[inline(always)]
    fn pack_pairs(self, panel: &mut [f32], scratch: &mut [f32]) {
        let Panel { b, k0, col, cols, width, .. } = self;
        let (depth, k) = (panel.len() / width, b.rows());
        // Of a column's numbers, those of the panel: an odd one at the end has no neighbour.
        let numbers = (2 * depth).min(k - 2 * k0);
        let (columns, rows) = scratch.split_at_mut(COLUMNS * MAX_K_BLOCK);
        let (first, second) = rows.split_at_mut(MAX_K_BLOCK);
        match &b {
            Operand::View(view) | Operand::InPlace(view) if view.col_stride == 1 => self.rows(panel, |p, out| {
                let row = |row: usize| &view.data[row * view.row_stride + col..][..out.len()];
                let at = 2 * (k0 + p);
                if at + 1 == k {
                    second[..out.len()].fill(0.0);
                    return bf16::rows(row(at), second, out);
                }
                bf16::rows(row(at), row(at + 1), out);
            }),
            Operand::Stored(w) => self.rows(panel, |p, out| {
                let at = 2 * (k0 + p);
                let second_row = (at + 1 < k).then_some(at + 1);
                if let Some(bytes) = w.bf16(at, col, cols) {
                    return bf16::stored_rows(bytes, second_row.and_then(|row| w.bf16(row, col, cols)), out);
                }
                let (first, second) = (&mut first[..out.len()], &mut second[..out.len()]);
                w.widen(at, col, first);
                match second_row {
                    Some(row) => w.widen(row, col, second),
                    None => second.fill(0.0),
                }
                bf16::rows(first, second, out);
            }),
            Operand::View(view) | Operand::InPlace(view) => self.columns(panel, columns, |j, out| {
                bf16::neighbours(view.column(j, 2 * k0, numbers), out);
            }),
            Operand::StoredTransposed(w) => {
                let wide = &mut rows[..numbers];
                self.columns(panel, columns, |j, out| match w.bf16(j, 2 * k0, numbers) {
                    Some(bytes) => bf16::stored_neighbours(bytes, out),
                    None => {
                        w.widen(j, 2 * k0, wide);
                        bf16::neighbours(wide, out);
                    }
                });
            }
        }
    }

    /// Writes the panel row by row.
    #[inline(always)]
    fn rows(self, panel: &mut [f32], mut write: impl FnMut(usize, &mut [f32])) {
        let Panel { cols, width, .. } = self;
        for (k, out) in panel.chunks_exact_mut(width).enumerate() {
            if cols == width { write(k, out) } else { write(k, &mut out[..cols]) }
        }
    }

    /// Writes the panel column by column, each of which `write` puts into scratch; it gets the column's number in B.
    #[inline(always)]
    fn columns(self, panel: &mut [f32], scratch: &mut [f32], mut write: impl FnMut(usize, &mut [f32])) {
        let Panel { col, cols, width, .. } = self;
        let depth = panel.len() / width;
        let scratch = &mut scratch[..COLUMNS * depth];
        for j in (0..cols).step_by(COLUMNS) {
            let count = COLUMNS.min(cols - j);
            for (i, column) in scratch.chunks_exact_mut(depth).take(count).enumerate() {
                write(col + j + i, column);
            }
            let column = |i: usize| &scratch[i * depth..][..depth];
            match count {
                COLUMNS => interleave(&std::array::from_fn(column), &mut panel[j..], width),
                _ => (0..count).for_each(|i| place(panel, width, j + i, column(i))),
            }
        }
    }
}

/// Writes one column into a panel.
#[inline(always)]
fn place(panel: &mut [f32], width: usize, j: usize, column: &[f32]) {
    for (k, value) in column.iter().enumerate() {
        panel[k * width + j] = *value;
    }
}
