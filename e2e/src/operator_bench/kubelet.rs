//! Scheduler and kubelet of all nodes, played: pods are bound, run, and end with the report that their stage leaves.

use std::collections::HashSet;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use futures::{TryStreamExt, pin_mut};
use k8s_openapi::api::core::v1::{Node, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Status;
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, DeleteParams, Patch, PatchParams, PostParams};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Client, ResourceExt};
use serde_json::{Value, json};
use tokio::sync::Semaphore;
use tokio::time::{interval, sleep};
use tunesmith_crds::names::{ATTEMPT_LABEL, JOB_LABEL, RUN_SPEC_ANNOTATION, STAGE_LABEL};

use super::reports;
use super::trainer::{Pace, Trainers};
use crate::network::Network;

/// Pods that are started at once.
const AT_ONCE: usize = 32;
/// Time that an image takes, and that a pod takes which only checks.
const SHORT: Duration = Duration::from_secs(1);
/// A node says this often that it is alive.
const HEARTBEAT: Duration = Duration::from_secs(300);
const IMAGE_ID: &str = "localhost/trainer@sha256:00000000000000000000000000000000000000000000000000000000000000aa";

/// What becomes of a job's training, by the job's name.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fate {
    /// How long it trains; None for good.
    pub(crate) training: Option<Duration>,
    /// Whether its first attempt fails.
    pub(crate) fails_first: bool,
}

impl Fate {
    pub(crate) fn of(job: &str) -> Self {
        let kind = job.split('-').next();
        let seconds = match kind {
            Some("active") => None,
            Some("life") => Some(40),
            _ => Some(6),
        };
        Self { training: seconds.map(Duration::from_secs), fails_first: kind == Some("killed") }
    }
}

/// The kubelets of all nodes.
pub(crate) struct Kubelets {
    client: Client,
    network: Network,
    trainers: Trainers,
    nodes: Vec<String>,
    next_node: AtomicUsize,
    next_address: AtomicU16,
    slots: Semaphore,
    running: AtomicUsize,
}

impl Kubelets {
    /// Plays these nodes from now on.
    pub(crate) fn start(client: Client, network: Network, trainers: Trainers, nodes: Vec<String>) -> Arc<Self> {
        let kubelets = Arc::new(Self {
            client,
            network,
            trainers,
            nodes,
            next_node: AtomicUsize::new(0),
            next_address: AtomicU16::new(2),
            slots: Semaphore::new(AT_ONCE),
            running: AtomicUsize::new(0),
        });
        tokio::spawn(kubelets.clone().watch_pods());
        tokio::spawn(kubelets.clone().beat());
        kubelets
    }

    /// How many training pods were started.
    pub(crate) fn trainings(&self) -> usize {
        self.running.load(Ordering::Relaxed)
    }

    async fn watch_pods(self: Arc<Self>) {
        let config = watcher::Config::default().labels(STAGE_LABEL);
        let pods = watcher(Api::<Pod>::all(self.client.clone()), config).default_backoff().applied_objects();
        pin_mut!(pods);
        let (mut started, mut removed) = (HashSet::new(), HashSet::new());
        loop {
            let pod = match pods.try_next().await {
                Ok(Some(pod)) => pod,
                Ok(None) => return,
                Err(error) => {
                    eprintln!("  the kubelets' watch: {error}");
                    continue;
                }
            };
            let uid = pod.uid().unwrap_or_default();
            let kubelets = self.clone();
            if pod.metadata.deletion_timestamp.is_some() {
                if removed.insert(uid) {
                    tokio::spawn(async move { report(kubelets.remove(&pod).await) });
                }
            } else if started.insert(uid) {
                tokio::spawn(async move { report(kubelets.live(&pod).await) });
            }
        }
    }

    /// A pod's life, from its binding to its end.
    async fn live(&self, pod: &Pod) -> Result<()> {
        let label = |name: &str| pod.labels().get(name).cloned().unwrap_or_default();
        let (stage, fate) = (label(STAGE_LABEL), Fate::of(&label(JOB_LABEL)));
        let address = IpAddr::from(self.network.pod_address(self.next_address.fetch_add(1, Ordering::Relaxed)));
        let begun = {
            let _slot = self.slots.acquire().await?;
            self.bind(pod).await?;
            self.write(pod, &starting()).await?;
            sleep(SHORT).await;
            let begun = Timestamp::now();
            if stage == "train" {
                let pace = fate.training.map_or(Pace::Shared, |length| Pace::Own(Instant::now(), length));
                self.trainers.train(address, pace);
                self.running.fetch_add(1, Ordering::Relaxed);
            }
            self.write(pod, &running(address, begun)).await?;
            begun
        };
        let fails = fate.fails_first && label(ATTEMPT_LABEL) == "1";
        let words = match (stage.as_str(), fate.training) {
            ("train", None) => return Ok(()),
            ("train", Some(length)) => {
                sleep(length).await;
                if fails { reports::failed() } else { reports::trained(&task(pod)?) }
            }
            (stage, _) => {
                sleep(SHORT).await;
                if stage == "verify" { reports::verified() } else { reports::preflight() }
            }
        };
        self.write(pod, &ended(address, begun, &words, fails)).await
    }

    async fn bind(&self, pod: &Pod) -> Result<()> {
        let node = &self.nodes[self.next_node.fetch_add(1, Ordering::Relaxed) % self.nodes.len()];
        let binding = json!({
            "apiVersion": "v1", "kind": "Binding", "metadata": {"name": pod.name_any()},
            "target": {"apiVersion": "v1", "kind": "Node", "name": node},
        });
        let pods = self.pods(pod);
        let name = pod.name_any();
        pods.create_subresource::<Value, Status>("binding", &name, &PostParams::default(), &binding)
            .await
            .with_context(|| format!("cannot bind pod {name}"))?;
        Ok(())
    }

    async fn write(&self, pod: &Pod, status: &Value) -> Result<()> {
        let name = pod.name_any();
        let patch = Patch::Merge(json!({"status": status}));
        match self.pods(pod).patch_status(&name, &PatchParams::default(), &patch).await {
            Ok(_) => Ok(()),
            // It was deleted.
            Err(kube::Error::Api(status)) if status.is_not_found() => Ok(()),
            Err(error) => Err(error).with_context(|| format!("cannot write the status of pod {name}")),
        }
    }

    async fn remove(&self, pod: &Pod) -> Result<()> {
        match self.pods(pod).delete(&pod.name_any(), &DeleteParams::default().grace_period(0)).await {
            Ok(_) => Ok(()),
            Err(kube::Error::Api(status)) if status.is_not_found() => Ok(()),
            Err(error) => Err(error).with_context(|| format!("cannot remove pod {}", pod.name_any())),
        }
    }

    fn pods(&self, pod: &Pod) -> Api<Pod> {
        Api::namespaced(self.client.clone(), &pod.namespace().unwrap_or_default())
    }

    /// Nodes say that they are alive, each in its turn.
    async fn beat(self: Arc<Self>) {
        let nodes = Api::<Node>::all(self.client.clone());
        let mut turns = interval(HEARTBEAT / u32::try_from(self.nodes.len().max(1)).unwrap_or(u32::MAX));
        for node in self.nodes.iter().cycle() {
            turns.tick().await;
            let condition = ready(Timestamp::now());
            let patch = Patch::Strategic(json!({"status": {"conditions": [condition]}}));
            if let Err(error) = nodes.patch_status(node, &PatchParams::default(), &patch).await {
                eprintln!("  the heartbeat of {node}: {error}");
            }
        }
    }
}

/// A node's condition that it can take pods.
pub(crate) fn ready(now: Timestamp) -> Value {
    json!({
        "type": "Ready", "status": "True", "reason": "KubeletReady", "message": "kubelet is posting ready status",
        "lastHeartbeatTime": seconds(now), "lastTransitionTime": "2026-01-01T00:00:00Z",
    })
}

fn report(result: Result<()>) {
    if let Err(error) = result {
        eprintln!("  the kubelets: {error:#}");
    }
}

fn container(state: Value, ready: bool) -> Value {
    json!([{
        "name": "trainer", "image": "localhost/trainer", "imageID": IMAGE_ID, "ready": ready, "started": ready,
        "restartCount": 0, "state": state,
    }])
}

fn starting() -> Value {
    let state = json!({"waiting": {"reason": "ContainerCreating"}});
    json!({"phase": "Pending", "startTime": seconds(Timestamp::now()), "containerStatuses": container(state, false)})
}

fn running(address: IpAddr, begun: Timestamp) -> Value {
    let state = json!({"running": {"startedAt": seconds(begun)}});
    json!({
        "phase": "Running", "podIP": address, "podIPs": [{"ip": address}],
        "conditions": [condition("True")],
        "containerStatuses": container(state, true),
    })
}

fn ended(address: IpAddr, begun: Timestamp, words: &Value, failed: bool) -> Value {
    let (phase, code, reason) = if failed { ("Failed", 1, "Error") } else { ("Succeeded", 0, "Completed") };
    let state = json!({"terminated": {
        "exitCode": code, "reason": reason, "message": words.to_string(),
        "startedAt": seconds(begun), "finishedAt": seconds(Timestamp::now()),
    }, "running": null});
    json!({
        "phase": phase, "podIP": address, "podIPs": [{"ip": address}],
        "conditions": [condition("False")],
        "containerStatuses": container(state, false),
    })
}

fn condition(status: &str) -> Value {
    json!({"type": "Ready", "status": status, "lastTransitionTime": seconds(Timestamp::now())})
}

/// As Kubernetes writes times.
fn seconds(time: Timestamp) -> String {
    time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// What the pod works on.
fn task(pod: &Pod) -> Result<Value> {
    let task = pod.annotations().get(RUN_SPEC_ANNOTATION).context("the pod has no task")?;
    Ok(serde_json::from_str(task)?)
}
