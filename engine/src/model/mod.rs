//! A decoder language model: embedding, blocks, final norm, output layer.

mod load;
mod trainable;

use crate::backend::{Backend, Row};
use crate::block::{Block, Pass, rms_norm};
use crate::config::ModelConfig;
use crate::cpu::Cpu;
use crate::error::{Error, Result};
use crate::param::{Param, Weight};

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

impl<B: Backend> Model<B> {
    /// The model's shape.
    pub fn config(&self) -> &ModelConfig {
        &self.config
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
