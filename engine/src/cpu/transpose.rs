//! Writes eight columns, each contiguous, side by side: out[k · width + j] = columns[j][k]. Packing Wᵀ is made of this.
//!
//! With AVX, squares of eight go through registers: about one instruction an element instead of four.

/// Columns that are taken at a time.
pub(super) const COLUMNS: usize = 8;

/// Interleaves eight columns into rows that start `width` apart.
pub(super) fn interleave(columns: &[&[f32]; COLUMNS], out: &mut [f32], width: usize) {
    let depth = columns[0].len();
    assert!(columns.iter().all(|column| column.len() == depth));
    assert!(depth == 0 || (depth - 1) * width + COLUMNS <= out.len());
    let done = squares(columns, out, width);
    for k in done..depth {
        for (j, column) in columns.iter().enumerate() {
            out[k * width + j] = column[k];
        }
    }
}

/// Does whole squares where the CPU can; returns how many rows are done.
fn squares(columns: &[&[f32]; COLUMNS], out: &mut [f32], width: usize) -> usize {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx") {
        // SAFETY: the CPU has AVX, and `interleave` checked all lengths.
        return unsafe { squares_avx(columns, out, width) };
    }
    let _ = (columns, out, width);
    0
}

/// # Safety
/// All columns are as long as the first, and `out` holds as many rows of [`COLUMNS`], `width` apart.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx")]
unsafe fn squares_avx(columns: &[&[f32]; COLUMNS], out: &mut [f32], width: usize) -> usize {
    use std::arch::x86_64::*;
    let whole = columns[0].len() / COLUMNS * COLUMNS;
    for k in (0..whole).step_by(COLUMNS) {
        // SAFETY: k + 8 is within every column.
        let c = columns.map(|column| unsafe { _mm256_loadu_ps(column.as_ptr().add(k)) });
        // Pairs of columns, then fours, then the halves of all eight.
        let low = [0, 2, 4, 6].map(|j| _mm256_unpacklo_ps(c[j], c[j + 1]));
        let high = [0, 2, 4, 6].map(|j| _mm256_unpackhi_ps(c[j], c[j + 1]));
        let fours = [
            [_mm256_shuffle_ps::<0x44>(low[0], low[1]), _mm256_shuffle_ps::<0x44>(low[2], low[3])],
            [_mm256_shuffle_ps::<0xEE>(low[0], low[1]), _mm256_shuffle_ps::<0xEE>(low[2], low[3])],
            [_mm256_shuffle_ps::<0x44>(high[0], high[1]), _mm256_shuffle_ps::<0x44>(high[2], high[3])],
            [_mm256_shuffle_ps::<0xEE>(high[0], high[1]), _mm256_shuffle_ps::<0xEE>(high[2], high[3])],
        ];
        for (i, [left, right]) in fours.into_iter().enumerate() {
            // SAFETY: rows k + i and k + i + 4 are within `out`.
            unsafe {
                let row = out.as_mut_ptr().add((k + i) * width);
                _mm256_storeu_ps(row, _mm256_permute2f128_ps::<0x20>(left, right));
                _mm256_storeu_ps(row.add(4 * width), _mm256_permute2f128_ps::<0x31>(left, right));
            }
        }
    }
    whole
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_element_lands_in_its_place_and_nothing_else_is_touched() {
        for depth in [0, 1, 7, 8, 21, 64] {
            let values: Vec<f32> = (0..COLUMNS * depth).map(|i| i as f32).collect();
            let columns: [&[f32]; COLUMNS] = std::array::from_fn(|j| &values[j * depth..][..depth]);
            let width = 11;
            let mut out = vec![-1.0; depth * width];
            interleave(&columns, &mut out, width);
            for k in 0..depth {
                for j in 0..width {
                    let expected = if j < COLUMNS { columns[j][k] } else { -1.0 };
                    assert_eq!(out[k * width + j], expected);
                }
            }
        }
    }
}
