//! The operator's process: logs, flags, and the exit code.

use std::process::ExitCode;

use clap::Parser;
use tunesmith_operator::{Options, run};

#[tokio::main]
async fn main() -> ExitCode {
    // A workspace build enables two TLS providers in rustls, which then takes neither by itself.
    let _ = rustls::crypto::ring::default_provider().install_default();
    tracing_subscriber::fmt().json().with_span_list(false).with_env_filter(tunesmith_operator::log_filter()).init();
    match run(Options::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(%error, "the operator stops");
            ExitCode::FAILURE
        }
    }
}
