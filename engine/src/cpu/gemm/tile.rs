//! The micro-kernel, in each of its forms.

use pulp::Simd;

use super::Output;

/// Whether this CPU multiplies pairs of bf16.
pub(super) fn multiplies_pairs() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        // Tiles are then as large as AVX-512's registers allow, which all of pulp's V4 implies.
        std::arch::is_x86_feature_detected!("avx512bf16") && pulp::x86::V4::try_new().is_some()
    }
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// A tile of C: up to TILE_ROWS rows of A, `depth` long, times one panel of B.
#[derive(Clone, Copy)]
pub(super) struct Tile {
    /// Whether A and B hold pairs, which this CPU multiplies.
    pub(super) pairs: bool,
    /// Floats of a row of A, or pairs.
    pub(super) depth: usize,
    pub(super) a: *const f32,
    pub(super) a_row: usize,
    pub(super) a_col: usize,
    pub(super) b: *const f32,
    pub(super) b_row: usize,
    pub(super) c: *mut f32,
    pub(super) c_row: usize,
    pub(super) cols: usize,
    pub(super) alpha: f32,
    pub(super) output: Output,
}

/// Computes a tile.
///
/// # Safety
/// `a` is readable at i · a_row + k · a_col for i < ROWS, k < depth; `b` at k · b_row and VECTORS vectors from there; `c` is
/// writable for ROWS rows of `cols`.
#[inline(always)]
pub(super) unsafe fn tile<S: Simd, const ROWS: usize, const VECTORS: usize>(simd: S, t: Tile) {
    assert!(t.cols <= VECTORS * S::F32_LANES);
    #[cfg(target_arch = "x86_64")]
    if t.pairs {
        assert_eq!(S::F32_LANES, native::LANES);
        // SAFETY: as this function's, and pairs are there only where the CPU has the instructions.
        return unsafe { native::tile::<ROWS, VECTORS>(t) };
    }
    // SAFETY: as this function's.
    unsafe { store(simd, t, sums::<S, ROWS, VECTORS>(simd, t)) }
}

/// Σ a · b.
///
/// # Safety
/// As for [`tile`].
#[inline(always)]
unsafe fn sums<S: Simd, const ROWS: usize, const VECTORS: usize>(simd: S, t: Tile) -> [[S::f32s; VECTORS]; ROWS] {
    let mut sums = [[simd.splat_f32s(0.0); VECTORS]; ROWS];
    let (mut a, mut b) = (t.a, t.b);
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
    sums
}

/// C = alpha · sums, or +=.
///
/// # Safety
/// As for [`tile`].
#[inline(always)]
unsafe fn store<S: Simd, const ROWS: usize, const VECTORS: usize>(simd: S, t: Tile, sums: [[S::f32s; VECTORS]; ROWS]) {
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

/// The form that multiplies pairs of bf16 with one instruction.
#[cfg(target_arch = "x86_64")]
// Arrays of vectors stay in registers when they are indexed.
#[allow(clippy::needless_range_loop)]
mod native {
    use std::arch::x86_64::*;

    use super::{Output, Tile};

    /// Floats of a vector.
    pub(super) const LANES: usize = 16;

    /// # Safety
    /// As for [`super::tile`], with vectors of 16 floats.
    #[target_feature(enable = "avx512f,avx512bf16")]
    pub(super) unsafe fn tile<const ROWS: usize, const VECTORS: usize>(t: Tile) {
        let mut sums = [[_mm512_setzero_ps(); VECTORS]; ROWS];
        let (mut a, mut b) = (t.a, t.b);
        for _ in 0..t.depth {
            // SAFETY: the caller vouches for `a` and `b`; vectors of bf16 and of integers are both 512 bits.
            unsafe {
                let mut vectors = [_mm512_setzero_si512(); VECTORS];
                for v in 0..VECTORS {
                    vectors[v] = _mm512_loadu_si512(b.add(v * LANES).cast());
                }
                for i in 0..ROWS {
                    let pairs = _mm512_set1_epi32(a.add(i * t.a_row).cast::<i32>().read());
                    for v in 0..VECTORS {
                        let [pairs, vector] = [pairs, vectors[v]].map(|x| std::mem::transmute::<__m512i, __m512bh>(x));
                        sums[i][v] = _mm512_dpbf16_ps(sums[i][v], pairs, vector);
                    }
                }
            }
            a = a.wrapping_add(t.a_col);
            b = b.wrapping_add(t.b_row);
        }
        let alpha = _mm512_set1_ps(t.alpha);
        for i in 0..ROWS {
            for v in 0..VECTORS {
                let left = t.cols.saturating_sub(v * LANES).min(LANES);
                let mask = ((1u32 << left) - 1) as __mmask16;
                let product = _mm512_mul_ps(alpha, sums[i][v]);
                // SAFETY: the caller vouches for `c`, and the mask ends at `cols`.
                unsafe {
                    let c = t.c.wrapping_add(i * t.c_row + v * LANES);
                    let value = match t.output {
                        Output::Set => product,
                        Output::Add => _mm512_add_ps(_mm512_maskz_loadu_ps(mask, c), product),
                    };
                    _mm512_mask_storeu_ps(c, mask, value);
                }
            }
        }
    }
}
