//! Matrix products: C [m, n] = alpha · A [m, k] · B [k, n], or added to what C holds.
//!
//! After Goto and van de Geijn (2008), with two differences that suit training on a few cores. B (usually a weight) is
//! packed block by block into panels as wide as two vector registers, whatever its layout, so one copy of a weight
//! serves forward (B = Wᵀ) and backward (B = W). A (usually activations) is read where it lies.
//!
//! Every element of C is one chain of fused multiply-adds over k, in blocks of [`block_of_k`], whatever the number of
//! rows, threads or vector lanes. So a row's result depends neither on what it is packed with nor on the machine's size.
//!
//! A term may be computed in bf16: both sides are rounded to pairs of bf16 (A once, B as it is packed), and all else
//! stays as it is, with words of two numbers in the place of floats. CPUs without instructions for pairs take them apart
//! again. Sums are f32 always, and the same bits either way.

mod operand;
mod panel;
mod tile;

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::bf16;
use super::simd::{dot, vectorize};
use super::view::{View, ViewMut};
use super::weight::Matrix;
use crate::backend::Precision;
pub(crate) use operand::{Operand, Output};
use panel::Panel;
use tile::{Tile, multiplies_pairs, tile};

/// Columns of C that one task may compute; multiples of every panel width.
const TASK_COLS: [usize; 3] = [96, 64, 32];
const MAX_TASK_COLS: usize = TASK_COLS[0];
/// Rows of C that one task computes are a multiple of this, and so of every tile but the last.
const TASK_ROWS: usize = 48;
/// To pack a column of B takes as long as this many rows of products with it.
const PACKING_ROWS: usize = 16;
/// Longest stretch of k whose panels are packed at a time; in bf16, of pairs.
const MAX_K_BLOCK: usize = 640;
/// The same where B is read in place: what a tile reads of it must stay in the innermost cache for the next one.
const MAX_IN_PLACE_BLOCK: usize = 160;

/// The length of the stretches into which k is cut: as even as can be, and the same for every caller.
fn block_of_k(k: usize, longest: usize) -> usize {
    k.div_ceil(k.div_ceil(longest).max(1)).max(1)
}

/// How C is cut into tasks.
#[derive(Clone, Copy)]
struct Cut {
    rows: usize,
    cols: usize,
    row_tasks: usize,
    col_tasks: usize,
}

impl Cut {
    /// The cut with which so many threads are done first: none may wait long for the last task, and what every task packs
    /// for itself must not weigh much.
    fn new(m: usize, n: usize, threads: usize) -> Self {
        let most_row_tasks = m.div_ceil(TASK_ROWS).clamp(1, 4 * threads);
        let cuts = TASK_COLS.into_iter().flat_map(|cols| {
            (1..=most_row_tasks).map(move |row_tasks| {
                let rows = m.div_ceil(row_tasks).next_multiple_of(TASK_ROWS).max(TASK_ROWS);
                Cut { rows, cols, row_tasks: m.div_ceil(rows), col_tasks: n.div_ceil(cols) }
            })
        });
        let time = |cut: &Cut| {
            let rounds = (cut.row_tasks * cut.col_tasks).div_ceil(threads);
            rounds * cut.cols.min(n) * (cut.rows.min(m) + PACKING_ROWS)
        };
        cuts.min_by_key(time).expect("there are several")
    }
}

/// One product of a sum: alpha · A · B.
#[derive(Clone, Copy)]
pub(crate) struct Term<'a> {
    alpha: f32,
    a: View<'a>,
    b: Operand<'a>,
    precision: Precision,
}

impl<'a> Term<'a> {
    /// A product in f32.
    pub(crate) fn new(alpha: f32, a: View<'a>, b: impl Into<Operand<'a>>) -> Self {
        Term { alpha, a, b: b.into(), precision: Precision::F32 }
    }

    /// The same product with both sides in this precision.
    pub(crate) fn with(self, precision: Precision) -> Self {
        Term { precision, ..self }
    }

    /// Words that A takes once it is rounded.
    fn rounded_len(&self, pairs: bool) -> usize {
        match self.precision {
            Precision::F32 => 0,
            Precision::Bf16 => self.a.rows * self.a.cols.div_ceil(2) * if pairs { 1 } else { 2 },
        }
    }

    /// The term with A rounded, if it is computed so; A takes the beginning of `words`.
    fn round(self, pairs: bool, words: &mut &'a mut [f32]) -> Self {
        if self.rounded_len(pairs) == 0 {
            return self;
        }
        let (own, rest) = std::mem::take(words).split_at_mut(self.rounded_len(pairs));
        *words = rest;
        Term { a: self.a.round(pairs, own), ..self }
    }
}

/// C = alpha · A · B (or +=) on all threads.
pub(crate) fn gemm<'b>(c: ViewMut<'_>, output: Output, alpha: f32, a: View<'b>, b: impl Into<Operand<'b>>) {
    gemm_sum(c, output, &[Term::new(alpha, a, b)]);
}

/// C = Σ alpha · A · B (or +=) on all threads, in one pass over C.
pub(crate) fn gemm_sum(c: ViewMut<'_>, output: Output, terms: &[Term<'_>]) {
    multiply(c, output, terms, multiplies_pairs());
}

/// The same, with numbers in bf16 in pairs or in floats.
fn multiply(c: ViewMut<'_>, output: Output, terms: &[Term<'_>], pairs: bool) {
    for Term { a, b, .. } in terms {
        assert_eq!(a.cols, b.rows(), "the length of the dot products");
    }
    let rounded: usize = terms.iter().map(|term| term.rounded_len(pairs)).sum();
    // Taken, as this thread may work on tasks of another product while it waits for those of this one.
    let mut words = ROUNDED.take();
    words.resize(words.len().max(rounded), 0.0);
    let mut rest = &mut words[..];
    let terms: Vec<Term<'_>> = terms.iter().map(|term| term.round(pairs, &mut rest)).collect();
    let sum = Sum::new(c, output, &terms, pairs);
    let cut = Cut::new(sum.m, sum.n, rayon::current_num_threads());
    (0..cut.col_tasks * cut.row_tasks).into_par_iter().with_max_len(1).for_each(|task| {
        let (col, row) = (task / cut.row_tasks * cut.cols, task % cut.row_tasks * cut.rows);
        sum.compute(row, cut.rows.min(sum.m - row), col, cut.cols.min(sum.n - col));
    });
    drop(terms);
    ROUNDED.set(words);
}

/// C = alpha · A · B (or +=) in f32 on this thread, for products inside an already parallel loop.
pub(crate) fn gemm_serial<'b>(c: ViewMut<'_>, output: Output, alpha: f32, a: View<'b>, b: impl Into<Operand<'b>>) {
    let terms = [Term::new(alpha, a, b)];
    assert_eq!(terms[0].a.cols, terms[0].b.rows(), "the length of the dot products");
    let sum = Sum::new(c, output, &terms, false);
    for col in (0..sum.n).step_by(MAX_TASK_COLS) {
        sum.compute(0, sum.m, col, MAX_TASK_COLS.min(sum.n - col));
    }
}

/// y [n] = W [n, k] · x [k] (or +=), for writing one token at a time: bound by reading W, so nothing is packed. Both sides
/// are rounded as those of [`gemm_sum`] are; only the order of the sum is another.
pub(crate) fn matvec(w: Matrix<'_>, x: &[f32], precision: Precision, output: Output, y: &mut [f32]) {
    let rounded = match precision {
        Precision::F32 => None,
        Precision::Bf16 => Some(bf16::rounded(x)),
    };
    let x = rounded.as_deref().unwrap_or(x);
    let rows = 64;
    y.par_chunks_mut(rows).enumerate().for_each(|(task, y)| {
        PANELS.with_borrow_mut(|scratch| {
            scratch.resize(scratch.len().max(w.cols), 0.0);
            let scratch = &mut scratch[..w.cols];
            vectorize(
                #[inline(always)]
                || {
                    for (i, y) in y.iter_mut().enumerate() {
                        let row = task * rows + i;
                        let product = match (w.row(row), precision) {
                            (Some(row), Precision::F32) => dot(row, x),
                            _ => {
                                w.widen(row, 0, scratch);
                                // What is stored in bf16 is rounded already.
                                if precision == Precision::Bf16 && w.bf16(row, 0, 0).is_none() {
                                    bf16::round_in_place(scratch);
                                }
                                dot(scratch, x)
                            }
                        };
                        *y = if output == Output::Set { product } else { *y + product };
                    }
                },
            )
        });
    });
}

/// A sum of products, to be computed in disjoint blocks of C. The A of a term in bf16 is rounded already.
struct Sum<'a> {
    c: *mut f32,
    c_stride: usize,
    m: usize,
    n: usize,
    output: Output,
    terms: &'a [Term<'a>],
    /// Whether terms in bf16 are in pairs.
    pairs: bool,
}

// SAFETY: `c` comes from an exclusive borrow that outlives the sum, and tasks write disjoint blocks of it.
unsafe impl Sync for Sum<'_> {}

thread_local! {
    /// Where this thread packs panels of B; kept, so that no page of it is faulted in twice.
    static PANELS: std::cell::RefCell<Vec<f32>> = const { std::cell::RefCell::new(Vec::new()) };
    /// Where a product that this thread began keeps its left sides in bf16.
    static ROUNDED: std::cell::RefCell<Vec<f32>> = const { std::cell::RefCell::new(Vec::new()) };
}

impl<'a> Sum<'a> {
    fn new(c: ViewMut<'a>, output: Output, terms: &'a [Term<'a>], pairs: bool) -> Self {
        for Term { a, b, .. } in terms {
            assert_eq!((c.rows, c.cols), (a.rows, b.cols()), "the product's shape");
        }
        Sum { c: c.data.as_mut_ptr(), c_stride: c.row_stride, m: c.rows, n: c.cols, output, terms, pairs }
    }

    /// Computes rows `row..row + rows` and columns `col..col + cols` of C.
    fn compute(&self, row: usize, rows: usize, col: usize, cols: usize) {
        assert!(row + rows <= self.m && col + cols <= self.n);
        if self.terms.iter().all(|term| term.a.cols == 0) {
            return self.compute_empty(row, rows, col, cols);
        }
        PANELS.with_borrow_mut(|panels| {
            let panels_len = 2 * MAX_TASK_COLS * MAX_K_BLOCK;
            panels.resize(panels.len().max(panels_len + panel::SCRATCH), 0.0);
            let (panels, scratch) = panels.split_at_mut(panels_len);
            Arch::new().dispatch(Block { sum: self, panels, scratch, row, rows, col, cols });
        });
    }

    fn compute_empty(&self, row: usize, rows: usize, col: usize, cols: usize) {
        if self.output == Output::Set {
            for i in row..row + rows {
                // SAFETY: the block is inside C, and no other task touches it.
                let c = unsafe { std::slice::from_raw_parts_mut(self.c.add(i * self.c_stride + col), cols) };
                c.fill(0.0);
            }
        }
    }
}

struct Block<'p, 'a> {
    sum: &'p Sum<'a>,
    panels: &'p mut [f32],
    /// For numbers on their way into a panel.
    scratch: &'p mut [f32],
    row: usize,
    rows: usize,
    col: usize,
    cols: usize,
}

impl WithSimd for Block<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        // A tile holds rows × vectors accumulators, as many vectors of B and one of A in registers. Where one vector is
        // as wide as the whole block, it has twice the rows.
        match (S::REGISTER_COUNT >= 32, self.cols <= S::F32_LANES) {
            (true, false) => self.run::<S, 12, 2>(simd),
            (true, true) => self.run::<S, 24, 1>(simd),
            (false, false) => self.run::<S, 6, 2>(simd),
            (false, true) => self.run::<S, 12, 1>(simd),
        }
    }
}

impl Block<'_, '_> {
    #[inline(always)]
    fn run<S: Simd, const TILE_ROWS: usize, const VECTORS: usize>(mut self, simd: S) {
        let mut output = self.sum.output;
        for term in self.sum.terms {
            let longest = if let Operand::InPlace(_) = term.b { MAX_IN_PLACE_BLOCK } else { MAX_K_BLOCK };
            // Of pairs that are taken apart there are two floats; the blocks are those of pairs.
            let floats = if term.precision == Precision::Bf16 && !self.sum.pairs { 2 } else { 1 };
            let k = term.a.cols / floats;
            let k_block = block_of_k(k, longest);
            for k0 in (0..k).step_by(k_block) {
                let depth = k_block.min(k - k0);
                self.add::<S, TILE_ROWS, VECTORS>(simd, term, floats, k0, depth, output);
                output = Output::Add;
            }
        }
    }

    /// Columns `k0..k0 + depth` of A, each of so many floats, times as many rows of B.
    #[inline(always)]
    fn add<S: Simd, const TILE_ROWS: usize, const VECTORS: usize>(
        &mut self,
        simd: S,
        term: &Term<'_>,
        floats: usize,
        k0: usize,
        depth: usize,
        output: Output,
    ) {
        let Block { sum: p, row, rows, col, cols, .. } = *self;
        let width = VECTORS * S::F32_LANES;
        let panel_starts = (0..cols).step_by(width);
        let in_place = |j: usize| match &term.b {
            Operand::InPlace(view) if cols - j >= width && term.precision == Precision::F32 => {
                Some(&view.data[k0 * view.row_stride + col + j..])
            }
            _ => None,
        };
        for (j, panel) in panel_starts.clone().zip(self.panels.chunks_exact_mut(width * floats * depth)) {
            if in_place(j).is_some() {
                continue;
            }
            let Term { b, precision, .. } = *term;
            let from = Panel { b, precision, k0, col: col + j, cols: width.min(cols - j), width };
            match floats {
                1 => from.pack(panel, self.scratch),
                _ => from.pack_unpaired(panel, self.scratch),
            }
        }
        let mut i = 0;
        while i < rows {
            let tile_rows = match rows - i {
                left if left >= TILE_ROWS => TILE_ROWS,
                left if left >= 4 => 4,
                left if left >= 2 => 2,
                _ => 1,
            };
            for (j, panel) in panel_starts.clone().zip(self.panels.chunks_exact(width * floats * depth)) {
                let (b, b_row) = match (in_place(j), &term.b) {
                    (Some(b), Operand::InPlace(view)) => (b, view.row_stride),
                    _ => (panel, width),
                };
                assert!(b.len() >= (floats * depth - 1) * b_row + width);
                // SAFETY: rows row+i .. row+i+tile_rows and columns k0 .. k0+depth of A are inside it, the columns of
                // C end at col+cols, and no other task touches this block of C.
                unsafe {
                    let t = Tile {
                        pairs: p.pairs && term.precision == Precision::Bf16,
                        depth: floats * depth,
                        a: term.a.data.as_ptr().add((row + i) * term.a.row_stride + floats * k0 * term.a.col_stride),
                        a_row: term.a.row_stride,
                        a_col: term.a.col_stride,
                        b: b.as_ptr(),
                        b_row,
                        c: p.c.add((row + i) * p.c_stride + col + j),
                        c_row: p.c_stride,
                        cols: width.min(cols - j),
                        alpha: term.alpha,
                        output,
                    };
                    // Called by name: a function pointer would be compiled without this CPU's instructions.
                    match tile_rows {
                        4 => tile::<S, 4, VECTORS>(simd, t),
                        2 => tile::<S, 2, VECTORS>(simd, t),
                        1 => tile::<S, 1, VECTORS>(simd, t),
                        _ => tile::<S, TILE_ROWS, VECTORS>(simd, t),
                    }
                }
            }
            i += tile_rows;
        }
    }
}

#[cfg(test)]
mod tests;
