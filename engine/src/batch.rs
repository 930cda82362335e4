//! A micro-batch: rows of tokens, and what is to be predicted.

use serde::{Deserialize, Serialize};

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
