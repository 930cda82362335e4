//! Matrix products: C [m, n] = alpha · A [m, k] · B [k, n], or added to what C holds.
//!
//! After Goto and van de Geijn (2008), with two differences that suit training on a few cores. B (usually a weight) is
//! packed block by block into panels as wide as two vector registers, whatever its layout, so one copy of a weight
//! serves forward (B = Wᵀ) and backward (B = W). A (usually activations) is read where it lies.
//!
//! Every element of C is one chain of fused multiply-adds over k, in blocks of [`block_of_k`], whatever the number of
//! rows, threads or vector lanes. So a row's result depends neither on what it is packed with nor on the machine's size.

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::simd::{dot, vectorize};
use super::transpose::{COLUMNS, interleave};
use super::weight::Matrix;

/// A matrix to read: element (i, j) is `data[i * row_stride + j * col_stride]`.
#[derive(Clone, Copy)]
pub(crate) struct View<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
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
}

/// The right side of a product.
#[derive(Clone, Copy)]
pub(crate) enum Operand<'a> {
    /// Packed from where it lies.
    View(View<'a>),
    /// A row-major matrix that is not packed: for products of so few rows that packing would not pay.
    InPlace(View<'a>),
    /// B = W, widened as it is packed.
    Stored(Matrix<'a>),
    /// B = Wᵀ, widened as it is packed.
    StoredTransposed(Matrix<'a>),
}

impl<'a> From<View<'a>> for Operand<'a> {
    fn from(view: View<'a>) -> Self {
        Operand::View(view)
    }
}

impl<'a> Operand<'a> {
    /// B = W.
    pub(crate) fn new(w: Matrix<'a>) -> Self {
        w.view().map_or(Operand::Stored(w), Operand::View)
    }

    /// B = Wᵀ.
    pub(crate) fn transposed(w: Matrix<'a>) -> Self {
        w.view().map_or(Operand::StoredTransposed(w), |view| Operand::View(view.t()))
    }

    fn rows(&self) -> usize {
        match self {
            Operand::View(view) | Operand::InPlace(view) => view.rows,
            Operand::Stored(w) => w.rows,
            Operand::StoredTransposed(w) => w.cols,
        }
    }

    fn cols(&self) -> usize {
        match self {
            Operand::View(view) | Operand::InPlace(view) => view.cols,
            Operand::Stored(w) => w.cols,
            Operand::StoredTransposed(w) => w.rows,
        }
    }
}

/// A row-major matrix to write, rows `row_stride` apart.
pub(crate) struct ViewMut<'a> {
    data: &'a mut [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
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

/// What becomes of the values that C holds.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Output {
    /// They are overwritten.
    Set,
    /// The product is added to them.
    Add,
}

/// Columns of C that one task may compute; multiples of every panel width.
const TASK_COLS: [usize; 3] = [96, 64, 32];
const MAX_TASK_COLS: usize = TASK_COLS[0];
/// Rows of C that one task computes are a multiple of this, and so of every tile but the last.
const TASK_ROWS: usize = 48;
/// To pack a column of B takes as long as this many rows of products with it.
const PACKING_ROWS: usize = 16;
/// Longest stretch of k whose panels are packed at a time.
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
}

impl<'a> Term<'a> {
    pub(crate) fn new(alpha: f32, a: View<'a>, b: impl Into<Operand<'a>>) -> Self {
        Term { alpha, a, b: b.into() }
    }
}

/// C = alpha · A · B (or +=) on all threads.
pub(crate) fn gemm<'b>(c: ViewMut<'_>, output: Output, alpha: f32, a: View<'b>, b: impl Into<Operand<'b>>) {
    gemm_sum(c, output, &[Term::new(alpha, a, b)]);
}

/// C = Σ alpha · A · B (or +=) on all threads, in one pass over C.
pub(crate) fn gemm_sum(c: ViewMut<'_>, output: Output, terms: &[Term<'_>]) {
    let sum = Sum::new(c, output, terms);
    let cut = Cut::new(sum.m, sum.n, rayon::current_num_threads());
    (0..cut.col_tasks * cut.row_tasks).into_par_iter().with_max_len(1).for_each(|task| {
        let (col, row) = (task / cut.row_tasks * cut.cols, task % cut.row_tasks * cut.rows);
        sum.compute(row, cut.rows.min(sum.m - row), col, cut.cols.min(sum.n - col));
    });
}

/// C = alpha · A · B (or +=) on this thread, for products inside an already parallel loop.
pub(crate) fn gemm_serial<'b>(c: ViewMut<'_>, output: Output, alpha: f32, a: View<'b>, b: impl Into<Operand<'b>>) {
    let terms = [Term::new(alpha, a, b)];
    let sum = Sum::new(c, output, &terms);
    for col in (0..sum.n).step_by(MAX_TASK_COLS) {
        sum.compute(0, sum.m, col, MAX_TASK_COLS.min(sum.n - col));
    }
}

/// y [n] = W [n, k] · x [k] (or +=), for writing one token at a time: bound by reading W, so nothing is packed.
pub(crate) fn matvec(w: Matrix<'_>, x: &[f32], output: Output, y: &mut [f32]) {
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
                        let product = match w.row(row) {
                            Some(row) => dot(row, x),
                            None => {
                                w.widen(row, 0, scratch);
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

/// A sum of products, to be computed in disjoint blocks of C.
struct Sum<'a> {
    c: *mut f32,
    c_stride: usize,
    m: usize,
    n: usize,
    output: Output,
    terms: &'a [Term<'a>],
}

// SAFETY: `c` comes from an exclusive borrow that outlives the sum, and tasks write disjoint blocks of it.
unsafe impl Sync for Sum<'_> {}

thread_local! {
    /// Where this thread packs panels of B; kept, so that no page of it is faulted in twice.
    static PANELS: std::cell::RefCell<Vec<f32>> = const { std::cell::RefCell::new(Vec::new()) };
}

impl<'a> Sum<'a> {
    fn new(c: ViewMut<'a>, output: Output, terms: &'a [Term<'a>]) -> Self {
        for Term { a, b, .. } in terms {
            assert_eq!((c.rows, c.cols), (a.rows, b.cols()), "the product's shape");
            assert_eq!(a.cols, b.rows(), "the length of the dot products");
        }
        Sum { c: c.data.as_mut_ptr(), c_stride: c.row_stride, m: c.rows, n: c.cols, output, terms }
    }

    /// Computes rows `row..row + rows` and columns `col..col + cols` of C.
    fn compute(&self, row: usize, rows: usize, col: usize, cols: usize) {
        assert!(row + rows <= self.m && col + cols <= self.n);
        if self.terms.iter().all(|term| term.a.cols == 0) {
            return self.compute_empty(row, rows, col, cols);
        }
        PANELS.with_borrow_mut(|panels| {
            let panels_len = MAX_TASK_COLS * MAX_K_BLOCK;
            panels.resize(panels.len().max(panels_len + COLUMNS * MAX_K_BLOCK), 0.0);
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
    /// For columns that are widened before they are packed.
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
            let k_block = block_of_k(term.a.cols, longest);
            for k0 in (0..term.a.cols).step_by(k_block) {
                let depth = k_block.min(term.a.cols - k0);
                self.add::<S, TILE_ROWS, VECTORS>(simd, term, k0, depth, output);
                output = Output::Add;
            }
        }
    }

    /// Columns `k0..k0 + depth` of A times as many rows of B.
    #[inline(always)]
    fn add<S: Simd, const TILE_ROWS: usize, const VECTORS: usize>(
        &mut self,
        simd: S,
        term: &Term<'_>,
        k0: usize,
        depth: usize,
        output: Output,
    ) {
        let Block { sum: p, row, rows, col, cols, .. } = *self;
        let width = VECTORS * S::F32_LANES;
        let panel_starts = (0..cols).step_by(width);
        let in_place = |j: usize| match &term.b {
            Operand::InPlace(view) if cols - j >= width => Some(&view.data[k0 * view.row_stride + col + j..]),
            _ => None,
        };
        for (j, panel) in panel_starts.clone().zip(self.panels.chunks_exact_mut(width * depth)) {
            if in_place(j).is_none() {
                pack(panel, self.scratch, width, &term.b, k0, col + j, width.min(cols - j));
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
            for (j, panel) in panel_starts.clone().zip(self.panels.chunks_exact(width * depth)) {
                let (b, b_row) = match (in_place(j), &term.b) {
                    (Some(b), Operand::InPlace(view)) => (b, view.row_stride),
                    _ => (panel, width),
                };
                assert!(b.len() >= (depth - 1) * b_row + width);
                // SAFETY: rows row+i .. row+i+tile_rows and columns k0 .. k0+depth are inside A, the columns of
                // C end at col+cols, and no other task touches this block of C.
                unsafe {
                    let t = Tile {
                        depth,
                        a: term.a.data.as_ptr().add((row + i) * term.a.row_stride + k0 * term.a.col_stride),
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

/// Copies rows `k0 ..` and columns `col .. col + cols` of B into a panel [depth, width]; missing columns become zero.
#[inline(always)]
fn pack(panel: &mut [f32], scratch: &mut [f32], width: usize, b: &Operand<'_>, k0: usize, col: usize, cols: usize) {
    let depth = panel.len() / width;
    if cols < width {
        panel.fill(0.0);
    }
    match b {
        Operand::View(view) | Operand::InPlace(view) if view.col_stride == 1 => {
            pack_rows(panel, width, cols, |k, out| {
                // With the constant length this is two vector moves; with the other, a call of memcpy.
                let row = &view.data[(k0 + k) * view.row_stride + col..];
                if out.len() == width { out.copy_from_slice(&row[..width]) } else { out.copy_from_slice(&row[..cols]) }
            })
        }
        Operand::Stored(w) => pack_rows(panel, width, cols, |k, out| w.widen(k0 + k, col, out)),
        Operand::View(view) | Operand::InPlace(view) => {
            // A transposed matrix: its columns are contiguous.
            assert_eq!(view.row_stride, 1, "one stride is 1");
            let column = |j: usize| &view.data[(col + j) * view.col_stride + k0..][..depth];
            let whole = cols / COLUMNS * COLUMNS;
            for j in (0..whole).step_by(COLUMNS) {
                interleave(&std::array::from_fn(|i| column(j + i)), &mut panel[j..], width);
            }
            (whole..cols).for_each(|j| place(panel, width, j, column(j)));
        }
        Operand::StoredTransposed(w) => {
            let scratch = &mut scratch[..COLUMNS * depth];
            for j in (0..cols).step_by(COLUMNS) {
                let count = COLUMNS.min(cols - j);
                for (i, column) in scratch.chunks_exact_mut(depth).take(count).enumerate() {
                    w.widen(col + j + i, k0, column);
                }
                let column = |i: usize| &scratch[i * depth..][..depth];
                match count {
                    COLUMNS => interleave(&std::array::from_fn(column), &mut panel[j..], width),
                    _ => (0..count).for_each(|i| place(panel, width, j + i, column(i))),
                }
            }
        }
    }
}

#[inline(always)]
fn pack_rows(panel: &mut [f32], width: usize, cols: usize, write: impl Fn(usize, &mut [f32])) {
    for (k, out) in panel.chunks_exact_mut(width).enumerate() {
        if cols == width { write(k, out) } else { write(k, &mut out[..cols]) }
    }
}

/// Writes one column into a panel.
#[inline(always)]
fn place(panel: &mut [f32], width: usize, j: usize, column: &[f32]) {
    for (k, value) in column.iter().enumerate() {
        panel[k * width + j] = *value;
    }
}

/// A tile of C: up to TILE_ROWS rows of A, `depth` long, times one panel of B.
struct Tile {
    depth: usize,
    a: *const f32,
    a_row: usize,
    a_col: usize,
    b: *const f32,
    b_row: usize,
    c: *mut f32,
    c_row: usize,
    cols: usize,
    alpha: f32,
    output: Output,
}

/// The micro-kernel.
///
/// # Safety
/// `a` is readable at i · a_row + k · a_col for i < ROWS, k < depth; `b` at k · b_row and VECTORS vectors from there; `c` is
/// writable for ROWS rows of `cols`.
#[inline(always)]
unsafe fn tile<S: Simd, const ROWS: usize, const VECTORS: usize>(simd: S, t: Tile) {
    assert!(t.cols <= VECTORS * S::F32_LANES);
    let zero = simd.splat_f32s(0.0);
    let mut sums = [[zero; VECTORS]; ROWS];
    let mut a = t.a;
    let mut b = t.b;
    for _ in 0..t.depth {
        // SAFETY: the caller vouches for `a` and `b`.
        unsafe {
            let vectors: [S::f32s; VECTORS] = std::array::from_fn(
                #[inline(always)]
                |v| b.add(v * S::F32_LANES).cast::<S::f32s>().read_unaligned(),
            );
            for (i, sum) in sums.iter_mut().enumerate() {
                let x = simd.splat_f32s(*a.add(i * t.a_row));
                // Not as a zip of iterators: that makes the whole step twice as slow.
                #[allow(clippy::needless_range_loop)]
                for v in 0..VECTORS {
                    sum[v] = simd.mul_add_f32s(x, vectors[v], sum[v]);
                }
            }
        }
        a = a.wrapping_add(t.a_col);
        b = b.wrapping_add(t.b_row);
    }
    let alpha = simd.splat_f32s(t.alpha);
    for (i, sum) in sums.iter().enumerate() {
        for (half, &sum) in sum.iter().enumerate() {
            let from = half * S::F32_LANES;
            let product = simd.mul_f32s(alpha, sum);
            if t.cols >= from + S::F32_LANES {
                // SAFETY: the caller vouches for `c`, and a whole vector of it is left.
                unsafe {
                    let c = t.c.add(i * t.c_row + from).cast::<S::f32s>();
                    let value = match t.output {
                        Output::Set => product,
                        Output::Add => simd.add_f32s(c.read_unaligned(), product),
                    };
                    c.write_unaligned(value);
                }
            } else if t.cols > from {
                // SAFETY: the caller vouches for `c`, and the slice ends at `cols`.
                let c = unsafe { std::slice::from_raw_parts_mut(t.c.add(i * t.c_row + from), t.cols - from) };
                let value = match t.output {
                    Output::Set => product,
                    Output::Add => simd.add_f32s(simd.partial_load_f32s(c), product),
                };
                simd.partial_store_f32s(c, value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn numbers(n: usize, seed: u64) -> Vec<f32> {
        let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        (0..n)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                (state >> 40) as f32 / (1 << 23) as f32 - 1.0
            })
            .collect()
    }

    /// Checks both layouts of A and B, set and add, against sums in f64.
    fn check(m: usize, n: usize, k: usize, seed: u64) {
        let (a, b, c) = (numbers(m * k, seed), numbers(k * n, seed + 1), numbers(m * n, seed + 2));
        for (a_transposed, b_transposed) in [(false, false), (false, true), (true, false)] {
            let a_view = if a_transposed { View::new(&a, k, m).t() } else { View::new(&a, m, k) };
            let b_view = if b_transposed { View::new(&b, n, k).t() } else { View::new(&b, k, n) };
            let at = |v: &View<'_>, i: usize, j: usize| f64::from(v.data[i * v.row_stride + j * v.col_stride]);
            for output in [Output::Set, Output::Add] {
                let mut parallel = c.clone();
                gemm(ViewMut::new(&mut parallel, m, n), output, 0.5, a_view, b_view);
                let mut serial = c.clone();
                gemm_serial(ViewMut::new(&mut serial, m, n), output, 0.5, a_view, b_view);
                assert_eq!(parallel, serial);
                if !b_transposed && k > 0 {
                    let mut in_place = c.clone();
                    let b = Operand::InPlace(b_view);
                    gemm(ViewMut::new(&mut in_place, m, n), output, 0.5, a_view, b);
                    for (a, b) in in_place.iter().zip(&parallel) {
                        assert!((a - b).abs() < 1e-4, "{a} {b}");
                    }
                }
                for i in 0..m {
                    for j in 0..n {
                        let dot: f64 = (0..k).map(|k| at(&a_view, i, k) * at(&b_view, k, j)).sum();
                        let held = if output == Output::Add { f64::from(c[i * n + j]) } else { 0.0 };
                        let error = (f64::from(parallel[i * n + j]) - held - 0.5 * dot).abs();
                        assert!(error < 1e-5 * (k as f64).sqrt().max(1.0), "({i}, {j}): {error}");
                    }
                }
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn products_equal_sums_in_f64(m in 1usize..40, n in 1usize..140, k in 0usize..90, seed in 0u64..1000) {
            check(m, n, k, seed);
        }
    }

    #[test]
    fn long_sums_are_cut_into_blocks() {
        check(7, 33, 2 * MAX_K_BLOCK + 3, 5);
    }

    #[test]
    fn a_sum_of_products_is_the_products_one_after_the_other() {
        let (m, n) = (50, 33);
        let (a, b, a2, b2) = (numbers(m * 700, 1), numbers(n * 700, 2), numbers(m * 8, 3), numbers(8 * n, 4));
        let (a, b) = (View::new(&a, m, 700), View::new(&b, n, 700).t());
        let (a2, b2) = (View::new(&a2, m, 8), View::new(&b2, 8, n));
        let (mut at_once, mut in_turn) = (vec![0.0; m * n], vec![0.0; m * n]);
        let terms = [Term::new(1.0, a, b), Term::new(0.5, a2, b2)];
        gemm_sum(ViewMut::new(&mut at_once, m, n), Output::Set, &terms);
        gemm(ViewMut::new(&mut in_turn, m, n), Output::Set, 1.0, a, b);
        gemm(ViewMut::new(&mut in_turn, m, n), Output::Add, 0.5, a2, b2);
        assert_eq!(at_once, in_turn);
    }

    #[test]
    fn tasks_cover_a_matrix_whatever_the_number_of_threads() {
        for (m, n, threads) in [(1, 1, 1), (0, 5, 2), (512, 576, 2), (759, 576, 2), (512, 192, 16), (7, 49152, 64)] {
            let cut = Cut::new(m, n, threads);
            assert!(cut.rows * cut.row_tasks >= m && cut.cols * cut.col_tasks >= n, "{m}×{n}");
            assert!(cut.row_tasks == 0 || cut.rows * (cut.row_tasks - 1) < m, "{m}×{n}: an empty task");
        }
        let cut = Cut::new(512, 576, 2);
        assert_eq!(cut.row_tasks * cut.col_tasks % 2, 0, "two threads are done at the same time");
    }

    #[test]
    fn a_row_is_the_same_alone_and_among_others() {
        let (m, n, k) = (61, 200, 700);
        let (a, b) = (numbers(m * k, 1), numbers(n * k, 2));
        let mut all = vec![0.0; m * n];
        gemm(ViewMut::new(&mut all, m, n), Output::Set, 1.0, View::new(&a, m, k), View::new(&b, n, k).t());
        for i in [0, 5, 59, 60] {
            let mut alone = vec![0.0; n];
            let row = &a[i * k..][..k];
            gemm(ViewMut::new(&mut alone, 1, n), Output::Set, 1.0, View::new(row, 1, k), View::new(&b, n, k).t());
            assert_eq!(alone, all[i * n..][..n]);
        }
    }

    #[test]
    fn columns_beyond_the_view_are_left_alone() {
        let (a, b) = (numbers(6 * 8, 1), numbers(8 * 5, 2));
        let mut c = vec![7.0; 6 * 9];
        gemm(ViewMut::strided(&mut c, 6, 5, 9), Output::Set, 1.0, View::new(&a, 6, 8), View::new(&b, 8, 5));
        for row in c.chunks(9) {
            assert_eq!(row[5..], [7.0; 4]);
            assert!(row[..5].iter().all(|x| *x != 7.0));
        }
    }
}
