//! NEFTune (Jain et al., 2023): uniform noise on the embeddings of a row of n tokens, within ± alpha / √(n · width).

use rayon::prelude::*;

use super::Rows;
use crate::random::{philox, unit};

/// The noise is a function of the key, the token's place in the micro-batch and the feature.
pub(super) fn add(x: &mut [f32], width: usize, rows: &Rows, alpha: f32, key: u64) {
    x.par_chunks_mut(width).zip(&rows.row_of).enumerate().for_each(|(token, (x, &row))| {
        let bound = alpha / ((rows.lengths[row] * width) as f32).sqrt();
        let first = (token * width.div_ceil(4)) as u64;
        for (i, x) in x.chunks_mut(4).enumerate() {
            let noise = philox(first + i as u64, key).map(|bits| (2.0 * unit(bits) - 1.0) * bound);
            x.iter_mut().zip(noise).for_each(|(x, noise)| *x += noise);
        }
    });
}
