//! The loss of a batch, and its gradient by the residual stream after the last block.

use crate::backend::{Backend, CrossEntropyGrads};
use crate::batch::{IGNORE, MicroBatch};
use crate::block::rms_norm;
use crate::config::Rope;
use crate::error::{Error, Result};
use crate::model::Model;
use crate::param::Param;
use crate::shared::Packed;

/// A sum of losses, to be divided by the tokens of a whole batch.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct LossSum {
    /// Sum over trained tokens of −ln p(target), in nats.
    pub sum: f64,
    /// Trained tokens.
    pub tokens: usize,
}

/// The loss of the trained positions and its gradient by x, the residual stream after the last block; adds the
/// gradients of the output layer and the final norm, if they are trained. Positions that are not trained never meet the
/// output layer.
pub(super) fn output_layer<B: Backend>(
    model: &mut Model<B>,
    x: B::Tensor,
    batch: &Packed,
    loss_scale: f32,
) -> (LossSum, Option<B::Tensor>) {
    let Model { backend, norm, config, embedding, lm_head, .. } = model;
    let trained = backend.gather_rows(&x, &batch.trained);
    drop(x);
    let normed = backend.rms_norm(&trained, &norm.value, rms_norm(config));
    let output = lm_head.as_mut().unwrap_or(embedding);
    // The gradient is taken out while the weight is read.
    let mut d_output = output.param_mut().and_then(|param| param.grad.take());
    let grads = CrossEntropyGrads { scale: loss_scale, weight: d_output.as_mut() };
    let (losses, d_normed) =
        backend.linear_cross_entropy(&normed, output.get(), &batch.targets, config.final_softcap, Some(grads));
    drop(normed);
    if let Some(param) = output.param_mut() {
        param.grad = d_output;
    }
    let dx = d_normed.map(|d_normed| {
        let mut dx = backend.zeros(batch.trained.len(), config.hidden_size);
        let Param { value, grad, .. } = norm;
        backend.rms_norm_backward(&trained, value, rms_norm(config), &d_normed, &mut dx, grad.as_mut());
        backend.scatter_rows(&dx, &batch.trained, batch.tokens.len())
    });
    (sum(&losses), dx)
}

fn sum(losses: &[f32]) -> LossSum {
    LossSum { sum: losses.iter().map(|&loss| f64::from(loss)).sum(), tokens: losses.len() }
}

impl<B: Backend> Model<B> {
    /// The loss of a batch, without dropout; keeps no activations.
    ///
    /// # Errors
    /// The batch is inconsistent, or has tokens outside the vocabulary.
    pub fn evaluate(&self, batch: &MicroBatch) -> Result<LossSum> {
        self.check_batch(batch)?;
        Ok(B::run(|| self.loss(&self.pack(batch, true))))
    }

    fn loss(&self, batch: &Packed) -> LossSum {
        if batch.trained.is_empty() {
            return LossSum::default();
        }
        let Model { backend, norm, config, .. } = self;
        let rows = backend.rows(&batch.rows, 0, &config.ropes);
        let x = backend.gather_rows(&self.hidden(&batch.tokens, &rows), &batch.trained);
        let normed = backend.rms_norm(&x, &norm.value, rms_norm(config));
        let (output, cap) = (self.output_weight().get(), config.final_softcap);
        sum(&backend.linear_cross_entropy(&normed, output, &batch.targets, cap, None).0)
    }

    /// The batch as it is computed. Rows share nothing where the angles of a token depend on its row's length.
    pub(super) fn pack(&self, batch: &MicroBatch, may_share: bool) -> Packed {
        match may_share && !self.config.ropes.iter().any(Rope::depends_on_length) {
            true => Packed::sharing(batch),
            false => Packed::whole(batch),
        }
    }

    pub(super) fn check_batch(&self, batch: &MicroBatch) -> Result<()> {
        let MicroBatch { tokens, targets, row_lengths } = batch;
        self.check_tokens(tokens)?;
        if targets.len() != tokens.len() {
            let message = format!("{} tokens have {} targets", tokens.len(), targets.len());
            return Err(Error::Batch(message));
        }
        let rows: usize = row_lengths.iter().sum();
        if rows != tokens.len() || row_lengths.contains(&0) {
            let message = format!("row lengths {row_lengths:?} do not cover {} tokens", tokens.len());
            return Err(Error::Batch(message));
        }
        let vocabulary = self.config.vocab_size;
        if let Some(&target) = targets.iter().find(|&&t| t != IGNORE && t as usize >= vocabulary) {
            let message = format!("target {target} is outside the vocabulary of {vocabulary}");
            return Err(Error::Batch(message));
        }
        Ok(())
    }
}
