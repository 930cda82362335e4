//! Training: micro-batches in, gradients accumulated, AdamW steps out.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use crate::backend::Backend;
use crate::block::{DropoutSource, Kept, Pass};
use crate::cpu::Cpu;
use crate::error::{Error, Result};
use crate::lora::{Adapter, BlockGrads, LoraOptions, LoraPair, peft_name};
use crate::model::{Model, NamedTensor, Recompute};
use crate::optim::{AdamWOptions, Moments, clip_factor};
use crate::projection::Projection;
use crate::random;

/// A target that is not trained on.
pub const IGNORE: u32 = u32::MAX;

/// Rows of tokens one after the other, without padding.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
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
pub struct Trainer<B: Backend = Cpu> {
    model: Model<B>,
    recompute: Recompute,
    optim: AdamWOptions,
    dropout: f32,
    seed: u64,
    grads: Vec<BlockGrads<B::Tensor>>,
    /// In the order of [`parameters`].
    moments: Vec<Moments<B::Tensor>>,
    step: u64,
    micro_step: u64,
}

/// What the forward pass leaves of one block.
enum Activations<B: Backend> {
    Kept(Kept<B>),
    Input(B::Tensor),
}

impl<B: Backend> Trainer<B> {
    /// Puts a fresh adapter on `model`, in place of any other.
    ///
    /// # Errors
    /// The options are out of range or select no layer.
    pub fn new(mut model: Model<B>, lora: &LoraOptions, optim: AdamWOptions, recompute: Recompute) -> Result<Self> {
        let adapter = lora.init(&model.backend, &model.config)?;
        let backend = &model.backend;
        let zeros = |[rows, cols]: [usize; 2]| backend.zeros(rows, cols);
        let grads = adapter.iter().map(|block| {
            block.each_ref().map(|layer| {
                layer
                    .as_ref()
                    .map(|layer| LoraPair { a: zeros(backend.shape(&layer.a)), b: zeros(backend.shape(&layer.b)) })
            })
        });
        let moments = parameters(&adapter).map(|(_, param)| {
            let shape = backend.shape(param);
            Moments { exp_avg: zeros(shape), exp_avg_sq: zeros(shape) }
        });
        let (grads, moments) = (grads.collect(), moments.collect());
        model.adapter = Some(adapter);
        let (dropout, seed) = (lora.dropout as f32, lora.seed);
        Ok(Trainer { model, recompute, optim, dropout, seed, grads, moments, step: 0, micro_step: 0 })
    }

    /// Forward and backward; the gradients of `loss_scale · Σ loss` are added to those of earlier calls.
    ///
    /// # Errors
    /// The batch is inconsistent, or has tokens outside the vocabulary.
    pub fn accumulate(&mut self, batch: &MicroBatch, loss_scale: f32) -> Result<LossSum> {
        let trained = self.model.check_batch(batch)?;
        let dropout_key = random::key(self.seed, &[self.micro_step]);
        self.micro_step += 1;
        if trained.is_empty() {
            return Ok(LossSum::default());
        }
        let Trainer { model, grads, dropout: p, recompute, .. } = self;
        let rows = model.backend.rows(&batch.row_lengths, 0, &model.rope_frequencies);
        let pass = |i: usize| {
            let dropout = DropoutSource { p: *p, key: random::key(dropout_key, &[i as u64]) };
            Pass { dropout: (*p > 0.0).then_some(dropout), ..model.pass(i, &rows) }
        };
        // Blocks below the first adapter have nothing to learn: they keep no activations and see no gradient.
        let adapted = |block: &BlockGrads<_>| block.iter().any(Option::is_some);
        let first = grads.iter().position(adapted).expect("an adapter has a layer");

        let mut x = model.embed(&batch.tokens);
        let mut activations = Vec::with_capacity(model.blocks.len() - first);
        for (i, block) in model.blocks.iter().enumerate() {
            let (y, kept) = block.forward(&pass(i), x);
            if i >= first {
                activations.push(match recompute {
                    Recompute::None => Activations::Kept(kept),
                    Recompute::Full => Activations::Input(kept.into_input()),
                });
            }
            x = y;
        }
        let (loss, mut dx) = output_layer(model, x, batch, &trained, Some(loss_scale));
        for (i, activations) in (first..model.blocks.len()).zip(activations).rev() {
            let (block, pass) = (&model.blocks[i], pass(i));
            let kept = match activations {
                Activations::Kept(kept) => kept,
                Activations::Input(x) => block.recompute(&pass, x),
            };
            let dy = dx.take().expect("only the first adapted block returns no gradient");
            dx = block.backward(&pass, kept, dy, &mut grads[i], i > first);
        }
        Ok(loss)
    }

    /// Clips, takes an AdamW step, and zeroes the gradients.
    ///
    /// # Errors
    /// A gradient is NaN or infinite: nothing is changed.
    pub fn step(&mut self, lr: f64, max_grad_norm: Option<f64>) -> Result<StepStats> {
        let Trainer { model: Model { backend, adapter, .. }, grads, moments, optim, step, .. } = self;
        let squares: f64 = gradients(grads).map(|grad| backend.sum_of_squares(grad)).sum();
        let grad_norm = squares.sqrt();
        if !grad_norm.is_finite() {
            return Err(Error::NonFinite { step: *step + 1, grad_norm });
        }
        *step += 1;
        let numbers = optim.step(*step, lr, clip_factor(grad_norm, max_grad_norm));
        let layers = adapter.iter_mut().flatten().flatten().flatten();
        let params = layers.flat_map(|layer| [&mut layer.a, &mut layer.b]);
        let grads = grads.iter_mut().flatten().flatten().flat_map(|pair| [&mut pair.a, &mut pair.b]);
        for ((param, grad), moments) in params.zip(grads).zip(moments) {
            backend.adamw(param, grad, (&mut moments.exp_avg, &mut moments.exp_avg_sq), &numbers);
            backend.clear(grad);
        }
        Ok(StepStats { grad_norm })
    }

    /// The loss without dropout; keeps no activations.
    ///
    /// # Errors
    /// As for [`Trainer::accumulate`].
    pub fn evaluate(&self, batch: &MicroBatch) -> Result<LossSum> {
        self.model.evaluate(batch)
    }

    /// The model with the adapter as it is now.
    pub fn model(&self) -> &Model<B> {
        &self.model
    }

    /// The number of trained parameters.
    pub fn trainable_parameters(&self) -> usize {
        let backend = &self.model.backend;
        gradients(&self.grads).map(|grad| backend.shape(grad).into_iter().product::<usize>()).sum()
    }

    /// The adapter under PEFT's names.
    pub fn adapter(&self) -> Vec<NamedTensor> {
        self.named().map(|(name, param)| self.download(name, param)).collect()
    }

    /// The accumulated gradients under PEFT's names.
    pub fn gradients(&self) -> Vec<NamedTensor> {
        let named = self.named().zip(gradients(&self.grads));
        named.map(|((name, _), grad)| self.download(name, grad)).collect()
    }

    /// What [`Trainer::restore`] needs. Take it between optimizer steps: accumulated gradients are not part of it.
    pub fn state(&self) -> TrainState {
        let tensors = self.named().zip(&self.moments).flat_map(|((name, param), moments)| {
            [
                self.download(format!("{name}.exp_avg"), &moments.exp_avg),
                self.download(format!("{name}.exp_avg_sq"), &moments.exp_avg_sq),
                self.download(name, param),
            ]
        });
        TrainState { tensors: tensors.collect(), step: self.step, micro_step: self.micro_step }
    }

    /// Goes back to a state of a trainer with the same model and options.
    ///
    /// # Errors
    /// A tensor is missing or has another shape: nothing is changed.
    pub fn restore(&mut self, state: &TrainState) -> Result<()> {
        let saved: HashMap<&str, &NamedTensor> =
            state.tensors.iter().map(|tensor| (tensor.name.as_str(), tensor)).collect();
        let backend = &self.model.backend;
        let upload = |name: &str, like: &B::Tensor| {
            let [rows, cols] = backend.shape(like);
            let tensor = saved
                .get(name)
                .ok_or_else(|| Error::State(format!("{name} is missing; was it saved with other target_modules?")))?;
            if tensor.shape != [rows, cols] || tensor.data.len() != rows * cols {
                return Err(Error::State(format!(
                    "{name} has shape {:?}, this adapter's is {:?}; was it saved with another rank or model?",
                    tensor.shape,
                    [rows, cols]
                )));
            }
            Ok(backend.upload(&tensor.data, rows, cols))
        };
        let mut params = Vec::new();
        let mut moments = Vec::new();
        for (name, param) in self.named() {
            params.push(upload(&name, param)?);
            moments.push(Moments {
                exp_avg: upload(&format!("{name}.exp_avg"), param)?,
                exp_avg_sq: upload(&format!("{name}.exp_avg_sq"), param)?,
            });
        }
        let layers = self.model.adapter.iter_mut().flatten().flatten().flatten();
        for (param, saved) in layers.flat_map(|layer| [&mut layer.a, &mut layer.b]).zip(params) {
            *param = saved;
        }
        self.moments = moments;
        let pairs = self.grads.iter_mut().flatten().flatten();
        pairs.flat_map(|pair| [&mut pair.a, &mut pair.b]).for_each(|grad| self.model.backend.clear(grad));
        (self.step, self.micro_step) = (state.step, state.micro_step);
        Ok(())
    }

    fn named(&self) -> impl Iterator<Item = (String, &B::Tensor)> {
        self.model.adapter.iter().flat_map(parameters)
    }

    fn download(&self, name: String, x: &B::Tensor) -> NamedTensor {
        let backend = &self.model.backend;
        NamedTensor { name, shape: backend.shape(x).to_vec(), data: backend.download(x) }
    }
}

/// An adapter's weights under PEFT's names, in the model's order.
fn parameters<T>(adapter: &Adapter<T>) -> impl Iterator<Item = (String, &T)> {
    adapter.iter().enumerate().flat_map(|(block, layers)| {
        Projection::ALL.into_iter().zip(layers).flat_map(move |(which, layer)| {
            let name = move |part| peft_name(block, which, part);
            layer.iter().flat_map(move |layer| [(name("lora_A"), &layer.a), (name("lora_B"), &layer.b)])
        })
    })
}

/// Gradients in the order of [`parameters`].
fn gradients<T>(grads: &[BlockGrads<T>]) -> impl Iterator<Item = &T> {
    grads.iter().flatten().flatten().flat_map(|pair| [&pair.a, &pair.b])
}

/// The loss of the trained positions and, with a `loss_scale`, its gradient by x, the residual stream after the last
/// block. Positions that are not trained never meet the output layer.
fn output_layer<B: Backend>(
    model: &Model<B>,
    x: B::Tensor,
    batch: &MicroBatch,
    trained: &[u32],
    loss_scale: Option<f32>,
) -> (LossSum, Option<B::Tensor>) {
    let Model { backend, norm, config, .. } = model;
    let eps = config.rms_norm_eps;
    let targets: Vec<u32> = trained.iter().map(|&i| batch.targets[i as usize]).collect();
    let x = backend.gather_rows(&x, trained);
    let normed = backend.rms_norm(&x, norm, eps);
    let weight = model.output_weight();
    let (losses, d_normed) = backend.linear_cross_entropy(&normed, weight, &targets, loss_scale);
    let dx = d_normed.map(|d_normed| {
        let mut dx = backend.zeros(trained.len(), config.hidden_size);
        backend.rms_norm_backward(&x, norm, eps, &d_normed, &mut dx);
        backend.scatter_rows(&dx, trained, batch.tokens.len())
    });
    let sum = losses.iter().map(|&loss| f64::from(loss)).sum();
    (LossSum { sum, tokens: trained.len() }, dx)
}

impl<B: Backend> Model<B> {
    /// The loss of a batch, without dropout; keeps no activations.
    ///
    /// # Errors
    /// The batch is inconsistent, or has tokens outside the vocabulary.
    pub fn evaluate(&self, batch: &MicroBatch) -> Result<LossSum> {
        let trained = self.check_batch(batch)?;
        if trained.is_empty() {
            return Ok(LossSum::default());
        }
        let rows = self.backend.rows(&batch.row_lengths, 0, &self.rope_frequencies);
        let x = self.hidden(&batch.tokens, &rows);
        Ok(output_layer(self, x, batch, &trained, None).0)
    }

    /// Checks a batch and returns the positions that are trained.
    fn check_batch(&self, batch: &MicroBatch) -> Result<Vec<u32>> {
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
        Ok((0..tokens.len() as u32).filter(|&i| targets[i as usize] != IGNORE).collect())
    }
}
