//! A run whose operator is killed behind each of its writes.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, ListParams};
use kube::{Client, Resource};
use rustix::process::Signal;
use serde::de::DeserializeOwned;
use tokio::time::{sleep, timeout};
use tunesmith_crds::{AdapterVersion, FineTuneJob, FineTuneRun};

use super::population::{namespace, submit};
use super::proxy::Proxy;
pub use super::proxy::Write;
use super::{Bench, NAME, Options, SUBNET};

const PORT: u16 = 18_079;
const JOB: &str = "killed-000";
/// Far more than a run needs.
const MOST_KILLS: usize = 200;
/// The operator has nothing left to write, once it was silent for so long.
const SILENCE: Duration = Duration::from_secs(10);
/// Details that last are written later.
const PATIENCE: Duration = Duration::from_secs(60);

/// What became of it.
pub struct Killed {
    /// Everything that was written, in this order: the operator was killed behind each.
    pub writes: Vec<Write>,
    /// The job.
    pub job: FineTuneJob,
    /// All runs in its namespace.
    pub runs: Vec<FineTuneRun>,
    /// All versions in its namespace.
    pub versions: Vec<AdapterVersion>,
    /// All Jobs in its namespace.
    pub jobs: Vec<Job>,
    /// All pods in its namespace.
    pub pods: Vec<Pod>,
}

/// Takes a FineTuneJob to its end with an operator that is killed behind each write, before it has the answer, and started
/// again; on a cluster of its own without kubelets, which goes afterwards.
///
/// # Errors
/// If the cluster can't be brought up, or the job does not end.
pub async fn killed_behind_each_write(operator: PathBuf, chart: PathBuf) -> Result<Killed> {
    let options = Options { operator, chart, finished: 0, active: 0, nodes: 2, idle: Duration::ZERO, keep: false };
    let mut bench = Bench::empty(NAME, SUBNET, options).await?;
    let killed = bench.killed_behind_each_write().await;
    bench.cluster.down()?;
    killed
}

impl Bench {
    async fn killed_behind_each_write(&mut self) -> Result<Killed> {
        let namespace = namespace(0);
        let operators_client = self.launcher.client().await?;
        let mut proxy = Proxy::start(&self.cluster.site().network, PORT, operators_client)?;
        submit(&self.client, &namespace, JOB).await?;
        let key = (namespace.clone(), JOB.to_owned());
        for _ in 0..MOST_KILLS {
            let mut replica = self.launcher.start_alone(PORT).await?;
            let is_over = self.jobs.seen(&key).is_some_and(|seen| seen.phase == "Succeeded");
            let wait = if is_over { SILENCE } else { PATIENCE };
            let written = timeout(wait, proxy.written()).await.is_ok();
            replica.signal(Signal::KILL);
            replica.ended().await?;
            if !written {
                ensure!(is_over, "the operator writes no more: {:?}", self.jobs.seen(&key));
                return self.left(proxy.writes(), &namespace).await;
            }
            // What it wrote is to reach the watch of this bench.
            sleep(Duration::from_millis(200)).await;
            proxy.forget();
        }
        anyhow::bail!("after {MOST_KILLS} kills: {:?}; {:#?}", self.jobs.seen(&key), proxy.writes())
    }

    async fn left(&self, writes: Vec<Write>, namespace: &str) -> Result<Killed> {
        let job = Api::namespaced(self.client.clone(), namespace).get(JOB).await?;
        Ok(Killed {
            writes,
            job,
            runs: all(&self.client, namespace).await?,
            versions: all(&self.client, namespace).await?,
            jobs: all(&self.client, namespace).await?,
            pods: all(&self.client, namespace).await?,
        })
    }
}

async fn all<K>(client: &Client, namespace: &str) -> Result<Vec<K>>
where
    K: Resource<Scope = k8s_openapi::NamespaceResourceScope, DynamicType = ()>
        + Clone
        + DeserializeOwned
        + std::fmt::Debug,
{
    let found = Api::<K>::namespaced(client.clone(), namespace).list(&ListParams::default()).await;
    Ok(found.with_context(|| format!("cannot list {}", K::plural(&())))?.items)
}
