//! The controllers behind FineTuneJob and AdapterVersion.
//!
//! [`jobs`] says which run a FineTuneJob should have, [`runs`] takes a run from preflight to an AdapterVersion, [`versions`]
//! an AdapterVersion to its verdict. [`workload`] is how they make and read the pods that do the work, [`cache`] what they
//! know of the cluster, [`progress`] what training pods say. Everything else serves these: [`plan`] and [`nodes`] say what
//! a run asks for, [`admission`] why the cluster says no, [`lease`] which replica leads.

pub mod admission;
mod apply;
mod cache;
mod classes;
mod conditions;
mod context;
mod details;
#[cfg(test)]
mod fixtures;
pub mod jobs;
mod labels;
mod lease;
mod metrics;
#[cfg(test)]
mod mock;
mod nodes;
pub mod observed;
mod options;
pub mod plan;
mod progress;
pub mod run;
pub mod runs;
mod server;
mod state;
mod versions;
pub mod workload;

use std::{sync::Arc, time::Duration};

use futures::{
    FutureExt,
    future::{join, join_all, pending},
};
use kube::Client;
use tokio::{
    signal::unix::{SignalKind, signal},
    task::{JoinError, JoinSet},
    time::sleep,
};
use tracing_subscriber::EnvFilter;

pub use self::options::Options;
use self::{
    cache::{Caches, Cluster, Watches, watch_cluster},
    classes::{Classes, ClassesError},
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
    /// The file of GpuClasses can't be used.
    #[error(transparent)]
    Classes(#[from] ClassesError),
    /// Another replica leads, or may.
    #[error(transparent)]
    Lease(#[from] LeaseError),
    /// A watch has met a defect: what it has seen grows old.
    #[error("a watch has ended: {0}; please report it")]
    Watch(#[source] JoinError),
}

/// Runs the operator until SIGTERM.
///
/// # Errors
/// If it can't start, or may not hold a lease.
pub async fn run(options: Options) -> Result<(), Error> {
    let classes = options
        .gpu_classes
        .as_deref()
        .map(|file| Classes::read(file, options.release()))
        .transpose()?
        .unwrap_or_default();
    let client = Client::try_default().await?;
    let (metrics, readiness, cluster) = (Metrics::default(), Readiness::default(), Cluster::default());
    let served = server::serve(options.listen_address, metrics.clone(), readiness.clone());
    let mut watches = JoinSet::new();
    let mut scopes = Vec::new();
    for scope in options.scopes() {
        let (watch, caches) = Watches::new(client.clone(), scope, cluster.clone());
        watch.spawn(&mut watches);
        metrics.watch_jobs(caches.jobs.clone());
        let context = Context::new(client.clone(), &options, metrics.clone());
        scopes.push((Arc::new(context), caches));
    }
    let all_caches: Vec<Caches> = scopes.iter().map(|(_, caches)| caches.clone()).collect();
    watch_cluster(client.clone(), &cluster, all_caches.clone(), &mut watches);
    watches.spawn(async move {
        for caches in all_caches {
            caches.listed().await;
        }
        readiness.synced();
    });
    let operator = Operator { client, options, classes, cluster, scopes, stop: stop()? };
    let ended = async {
        loop {
            match watches.join_next().await {
                Some(Err(error)) => return error,
                // The one that waited for the lists.
                Some(Ok(())) => {}
                None => pending().await,
            }
        }
    };
    tokio::select! {
        served = served => Ok(served?),
        led = operator.lead() => led,
        ended = ended => Err(Error::Watch(ended)),
    }
}

/// One replica: it watches as long as it runs, and works while it leads.
struct Operator {
    client: Client,
    options: Options,
    classes: Classes,
    cluster: Cluster,
    scopes: Vec<(Arc<Context>, Caches)>,
    stop: Stop,
}

impl Operator {
    /// Works while this replica holds the lease, and competes for it while it doesn't.
    async fn lead(&self) -> Result<(), Error> {
        let Some(namespace) = &self.options.lease_namespace else {
            self.work().await;
            return Ok(());
        };
        let (name, identity) = (self.options.lease_name.clone(), self.options.identity.clone());
        let lease = LeaderLease::new(self.client.clone(), namespace, name, identity.clone());
        loop {
            let mut held = tokio::select! {
                acquired = lease.acquire() => acquired?,
                () = self.stop.clone() => return Ok(()),
            };
            tracing::info!(identity, "leads");
            // Whoever loses the lease stops in the middle of what it does: what is half done, the record tells the next.
            tokio::select! {
                lost = lease.keep(&mut held) => tracing::warn!(%lost, "stops to lead"),
                () = self.work() => {
                    lease.release(held).await;
                    return Ok(());
                }
            }
        }
    }

    /// Runs the controllers of each scope until it is to stop, and not much longer.
    async fn work(&self) {
        let all_caches: Vec<Caches> = self.scopes.iter().map(|(_, caches)| caches.clone()).collect();
        let known = async {
            for caches in &all_caches {
                caches.listed().await;
            }
            // Jobs may ask for them.
            self.classes.apply(&self.client, &self.cluster).await;
        };
        tokio::select! {
            () = known => {}
            () = self.stop.clone() => return,
        }
        let controllers = self.scopes.iter().map(|(context, caches)| {
            let jobs = jobs::run(context.clone(), caches.clone(), self.stop.clone());
            join(jobs, versions::run(context.clone(), caches.clone(), self.stop.clone()))
        });
        let late = async {
            self.stop.clone().await;
            sleep(LAST_WORDS).await;
        };
        tokio::select! {
            _ = join_all(controllers) => {}
            () = self.classes.keep(&self.client, &self.cluster, &all_caches) => {}
            () = late => tracing::warn!("stops in the middle of a reconcile"),
        }
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
