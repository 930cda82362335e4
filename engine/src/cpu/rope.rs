//! Rotary position embedding (Su et al., 2021) in transformers' layout: element i of a head's first half and element
//! i of its second half are a point that position p turns by p · frequency[i]. Where only a part of a head is rotated,
//! these are the halves of that part.

use rayon::prelude::*;

/// The rotary angles of every token of a micro-batch, [tokens, half].
pub(super) struct Angles {
    half: usize,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl Angles {
    /// Angles of tokens at these positions, each with its row's frequencies. What they turn is stretched by `factor`.
    pub(super) fn new<'a>(tokens: impl Iterator<Item = (usize, &'a [f32])>, factor: f32) -> Self {
        let (mut half, mut cos, mut sin) = (0, Vec::new(), Vec::new());
        for (position, frequencies) in tokens {
            half = frequencies.len();
            // transformers multiplies position and frequency in f32.
            let angles = frequencies.iter().map(|frequency| position as f32 * frequency);
            let (sines, cosines): (Vec<f32>, Vec<f32>) = angles.map(f32::sin_cos).unzip();
            cos.extend(cosines.iter().map(|cosine| factor * cosine));
            sin.extend(sines.iter().map(|sine| factor * sine));
        }
        Angles { half, cos, sin }
    }
}

/// Rotates the heads of x [tokens, heads · head_dim] in place: forward by each token's angles, backward by their
/// opposites (the factor stays: it is the transpose).
pub(super) fn rotate(x: &mut [f32], width: usize, head_dim: usize, angles: &Angles, backward: bool) {
    let half = angles.half;
    let sign = if backward { -1.0 } else { 1.0 };
    let angles = angles.cos.par_chunks(half).zip(angles.sin.par_chunks(half));
    x.par_chunks_mut(width).zip(angles).for_each(|(x, (cos, sin))| {
        for head in x.chunks_exact_mut(head_dim) {
            let (first, second) = head[..2 * half].split_at_mut(half);
            for i in 0..half {
                let (a, b, sin) = (first[i], second[i], sign * sin[i]);
                first[i] = a * cos[i] - b * sin;
                second[i] = b * cos[i] + a * sin;
            }
        }
    });
}
