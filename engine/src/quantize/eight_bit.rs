//! A weight in 8 bits, row by row, as LLM.int8() stores it (Dettmers et al., 2022).

/// A weight [rows, cols]: each value is code · absmax / 127.
pub struct EightBit {
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
            // bitsandbytes rounds to f16 first.
            let row: Vec<f32> = row.iter().map(|&value| half::f16::from_f32(value).to_f32()).collect();
            let largest = row.iter().fold(0f32, |largest, value| value.abs().max(largest));
            // As torch divides a number by a tensor: by way of the reciprocal.
            let factor = if largest > 0.0 { 1.0 / largest * 127.0 } else { 0.0 };
            codes.extend(row.iter().map(|value| (value * factor).round_ties_even() as i8));
            absmax.push(largest);
        }
        EightBit { rows, cols, codes, absmax }
    }
}
