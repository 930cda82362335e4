//! `make bench-operator`: what the operator takes and how fast it is with ten thousand FineTuneJobs.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Result;
use clap::Parser;
use tunesmith_e2e::operator_bench::{Options, measure};
use tunesmith_e2e::{Toolchain, human, programs_folder, repository};

/// Runs the operator's release build against a real API server and etcd, and writes its figures to
/// `target/bench/operator.json`. They are measured, not tested: a missed aim is told, and nothing fails.
#[derive(Parser)]
#[command(name = "bench_operator")]
struct Arguments {
    /// The operator's program; left out, that of the release build.
    #[arg(long)]
    operator: Option<PathBuf>,
    /// The chart of that release; left out, this repository's.
    #[arg(long)]
    chart: Option<PathBuf>,
    /// FineTuneJobs that have ended.
    #[arg(long, default_value_t = 9000)]
    finished: u32,
    /// FineTuneJobs that train.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=4000))]
    active: u32,
    /// Nodes.
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..))]
    nodes: u32,
    /// Seconds for which an idle operator is watched.
    #[arg(long, default_value_t = 60)]
    idle: u64,
    /// Leave the cluster up: `e2e/cluster down --name tunesmith-bench` removes it.
    #[arg(long)]
    keep: bool,
}

#[tokio::main]
async fn main() -> ExitCode {
    match bench(Arguments::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\n{error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn bench(arguments: Arguments) -> Result<()> {
    let start = Instant::now();
    Toolchain::new()?.install()?;
    let target = programs_folder().parent().map(PathBuf::from).unwrap_or_default();
    let figures = target.join("bench/operator.json");
    let options = Options {
        operator: arguments.operator.unwrap_or_else(|| target.join("release/tunesmith-operator")),
        chart: arguments.chart.unwrap_or_else(|| repository().join("charts/tunesmith")),
        finished: arguments.finished,
        active: arguments.active,
        nodes: arguments.nodes,
        idle: Duration::from_secs(arguments.idle),
        keep: arguments.keep,
    };
    let measured = measure(options, &figures).await?;
    println!("\n{}\n\nAll of it took {}; {}", measured.table(), human(start.elapsed()), figures.display());
    Ok(())
}
