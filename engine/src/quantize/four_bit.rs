//! A weight in 4 bits: blocks of 64 in the row-major order of the weight, each divided by its largest magnitude.
//!
//! Codes are those of bitsandbytes' CPU library. Its CUDA kernels find FP4's by other comparisons (0.5 % of the codes
//! differ) and round nested scales without a grid; what either stored is read alike.

use super::FourBitCode;
use super::blockwise;
use super::dynamic_map::dynamic_map;

/// Weights that share a scale.
pub(crate) const BLOCK: usize = 64;

/// bitsandbytes' tables.
const NF4: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];
const FP4: [f32; 16] = [
    0.0,
    0.005_208_333_5,
    0.666_666_7,
    1.0,
    0.333_333_34,
    0.5,
    0.166_666_67,
    0.25,
    0.0,
    -0.005_208_333_5,
    -0.666_666_7,
    -1.0,
    -0.333_333_34,
    -0.5,
    -0.166_666_67,
    -0.25,
];

impl FourBitCode {
    /// What each code stands for.
    pub(crate) fn table(self) -> &'static [f32; 16] {
        match self {
            FourBitCode::Nf4 => &NF4,
            FourBitCode::Fp4 => &FP4,
        }
    }

    /// The codes in the order of their values, and the values half way between each and the next.
    fn bounds(self) -> ([u8; 16], [f32; 15]) {
        let table = self.table();
        let mut order: [u8; 16] = std::array::from_fn(|i| i as u8);
        order.sort_by(|&a, &b| table[a as usize].total_cmp(&table[b as usize]));
        let value = |i: usize| table[order[i] as usize];
        (order, std::array::from_fn(|i| (value(i) + value(i + 1)) / 2.0))
    }
}

/// A weight [rows, cols] in 4 bits.
pub struct FourBit {
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) code: FourBitCode,
    /// Two weights a byte, the first in the high half.
    pub(crate) codes: Vec<u8>,
    pub(crate) scales: Scales,
}

/// The largest magnitude of each block.
pub(crate) enum Scales {
    /// As they are.
    Plain(Vec<f32>),
    /// In 8 bits of the dynamic map, in blocks of 256 less a common offset.
    Nested { codes: Vec<u8>, absmax: Vec<f32>, offset: f32 },
}

impl Scales {
    #[inline(always)]
    pub(crate) fn get(&self, block: usize) -> f32 {
        match self {
            Scales::Plain(absmax) => absmax[block],
            Scales::Nested { codes, absmax, offset } => {
                dynamic_map(true)[codes[block] as usize] * absmax[block / blockwise::BLOCK] + offset
            }
        }
    }
}

impl FourBit {
    /// Quantizes a row-major weight.
    pub(crate) fn quantize(values: &[f32], rows: usize, cols: usize, code: FourBitCode, double_quant: bool) -> Self {
        assert_eq!(values.len(), rows * cols);
        let (order, bounds) = code.bounds();
        let mut absmax = Vec::with_capacity(values.len().div_ceil(BLOCK));
        let mut codes = vec![0u8; values.len().div_ceil(2)];
        for (block, values) in values.chunks(BLOCK).enumerate() {
            let largest = largest(values);
            absmax.push(largest);
            let inverse = 1.0 / largest.max(1e-38);
            for (i, value) in values.iter().enumerate() {
                // bitsandbytes multiplies whole blocks by the inverse, and divides a ragged last one.
                let scaled = if values.len() == BLOCK { value * inverse } else { value / largest.max(1e-38) };
                let scaled = scaled.clamp(-1.0, 1.0);
                let code = order[bounds.partition_point(|bound| *bound < scaled)];
                let at = block * BLOCK + i;
                codes[at / 2] |= if at.is_multiple_of(2) { code << 4 } else { code };
            }
        }
        if values.len() % 2 == 1 {
            // The missing half of the last byte is a zero.
            *codes.last_mut().expect("there is a value") |= order[bounds.partition_point(|bound| *bound < 0.0)];
        }
        let scales = if double_quant { Scales::nested(&absmax) } else { Scales::Plain(absmax) };
        FourBit { rows, cols, code, codes, scales }
    }

    /// Bytes in memory.
    #[cfg(test)]
    fn bytes(&self) -> usize {
        self.codes.len()
            + match &self.scales {
                Scales::Plain(absmax) => 4 * absmax.len(),
                Scales::Nested { codes, absmax, .. } => codes.len() + 4 * absmax.len() + 4,
            }
    }
}

impl Scales {
    fn nested(scales: &[f32]) -> Self {
        let sum: f64 = scales.iter().map(|&scale| f64::from(scale)).sum();
        let offset = (sum / scales.len() as f64) as f32;
        let mut codes = vec![0; scales.len()];
        let blocks = scales.chunks(blockwise::BLOCK).zip(codes.chunks_mut(blockwise::BLOCK));
        let quantize = |(scales, codes): (&[f32], &mut [u8])| {
            let centred: Vec<f32> = scales.iter().map(|scale| scale - offset).collect();
            blockwise::quantize_scales(dynamic_map(true), &centred, codes)
        };
        let absmax = blocks.map(quantize).collect();
        Scales::Nested { codes, absmax, offset }
    }
}

fn largest(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |largest, value| value.abs().max(largest))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random;

    #[test]
    fn sizes_are_those_that_are_published() {
        let values = random::uniform(1 << 16, 1.0, 1);
        let bits = |double_quant| {
            let weight = FourBit::quantize(&values, 256, 256, FourBitCode::Nf4, double_quant);
            8.0 * weight.bytes() as f64 / values.len() as f64
        };
        assert_eq!(bits(false), 4.5);
        assert!((bits(true) - 4.127).abs() < 1e-3, "{}", bits(true));
    }
}
