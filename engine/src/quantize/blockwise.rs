//! Values in 8 bits of a dynamic map, in blocks of 256 with a scale each, as bitsandbytes stores the state of optimizers
//! (Dettmers et al., 2022) and the scales of 4-bit blocks.
//!
//! The two are rounded differently. Scales follow bitsandbytes' CPU library byte by byte: a grid of 65,536 steps, in which
//! its CUDA kernels differ. State takes the nearest code, as those kernels do, because the grid lacks zero: a moment of
//! zero would become 2 · 10⁻⁵ of its block's largest, and a weight without gradient would drift.

use rayon::prelude::*;

use super::dynamic_map::{dynamic_map, nearest, nearest_to_step};

/// Values that share a scale.
pub(crate) const BLOCK: usize = 256;

/// Values in 8 bits.
pub struct Blockwise {
    pub(crate) map: &'static [f32; 256],
    pub(crate) codes: Vec<u8>,
    /// The largest magnitude of each block.
    pub(crate) absmax: Vec<f32>,
}

impl Blockwise {
    /// Zeros, of either sign later or not.
    pub(crate) fn zeros(len: usize, signed: bool) -> Self {
        Blockwise { map: dynamic_map(signed), codes: vec![0; len], absmax: vec![0.0; len.div_ceil(BLOCK)] }
    }

    /// Every block, to be read and written.
    pub(crate) fn blocks(&mut self) -> impl IndexedParallelIterator<Item = Block<'_>> {
        let map = self.map;
        let blocks = self.codes.par_chunks_mut(BLOCK).zip(&mut self.absmax);
        blocks.map(move |(codes, absmax)| Block { map, codes, absmax })
    }
}

/// One block.
pub(crate) struct Block<'a> {
    map: &'static [f32; 256],
    codes: &'a mut [u8],
    absmax: &'a mut f32,
}

impl Block<'_> {
    pub(crate) fn read(&self, values: &mut [f32]) {
        for (value, code) in values.iter_mut().zip(&*self.codes) {
            *value = self.map[*code as usize] * *self.absmax;
        }
    }

    /// Rounds to the nearest code. In a map without signs, only zero becomes zero: a second moment that vanished under a
    /// first one that did not would divide it by epsilon. The nearest code made steps of up to 28,000 learning rates where
    /// gradients of a block differ by 10⁸; rounded up, the largest was 2.3 (f32: 1.7). Li et al. (2023, "Memory Efficient
    /// Optimizers with 4-bit States") leave zero out of the map for the same reason; here it stays for weights without
    /// gradient.
    pub(crate) fn write(&mut self, values: &[f32]) {
        *self.absmax = largest(values);
        let (map, scale) = (self.map, *self.absmax);
        let is_unsigned = map[0] == 0.0;
        for (code, value) in self.codes.iter_mut().zip(values) {
            let found = nearest(map, if scale > 0.0 { value / scale } else { 0.0 });
            *code = if is_unsigned && *value > 0.0 { found.max(1) } else { found };
        }
    }
}

/// Writes the codes of a block of scales and returns its own scale, in the bytes of bitsandbytes' CPU library.
pub(super) fn quantize_scales(map: &[f32; 256], values: &[f32], codes: &mut [u8]) -> f32 {
    let largest = largest(values);
    // Where all are zero, the code doesn't matter: it is multiplied by zero.
    let inverse = if largest > 0.0 { 1.0 / largest } else { 0.0 };
    for (code, value) in codes.iter_mut().zip(values) {
        *code = if largest > 0.0 { nearest_to_step(map, value * inverse) } else { 0 };
    }
    largest
}

fn largest(values: &[f32]) -> f32 {
    values.iter().fold(0.0f32, |largest, value| value.abs().max(largest))
}
