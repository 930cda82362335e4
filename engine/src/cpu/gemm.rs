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
    /// Read where it lies.
    View(View<'a>),
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
            Operand::View(view) => view.rows,
            Operand::Stored(w) => w.rows,
            Operand::StoredTransposed(w) => w.cols,
        }
    }

    fn cols(&self) -> usize {
        match self {
            Operand::View(view) => view.cols,
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

/// Columns of C that one task computes; a multiple of every panel width.
const TASK_COLS: usize = 64;
/// Rows of C that one task computes when the columns alone do not keep all threads busy.
const TASK_ROWS: usize = 48;
/// Longest stretch of k whose panels are packed at a time.
const MAX_K_BLOCK: usize = 640;

/// The length of the stretches into which k is cut: as even as can be, and the same for every caller.
fn block_of_k(k: usize) -> usize {
    k.div_ceil(k.div_ceil(MAX_K_BLOCK).max(1)).max(1)
}

/// C = alpha · A · B (or +=) on all threads.
pub(crate) fn gemm<'b>(c: ViewMut<'_>, output: Output, alpha: f32, a: View<'_>, b: impl Into<Operand<'b>>) {
    let product = Product::new(c, output, alpha, a, b.into());
    let col_tasks = product.n.div_ceil(TASK_COLS);
    let wanted = 4 * rayon::current_num_threads();
    let row_tasks = wanted.div_ceil(col_tasks.max(1)).clamp(1, product.m.div_ceil(TASK_ROWS).max(1));
    // Whole multiples of TASK_ROWS, so that no task but the last has a ragged tile.
    let rows = product.m.div_ceil(row_tasks).next_multiple_of(TASK_ROWS);
    let row_tasks = product.m.div_ceil(rows);
    (0..col_tasks * row_tasks).into_par_iter().with_max_len(1).for_each(|task| {
        let (col, row) = (task / row_tasks * TASK_COLS, task % row_tasks * rows);
        product.compute(row, rows.min(product.m - row), col, TASK_COLS.min(product.n - col));
    });
}

/// C = alpha · A · B (or +=) on this thread, for products inside an already parallel loop.
pub(crate) fn gemm_serial<'b>(c: ViewMut<'_>, output: Output, alpha: f32, a: View<'_>, b: impl Into<Operand<'b>>) {
    let product = Product::new(c, output, alpha, a, b.into());
    for col in (0..product.n).step_by(TASK_COLS) {
        product.compute(0, product.m, col, TASK_COLS.min(product.n - col));
    }
}

/// y [n] = W [n, k] · x [k], for writing one token at a time: bound by reading W, so nothing is packed.
pub(crate) fn matvec(w: Matrix<'_>, x: &[f32], y: &mut [f32]) {
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
                        *y = match w.row(row) {
                            Some(row) => dot(row, x),
                            None => {
                                w.widen(row, 0, scratch);
                                dot(scratch, x)
                            }
                        };
                    }
                },
            )
        });
    });
}

/// One product, to be computed in disjoint blocks of C.
struct Product<'a> {
    c: *mut f32,
    c_stride: usize,
    m: usize,
    n: usize,
    k: usize,
    output: Output,
    alpha: f32,
    a: View<'a>,
    b: Operand<'a>,
}

// SAFETY: `c` comes from an exclusive borrow that outlives the product, and tasks write disjoint blocks of it.
unsafe impl Sync for Product<'_> {}

thread_local! {
    /// Where this thread packs panels of B; kept, so that no page of it is faulted in twice.
    static PANELS: std::cell::RefCell<Vec<f32>> = const { std::cell::RefCell::new(Vec::new()) };
}

impl<'a> Product<'a> {
    fn new(c: ViewMut<'a>, output: Output, alpha: f32, a: View<'a>, b: Operand<'a>) -> Self {
        assert_eq!((c.rows, c.cols), (a.rows, b.cols()), "the product's shape");
        assert_eq!(a.cols, b.rows(), "the length of the dot products");
        Product { c: c.data.as_mut_ptr(), c_stride: c.row_stride, m: c.rows, n: c.cols, k: a.cols, output, alpha, a, b }
    }

    /// Computes rows `row..row + rows` and columns `col..col + cols` of C.
    fn compute(&self, row: usize, rows: usize, col: usize, cols: usize) {
        assert!(row + rows <= self.m && col + cols <= self.n);
        if self.k == 0 {
            return self.compute_empty(row, rows, col, cols);
        }
        PANELS.with_borrow_mut(|panels| {
            let panels_len = TASK_COLS * MAX_K_BLOCK;
            panels.resize(panels.len().max(panels_len + COLUMNS * MAX_K_BLOCK), 0.0);
            let (panels, scratch) = panels.split_at_mut(panels_len);
            Arch::new().dispatch(Block { product: self, panels, scratch, row, rows, col, cols });
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
    product: &'p Product<'a>,
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
        // A tile holds rows × 2 accumulators, 2 vectors of B and one of A in registers.
        if S::REGISTER_COUNT >= 32 { self.run::<S, 12>(simd) } else { self.run::<S, 6>(simd) }
    }
}

impl Block<'_, '_> {
    #[inline(always)]
    fn run<S: Simd, const TILE_ROWS: usize>(self, simd: S) {
        let Block { product: p, panels, scratch, row, rows, col, cols } = self;
        let width = 2 * S::F32_LANES;
        let k_block = block_of_k(p.k);
        for k0 in (0..p.k).step_by(k_block) {
            let depth = k_block.min(p.k - k0);
            let output = if k0 == 0 { p.output } else { Output::Add };
            let panel_starts = (0..cols).step_by(width);
            for (j, panel) in panel_starts.clone().zip(panels.chunks_exact_mut(width * depth)) {
                pack(panel, scratch, width, &p.b, k0, col + j, width.min(cols - j));
            }
            let mut i = 0;
            while i < rows {
                let tile_rows = match rows - i {
                    left if left >= TILE_ROWS => TILE_ROWS,
                    left if left >= 4 => 4,
                    left if left >= 2 => 2,
                    _ => 1,
                };
                for (j, panel) in panel_starts.clone().zip(panels.chunks_exact(width * depth)) {
                    // SAFETY: rows row+i .. row+i+tile_rows and columns k0 .. k0+depth are inside A, the columns of
                    // C end at col+cols, and no other task touches this block of C.
                    unsafe {
                        let t = Tile {
                            depth,
                            a: p.a.data.as_ptr().add((row + i) * p.a.row_stride + k0 * p.a.col_stride),
                            a_row: p.a.row_stride,
                            a_col: p.a.col_stride,
                            b: panel,
                            c: p.c.add((row + i) * p.c_stride + col + j),
                            c_row: p.c_stride,
                            cols: width.min(cols - j),
                            alpha: p.alpha,
                            output,
                        };
                        // Called by name: a function pointer would be compiled without this CPU's instructions.
                        match tile_rows {
                            4 => tile::<S, 4>(simd, t),
                            2 => tile::<S, 2>(simd, t),
                            1 => tile::<S, 1>(simd, t),
                            _ => tile::<S, TILE_ROWS>(simd, t),
                        }
                    }
                }
                i += tile_rows;
            }
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
        Operand::View(view) if view.col_stride == 1 => pack_rows(panel, width, cols, |k, out| {
            // With the constant length this is two vector moves; with the other, a call of memcpy.
            let row = &view.data[(k0 + k) * view.row_stride + col..];
            if out.len() == width { out.copy_from_slice(&row[..width]) } else { out.copy_from_slice(&row[..cols]) }
        }),
        Operand::Stored(w) => pack_rows(panel, width, cols, |k, out| w.widen(k0 + k, col, out)),
        Operand::View(view) => {
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

/// A tile of C: up to TILE_ROWS rows of A, `depth` long, times one panel.
struct Tile<'p> {
    depth: usize,
    a: *const f32,
    a_row: usize,
    a_col: usize,
    b: &'p [f32],
    c: *mut f32,
    c_row: usize,
    cols: usize,
    alpha: f32,
    output: Output,
}

/// The micro-kernel.
///
/// # Safety
/// `a` is readable at i · a_row + k · a_col for i < ROWS, k < depth; `c` is writable for ROWS rows of `cols`.
#[inline(always)]
unsafe fn tile<S: Simd, const ROWS: usize>(simd: S, t: Tile<'_>) {
    let width = 2 * S::F32_LANES;
    assert!(t.b.len() == t.depth * width && t.cols <= width);
    let zero = simd.splat_f32s(0.0);
    let mut sums = [[zero; 2]; ROWS];
    let mut a = t.a;
    let mut b = t.b.as_ptr();
    for _ in 0..t.depth {
        // SAFETY: the panel holds `depth` rows of `width`, and the caller vouches for `a`.
        unsafe {
            let b0 = b.cast::<S::f32s>().read_unaligned();
            let b1 = b.add(S::F32_LANES).cast::<S::f32s>().read_unaligned();
            for (i, sum) in sums.iter_mut().enumerate() {
                let x = simd.splat_f32s(*a.add(i * t.a_row));
                sum[0] = simd.mul_add_f32s(x, b0, sum[0]);
                sum[1] = simd.mul_add_f32s(x, b1, sum[1]);
            }
            a = a.wrapping_add(t.a_col);
            b = b.add(width);
        }
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
