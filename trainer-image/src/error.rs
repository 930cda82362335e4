//! Every failure of the trainer, and the exit code that tells the operator whether to try again.

use std::path::PathBuf;

use tunesmith_crds::{Uri, names::exit_code};

use crate::{convert::ConvertError, data::DataError, model::ModelError, publish::PublishError, store::StoreError};

/// Any failure of a subcommand. The message is for the user: it says what is wrong and what to do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The job asks for something that can't be done.
    #[error("{0}")]
    Spec(String),
    /// Model or data can't be used.
    #[error("{0}")]
    Input(String),
    /// Model, data or this trainer's arithmetic are no longer what was checked.
    #[error("{0}")]
    InputsChanged(String),
    /// A file that this process was told to read or write is out of reach.
    #[error("{}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Whoever reads or writes along is gone.
    #[error("standard input or output: {source}")]
    Pipe {
        /// Why.
        source: std::io::Error,
    },
    /// The object store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The base model can't be used.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The data can't be used.
    #[error(transparent)]
    Data(#[from] DataError),
    /// A checkpoint that is needed was whole, and is so no more.
    #[error("{uri} can't be used: {problem}; the next attempt goes on from an earlier checkpoint")]
    Checkpoint {
        /// Its folder.
        uri: Uri,
        /// What is wrong with it.
        problem: String,
    },
    /// The numbers went wrong.
    #[error(transparent)]
    Engine(#[from] tunesmith_engine::Error),
    /// The result was not published.
    #[error(transparent)]
    Publish(#[from] PublishError),
    /// A GGUF file was not converted.
    #[error(transparent)]
    Convert(#[from] ConvertError),
    /// A defect of the trainer.
    #[error("internal error: {0}; please report it")]
    Internal(String),
}

impl Error {
    /// One of [`exit_code`].
    pub fn exit_code(&self) -> i32 {
        match self {
            Self::Spec(_) | Self::File { .. } | Self::Pipe { .. } => exit_code::BAD_SPEC,
            Self::Engine(tunesmith_engine::Error::Lora(_)) => exit_code::BAD_SPEC,
            Self::InputsChanged(_) => exit_code::INPUTS_CHANGED,
            Self::Input(_) | Self::Engine(_) | Self::Convert(_) => exit_code::BAD_INPUT,
            Self::Store(error) | Self::Model(ModelError::Store(error)) => error.exit_code(),
            Self::Data(error) => error.exit_code(),
            Self::Model(_) => exit_code::BAD_INPUT,
            Self::Publish(error) => error.exit_code(),
            Self::Checkpoint { .. } => exit_code::STORAGE,
            Self::Internal(_) => INTERNAL,
        }
    }
}

/// A defect: not one of the contract's codes, so that the operator tries again up to `backoffLimit`.
const INTERNAL: i32 = 1;
