//! A real Kubernetes cluster on one Linux machine, for the demo and for tests.
//!
//! [`Toolchain`] installs what it is made of, [`Cluster`] brings it up and down, [`Images`] puts Tunesmith's programs
//! into it, and [`model`] fetches a small real model to tune.

mod cgroup;
mod cluster;
mod command;
mod containerd;
mod control_plane;
mod daemon;
mod dns;
mod http;
mod images;
pub mod model;
mod network;
mod node;
pub mod operator_bench;
mod paths;
mod pki;
mod s3;
mod site;
mod steps;
mod teardown;
mod toolchain;

pub use cluster::{Cluster, DEFAULT_NAME, client_of};
pub use command::{run, run_with_input, succeeds};
pub use containerd::PAUSE;
pub use images::{Image, Images, programs_folder};
pub use paths::{cache, repository};
pub use s3::{BUCKETS, S3};
pub use steps::{Step, human};
pub use toolchain::Toolchain;
