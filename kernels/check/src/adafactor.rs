//! Three steps of Adafactor against what transformers made of them (`engine/tests/fixtures/quantized`), of a matrix and of a vector.

use half::bf16;
use safetensors::SafeTensors;
use tunesmith_kernels::{
    Address, Grid, Launch,
    kernels::{
        Adafactor, AdafactorColumnPartsBf16, AdafactorColumnPartsF32, AdafactorColumns, AdafactorElementsBf16,
        AdafactorElementsF32, AdafactorMatrixBf16, AdafactorMatrixF32, AdafactorMean, AdafactorRowsBf16,
        AdafactorRowsF32, AdafactorSquaresBf16, AdafactorSquaresF32, AdafactorStepSize, StepState,
    },
};

use crate::bench::{Bench, Buffer, SEEDS, assert_close, blocks};

listed![
    three_steps_are_those_of_transformers,
    gradients_in_bf16_make_the_same_step,
    nothing_changes_where_the_gradient_is_not_finite,
];

const THREADS: u32 = 256;
const TOTALS_BYTES: u32 = 8 * 8;
const WIDTH: usize = 101;
const ROWS_A_BLOCK: usize = 10;

/// A tensor on a device, and its means.
struct Tensor<'a> {
    bench: &'a Bench,
    rows: usize,
    parameters: Buffer<'a, f32>,
    compute: Buffer<'a, bf16>,
    /// Of a matrix.
    row_means: Option<Buffer<'a, f32>>,
    /// Of columns, or of a vector's elements.
    column_means: Buffer<'a, f32>,
}

impl<'a> Tensor<'a> {
    fn new(bench: &'a Bench, start: &[f32]) -> Self {
        let rows = start.len() / WIDTH;
        Self {
            bench,
            rows,
            parameters: bench.put("parameters", start),
            compute: bench.empty("compute", start.len()),
            row_means: (rows > 1).then(|| bench.put("row_means", &vec![0.0f32; rows])),
            column_means: bench.put("column_means", &[0.0f32; WIDTH]),
        }
    }

    /// One step, with a gradient of f32 or of bf16.
    fn step(&self, gradient: Address, is_bf16: bool, state: Address, step: Adafactor) {
        let Self { bench, rows, .. } = self;
        let (width, rows32) = (WIDTH as i32, *rows as i32);
        let run =
            |f32s: &dyn Launch, bf16s: &dyn Launch, grid: Grid| bench.run(if is_bf16 { bf16s } else { f32s }, grid);
        let column_means = self.column_means.at;
        let (columns, a_row_each) = (blocks(WIDTH, 256), Grid::row(*rows as u32, THREADS).with_shared(TOTALS_BYTES));
        let mean = bench.empty::<f32>("mean", 1);
        let (row_means, mean) = match &self.row_means {
            Some(means) => {
                let row = means.at;
                run(
                    &AdafactorRowsF32 { row, gradient, state, step, width },
                    &AdafactorRowsBf16 { row, gradient, state, step, width },
                    a_row_each,
                );
                let count = rows.div_ceil(ROWS_A_BLOCK);
                let parts = bench.empty::<f64>("parts", count * WIDTH).at;
                let (rows, rows_a_block) = (rows32, ROWS_A_BLOCK as i32);
                run(
                    &AdafactorColumnPartsF32 { parts, gradient, state, step, rows, width, rows_a_block },
                    &AdafactorColumnPartsBf16 { parts, gradient, state, step, rows, width, rows_a_block },
                    Grid { blocks: [columns, count as u32, 1], threads: THREADS, shared_bytes: 0 },
                );
                let count = count as i32;
                let launch = AdafactorColumns { column_means, parts, state, step, count, rows, width };
                bench.run(&launch, Grid::row(columns, THREADS));
                let launch = AdafactorMean { mean: mean.at, row_means: row, rows };
                bench.run(&launch, Grid::row(1, THREADS).with_shared(TOTALS_BYTES));
                (row, mean.at)
            }
            None => {
                let (means, count) = (column_means, width);
                run(
                    &AdafactorElementsF32 { means, gradient, state, step, count },
                    &AdafactorElementsBf16 { means, gradient, state, step, count },
                    Grid::row(columns, THREADS),
                );
                (Address::NONE, Address::NONE)
            }
        };
        let parts = bench.empty::<f64>("parts", *rows).at;
        run(
            &AdafactorSquaresF32 { parts, gradient, row_means, mean, column_means, state, width },
            &AdafactorSquaresBf16 { parts, gradient, row_means, mean, column_means, state, width },
            a_row_each,
        );
        let step_size = bench.empty::<f32>("step_size", 1).at;
        let count = self.parameters.count as i64;
        let launch = AdafactorStepSize { step_size, parts, step, rows: rows32, count };
        bench.run(&launch, Grid::row(1, THREADS).with_shared(TOTALS_BYTES));
        let (parameters, compute) = (self.parameters.at, self.compute.at);
        run(
            &AdafactorMatrixF32 {
                parameters,
                compute,
                gradient,
                row_means,
                mean,
                column_means,
                step_size,
                state,
                step,
                width,
            },
            &AdafactorMatrixBf16 {
                parameters,
                compute,
                gradient,
                row_means,
                mean,
                column_means,
                step_size,
                state,
                step,
                width,
            },
            Grid { blocks: [columns, *rows as u32, 1], threads: THREADS, shared_bytes: 0 },
        );
    }
}

fn step(number: i32) -> Adafactor {
    let beta2 = 1.0 - f64::from(number).powf(-0.8);
    let (kept, fresh) = (beta2 as f32, (1.0 - beta2) as f32);
    Adafactor { kept, fresh, eps: 1e-30, decay: 1.0 - 0.01 * 0.1, lr: 0.01, clip_threshold: 1.0 }
}

fn state(bench: &Bench, factor: f32, finite: u32) -> Address {
    bench.put("state", &[StepState { norm: 1.0, factor, finite }]).at
}

fn three_steps_are_those_of_transformers() {
    let file = include_bytes!("../../../engine/tests/fixtures/quantized/adafactor.safetensors");
    let floats = |name: &str| -> Vec<f32> {
        let file = SafeTensors::deserialize(file).unwrap();
        let bytes = file.tensor(name).unwrap().data().to_vec();
        bytes.chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect()
    };
    let f64s = |values: Vec<f32>| -> Vec<f64> { values.into_iter().map(f64::from).collect() };
    for (name, seed) in ["matrix", "vector"].into_iter().flat_map(|name| SEEDS.map(|seed| (name, seed))) {
        let bench = Bench::new(seed);
        let tensor = Tensor::new(&bench, &floats(name));
        for number in 1..=3 {
            let gradient = bench.put("gradient", &floats(&format!("{name}.grad{}", number - 1)));
            tensor.step(gradient.at, false, state(&bench, 1.0, 1), step(number));
        }
        let after = tensor.parameters.get();
        assert_close(name, &after, &f64s(floats(&format!("{name}.after"))), 2e-6, 1e-7);
        assert_eq!(tensor.compute.get(), after.iter().map(|x| bf16::from_f32(*x)).collect::<Vec<_>>());
        let columns = if tensor.rows > 1 { "exp_avg_sq_col" } else { "exp_avg_sq" };
        assert_close(columns, &tensor.column_means.get(), &f64s(floats(&format!("{name}.{columns}"))), 2e-6, 0.0);
        if let Some(means) = tensor.row_means {
            assert_close("rows", &means.get(), &f64s(floats(&format!("{name}.exp_avg_sq_row"))), 2e-6, 0.0);
        }
    }
}

fn gradients_in_bf16_make_the_same_step() {
    for rows in [1, 23] {
        let bench = Bench::new(1);
        let (start, gradient) = (bench.randoms(rows * WIDTH), bench.bf16s(rows * WIDTH));
        let gradients = [bench.put("f32", &gradient).at, bench.put_bf16("bf16", &gradient).at];
        let results = [false, true].map(|is_bf16| {
            let tensor = Tensor::new(&bench, &start);
            tensor.step(gradients[usize::from(is_bf16)], is_bf16, state(&bench, 0.5, 1), step(1));
            tensor.parameters.get()
        });
        assert_eq!(results[0], results[1]);
        assert_ne!(results[0], start);
    }
}

fn nothing_changes_where_the_gradient_is_not_finite() {
    let bench = Bench::new(1);
    let start = bench.randoms(WIDTH);
    let tensor = Tensor::new(&bench, &start);
    let gradient = bench.put("gradient", &[f32::NAN; WIDTH]).at;
    tensor.step(gradient, false, state(&bench, 0.0, 0), step(1));
    assert_eq!((tensor.parameters.get(), tensor.column_means.get()), (start, vec![0.0; WIDTH]));
}
