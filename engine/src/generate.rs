//! Writing tokens one at a time with a key-value cache.

use crate::{Model, Result};

/// How the next token is chosen from the logits; in the order and with the meaning of transformers' processors.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// 0 takes the likeliest token.
    pub temperature: f64,
    /// Smallest set of tokens whose probability reaches this; 1 keeps all.
    pub top_p: f64,
    /// Above 1 makes tokens that were seen less likely.
    pub repetition_penalty: f64,
    /// Seed of the draws.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Sampling {
            temperature: 0.0,
            top_p: 1.0,
            repetition_penalty: 1.0,
            seed: 0,
        }
    }
}

/// A row that is being written. Iterate for tokens; ends at a stop token (not returned) or at the model's longest row.
pub struct Generator<'m> {
    _model: &'m Model,
}

impl<'m> Generator<'m> {
    /// Reads `prompt`.
    pub fn new(
        _model: &'m Model,
        _prompt: &[u32],
        _sampling: Sampling,
        _stop: &[u32],
    ) -> Result<Self> {
        unimplemented!()
    }
    /// The next token, or `None` at the end.
    pub fn next_token(&mut self) -> Result<Option<u32>> {
        unimplemented!()
    }
}
