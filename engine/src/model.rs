//! A decoder of the Llama family: embedding, blocks, final norm, output layer.

use std::path::Path;

use crate::backend::{Backend, Heads};
use crate::block::{Block, Pass};
use crate::config::ModelConfig;
use crate::cpu::Cpu;
use crate::error::{Error, Result};
use crate::lora::{self, Adapter};
use crate::projection::Projection;
use crate::random;
use crate::weights::{Checkpoint, HostTensor};

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

/// Which activations of a block are computed again in the backward pass instead of kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Recompute {
    /// None: fastest.
    None,
    /// All but each block's input: leanest (`gradientCheckpointing`).
    Full,
}

/// A decoder with frozen weights, and perhaps an adapter.
pub struct Model<B: Backend = Cpu> {
    pub(crate) backend: B,
    pub(crate) config: ModelConfig,
    pub(crate) rope_frequencies: Vec<f32>,
    embedding: B::Weight,
    pub(crate) blocks: Vec<Block<B>>,
    pub(crate) norm: B::Tensor,
    /// The output layer, unless it is the embedding.
    lm_head: Option<B::Weight>,
    pub(crate) adapter: Option<Adapter<B::Tensor>>,
}

impl Model<Cpu> {
    /// Loads a Hugging Face folder: `config.json` and `model.safetensors`, whole or in shards, in f32, f16 or bf16.
    ///
    /// # Errors
    /// A file is missing or damaged, a tensor is missing or of another shape, or the configuration is not supported.
    pub fn load(dir: &Path) -> Result<Self> {
        let config = ModelConfig::load(dir)?;
        let checkpoint = Checkpoint::open(dir)?;
        Self::build(Cpu::default(), config, |name, shape| checkpoint.tensor(name, shape))
    }

    /// A model with random weights, for tests and measurements.
    pub fn random(config: ModelConfig, seed: u64) -> Self {
        let mut tensors = 0;
        let random = |_: &str, shape: &[usize]| {
            tensors += 1;
            let key = random::key(seed, &[tensors]);
            let values = match shape {
                [n] => random::uniform(*n, 0.1, key).into_iter().map(|x| 1.0 + x).collect(),
                _ => random::uniform(shape.iter().product(), (3.0 / shape[1] as f32).sqrt(), key),
            };
            Ok(HostTensor::new(values, shape.to_vec()))
        };
        Self::build(Cpu::default(), config, random).expect("every tensor is given")
    }
}

impl<B: Backend> Model<B> {
    /// Takes each tensor that `config` asks for, by name and shape, from `tensor`.
    fn build(
        backend: B,
        config: ModelConfig,
        mut tensor: impl FnMut(&str, &[usize]) -> Result<HostTensor>,
    ) -> Result<Self> {
        let hidden = config.hidden_size;
        let table = [config.vocab_size, hidden];
        let embedding = backend.weight(tensor("model.embed_tokens.weight", &table)?);
        let norm = |tensor: Result<HostTensor>| Ok(backend.upload(&tensor?.to_f32(), 1, hidden));
        let mut blocks = Vec::with_capacity(config.num_hidden_layers);
        for i in 0..config.num_hidden_layers {
            let name = |part: &str| format!("model.layers.{i}.{part}.weight");
            let mut projections = Vec::with_capacity(Projection::ALL.len());
            for which in Projection::ALL {
                let weight = tensor(&name(which.path()), &which.shape(&config))?;
                projections.push(backend.weight(weight));
            }
            blocks.push(Block {
                input_norm: norm(tensor(&name("input_layernorm"), &[hidden]))?,
                post_attention_norm: norm(tensor(&name("post_attention_layernorm"), &[hidden]))?,
                projections: projections.try_into().unwrap_or_else(|_| unreachable!("seven")),
            });
        }
        let final_norm = norm(tensor("model.norm.weight", &[hidden]))?;
        let lm_head = match config.tie_word_embeddings {
            true => None,
            false => Some(backend.weight(tensor("lm_head.weight", &table)?)),
        };
        Ok(Model {
            rope_frequencies: config.rope_frequencies(),
            norm: final_norm,
            backend,
            config,
            embedding,
            blocks,
            lm_head,
            adapter: None,
        })
    }

    /// The model's shape.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Puts the adapter of a PEFT folder on the model, in place of any other.
    ///
    /// # Errors
    /// The folder is damaged, uses what the engine does not support, or was made for another model.
    pub fn load_adapter(&mut self, dir: &Path) -> Result<()> {
        self.adapter = Some(lora::load(dir, &self.backend, &self.config)?);
        Ok(())
    }

    /// Logits of every position of one row, [tokens, vocab_size] row-major.
    ///
    /// # Errors
    /// A token is outside the vocabulary.
    pub fn logits(&self, tokens: &[u32]) -> Result<Vec<f32>> {
        self.check_tokens(tokens)?;
        let rows = self.backend.rows(&[tokens.len()], 0, &self.rope_frequencies);
        let x = self.hidden(tokens, &rows);
        Ok(self.backend.download(&self.output(&x)))
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
        self.backend.embedding(&self.embedding, tokens)
    }

    /// Logits from the residual stream.
    pub(crate) fn output(&self, x: &B::Tensor) -> B::Tensor {
        let normed = self.backend.rms_norm(x, &self.norm, self.config.rms_norm_eps);
        self.backend.linear(&normed, self.output_weight())
    }

    pub(crate) fn output_weight(&self) -> &B::Weight {
        self.lm_head.as_ref().unwrap_or(&self.embedding)
    }

    /// A pass through block `i` without dropout.
    pub(crate) fn pass<'a>(&'a self, i: usize, rows: &'a B::Rows) -> Pass<'a, B> {
        Pass {
            backend: &self.backend,
            heads: self.heads(),
            eps: self.config.rms_norm_eps,
            rows,
            adapter: self.adapter.as_ref().map(|adapter| &adapter[i]),
            dropout: None,
        }
    }

    fn heads(&self) -> Heads {
        Heads {
            query: self.config.num_attention_heads,
            key_value: self.config.num_key_value_heads,
            dim: self.config.head_dim,
        }
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
