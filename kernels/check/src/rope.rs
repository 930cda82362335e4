//! Rotation of queries and keys, with and without their norm, against f64: heads of all sizes, in part rotated, columns of a wider
//! product.

use half::bf16;
use tunesmith_kernels::{
    Address, Grid,
    kernels::{NormRope, NormRopeBackward, Rope},
};

use crate::bench::{BF16, Bench, Buffer, SEEDS, assert_close, blocks};

listed![forward_and_backward_are_those_of_f64_in_any_order,];

const WARPS: usize = 8;
const EPS: f32 = 1e-6;
/// Tokens, heads, head_dim, half, and columns beside the heads.
const SHAPES: [(usize, usize, usize, usize, usize); 6] = [
    (3, 2, 64, 32, 0),
    (5, 3, 80, 40, 16),
    (2, 1, 96, 24, 8),
    (4, 5, 128, 64, 0),
    (3, 1, 256, 128, 64),
    (1, 2, 512, 256, 0),
];

/// One head turned by its token's angles: forward, or back.
fn rotated(head: &[f64], cos: &[f32], sin: &[f32], direction: f64) -> Vec<f64> {
    let half = cos.len();
    let mut turned = head.to_vec();
    for i in 0..half {
        let (a, b) = (head[i], head[i + half]);
        let (cos, sin) = (f64::from(cos[i]), direction * f64::from(sin[i]));
        (turned[i], turned[i + half]) = (a * cos - b * sin, b * cos + a * sin);
    }
    turned
}

fn forward_and_backward_are_those_of_f64_in_any_order() {
    for (tokens, heads, head_dim, half, beside) in SHAPES {
        for (has_norm, seed) in [(false, SEEDS[0]), (false, SEEDS[1]), (true, SEEDS[1]), (true, SEEDS[2])] {
            let bench = Bench::new(seed);
            let stride = heads * head_dim + beside;
            let (x, dy, weight) = (bench.bf16s(tokens * stride), bench.bf16s(tokens * stride), bench.randoms(head_dim));
            let angles = bench.randoms(tokens * half);
            let cos: Vec<f32> = angles.iter().map(|angle| (3.0 * angle).cos()).collect();
            let sin: Vec<f32> = angles.iter().map(|angle| (3.0 * angle).sin()).collect();
            let rope = Rope {
                cos: bench.put("cos", &cos).at,
                sin: bench.put("sin", &sin).at,
                heads: heads as i32,
                head_dim: head_dim as i32,
                half: half as i32,
            };
            let (x_at, dy_at) = (bench.put_bf16("x", &x), bench.put_bf16("dy", &dy));
            let scales = bench.empty::<f32>("scales", tokens * heads);
            let weight_at = if has_norm { bench.put("weight", &weight).at } else { Address::NONE };
            let y = bench.empty::<bf16>("y", tokens * heads * head_dim);
            let grid =
                Grid::row(blocks(tokens * heads, WARPS), 32 * WARPS as u32).with_shared((WARPS * head_dim * 4) as u32);
            let launch = NormRope {
                y: y.at,
                scales: scales.at,
                x: x_at.at,
                weight: weight_at,
                rope,
                tokens: tokens as i64,
                y_stride: (heads * head_dim) as i64,
                x_stride: stride as i64,
                eps: EPS,
                offset: 1.0,
            };
            bench.run(&launch, grid);

            let w: Vec<f64> = weight.iter().map(|w| 1.0 + f64::from(*w)).collect();
            let (mut expected, mut by_x) = (Vec::new(), Vec::new());
            for (token, head) in (0..tokens).flat_map(|token| (0..heads).map(move |head| (token, head))) {
                let of = |values: &[f32]| -> Vec<f64> {
                    let from = token * stride + head * head_dim;
                    values[from..from + head_dim].iter().map(|x| f64::from(*x)).collect()
                };
                let (x, dy) = (of(&x), of(&dy));
                let angle = token * half..(token + 1) * half;
                let n = head_dim as f64;
                let s = 1.0 / (x.iter().map(|x| x * x).sum::<f64>() / n + f64::from(EPS)).sqrt();
                let normed = match has_norm {
                    true => x.iter().zip(&w).map(|(x, w)| x * s * w).collect(),
                    false => x.clone(),
                };
                expected.extend(rotated(&normed, &cos[angle.clone()], &sin[angle.clone()], 1.0));
                let d = rotated(&dy, &cos[angle.clone()], &sin[angle], -1.0);
                if has_norm {
                    let correlation: f64 = (0..head_dim).map(|i| x[i] * w[i] * d[i]).sum();
                    by_x.extend((0..head_dim).map(|i| s * (w[i] * d[i] - x[i] * correlation * s * s / n)));
                } else {
                    by_x.extend(d);
                }
            }
            assert_close("y", &y.floats(), &expected, BF16, 1e-5);

            let dx = bench.empty::<bf16>("dx", tokens * heads * head_dim);
            let launch = NormRopeBackward {
                dx: dx.at,
                dy: dy_at.at,
                x: x_at.at,
                weight: weight_at,
                scales: scales.at,
                rope,
                tokens: tokens as i64,
                dx_stride: (heads * head_dim) as i64,
                dy_stride: stride as i64,
                x_stride: stride as i64,
                offset: 1.0,
            };
            bench.run(&launch, grid);
            assert_close("dx", &dx.floats(), &by_x, BF16, 1e-5);

            // In place: what lies beside the heads stays.
            let stride = stride as i64;
            bench.run(
                &NormRope { y: x_at.at, y_stride: stride, ..forward(&x_at, &scales, weight_at, rope, tokens, stride) },
                grid,
            );
            let (turned, apart) = (x_at.floats(), y.floats());
            for (token, row) in turned.chunks(stride as usize).enumerate() {
                assert_eq!(row[..heads * head_dim], apart[token * heads * head_dim..(token + 1) * heads * head_dim]);
                assert_eq!(
                    row[heads * head_dim..],
                    x[token * stride as usize + heads * head_dim..(token + 1) * stride as usize]
                );
            }
        }
    }
}

fn forward(
    x: &Buffer<'_, bf16>,
    scales: &Buffer<'_, f32>,
    weight: Address,
    rope: Rope,
    tokens: usize,
    stride: i64,
) -> NormRope {
    NormRope {
        y: x.at,
        scales: scales.at,
        x: x.at,
        weight,
        rope,
        tokens: tokens as i64,
        y_stride: stride,
        x_stride: stride,
        eps: EPS,
        offset: 1.0,
    }
}
