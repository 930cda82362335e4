//! Flags of the operator; each can be set by an environment variable too.

use std::net::SocketAddr;

use clap::Parser;

use crate::{plan::Devices, workload::Image};

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
    /// The trainer's image.
    pub fn image(&self) -> Image {
        Image {
            name: self.trainer_image.clone(),
            pull_policy: self.trainer_image_pull_policy.clone(),
            arch: self.trainer_arch.clone(),
        }
    }

    /// What the trainer's image computes on.
    pub fn devices(&self) -> Devices {
        Devices { cuda: self.trainer_devices.iter().any(|device| device == "cuda") }
    }
}

fn process_identity() -> String {
    format!("tunesmith-operator-{}", std::process::id())
}
