//! Labels, annotations and object names that operator, e2e tests and users select by.

/// API group.
pub const GROUP: &str = "tunesmith.dev";
/// Label: name of the FineTuneJob that an object belongs to.
pub const JOB_LABEL: &str = "tunesmith.dev/job";
/// Label: number of the run, from 1.
pub const RUN_LABEL: &str = "tunesmith.dev/run";
/// Label: number of the attempt within the run, from 1.
pub const ATTEMPT_LABEL: &str = "tunesmith.dev/attempt";
/// Label: which of the trainer's subcommands a pod runs (`preflight`, `train`, `copy`, `verify`, `inspect`).
pub const STAGE_LABEL: &str = "tunesmith.dev/stage";
/// Label: adapterName, on AdapterVersions.
pub const ADAPTER_LABEL: &str = "tunesmith.dev/adapter";
/// Annotation of an AdapterVersion: a time from when on its files are compared with their manifest once more.
pub const VERIFY_ANNOTATION: &str = "tunesmith.dev/verify-at";
/// Annotation of a FineTuneJob that has failed: any new value (a time, by convention) starts another run of the same spec.
pub const RETRY_ANNOTATION: &str = "tunesmith.dev/retry-at";
/// Port on which a trainer pod serves `/progress`, `/metrics` and `/healthz`.
pub const TRAINER_PORT: u16 = 8080;

/// Annotation of a trainer pod with its task, which it sees under [`RUN_SPEC_PATH`].
pub const RUN_SPEC_ANNOTATION: &str = "tunesmith.dev/run";
/// Where a trainer pod finds its [`crate::RunSpec`].
pub const RUN_SPEC_PATH: &str = "/etc/tunesmith/run.json";
/// Where a trainer pod leaves its [`crate::RunReport`]: the kubelet makes it the container's termination message.
pub const REPORT_PATH: &str = "/dev/termination-log";
/// The trainer pods' only writable folder: model and data caches, sockets, temporary files.
pub const WORK_DIR: &str = "/work";

/// Where a trainer pod finds the volumes of `pvc://` URIs, each in a folder named after its claim; read-only.
pub const CLAIMS_DIR: &str = "/claims";

/// Environment prefixes under which the tenant's Secrets (keys `AWS_ACCESS_KEY_ID`, `GOOGLE_SERVICE_ACCOUNT_KEY`,
/// `AZURE_STORAGE_ACCOUNT_KEY`, `HF_TOKEN`, …) reach a trainer pod, one prefix a role, so that one pod can hold three.
/// A variable without its prefix is the fallback.
pub mod env_prefix {
    /// Reads the base model.
    pub const MODEL: &str = "TUNESMITH_MODEL_";
    /// Reads the data set.
    pub const DATASET: &str = "TUNESMITH_DATASET_";
    /// Reads and writes artifacts and checkpoints.
    pub const OUTPUT: &str = "TUNESMITH_OUTPUT_";
    /// Reads the version that is copied.
    pub const COPIED: &str = "TUNESMITH_COPIED_";
}

/// After a prefix, the environment variable of the IAM role to assume.
pub const ROLE_ARN: &str = "AWS_ROLE_ARN";

/// Name of an [`crate::AdapterVersion`]: one object a version, so creating it twice is a conflict, not a duplicate.
pub fn adapter_version(adapter: &str, version: u32) -> String {
    format!("{adapter}-v{version}")
}

/// Exit codes of the trainer. 0 is success; 2 and 3 are final; 4, 5 and 143 are tried again, 7 and 8 from the preflight on.
pub mod exit_code {
    /// The RunSpec or the manifest can't be served: final.
    pub const BAD_SPEC: i32 = 2;
    /// Model or data can't be used: final.
    pub const BAD_INPUT: i32 = 3;
    /// The object store failed: tried again.
    pub const STORAGE: i32 = 4;
    /// A peer of a multi-pod run was lost: tried again.
    pub const PEER_LOST: i32 = 5;
    /// A gate failed. For `run` alone: in a pod the training is done, and the operator judges.
    pub const GATE_FAILED: i32 = 6;
    /// Model, data or the trainer's arithmetic are no longer what preflight saw: they are checked again.
    pub const INPUTS_CHANGED: i32 = 7;
    /// Another run has claimed the version: the next free number is looked for.
    pub const VERSION_TAKEN: i32 = 8;
    /// SIGTERM: checkpointed, tried again without counting against `backoffLimit`.
    pub const PREEMPTED: i32 = 143;
}
