//! The CPU backend: computes in f32, or multiplies in bf16, on all threads of the current rayon pool, the same bits for any
//! number of them.

mod attention;
mod bf16;
mod columns;
mod cross_entropy;
mod dora;
mod four_bit;
mod gated;
mod gemm;
mod lora;
mod neftune;
mod optimizers;
mod outliers;
pub mod profile;
mod rms_norm;
mod rope;
mod rows;
mod simd;
mod tensor;
mod transpose;
mod view;
mod weight;

use std::sync::Arc;

use rayon::prelude::*;

use crate::backend::{
    AdafactorStep, AdamWStep, AdaptedForward, Attention, AttentionForward, Backend, CrossEntropyGrads, Dropout,
    InputGrad, LoraGrads, LoraRef, Precision, RmsNorm, Row, SecondMoment, SgdStep, WeightRef,
};
use crate::config::{Activation, Rope};
use crate::host_tensor::HostTensor;
use crate::quantize::{Blockwise, Quantization, StoredWeight};
use gemm::{Operand, Output, Term, gemm_sum};
use profile::time;
pub use rows::Rows;
use tensor::Pool;
pub use tensor::Tensor;
use view::{View, ViewMut};
use weight::Matrix;
pub use weight::Weight;

/// The host's processors.
#[derive(Default)]
pub struct Cpu {
    pool: Arc<Pool>,
    precision: Precision,
    outlier_threshold: Option<f32>,
}

impl Cpu {
    fn stale(&self, rows: usize, cols: usize) -> Tensor {
        Tensor::stale(&self.pool, rows, cols)
    }

    fn layer<'a>(&self, w: WeightRef<'a, Cpu>) -> Layer<'a> {
        Layer { w: matrix(w), precision: self.precision }
    }

    /// The layer's input as it meets the weight, if that is in 8 bits and so is the input.
    fn in_eight_bits(&self, x: &Tensor, layer: Layer<'_>) -> Option<Tensor> {
        let threshold = self.outlier_threshold.filter(|_| layer.w.is_eight_bit())?;
        let _timer = time("rounding to 8 bits", 0);
        let mut y = self.stale(x.rows(), x.cols());
        outliers::round(x.values(), x.cols(), threshold, y.values_mut());
        Some(y)
    }

    /// x with the adapter's dropout, or nothing if there is none.
    fn dropped(&self, x: &Tensor, dropout: Option<Dropout>) -> Option<Tensor> {
        dropout.map(|dropout| self.drop_out(x, dropout))
    }
}

/// A layer's matrix, and what its products multiply.
#[derive(Clone, Copy)]
struct Layer<'a> {
    w: Matrix<'a>,
    precision: Precision,
}

fn matrix<'a>(w: WeightRef<'a, Cpu>) -> Matrix<'a> {
    match w {
        WeightRef::Frozen(weight) => weight.matrix(),
        WeightRef::Trained(x) => Matrix::new(x.values(), x.rows(), x.cols()),
    }
}

fn view(x: &Tensor) -> View<'_> {
    View::new(x.values(), x.rows(), x.cols())
}

/// y (+)= x · Wᵀ, and another product.
fn project(x: &Tensor, Layer { w, precision }: Layer<'_>, output: Output, y: &mut Tensor, more: Option<Term<'_>>) {
    let (rows, cols) = (y.rows(), y.cols());
    let (own, more) = (Term::new(1.0, view(x), Operand::transposed(w)).with(precision), more.as_slice());
    if rows == 1 {
        gemm::matvec(w, x.values(), precision, output, y.values_mut());
        return more.iter().for_each(|&term| gemm_sum(ViewMut::new(y.values_mut(), rows, cols), Output::Add, &[term]));
    }
    let y = ViewMut::new(y.values_mut(), rows, cols);
    match more {
        [more] => gemm_sum(y, output, &[own, *more]),
        _ => gemm_sum(y, output, &[own]),
    }
}

/// dx (+)= dy · W, and another product.
fn project_back(
    dy: &Tensor,
    Layer { w, precision }: Layer<'_>,
    output: Output,
    dx: &mut Tensor,
    more: Option<Term<'_>>,
) {
    let (rows, cols) = (dx.rows(), dx.cols());
    let dx = ViewMut::new(dx.values_mut(), rows, cols);
    let own = Term::new(1.0, view(dy), Operand::new(w)).with(precision);
    match more {
        Some(more) => gemm_sum(dx, output, &[own, more]),
        None => gemm_sum(dx, output, &[own]),
    }
}

/// Elements that one task of an element-wise operation takes.
const TASK: usize = 1 << 15;

fn lora_shape(x: &Tensor, lora: &LoraRef<'_, Tensor>) -> lora::Shape {
    lora::Shape { tokens: x.rows(), input: x.cols(), output: lora.b.rows(), rank: lora.a.rows() }
}

/// Weights of a matrix.
fn elements(w: WeightRef<'_, Cpu>) -> usize {
    let w = matrix(w);
    w.rows * w.cols
}

/// Logits, and with gradients that of x and perhaps that of the weight, for which the logits are computed again.
fn output_flops(x: &Tensor, w: WeightRef<'_, Cpu>, grads: Option<&CrossEntropyGrads<'_, Tensor>>) -> usize {
    let products = match grads {
        None => 1,
        Some(CrossEntropyGrads { weight: None, .. }) => 2,
        Some(_) => 4,
    };
    2 * products * x.rows() * elements(w)
}

impl Backend for Cpu {
    type Tensor = Tensor;
    type Weight = Weight;
    type State8bit = Blockwise;
    type Rows = Rows;

    fn run<R: Send>(operations: impl FnOnce() -> R + Send) -> R {
        // From any other thread, each operation would wake a worker and sleep until it is done.
        rayon::scope(|_| operations())
    }

    fn precision(&self) -> Precision {
        self.precision
    }

    fn set_precision(&mut self, precision: Precision) {
        self.precision = precision;
    }

    fn set_outlier_threshold(&mut self, threshold: Option<f32>) {
        self.outlier_threshold = threshold;
    }

    fn upload(&self, values: &[f32], rows: usize, cols: usize) -> Tensor {
        let mut x = self.stale(rows, cols);
        x.values_mut().copy_from_slice(values);
        x
    }

    fn download(&self, x: &Tensor) -> Vec<f32> {
        x.values().to_vec()
    }

    fn shape(&self, x: &Tensor) -> [usize; 2] {
        [x.rows(), x.cols()]
    }

    fn zeros(&self, rows: usize, cols: usize) -> Tensor {
        let mut x = self.stale(rows, cols);
        x.values_mut().fill(0.0);
        x
    }

    fn copy(&self, x: &Tensor) -> Tensor {
        let _timer = time("copies", 0);
        let mut y = self.stale(x.rows(), x.cols());
        let chunks = y.values_mut().par_chunks_mut(TASK).zip(x.values().par_chunks(TASK));
        chunks.for_each(|(y, x)| y.copy_from_slice(x));
        y
    }

    fn weight(&self, weight: HostTensor) -> Weight {
        Weight::new(weight)
    }

    fn quantized_weight(&self, weight: HostTensor, quantization: Quantization) -> Weight {
        Weight::quantized(&weight, quantization)
    }

    fn stored_weight(&self, weight: StoredWeight) -> Weight {
        Weight::stored(weight)
    }

    fn weight_values(&self, weight: &Weight) -> Tensor {
        let _timer = time("other", 0);
        let w = weight.matrix();
        let mut x = self.stale(w.rows, w.cols);
        x.values_mut().par_chunks_mut(w.cols).enumerate().for_each(|(row, x)| w.widen(row, 0, x));
        x
    }

    fn round_weight(&self, weight: &mut Weight) {
        if self.precision == Precision::Bf16 {
            weight.round();
        }
    }

    fn set_bf16_weight(&self, weight: &mut Weight, x: &Tensor) {
        let _timer = time("rounding to bf16", 0);
        weight.set_bf16(x.values());
    }

    fn bf16_weight(&self, x: &Tensor) -> Weight {
        let _timer = time("rounding to bf16", 0);
        Weight::new(HostTensor::bf16(x.values(), vec![x.rows(), x.cols()]))
    }

    fn rows(&self, rows: &[Row], offset: usize, ropes: &[Rope]) -> Rows {
        Rows::new(rows, offset, ropes)
    }

    fn embedding(&self, table: WeightRef<'_, Self>, tokens: &[u32], scale: f32) -> Tensor {
        let _timer = time("embedding", 0);
        let table = matrix(table);
        let mut x = self.stale(tokens.len(), table.cols);
        x.values_mut().par_chunks_mut(table.cols).zip(tokens).for_each(|(x, &token)| {
            table.widen(token as usize, 0, x);
            if scale != 1.0 {
                x.iter_mut().for_each(|x| *x *= scale);
            }
        });
        x
    }

    fn embedding_backward(&self, dx: &Tensor, tokens: &[u32], scale: f32, pad: Option<u32>, d_table: &mut Tensor) {
        let _timer = time("embedding, backward", 0);
        let width = dx.cols();
        for (dx, &token) in dx.values().chunks_exact(width).zip(tokens).filter(|(_, token)| Some(**token) != pad) {
            let d_row = &mut d_table.values_mut()[token as usize * width..][..width];
            d_row.iter_mut().zip(dx).for_each(|(d, dx)| *d += scale * dx);
        }
    }

    fn neftune(&self, x: &mut Tensor, rows: &Rows, alpha: f32, key: u64) {
        let width = x.cols();
        neftune::add(x.values_mut(), width, rows, alpha, key);
    }

    fn rms_norm(&self, x: &Tensor, weight: &Tensor, norm: RmsNorm) -> Tensor {
        let _timer = time("norms", 0);
        let mut y = self.stale(x.rows(), x.cols());
        rms_norm::forward(x.values(), weight.values(), norm, y.values_mut());
        y
    }

    fn rms_norm_backward(
        &self,
        x: &Tensor,
        weight: &Tensor,
        norm: RmsNorm,
        dy: &Tensor,
        dx: &mut Tensor,
        d_weight: Option<&mut Tensor>,
    ) {
        let _timer = time("norms, backward", 0);
        rms_norm::backward(x.values(), weight.values(), norm, dy.values(), dx.values_mut());
        if let Some(d_weight) = d_weight {
            rms_norm::weight_backward(x.values(), norm, dy.values(), d_weight.values_mut());
        }
    }

    fn linear(&self, x: &Tensor, w: WeightRef<'_, Self>) -> Tensor {
        let layer = self.layer(w);
        let rounded = self.in_eight_bits(x, layer);
        let _timer = time("linear", 2 * x.rows() * elements(w));
        let mut y = self.stale(x.rows(), layer.w.rows);
        project(rounded.as_ref().unwrap_or(x), layer, Output::Set, &mut y, None);
        y
    }

    fn linear_add(&self, x: &Tensor, w: WeightRef<'_, Self>, y: &mut Tensor) {
        let layer = self.layer(w);
        let rounded = self.in_eight_bits(x, layer);
        let _timer = time("linear", 2 * x.rows() * elements(w));
        project(rounded.as_ref().unwrap_or(x), layer, Output::Add, y, None);
    }

    fn linear_backward(&self, dy: &Tensor, w: WeightRef<'_, Self>) -> Tensor {
        let _timer = time("linear, backward", 2 * dy.rows() * elements(w));
        let layer = self.layer(w);
        let mut dx = self.stale(dy.rows(), layer.w.cols);
        project_back(dy, layer, Output::Set, &mut dx, None);
        dx
    }

    fn linear_backward_add(&self, dy: &Tensor, w: WeightRef<'_, Self>, dx: &mut Tensor) {
        let _timer = time("linear, backward", 2 * dy.rows() * elements(w));
        project_back(dy, self.layer(w), Output::Add, dx, None);
    }

    fn linear_weight_backward(&self, x: &Tensor, dy: &Tensor, d_weight: &mut Tensor) {
        let _timer = time("weight gradients", 2 * x.rows() * x.cols() * dy.cols());
        let (x, dy) = (View::new(x.values(), x.rows(), x.cols()), View::new(dy.values(), dy.rows(), dy.cols()));
        let (outputs, inputs) = (d_weight.rows(), d_weight.cols());
        let term = Term::new(1.0, dy.t(), x).with(self.precision);
        gemm_sum(ViewMut::new(d_weight.values_mut(), outputs, inputs), Output::Add, &[term]);
    }

    fn add_bias(&self, y: &mut Tensor, bias: &Tensor) {
        let _timer = time("biases", 0);
        let width = y.cols();
        columns::add_to_rows(y.values_mut(), width, bias.values());
    }

    fn bias_backward(&self, dy: &Tensor, d_bias: &mut Tensor) {
        let _timer = time("biases", 0);
        columns::add_sums(dy.values(), dy.cols(), d_bias.values_mut());
    }

    fn add(&self, y: &mut Tensor, x: &Tensor) {
        let _timer = time("copies", 0);
        let chunks = y.values_mut().par_chunks_mut(TASK).zip(x.values().par_chunks(TASK));
        chunks.for_each(|(y, x)| y.iter_mut().zip(x).for_each(|(y, x)| *y += x));
    }

    fn subtract(&self, y: &mut Tensor, x: &Tensor) {
        let _timer = time("copies", 0);
        let chunks = y.values_mut().par_chunks_mut(TASK).zip(x.values().par_chunks(TASK));
        chunks.for_each(|(y, x)| y.iter_mut().zip(x).for_each(|(y, x)| *y -= x));
    }

    fn drop_out(&self, x: &Tensor, dropout: Dropout) -> Tensor {
        let _timer = time("lora", 0);
        let mut y = self.stale(x.rows(), x.cols());
        lora::drop_out(dropout, x.values(), y.values_mut());
        y
    }

    fn columns(&self, x: &Tensor, from: usize, count: usize) -> Tensor {
        let _timer = time("copies", 0);
        let mut y = self.stale(x.rows(), count);
        let rows = y.values_mut().par_chunks_mut(count).zip(x.values().par_chunks(x.cols()));
        rows.for_each(|(y, x)| y.copy_from_slice(&x[from..from + count]));
        y
    }

    fn join_columns(&self, parts: &[&Tensor]) -> Tensor {
        let _timer = time("copies", 0);
        let width = parts.iter().map(|part| part.cols()).sum();
        let mut y = self.stale(parts[0].rows(), width);
        y.values_mut().par_chunks_mut(width).enumerate().for_each(|(row, mut y)| {
            for part in parts {
                let (left, rest) = y.split_at_mut(part.cols());
                left.copy_from_slice(part.row(row));
                y = rest;
            }
        });
        y
    }

    fn softcap(&self, x: &mut Tensor, cap: f32) {
        let _timer = time("other", 0);
        x.values_mut().par_chunks_mut(TASK).for_each(|x| {
            simd::vectorize(
                #[inline(always)]
                || x.iter_mut().for_each(|x| *x = cap * simd::tanh(*x / cap)),
            )
        });
    }

    fn dora_factors(&self, w: WeightRef<'_, Self>, lora: &LoraRef<'_, Tensor>, magnitude: &Tensor) -> Tensor {
        let _timer = time("dora", 0);
        let mut factors = self.stale(1, magnitude.cols());
        dora::factors(matrix(w), lora, magnitude.values(), factors.values_mut());
        factors
    }

    fn scale_columns(&self, y: &Tensor, factors: &Tensor) -> Tensor {
        let _timer = time("dora", 0);
        let mut scaled = self.stale(y.rows(), y.cols());
        columns::scale(y.values(), factors.values(), scaled.values_mut());
        scaled
    }

    fn dora_backward(&self, y: &Tensor, dy: &Tensor, factors: &Tensor, magnitude: &Tensor, d_magnitude: &mut Tensor) {
        let _timer = time("dora", 0);
        let factors = factors.values().iter().zip(magnitude.values()).map(|(factor, magnitude)| factor / magnitude);
        columns::add_products(y.values(), dy.values(), &factors.collect::<Vec<f32>>(), d_magnitude.values_mut());
    }

    fn adapted_linear(
        &self,
        x: &Tensor,
        w: WeightRef<'_, Self>,
        lora: &LoraRef<'_, Tensor>,
        onto: Option<Tensor>,
    ) -> (Tensor, Tensor) {
        let shape = lora_shape(x, lora);
        let dropped = self.dropped(x, lora.dropout);
        let timer = time("lora", 2 * x.rows() * lora.a.rows() * x.cols());
        let mut hidden = self.stale(shape.tokens, shape.rank);
        lora::hidden(shape, dropped.as_ref().unwrap_or(x).values(), lora.a.values(), hidden.values_mut());
        drop(timer);
        let layer = self.layer(w);
        let rounded = self.in_eight_bits(x, layer);
        let _timer = time("linear", 2 * x.rows() * (elements(w) + lora.b.rows() * lora.b.cols()));
        let output = if onto.is_some() { Output::Add } else { Output::Set };
        let mut y = onto.unwrap_or_else(|| self.stale(shape.tokens, shape.output));
        let update = Term::new(lora.scale, view(&hidden), view(lora.b).t());
        project(rounded.as_ref().unwrap_or(x), layer, output, &mut y, Some(update));
        (y, hidden)
    }

    fn adapted_linear_backward(
        &self,
        AdaptedForward { x, hidden }: AdaptedForward<'_, Tensor>,
        w: WeightRef<'_, Self>,
        lora: &LoraRef<'_, Tensor>,
        dy: &Tensor,
        grads: LoraGrads<'_, Tensor>,
        dx: InputGrad<Tensor>,
    ) -> Option<Tensor> {
        let shape = lora_shape(x, lora);
        let dropped = self.dropped(x, lora.dropout);
        let timer = time("lora, backward", 2 * shape.tokens * shape.rank * (2 * shape.output + shape.input));
        let mut d_hidden = self.stale(shape.tokens, shape.rank);
        let mut d_b = self.stale(shape.rank, shape.output);
        let f = lora::Backward {
            x: dropped.as_ref().unwrap_or(x).values(),
            hidden: hidden.values(),
            b: lora.b.values(),
            scale: lora.scale,
            dy: dy.values(),
        };
        let (grad_a, grad_b) = (grads.a.values_mut(), grads.b.values_mut());
        lora::backward(shape, &f, d_hidden.values_mut(), grad_a, grad_b, d_b.values_mut());
        drop(timer);
        let (output, mut dx) = match dx {
            InputGrad::None => return None,
            InputGrad::Fresh => (Output::Set, self.stale(shape.tokens, shape.input)),
            InputGrad::Onto(dx) => (Output::Add, dx),
        };
        let _timer = time("linear, backward", 2 * x.rows() * (elements(w) + lora.a.rows() * lora.a.cols()));
        let update = lora.dropout.is_none().then(|| Term::new(1.0, view(&d_hidden), view(lora.a)));
        project_back(dy, self.layer(w), output, &mut dx, update);
        if let (Some(dropout), Some(mut scratch)) = (lora.dropout, dropped) {
            // The dropped copy of x has served; its buffer takes the gradient before the mask.
            let (a, scratch) = (lora.a.values(), scratch.values_mut());
            lora::dropped_input_gradient(shape, d_hidden.values(), a, dx.values_mut(), dropout, scratch);
        }
        Some(dx)
    }

    fn rope(&self, x: &mut Tensor, head_dim: usize, rows: &Rows, rope: usize) {
        let _timer = time("rope", 0);
        let width = x.cols();
        rope::rotate(x.values_mut(), width, head_dim, &rows.angles[rope], false);
    }

    fn rope_backward(&self, dx: &mut Tensor, head_dim: usize, rows: &Rows, rope: usize) {
        let _timer = time("rope", 0);
        let width = dx.cols();
        rope::rotate(dx.values_mut(), width, head_dim, &rows.angles[rope], true);
    }

    fn attention(&self, q: &Tensor, k: &Tensor, v: &Tensor, attention: Attention, rows: &Rows) -> (Tensor, Tensor) {
        let _timer = time("attention", 4 * rows.pairs() * attention.heads.query * attention.heads.dim);
        let mut y = self.stale(q.rows(), q.cols());
        let mut log_sums = self.stale(q.rows(), attention.heads.query);
        let mut parts = self.stale(q.rows(), q.cols());
        attention::forward(
            [q.values(), k.values(), v.values()],
            attention,
            rows,
            parts.values_mut(),
            y.values_mut(),
            log_sums.values_mut(),
        );
        (y, log_sums)
    }

    fn attention_backward(
        &self,
        forward: AttentionForward<'_, Tensor>,
        dy: &Tensor,
        attention: Attention,
        rows: &Rows,
    ) -> [Tensor; 3] {
        let _timer = time("attention, backward", 10 * rows.pairs() * attention.heads.query * attention.heads.dim);
        let mut q_parts = self.stale(dy.rows(), dy.cols());
        let [mut k_parts, mut v_parts] = [(); 2].map(|()| self.stale(rows.keys(), forward.k.cols()));
        let mut dq = self.stale(forward.q.rows(), forward.q.cols());
        let mut dk = self.stale(forward.k.rows(), forward.k.cols());
        let mut dv = self.stale(forward.v.rows(), forward.v.cols());
        let forward = AttentionForward {
            q: forward.q.values(),
            k: forward.k.values(),
            v: forward.v.values(),
            log_sums: forward.log_sums.values(),
        };
        attention::backward(
            &forward,
            dy.values(),
            attention,
            rows,
            [q_parts.values_mut(), k_parts.values_mut(), v_parts.values_mut()],
            [dq.values_mut(), dk.values_mut(), dv.values_mut()],
        );
        [dq, dk, dv]
    }

    fn attention_cached(
        &self,
        q: &Tensor,
        keys: &Tensor,
        values: &Tensor,
        attention: Attention,
        past: usize,
    ) -> Tensor {
        let _timer = time("attention", 4 * past * q.values().len());
        let mut y = self.stale(q.rows(), q.cols());
        attention::cached(q.values(), keys.values(), values.values(), attention, past, y.values_mut());
        y
    }

    fn write_rows(&self, cache: &mut Tensor, x: &Tensor, at: usize) {
        let from = at * cache.cols();
        cache.values_mut()[from..from + x.values().len()].copy_from_slice(x.values());
    }

    fn gated(&self, activation: Activation, gate: &Tensor, up: &Tensor) -> Tensor {
        let _timer = time("activations", 0);
        let mut y = self.stale(gate.rows(), gate.cols());
        gated::forward(activation, gate.values(), up.values(), y.values_mut());
        y
    }

    fn gated_backward(&self, activation: Activation, mut gate: Tensor, mut up: Tensor, dy: Tensor) -> [Tensor; 2] {
        let _timer = time("activations, backward", 0);
        gated::backward(activation, gate.values_mut(), up.values_mut(), dy.values());
        [gate, up]
    }

    fn gather_rows(&self, x: &Tensor, indices: &[u32]) -> Tensor {
        let _timer = time("copies", 0);
        let mut y = self.stale(indices.len(), x.cols());
        for (y, &i) in y.values_mut().chunks_exact_mut(x.cols()).zip(indices) {
            y.copy_from_slice(x.row(i as usize));
        }
        y
    }

    fn scatter_rows(&self, x: &Tensor, indices: &[u32], rows: usize) -> Tensor {
        let _timer = time("copies", 0);
        let mut y = self.zeros(rows, x.cols());
        let cols = x.cols();
        for (x, &i) in x.values().chunks_exact(cols).zip(indices) {
            y.values_mut()[i as usize * cols..][..cols].copy_from_slice(x);
        }
        y
    }

    fn linear_cross_entropy(
        &self,
        x: &Tensor,
        w: WeightRef<'_, Self>,
        targets: &[u32],
        softcap: Option<f32>,
        grads: Option<CrossEntropyGrads<'_, Tensor>>,
    ) -> (Vec<f32>, Option<Tensor>) {
        let _timer = time("output layer and loss", output_flops(x, w, grads.as_ref()));
        let Layer { w, precision } = self.layer(w);
        let problem = cross_entropy::Problem { x: x.values(), w, precision, targets, softcap };
        let mut scratch = self.stale(1, problem.scratch_len());
        let mut dx = grads.is_some().then(|| self.stale(x.rows(), x.cols()));
        let gradients = grads.zip(dx.as_mut()).map(|(grads, dx)| cross_entropy::Gradients {
            scale: grads.scale,
            x: dx.values_mut(),
            weight: grads.weight.map(Tensor::values_mut),
        });
        let losses = problem.solve(scratch.values_mut(), gradients);
        (losses, dx)
    }

    fn sum_of_squares(&self, x: &Tensor) -> f64 {
        let _timer = time("optimizer", 0);
        let square = |x: &f32| f64::from(*x) * f64::from(*x);
        let parts: Vec<f64> = x.values().par_chunks(TASK).map(|x| x.iter().map(square).sum()).collect();
        parts.iter().sum()
    }

    fn clear(&self, x: &mut Tensor) {
        let _timer = time("optimizer", 0);
        x.values_mut().par_chunks_mut(TASK).for_each(|x| x.fill(0.0));
    }

    fn sgd(&self, param: &mut Tensor, grad: &Tensor, momentum: Option<&mut Tensor>, step: &SgdStep) {
        let _timer = time("optimizer", 0);
        optimizers::sgd(param.values_mut(), grad.values(), momentum.map(Tensor::values_mut), step);
    }

    fn adamw(&self, param: &mut Tensor, grad: &Tensor, (m, v): (&mut Tensor, &mut Tensor), step: &AdamWStep) {
        let _timer = time("optimizer", 0);
        optimizers::adamw(param.values_mut(), grad.values(), m.values_mut(), v.values_mut(), step);
    }

    fn adamw_8bit(
        &self,
        param: &mut Tensor,
        grad: &Tensor,
        moments: (&mut Blockwise, &mut Blockwise),
        step: &AdamWStep,
    ) {
        let _timer = time("optimizer", 0);
        optimizers::adamw_8bit(param.values_mut(), grad.values(), moments, step);
    }

    fn adafactor(&self, param: &mut Tensor, grad: &Tensor, moment: SecondMoment<'_, Tensor>, step: &AdafactorStep) {
        let _timer = time("optimizer", 0);
        let moment = match moment {
            SecondMoment::Factored { row, col } => {
                optimizers::Squares::Factored { row: row.values_mut(), col: col.values_mut() }
            }
            SecondMoment::Whole(squares) => optimizers::Squares::Whole(squares.values_mut()),
        };
        optimizers::adafactor(param.values_mut(), grad.values(), moment, step);
    }

    fn zeros_8bit(&self, len: usize, signed: bool) -> Blockwise {
        Blockwise::zeros(len, signed)
    }

    fn lengths_8bit(&self, x: &Blockwise) -> [usize; 2] {
        [x.codes.len(), x.absmax.len()]
    }

    fn download_8bit(&self, x: &Blockwise) -> (Vec<u8>, Vec<f32>) {
        (x.codes.clone(), x.absmax.clone())
    }

    fn upload_8bit(&self, x: &mut Blockwise, codes: &[u8], absmax: &[f32]) {
        x.codes.copy_from_slice(codes);
        x.absmax.copy_from_slice(absmax);
    }
}
