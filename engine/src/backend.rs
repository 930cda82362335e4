//! What a machine must compute so that [`crate::Model`] and [`crate::Trainer`] run on it.
//!
//! The operations are coarse: each is one or a few kernels on a GPU, and none needs the host between its parts. All
//! activations are f32 matrices [tokens, features]; the rows of a micro-batch lie one after the other.
//! A `_backward` function takes the gradient of the output (`dy`) and returns, or adds to, those of its inputs.

use serde::{Deserialize, Serialize};

use crate::config::{Activation, Rope};
use crate::host_tensor::HostTensor;
use crate::quantize::{Quantization, StoredWeight};

/// What linear layers multiply.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Precision {
    /// Everything in f32.
    #[default]
    F32,
    /// Weights and activations rounded to bf16, with sums in f32. All between the layers, and what is trained, stays in f32.
    Bf16,
}

/// Heads of an attention layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heads {
    /// Query heads.
    pub query: usize,
    /// Key and value heads.
    pub key_value: usize,
    /// Features of one head.
    pub dim: usize,
}

/// How one layer attends.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Attention {
    /// Its heads.
    pub heads: Heads,
    /// Factor of the scores q·k.
    pub scale: f32,
    /// Scores s become c·tanh(s/c).
    pub softcap: Option<f32>,
    /// Tokens that a token attends to, itself included; none for all before it.
    pub window: Option<usize>,
}

/// What an RMSNorm adds: `eps` to the mean square, `offset` to each weight.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RmsNorm {
    /// Added to the mean of squares.
    pub eps: f32,
    /// Added to each weight.
    pub offset: f32,
}

/// A linear layer's weight [out, in], frozen or trained.
pub enum WeightRef<'a, B: Backend> {
    /// In the backend's own form.
    Frozen(&'a B::Weight),
    /// As a matrix that the optimizer changes.
    Trained(&'a B::Tensor),
}

impl<B: Backend> Clone for WeightRef<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B: Backend> Copy for WeightRef<'_, B> {}

/// What a cross-entropy's backward pass is to give.
pub struct CrossEntropyGrads<'a, T> {
    /// Factor of all gradients.
    pub scale: f32,
    /// Where the gradient of the weight is added, if it is trained.
    pub weight: Option<&'a mut T>,
}

/// One module's dropout in one micro-batch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dropout {
    /// Share of elements that become zero; the others are divided by 1 − p.
    pub p: f32,
    /// Decides the mask together with the element's index, so that the backward pass finds the same one.
    pub key: u64,
}

/// One linear layer's adapter as the kernels need it.
pub struct LoraRef<'a, T> {
    /// [rank, in].
    pub a: &'a T,
    /// [out, rank].
    pub b: &'a T,
    /// Factor of the update.
    pub scale: f32,
    /// Dropout of the adapter's input.
    pub dropout: Option<Dropout>,
}

/// Gradients of one linear layer's adapter.
pub struct LoraGrads<'a, T> {
    /// [rank, in].
    pub a: &'a mut T,
    /// [out, rank].
    pub b: &'a mut T,
}

/// What the backward pass of an adapted layer takes from the forward pass.
pub struct AdaptedForward<'a, T> {
    /// The layer's input.
    pub x: &'a T,
    /// dropout(x) · Aᵀ.
    pub hidden: &'a T,
}

/// What is to become of the gradient of a layer's input.
pub enum InputGrad<T> {
    /// It is not wanted.
    None,
    /// It is wanted alone.
    Fresh,
    /// It is wanted, added to this.
    Onto(T),
}

/// Numbers of one AdamW step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWStep {
    /// Learning rate.
    pub lr: f64,
    /// Decay of the mean of gradients.
    pub beta1: f64,
    /// Decay of the mean of squared gradients.
    pub beta2: f64,
    /// Added to the root of the mean of squares.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// This step's number, from 1.
    pub step: u64,
    /// Factor of the gradients (clipping).
    pub grad_scale: f32,
}

/// Numbers of one step of stochastic gradient descent.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SgdStep {
    /// Learning rate.
    pub lr: f64,
    /// How much of the last step's direction is kept.
    pub momentum: f64,
    /// Weight decay, added to the gradient.
    pub weight_decay: f64,
    /// Factor of the gradients (clipping).
    pub grad_scale: f32,
}

/// Numbers of one Adafactor step, without a relative step size or a first moment.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdafactorStep {
    /// Learning rate.
    pub lr: f64,
    /// The running mean of squares decays by 1 − step^decay_rate.
    pub decay_rate: f64,
    /// Added to squared gradients.
    pub eps: f64,
    /// Largest root mean square of an update before the learning rate.
    pub clip_threshold: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// This step's number, from 1.
    pub step: u64,
    /// Factor of the gradients (clipping).
    pub grad_scale: f32,
}

/// Adafactor's running mean of squared gradients.
pub enum SecondMoment<'a, T> {
    /// Of a matrix: the means of its rows [1, rows] and of its columns [1, cols].
    Factored {
        /// Of its rows.
        row: &'a mut T,
        /// Of its columns.
        col: &'a mut T,
    },
    /// Of each element.
    Whole(&'a mut T),
}

/// A row of a micro-batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Row {
    /// Its own tokens.
    pub len: usize,
    /// The row before it whose tokens come before its own: it sees them, and its positions go on after theirs. A prefix
    /// has none itself.
    pub prefix: Option<usize>,
}

impl Row {
    /// A row that stands alone.
    pub fn new(len: usize) -> Self {
        Row { len, prefix: None }
    }
}

/// A machine that computes.
pub trait Backend: Send + Sync + Sized {
    /// A matrix of f32 [rows, cols].
    type Tensor: Send + Sync;
    /// A frozen weight [out, in], in whatever form the backend multiplies with.
    type Weight: Send + Sync;
    /// State of an optimizer in 8 bits of a dynamic map, in blocks of 256 (Dettmers et al., 2022).
    type State8bit: Send + Sync;
    /// The rows of a micro-batch: where each starts, and the rotary angles of its positions.
    type Rows: Send + Sync;

    /// Does many operations where they start fastest, such as on one of the backend's own threads.
    fn run<R: Send>(operations: impl FnOnce() -> R + Send) -> R {
        operations()
    }
    /// What its linear layers multiply; f32 until it is told otherwise.
    fn precision(&self) -> Precision;
    /// Changes what its linear layers multiply.
    fn set_precision(&mut self, precision: Precision);
    /// Has weights in 8 bits meet inputs in 8 bits, but for the columns in which a magnitude reaches the threshold
    /// (LLM.int8(), Dettmers et al., 2022); or inputs as they are, which they meet until it is told otherwise.
    fn set_outlier_threshold(&mut self, threshold: Option<f32>);
    /// Copies values to the machine.
    fn upload(&self, values: &[f32], rows: usize, cols: usize) -> Self::Tensor;
    /// Copies values from the machine, row-major.
    fn download(&self, x: &Self::Tensor) -> Vec<f32>;
    /// Rows and columns.
    fn shape(&self, x: &Self::Tensor) -> [usize; 2];
    /// A matrix of zeros.
    fn zeros(&self, rows: usize, cols: usize) -> Self::Tensor;
    /// A copy.
    fn copy(&self, x: &Self::Tensor) -> Self::Tensor;
    /// Takes a frozen weight as the checkpoint stores it.
    fn weight(&self, weight: HostTensor) -> Self::Weight;
    /// Takes a frozen weight and stores it in fewer bits.
    fn quantized_weight(&self, weight: HostTensor, quantization: Quantization) -> Self::Weight;
    /// Takes a frozen weight that is in few bits already.
    fn stored_weight(&self, weight: StoredWeight) -> Self::Weight;
    /// A frozen weight's values.
    fn weight_values(&self, weight: &Self::Weight) -> Self::Tensor;
    /// Stores the weight's values in no more bits than products use.
    fn round_weight(&self, weight: &mut Self::Weight);
    /// Puts the matrix rounded to bf16 in the place of an earlier one.
    fn set_bf16_weight(&self, weight: &mut Self::Weight, x: &Self::Tensor);
    /// The matrix rounded to bf16, as a weight.
    fn bf16_weight(&self, x: &Self::Tensor) -> Self::Weight;
    /// Prepares rows whose first tokens are at position `offset`, for each rotary embedding.
    fn rows(&self, rows: &[Row], offset: usize, ropes: &[Rope]) -> Self::Rows;

    /// scale · rows of `table`: [tokens, hidden].
    fn embedding(&self, table: WeightRef<'_, Self>, tokens: &[u32], scale: f32) -> Self::Tensor;
    /// Adds scale · dx to the rows of the table's gradient, but for the row of token `pad`.
    fn embedding_backward(
        &self,
        dx: &Self::Tensor,
        tokens: &[u32],
        scale: f32,
        pad: Option<u32>,
        d_table: &mut Self::Tensor,
    );

    /// Adds noise to the rows of x, uniform within ± alpha / √(n · cols) for a row of n tokens.
    fn neftune(&self, x: &mut Self::Tensor, rows: &Self::Rows, alpha: f32, key: u64);

    /// x · (offset + weight) / √(mean(x²) + eps) (Zhang and Sennrich, 2019), over stretches as long as the weight: rows,
    /// or the heads of rows.
    fn rms_norm(&self, x: &Self::Tensor, weight: &Self::Tensor, norm: RmsNorm) -> Self::Tensor;
    /// Adds the gradient of x to `dx` and, where it is wanted, that of the weight to `d_weight`.
    fn rms_norm_backward(
        &self,
        x: &Self::Tensor,
        weight: &Self::Tensor,
        norm: RmsNorm,
        dy: &Self::Tensor,
        dx: &mut Self::Tensor,
        d_weight: Option<&mut Self::Tensor>,
    );

    /// x · Wᵀ.
    fn linear(&self, x: &Self::Tensor, w: WeightRef<'_, Self>) -> Self::Tensor;
    /// y += x · Wᵀ.
    fn linear_add(&self, x: &Self::Tensor, w: WeightRef<'_, Self>, y: &mut Self::Tensor);
    /// dy · W.
    fn linear_backward(&self, dy: &Self::Tensor, w: WeightRef<'_, Self>) -> Self::Tensor;
    /// dx += dy · W.
    fn linear_backward_add(&self, dy: &Self::Tensor, w: WeightRef<'_, Self>, dx: &mut Self::Tensor);
    /// dW += dyᵀ · x.
    fn linear_weight_backward(&self, x: &Self::Tensor, dy: &Self::Tensor, d_weight: &mut Self::Tensor);

    /// y += bias in every row.
    fn add_bias(&self, y: &mut Self::Tensor, bias: &Self::Tensor);
    /// d_bias += the sum of dy's rows.
    fn bias_backward(&self, dy: &Self::Tensor, d_bias: &mut Self::Tensor);
    /// y += x.
    fn add(&self, y: &mut Self::Tensor, x: &Self::Tensor);
    /// y −= x.
    fn subtract(&self, y: &mut Self::Tensor, x: &Self::Tensor);
    /// dropout(x), which is also how a gradient passes it.
    fn drop_out(&self, x: &Self::Tensor, dropout: Dropout) -> Self::Tensor;
    /// Columns `from .. from + count` of x.
    fn columns(&self, x: &Self::Tensor, from: usize, count: usize) -> Self::Tensor;
    /// Matrices of as many rows, side by side.
    fn join_columns(&self, parts: &[&Self::Tensor]) -> Self::Tensor;
    /// c·tanh(x/c) in place.
    fn softcap(&self, x: &mut Self::Tensor, cap: f32);

    /// DoRA's factors magnitude / ‖W + scale · B · A‖, the norm taken over each of W's rows (Liu et al., 2024); [1, out].
    fn dora_factors(
        &self,
        w: WeightRef<'_, Self>,
        lora: &LoraRef<'_, Self::Tensor>,
        magnitude: &Self::Tensor,
    ) -> Self::Tensor;
    /// y · factors, column by column.
    fn scale_columns(&self, y: &Self::Tensor, factors: &Self::Tensor) -> Self::Tensor;
    /// d_magnitude += Σ over rows of dy · y · factors / magnitude.
    fn dora_backward(
        &self,
        y: &Self::Tensor,
        dy: &Self::Tensor,
        factors: &Self::Tensor,
        magnitude: &Self::Tensor,
        d_magnitude: &mut Self::Tensor,
    );

    /// x · Wᵀ + scale · dropout(x) · Aᵀ · Bᵀ, added to `onto` if there is one; and dropout(x) · Aᵀ [tokens, rank], which the
    /// backward pass needs.
    fn adapted_linear(
        &self,
        x: &Self::Tensor,
        w: WeightRef<'_, Self>,
        lora: &LoraRef<'_, Self::Tensor>,
        onto: Option<Self::Tensor>,
    ) -> (Self::Tensor, Self::Tensor);
    /// Adds to the adapter's gradients, and gives the gradient of x.
    fn adapted_linear_backward(
        &self,
        forward: AdaptedForward<'_, Self::Tensor>,
        w: WeightRef<'_, Self>,
        lora: &LoraRef<'_, Self::Tensor>,
        dy: &Self::Tensor,
        grads: LoraGrads<'_, Self::Tensor>,
        dx: InputGrad<Self::Tensor>,
    ) -> Option<Self::Tensor>;

    /// Rotates the halves of each head by its position's angles (Su et al., 2021; transformers' layout); `rope` is the
    /// index of the embedding that [`Backend::rows`] got.
    fn rope(&self, x: &mut Self::Tensor, head_dim: usize, rows: &Self::Rows, rope: usize);
    /// The opposite rotation, which is its gradient.
    fn rope_backward(&self, dx: &mut Self::Tensor, head_dim: usize, rows: &Self::Rows, rope: usize);

    /// Causal attention within each row and its prefix, softmax(scale·q·kᵀ)·v, and the log of each softmax's sum
    /// [tokens, query heads].
    fn attention(
        &self,
        q: &Self::Tensor,
        k: &Self::Tensor,
        v: &Self::Tensor,
        attention: Attention,
        rows: &Self::Rows,
    ) -> (Self::Tensor, Self::Tensor);
    /// The gradients of q, k and v.
    fn attention_backward(
        &self,
        forward: AttentionForward<'_, Self::Tensor>,
        dy: &Self::Tensor,
        attention: Attention,
        rows: &Self::Rows,
    ) -> [Self::Tensor; 3];
    /// Attention of new tokens of one row over the first `past + new` rows of its key and value caches.
    fn attention_cached(
        &self,
        q: &Self::Tensor,
        keys: &Self::Tensor,
        values: &Self::Tensor,
        attention: Attention,
        past: usize,
    ) -> Self::Tensor;
    /// Writes the rows of `x` into `cache` from row `at` on.
    fn write_rows(&self, cache: &mut Self::Tensor, x: &Self::Tensor, at: usize);

    /// activation(gate) · up (Shazeer, 2020).
    fn gated(&self, activation: Activation, gate: &Self::Tensor, up: &Self::Tensor) -> Self::Tensor;
    /// The gradients of gate and up, in their places.
    fn gated_backward(
        &self,
        activation: Activation,
        gate: Self::Tensor,
        up: Self::Tensor,
        dy: Self::Tensor,
    ) -> [Self::Tensor; 2];

    /// The rows of x with these indices.
    fn gather_rows(&self, x: &Self::Tensor, indices: &[u32]) -> Self::Tensor;
    /// A matrix of `rows` rows with those of x at `indices`, and zero elsewhere.
    fn scatter_rows(&self, x: &Self::Tensor, indices: &[u32], rows: usize) -> Self::Tensor;
    /// −ln softmax(cap(x · Wᵀ))[target] of each row, without ever holding all logits; with `grads`, also the gradient of
    /// their scaled sum by x.
    fn linear_cross_entropy(
        &self,
        x: &Self::Tensor,
        w: WeightRef<'_, Self>,
        targets: &[u32],
        softcap: Option<f32>,
        grads: Option<CrossEntropyGrads<'_, Self::Tensor>>,
    ) -> (Vec<f32>, Option<Self::Tensor>);

    /// Σ x², in f64.
    fn sum_of_squares(&self, x: &Self::Tensor) -> f64;
    /// Makes every element zero.
    fn clear(&self, x: &mut Self::Tensor);
    /// One step of stochastic gradient descent, with momentum if there is a buffer: b = momentum·b + g, x −= lr·b.
    fn sgd(&self, param: &mut Self::Tensor, grad: &Self::Tensor, momentum: Option<&mut Self::Tensor>, step: &SgdStep);
    /// One step of AdamW on one parameter and its two moments.
    fn adamw(
        &self,
        param: &mut Self::Tensor,
        grad: &Self::Tensor,
        moments: (&mut Self::Tensor, &mut Self::Tensor),
        step: &AdamWStep,
    );
    /// The same with moments in 8 bits.
    fn adamw_8bit(
        &self,
        param: &mut Self::Tensor,
        grad: &Self::Tensor,
        moments: (&mut Self::State8bit, &mut Self::State8bit),
        step: &AdamWStep,
    );
    /// One step of Adafactor (Shazeer and Stern, 2018) on one parameter.
    fn adafactor(
        &self,
        param: &mut Self::Tensor,
        grad: &Self::Tensor,
        moment: SecondMoment<'_, Self::Tensor>,
        step: &AdafactorStep,
    );
    /// Zeros in 8 bits, in a map for numbers of either sign or of one.
    fn zeros_8bit(&self, len: usize, signed: bool) -> Self::State8bit;
    /// How many codes and how many largest magnitudes there are.
    fn lengths_8bit(&self, x: &Self::State8bit) -> [usize; 2];
    /// The codes, one a value, and the largest magnitude of each block.
    fn download_8bit(&self, x: &Self::State8bit) -> (Vec<u8>, Vec<f32>);
    /// Takes codes and magnitudes, as many as there are.
    fn upload_8bit(&self, x: &mut Self::State8bit, codes: &[u8], absmax: &[f32]);
}

/// What attention's backward pass takes from the forward pass.
pub struct AttentionForward<'a, T: ?Sized> {
    /// Queries, rotated.
    pub q: &'a T,
    /// Keys, rotated.
    pub k: &'a T,
    /// Values.
    pub v: &'a T,
    /// The log of each softmax's sum.
    pub log_sums: &'a T,
}
