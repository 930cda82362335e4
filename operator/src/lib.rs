//! The controllers behind FineTuneJob and AdapterVersion.
//!
//! [`jobs`] says which run a FineTuneJob should have, [`runs`] takes a run from preflight to an AdapterVersion, [`versions`]
//! an AdapterVersion to its verdict. [`workload`] is how they make and read the pods that do the work, [`cache`] what they
//! know of the cluster, [`progress`] what training pods say. Everything else serves these: [`plan`] and [`nodes`] say what
//! a run asks for, [`admission`] why the cluster says no, [`lease`] which replica leads.

pub mod admission;
mod apply;
mod cache;
mod conditions;
mod context;
#[cfg(test)]
mod fixtures;
pub mod jobs;
mod labels;
mod lease;
mod metrics;
#[cfg(test)]
mod mock;
mod nodes;
mod options;
pub mod plan;
mod progress;
pub mod runs;
mod server;
mod state;
mod versions;
pub mod workload;

use std::{sync::Arc, time::Duration};

use futures::{FutureExt, future::join};
use kube::Client;
use tokio::{
    signal::unix::{SignalKind, signal},
    time::sleep,
};
use tracing_subscriber::EnvFilter;

pub use self::options::Options;
use self::{
    context::{Context, Stop},
    lease::{LeaderLease, LeaseError},
    metrics::Metrics,
    server::Readiness,
};

/// Time to end what is under way after SIGTERM.
const LAST_WORDS: Duration = Duration::from_secs(5);

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
/// If it can't start, or may not hold a lease.
pub async fn run(options: Options) -> Result<(), Error> {
    let client = Client::try_default().await?;
    let (metrics, readiness) = (Metrics::default(), Readiness::default());
    let stop = stop()?;
    tokio::select! {
        served = server::serve(options.listen_address, metrics.clone(), readiness.clone()) => Ok(served?),
        led = lead(client, &options, metrics, readiness, stop) => led,
    }
}

/// Runs the controllers while this replica holds the lease, and competes for it while it doesn't.
async fn lead(
    client: Client,
    options: &Options,
    metrics: Metrics,
    readiness: Readiness,
    stop: Stop,
) -> Result<(), Error> {
    let context = || Arc::new(Context::new(client.clone(), options, metrics.clone(), readiness.clone()));
    let Some(namespace) = &options.lease_namespace else {
        controllers(context(), stop).await;
        return Ok(());
    };
    let lease = LeaderLease::new(client.clone(), namespace, options.lease_name.clone(), options.identity.clone());
    loop {
        tokio::select! {
            acquired = lease.acquire(|| readiness.waits()) => acquired?,
            () = stop.clone() => return Ok(()),
        }
        readiness.leads();
        tracing::info!(identity = options.identity, "leads");
        // Whoever loses the lease stops in the middle of what it does: what is half done, the record tells the next.
        tokio::select! {
            lost = lease.keep() => tracing::warn!(%lost, "stops to lead"),
            () = controllers(context(), stop.clone()) => {
                lease.release().await;
                return Ok(());
            }
        }
    }
}

/// Runs the controllers until `stop`, and not much longer.
async fn controllers(context: Arc<Context>, stop: Stop) {
    let late = async {
        stop.clone().await;
        sleep(LAST_WORDS).await;
    };
    tokio::select! {
        _ = join(jobs::run(context.clone(), stop.clone()), versions::run(context, stop.clone())) => {}
        () = late => tracing::warn!("stops in the middle of a reconcile"),
    }
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
