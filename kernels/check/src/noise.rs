//! Dropout and NEFTune: the random bits are those of the CPU backend, whose known answers stand here too.

use half::bf16;
use tunesmith_kernels::{
    Grid,
    kernels::{DropOut, Neftune},
};

use crate::bench::{Bench, SEEDS, blocks};

listed![
    the_random_words_are_the_published_ones,
    dropout_keeps_what_its_bits_say,
    noise_on_embeddings_is_bounded_by_the_length_of_a_tokens_row,
];

/// Philox4x32 with 7 rounds (Salmon et al., 2011), as `engine/src/random.rs` has it.
fn philox(counter: u64, key: u64) -> [u32; 4] {
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

fn word(index: usize, key: u64) -> u32 {
    philox(index as u64 / 4, key)[index % 4]
}

fn the_random_words_are_the_published_ones() {
    assert_eq!(philox(0, 0), [0x5f6f_b709, 0x0d89_3f64, 0x4f12_1f81, 0x4f73_0a48]);
}

fn dropout_keeps_what_its_bits_say() {
    let (count, p, key) = (5000, 0.25f32, 0xfeed_beef_0123_4567);
    let quarter = (f64::from(p) * 2f64.powi(32)) as u32;
    let scale = 1.0 / (1.0 - p);
    // An element at the threshold stays.
    let at_threshold = (0..count).map(|i| word(i, key)).find(|word| *word > quarter).unwrap();
    for (seed, threshold) in [(SEEDS[0], quarter), (SEEDS[1], quarter), (SEEDS[2], at_threshold)] {
        let bench = Bench::new(seed);
        let x = bench.bf16s(count);
        let y = bench.empty::<bf16>("y", count);
        let x_at = bench.put_bf16("x", &x).at;
        let launch = DropOut { y: y.at, x: x_at, count: count as i64, threshold, scale, key };
        bench.run(&launch, Grid::row(blocks(count, 8 * 256), 256));
        let expected = x.iter().enumerate().map(|(i, x)| if word(i, key) >= threshold { x * scale } else { 0.0 });
        let expected: Vec<bf16> = expected.map(bf16::from_f32).collect();
        assert_eq!(y.get(), expected);
        let dropped = expected.iter().filter(|y| y.to_f32() == 0.0).count() as f64 / count as f64;
        assert!((dropped - f64::from(threshold) / 2f64.powi(32)).abs() < 0.03, "{dropped}");
    }
}

fn noise_on_embeddings_is_bounded_by_the_length_of_a_tokens_row() {
    for width in [7, 64, 1030] {
        let (bench, key, alpha) = (Bench::new(1), 77, 5.0f32);
        let lengths = [3, 3, 3, 1];
        let x = bench.bf16s(lengths.len() * width);
        let on_device = bench.put_bf16("x", &x);
        let lengths_at = bench.put("lengths", &lengths).at;
        let launch = Neftune { x: on_device.at, lengths: lengths_at, width: width as i32, alpha, key };
        bench.run(&launch, Grid::row(lengths.len() as u32, 256));
        let noise = |i: usize| {
            let (token, feature) = (i / width, i % width);
            let bound = alpha / ((lengths[token] as usize * width) as f32).sqrt();
            let words = philox((token * width.div_ceil(4) + feature / 4) as u64, key);
            let unit = (words[feature % 4] >> 8) as f32 / (1 << 24) as f32;
            (2.0 * unit - 1.0) * bound
        };
        let expected: Vec<bf16> = x.iter().enumerate().map(|(i, x)| bf16::from_f32(x + noise(i))).collect();
        assert_eq!(on_device.get(), expected, "{width}");
    }
}
