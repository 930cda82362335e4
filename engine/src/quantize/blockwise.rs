//! Values in 8 bits of a dynamic map, in blocks of 256 with a scale each, as bitsandbytes stores the state of optimizers
//! (Dettmers et al., 2022).

use rayon::prelude::*;

use super::dynamic_map::{dynamic_map, nearest};

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

    pub(crate) fn write(&mut self, values: &[f32]) {
        *self.absmax = quantize(self.map, values, self.codes);
    }
}

/// Writes the codes of a block and returns its scale.
pub(super) fn quantize(map: &[f32; 256], values: &[f32], codes: &mut [u8]) -> f32 {
    let largest = values.iter().fold(0.0f32, |largest, value| value.abs().max(largest));
    // Where all are zero, the code doesn't matter: it is multiplied by zero.
    let inverse = if largest > 0.0 { 1.0 / largest } else { 0.0 };
    for (code, value) in codes.iter_mut().zip(values) {
        *code = if largest > 0.0 { nearest(map, value * inverse) } else { 0 };
    }
    largest
}
