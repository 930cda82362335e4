//! Every gradient of the CPU backend against the slopes of its forward pass.
//!
//! An output y is weighed by a fixed random dy: L = Σ dy·y, summed in f64. Along random signs u, the central difference
//! (L(x + h·u) − L(x − h·u)) / 2h must be grad·u. `gradients.rs` compares with candle, element by element; here only
//! the forward pass is believed.
//!
//! [`Backend::softcap`] and [`Backend::attention_cached`] only serve generation and have no backward pass. Products in
//! bf16 and inputs in 8 bits are steps, which have no slope.

mod numbers;

use std::array::from_fn;

use tunesmith_engine::backend::{
    AdaptedForward, Attention, AttentionForward, Backend, CrossEntropyGrads, Dropout, Heads, InputGrad, LoraGrads,
    LoraRef, RmsNorm, Row, WeightRef,
};
use tunesmith_engine::config::{Rope, RopeScaling};
use tunesmith_engine::cpu::{Cpu, Tensor};
use tunesmith_engine::{Activation, FourBitCode, Quantization, host_tensor::HostTensor};

use numbers::numbers;

/// h. The rounding of f32 moves L by some 10⁻⁷ of it, so a slope by 10⁻⁵; what a difference of smooth functions has too
/// much, h²/6 of the third derivative, is up to 2 · 10⁻⁴ here.
const STEP: f32 = 1.0 / 128.0;
/// How far a slope may be from grad·u, as a share of ‖grad‖, which is the root mean square of grad·u over all u: ten
/// times the noise, yet a wrong element is seen among ten thousand of its size.
const TOLERANCE: f64 = 2e-3;
/// Random directions for each input.
const DIRECTIONS: u64 = 3;

/// Reproducible numbers in [−2, 2).
fn wide_numbers(n: usize, seed: u64) -> Vec<f32> {
    numbers(n, seed).into_iter().map(|x| 2.0 * x).collect()
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

/// Compares the gradients that `backward` gives for the inputs, of these names and shapes, with slopes of `forward`.
fn check<const N: usize>(
    operation: &str,
    inputs: [(&str, [usize; 2]); N],
    forward: impl Fn([&Tensor; N]) -> Tensor,
    backward: impl Fn([&Tensor; N], &Tensor) -> [Tensor; N],
) {
    let cpu = Cpu::default();
    let random = |[rows, cols]: [usize; 2], seed| cpu.upload(&wide_numbers(rows * cols, seed), rows, cols);
    let x: [Tensor; N] = from_fn(|i| random(inputs[i].1, i as u64 + 1));
    let x = x.each_ref();
    let dy = random(cpu.shape(&forward(x)), 100);
    let loss = |y: Tensor| dot(dy.values(), y.values());
    let grads = backward(x, &dy);
    for (i, ((name, shape), grad)) in inputs.into_iter().zip(&grads).enumerate() {
        assert_eq!(cpu.shape(grad), shape, "{operation}: the gradient of {name}");
        let norm = dot(grad.values(), grad.values()).sqrt();
        assert!(norm > 0.0, "{operation}: the gradient of {name} is zero, nothing would be compared");
        for direction in 0..DIRECTIONS {
            let signs: Vec<f32> =
                wide_numbers(grad.values().len(), 200 + direction).into_iter().map(f32::signum).collect();
            let loss_after = |step: f32| {
                let moved: Vec<f32> = x[i].values().iter().zip(&signs).map(|(x, sign)| x + step * sign).collect();
                let moved = cpu.upload(&moved, shape[0], shape[1]);
                loss(forward(from_fn(|j| if j == i { &moved } else { x[j] })))
            };
            let slope = (loss_after(STEP) - loss_after(-STEP)) / f64::from(2.0 * STEP);
            let error = (slope - dot(grad.values(), &signs)).abs() / norm;
            assert!(error < TOLERANCE, "{operation}: the gradient of {name} is {error:.1e} of its norm off the slope");
        }
    }
}

#[test]
fn embedding() {
    let cpu = Cpu::default();
    let tokens = [2, 0, 2, 6, 5];
    check(
        "embedding",
        [("table", [7, 12])],
        |[table]| cpu.embedding(WeightRef::Trained(table), &tokens, 1.5),
        |_, dy| {
            let mut d_table = cpu.zeros(7, 12);
            cpu.embedding_backward(dy, &tokens, 1.5, None, &mut d_table);
            [d_table]
        },
    );
}

#[test]
fn rms_norm() {
    let cpu = Cpu::default();
    // Norms of whole rows, and of the heads of rows.
    for (rows, cols, n, offset) in [(5, 7, 7, 0.0), (20, 130, 130, 1.0), (6, 32, 8, 1.0)] {
        let norm = RmsNorm { eps: 1e-3, offset };
        check(
            "rms_norm",
            [("x", [rows, cols]), ("weight", [1, n])],
            |[x, weight]| cpu.rms_norm(x, weight, norm),
            |[x, weight], dy| {
                let (mut dx, mut d_weight) = (cpu.zeros(rows, cols), cpu.zeros(1, n));
                cpu.rms_norm_backward(x, weight, norm, dy, &mut dx, Some(&mut d_weight));
                [dx, d_weight]
            },
        );
    }
}

#[test]
fn linear() {
    let cpu = Cpu::default();
    // One row has a kernel of its own.
    for tokens in [1, 19] {
        let (input, output) = (30, 70);
        let weight_grad = |x: &Tensor, dy: &Tensor| {
            let mut d_weight = cpu.zeros(output, input);
            cpu.linear_weight_backward(x, dy, &mut d_weight);
            d_weight
        };
        check(
            "linear",
            [("x", [tokens, input]), ("W", [output, input])],
            |[x, w]| cpu.linear(x, WeightRef::Trained(w)),
            |[x, w], dy| [cpu.linear_backward(dy, WeightRef::Trained(w)), weight_grad(x, dy)],
        );
        check(
            "linear_add",
            [("x", [tokens, input]), ("W", [output, input]), ("residual", [tokens, output])],
            |[x, w, residual]| {
                let mut y = cpu.copy(residual);
                cpu.linear_add(x, WeightRef::Trained(w), &mut y);
                y
            },
            |[x, w, _], dy| {
                let mut dx = cpu.zeros(tokens, input);
                cpu.linear_backward_add(dy, WeightRef::Trained(w), &mut dx);
                [dx, weight_grad(x, dy), cpu.copy(dy)]
            },
        );
    }
}

#[test]
fn linear_with_a_frozen_weight_in_each_form() {
    let cpu = Cpu::default();
    let (tokens, input, output) = (9, 64, 33);
    let values = wide_numbers(output * input, 9);
    let host = || HostTensor::new(values.clone(), vec![output, input]);
    let four_bit = |code| cpu.quantized_weight(host(), Quantization::FourBit { code, double_quant: true });
    for (form, weight) in [
        ("f32", cpu.weight(host())),
        ("bf16", cpu.bf16_weight(&cpu.upload(&values, output, input))),
        ("nf4", four_bit(FourBitCode::Nf4)),
        ("fp4", four_bit(FourBitCode::Fp4)),
        ("int8", cpu.quantized_weight(host(), Quantization::Int8)),
    ] {
        let w = WeightRef::Frozen(&weight);
        check(form, [("x", [tokens, input])], |[x]| cpu.linear(x, w), |_, dy| [cpu.linear_backward(dy, w)]);
    }
}

#[test]
fn sums() {
    let cpu = Cpu::default();
    let shape @ [tokens, width] = [9, 70];
    check(
        "add_bias",
        [("y", shape), ("bias", [1, width])],
        |[y, bias]| {
            let mut y = cpu.copy(y);
            cpu.add_bias(&mut y, bias);
            y
        },
        |_, dy| {
            let mut d_bias = cpu.zeros(1, width);
            cpu.bias_backward(dy, &mut d_bias);
            [cpu.copy(dy), d_bias]
        },
    );
    check(
        "add",
        [("y", shape), ("x", shape)],
        |[y, x]| {
            let mut y = cpu.copy(y);
            cpu.add(&mut y, x);
            y
        },
        |_, dy| [cpu.copy(dy), cpu.copy(dy)],
    );
    let rows = cpu.rows(&[4, tokens - 4].map(Row::new), 0, &[]);
    check(
        "neftune",
        [("x", shape)],
        |[x]| {
            let mut y = cpu.copy(x);
            cpu.neftune(&mut y, &rows, 5.0, 3);
            y
        },
        |_, dy| [cpu.copy(dy)],
    );
}

#[test]
fn rearrangements_are_undone_by_their_opposites() {
    let cpu = Cpu::default();
    check(
        "columns",
        [("x", [5, 12])],
        |[x]| cpu.columns(x, 3, 7),
        |_, dy| [cpu.join_columns(&[&cpu.zeros(5, 3), dy, &cpu.zeros(5, 2)])],
    );
    check(
        "join_columns",
        [("left", [5, 3]), ("right", [5, 9])],
        |parts| cpu.join_columns(&parts),
        |_, dy| [cpu.columns(dy, 0, 3), cpu.columns(dy, 3, 9)],
    );
    let indices = [6, 0, 3];
    check(
        "gather_rows",
        [("x", [7, 4])],
        |[x]| cpu.gather_rows(x, &indices),
        |_, dy| [cpu.scatter_rows(dy, &indices, 7)],
    );
    check(
        "scatter_rows",
        [("x", [3, 4])],
        |[x]| cpu.scatter_rows(x, &indices, 7),
        |_, dy| [cpu.gather_rows(dy, &indices)],
    );
}

#[test]
fn adapted_linear() {
    let cpu = Cpu::default();
    let (tokens, input, output) = (13, 40, 50);
    let w = cpu.upload(&wide_numbers(output * input, 9), output, input);
    let w = WeightRef::Trained(&w);
    // Small ranks have kernels of their own.
    for (rank, dropout) in
        [6, 40].into_iter().flat_map(|rank| [(rank, None), (rank, Some(Dropout { p: 0.4, key: 11 }))])
    {
        check(
            &format!("adapted_linear of rank {rank}, {dropout:?}"),
            [("x", [tokens, input]), ("A", [rank, input]), ("B", [output, rank]), ("residual", [tokens, output])],
            |[x, a, b, residual]| {
                let lora = LoraRef { a, b, scale: 1.5, dropout };
                cpu.adapted_linear(x, w, &lora, Some(cpu.copy(residual))).0
            },
            |[x, a, b, _], dy| {
                let lora = LoraRef { a, b, scale: 1.5, dropout };
                let (_, hidden) = cpu.adapted_linear(x, w, &lora, None);
                let (mut d_a, mut d_b) = (cpu.zeros(rank, input), cpu.zeros(output, rank));
                let (forward, grads) = (AdaptedForward { x, hidden: &hidden }, LoraGrads { a: &mut d_a, b: &mut d_b });
                let dx = cpu.adapted_linear_backward(forward, w, &lora, dy, grads, InputGrad::Fresh).unwrap();
                [dx, d_a, d_b, cpu.copy(dy)]
            },
        );
    }
}

/// The norm of the adapted weight counts as a constant, as in PEFT, so W, A and B stay where they are.
#[test]
fn dora() {
    let cpu = Cpu::default();
    let (tokens, input, output, rank) = (13, 40, 70, 4);
    let [w, a, b] = [(output, input), (rank, input), (output, rank)]
        .map(|(rows, cols)| cpu.upload(&wide_numbers(rows * cols, rows as u64), rows, cols));
    let lora = LoraRef { a: &a, b: &b, scale: 0.5, dropout: None };
    let factors = |magnitude: &Tensor| cpu.dora_factors(WeightRef::Trained(&w), &lora, magnitude);
    check(
        "dora",
        [("y", [tokens, output]), ("magnitude", [1, output])],
        |[y, magnitude]| cpu.scale_columns(y, &factors(magnitude)),
        |[y, magnitude], dy| {
            let factors = factors(magnitude);
            let mut d_magnitude = cpu.zeros(1, output);
            cpu.dora_backward(y, dy, &factors, magnitude, &mut d_magnitude);
            [cpu.scale_columns(dy, &factors), d_magnitude]
        },
    );
}

#[test]
fn rope() {
    let cpu = Cpu::default();
    let layout = [Row::new(5), Row { len: 9, prefix: Some(0) }, Row::new(1)];
    // Whole heads, and the first halves of heads.
    for dim in [8, 4] {
        let rows =
            cpu.rows(&layout, 3, &[Rope { theta: 77.0, dim, scaling: RopeScaling::None, attention_factor: 1.25 }]);
        check(
            "rope",
            [("x", [15, 24])],
            |[x]| {
                let mut y = cpu.copy(x);
                cpu.rope(&mut y, 8, &rows, 0);
                y
            },
            |_, dy| {
                let mut dx = cpu.copy(dy);
                cpu.rope_backward(&mut dx, 8, &rows, 0);
                [dx]
            },
        );
    }
}

#[test]
fn attention() {
    let cpu = Cpu::default();
    // Rows shorter and longer than a block of queries, 16 tokens for six heads, and two that go on after another.
    let (lengths, prefixes) = ([3, 20, 1, 37, 18], [None, None, Some(1), None, Some(1)]);
    let layout: Vec<Row> = lengths.into_iter().zip(prefixes).map(|(len, prefix)| Row { len, prefix }).collect();
    let tokens: usize = lengths.iter().sum();
    let rows = cpu.rows(&layout, 0, &[]);
    let dim = 8;
    for (query, key_value, softcap, window) in [
        (2, 2, None, None),
        (6, 1, None, None),
        (4, 2, Some(0.8), None),
        (6, 1, None, Some(7)),
        (4, 2, Some(0.8), Some(20)),
    ] {
        let attention = Attention { heads: Heads { query, key_value, dim }, scale: 0.3, softcap, window };
        check(
            &format!("{attention:?}"),
            [("q", [tokens, query * dim]), ("k", [tokens, key_value * dim]), ("v", [tokens, key_value * dim])],
            |[q, k, v]| cpu.attention(q, k, v, attention, &rows).0,
            |[q, k, v], dy| {
                let (_, log_sums) = cpu.attention(q, k, v, attention, &rows);
                cpu.attention_backward(AttentionForward { q, k, v, log_sums: &log_sums }, dy, attention, &rows)
            },
        );
    }
}

#[test]
fn gated() {
    let cpu = Cpu::default();
    for activation in [Activation::Silu, Activation::GeluTanh] {
        check(
            &format!("gated by {activation:?}"),
            [("gate", [11, 37]), ("up", [11, 37])],
            |[gate, up]| cpu.gated(activation, gate, up),
            |[gate, up], dy| cpu.gated_backward(activation, cpu.copy(gate), cpu.copy(up), cpu.copy(dy)),
        );
    }
}

#[test]
fn linear_cross_entropy() {
    let cpu = Cpu::default();
    let (tokens, hidden) = (7, 6);
    // The vocabulary is taken 1024 words at a time. The output is the sum of all losses, so dy is the gradients' scale.
    for (vocabulary, softcap) in [(5, None), (5, Some(3.0)), (1500, None), (1500, Some(3.0))] {
        let last = vocabulary as u32 - 1;
        let targets = [0, last, 1, last / 2, last, 3, 2];
        check(
            &format!("linear_cross_entropy over {vocabulary} words, cap {softcap:?}"),
            [("x", [tokens, hidden]), ("W", [vocabulary, hidden])],
            |[x, w]| {
                let (losses, _) = cpu.linear_cross_entropy(x, WeightRef::Trained(w), &targets, softcap, None);
                cpu.upload(&[losses.iter().sum()], 1, 1)
            },
            |[x, w], dy| {
                let mut d_weight = cpu.zeros(vocabulary, hidden);
                let grads = CrossEntropyGrads { scale: dy.values()[0], weight: Some(&mut d_weight) };
                let w = WeightRef::Trained(w);
                let (_, dx) = cpu.linear_cross_entropy(x, w, &targets, softcap, Some(grads));
                [dx.unwrap(), d_weight]
            },
        );
    }
}
