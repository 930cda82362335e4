//! Embedding, and its gradient where words repeat.

use half::bf16;
use tunesmith_kernels::{
    Grid,
    kernels::{Embedding, EmbeddingBackward},
};

use crate::bench::{Bench, SEEDS, assert_close, blocks};

listed![rows_are_taken_and_their_gradients_added_in_one_order,];

fn rows_are_taken_and_their_gradients_added_in_one_order() {
    let (words, tokens) = (11usize, [3, 0, 3, 10, 3, 7, 0]);
    for width in [8, 136, 2056] {
        let mut results = Vec::new();
        for seed in SEEDS {
            let bench = Bench::new(seed);
            let (table, scale) = (bench.bf16s(words * width), 1.5f32);
            let y = bench.empty::<bf16>("y", tokens.len() * width);
            let table_at = bench.put_bf16("table", &table).at;
            let tokens_at = bench.put("tokens", &tokens).at;
            let launch = Embedding { y: y.at, table: table_at, tokens: tokens_at, width: width as i32, scale };
            bench.run(&launch, Grid::row(tokens.len() as u32, 128));
            let rows = tokens.iter().flat_map(|word| &table[*word as usize * width..(*word as usize + 1) * width]);
            let expected: Vec<bf16> = rows.map(|x| bf16::from_f32(scale * x)).collect();
            assert_eq!(y.get(), expected);

            // Sorted by word, and by place within a word.
            let mut order: Vec<i32> = (0..tokens.len() as i32).collect();
            order.sort_by_key(|at| (tokens[*at as usize], *at));
            let sorted: Vec<i32> = order.iter().map(|at| tokens[*at as usize]).collect();
            let mut found = sorted.clone();
            found.dedup();
            let first = |word: &i32| sorted.iter().position(|other| other == word).unwrap() as i32;
            let starts: Vec<i32> = found.iter().map(first).chain([tokens.len() as i32]).collect();
            let (dy, before) = (bench.bf16s(tokens.len() * width), bench.randoms(words * width));
            let d_table = bench.put("d_table", &before);
            let launch = EmbeddingBackward {
                d_table: d_table.at,
                dy: bench.put_bf16("dy", &dy).at,
                words: bench.put("words", &found).at,
                starts: bench.put("starts", &starts).at,
                order: bench.put("order", &order).at,
                width: width as i32,
                scale,
            };
            let grid = Grid { blocks: [found.len() as u32, blocks(width, 128), 1], threads: 128, shared_bytes: 0 };
            bench.run(&launch, grid);
            let mut expected: Vec<f64> = before.iter().map(|x| f64::from(*x)).collect();
            for (token, word) in tokens.iter().enumerate() {
                for i in 0..width {
                    expected[*word as usize * width + i] += f64::from(scale) * f64::from(dy[token * width + i]);
                }
            }
            assert_close("d_table", &d_table.get(), &expected, 1e-6, 1e-6);
            results.push(d_table.get());
        }
        assert!(results.windows(2).all(|pair| pair[0] == pair[1]), "another order, other bits");
    }
}
