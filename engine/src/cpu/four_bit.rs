//! Widens 4-bit weights to f32. With AVX2, sixteen values in two registers are the table, and eight codes at a time are
//! looked up in it: about one instruction a weight.

use crate::quantize::{BLOCK, FourBit};

/// Writes the weights from number `start` (row-major) on.
#[inline(always)]
pub(super) fn widen(w: &FourBit, start: usize, out: &mut [f32]) {
    let table = w.code.table();
    let mut at = start;
    let mut out = out;
    while !out.is_empty() {
        let count = (BLOCK - at % BLOCK).min(out.len());
        let (part, rest) = out.split_at_mut(count);
        let scale = w.scales.get(at / BLOCK);
        let done = if at.is_multiple_of(2) { eights(&w.codes[at / 2..], table, scale, part) } else { 0 };
        for (i, out) in part.iter_mut().enumerate().skip(done) {
            let byte = w.codes[(at + i) / 2];
            let code = if (at + i).is_multiple_of(2) { byte >> 4 } else { byte & 15 };
            *out = table[code as usize] * scale;
        }
        at += count;
        out = rest;
    }
}

/// Does whole groups of eight where the CPU can; returns how many weights are done.
#[inline(always)]
fn eights(codes: &[u8], table: &[f32; 16], scale: f32, out: &mut [f32]) -> usize {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the CPU has AVX2.
        return unsafe { eights_avx2(codes, table, scale, out) };
    }
    let _ = (codes, table, scale, out);
    0
}

/// # Safety
/// The CPU has AVX2.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn eights_avx2(codes: &[u8], table: &[f32; 16], scale: f32, out: &mut [f32]) -> usize {
    use std::arch::x86_64::*;
    // SAFETY: both halves of the table are eight floats.
    let (low, high) = unsafe { (_mm256_loadu_ps(table.as_ptr()), _mm256_loadu_ps(table.as_ptr().add(8))) };
    let scale = _mm256_set1_ps(scale);
    // The first weight of a byte is in its high half.
    let shifts = _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24);
    let mut done = 0;
    for (out, bytes) in out.chunks_exact_mut(8).zip(codes.chunks_exact(4)) {
        let word = i32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        let codes = _mm256_srlv_epi32(_mm256_set1_epi32(word), shifts);
        // A permutation looks at the low three bits; the fourth, moved to the sign, chooses the half.
        let (from_low, from_high) = (_mm256_permutevar8x32_ps(low, codes), _mm256_permutevar8x32_ps(high, codes));
        let is_high = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(codes));
        let values = _mm256_mul_ps(_mm256_blendv_ps(from_low, from_high, is_high), scale);
        // SAFETY: the chunk is eight floats.
        unsafe { _mm256_storeu_ps(out.as_mut_ptr(), values) };
        done += 8;
    }
    done
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::quantize::FourBitCode;
    use crate::random;

    proptest! {
        #[test]
        fn any_stretch_is_widened_to_what_its_codes_stand_for(
            rows in 1usize..9, cols in 1usize..200, seed in 0u64..99, from in 0usize..300, len in 0usize..300,
            is_nf4: bool, double_quant: bool,
        ) {
            let values = random::uniform(rows * cols, 1.0, seed);
            let code = if is_nf4 { FourBitCode::Nf4 } else { FourBitCode::Fp4 };
            let w = FourBit::quantize(&values, rows, cols, code, double_quant);
            let from = from.min(values.len());
            let mut out = vec![f32::NAN; len.min(values.len() - from)];
            widen(&w, from, &mut out);
            for (i, x) in (from..).zip(out) {
                let byte = w.codes[i / 2];
                let code = if i % 2 == 0 { byte >> 4 } else { byte & 15 };
                prop_assert_eq!(x, w.code.table()[code as usize] * w.scales.get(i / BLOCK));
            }
        }
    }
}
