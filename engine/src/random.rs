//! Counter-based random numbers: a value depends on a key and an index, on nothing drawn before it.
//!
//! Philox4x32 with 7 rounds (Salmon et al., 2011), the least that passes all tests of TestU01's BigCrush.

/// Four random words for a counter and a key.
#[inline(always)]
pub(crate) fn philox(counter: u64, key: u64) -> [u32; 4] {
    let mut c = [counter as u32, (counter >> 32) as u32, 0, 0];
    let mut k = [key as u32, (key >> 32) as u32];
    for _ in 0..7 {
        let a = u64::from(c[0]) * 0xD251_1F53;
        let b = u64::from(c[2]) * 0xCD9E_8D57;
        c = [(b >> 32) as u32 ^ c[1] ^ k[0], b as u32, (a >> 32) as u32 ^ c[3] ^ k[1], a as u32];
        k = [k[0].wrapping_add(0x9E37_79B9), k[1].wrapping_add(0xBB67_AE85)];
    }
    c
}

/// A key of its own for each combination of a seed and the parts of a purpose.
pub(crate) fn key(seed: u64, parts: &[u64]) -> u64 {
    parts.iter().fold(seed, |key, &part| {
        let [a, b, ..] = philox(part, key);
        u64::from(a) | u64::from(b) << 32
    })
}

/// A number in [0, 1) with 24 random bits.
pub(crate) fn unit(bits: u32) -> f32 {
    (bits >> 8) as f32 / (1 << 24) as f32
}

/// `n` numbers, uniform in [−bound, bound).
pub(crate) fn uniform(n: usize, bound: f32, key: u64) -> Vec<f32> {
    let words = (0..n.div_ceil(4) as u64).flat_map(|i| philox(i, key));
    words.take(n).map(|bits| (2.0 * unit(bits) - 1.0) * bound).collect()
}

/// `n` numbers of the standard normal distribution (Box and Muller, 1958).
#[cfg(test)]
pub(crate) fn normal(n: usize, key: u64) -> Vec<f32> {
    let pair = |i: u64| {
        let [a, b, ..] = philox(i, key).map(|bits| f64::from(unit(bits)));
        let (radius, angle) = ((-2.0 * (1.0 - a).ln()).sqrt(), 2.0 * std::f64::consts::PI * b);
        [radius * angle.cos(), radius * angle.sin()]
    };
    (0..n.div_ceil(2) as u64).flat_map(pair).take(n).map(|x| x as f32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn philox_gives_the_published_words() {
        // The known answer of the authors' Random123 library for seven rounds, counter and key zero.
        assert_eq!(philox(0, 0), [0x5f6f_b709, 0x0d89_3f64, 0x4f12_1f81, 0x4f73_0a48]);
    }

    #[test]
    fn uniform_fills_its_range_evenly() {
        let x = uniform(100_001, 0.5, 3);
        assert_eq!(x.len(), 100_001);
        assert!(x.iter().all(|x| (-0.5..0.5).contains(x)));
        let mean: f32 = x.iter().sum::<f32>() / x.len() as f32;
        let share = x.iter().filter(|x| **x > 0.25).count() as f32 / x.len() as f32;
        assert!(mean.abs() < 0.005 && (share - 0.25).abs() < 0.005, "{mean} {share}");
    }

    #[test]
    fn keys_differ_in_every_part() {
        let keys = [key(1, &[2, 3]), key(1, &[3, 2]), key(2, &[2, 3]), key(1, &[2]), key(1, &[2, 4])];
        for (i, a) in keys.iter().enumerate() {
            assert!(!keys[..i].contains(a));
        }
    }
}
