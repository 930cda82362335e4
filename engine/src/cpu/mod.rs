//! The CPU backend: f32, on all threads of the current rayon pool, the same bits for any number of them.

mod adamw;
mod attention;
mod cross_entropy;
mod gemm;
mod lora;
mod rms_norm;
mod rope;
mod simd;
mod swiglu;
mod tensor;
mod transpose;

use std::sync::Arc;

use rayon::prelude::*;

use crate::backend::{AdamWStep, AttentionForward, Backend, Dropout, Heads, LoraGrads, LoraRef};
use crate::weights::HostTensor;
use gemm::{Output, View, ViewMut, gemm};
use tensor::Pool;
pub use tensor::Tensor;

/// The host's processors.
#[derive(Default)]
pub struct Cpu {
    pool: Arc<Pool>,
}

/// A frozen weight [out, in] in f32: where the checkpoint's file is mapped, or widened into memory.
pub struct Weight {
    tensor: HostTensor,
    outputs: usize,
    inputs: usize,
}

impl Weight {
    fn values(&self) -> &[f32] {
        self.tensor.as_f32().expect("Backend::weight widened it")
    }

    fn view(&self) -> View<'_> {
        View::new(self.values(), self.outputs, self.inputs)
    }
}

/// Rows of a micro-batch and their rotary angles.
pub struct Rows {
    starts: Vec<usize>,
    lengths: Vec<usize>,
    /// Per token: its row, and its place in it counted from the row's start.
    row_of: Vec<usize>,
    positions: Vec<usize>,
    /// [longest row, head_dim / 2].
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl Cpu {
    fn stale(&self, rows: usize, cols: usize) -> Tensor {
        Tensor::stale(&self.pool, rows, cols)
    }

    /// x with the adapter's dropout, or nothing if there is none.
    fn dropped(&self, x: &Tensor, dropout: Option<Dropout>) -> Option<Tensor> {
        dropout.map(|dropout| {
            let mut y = self.stale(x.rows(), x.cols());
            lora::drop_out(dropout, x.values(), y.values_mut());
            y
        })
    }
}

/// y (+)= x · Wᵀ.
fn project(x: &Tensor, w: &Weight, output: Output, y: &mut Tensor) {
    let (rows, cols) = (y.rows(), y.cols());
    if rows == 1 && output == Output::Set {
        return gemm::matvec(w.values(), x.values(), y.values_mut());
    }
    let x = View::new(x.values(), x.rows(), x.cols());
    gemm(ViewMut::new(y.values_mut(), rows, cols), output, 1.0, x, w.view().t());
}

/// dx (+)= dy · W.
fn project_back(dy: &Tensor, w: &Weight, output: Output, dx: &mut Tensor) {
    let (rows, cols) = (dx.rows(), dx.cols());
    let dy = View::new(dy.values(), dy.rows(), dy.cols());
    gemm(ViewMut::new(dx.values_mut(), rows, cols), output, 1.0, dy, w.view());
}

fn lora_shape(x: &Tensor, lora: &LoraRef<'_, Tensor>) -> lora::Shape {
    lora::Shape { tokens: x.rows(), input: x.cols(), output: lora.b.rows(), rank: lora.a.rows() }
}

impl Backend for Cpu {
    type Tensor = Tensor;
    type Weight = Weight;
    type Rows = Rows;

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
        let mut y = self.stale(x.rows(), x.cols());
        let chunks = y.values_mut().par_chunks_mut(1 << 15).zip(x.values().par_chunks(1 << 15));
        chunks.for_each(|(y, x)| y.copy_from_slice(x));
        y
    }

    fn weight(&self, weight: HostTensor) -> Weight {
        let &[outputs, inputs] = weight.shape() else { panic!("a linear weight is a matrix") };
        Weight { tensor: weight.into_f32(), outputs, inputs }
    }

    fn rows(&self, lengths: &[usize], offset: usize, rope_frequencies: &[f32]) -> Rows {
        let mut starts = Vec::with_capacity(lengths.len());
        let (mut row_of, mut positions) = (Vec::new(), Vec::new());
        for (row, &len) in lengths.iter().enumerate() {
            starts.push(positions.len());
            positions.extend(0..len);
            row_of.resize(positions.len(), row);
        }
        let longest = lengths.iter().copied().max().unwrap_or(0);
        // transformers multiplies position and frequency in f32.
        let angles: Vec<f32> = (offset..offset + longest)
            .flat_map(|position| rope_frequencies.iter().map(move |f| position as f32 * f))
            .collect();
        Rows {
            starts,
            lengths: lengths.to_vec(),
            row_of,
            positions,
            cos: angles.iter().map(|a| a.cos()).collect(),
            sin: angles.iter().map(|a| a.sin()).collect(),
        }
    }

    fn embedding(&self, table: &Weight, tokens: &[u32]) -> Tensor {
        let width = table.inputs;
        let mut x = self.stale(tokens.len(), width);
        for (x, &token) in x.values_mut().chunks_exact_mut(width).zip(tokens) {
            x.copy_from_slice(&table.values()[token as usize * width..][..width]);
        }
        x
    }

    fn rms_norm(&self, x: &Tensor, weight: &Tensor, eps: f32) -> Tensor {
        let mut y = self.stale(x.rows(), x.cols());
        rms_norm::forward(x.values(), weight.values(), eps, y.values_mut());
        y
    }

    fn rms_norm_backward(&self, x: &Tensor, weight: &Tensor, eps: f32, dy: &Tensor, dx: &mut Tensor) {
        rms_norm::backward(x.values(), weight.values(), eps, dy.values(), dx.values_mut());
    }

    fn linear(&self, x: &Tensor, w: &Weight) -> Tensor {
        let mut y = self.stale(x.rows(), w.outputs);
        project(x, w, Output::Set, &mut y);
        y
    }

    fn linear_add(&self, x: &Tensor, w: &Weight, y: &mut Tensor) {
        project(x, w, Output::Add, y);
    }

    fn linear_backward(&self, dy: &Tensor, w: &Weight) -> Tensor {
        let mut dx = self.stale(dy.rows(), w.inputs);
        project_back(dy, w, Output::Set, &mut dx);
        dx
    }

    fn linear_backward_add(&self, dy: &Tensor, w: &Weight, dx: &mut Tensor) {
        project_back(dy, w, Output::Add, dx);
    }

    fn lora(&self, x: &Tensor, lora: &LoraRef<'_, Tensor>, y: &mut Tensor) -> Tensor {
        let shape = lora_shape(x, lora);
        let dropped = self.dropped(x, lora.dropout);
        let input = dropped.as_ref().unwrap_or(x);
        let mut hidden = self.stale(shape.tokens, shape.rank);
        lora::forward(
            shape,
            input.values(),
            lora.a.values(),
            lora.b.values(),
            lora.scale,
            hidden.values_mut(),
            y.values_mut(),
        );
        hidden
    }

    fn lora_backward(
        &self,
        x: &Tensor,
        hidden: &Tensor,
        lora: &LoraRef<'_, Tensor>,
        dy: &Tensor,
        grads: LoraGrads<'_, Tensor>,
        dx: Option<&mut Tensor>,
    ) {
        let shape = lora_shape(x, lora);
        let mut d_hidden = self.stale(shape.tokens, shape.rank);
        let dropped = self.dropped(x, lora.dropout);
        let f = lora::Backward {
            x: dropped.as_ref().unwrap_or(x).values(),
            hidden: hidden.values(),
            b: lora.b.values(),
            scale: lora.scale,
            dy: dy.values(),
        };
        let (d_a, d_b) = (grads.a.values_mut(), grads.b.values_mut());
        lora::backward(shape, &f, d_hidden.values_mut(), d_a, d_b);
        if let Some(dx) = dx {
            // The dropped copy of x has served; its buffer takes the gradient before the mask.
            let mut scratch = dropped;
            let dropout = lora.dropout.zip(scratch.as_mut().map(Tensor::values_mut));
            lora::input_gradient(shape, d_hidden.values(), lora.a.values(), dx.values_mut(), dropout);
        }
    }

    fn rope(&self, x: &mut Tensor, head_dim: usize, rows: &Rows) {
        let width = x.cols();
        rope::rotate(x.values_mut(), width, head_dim, rows, false);
    }

    fn rope_backward(&self, dx: &mut Tensor, head_dim: usize, rows: &Rows) {
        let width = dx.cols();
        rope::rotate(dx.values_mut(), width, head_dim, rows, true);
    }

    fn attention(&self, q: &Tensor, k: &Tensor, v: &Tensor, heads: Heads, rows: &Rows) -> (Tensor, Tensor) {
        let mut y = self.stale(q.rows(), q.cols());
        let mut log_sums = self.stale(q.rows(), heads.query);
        let mut parts = self.stale(q.rows(), q.cols());
        attention::forward(
            [q.values(), k.values(), v.values()],
            heads,
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
        heads: Heads,
        rows: &Rows,
    ) -> [Tensor; 3] {
        let [mut q_parts, mut k_parts, mut v_parts] = [(); 3].map(|()| self.stale(dy.rows(), dy.cols()));
        let mut dq = self.stale(forward.q.rows(), forward.q.cols());
        let mut dk = self.stale(forward.k.rows(), forward.k.cols());
        let mut dv = self.stale(forward.v.rows(), forward.v.cols());
        let forward = AttentionForward {
            q: forward.q.values(),
            k: forward.k.values(),
            v: forward.v.values(),
            out: forward.out.values(),
            log_sums: forward.log_sums.values(),
        };
        attention::backward(
            &forward,
            dy.values(),
            heads,
            rows,
            [q_parts.values_mut(), k_parts.values_mut(), v_parts.values_mut()],
            [dq.values_mut(), dk.values_mut(), dv.values_mut()],
        );
        [dq, dk, dv]
    }

    fn attention_cached(&self, q: &Tensor, keys: &Tensor, values: &Tensor, heads: Heads, past: usize) -> Tensor {
        let mut y = self.stale(q.rows(), q.cols());
        attention::cached(q.values(), keys.values(), values.values(), heads, past, y.values_mut());
        y
    }

    fn write_rows(&self, cache: &mut Tensor, x: &Tensor, at: usize) {
        let from = at * cache.cols();
        cache.values_mut()[from..from + x.values().len()].copy_from_slice(x.values());
    }

    fn swiglu(&self, gate: &Tensor, up: &Tensor) -> Tensor {
        let mut y = self.stale(gate.rows(), gate.cols());
        swiglu::forward(gate.values(), up.values(), y.values_mut());
        y
    }

    fn swiglu_backward(&self, gate: &Tensor, up: &Tensor, dy: &Tensor) -> (Tensor, Tensor) {
        let mut d_gate = self.stale(gate.rows(), gate.cols());
        let mut d_up = self.stale(gate.rows(), gate.cols());
        swiglu::backward(gate.values(), up.values(), dy.values(), d_gate.values_mut(), d_up.values_mut());
        (d_gate, d_up)
    }

    fn gather_rows(&self, x: &Tensor, indices: &[u32]) -> Tensor {
        let mut y = self.stale(indices.len(), x.cols());
        for (y, &i) in y.values_mut().chunks_exact_mut(x.cols()).zip(indices) {
            y.copy_from_slice(x.row(i as usize));
        }
        y
    }

    fn scatter_rows(&self, x: &Tensor, indices: &[u32], rows: usize) -> Tensor {
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
        w: &Weight,
        targets: &[u32],
        grad_scale: Option<f32>,
    ) -> (Vec<f32>, Option<Tensor>) {
        let problem = cross_entropy::Problem { x: x.values(), w: w.values(), targets, hidden: x.cols() };
        let mut scratch = self.stale(1, problem.scratch_len());
        let mut dx = grad_scale.map(|scale| (self.stale(x.rows(), x.cols()), scale));
        let losses = problem.solve(scratch.values_mut(), dx.as_mut().map(|(dx, scale)| (dx.values_mut(), *scale)));
        (losses, dx.map(|(dx, _)| dx))
    }

    fn sum_of_squares(&self, x: &Tensor) -> f64 {
        x.values().iter().map(|&x| f64::from(x) * f64::from(x)).sum()
    }

    fn clear(&self, x: &mut Tensor) {
        x.values_mut().fill(0.0);
    }

    fn adamw(&self, param: &mut Tensor, grad: &Tensor, (m, v): (&mut Tensor, &mut Tensor), step: &AdamWStep) {
        adamw::step(param.values_mut(), grad.values(), m.values_mut(), v.values_mut(), step);
    }
}
