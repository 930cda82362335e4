//! The `tunesmith-trainer` binary; everything is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    tunesmith_trainer::cli::main()
}
