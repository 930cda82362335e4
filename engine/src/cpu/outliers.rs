//! LLM.int8() (Dettmers et al., 2022): the input of a layer in 8 bits, but for the columns in which there are outliers.

use rayon::prelude::*;

/// Rounds x [rows, cols] into y: each row to codes of −127 to 127 times its largest magnitude / 127, outliers left out.
/// Columns with an outlier, a magnitude of `threshold` or more in any row, stay as they are. Magnitudes are compared and
/// rounded as f16, as bitsandbytes does.
pub(super) fn round(x: &[f32], cols: usize, threshold: f32, y: &mut [f32]) {
    let has_outlier = columns_with_outliers(x, cols, threshold);
    y.par_chunks_mut(cols).zip(x.par_chunks(cols)).for_each(|(y, x)| {
        y.iter_mut().zip(x).for_each(|(y, &x)| *y = half(x));
        let others = y.iter().map(|value| value.abs()).filter(|magnitude| *magnitude < threshold);
        let largest = others.fold(0f32, f32::max);
        // As torch divides a number by a tensor: by way of the reciprocal.
        let factor = if largest > 0.0 { 1.0 / largest * 127.0 } else { 0.0 };
        let step = largest / 127.0;
        for ((y, &x), &is_kept) in y.iter_mut().zip(x).zip(&has_outlier) {
            *y = if is_kept { x } else { (*y * factor).round_ties_even() * step };
        }
    });
}

fn columns_with_outliers(x: &[f32], cols: usize, threshold: f32) -> Vec<bool> {
    let none = || vec![false; cols];
    let either = |mut a: Vec<bool>, b: Vec<bool>| {
        a.iter_mut().zip(b).for_each(|(a, b)| *a |= b);
        a
    };
    let with_row = |mut found: Vec<bool>, row: &[f32]| {
        found.iter_mut().zip(row).for_each(|(found, &x)| *found |= half(x).abs() >= threshold);
        found
    };
    x.par_chunks(cols).fold(none, with_row).reduce(none, either)
}

fn half(x: f32) -> f32 {
    half::f16::from_f32(x).to_f32()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rounded(x: &[f32], cols: usize, threshold: f32) -> Vec<f32> {
        let mut y = vec![f32::NAN; x.len()];
        round(x, cols, threshold, &mut y);
        y
    }

    #[test]
    fn columns_with_an_outlier_stay_and_the_others_have_127_steps() {
        let x = [7.0, 1.0, -0.3, 0.1, 0.5, 2.0];
        let y = rounded(&x, 3, 6.0);
        assert_eq!([y[0], y[3]], [7.0, 0.1]);
        // The second row's largest magnitude is 2; 0.5 is 31.75 of its steps.
        assert_eq!([y[1], y[4], y[5]], [1.0, 32.0 * (2.0 / 127.0), 2.0]);
        assert!((y[2] + 38.0 / 127.0).abs() < 1e-6, "{}", y[2]);
    }

    #[test]
    fn what_shares_a_column_with_an_outlier_counts_for_its_row_s_steps() {
        // In bitsandbytes only the outlier itself is set to zero before the largest magnitude is taken.
        let y = rounded(&[8.0, 1.0, 4.0, 1.0], 2, 6.0);
        assert_eq!(y, [8.0, 1.0, 4.0, 32.0 * (4.0 / 127.0)]);
    }

    #[test]
    fn rows_of_zeros_and_numbers_beyond_f16_are_fine_and_nan_is_not_hidden() {
        assert_eq!(rounded(&[0.0, 0.0, 1e6, 1.0], 2, 6.0), [0.0, 0.0, 1e6, 1.0]);
        assert!(rounded(&[f32::NAN, 1.0], 2, 6.0)[0].is_nan());
    }
}
