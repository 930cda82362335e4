//! Cross-entropy and its gradient against f64: odd vocabularies, capped logits, tokens without a target, logits far apart.

use half::bf16;
use tunesmith_kernels::{
    Grid,
    kernels::{CrossEntropyBf16, CrossEntropyF32},
};

use crate::bench::{BF16, Bench, SEEDS, assert_close};

listed![losses_and_gradients_are_those_of_f64,];

const SHARED: u32 = 4 * 16;

/// Losses and gradients of logits, in f64.
fn reference(logits: &[f32], vocabulary: usize, stride: usize, targets: &[i32], scale: f64, cap: f64) -> [Vec<f64>; 2] {
    let (mut losses, mut gradients) = (Vec::new(), Vec::new());
    for (row, target) in logits.chunks(stride).zip(targets) {
        if *target < 0 {
            losses.push(0.0);
            gradients.extend(vec![0.0; vocabulary]);
            continue;
        }
        let row = row[..vocabulary].iter().map(|logit| f64::from(*logit));
        let row: Vec<f64> = row.map(|logit| if cap > 0.0 { cap * (logit / cap).tanh() } else { logit }).collect();
        let most = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = row.iter().map(|logit| (logit - most).exp()).sum();
        losses.push(most + sum.ln() - row[*target as usize]);
        gradients.extend(row.iter().enumerate().map(|(i, logit)| {
            let share = (logit - most).exp() / sum - f64::from(u8::from(i == *target as usize));
            scale * share * if cap > 0.0 { 1.0 - (logit / cap).powi(2) } else { 1.0 }
        }));
    }
    [losses, gradients]
}

fn losses_and_gradients_are_those_of_f64() {
    for (vocabulary, stride) in [(5, 8), (512, 512), (3001, 3008)] {
        for (cap, spread) in [(0.0f32, 3.0f32), (0.0, 80.0), (30.0, 60.0)] {
            let targets = [0, -1, vocabulary as i32 - 1];
            let mut results = Vec::new();
            for seed in SEEDS {
                let bench = Bench::new(seed);
                let logits: Vec<f32> = bench.bf16s(targets.len() * stride).iter().map(|x| spread * x).collect();
                let logits: Vec<f32> = logits.iter().map(|x| bf16::from_f32(*x).to_f32()).collect();
                let scale = 0.25f32;
                let (cap64, scale64) = (f64::from(cap), f64::from(scale));
                let [losses, gradients] = reference(&logits, vocabulary, stride, &targets, scale64, cap64);
                let grid = Grid::row(targets.len() as u32, 512).with_shared(SHARED);
                let targets_at = bench.put("targets", &targets).at;
                let (vocabulary32, stride64) = (vocabulary as i32, stride as i64);

                let (on_device, found) = (bench.put("logits", &logits), bench.empty::<f32>("losses", targets.len()));
                let launch = CrossEntropyF32 {
                    logits: on_device.at,
                    losses: found.at,
                    targets: targets_at,
                    vocabulary: vocabulary32,
                    stride: stride64,
                    scale,
                    cap,
                    wants_gradient: 0,
                };
                bench.run(&launch, grid);
                assert_close("losses", &found.get(), &losses, 1e-6, 2e-5);
                assert_eq!(on_device.get(), logits, "logits without a gradient stay");
                bench.run(&CrossEntropyF32 { wants_gradient: 1, ..launch }, grid);
                let without_padding = |values: Vec<f32>| -> Vec<f32> {
                    values.chunks(stride).flat_map(|row| row[..vocabulary].to_vec()).collect()
                };
                let gradient = without_padding(on_device.get());
                assert_close("gradient", &gradient, &gradients, 2e-5, 1e-7);

                let (on_device, found) =
                    (bench.put_bf16("logits", &logits), bench.empty::<f32>("losses", targets.len()));
                let launch = CrossEntropyBf16 {
                    logits: on_device.at,
                    losses: found.at,
                    targets: targets_at,
                    vocabulary: vocabulary32,
                    stride: stride64,
                    scale,
                    cap,
                    wants_gradient: 1,
                };
                bench.run(&launch, grid);
                assert_close("losses", &found.get(), &losses, 1e-6, 2e-5);
                assert_close("gradient", &without_padding(on_device.floats()), &gradients, BF16, 1e-7);
                results.push((found.get(), gradient));
            }
            assert!(results.windows(2).all(|pair| pair[0] == pair[1]), "another order, other bits");
        }
    }
}
