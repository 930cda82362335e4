//! The command line: subcommands, and how an error becomes a message and an exit code.

use std::{
    path::PathBuf,
    process::ExitCode,
};

use clap::{Parser, Subcommand};

use crate::{convert::convert, error::Error};

#[derive(Parser)]
#[command(name = "tunesmith-trainer", version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Turn a GGUF file into a Hugging Face model folder
    Convert {
        /// The GGUF file: Llama architecture, byte-level BPE tokenizer
        model: PathBuf,
        /// The folder to make
        #[arg(long)]
        out: PathBuf,
    },
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    let Cli { command } = Cli::parse();
    match run(command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(error.exit_code() as u8)
        }
    }
}

fn run(command: Command) -> Result<(), Error> {
    match command {
        Command::Convert { model, out } => {
            convert(&model, &out)?;
            println!("{}", out.display());
        }
    }
    Ok(())
}
