//! Training: micro-batches in, gradients accumulated, optimizer steps out.

mod loss;
mod state;

use serde::{Deserialize, Serialize};

use crate::backend::{Backend, Precision};
use crate::batch::MicroBatch;
use crate::block::{DropoutSource, Kept, Pass};
use crate::cpu::Cpu;
use crate::error::{Error, Result};
use crate::lora::LoraOptions;
use crate::model::{Model, Recompute};
use crate::optim::{Optimizer, OptimizerState, clip_factor};
use crate::param::Param;
use crate::peft::saved_name;
use crate::random;
use crate::shared::Packed;
use crate::tensors::{LazyTensor, NamedTensor};
pub use loss::LossSum;
use loss::output_layer;
pub use state::{StateSource, TrainState};

/// What an optimizer step saw.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepStats {
    /// Global norm of the gradients, before clipping.
    pub grad_norm: f64,
}

/// What is trained.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Tuning {
    /// Every weight; the optimizer keeps them in f32 in any precision.
    Full,
    /// A LoRA adapter.
    Lora(LoraOptions),
}

/// How a trainer trains.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainerOptions {
    /// What is trained.
    pub tuning: Tuning,
    /// What linear layers multiply.
    pub precision: Precision,
    /// How gradients become steps.
    pub optimizer: Optimizer,
    /// Which activations are computed again.
    pub recompute: Recompute,
    /// Uniform noise on the embeddings of a row of n tokens, within ± alpha / √(n · hidden) (NEFTune; Jain et al., 2023).
    pub neftune_noise_alpha: Option<f64>,
    /// Seed of dropout and noise.
    pub seed: u64,
}

impl TrainerOptions {
    /// f32, AdamW as torch sets it, nothing computed again, no noise, seed 0.
    pub fn new(tuning: Tuning) -> Self {
        TrainerOptions {
            tuning,
            precision: Precision::F32,
            optimizer: Optimizer::default(),
            recompute: Recompute::None,
            neftune_noise_alpha: None,
            seed: 0,
        }
    }
}

impl From<LoraOptions> for TrainerOptions {
    /// [`TrainerOptions::new`] with the adapter's seed.
    fn from(lora: LoraOptions) -> Self {
        let seed = lora.seed;
        TrainerOptions { seed, ..Self::new(Tuning::Lora(lora)) }
    }
}

/// A model that is trained, and the optimizer's state.
pub struct Trainer<B: Backend = Cpu> {
    model: Model<B>,
    recompute: Recompute,
    optimizer: Optimizer,
    dropout: f32,
    neftune_noise_alpha: Option<f64>,
    seed: u64,
    /// Whether the trained tensors have PEFT's names.
    is_adapter: bool,
    /// In the order of the trained parameters.
    states: Vec<OptimizerState<B>>,
    step: u64,
    micro_step: u64,
}

/// What the forward pass leaves of one block.
enum Activations<B: Backend> {
    Kept(Kept<B>),
    Input(B::Tensor),
}

/// Tells the keys of a micro-batch's noise from those of its blocks' dropout.
const NOISE: u64 = u64::MAX;

impl<B: Backend> Trainer<B> {
    /// Makes trainable what is to be trained; an adapter is fresh, and in place of any other.
    ///
    /// # Errors
    /// The options are out of range or select no layer.
    pub fn new(mut model: Model<B>, options: &TrainerOptions) -> Result<Self> {
        model.backend.set_precision(options.precision);
        let dropout = match &options.tuning {
            Tuning::Full => {
                model.train_all();
                0.0
            }
            Tuning::Lora(lora) => {
                lora.apply(&mut model)?;
                model.round_frozen();
                model.refresh();
                lora.dropout as f32
            }
        };
        let state = |(_, param): &(String, &Param<B::Tensor>)| {
            param.is_trained().then(|| options.optimizer.state(&model.backend, param))
        };
        let states = model.parameters().iter().filter_map(state).collect();
        Ok(Trainer {
            model,
            recompute: options.recompute,
            optimizer: options.optimizer,
            dropout,
            neftune_noise_alpha: options.neftune_noise_alpha,
            seed: options.seed,
            is_adapter: matches!(options.tuning, Tuning::Lora(_)),
            states,
            step: 0,
            micro_step: 0,
        })
    }

    /// Forward and backward; the gradients of `loss_scale · Σ loss` are added to those of earlier calls.
    ///
    /// # Errors
    /// The batch is inconsistent, or has tokens outside the vocabulary.
    pub fn accumulate(&mut self, batch: &MicroBatch, loss_scale: f32) -> Result<LossSum> {
        self.model.check_batch(batch)?;
        B::run(|| Ok(self.accumulate_gradients(batch, loss_scale)))
    }

    fn accumulate_gradients(&mut self, batch: &MicroBatch, loss_scale: f32) -> LossSum {
        let key = random::key(self.seed, &[self.micro_step]);
        self.micro_step += 1;
        // Noise and dropout differ between rows, also where these begin alike.
        let may_share = self.dropout == 0.0 && self.neftune_noise_alpha.is_none();
        let batch = &self.model.pack(batch, may_share);
        if batch.trained.is_empty() {
            return LossSum::default();
        }
        let rows = self.model.backend.rows(&batch.rows, 0, &self.model.config.ropes);
        let trains_embedding = self.model.embedding.param().is_some();
        // Blocks below the first that learns keep no activations and see no gradient.
        let first = match trains_embedding {
            true => 0,
            false => self.model.blocks.iter().position(|block| block.is_trained()).unwrap_or(self.model.blocks.len()),
        };
        let (x, activations) = self.forward(batch, &rows, first, key);
        let (loss, mut dx) = output_layer(&mut self.model, x, batch, loss_scale);

        let p = self.dropout;
        let Model { backend, config, embedding, blocks, .. } = &mut self.model;
        let blocks = blocks.iter_mut().enumerate().skip(first);
        for ((layer, block), activations) in blocks.zip(activations).rev() {
            let pass = Pass { backend, config, layer, rows: &rows, dropout: dropout(p, key, layer) };
            let kept = match activations {
                Activations::Kept(kept) => kept,
                Activations::Input(x) => block.recompute(&pass, x),
            };
            let want_dx = layer > first || trains_embedding || block.trains_first_norm();
            dx = block.backward(&pass, kept, dx.take().expect("only the first block returns none"), want_dx);
        }
        if let (Some(dx), Some(grad)) = (dx, embedding.grad_mut()) {
            backend.embedding_backward(&dx, &batch.tokens, config.embedding_scale, config.pad_token_id, grad);
        }
        loss
    }

    /// The residual stream after the last block, and what the backward pass needs of the blocks from `first` on.
    fn forward(&self, batch: &Packed, rows: &B::Rows, first: usize, key: u64) -> (B::Tensor, Vec<Activations<B>>) {
        let model = &self.model;
        let mut x = model.embed(&batch.tokens);
        if let Some(alpha) = self.neftune_noise_alpha {
            model.backend.neftune(&mut x, rows, alpha as f32, random::key(key, &[NOISE]));
        }
        let mut activations = Vec::with_capacity(model.blocks.len() - first);
        for (layer, block) in model.blocks.iter().enumerate() {
            let pass = Pass { dropout: dropout(self.dropout, key, layer), ..model.pass(layer, rows) };
            let (y, kept) = block.forward(&pass, x);
            if layer >= first {
                activations.push(match self.recompute {
                    Recompute::None => Activations::Kept(kept),
                    Recompute::Full => Activations::Input(kept.into_input()),
                });
            }
            x = y;
        }
        (x, activations)
    }

    /// Clips, takes an optimizer step, and zeroes the gradients.
    ///
    /// # Errors
    /// A gradient is NaN or infinite: nothing is changed.
    pub fn step(&mut self, lr: f64, max_grad_norm: Option<f64>) -> Result<StepStats> {
        B::run(|| self.update(lr, max_grad_norm))
    }

    fn update(&mut self, lr: f64, max_grad_norm: Option<f64>) -> Result<StepStats> {
        let Trainer { model, states, optimizer, step, .. } = self;
        let (backend, params) = model.parameters_mut();
        let grads = params.iter().filter_map(|param| param.grad.as_ref());
        let grad_norm = grads.map(|grad| backend.sum_of_squares(grad)).sum::<f64>().sqrt();
        if !grad_norm.is_finite() {
            return Err(Error::NonFinite { step: *step + 1, grad_norm });
        }
        *step += 1;
        let scale = clip_factor(grad_norm, max_grad_norm);
        let trained = params.into_iter().filter(|param| param.is_trained());
        for (param, state) in trained.zip(states) {
            optimizer.update(backend, param, state, *step, lr, scale);
        }
        model.refresh();
        Ok(StepStats { grad_norm })
    }

    /// The loss without dropout; keeps no activations.
    ///
    /// # Errors
    /// As for [`Trainer::accumulate`].
    pub fn evaluate(&self, batch: &MicroBatch) -> Result<LossSum> {
        self.model.evaluate(batch)
    }

    /// The model as it is now.
    pub fn model(&self) -> &Model<B> {
        &self.model
    }

    /// The number of trained parameters.
    pub fn trainable_parameters(&self) -> usize {
        let size =
            |(_, param): (String, &Param<B::Tensor>)| self.model.backend.shape(&param.value).iter().product::<usize>();
        self.trained().map(size).sum()
    }

    /// What is trained, under the names of the published file: PEFT's for an adapter, else the model's.
    pub fn weights(&self) -> Vec<NamedTensor> {
        self.weight_tensors().into_iter().map(LazyTensor::read).collect()
    }

    /// The tensors of [`Trainer::weights`].
    pub fn weight_tensors(&self) -> Vec<LazyTensor<'_>> {
        self.trained().map(|(name, param)| self.lazy(name, &param.value)).collect()
    }

    /// The accumulated gradients, under the names of [`Trainer::weights`].
    pub fn gradients(&self) -> Vec<NamedTensor> {
        self.trained().filter_map(|(name, param)| Some(self.lazy(name, param.grad.as_ref()?).read())).collect()
    }

    /// Zeroes the gradients: forgets what was accumulated since the last step.
    pub fn clear_gradients(&mut self) {
        let (backend, params) = self.model.parameters_mut();
        params.into_iter().filter_map(|param| param.grad.as_mut()).for_each(|grad| backend.clear(grad));
    }

    fn trained(&self) -> impl Iterator<Item = (String, &Param<B::Tensor>)> {
        let adapted = self.model.adapted_modules();
        let is_adapter = self.is_adapter;
        let trained = self.model.parameters().into_iter().filter(|(_, param)| param.is_trained());
        trained.map(move |(name, param)| match is_adapter {
            true => (saved_name(&name, &adapted), param),
            false => (name, param),
        })
    }

    fn lazy<'a>(&'a self, name: String, x: &'a B::Tensor) -> LazyTensor<'a> {
        let backend = &self.model.backend;
        let [rows, cols] = backend.shape(x);
        LazyTensor::new(name, shape(rows, cols), || backend.download(x))
    }
}

/// The masks of one block in one micro-batch.
fn dropout(p: f32, key: u64, layer: usize) -> Option<DropoutSource> {
    (p > 0.0).then(|| DropoutSource { p, key: random::key(key, &[layer as u64]) })
}

/// A tensor's shape in files: a single row is a vector.
fn shape(rows: usize, cols: usize) -> Vec<usize> {
    if rows == 1 { vec![cols] } else { vec![rows, cols] }
}
