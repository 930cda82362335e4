//! The kernels, a struct of arguments each, in the order of the sources, which say what they compute and with which shapes.

use crate::{kernel::Argument, memory::Address};

/// `Activation` of `activation.cu`.
#[repr(i32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// x · σ(x).
    Silu = 0,
    /// GELU by tanh.
    GeluTanh = 1,
}

/// `Code` of `quantize.cu`: 16 values, the midpoints between them in ascending order, and the numbers of the values in that order.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Code {
    /// By code.
    pub values: [f32; 16],
    /// Ascending.
    pub midpoints: [f32; 15],
    /// The codes in the order of their values.
    pub order: [u8; 16],
}

impl Code {
    /// A code by the values of its 16 numbers.
    pub fn new(values: [f32; 16]) -> Self {
        let mut order: [u8; 16] = std::array::from_fn(|i| i as u8);
        order.sort_by(|&a, &b| values[usize::from(a)].total_cmp(&values[usize::from(b)]));
        let value = |i: usize| values[usize::from(order[i])];
        Self { values, midpoints: std::array::from_fn(|i| (value(i) + value(i + 1)) / 2.0), order }
    }
}

/// `Scales` of `quantize.cu`: of each block of 64 weights.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Scales {
    /// Plain: f32 of each block of weights. Nested: f32 of each block of 256 scales.
    pub absmax: Address,
    /// u8 of each block of weights; none if plain.
    pub nested: Address,
    /// f32 [256], ascending.
    pub map: Address,
    /// f32 [1], added to each nested scale.
    pub mean: Address,
}

// SAFETY: four pointers.
unsafe impl Argument for Scales {}

/// `StepState` of `optimizer.cu`, read by the host once a step.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StepState {
    /// Of the gradient, before it is clipped.
    pub norm: f64,
    /// Of the gradient in the update.
    pub factor: f32,
    /// 1 if the update is made.
    pub finite: u32,
}

/// `AdamW` of `optimizer.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// 1 − lr · weight decay.
    pub decay: f32,
    /// Of the second moment.
    pub beta2: f32,
    /// 1 − beta1.
    pub new1: f32,
    /// 1 − beta2.
    pub new2: f32,
    /// √(1 − beta2^step).
    pub correction2: f32,
    /// lr / (1 − beta1^step).
    pub step_size: f32,
    /// Added to the root of the second moment.
    pub eps: f32,
}

// SAFETY: seven floats.
unsafe impl Argument for AdamW {}

/// `Sgd` of `optimizer.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sgd {
    /// Learning rate.
    pub lr: f32,
    /// Weight decay, added to the gradient.
    pub decay: f32,
    /// Momentum.
    pub kept: f32,
}

// SAFETY: three floats.
unsafe impl Argument for Sgd {}

/// `Adafactor` of `adafactor.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Adafactor {
    /// Share of the running means that stays.
    pub kept: f32,
    /// Share of what is new.
    pub fresh: f32,
    /// Added to squares.
    pub eps: f32,
    /// 1 − lr · weight decay.
    pub decay: f32,
    /// Learning rate.
    pub lr: f64,
    /// The largest root mean square of an update that is not scaled down.
    pub clip_threshold: f64,
}

// SAFETY: four floats and two of 64 bits.
unsafe impl Argument for Adafactor {}

/// `Rope` of `rope.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Rope {
    /// f32 [tokens, half].
    pub cos: Address,
    /// f32 [tokens, half].
    pub sin: Address,
    /// Heads of a token.
    pub heads: i32,
    /// Elements of a head: at most 512.
    pub head_dim: i32,
    /// Half of the elements that are rotated.
    pub half: i32,
}

// SAFETY: two pointers and three integers, padded to the pointers' alignment on either side.
unsafe impl Argument for Rope {}

kernels! { "norm":
    /// y = x · s · (offset + w), after a residual if there is one.
    RmsNorm = rms_norm {
        y: Address, scales: Address, sum: Address, x: Address, residual: Address, weight: Address,
        width: i32, eps: f32, offset: f32,
    }
    /// The gradient by x, with that of the residual stream if there is one.
    RmsNormBackward = rms_norm_backward {
        dx: Address, dy: Address, d_residual: Address, x: Address, weight: Address, scales: Address,
        width: i32, offset: f32,
    }
    /// Parts of the gradient by w.
    RmsNormWeightBackward = rms_norm_weight_backward {
        parts: Address, dy: Address, x: Address, scales: Address, rows: i32, width: i32, rows_a_block: i32,
    }
    /// Adds the sum of parts.
    AddParts = add_parts { to: Address, parts: Address, count: i32, width: i32, }
}

kernels! { "activation":
    /// y = activation(gate) · up.
    Gated = gated { y: Address, gate: Address, up: Address, count: i64, activation: i32, }
    /// The gradients by gate and up.
    GatedBackward = gated_backward {
        d_gate: Address, d_up: Address, dy: Address, gate: Address, up: Address, count: i64, activation: i32,
    }
}

kernels! { "quantize":
    /// Codes and scales of blocks of 64.
    Quantize4BitF32 = quantize_4bit_f32 { codes: Address, absmax: Address, weights: Address, code: Address, count: i64, }
    /// Codes and scales of blocks of 64.
    Quantize4BitBf16 = quantize_4bit_bf16 { codes: Address, absmax: Address, weights: Address, code: Address, count: i64, }
    /// The mean of all scales.
    MeanOfScales = mean_of_scales { mean: Address, scales: Address, count: i64, }
    /// Scales in 8 bits, less their mean.
    NestScales = nest_scales {
        codes: Address, absmax: Address, scales: Address, mean: Address, map: Address, count: i64,
    }
    /// Weights as bf16.
    Dequantize4Bit = dequantize_4bit { weights: Address, codes: Address, scales: Scales, code: Address, count: i64, }
    /// Codes and a scale of each row.
    Quantize8BitF32 = quantize_8bit_f32 { codes: Address, absmax: Address, weights: Address, width: i32, }
    /// Codes and a scale of each row.
    Quantize8BitBf16 = quantize_8bit_bf16 { codes: Address, absmax: Address, weights: Address, width: i32, }
    /// Weights as bf16.
    Dequantize8Bit = dequantize_8bit { weights: Address, codes: Address, absmax: Address, width: i32, }
}

kernels! { "noise":
    /// Zeros some elements, and scales the others.
    DropOut = drop_out { y: Address, x: Address, count: i64, threshold: u32, scale: f32, key: u64, }
    /// Adds noise to embeddings.
    Neftune = neftune { x: Address, lengths: Address, width: i32, alpha: f32, key: u64, }
}

kernels! { "optimizer":
    /// Parts of Σ gradient².
    SquaresF32 = squares_f32 { parts: Address, gradient: Address, count: i64, per_block: i32, }
    /// Parts of Σ gradient².
    SquaresBf16 = squares_bf16 { parts: Address, gradient: Address, count: i64, per_block: i32, }
    /// The norm, and what the update multiplies the gradient by.
    GradientScale = gradient_scale { state: Address, parts: Address, count: i32, scale: f64, max_norm: f64, }
    /// A step of AdamW.
    AdamWF32 = adamw_f32 {
        parameters: Address, compute: Address, gradient: Address, m: Address, v: Address, state: Address,
        step: AdamW, count: i64,
    }
    /// A step of AdamW.
    AdamWBf16 = adamw_bf16 {
        parameters: Address, compute: Address, gradient: Address, m: Address, v: Address, state: Address,
        step: AdamW, count: i64,
    }
    /// A step of AdamW with moments in 8 bits.
    AdamW8BitF32 = adamw_8bit_f32 {
        parameters: Address, compute: Address, gradient: Address, m: Address, m_absmax: Address, v: Address,
        v_absmax: Address, maps: Address, state: Address, step: AdamW, count: i64,
    }
    /// A step of AdamW with moments in 8 bits.
    AdamW8BitBf16 = adamw_8bit_bf16 {
        parameters: Address, compute: Address, gradient: Address, m: Address, m_absmax: Address, v: Address,
        v_absmax: Address, maps: Address, state: Address, step: AdamW, count: i64,
    }
    /// A step of SGD.
    SgdF32 = sgd_f32 {
        parameters: Address, compute: Address, gradient: Address, momentum: Address, state: Address,
        step: Sgd, count: i64,
    }
    /// A step of SGD.
    SgdBf16 = sgd_bf16 {
        parameters: Address, compute: Address, gradient: Address, momentum: Address, state: Address,
        step: Sgd, count: i64,
    }
}

kernels! { "rope":
    /// Turns queries or keys, normalised first if there is a weight.
    NormRope = norm_rope {
        y: Address, scales: Address, x: Address, weight: Address, rope: Rope, tokens: i64, y_stride: i64,
        x_stride: i64, eps: f32, offset: f32,
    }
    /// The gradient by queries or keys.
    NormRopeBackward = norm_rope_backward {
        dx: Address, dy: Address, x: Address, weight: Address, scales: Address, rope: Rope, tokens: i64,
        dx_stride: i64, dy_stride: i64, x_stride: i64, offset: f32,
    }
}

kernels! { "cross_entropy":
    /// Losses, and the gradient in place of the logits.
    CrossEntropyF32 = cross_entropy_f32 {
        logits: Address, losses: Address, targets: Address, vocabulary: i32, stride: i64, scale: f32, cap: f32,
        wants_gradient: i32,
    }
    /// Losses, and the gradient in place of the logits.
    CrossEntropyBf16 = cross_entropy_bf16 {
        logits: Address, losses: Address, targets: Address, vocabulary: i32, stride: i64, scale: f32, cap: f32,
        wants_gradient: i32,
    }
}

kernels! { "embedding":
    /// Rows of a table.
    Embedding = embedding { y: Address, table: Address, tokens: Address, width: i32, scale: f32, }
    /// Adds to the gradient of the words that occur.
    EmbeddingBackward = embedding_backward {
        d_table: Address, dy: Address, words: Address, starts: Address, order: Address, width: i32, scale: f32,
    }
}

kernels! { "adafactor":
    /// The running means of columns.
    AdafactorColumns = adafactor_columns {
        column_means: Address, parts: Address, state: Address, step: Adafactor, count: i32, rows: i32, width: i32,
    }
    /// The mean of the rows' means.
    AdafactorMean = adafactor_mean { mean: Address, row_means: Address, rows: i32, }
    /// The size of a tensor's step.
    AdafactorStepSize = adafactor_step_size {
        step_size: Address, parts: Address, step: Adafactor, rows: i32, count: i64,
    }
    /// The running means of rows.
    AdafactorRowsF32 = adafactor_rows_f32 { row: Address, gradient: Address, state: Address, step: Adafactor, width: i32, }
    /// Parts of the sums of columns.
    AdafactorColumnPartsF32 = adafactor_column_parts_f32 {
        parts: Address, gradient: Address, state: Address, step: Adafactor, rows: i32, width: i32, rows_a_block: i32,
    }
    /// The running means of a vector's elements.
    AdafactorElementsF32 = adafactor_elements_f32 {
        means: Address, gradient: Address, state: Address, step: Adafactor, count: i32,
    }
    /// Parts of the squares of the update.
    AdafactorSquaresF32 = adafactor_squares_f32 {
        parts: Address, gradient: Address, row_means: Address, mean: Address, column_means: Address, state: Address,
        width: i32,
    }
    /// The update.
    AdafactorMatrixF32 = adafactor_matrix_f32 {
        parameters: Address, compute: Address, gradient: Address, row_means: Address, mean: Address,
        column_means: Address, step_size: Address, state: Address, step: Adafactor, width: i32,
    }
    /// The running means of rows.
    AdafactorRowsBf16 = adafactor_rows_bf16 { row: Address, gradient: Address, state: Address, step: Adafactor, width: i32, }
    /// Parts of the sums of columns.
    AdafactorColumnPartsBf16 = adafactor_column_parts_bf16 {
        parts: Address, gradient: Address, state: Address, step: Adafactor, rows: i32, width: i32, rows_a_block: i32,
    }
    /// The running means of a vector's elements.
    AdafactorElementsBf16 = adafactor_elements_bf16 {
        means: Address, gradient: Address, state: Address, step: Adafactor, count: i32,
    }
    /// Parts of the squares of the update.
    AdafactorSquaresBf16 = adafactor_squares_bf16 {
        parts: Address, gradient: Address, row_means: Address, mean: Address, column_means: Address, state: Address,
        width: i32,
    }
    /// The update.
    AdafactorMatrixBf16 = adafactor_matrix_bf16 {
        parameters: Address, compute: Address, gradient: Address, row_means: Address, mean: Address,
        column_means: Address, step_size: Address, state: Address, step: Adafactor, width: i32,
    }
}
