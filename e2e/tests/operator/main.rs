//! The operator alone, against a real API server: nodes, kubelets and trainers are played. Each test has a cluster of its own.

mod kills;
mod scopes;
mod unreadable;

use anyhow::Result;
use tunesmith_e2e::{operator_bench::Stage, programs_folder, repository};

/// A cluster without jobs, for the operator that the tests' profile has built.
async fn stage(name: &str, subnet: u8) -> Result<Stage> {
    Stage::up(name, subnet, programs_folder().join("tunesmith-operator"), repository().join("charts/tunesmith")).await
}
