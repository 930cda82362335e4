//! Builds a model: from the files of a folder, or with random weights.

use std::path::Path;

use super::Model;
use crate::backend::Backend;
use crate::block::{Block, Norm};
use crate::config::ModelConfig;
use crate::cpu::Cpu;
use crate::error::{Error, Result};
use crate::host_tensor::HostTensor;
use crate::linear::Linear;
use crate::names::{EMBEDDING, FINAL_NORM, LM_HEAD};
use crate::param::{Group, Param, Weight};
use crate::projection::Projection;
use crate::quantize::Quantization;
use crate::random;
use crate::weights::{Checkpoint, Linear as LinearWeight};

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
}
