//! Flags of the operator; each can be set by an environment variable too.

use std::{collections::BTreeSet, net::SocketAddr, path::PathBuf};

use clap::Parser;
use k8s_openapi::jiff::SignedDuration;

use tunesmith_planner::parse_bytes;

use crate::{
    plan::Devices,
    workload::{CheckResources, TrainerDefaults},
};

/// Versions are not looked up more often.
const SHORTEST_INTERVAL: SignedDuration = SignedDuration::from_mins(1);

/// Runs FineTuneJobs and verifies AdapterVersions.
#[derive(Clone, Debug, Parser)]
#[command(version)]
pub struct Options {
    /// Image of the trainer.
    #[arg(long, env = "TRAINER_IMAGE")]
    pub trainer_image: String,
    /// When nodes pull the trainer's image: Always, IfNotPresent or Never.
    #[arg(long, env = "TRAINER_IMAGE_PULL_POLICY", default_value = "IfNotPresent", value_parser = ["Always", "IfNotPresent", "Never"])]
    pub trainer_image_pull_policy: String,
    /// Architecture that the trainer's image was built for, as nodes are labelled.
    #[arg(long, env = "TRAINER_ARCH", default_value = "amd64", value_parser = ["amd64", "arm64"])]
    pub trainer_arch: String,
    /// What the trainer's image computes on: cpu, cuda.
    #[arg(long, env = "TRAINER_DEVICES", default_value = "cpu", value_delimiter = ',', value_parser = ["cpu", "cuda"])]
    pub trainer_devices: Vec<String>,
    /// Memory of pods that only check: preflights and verifications.
    #[arg(long, env = "CHECK_MEMORY", default_value = "2Gi", value_parser = quantity)]
    pub check_memory: String,
    /// CPU limit of pods that only check.
    #[arg(long, env = "CHECK_CPU_LIMIT", value_parser = quantity)]
    pub check_cpu_limit: Option<String>,
    /// Storage of the node that pods that only check request, and may use at most.
    #[arg(long, env = "CHECK_EPHEMERAL_STORAGE", value_parser = quantity)]
    pub check_ephemeral_storage: Option<String>,
    /// How often the files of Available versions are looked up, such as 24h; never, if it is not given.
    #[arg(long, env = "INSPECT_EVERY", value_parser = interval)]
    pub inspect_every: Option<SignedDuration>,
    /// Name of this cluster, for the claims that runs lay on versions in a store that clusters share.
    #[arg(long, env = "CLUSTER_NAME", default_value = "")]
    pub cluster_name: String,
    /// The namespaces to serve; all of them, if none is given.
    #[arg(long, env = "WATCH_NAMESPACES", value_delimiter = ',')]
    pub watch_namespaces: Vec<String>,
    /// File of GpuClasses that the operator applies: specs by their names.
    #[arg(long, env = "GPU_CLASSES")]
    pub gpu_classes: Option<PathBuf>,
    /// Address of /metrics, /healthz and /readyz.
    #[arg(long, env = "LISTEN_ADDRESS", default_value = "0.0.0.0:8080")]
    pub listen_address: SocketAddr,
    /// Namespace of the leader lease: the operator's own. Without it, no lease is taken: run one replica.
    #[arg(long, env = "POD_NAMESPACE")]
    pub lease_namespace: Option<String>,
    /// Name of the leader lease.
    #[arg(long, env = "LEASE_NAME", default_value = "tunesmith-operator")]
    pub lease_name: String,
    /// Who holds the lease: the pod's name.
    #[arg(long, env = "POD_NAME", default_value_t = process_identity())]
    pub identity: String,
}

impl Options {
    /// What all trainer pods have in common.
    pub fn trainer(&self) -> TrainerDefaults {
        TrainerDefaults {
            image: self.trainer_image.clone(),
            pull_policy: self.trainer_image_pull_policy.clone(),
            arch: self.trainer_arch.clone(),
            cluster: self.cluster_name.clone(),
            checks: CheckResources {
                memory: self.check_memory.clone(),
                cpu_limit: self.check_cpu_limit.clone(),
                ephemeral_storage: self.check_ephemeral_storage.clone(),
            },
        }
    }

    /// What the controllers serve: each of the namespaces by itself, or all together (None).
    pub fn scopes(&self) -> Vec<Option<String>> {
        let named = self.watch_namespaces.iter().map(|name| name.trim()).filter(|name| !name.is_empty());
        let named: BTreeSet<&str> = named.collect();
        match named.is_empty() {
            true => vec![None],
            false => named.into_iter().map(|name| Some(name.to_owned())).collect(),
        }
    }

    /// The release of the chart, by its lease.
    pub fn release(&self) -> String {
        format!("{}/{}", self.lease_namespace.as_deref().unwrap_or_default(), self.lease_name)
    }

    /// What the trainer's image computes on.
    pub fn devices(&self) -> Devices {
        Devices { cuda: self.trainer_devices.iter().any(|device| device == "cuda") }
    }
}

/// A quantity such as 2Gi or 500m.
fn quantity(text: &str) -> Result<String, String> {
    match parse_bytes(text) {
        Some(_) => Ok(text.to_owned()),
        None => Err("expected a quantity such as 2Gi or 500m".into()),
    }
}

/// A time such as 24h or 90m.
fn interval(text: &str) -> Result<SignedDuration, String> {
    match text.parse::<SignedDuration>() {
        Ok(time) if time >= SHORTEST_INTERVAL => Ok(time),
        _ => Err("expected a time of at least 1m, such as 24h".into()),
    }
}

fn process_identity() -> String {
    format!("tunesmith-operator-{}", std::process::id())
}
