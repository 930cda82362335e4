//! Training: micro-batches in, gradients accumulated, optimizer steps out.

use serde::{Deserialize, Serialize};

use crate::backend::{Backend, CrossEntropyGrads, Precision};
use crate::block::{DropoutSource, Kept, Pass};
use crate::config::Rope;
use crate::cpu::Cpu;
use crate::error::{Error, Result};
use crate::lora::LoraOptions;
use crate::model::{LazyTensor, Model, NamedTensor, Recompute, rms_norm};
use crate::optim::{Optimizer, OptimizerState, Part, clip_factor};
use crate::param::Param;
use crate::peft::saved_name;
use crate::random;
use crate::shared::Packed;

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
    /// Per trained weight `NAME`: the weight itself, and the optimizer's state, such as `NAME.exp_avg`.
    pub tensors: Vec<NamedTensor>,
    /// Optimizer steps taken.
    pub step: u64,
    /// Micro-batches accumulated; decides the next dropout masks.
    pub micro_step: u64,
}

/// A state that a trainer goes back to, tensor by tensor.
pub trait StateSource {
    /// Why a tensor can't be read.
    type Error: From<Error>;
    /// A tensor's shape, if there is one of this name.
    fn shape(&self, name: &str) -> Option<&[usize]>;
    /// The values of a tensor that there is; of one that was saved as codes ([`LazyTensor::is_codes`]), these as numbers.
    ///
    /// # Errors
    /// It can't be read.
    fn values(&self, name: &str) -> std::result::Result<Vec<f32>, Self::Error>;
    /// Optimizer steps taken.
    fn step(&self) -> u64;
    /// Micro-batches accumulated.
    fn micro_step(&self) -> u64;
}

impl StateSource for TrainState {
    type Error = Error;

    fn shape(&self, name: &str) -> Option<&[usize]> {
        let tensor = self.tensors.iter().find(|tensor| tensor.name == name);
        tensor.filter(|tensor| tensor.data.len() == tensor.shape.iter().product::<usize>()).map(|t| t.shape.as_slice())
    }

    fn values(&self, name: &str) -> Result<Vec<f32>> {
        let tensor = self.tensors.iter().find(|tensor| tensor.name == name);
        tensor.map(|tensor| tensor.data.clone()).ok_or_else(|| Error::State(format!("{name} is missing")))
    }

    fn step(&self) -> u64 {
        self.step
    }

    fn micro_step(&self) -> u64 {
        self.micro_step
    }
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

    /// The tensors of [`Trainer::state`].
    pub fn state_tensors(&self) -> Vec<LazyTensor<'_>> {
        let tensors = self.trained().zip(&self.states).flat_map(|((name, param), state)| {
            let parts = state.parts(&self.model.backend).into_iter().map(|part| {
                let Part { name: part, shape: [rows, cols], values, is_codes } = part;
                let mut tensor = LazyTensor::new(format!("{name}.{part}"), shape(rows, cols), values);
                tensor.is_codes = is_codes;
                tensor
            });
            let parts: Vec<LazyTensor<'_>> = parts.collect();
            parts.into_iter().chain([self.lazy(name, &param.value)])
        });
        tensors.collect()
    }

    /// What [`Trainer::restore`] needs. Take it between optimizer steps: accumulated gradients are not part of it.
    pub fn state(&self) -> TrainState {
        let tensors = self.state_tensors().into_iter().map(LazyTensor::read).collect();
        TrainState { tensors, step: self.step, micro_step: self.micro_step }
    }

    /// Goes back to a state of a trainer with the same model and options.
    ///
    /// # Errors
    /// A tensor is missing or has another shape: nothing is changed. Or a tensor can't be read: the trainer is of no more
    /// use.
    pub fn restore<S: StateSource>(&mut self, state: &S) -> std::result::Result<(), S::Error> {
        for LazyTensor { name, shape, .. } in self.state_tensors() {
            let problem = match state.shape(&name) {
                None => format!("{name} is missing; was it saved with other options?"),
                Some(found) if found != shape => {
                    format!(
                        "{name} has shape {found:?}, this run's is {shape:?}; was it saved with another rank or model?"
                    )
                }
                Some(_) => continue,
            };
            return Err(Error::State(problem).into());
        }
        let names: Vec<String> = self.trained().map(|(name, _)| name).collect();
        let Trainer { model, states, .. } = self;
        let (backend, params) = model.parameters_mut();
        let params = params.into_iter().filter(|param| param.is_trained());
        for ((param, optimizer), name) in params.zip(states).zip(names) {
            let [rows, cols] = backend.shape(&param.value);
            param.value = backend.upload(&state.values(&name)?, rows, cols);
            optimizer.set(backend, |part| state.values(&format!("{name}.{part}")))?;
        }
        self.model.refresh();
        self.clear_gradients();
        (self.step, self.micro_step) = (state.step(), state.micro_step());
        Ok(())
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

/// The loss of the trained positions and its gradient by x, the residual stream after the last block; adds the
/// gradients of the output layer and the final norm, if they are trained. Positions that are not trained never meet the
/// output layer.
fn output_layer<B: Backend>(
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
    fn pack(&self, batch: &MicroBatch, may_share: bool) -> Packed {
        match may_share && !self.config.ropes.iter().any(Rope::depends_on_length) {
            true => Packed::sharing(batch),
            false => Packed::whole(batch),
        }
    }

    fn check_batch(&self, batch: &MicroBatch) -> Result<()> {
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
