//! From JSON Lines to micro-batches: rows, the chat template, tokens and masks, packing, and the order of training.

pub mod batches;
pub mod chat;
pub mod encode;
pub mod packing;
pub mod probe;
pub mod rows;
pub mod shuffle;
#[cfg(test)]
mod tests;

use std::path::Path;

use tunesmith_crds::fine_tune_job::DataFormat;
use tunesmith_engine::IGNORE;

pub use self::{chat::ChatTemplate, encode::Encoder, rows::DataError};

/// One row as the model sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Example {
    /// Number of the line that it came from.
    pub row: u64,
    /// Its tokens, at most maxLength.
    pub tokens: Vec<u32>,
    /// The token to predict at each position, or [`IGNORE`].
    pub targets: Vec<u32>,
    /// Whether it was longer than maxLength.
    pub truncated: bool,
}

impl Example {
    /// Tokens that the loss is taken over.
    pub fn trained_tokens(&self) -> usize {
        self.targets.iter().filter(|&&target| target != IGNORE).count()
    }
}

/// Reads and encodes every row of a file.
///
/// # Errors
/// A row can't be used; the message names file, row and field.
pub fn load(path: &Path, format: DataFormat, encoder: &Encoder) -> Result<Vec<Example>, DataError> {
    let mut reader = rows::Reader::open(path, format)?;
    let mut examples = Vec::new();
    while let Some((number, row)) = reader.next_row()? {
        let example = encoder.encode(number, &row).map_err(|problem| reader.error(number, problem))?;
        examples.push(example);
    }
    match examples.is_empty() {
        true => Err(reader.empty()),
        false => Ok(examples),
    }
}
