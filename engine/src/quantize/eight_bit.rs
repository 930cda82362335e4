//! A weight in 8 bits, row by row, and LLM.int8() (Dettmers et al., 2022): its product with activations in 8 bits too,
//! but for the features in which one is an outlier.

/// Activations of at least this magnitude are outliers.
pub(crate) const OUTLIER: f32 = 6.0;

/// A weight [rows, cols]: each value is code · absmax / 127.
pub(crate) struct EightBit {
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) codes: Vec<i8>,
    /// The largest magnitude of each row.
    pub(crate) absmax: Vec<f32>,
}

impl EightBit {
    /// Quantizes a row-major weight.
    pub(crate) fn quantize(values: &[f32], rows: usize, cols: usize) -> Self {
        let (mut codes, mut absmax) = (Vec::with_capacity(values.len()), Vec::with_capacity(rows));
        for row in values.chunks_exact(cols) {
            let largest = row.iter().fold(0f32, |largest, value| value.abs().max(largest));
            let factor = if largest > 0.0 { 127.0 / largest } else { 0.0 };
            codes.extend(row.iter().map(|value| (value * factor).round_ties_even() as i8));
            absmax.push(largest);
        }
        EightBit { rows, cols, codes, absmax }
    }
}
