//! The gated product against f64, where exp and tanh are flat too.

use half::bf16;
use tunesmith_kernels::{
    Grid,
    kernels::{Activation, Gated, GatedBackward},
};

use crate::bench::{BF16, Bench, assert_close, blocks};

listed![forward_and_backward_are_those_of_f64,];

/// An activation's value and derivative.
fn reference(activation: Activation, x: f64) -> [f64; 2] {
    match activation {
        Activation::Silu => {
            let s = 1.0 / (1.0 + (-x).exp());
            [x * s, s + x * s * (1.0 - s)]
        }
        Activation::GeluTanh => {
            let root = (2.0 / std::f64::consts::PI).sqrt();
            let t = (root * (x + 0.044_715 * x.powi(3))).tanh();
            let inner = root * (1.0 + 3.0 * 0.044_715 * x * x);
            [0.5 * x * (1.0 + t), 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * inner]
        }
    }
}

fn forward_and_backward_are_those_of_f64() {
    for activation in [Activation::Silu, Activation::GeluTanh] {
        for count in [8, 2048, 2056, 5000] {
            let bench = Bench::new(2);
            // As far as the activations are curved, and beyond.
            let mut gate: Vec<f32> = bench.bf16s(count).into_iter().map(|x| 4.0 * x).collect();
            gate[..8].copy_from_slice(&[0.0, -0.0, 100.0, -100.0, 30.0, -30.0, 8.0, -8.0]);
            let (up, dy) = (bench.bf16s(count), bench.bf16s(count));
            let (gate_at, up_at) = (bench.put_bf16("gate", &gate).at, bench.put_bf16("up", &up).at);
            let grid = Grid::row(blocks(count, 256 * 8), 256);
            let y = bench.empty::<bf16>("y", count);
            let (count, kind) = (count as i64, activation as i32);
            bench.run(&Gated { y: y.at, gate: gate_at, up: up_at, count, activation: kind }, grid);
            let slopes: Vec<[f64; 2]> = gate.iter().map(|x| reference(activation, f64::from(*x))).collect();
            let pairs = slopes.iter().zip(&up);
            let expected: Vec<f64> = pairs.map(|([value, _], up)| value * f64::from(*up)).collect();
            assert_close("y", &y.floats(), &expected, BF16, 1e-6);

            let [d_gate, d_up] = ["d_gate", "d_up"].map(|name| bench.empty::<bf16>(name, y.count));
            let (d_gate_at, d_up_at, dy_at) = (d_gate.at, d_up.at, bench.put_bf16("dy", &dy).at);
            let launch = |d_gate, d_up| GatedBackward {
                d_gate,
                d_up,
                dy: dy_at,
                gate: gate_at,
                up: up_at,
                count,
                activation: kind,
            };
            bench.run(&launch(d_gate_at, d_up_at), grid);
            let of = |f: &dyn Fn(usize) -> f64| (0..y.count).map(f).collect::<Vec<f64>>();
            let by_gate = of(&|i| f64::from(dy[i]) * f64::from(up[i]) * slopes[i][1]);
            let by_up = of(&|i| f64::from(dy[i]) * slopes[i][0]);
            assert_close("d_gate", &d_gate.floats(), &by_gate, BF16, 1e-6);
            assert_close("d_up", &d_up.floats(), &by_up, BF16, 1e-6);
            // In place of gate and up.
            let [gate, up] = [("gate", &gate), ("up", &up)].map(|(name, values)| bench.put_bf16(name, values));
            bench.run(&GatedBackward { gate: gate.at, up: up.at, ..launch(gate.at, up.at) }, grid);
            assert_eq!((gate.floats(), up.floats()), (d_gate.floats(), d_up.floats()));
        }
    }
}
