//! RMSNorm against f64: odd numbers of rows, widths that fill a block in part or several times, with and without a residual.

use half::bf16;
use tunesmith_kernels::{
    Address, Grid,
    kernels::{AddParts, RmsNorm, RmsNormBackward, RmsNormWeightBackward},
};

use crate::bench::{BF16, Bench, SEEDS, assert_close, blocks};

listed![forward_is_that_of_f64_and_the_same_in_any_order, backward_is_that_of_f64,];

const SHARED: u32 = 4 * 8;
const EPS: f32 = 1e-5;
const SHAPES: [(usize, usize); 5] = [(1, 8), (3, 64), (5, 264), (2, 2048), (7, 2056)];

fn rows(x: &[f32], width: usize) -> impl Iterator<Item = Vec<f64>> {
    x.chunks(width).map(|row| row.iter().map(|x| f64::from(*x)).collect())
}

fn scale(row: &[f64]) -> f64 {
    1.0 / (row.iter().map(|x| x * x).sum::<f64>() / row.len() as f64 + f64::from(EPS)).sqrt()
}

fn forward_is_that_of_f64_and_the_same_in_any_order() {
    for (count, width) in SHAPES {
        for (has_residual, offset) in [(false, 0.0), (true, 1.0)] {
            let mut results = Vec::new();
            for seed in SEEDS {
                let bench = Bench::new(seed);
                let (x, residual) = (bench.bf16s(count * width), bench.bf16s(count * width));
                let weight = bench.randoms(width);
                let (y, scales) = (bench.empty::<bf16>("y", count * width), bench.empty::<f32>("scales", count));
                let sum = bench.empty::<bf16>("sum", count * width);
                let on_device = [bench.put_bf16("x", &x), bench.put_bf16("residual", &residual)];
                let launch = RmsNorm {
                    y: y.at,
                    scales: scales.at,
                    sum: if has_residual { sum.at } else { Address::NONE },
                    x: on_device[0].at,
                    residual: if has_residual { on_device[1].at } else { Address::NONE },
                    weight: bench.put("weight", &weight).at,
                    width: width as i32,
                    eps: EPS,
                    offset,
                };
                bench.run(&launch, Grid::row(count as u32, 256).with_shared(SHARED));
                let normed: Vec<f32> = match has_residual {
                    true => x.iter().zip(&residual).map(|(x, r)| bf16::from_f32(x + r).to_f32()).collect(),
                    false => x,
                };
                if has_residual {
                    assert_eq!(sum.floats(), normed);
                }
                let expected: Vec<f64> = rows(&normed, width)
                    .flat_map(|row| {
                        let s = scale(&row);
                        let weight = weight.iter().map(|w| f64::from(offset) + f64::from(*w));
                        row.into_iter().zip(weight).map(move |(x, w)| x * s * w).collect::<Vec<_>>()
                    })
                    .collect();
                assert_close("y", &y.floats(), &expected, BF16, 1e-6);
                let s: Vec<f64> = rows(&normed, width).map(|row| scale(&row)).collect();
                assert_close("scales", &scales.get(), &s, 1e-6, 0.0);
                results.push(y.floats());
            }
            assert!(results.windows(2).all(|pair| pair[0] == pair[1]), "{count} × {width}");
        }
    }
}

fn backward_is_that_of_f64() {
    for (count, width) in SHAPES {
        for (has_residual, offset) in [(false, 0.0f32), (true, 1.0)] {
            let bench = Bench::new(3);
            let [x, dy, d_residual] = [0; 3].map(|_| bench.bf16s(count * width));
            let weight = bench.randoms(width);
            let scales: Vec<f32> = rows(&x, width).map(|row| scale(&row) as f32).collect();
            let scales_at = bench.put("scales", &scales).at;
            let (x_at, dy_at) = (bench.put_bf16("x", &x).at, bench.put_bf16("dy", &dy).at);
            let dx = bench.empty::<bf16>("dx", count * width);
            let d_residual_at = bench.put_bf16("d_residual", &d_residual).at;
            let launch = RmsNormBackward {
                dx: dx.at,
                dy: dy_at,
                d_residual: if has_residual { d_residual_at } else { Address::NONE },
                x: x_at,
                weight: bench.put("weight", &weight).at,
                scales: scales_at,
                width: width as i32,
                offset,
            };
            bench.run(&launch, Grid::row(count as u32, 256).with_shared(SHARED));

            let w: Vec<f64> = weight.iter().map(|w| f64::from(offset) + f64::from(*w)).collect();
            let (mut expected, mut d_weight) = (Vec::new(), vec![0.0; width]);
            for ((row, dy), d_residual) in rows(&x, width).zip(rows(&dy, width)).zip(rows(&d_residual, width)) {
                let s = scale(&row);
                let correlation: f64 = (0..width).map(|i| row[i] * w[i] * dy[i]).sum();
                for i in 0..width {
                    let dx = s * (w[i] * dy[i] - row[i] * correlation * s * s / width as f64);
                    expected.push(dx + if has_residual { d_residual[i] } else { 0.0 });
                    d_weight[i] += s * row[i] * dy[i];
                }
            }
            assert_close("dx", &dx.floats(), &expected, BF16, 1e-5);

            // Three rows a block of the first pass, so that there are several parts.
            let rows_a_block = 3;
            let parts = count.div_ceil(rows_a_block);
            let parts_at = bench.empty::<f32>("parts", parts * width);
            let launch = RmsNormWeightBackward {
                parts: parts_at.at,
                dy: dy_at,
                x: x_at,
                scales: scales_at,
                rows: count as i32,
                width: width as i32,
                rows_a_block: rows_a_block as i32,
            };
            bench.run(&launch, Grid { blocks: [blocks(width, 256), parts as u32, 1], threads: 256, shared_bytes: 0 });
            let sum = bench.put("d_weight", &vec![1.0f32; width]);
            let launch = AddParts { to: sum.at, parts: parts_at.at, count: parts as i32, width: width as i32 };
            bench.run(&launch, Grid::row(blocks(width, 256), 256));
            d_weight.iter_mut().for_each(|d| *d += 1.0);
            assert_close("d_weight", &sum.get(), &d_weight, 1e-5, 1e-5);
        }
    }
}
