//! stub
use crate::{ModelConfig, Result};
use std::path::Path;
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
pub struct Model {}
impl Model {
    /// Loads a Hugging Face folder.
    pub fn load(_dir: &Path) -> Result<Self> {
        unimplemented!()
    }
    /// A model with random weights, for tests.
    pub fn random(_config: ModelConfig, _seed: u64) -> Self {
        unimplemented!()
    }
    /// The model's shape.
    pub fn config(&self) -> &ModelConfig {
        unimplemented!()
    }
    /// Logits of every position of one row: [tokens, vocab_size], row-major.
    pub fn logits(&self, _tokens: &[u32]) -> Result<Vec<f32>> {
        unimplemented!()
    }
    /// Puts a PEFT adapter folder on the model.
    pub fn load_adapter(&mut self, _dir: &Path) -> Result<()> {
        unimplemented!()
    }
}
