//! `make demo`: from `kubectl apply` to a tuned adapter, on a real cluster on this machine.
//!
//! Each step says how long it took, and is skipped where its work is done: the demo can be run again at any time.

mod follow;
mod inputs;
mod job;
mod report;
mod target;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::Result;
use clap::Parser;
use tunesmith_e2e::{DEFAULT_NAME, human};

use crate::target::Target;

/// Tunes a small language model into a telecom company's support assistant, and shows what came out.
#[derive(Parser)]
#[command(name = "demo")]
struct Arguments {
    /// The kubeconfig of a cluster that you have; left out, the demo makes one on this machine.
    #[arg(long)]
    kubeconfig: Option<PathBuf>,
    /// Name of the cluster on this machine.
    #[arg(long, default_value = DEFAULT_NAME)]
    name: String,
    /// Which /19 of 198.18.0.0/15 that cluster takes: 0 to 15.
    #[arg(long, default_value_t = 0)]
    subnet: u8,
}

#[tokio::main]
async fn main() -> ExitCode {
    match demo(Arguments::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\n{error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn demo(arguments: Arguments) -> Result<()> {
    let start = Instant::now();
    let target = match arguments.kubeconfig {
        None => Target::local(&arguments.name, arguments.subnet)?,
        Some(kubeconfig) => Target::existing(kubeconfig)?,
    };
    target.install_chart()?;
    let inputs = inputs::provide(&target).await?;
    job::apply(&target)?;
    let version = follow::to_version(&target).await?;
    report::print(&target, &inputs, &version).await?;
    println!("\nAll of it took {}.", human(start.elapsed()));
    Ok(())
}
