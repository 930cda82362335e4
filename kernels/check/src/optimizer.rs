//! Optimizers against torch's formulas in f64, against what bitsandbytes made of three steps in 8 bits, and with gradients that are
//! clipped or not finite.

use half::bf16;
use safetensors::SafeTensors;
use tunesmith_kernels::{
    Address, Grid,
    kernels::{
        AdamW, AdamW8BitBf16, AdamW8BitF32, AdamWBf16, AdamWF32, GradientScale, Sgd, SgdBf16, SgdF32, SquaresBf16,
        SquaresF32, StepState,
    },
};

use crate::bench::{Bench, SEEDS, assert_close, blocks};

listed![
    the_norm_decides_the_factor_and_whether_there_is_an_update,
    squares_of_bf16_are_those_of_the_same_numbers,
    three_steps_of_adamw_are_those_of_f64_and_leave_a_copy_in_bf16,
    three_steps_in_8_bits_are_those_of_bitsandbytes,
    gradients_in_bf16_make_the_same_step_in_8_bits,
    a_moment_between_two_codes_has_the_lower_and_only_zero_becomes_zero,
    sgd_is_torchs_with_momentum_and_without,
    nothing_changes_where_the_gradient_is_not_finite,
];

const THREADS: u32 = 256;
const TOTALS_BYTES: u32 = 8 * 8;
const STATES_BYTES: u32 = 4 * (512 + 8);
const COUNT: usize = 5000;

/// The numbers of a step.
fn adamw(step: i32, lr: f64, weight_decay: f64) -> AdamW {
    let (beta1, beta2): (f64, f64) = (0.9, 0.999);
    AdamW {
        decay: (1.0 - lr * weight_decay) as f32,
        beta2: beta2 as f32,
        new1: (1.0 - beta1) as f32,
        new2: (1.0 - beta2) as f32,
        correction2: (1.0 - beta2.powi(step)).sqrt() as f32,
        step_size: (lr / (1.0 - beta1.powi(step))) as f32,
        eps: 1e-8,
    }
}

/// The state of a step whose gradient is multiplied by `factor`.
fn state(bench: &Bench, factor: f32, finite: u32) -> Address {
    bench.put("state", &[StepState { norm: 1.0, factor, finite }]).at
}

fn f64s(values: &[f32]) -> Vec<f64> {
    values.iter().map(|value| f64::from(*value)).collect()
}

fn the_norm_decides_the_factor_and_whether_there_is_an_update() {
    let step = |gradient: &[f32], max_norm: f64| -> Vec<StepState> {
        let of = |seed: u64| {
            let bench = Bench::new(seed);
            let (per_block, count) = (1024, gradient.len());
            let parts = bench.empty::<f64>("parts", count.div_ceil(per_block));
            let launch = SquaresF32 {
                parts: parts.at,
                gradient: bench.put("gradient", gradient).at,
                count: count as i64,
                per_block: per_block as i32,
            };
            bench.run(&launch, Grid::row(blocks(count, per_block), THREADS).with_shared(TOTALS_BYTES));
            let state = bench.empty::<StepState>("state", 1);
            let count = parts.count as i32;
            let launch = GradientScale { state: state.at, parts: parts.at, count, scale: 0.5, max_norm };
            bench.run(&launch, Grid::row(1, THREADS).with_shared(TOTALS_BYTES));
            state.get()[0]
        };
        SEEDS.map(of).to_vec()
    };
    let mut gradient = Bench::new(0).randoms(COUNT);
    let norm = 0.5 * gradient.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
    for (max_norm, factor) in [(0.0, 0.5), (1e9, 0.5), (1.0, 0.5 / (norm + 1e-6))] {
        let states = step(&gradient, max_norm);
        assert!(states.windows(2).all(|pair| pair[0] == pair[1]), "another order, other bits");
        assert!((states[0].norm - norm).abs() <= 1e-12 * norm && states[0].finite == 1, "{states:?}");
        assert_eq!(states[0].factor, factor as f32);
    }
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        gradient[4321] = bad;
        let states = step(&gradient, 1.0);
        assert_eq!((states[0].factor, states[0].finite), (0.0, 0), "{bad}");
    }
}

fn squares_of_bf16_are_those_of_the_same_numbers() {
    let bench = Bench::new(1);
    let gradient = bench.bf16s(COUNT);
    let parts = [0; 2].map(|_| bench.empty::<f64>("parts", 5));
    let grid = Grid::row(5, THREADS).with_shared(TOTALS_BYTES);
    let (count, per_block) = (COUNT as i64, 1024);
    bench.run(&SquaresF32 { parts: parts[0].at, gradient: bench.put("f32", &gradient).at, count, per_block }, grid);
    let rounded = bench.put_bf16("bf16", &gradient).at;
    bench.run(&SquaresBf16 { parts: parts[1].at, gradient: rounded, count, per_block }, grid);
    assert_eq!(parts[0].get(), parts[1].get());
}

fn three_steps_of_adamw_are_those_of_f64_and_leave_a_copy_in_bf16() {
    for seed in SEEDS {
        let bench = Bench::new(seed);
        let start = bench.randoms(COUNT);
        let (parameters, compute) = (bench.put("parameters", &start), bench.empty::<bf16>("compute", COUNT));
        let (m, v) = (bench.put("m", &[0.0f32; COUNT]), bench.put("v", &[0.0f32; COUNT]));
        let (mut p, mut first, mut second) = (f64s(&start), vec![0.0; COUNT], vec![0.0; COUNT]);
        for number in 1..=3 {
            let gradient = bench.bf16s(COUNT);
            let step = adamw(number, 0.01, 0.1);
            let (state, count) = (state(&bench, 0.5, 1), COUNT as i64);
            let (parameters, compute, m, v) = (parameters.at, compute.at, m.at, v.at);
            let grid = Grid::row(blocks(COUNT, 256), THREADS);
            // In turn, for both hold the same numbers.
            if number == 2 {
                let gradient = bench.put_bf16("gradient", &gradient).at;
                bench.run(&AdamWBf16 { parameters, compute, gradient, m, v, state, step, count }, grid);
            } else {
                let gradient = bench.put("gradient", &gradient).at;
                bench.run(&AdamWF32 { parameters, compute, gradient, m, v, state, step, count }, grid);
            }
            for i in 0..COUNT {
                let g = 0.5 * f64::from(gradient[i]);
                p[i] *= 1.0 - 0.01 * 0.1;
                first[i] += (g - first[i]) * 0.1;
                second[i] = 0.999 * second[i] + 0.001 * g * g;
                let (c1, c2) = (1.0 - 0.9f64.powi(number), (1.0 - 0.999f64.powi(number)).sqrt());
                p[i] -= 0.01 / c1 * (first[i] / (second[i].sqrt() / c2 + 1e-8));
            }
        }
        let after = parameters.get();
        assert_close("parameters", &after, &p, 2e-6, 2e-7);
        assert_close("m", &m.get(), &first, 1e-5, 1e-8);
        assert_close("v", &v.get(), &second, 1e-5, 1e-10);
        let rounded: Vec<bf16> = after.iter().map(|x| bf16::from_f32(*x)).collect();
        assert_eq!(compute.get(), rounded);
    }
}

fn three_steps_in_8_bits_are_those_of_bitsandbytes() {
    let file = include_bytes!("../../../engine/tests/fixtures/quantized/optimizer.safetensors");
    let codes = include_bytes!("../../../engine/tests/fixtures/quantized/codes.safetensors");
    let bytes = |file: &[u8], name: &str| SafeTensors::deserialize(file).unwrap().tensor(name).unwrap().data().to_vec();
    let floats = |file: &[u8], name: &str| -> Vec<f32> {
        bytes(file, name).chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect()
    };
    let maps = [floats(codes, "even.nf4.nested.map"), floats(file, "map")].concat();
    let start = floats(file, "param");
    let count = start.len();
    for seed in SEEDS {
        let bench = Bench::new(seed);
        let maps = bench.put("maps", &maps).at;
        let parameters = bench.put("parameters", &start);
        let zero = (floats(codes, "even.nf4.nested.map").iter().position(|value| *value == 0.0).unwrap()) as u8;
        let (m, v) = (bench.put("m", &vec![zero; count]), bench.put("v", &vec![0u8; count]));
        let scales = ["m_absmax", "v_absmax"].map(|name| bench.put(name, &vec![0.0f32; count.div_ceil(256)]));
        for number in 1..=3 {
            let launch = AdamW8BitF32 {
                parameters: parameters.at,
                compute: Address::NONE,
                gradient: bench.put("gradient", &floats(file, &format!("grad{}", number - 1))).at,
                m: m.at,
                m_absmax: scales[0].at,
                v: v.at,
                v_absmax: scales[1].at,
                maps,
                state: state(&bench, 1.0, 1),
                step: adamw(number, 0.01, 0.1),
                count: count as i64,
            };
            bench.run(&launch, Grid::row(blocks(count, 256), THREADS).with_shared(STATES_BYTES));
        }
        for (state, part) in [(m.get(), "1"), (v.get(), "2")] {
            // torch fuses other operations than we do: what lies between two codes may fall to either side.
            let expected = bytes(file, &format!("state{part}"));
            let apart: Vec<u8> = state.iter().zip(&expected).map(|(a, b)| a.abs_diff(*b)).collect();
            assert!(apart.iter().all(|apart| *apart <= 1), "{part}");
            assert!(apart.iter().filter(|apart| **apart > 0).count() < 10, "{part}");
        }
        for (scales, part) in scales.iter().zip(["1", "2"]) {
            assert_close(part, &scales.get(), &f64s(&floats(file, &format!("absmax{part}"))), 1e-6, 0.0);
        }
        let (after, expected) = (parameters.get(), floats(file, "after"));
        let far = after.iter().zip(expected).filter(|(a, b)| (*a - b).abs() > 1e-6 * b.abs().max(1.0)).count();
        assert!(far < 10, "{far} values differ");
    }
}

fn gradients_in_bf16_make_the_same_step_in_8_bits() {
    let bench = Bench::new(1);
    let (start, gradient) = (bench.randoms(COUNT), bench.bf16s(COUNT));
    let maps: Vec<f32> =
        (0..512).map(|i| if i < 256 { (i - 128) as f32 / 128.0 } else { (i - 256) as f32 / 255.0 }).collect();
    let (maps, state) = (bench.put("maps", &maps).at, state(&bench, 1.0, 1));
    let results = [false, true].map(|is_bf16| {
        let (parameters, m, v) =
            (bench.put("parameters", &start), bench.put("m", &[128u8; COUNT]), bench.put("v", &[0u8; COUNT]));
        let [m_absmax, v_absmax] = ["m_absmax", "v_absmax"].map(|name| bench.put(name, &[0.0f32; 20]).at);
        let (compute, step, count) = (Address::NONE, adamw(1, 0.01, 0.0), COUNT as i64);
        let grid = Grid::row(20, THREADS).with_shared(STATES_BYTES);
        let (at, m_at, v_at) = (parameters.at, m.at, v.at);
        if is_bf16 {
            let gradient = bench.put_bf16("gradient", &gradient).at;
            let (parameters, m, v) = (at, m_at, v_at);
            let step =
                AdamW8BitBf16 { parameters, compute, gradient, m, m_absmax, v, v_absmax, maps, state, step, count };
            bench.run(&step, grid);
        } else {
            let gradient = bench.put("gradient", &gradient).at;
            let (parameters, m, v) = (at, m_at, v_at);
            let step =
                AdamW8BitF32 { parameters, compute, gradient, m, m_absmax, v, v_absmax, maps, state, step, count };
            bench.run(&step, grid);
        }
        (parameters.get(), m.get(), v.get())
    });
    assert_eq!(results[0], results[1]);
}

fn a_moment_between_two_codes_has_the_lower_and_only_zero_becomes_zero() {
    // Codes of the first moment are 1/128 apart around 128, those of the second 1/256. The last value is the largest that the maps have.
    let maps: Vec<f32> = (-128..128).map(|i| i as f32 / 128.0).chain((0..256).map(|i| i as f32 / 256.0)).collect();
    let bench = Bench::new(1);
    let mut gradient = [0.0f32; 512];
    gradient[..6].copy_from_slice(&[1.0, 0.5, 65.0 / 256.0, -65.0 / 256.0, 2.0 / 256.0, 2f32.powi(-40)]);
    let (m, v) = (bench.put("m", &[128u8; 512]), bench.put("v", &[0u8; 512]));
    let scales = ["m_absmax", "v_absmax"].map(|name| bench.put(name, &[0.0f32; 2]));
    let launch = AdamW8BitF32 {
        parameters: bench.put("parameters", &[0.0f32; 512]).at,
        compute: Address::NONE,
        gradient: bench.put("gradient", &gradient).at,
        m: m.at,
        m_absmax: scales[0].at,
        v: v.at,
        v_absmax: scales[1].at,
        maps: bench.put("maps", &maps).at,
        state: state(&bench, 1.0, 1),
        step: AdamW { new1: 0.5, new2: 0.5, ..adamw(1, 0.01, 0.0) },
        count: 512,
    };
    bench.run(&launch, Grid::row(2, THREADS).with_shared(STATES_BYTES));
    let (m, v) = (m.get(), v.get());
    assert_eq!(m[..6], [255, 192, 160, 95, 129, 128]);
    // (65/256)² is 16.504 codes; (2/256)² is a 64th of one, and 2⁻⁸⁰ vanishes.
    assert_eq!(v[..6], [255, 64, 17, 17, 1, 1]);
    // Of the other elements of the first block, and of a block of zeros.
    assert_eq!((&m[6..], &v[6..]), (&[128; 506][..], &[0; 506][..]));
    assert_eq!(scales.map(|scales| scales.get()), [[0.5, 0.0], [0.5, 0.0]]);
}

fn sgd_is_torchs_with_momentum_and_without() {
    for kept in [0.0f32, 0.9] {
        let bench = Bench::new(2);
        let start = bench.randoms(COUNT);
        let (parameters, momentum) = (bench.put("parameters", &start), bench.put("momentum", &[0.0f32; COUNT]));
        let compute = bench.empty::<bf16>("compute", COUNT);
        let (mut p, mut b) = (f64s(&start), vec![0.0; COUNT]);
        for number in 0..2 {
            let gradient = bench.bf16s(COUNT);
            let step = Sgd { lr: 0.1, decay: 0.01, kept };
            let (state, count, grid) = (state(&bench, 2.0, 1), COUNT as i64, Grid::row(blocks(COUNT, 256), THREADS));
            let momentum = if kept > 0.0 { momentum.at } else { Address::NONE };
            let (parameters, compute) = (parameters.at, compute.at);
            if number == 0 {
                let gradient = bench.put("gradient", &gradient).at;
                bench.run(&SgdF32 { parameters, compute, gradient, momentum, state, step, count }, grid);
            } else {
                let gradient = bench.put_bf16("gradient", &gradient).at;
                bench.run(&SgdBf16 { parameters, compute, gradient, momentum, state, step, count }, grid);
            }
            for i in 0..COUNT {
                b[i] = f64::from(kept) * b[i] + 2.0 * f64::from(gradient[i]) + 0.01 * p[i];
                p[i] -= 0.1 * b[i];
            }
        }
        assert_close("parameters", &parameters.get(), &p, 1e-5, 1e-6);
        let rounded: Vec<bf16> = parameters.get().into_iter().map(bf16::from_f32).collect();
        assert_eq!(compute.get(), rounded);
    }
}

fn nothing_changes_where_the_gradient_is_not_finite() {
    let bench = Bench::new(1);
    let (start, gradient) = (bench.randoms(COUNT), bench.put("gradient", &[f32::NAN; COUNT]).at);
    let (parameters, m, v) =
        (bench.put("p", &start), bench.put("m", &[1.0f32; COUNT]), bench.put("v", &[2.0f32; COUNT]));
    let (state, count, grid) = (state(&bench, 0.0, 0), COUNT as i64, Grid::row(blocks(COUNT, 256), THREADS));
    let (compute, step) = (Address::NONE, adamw(1, 0.1, 0.1));
    bench.run(&AdamWF32 { parameters: parameters.at, compute, gradient, m: m.at, v: v.at, state, step, count }, grid);
    let step = Sgd { lr: 0.1, decay: 0.1, kept: 0.0 };
    let momentum = Address::NONE;
    bench.run(&SgdF32 { parameters: parameters.at, compute, gradient, momentum, state, step, count }, grid);
    assert_eq!((parameters.get(), m.get(), v.get()), (start, vec![1.0; COUNT], vec![2.0; COUNT]));
}
