//! The controllers behind FineTuneJob and AdapterVersion.
//!
//! [`controller`] takes a FineTuneJob from preflight to an AdapterVersion, [`verifier`] an AdapterVersion to its verdict.
//! [`trainer`] is how both make and read the pods that do the work. Everything else serves these: [`plan`] and
//! [`nodes`] say what a run asks for, [`refusal`] why the cluster says no, [`lease`] which replica leads.

mod apply;
mod conditions;
mod context;
pub mod controller;
#[cfg(test)]
mod fixtures;
mod labels;
mod lease;
mod metrics;
#[cfg(test)]
mod mock;
mod nodes;
mod options;
pub mod plan;
mod progress;
pub mod refusal;
mod server;
pub mod trainer;
mod verifier;

use std::sync::Arc;

use futures::{FutureExt, future::join};
use kube::Client;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

pub use self::options::Options;
use self::{
    context::{Context, Stop},
    lease::{LeaderLease, LeaseError},
    metrics::Metrics,
    server::Readiness,
};

/// Why the operator stops.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No way to the API server.
    #[error("cannot reach the API server: {0}")]
    Client(#[from] kube::Error),
    /// The HTTP server or a signal handler failed.
    #[error("cannot serve metrics and health: {0}")]
    Io(#[from] std::io::Error),
    /// Another replica leads, or may.
    #[error(transparent)]
    Lease(#[from] LeaseError),
}

/// Runs the operator until SIGTERM.
///
/// # Errors
/// If it can't start, or loses its lease: then the process must end, so that two replicas never act at once.
pub async fn run(options: Options) -> Result<(), Error> {
    let client = Client::try_default().await?;
    let (metrics, readiness) = (Metrics::default(), Readiness::default());
    let stop = stop()?;
    tokio::select! {
        served = server::serve(options.listen_address, metrics.clone(), readiness.clone()) => Ok(served?),
        led = lead(client, &options, metrics, readiness, stop) => led,
    }
}

/// Waits for the lease, then runs the controllers while it lasts.
async fn lead(
    client: Client,
    options: &Options,
    metrics: Metrics,
    readiness: Readiness,
    stop: Stop,
) -> Result<(), Error> {
    let context = Arc::new(Context::new(client.clone(), options.image(), metrics));
    let Some(namespace) = &options.lease_namespace else {
        readiness.set();
        controllers(context, stop).await;
        return Ok(());
    };
    let lease = LeaderLease::new(client, namespace, options.lease_name.clone(), options.identity.clone());
    tokio::select! {
        acquired = lease.acquire(|| readiness.set()) => acquired?,
        () = stop.clone() => return Ok(()),
    }
    readiness.set();
    tracing::info!(identity = options.identity, "leads");
    tokio::select! {
        lost = lease.keep() => Err(lost.into()),
        () = controllers(context, stop) => {
            lease.release().await;
            Ok(())
        }
    }
}

async fn controllers(context: Arc<Context>, stop: Stop) {
    join(controller::run(context.clone(), stop.clone()), verifier::run(context, stop)).await;
}

/// SIGTERM or SIGINT.
fn stop() -> std::io::Result<Stop> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let either = async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    Ok(either.boxed().shared())
}

/// Which log lines are written: RUST_LOG, or info.
pub fn log_filter() -> EnvFilter {
    EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"))
}
