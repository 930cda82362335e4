//! Attention against f64: heads of each size, groups of query heads, rows of odd lengths, prefixes with several followers, windows and
//! capped scores.

mod support;

use half::bf16;
use support::{Bench, SEEDS, assert_close};
use tunesmith_kernels::attention::{Attention, AttentionForward, HEAD_DIMS, Row, tiles};

/// Sizes of a problem.
#[derive(Clone, Copy)]
struct Case {
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    window: usize,
    cap: f64,
}

/// Rows of these lengths, the later ones behind the first, which is their prefix.
fn rows(lengths: &[usize], shares: bool) -> Vec<Row> {
    let mut start = 0;
    let row = |(number, length): (usize, &usize)| {
        let prefix_length = if shares && number > 0 { lengths[0] as i32 } else { 0 };
        let row = Row { start, length: *length as i32, prefix_start: 0, prefix_length };
        start += *length as i32;
        row
    };
    lengths.iter().enumerate().map(row).collect()
}

/// Results and sums, in f64.
fn reference(case: Case, rows: &[Row], q: &[f32], k: &[f32], v: &[f32], tokens: usize) -> [Vec<f64>; 2] {
    let Case { heads, kv_heads, head_dim, window, cap } = case;
    let scale = 1.0 / (head_dim as f64).sqrt();
    let (mut y, mut log_sums) = (vec![0.0; tokens * heads * head_dim], vec![0.0; heads * tokens]);
    for row in rows {
        let prefix = row.prefix_start..row.prefix_start + row.prefix_length;
        let keys: Vec<usize> = prefix.chain(row.start..row.start + row.length).map(|token| token as usize).collect();
        for own in 0..row.length as usize {
            let (position, token) = (row.prefix_length as usize + own, row.start as usize + own);
            let first = if window > 0 { (position + 1).saturating_sub(window) } else { 0 };
            for head in 0..heads {
                let of = |x: &[f32], heads: usize, token: usize, head: usize| -> Vec<f64> {
                    let at = (token * heads + head) * head_dim;
                    x[at..at + head_dim].iter().map(|x| f64::from(*x)).collect()
                };
                let (query, kv_head) = (of(q, heads, token, head), head / (heads / kv_heads));
                let scores: Vec<f64> = keys[first..=position]
                    .iter()
                    .map(|key| {
                        let key = of(k, kv_heads, *key, kv_head);
                        let score = scale * query.iter().zip(key).map(|(q, k)| q * k).sum::<f64>();
                        if cap > 0.0 { cap * (score / cap).tanh() } else { score }
                    })
                    .collect();
                let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let sum: f64 = scores.iter().map(|score| (score - most).exp()).sum();
                log_sums[head * tokens + token] = most + sum.ln();
                for (score, key) in scores.iter().zip(&keys[first..=position]) {
                    let share = (score - most).exp() / sum;
                    let at = (token * heads + head) * head_dim;
                    for (y, v) in y[at..at + head_dim].iter_mut().zip(of(v, kv_heads, *key, kv_head)) {
                        *y += share * v;
                    }
                }
            }
        }
    }
    [y, log_sums]
}

fn run(case: Case, lengths: &[usize], shares: bool, seeds: &[u64]) {
    let Case { heads, kv_heads, head_dim, window, cap } = case;
    let rows = rows(lengths, shares);
    let tokens: usize = lengths.iter().sum();
    let mut results = Vec::new();
    for seed in seeds {
        let bench = Bench::new(*seed);
        let q: Vec<f32> = bench.bf16s(tokens * heads * head_dim).iter().map(|x| 2.0 * x).collect();
        let [k, v] = [0; 2].map(|_| bench.bf16s(tokens * kv_heads * head_dim));
        let y = bench.empty::<bf16>("y", tokens * heads * head_dim);
        let log_sums = bench.empty::<f32>("log_sums", heads * tokens);
        let tiles = tiles(&rows);
        let launch = AttentionForward {
            y: y.at,
            log_sums: log_sums.at,
            q: bench.put_bf16("q", &q).at,
            k: bench.put_bf16("k", &k).at,
            v: bench.put_bf16("v", &v).at,
            attention: Attention {
                rows: bench.put("rows", &rows).at,
                tiles: bench.put("tiles", &tiles).at,
                q_stride: (heads * head_dim) as i64,
                kv_stride: (kv_heads * head_dim) as i64,
                y_stride: (heads * head_dim) as i64,
                tokens: tokens as i64,
                group: (heads / kv_heads) as i32,
                window: window as i32,
                scale: 1.0 / (head_dim as f32).sqrt(),
                cap: cap as f32,
            },
            head_dim,
        };
        bench.run(&launch, launch.grid(tiles.len(), heads));
        let [expected, sums] = reference(case, &rows, &q, &k, &v, tokens);
        // Shares are rounded to bf16 before they meet the values, and the result is.
        assert_close("y", &y.floats(), &expected, 1.0 / 100.0, 4e-3);
        assert_close("log_sums", &log_sums.get(), &sums, 1e-5, 1e-5);
        let loads = bench.device.take_statistics().unwrap();
        assert_eq!(loads.matrix_load_phases, loads.matrix_loads, "rows of one matrix lie in one bank");
        results.push(y.get());
    }
    assert!(results.windows(2).all(|pair| pair[0] == pair[1]), "another order, other bits");
}

#[test]
fn heads_of_each_size_are_those_of_f64() {
    for head_dim in HEAD_DIMS {
        let case = Case { heads: 2, kv_heads: 1, head_dim, window: 0, cap: 0.0 };
        run(case, &[70, 3, 64], false, &SEEDS[..2]);
    }
}

#[test]
fn rows_go_on_after_a_prefix_that_they_share() {
    for head_dim in [64, 256] {
        let case = Case { heads: 4, kv_heads: 2, head_dim, window: 0, cap: 0.0 };
        run(case, &[37, 1, 90, 64], true, &[1]);
    }
}

#[test]
fn a_token_sees_no_more_than_its_window() {
    for (window, shares) in [(1, false), (16, true), (65, true), (500, false)] {
        let case = Case { heads: 1, kv_heads: 1, head_dim: 64, window, cap: 0.0 };
        run(case, &[50, 170, 5], shares, &[4]);
    }
}

#[test]
fn scores_may_be_capped() {
    for window in [0, 40] {
        let case = Case { heads: 2, kv_heads: 2, head_dim: 128, window, cap: 1.5 };
        run(case, &[100, 9], true, &[1]);
    }
}
