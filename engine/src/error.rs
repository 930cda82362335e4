//! What can go wrong in the engine, in words that tell the user what to change.

use std::path::{Path, PathBuf};

/// Any failure of the engine.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file of the model or adapter folder cannot be read.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// `config.json` describes a model that the engine does not run.
    #[error("{}: {message}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// The field, what it says, and what is supported.
        message: String,
    },
    /// The safetensors files are damaged, or do not hold the model that `config.json` describes.
    #[error("{}: {message}", path.display())]
    Weights {
        /// The file or folder.
        path: PathBuf,
        /// The tensor, and what was expected and found.
        message: String,
    },
    /// The LoRA options select nothing, or cannot be applied to this model.
    #[error("lora: {0}")]
    Lora(String),
    /// A micro-batch is inconsistent with itself or with the model.
    #[error("batch: {0}")]
    Batch(String),
    /// A training state does not belong to this trainer.
    #[error("resume: {0}")]
    State(String),
    /// The optimizer step was refused: the adapter would have become NaN or infinite.
    #[error(
        "step {step}: the gradient norm is {grad_norm}; lower the learning rate, or look at the rows of this batch"
    )]
    NonFinite {
        /// The optimizer step, counted from 1.
        step: u64,
        /// The norm, NaN or infinite.
        grad_norm: f64,
    },
}

/// A result whose error is [`enum@Error`].
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub(crate) fn io(path: &Path, source: std::io::Error) -> Self {
        Error::Io { path: path.to_owned(), source }
    }

    pub(crate) fn config(path: &Path, message: impl Into<String>) -> Self {
        Error::Config { path: path.to_owned(), message: message.into() }
    }

    pub(crate) fn weights(path: &Path, message: impl Into<String>) -> Self {
        Error::Weights { path: path.to_owned(), message: message.into() }
    }
}
