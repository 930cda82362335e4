//! A decoder language model: embedding, blocks, final norm, output layer.

use std::collections::HashSet;
use std::path::Path;

use crate::backend::{Backend, RmsNorm, Row};
use crate::block::{Block, Norm, Pass};
use crate::config::ModelConfig;
use crate::cpu::Cpu;
use crate::error::{Error, Result};
use crate::linear::Linear;
use crate::param::{Group, Param, Weight};
use crate::peft;
use crate::projection::Projection;
use crate::quantize::Quantization;
use crate::random;
use crate::weights::{Checkpoint, HostTensor, Linear as LinearWeight};
use crate::whole_modules::{WholeModule, whole_modules};

/// A tensor with a name, in row-major f32.
#[derive(Debug, Clone, PartialEq)]
pub struct NamedTensor {
    /// As the checkpoint writes it.
    pub name: String,
    /// Row-major.
    pub shape: Vec<usize>,
    /// The values.
    pub data: Vec<f32>,
}

/// A tensor of a trainer that is read when it is wanted: all of them at once would take as much memory again.
pub struct LazyTensor<'a> {
    /// As the file names it.
    pub name: String,
    /// Row-major.
    pub shape: Vec<usize>,
    /// Whether its values are codes: whole numbers from 0 to 255, for which 8 bits are enough.
    pub is_codes: bool,
    values: Box<dyn Fn() -> Vec<f32> + 'a>,
}

impl<'a> LazyTensor<'a> {
    pub(crate) fn new(name: String, shape: Vec<usize>, values: impl Fn() -> Vec<f32> + 'a) -> Self {
        LazyTensor { name, shape, is_codes: false, values: Box::new(values) }
    }

    /// The values, row-major.
    pub fn values(&self) -> Vec<f32> {
        (self.values)()
    }

    /// The tensor with its values.
    pub fn read(self) -> NamedTensor {
        NamedTensor { data: self.values(), name: self.name, shape: self.shape }
    }
}

impl<'a> From<&'a NamedTensor> for LazyTensor<'a> {
    fn from(tensor: &'a NamedTensor) -> Self {
        Self::new(tensor.name.clone(), tensor.shape.clone(), || tensor.data.clone())
    }
}

/// Which activations of a block are computed again in the backward pass instead of kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Recompute {
    /// None: fastest.
    None,
    /// All but each block's input: leanest (`gradientCheckpointing`).
    Full,
}

/// A decoder, and perhaps an adapter on it.
pub struct Model<B: Backend = Cpu> {
    pub(crate) backend: B,
    pub(crate) config: ModelConfig,
    pub(crate) embedding: Weight<B>,
    pub(crate) blocks: Vec<Block<B>>,
    pub(crate) norm: Param<B::Tensor>,
    /// The output layer, unless it is the embedding.
    pub(crate) lm_head: Option<Weight<B>>,
}

/// Names of the modules that are no part of a block.
pub(crate) const EMBEDDING: &str = "model.embed_tokens";
pub(crate) const FINAL_NORM: &str = "model.norm";
pub(crate) const LM_HEAD: &str = "lm_head";

impl Model<Cpu> {
    /// Loads a Hugging Face folder: `config.json` and `model.safetensors`, whole or in shards, in f32, f16 or bf16.
    ///
    /// # Errors
    /// A file is missing or damaged, a tensor is missing or of another shape, or the configuration is not supported.
    pub fn load(dir: &Path) -> Result<Self> {
        Self::load_as(dir, None)
    }

    /// Loads a folder and quantizes the linear layers of its blocks, one after the other. Embedding, norms and output
    /// layer stay as they are. Where bitsandbytes did so before, its codes are taken as they are.
    ///
    /// # Errors
    /// As for [`Model::load`], or the checkpoint is quantized in another way.
    pub fn load_quantized(dir: &Path, quantization: Quantization) -> Result<Self> {
        Self::load_as(dir, Some(quantization))
    }

    /// Rounds the inputs of linear layers whose weights are in 8 bits to 8 bits as well, but for the columns in which a
    /// magnitude reaches the threshold: LLM.int8(), as bitsandbytes computes on a GPU. With none, inputs stay as they are,
    /// which is how bitsandbytes trains on a CPU.
    pub fn set_outlier_threshold(&mut self, threshold: Option<f32>) {
        self.backend.set_outlier_threshold(threshold);
    }

    fn load_as(dir: &Path, quantization: Option<Quantization>) -> Result<Self> {
        let mut config = ModelConfig::load(dir)?;
        if let (Some(asked), Some(stored)) = (quantization, config.stored_as)
            && !asked.is_like(stored)
        {
            let (asked, stored) = (asked.name(), stored.name());
            let message = format!("quantization_config: the weights are stored as {stored}, and {asked} is asked for");
            return Err(Error::config(&dir.join("config.json"), message));
        }
        let mut checkpoint = Checkpoint::open(dir)?;
        config.untie_if_stored_apart(&checkpoint);
        checkpoint.check(&config)?;
        let model = Self::build(Cpu::default(), config, quantization, &mut checkpoint)?;
        if quantization.is_some() {
            checkpoint.release();
        }
        Ok(model)
    }

    /// A model with random weights, for tests and measurements.
    pub fn random(config: ModelConfig, seed: u64) -> Self {
        let source = &mut RandomSource { seed, tensors: 0 };
        Self::build(Cpu::default(), config, None, source).expect("every tensor is given")
    }
}

/// Where a model's weights come from, by name and shape.
trait Source {
    fn tensor(&mut self, name: &str, shape: &[usize]) -> Result<HostTensor>;

    fn linear(&mut self, name: &str, shape: [usize; 2]) -> Result<LinearWeight> {
        Ok(LinearWeight::Float(self.tensor(name, &shape)?))
    }
}

impl Source for Checkpoint {
    fn tensor(&mut self, name: &str, shape: &[usize]) -> Result<HostTensor> {
        Checkpoint::tensor(self, name, shape)
    }

    fn linear(&mut self, name: &str, shape: [usize; 2]) -> Result<LinearWeight> {
        Checkpoint::linear(self, name, shape)
    }
}

struct RandomSource {
    seed: u64,
    tensors: u64,
}

impl Source for RandomSource {
    fn tensor(&mut self, _: &str, shape: &[usize]) -> Result<HostTensor> {
        self.tensors += 1;
        let key = random::key(self.seed, &[self.tensors]);
        let values = match shape {
            [n] => random::uniform(*n, 0.1, key).into_iter().map(|x| 1.0 + x).collect(),
            _ => random::uniform(shape.iter().product(), (3.0 / shape[1] as f32).sqrt(), key),
        };
        Ok(HostTensor::new(values, shape.to_vec()))
    }
}

impl<B: Backend> Model<B> {
    /// Takes each tensor that `config` asks for.
    fn build(
        backend: B,
        config: ModelConfig,
        quantization: Option<Quantization>,
        source: &mut impl Source,
    ) -> Result<Self> {
        let table = [config.vocab_size, config.hidden_size];
        let embedding = backend.weight(source.tensor(&format!("{EMBEDDING}.weight"), &table)?);
        let vector = |tensor: Result<HostTensor>, len: usize| {
            Ok(Param::frozen(backend.upload(&tensor?.to_f32(), 1, len), Group::Vector))
        };
        let mut blocks = Vec::with_capacity(config.num_hidden_layers);
        for i in 0..config.num_hidden_layers {
            let name = |part: &str| format!("model.layers.{i}.{part}");
            let mut block = Block { norms: Default::default(), projections: Default::default() };
            for which in Projection::of(&config) {
                let [output, input] = which.shape(&config);
                let weight = source.linear(&name(&format!("{}.weight", which.path())), [output, input])?;
                let bias = name(&format!("{}.bias", which.path()));
                let bias = which.has_bias(&config).then(|| source.tensor(&bias, &[output]));
                let weight = match (weight, quantization) {
                    (LinearWeight::Stored(weight), _) => backend.stored_weight(weight),
                    // What bitsandbytes left as it was stays so.
                    (LinearWeight::Float(weight), Some(quantization)) if config.stored_as.is_none() => {
                        backend.quantized_weight(weight, quantization)
                    }
                    (LinearWeight::Float(weight), _) => backend.weight(weight),
                };
                block.projections[which as usize] = Some(Linear {
                    weight: Weight::Frozen(weight),
                    bias: bias.map(|bias| vector(bias, output)).transpose()?,
                    adapter: None,
                });
            }
            for which in Norm::ALL {
                let Some(path) = which.path(&config) else { continue };
                let len = which.len(&config);
                let weight = source.tensor(&name(&format!("{path}.weight")), &[len]);
                block.norms[which as usize] = Some(vector(weight, len)?);
            }
            blocks.push(block);
        }
        let norm = vector(source.tensor(&format!("{FINAL_NORM}.weight"), &[config.hidden_size]), config.hidden_size)?;
        let lm_head = match config.tie_word_embeddings {
            true => None,
            false => Some(Weight::Frozen(backend.weight(source.tensor(&format!("{LM_HEAD}.weight"), &table)?))),
        };
        Ok(Model { norm, backend, config, embedding: Weight::Frozen(embedding), blocks, lm_head })
    }

    /// The model's shape.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Puts the adapter of a PEFT folder on the model, in place of any other.
    ///
    /// # Errors
    /// The folder is damaged, or was made for another model.
    pub fn load_adapter(&mut self, dir: &Path) -> Result<()> {
        peft::load(dir, self)
    }

    /// Rounds frozen matrices to what products multiply.
    pub(crate) fn round_frozen(&mut self) {
        let Model { backend, embedding, blocks, lm_head, .. } = self;
        let linears = blocks.iter_mut().flat_map(|block| block.projections.iter_mut().flatten());
        let weights = linears.map(|linear| &mut linear.weight).chain([embedding]).chain(lm_head.as_mut());
        weights.filter_map(Weight::frozen_mut).for_each(|weight| backend.round_weight(weight));
    }

    /// Makes every weight trainable.
    pub(crate) fn train_all(&mut self) {
        let Model { backend, embedding, blocks, norm, lm_head, .. } = self;
        let train = |weight: &mut Weight<B>, group| {
            if let Weight::Frozen(frozen) = weight {
                *weight = Weight::trained(backend, backend.weight_values(frozen), group);
            }
        };
        let linears = |block: &mut Block<B>| {
            for linear in block.projections.iter_mut().flatten() {
                train(&mut linear.weight, Group::Matrix);
                linear.bias.iter_mut().for_each(|bias| bias.train(backend));
            }
            block.norms.iter_mut().flatten().for_each(|norm| norm.train(backend));
        };
        train(embedding, Group::Embedding);
        blocks.iter_mut().for_each(linears);
        norm.train(backend);
        lm_head.iter_mut().for_each(|weight| train(weight, Group::Matrix));
    }

    /// Makes these modules trainable. A tied output layer becomes one of its own, as in PEFT.
    pub(crate) fn train_modules(&mut self, names: &[String]) -> Result<()> {
        let Model { backend, config, embedding, blocks, norm, lm_head } = self;
        let own = |weight: &Weight<B>, group| match weight {
            Weight::Frozen(frozen) => Some(Weight::trained(backend, backend.weight_values(frozen), group)),
            Weight::Trained { .. } => None,
        };
        for (_, module) in whole_modules(config, names)? {
            match module {
                WholeModule::Output => {
                    let trained = own(lm_head.as_ref().unwrap_or(embedding), Group::Matrix);
                    *lm_head = trained.or(lm_head.take());
                }
                WholeModule::Embedding => {
                    if let Some(trained) = own(embedding, Group::Embedding) {
                        *embedding = trained;
                    }
                }
                WholeModule::FinalNorm => norm.train(backend),
                WholeModule::BlockNorm(block, which) => {
                    blocks[block].norms[which as usize].iter_mut().for_each(|norm| norm.train(backend));
                }
            }
        }
        Ok(())
    }

    /// All tensors that can be trained, under the base model's names; those of adapters under PEFT's, without prefix.
    pub(crate) fn parameters(&self) -> Vec<(String, &Param<B::Tensor>)> {
        let mut out = Vec::new();
        out.extend(self.embedding.param().map(|param| (format!("{EMBEDDING}.weight"), param)));
        for (i, block) in self.blocks.iter().enumerate() {
            for which in Norm::ALL {
                let path = which.path(&self.config).unwrap_or_default();
                let norm = block.norms[which as usize].as_ref();
                out.extend(norm.map(|norm| (format!("model.layers.{i}.{path}.weight"), norm)));
            }
            for which in Projection::ALL {
                let Some(linear) = &block.projections[which as usize] else { continue };
                let name = |part: &str| format!("{}.{part}", which.name(i));
                out.extend(linear.weight.param().map(|param| (name("weight"), param)));
                out.extend(linear.bias.as_ref().map(|bias| (name("bias"), bias)));
                let Some(adapter) = &linear.adapter else { continue };
                out.extend([(name("lora_A.weight"), &adapter.a), (name("lora_B.weight"), &adapter.b)]);
                let magnitude = adapter.dora.as_ref().map(|dora| &dora.magnitude);
                out.extend(magnitude.map(|param| (name("lora_magnitude_vector"), param)));
            }
        }
        out.push((format!("{FINAL_NORM}.weight"), &self.norm));
        let lm_head = self.lm_head.as_ref().and_then(Weight::param);
        out.extend(lm_head.map(|param| (format!("{LM_HEAD}.weight"), param)));
        out
    }

    /// The names of the linear layers that have an adapter.
    pub(crate) fn adapted_modules(&self) -> HashSet<String> {
        let blocks = self.blocks.iter().enumerate();
        blocks
            .flat_map(|(i, block)| {
                let adapted = move |which: &Projection| {
                    block.projections[*which as usize].as_ref().is_some_and(|linear| linear.adapter.is_some())
                };
                Projection::ALL.into_iter().filter(adapted).map(move |which| which.name(i))
            })
            .collect()
    }

    /// The tensors of [`Model::parameters`], in the same order.
    pub(crate) fn parameters_mut(&mut self) -> (&B, Vec<&mut Param<B::Tensor>>) {
        let mut out = Vec::new();
        out.extend(self.embedding.param_mut());
        for block in &mut self.blocks {
            out.extend(block.norms.iter_mut().flatten());
            for linear in block.projections.iter_mut().flatten() {
                out.extend(linear.weight.param_mut());
                out.extend(linear.bias.as_mut());
                let Some(adapter) = &mut linear.adapter else { continue };
                out.extend([&mut adapter.a, &mut adapter.b]);
                out.extend(adapter.dora.as_mut().map(|dora| &mut dora.magnitude));
            }
        }
        out.push(&mut self.norm);
        out.extend(self.lm_head.as_mut().and_then(Weight::param_mut));
        (&self.backend, out)
    }

    /// Gives the parameter of this name these values; it exists and is as large. [`Model::refresh`] is due afterwards.
    pub(crate) fn set(&mut self, name: &str, values: &[f32]) {
        let index = self.parameters().iter().position(|(known, _)| known == name);
        let (backend, params) = self.parameters_mut();
        if let Some(param) = index.and_then(|index| params.into_iter().nth(index)) {
            let [rows, cols] = backend.shape(&param.value);
            param.value = backend.upload(values, rows, cols);
        }
    }

    /// Computes anew what follows from weights that were changed.
    pub(crate) fn refresh(&mut self) {
        let Model { backend, embedding, blocks, lm_head, .. } = self;
        embedding.refresh(backend);
        let linears = blocks.iter_mut().flat_map(|block| block.projections.iter_mut().flatten());
        linears.for_each(|linear| linear.refresh(backend));
        lm_head.iter_mut().for_each(|weight| weight.refresh(backend));
    }

    /// Logits of every position of one row, [tokens, vocab_size] row-major.
    ///
    /// # Errors
    /// A token is outside the vocabulary.
    pub fn logits(&self, tokens: &[u32]) -> Result<Vec<f32>> {
        self.check_tokens(tokens)?;
        Ok(B::run(|| {
            let rows = self.backend.rows(&[Row::new(tokens.len())], 0, &self.config.ropes);
            let x = self.hidden(tokens, &rows);
            self.backend.download(&self.output(&x))
        }))
    }

    /// The residual stream after the last block, without dropout; keeps no activations.
    pub(crate) fn hidden(&self, tokens: &[u32], rows: &B::Rows) -> B::Tensor {
        let mut x = self.embed(tokens);
        for (i, block) in self.blocks.iter().enumerate() {
            x = block.forward(&self.pass(i, rows), x).0;
        }
        x
    }

    /// Rows of the embedding.
    pub(crate) fn embed(&self, tokens: &[u32]) -> B::Tensor {
        self.backend.embedding(self.embedding.get(), tokens, self.config.embedding_scale)
    }

    /// Logits from the residual stream.
    pub(crate) fn output(&self, x: &B::Tensor) -> B::Tensor {
        let normed = self.backend.rms_norm(x, &self.norm.value, rms_norm(&self.config));
        let mut logits = self.backend.linear(&normed, self.output_weight().get());
        if let Some(cap) = self.config.final_softcap {
            self.backend.softcap(&mut logits, cap);
        }
        logits
    }

    pub(crate) fn output_weight(&self) -> &Weight<B> {
        self.lm_head.as_ref().unwrap_or(&self.embedding)
    }

    /// A pass through block `layer` without dropout.
    pub(crate) fn pass<'a>(&'a self, layer: usize, rows: &'a B::Rows) -> Pass<'a, B> {
        Pass { backend: &self.backend, config: &self.config, layer, rows, dropout: None }
    }

    pub(crate) fn check_tokens(&self, tokens: &[u32]) -> Result<()> {
        let vocabulary = self.config.vocab_size;
        if tokens.is_empty() {
            return Err(Error::Batch("there are no tokens".into()));
        }
        match tokens.iter().position(|&token| token as usize >= vocabulary) {
            None => Ok(()),
            Some(i) => Err(Error::Batch(format!(
                "token {} at position {i} is outside the vocabulary of {vocabulary}; is this the model's tokenizer?",
                tokens[i]
            ))),
        }
    }
}

/// What the model's norms add.
pub(crate) fn rms_norm(config: &ModelConfig) -> RmsNorm {
    RmsNorm { eps: config.rms_norm_eps, offset: config.norm_offset }
}

impl ModelConfig {
    /// Reads `dir/config.json`, and looks into the folder's weights whether the output layer is the embedding: where
    /// both are stored and differ, `tie_word_embeddings` counts for nothing, as in transformers 5.
    ///
    /// # Errors
    /// As for [`ModelConfig::load`], or the weights can't be read.
    pub fn of_folder(dir: &Path) -> Result<Self> {
        let mut config = Self::load(dir)?;
        if config.tie_word_embeddings {
            config.untie_if_stored_apart(&Checkpoint::open(dir)?);
        }
        Ok(config)
    }

    fn untie_if_stored_apart(&mut self, checkpoint: &Checkpoint) {
        let is_apart = || checkpoint.differ(&format!("{EMBEDDING}.weight"), &format!("{LM_HEAD}.weight"));
        self.tie_word_embeddings = self.tie_word_embeddings && !is_apart();
    }

    /// Name and shape of every tensor that a checkpoint of this model holds.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let table = vec![self.vocab_size, self.hidden_size];
        let mut out = vec![(format!("{EMBEDDING}.weight"), table.clone())];
        for block in 0..self.num_hidden_layers {
            for which in Norm::ALL {
                let name = which.path(self).map(|path| format!("model.layers.{block}.{path}.weight"));
                out.extend(name.map(|name| (name, vec![which.len(self)])));
            }
            for which in Projection::of(self) {
                let [output, input] = which.shape(self);
                out.push((format!("{}.weight", which.name(block)), vec![output, input]));
                if which.has_bias(self) {
                    out.push((format!("{}.bias", which.name(block)), vec![output]));
                }
            }
        }
        out.push((format!("{FINAL_NORM}.weight"), vec![self.hidden_size]));
        if !self.tie_word_embeddings {
            out.push((format!("{LM_HEAD}.weight"), table));
        }
        out
    }
}
