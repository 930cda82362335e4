//! Attention and its gradients against f64: heads of each size, groups of query heads, rows of odd lengths, prefixes with several
//! followers, windows and capped scores.

use std::{iter::once, ops::Range};

use half::bf16;
use tunesmith_kernels::attention::{
    Attention, AttentionDelta, AttentionForward, AttentionKeys, AttentionQueries, HEAD_DIMS, Row, tiles,
};

use crate::bench::{Bench, SEEDS, assert_close};

listed![
    heads_of_each_size_are_those_of_f64,
    rows_go_on_after_a_prefix_that_they_share,
    a_token_sees_no_more_than_its_window,
    scores_may_be_capped,
    scores_may_lie_far_apart,
    heads_of_other_sizes_have_plain_kernels,
];

/// Sizes of a problem.
#[derive(Clone, Copy)]
struct Case {
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    window: usize,
    cap: f64,
    /// The largest element of a query.
    spread: f32,
}

const PLAIN: Case = Case { heads: 2, kv_heads: 1, head_dim: 64, window: 0, cap: 0.0, spread: 2.0 };

/// Rows of these lengths. Where they share a prefix, it is the first one, whose tokens lie behind those of the others.
fn rows(lengths: &[usize], shares: bool) -> Vec<Row> {
    let tokens: usize = lengths.iter().sum();
    let mut start = if shares { tokens - lengths[0] } else { 0 };
    let prefix_start = start as i32;
    let row = |(number, length): (usize, &usize)| {
        let prefix_length = if shares && number > 0 { lengths[0] as i32 } else { 0 };
        let followers = if shares && number == 0 { lengths.len() as i32 - 1 } else { 0 };
        let (first, length32) = (start as i32, *length as i32);
        start = (start + length) % tokens;
        Row { start: first, length: length32, prefix_start, prefix_length, first_follower: 1, followers }
    };
    lengths.iter().enumerate().map(row).collect()
}

/// Products of m16n8k16 that the three passes take. They multiply tiles of which a query sees a key, and no others.
fn products(case: Case, rows: &[Row]) -> usize {
    let Case { heads, head_dim, window, .. } = case;
    // Keys at a time of the forward pass, keys or queries at a time of the others, and products of the pass over keys.
    let (forward, backward, by_keys) = match head_dim {
        _ if !HEAD_DIMS.contains(&head_dim) => return 0,
        ..=96 => (64, 64, 4),
        97..=128 => (64, 32, 4),
        _ => (32, 16, 5),
    };
    let sees = |queries: &Range<usize>, keys: &Range<usize>| {
        let sees = |query: usize, key: usize| key <= query && (window == 0 || key + window > query);
        queries.clone().any(|query| keys.clone().any(|key| sees(query, key)))
    };
    let end = |row: &Row| (row.prefix_length + row.length) as usize;
    let tiles = |from: usize, row: &Row, size: usize| -> Vec<Range<usize>> {
        (from..end(row)).step_by(size).map(|first| first..end(row).min(first + size)).collect()
    };
    let own = |row: &Row, size: usize| tiles(row.prefix_length as usize, row, size);
    let mut columns = 0;
    for row in rows {
        for queries in own(row, 64) {
            for (products, size) in [(2, forward), (3, backward)] {
                columns += products * size * tiles(0, row, size).iter().filter(|keys| sees(&queries, keys)).count();
            }
        }
        let followers = rows[row.first_follower as usize..].iter().take(row.followers as usize);
        for (keys, of) in once(row).chain(followers).flat_map(|of| own(row, 64).into_iter().map(move |keys| (keys, of)))
        {
            columns += by_keys * backward * own(of, backward).iter().filter(|queries| sees(queries, &keys)).count();
        }
    }
    heads * columns * 64 * head_dim / (16 * 8 * 16)
}

/// What the passes should leave, in f64.
struct Expected {
    y: Vec<f64>,
    log_sums: Vec<f64>,
    dq: Vec<f64>,
    dk: Vec<f64>,
    dv: Vec<f64>,
}

fn reference(case: Case, rows: &[Row], [q, k, v, dy]: [&[f32]; 4], tokens: usize) -> Expected {
    let Case { heads, kv_heads, head_dim, window, cap, .. } = case;
    let scale = 1.0 / (head_dim as f64).sqrt();
    let zeros = |heads: usize| vec![0.0; tokens * heads * head_dim];
    let (mut y, mut dq, mut dk, mut dv) = (zeros(heads), zeros(heads), zeros(kv_heads), zeros(kv_heads));
    let mut log_sums = vec![0.0; heads * tokens];
    let of = |x: &[f32], heads: usize, token: usize, head: usize| -> Vec<f64> {
        let at = (token * heads + head) * head_dim;
        x[at..at + head_dim].iter().map(|x| f64::from(*x)).collect()
    };
    let dot = |a: &[f64], b: &[f64]| -> f64 { a.iter().zip(b).map(|(a, b)| a * b).sum() };
    for row in rows {
        let prefix = row.prefix_start..row.prefix_start + row.prefix_length;
        let keys: Vec<usize> = prefix.chain(row.start..row.start + row.length).map(|token| token as usize).collect();
        for (own, head) in (0..row.length as usize).flat_map(|own| (0..heads).map(move |head| (own, head))) {
            let (position, token) = (row.prefix_length as usize + own, row.start as usize + own);
            let seen = &keys[if window > 0 { (position + 1).saturating_sub(window) } else { 0 }..=position];
            let (query, kv_head) = (of(q, heads, token, head), head / (heads / kv_heads));
            let scores: Vec<f64> = seen
                .iter()
                .map(|key| scale * dot(&query, &of(k, kv_heads, *key, kv_head)))
                .map(|score| if cap > 0.0 { cap * (score / cap).tanh() } else { score })
                .collect();
            let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = scores.iter().map(|score| (score - most).exp()).sum();
            log_sums[head * tokens + token] = most + sum.ln();
            let shares: Vec<f64> = scores.iter().map(|score| (score - most).exp() / sum).collect();
            let (at, d) = ((token * heads + head) * head_dim, of(dy, heads, token, head));
            let by_share: Vec<f64> = seen.iter().map(|key| dot(&d, &of(v, kv_heads, *key, kv_head))).collect();
            let delta = dot(&shares, &by_share);
            for (i, key) in seen.iter().enumerate() {
                let (key_at, value, key) = (
                    (key * kv_heads + kv_head) * head_dim,
                    of(v, kv_heads, *key, kv_head),
                    of(k, kv_heads, *key, kv_head),
                );
                let slope = if cap > 0.0 { 1.0 - (scores[i] / cap).powi(2) } else { 1.0 };
                let by_score = scale * shares[i] * (by_share[i] - delta) * slope;
                for e in 0..head_dim {
                    y[at + e] += shares[i] * value[e];
                    dq[at + e] += by_score * key[e];
                    dk[key_at + e] += by_score * query[e];
                    dv[key_at + e] += shares[i] * d[e];
                }
            }
        }
    }
    Expected { y, log_sums, dq, dk, dv }
}

fn run(case: Case, lengths: &[usize], shares: bool, seeds: &[u64]) {
    let Case { heads, kv_heads, head_dim, window, cap, spread } = case;
    let rows = rows(lengths, shares);
    let tokens: usize = lengths.iter().sum();
    let mut results = Vec::new();
    let size = head_dim as i32;
    for seed in seeds {
        let bench = Bench::new(*seed);
        let all = |heads: usize| tokens * heads * head_dim;
        let q: Vec<f32> = bench.bf16s(all(heads)).iter().map(|x| spread * x).collect();
        let [k, v] = [0; 2].map(|_| bench.bf16s(all(kv_heads)));
        let dy = bench.bf16s(all(heads));
        let (y, log_sums) = (bench.empty::<bf16>("y", all(heads)), bench.empty::<f32>("log_sums", heads * tokens));
        let tiles = tiles(&rows);
        let (q_stride, kv_stride) = ((heads * head_dim) as i64, (kv_heads * head_dim) as i64);
        let attention = Attention {
            rows: bench.put("rows", &rows).at,
            tiles: bench.put("tiles", &tiles).at,
            q_stride,
            kv_stride,
            y_stride: q_stride,
            tokens: tokens as i64,
            group: (heads / kv_heads) as i32,
            window: window as i32,
            scale: 1.0 / (head_dim as f32).sqrt(),
            cap: cap as f32,
        };
        let (q_at, k_at) = (bench.put_bf16("q", &q).at, bench.put_bf16("k", &k).at);
        let (v_at, dy_at) = (bench.put_bf16("v", &v).at, bench.put_bf16("dy", &dy).at);
        let launch =
            AttentionForward { y: y.at, log_sums: log_sums.at, q: q_at, k: k_at, v: v_at, attention, head_dim: size };
        bench.run(&launch, launch.grid(tiles.len(), heads));
        let expected = reference(case, &rows, [&q, &k, &v, &dy], tokens);
        // Shares are rounded to bf16 before they meet the values, and the result is.
        assert_close("y", &y.floats(), &expected.y, 1.0 / 128.0, 3e-3);
        assert_close("log_sums", &log_sums.get(), &expected.log_sums, 1e-5, 1e-5);

        let delta = bench.empty::<f32>("delta", heads * tokens);
        let (tokens, heads32) = (tokens as i64, heads as i32);
        let launch = AttentionDelta {
            delta: delta.at,
            dy: dy_at,
            y: y.at,
            y_stride: q_stride,
            tokens,
            heads: heads32,
            head_dim: size,
        };
        bench.run(&launch, launch.grid());
        let [dq, dk, dv] = [("dq", heads), ("dk", kv_heads), ("dv", kv_heads)]
            .map(|(name, heads)| bench.empty::<bf16>(name, all(heads)));
        let (q, k, v, dy, log_sums_at, delta) = (q_at, k_at, v_at, dy_at, log_sums.at, delta.at);
        let launch =
            AttentionQueries { dq: dq.at, dy, q, k, v, log_sums: log_sums_at, delta, attention, head_dim: size };
        bench.run(&launch, launch.grid(tiles.len(), heads));
        let keys = AttentionKeys {
            dk: dk.at,
            dv: dv.at,
            dy,
            q,
            k,
            v,
            log_sums: log_sums_at,
            delta,
            attention,
            head_dim: size,
            values: false,
        };
        for pass in keys.passes() {
            bench.run(&pass, pass.grid(tiles.len(), kv_heads));
        }
        for (name, found, expected) in [("dq", &dq, &expected.dq), ("dk", &dk, &expected.dk), ("dv", &dv, &expected.dv)]
        {
            let largest = expected.iter().fold(0.0f64, |most, x| most.max(x.abs()));
            assert_close(name, &found.floats(), expected, 1.0 / 64.0, 0.01 * largest + 1e-6);
        }
        if let Some(emulator) = bench.emulator() {
            let found = emulator.take_statistics().unwrap();
            assert_eq!(found.matrix_load_phases, found.matrix_loads, "rows of one matrix lie in one bank");
            assert_eq!(found.multiplications, products(case, &rows) as u64, "tiles without a query that sees a key");
        }
        results.push((y.get(), dq.get(), dk.get(), dv.get()));
    }
    assert!(results.windows(2).all(|pair| pair[0] == pair[1]), "another order, other bits");
}

fn heads_of_each_size_are_those_of_f64() {
    for head_dim in HEAD_DIMS {
        let case = Case { head_dim, ..PLAIN };
        run(case, &[70, 3, 64], false, &SEEDS[..2]);
    }
}

fn rows_go_on_after_a_prefix_that_they_share() {
    for head_dim in [64, 256] {
        let case = Case { heads: 4, kv_heads: 2, head_dim, ..PLAIN };
        run(case, &[37, 1, 90, 64], true, &[1]);
    }
}

fn a_token_sees_no_more_than_its_window() {
    // The followers of a prefix of 130 do not see its first 64.
    let (short, long) = ([50, 170, 5], [130, 20, 5]);
    for (window, lengths, shares) in [
        (1, short, false),
        (16, short, true),
        (16, long, true),
        (65, short, true),
        (127, short, false),
        (500, short, false),
    ] {
        let case = Case { heads: 1, window, ..PLAIN };
        run(case, &lengths, shares, &[4]);
    }
}

fn scores_may_be_capped() {
    for window in [0, 40] {
        let case = Case { kv_heads: 2, head_dim: 128, window, cap: 1.5, ..PLAIN };
        run(case, &[100, 9], true, &[1]);
    }
}

fn scores_may_lie_far_apart() {
    for head_dim in [64, 72] {
        run(Case { head_dim, spread: 128.0, ..PLAIN }, &[60, 7], true, &[1]);
    }
}

fn heads_of_other_sizes_have_plain_kernels() {
    for (head_dim, window, cap, shares) in [(1, 0, 0.0, false), (72, 5, 0.0, true), (200, 0, 1.5, true)] {
        let case = Case { heads: 6, kv_heads: 2, head_dim, window, cap, ..PLAIN };
        run(case, &[11, 1, 19], shares, &[1]);
    }
}
