//! Rotary position embedding (Su et al., 2021) in transformers' layout: element i of a head's first half and element
//! i of its second half are a point that position p turns by p · frequency[i].

use rayon::prelude::*;

use super::Rows;

/// Rotates the heads of x [tokens, heads · head_dim] in place: forward by each position's angles, backward by their
/// opposites.
pub(super) fn rotate(x: &mut [f32], width: usize, head_dim: usize, rows: &Rows, backward: bool) {
    let half = head_dim / 2;
    let sign = if backward { -1.0 } else { 1.0 };
    x.par_chunks_mut(width).zip(&rows.positions).for_each(|(x, &position)| {
        let cos = &rows.cos[position * half..][..half];
        let sin = &rows.sin[position * half..][..half];
        for head in x.chunks_exact_mut(head_dim) {
            let (first, second) = head.split_at_mut(half);
            for i in 0..half {
                let (a, b, sin) = (first[i], second[i], sign * sin[i]);
                first[i] = a * cos[i] - b * sin;
                second[i] = b * cos[i] + a * sin;
            }
        }
    });
}
