//! Training: micro-batches in, gradients accumulated, AdamW steps out.

use crate::{AdamWOptions, LoraOptions, Model, NamedTensor, Recompute, Result};

/// A target that is not trained on.
pub const IGNORE: u32 = u32::MAX;

/// Rows of tokens one after the other, without padding.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct MicroBatch {
    /// All rows' tokens.
    pub tokens: Vec<u32>,
    /// The token to predict at each position (already shifted), or [`IGNORE`].
    pub targets: Vec<u32>,
    /// Length of each row; they add up to `tokens.len()`.
    pub row_lengths: Vec<usize>,
}

/// A sum of losses, to be divided by the tokens of a whole batch.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct LossSum {
    /// Sum over trained tokens of −ln p(target), in nats.
    pub sum: f64,
    /// Trained tokens.
    pub tokens: usize,
}

/// What an optimizer step saw.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepStats {
    /// Global norm of the gradients, before clipping.
    pub grad_norm: f64,
}

/// Everything that a resumed run needs to go on bit for bit.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainState {
    /// Per adapter weight `NAME`: the weight itself, `NAME.exp_avg` and `NAME.exp_avg_sq`.
    pub tensors: Vec<NamedTensor>,
    /// Optimizer steps taken.
    pub step: u64,
    /// Micro-batches accumulated; decides the next dropout masks.
    pub micro_step: u64,
}

/// A model, its LoRA adapter, and the adapter's AdamW state.
pub struct Trainer {}

impl Trainer {
    /// Puts a fresh adapter on `model`.
    pub fn new(
        _model: Model,
        _lora: &LoraOptions,
        _optim: AdamWOptions,
        _recompute: Recompute,
    ) -> Result<Self> {
        unimplemented!()
    }
    /// Forward and backward; the gradients of `loss_scale · Σ loss` are added to those of earlier calls.
    pub fn accumulate(&mut self, _batch: &MicroBatch, _loss_scale: f32) -> Result<LossSum> {
        unimplemented!()
    }
    /// Clips, takes an AdamW step, and zeroes the gradients. Refuses NaN and infinity, with nothing changed.
    pub fn step(&mut self, _lr: f64, _max_grad_norm: Option<f64>) -> Result<StepStats> {
        unimplemented!()
    }
    /// The loss without dropout; keeps no activations.
    pub fn evaluate(&self, _batch: &MicroBatch) -> Result<LossSum> {
        unimplemented!()
    }
    /// The model with the adapter as it is now.
    pub fn model(&self) -> &Model {
        unimplemented!()
    }
    /// The number of trained parameters.
    pub fn trainable_parameters(&self) -> usize {
        unimplemented!()
    }
    /// The adapter under PEFT's names.
    pub fn adapter(&self) -> Vec<NamedTensor> {
        unimplemented!()
    }
    /// The accumulated gradients under PEFT's names.
    pub fn gradients(&self) -> Vec<NamedTensor> {
        unimplemented!()
    }
    /// What [`Trainer::restore`] needs.
    pub fn state(&self) -> TrainState {
        unimplemented!()
    }
    /// Goes back to a state of a trainer with the same model and options.
    pub fn restore(&mut self, _state: &TrainState) -> Result<()> {
        unimplemented!()
    }
}
