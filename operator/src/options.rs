//! Flags of the operator; each can be set by an environment variable too.

use std::net::SocketAddr;

use clap::Parser;

use crate::trainer::Image;

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
        Image { name: self.trainer_image.clone(), pull_policy: self.trainer_image_pull_policy.clone() }
    }
}

fn process_identity() -> String {
    format!("tunesmith-operator-{}", std::process::id())
}
