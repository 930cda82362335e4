//! Tunesmith's Kubernetes API (group `tunesmith.dev`, version `v1alpha1`) and the contract between its operator and
//! its trainer.
//!
//! * [`FineTuneJob`]: what a user asks for. * [`FineTuneRun`]: how far a run of it is, the operator's own record.
//! * [`AdapterVersion`]: what came out, immutable.
//! * [`GpuClass`]: what a cluster admin offers to run it on.
//! * [`RunSpec`] goes into a trainer pod, [`RunReport`] comes out of it.
//!
//! The CRD YAML under `crds/yaml/` is generated from these types: `cargo run -p tunesmith-crds --bin crdgen`.

pub mod adapter_version;
pub mod conditions;
pub mod digest;
pub mod evaluation;
pub mod fine_tune_job;
pub mod fine_tune_run;
pub mod gpu_class;
mod lr_schedule;
pub mod manifests;
pub mod method;
pub mod names;
pub mod reference;
pub mod run;
mod schema;
pub mod training;
pub mod uri;

pub use adapter_version::{AdapterVersion, AdapterVersionPhase, AdapterVersionSpec, AdapterVersionStatus};
pub use digest::input_digest;
pub use evaluation::Evaluation;
pub use fine_tune_job::{FineTuneJob, FineTuneJobPhase, FineTuneJobSpec, FineTuneJobStatus};
pub use fine_tune_run::{FineTuneRun, FineTuneRunSpec, FineTuneRunStatus};
pub use gpu_class::{GpuClass, GpuClassSpec};
pub use method::Method;
pub use run::{RunReport, RunSpec};
pub use uri::{Cloud, Uri};
