//! What a machine must compute so that [`crate::Model`] and [`crate::Trainer`] run on it.
//!
//! The operations are coarse: each is one or a few kernels on a GPU, and none needs the host between its parts. All
//! activations are f32 matrices [tokens, features]; the rows of a micro-batch lie one after the other.
//! A `_backward` function takes the gradient of the output (`dy`) and returns, or adds to, those of its inputs.

use crate::weights::HostTensor;

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

/// A machine that computes.
pub trait Backend: Send + Sync + Sized {
    /// A matrix of f32 [rows, cols].
    type Tensor: Send + Sync;
    /// A frozen weight [out, in], in whatever form the backend multiplies with.
    type Weight: Send + Sync;
    /// The rows of a micro-batch: where each starts, and the rotary angles of its positions.
    type Rows: Send + Sync;

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
    /// Prepares rows of these lengths, whose first tokens are at position `offset`.
    fn rows(&self, lengths: &[usize], offset: usize, rope_frequencies: &[f32]) -> Self::Rows;

    /// Rows of `table`: [tokens, hidden].
    fn embedding(&self, table: &Self::Weight, tokens: &[u32]) -> Self::Tensor;

    /// x · weight / √(mean(x²) + eps), row by row (Zhang and Sennrich, 2019).
    fn rms_norm(&self, x: &Self::Tensor, weight: &Self::Tensor, eps: f32) -> Self::Tensor;
    /// Adds the gradient of x to `dx`.
    fn rms_norm_backward(
        &self,
        x: &Self::Tensor,
        weight: &Self::Tensor,
        eps: f32,
        dy: &Self::Tensor,
        dx: &mut Self::Tensor,
    );

    /// x · Wᵀ.
    fn linear(&self, x: &Self::Tensor, w: &Self::Weight) -> Self::Tensor;
    /// y += x · Wᵀ.
    fn linear_add(&self, x: &Self::Tensor, w: &Self::Weight, y: &mut Self::Tensor);
    /// dy · W. The weight is frozen and gets no gradient.
    fn linear_backward(&self, dy: &Self::Tensor, w: &Self::Weight) -> Self::Tensor;
    /// dx += dy · W.
    fn linear_backward_add(&self, dy: &Self::Tensor, w: &Self::Weight, dx: &mut Self::Tensor);

    /// y += scale · dropout(x) · Aᵀ · Bᵀ; returns dropout(x) · Aᵀ [tokens, rank], which the backward pass needs.
    fn lora(&self, x: &Self::Tensor, lora: &LoraRef<'_, Self::Tensor>, y: &mut Self::Tensor) -> Self::Tensor;
    /// Adds to the adapter's gradients and, where wanted, to the gradient of x.
    fn lora_backward(
        &self,
        x: &Self::Tensor,
        hidden: &Self::Tensor,
        lora: &LoraRef<'_, Self::Tensor>,
        dy: &Self::Tensor,
        grads: LoraGrads<'_, Self::Tensor>,
        dx: Option<&mut Self::Tensor>,
    );

    /// Rotates the halves of each head by its position's angles (Su et al., 2021; transformers' layout).
    fn rope(&self, x: &mut Self::Tensor, head_dim: usize, rows: &Self::Rows);
    /// The opposite rotation, which is its gradient.
    fn rope_backward(&self, dx: &mut Self::Tensor, head_dim: usize, rows: &Self::Rows);

    /// Causal attention within each row, softmax(q·kᵀ/√dim)·v, and the log of each softmax's sum [tokens, query heads].
    fn attention(
        &self,
        q: &Self::Tensor,
        k: &Self::Tensor,
        v: &Self::Tensor,
        heads: Heads,
        rows: &Self::Rows,
    ) -> (Self::Tensor, Self::Tensor);
    /// The gradients of q, k and v.
    fn attention_backward(
        &self,
        forward: AttentionForward<'_, Self::Tensor>,
        dy: &Self::Tensor,
        heads: Heads,
        rows: &Self::Rows,
    ) -> [Self::Tensor; 3];
    /// Attention of new tokens of one row over the first `past + new` rows of its key and value caches.
    fn attention_cached(
        &self,
        q: &Self::Tensor,
        keys: &Self::Tensor,
        values: &Self::Tensor,
        heads: Heads,
        past: usize,
    ) -> Self::Tensor;
    /// Writes the rows of `x` into `cache` from row `at` on.
    fn write_rows(&self, cache: &mut Self::Tensor, x: &Self::Tensor, at: usize);

    /// silu(gate) · up (Shazeer, 2020).
    fn swiglu(&self, gate: &Self::Tensor, up: &Self::Tensor) -> Self::Tensor;
    /// The gradients of gate and up.
    fn swiglu_backward(
        &self,
        gate: &Self::Tensor,
        up: &Self::Tensor,
        dy: &Self::Tensor,
    ) -> (Self::Tensor, Self::Tensor);

    /// The rows of x with these indices.
    fn gather_rows(&self, x: &Self::Tensor, indices: &[u32]) -> Self::Tensor;
    /// A matrix of `rows` rows with those of x at `indices`, and zero elsewhere.
    fn scatter_rows(&self, x: &Self::Tensor, indices: &[u32], rows: usize) -> Self::Tensor;
    /// −ln softmax(x · Wᵀ)[target] of each row, without ever holding all logits; with `grad_scale`, also
    /// grad_scale times the gradient of their sum by x.
    fn linear_cross_entropy(
        &self,
        x: &Self::Tensor,
        w: &Self::Weight,
        targets: &[u32],
        grad_scale: Option<f32>,
    ) -> (Vec<f32>, Option<Self::Tensor>);

    /// Σ x², in f64.
    fn sum_of_squares(&self, x: &Self::Tensor) -> f64;
    /// Makes every element zero.
    fn clear(&self, x: &mut Self::Tensor);
    /// One step of AdamW on one parameter and its two moments.
    fn adamw(
        &self,
        param: &mut Self::Tensor,
        grad: &Self::Tensor,
        moments: (&mut Self::Tensor, &mut Self::Tensor),
        step: &AdamWStep,
    );
}

/// What attention's backward pass takes from the forward pass.
pub struct AttentionForward<'a, T: ?Sized> {
    /// Queries, rotated.
    pub q: &'a T,
    /// Keys, rotated.
    pub k: &'a T,
    /// Values.
    pub v: &'a T,
    /// The output.
    pub out: &'a T,
    /// The log of each softmax's sum.
    pub log_sums: &'a T,
}
