//! Condition types and reasons: the words that users, alerts and GitOps health checks match on.
//!
//! `Ready`, `Reconciling` and `Stalled` follow kstatus: a Stalled job waits for its user, a Reconciling one for the
//! operator, a Ready one for nobody.

/// The job's adapter is published and recorded.
pub const READY: &str = "Ready";
/// The operator or a pod is at work on the job.
pub const RECONCILING: &str = "Reconciling";
/// Nothing will happen until the user changes something.
pub const STALLED: &str = "Stalled";
/// Model and data were read and checked.
pub const PREFLIGHT_PASSED: &str = "PreflightPassed";
/// The cluster gave the run what it asks for; False while it waits.
pub const QUOTA_RESERVED: &str = "QuotaReserved";
/// The training pods are running.
pub const PODS_READY: &str = "PodsReady";
/// The artifact is complete in the object store, and an AdapterVersion records it.
pub const PUBLISHED: &str = "Published";

/// Reasons of conditions and events.
pub mod reason {
    /// Nothing was created for the job yet.
    pub const PENDING: &str = "Pending";
    /// Preflight checks model and data.
    pub const PREFLIGHT: &str = "Preflight";
    /// Preflight found an error that only a change can mend.
    pub const PREFLIGHT_FAILED: &str = "PreflightFailed";
    /// Preflight passed.
    pub const INPUTS_CHECKED: &str = "InputsChecked";
    /// A ResourceQuota has no room.
    pub const QUOTA_EXCEEDED: &str = "QuotaExceeded";
    /// An admission webhook or policy refused a Job or a pod.
    pub const ADMISSION_REFUSED: &str = "AdmissionRefused";
    /// No node can take a pod yet.
    pub const UNSCHEDULABLE: &str = "Unschedulable";
    /// Pods are scheduled, and their containers start.
    pub const STARTING: &str = "Starting";
    /// Training is going on.
    pub const TRAINING: &str = "Training";
    /// All steps are done, and the artifact is being written or verified.
    pub const PUBLISHING: &str = "Publishing";
    /// An attempt failed, and the next one starts.
    pub const RETRYING: &str = "Retrying";
    /// The store of model or data does not answer, or refuses: it is tried again, later and later.
    pub const STORE_UNAVAILABLE: &str = "StoreUnavailable";
    /// Model, data or trainer are no longer what was checked: they are checked again.
    pub const INPUTS_CHANGED: &str = "InputsChanged";
    /// Another run has claimed the number of the version: the next free one is looked for.
    pub const VERSION_TAKEN: &str = "VersionTaken";
    /// The cluster will never take what the job asks for.
    pub const INVALID: &str = "Invalid";
    /// The operator can't read the object, or failed on it: the message says what to do.
    pub const UNREADABLE: &str = "Unreadable";
    /// The last attempt that `backoffLimit` allows has failed.
    pub const BACKOFF_LIMIT_EXCEEDED: &str = "BackoffLimitExceeded";
    /// The trainer found an error that a retry can't mend.
    pub const TRAINING_FAILED: &str = "TrainingFailed";
    /// The run took longer than `activeDeadlineSeconds`.
    pub const DEADLINE_EXCEEDED: &str = "DeadlineExceeded";
    /// No GpuClass serves what the job asks for.
    pub const NO_GPU_CLASS: &str = "NoGpuClass";
    /// `spec.suspend` is true.
    pub const SUSPENDED: &str = "Suspended";
    /// A run ended because the job's spec has changed.
    pub const SUPERSEDED: &str = "Superseded";
    /// A new version was published.
    pub const PUBLISHED: &str = "Published";
    /// The same inputs were trained before: that version serves.
    pub const REUSED: &str = "Reused";
    /// The artifact's files are as its manifest says.
    pub const VERIFIED: &str = "Verified";
    /// The artifact's files differ from its manifest.
    pub const REJECTED: &str = "Rejected";
    /// A gate of `spec.evaluation` failed: the version is published, but must not be served.
    pub const GATE_FAILED: &str = "GateFailed";
    /// The artifact is not where the record says.
    pub const MISSING: &str = "Missing";
}
