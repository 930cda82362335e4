//! Seeded orders. They are part of the numerics: the same seed gives the same order on every machine.

/// SplitMix64 (Steele, Lea and Flood, 2014): 64 well-mixed bits from a counter.
struct SplitMix64(u64);

impl SplitMix64 {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`. Its bias is below bound / 2⁶⁴ (Lemire's multiplication without rejection).
    fn below(&mut self, bound: usize) -> usize {
        ((u128::from(self.next()) * bound as u128) >> 64) as usize
    }
}

/// The numbers below `length` (of at most 2³²) in an order that depends on `seed` and `stream` (an epoch, say) alone.
pub fn permutation(length: usize, seed: u64, stream: u64) -> Vec<u32> {
    let mut random = SplitMix64(SplitMix64(seed).next() ^ stream);
    let mut order: Vec<u32> = (0..=u32::MAX).take(length).collect();
    // Fisher and Yates.
    for i in (1..length).rev() {
        order.swap(i, random.below(i + 1));
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_order_never_changes_between_releases() {
        assert_eq!(permutation(8, 42, 0), [1, 3, 4, 5, 0, 7, 6, 2]);
        assert_eq!(permutation(8, 42, 1), [0, 6, 2, 3, 1, 4, 5, 7]);
        assert_ne!(permutation(8, 42, 0), permutation(8, 43, 0));
        let mut sorted = permutation(1000, 7, 3);
        sorted.sort_unstable();
        assert_eq!(sorted, (0..1000).collect::<Vec<_>>());
    }

    #[test]
    fn splitmix64_gives_its_authors_numbers() {
        let mut random = SplitMix64(1_234_567);
        assert_eq!([random.next(), random.next()], [6_457_827_717_110_365_317, 3_203_168_211_198_807_973]);
    }
}
