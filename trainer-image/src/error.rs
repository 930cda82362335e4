//! Every failure of the trainer, and the exit code that tells the operator whether to try again.

use tunesmith_crds::names::exit_code;

use crate::convert::ConvertError;

/// Any failure of a subcommand.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A GGUF file was not converted.
    #[error(transparent)]
    Convert(#[from] ConvertError),
}

impl Error {
    /// One of [`tunesmith_crds::names::exit_code`].
    pub fn exit_code(&self) -> i32 {
        match self {
            Self::Convert(_) => exit_code::BAD_INPUT,
        }
    }
}
