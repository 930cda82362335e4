//! Numbers rounded to bf16 and laid out in pairs, as the CPU's dot products of pairs read them.
//!
//! A word of 32 bits holds two neighbours along k, the first in its low half. Words are kept as f32, of which only the
//! bits count, so that whatever moves f32 moves them. Rounding is to the nearest, ties to even.

/// The number rounded, in the high half; the low one is zero.
#[inline(always)]
fn round(x: f32) -> u32 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7FFF + (bits >> 16 & 1));
    // A NaN's last bits could carry into its exponent; one of them is set instead.
    (if x.is_nan() { bits | 0x0040_0000 } else { rounded }) & 0xFFFF_0000
}

/// Rounds numbers where they lie.
#[inline(always)]
pub(super) fn round_in_place(x: &mut [f32]) {
    x.iter_mut().for_each(|x| *x = f32::from_bits(round(*x)));
}

/// Numbers rounded.
pub(super) fn rounded(x: &[f32]) -> Vec<f32> {
    x.iter().map(|x| f32::from_bits(round(*x))).collect()
}

/// Numbers that lie one after the other, each word two of them; the last is followed by zero if their count is odd.
#[inline(always)]
pub(super) fn neighbours(x: &[f32], words: &mut [f32]) {
    assert_eq!(words.len(), x.len().div_ceil(2));
    let halves: &mut [u16] = bytemuck::cast_slice_mut(words);
    if let (1, Some(last)) = (x.len() % 2, halves.last_mut()) {
        *last = 0;
    }
    for (half, x) in halves.iter_mut().zip(x) {
        *half = (round(*x) >> 16) as u16;
    }
}

/// The numbers of two rows, each word one of each.
#[inline(always)]
pub(super) fn rows(first: &[f32], second: &[f32], words: &mut [f32]) {
    let n = words.len();
    let (first, second) = (&first[..n], &second[..n]);
    for j in 0..n {
        words[j] = f32::from_bits(round(first[j]) >> 16 | round(second[j]));
    }
}

/// The same of numbers that are stored in bf16; no second row stands for zeros.
#[inline(always)]
pub(super) fn stored_rows(first: &[u8], second: Option<&[u8]>, words: &mut [f32]) {
    let half = |bytes: &[u8]| u32::from(u16::from_le_bytes([bytes[0], bytes[1]]));
    let firsts = words.iter_mut().zip(first.chunks_exact(2));
    match second {
        Some(second) => firsts.zip(second.chunks_exact(2)).for_each(|((word, first), second)| {
            *word = f32::from_bits(half(first) | half(second) << 16);
        }),
        None => firsts.for_each(|(word, first)| *word = f32::from_bits(half(first))),
    }
}

/// The second number of a word, and the first.
#[inline(always)]
fn unpair(word: f32) -> [f32; 2] {
    [word.to_bits() & 0xFFFF_0000, word.to_bits() << 16].map(f32::from_bits)
}

/// The numbers of pairs as floats, in the order in which the CPU's instructions for pairs add their products: the second
/// of each pair first. For CPUs without them: the same sums to the same bits, but for numbers below 2⁻¹²⁶, which those
/// instructions take for zero.
#[inline(always)]
pub(super) fn unpair_neighbours(words: &[f32], out: &mut [f32]) {
    for (out, word) in out.chunks_exact_mut(2).zip(words) {
        out.copy_from_slice(&unpair(*word));
    }
}

/// The same of pairs whose numbers become two rows.
#[inline(always)]
pub(super) fn unpair_rows(words: &[f32], out: &mut [f32]) {
    let (second, first) = out.split_at_mut(words.len());
    for ((word, second), first) in words.iter().zip(second).zip(first) {
        [*second, *first] = unpair(*word);
    }
}

/// Numbers that are stored in bf16 one after the other.
#[inline(always)]
pub(super) fn stored_neighbours(x: &[u8], words: &mut [f32]) {
    let bytes: &mut [u8] = bytemuck::cast_slice_mut(words);
    let (numbers, rest) = bytes.split_at_mut(x.len());
    numbers.copy_from_slice(x);
    rest.fill(0);
}

#[cfg(test)]
mod tests {
    use half::bf16;
    use proptest::prelude::*;

    use super::*;

    fn unpaired(words: &[f32]) -> Vec<bf16> {
        words
            .iter()
            .flat_map(|word| [word.to_bits() as u16, (word.to_bits() >> 16) as u16])
            .map(bf16::from_bits)
            .collect()
    }

    proptest! {
        #[test]
        fn every_number_is_rounded_as_half_rounds_it(bits: Vec<u32>) {
            let x: Vec<f32> = bits.iter().map(|bits| f32::from_bits(*bits)).collect();
            let expected: Vec<u16> = x.iter().map(|x| bf16::from_f32(*x).to_bits()).collect();
            let mut words = vec![f32::NAN; x.len().div_ceil(2)];
            neighbours(&x, &mut words);
            let found: Vec<u16> = unpaired(&words).iter().map(|x| x.to_bits()).collect();
            prop_assert_eq!(&found[..x.len()], &expected);
            prop_assert!(found[x.len()..].iter().all(|rest| *rest == 0));

            let bytes: Vec<u8> = expected.iter().flat_map(|x| x.to_le_bytes()).collect();
            let mut stored = vec![f32::NAN; words.len()];
            stored_neighbours(&bytes, &mut stored);
            prop_assert_eq!(unpaired(&stored).iter().map(|x| x.to_bits()).collect::<Vec<_>>(), found);
        }

        #[test]
        fn rows_are_paired_element_by_element(pairs: Vec<(f32, f32)>) {
            let (first, second): (Vec<f32>, Vec<f32>) = pairs.into_iter().unzip();
            let mut words = vec![f32::NAN; first.len()];
            rows(&first, &second, &mut words);
            let expected: Vec<bf16> =
                first.iter().zip(&second).flat_map(|(a, b)| [*a, *b]).map(bf16::from_f32).collect();
            prop_assert_eq!(unpaired(&words), expected.clone());
            let bytes = |from: usize| -> Vec<u8> {
                expected.iter().skip(from).step_by(2).flat_map(|x| x.to_le_bytes()).collect()
            };
            let mut stored = vec![f32::NAN; first.len()];
            stored_rows(&bytes(0), Some(&bytes(1)), &mut stored);
            prop_assert_eq!(unpaired(&stored), expected);
        }
    }
}
