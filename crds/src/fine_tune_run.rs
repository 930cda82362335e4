//! [`FineTuneRun`]: the operator's own record of one pass from inputs to a version.
//!
//! Its spec says what the run serves and never changes. Its status is the truth about the run: what is to be done is
//! written here first, then done. Jobs and pods count by the UIDs that stand here, and what stood in them is copied here
//! when they end, so that they may be deleted.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    adapter_version::Artifact,
    fine_tune_job::{FineTuneJobSpec, Plan, Training},
    method::Method,
    run::{PreflightReport, TrainReport},
    schema::{any_object, is_zero},
};

/// Attempts that a record keeps; of older ones the sums remain.
pub const KEPT_ATTEMPTS: usize = 20;

/// One pass of a FineTuneJob from its inputs to an AdapterVersion, over one or more attempts.
#[derive(CustomResource, KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "tunesmith.dev",
    version = "v1alpha1",
    kind = "FineTuneRun",
    namespaced,
    cel,
    doc = "FineTuneRun is the operator's record of one run of a FineTuneJob. The operator alone writes it.",
    status = "FineTuneRunStatus",
    derive = "PartialEq",
    shortname = "ftr",
    category = "tunesmith",
    printcolumn(name = "Job", type_ = "string", json_path = ".spec.job.name"),
    printcolumn(name = "Trigger", type_ = "string", json_path = ".spec.trigger"),
    printcolumn(name = "Stage", type_ = "string", json_path = ".status.stage"),
    printcolumn(name = "Result", type_ = "string", json_path = ".status.reason"),
    printcolumn(name = "Attempt", type_ = "integer", json_path = ".status.lastAttempt"),
    printcolumn(name = "Class", type_ = "string", json_path = ".status.plan.gpuClass"),
    printcolumn(name = "Version", type_ = "string", json_path = ".status.adapterVersion"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(name = "Message", type_ = "string", json_path = ".status.message", priority = "1")
)]
#[x_kube(validation = Rule::new("self == oldSelf").message("a FineTuneRun's spec is immutable"))]
#[serde(rename_all = "camelCase")]
pub struct FineTuneRunSpec {
    /// The FineTuneJob that this is a run of.
    pub job: RunOf,
    /// Number of the run, from 1.
    #[schemars(range(min = 1))]
    pub number: u32,
    /// Why it was started: Generation (the job is new, or its spec has changed) or Retry (its annotation
    /// tunesmith.dev/retry-at asked for another run).
    pub trigger: Trigger,
    /// The trainer's image for all pods of this run. It does not change when the operator is upgraded.
    #[schemars(length(min = 1, max = 1024))]
    pub image: String,
    /// The job's spec as it was when the run began, with all defaults.
    #[schemars(schema_with = "any_object")]
    pub job_spec: FineTuneJobSpec,
}

/// The job of a run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RunOf {
    /// Name of the FineTuneJob.
    pub name: String,
    /// UID of the FineTuneJob.
    pub uid: String,
    /// Generation of the FineTuneJob's spec that this is a run of.
    pub generation: i64,
}

/// Why a run was started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Trigger {
    /// The job is new, or its spec has changed.
    #[default]
    Generation,
    /// The user asked for another try with the annotation tunesmith.dev/retry-at.
    Retry,
}

/// The state of a run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct FineTuneRunStatus {
    /// How far it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stage: Option<RunStage>,
    /// How the run ended, in one sentence. Before the end: why the last attempt failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// How the run ended, in one word: Published, Reused, or why it led to no version that may be served, such as
    /// PreflightFailed or GateFailed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Ready: the run led to an available version. Reconciling: it is under way. Stalled: it failed.
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
    /// The last preflight.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub check: Option<Attempt>,
    /// How many preflights have failed.
    #[serde(skip_serializing_if = "is_zero_u32")]
    pub check_failures: u32,
    /// The findings of the preflight that passed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub preflight: Option<PreflightReport>,
    /// The version, method and training options of the run. They are fixed by the preflight that passed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub settled: Option<Settled>,
    /// The request of the last attempt to the cluster.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub plan: Option<Plan>,
    /// Number of the last attempt, from 1.
    #[serde(skip_serializing_if = "is_zero_u32")]
    pub last_attempt: u32,
    /// The last 20 attempts, oldest first.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 20))]
    pub attempts: Vec<Attempt>,
    /// How many attempts have failed. More than spec.backoffLimit of the job end the run.
    #[serde(skip_serializing_if = "is_zero_u32")]
    pub failures: u32,
    /// How many attempts in a row were preempted or evicted within a minute of their start. The operator waits longer
    /// after each.
    #[serde(skip_serializing_if = "is_zero_u32")]
    pub short_disruptions: u32,
    /// Seconds for which the pods of finished attempts have run.
    #[serde(skip_serializing_if = "is_zero")]
    pub seconds: u64,
    /// GPU-seconds that the pods of finished attempts have held.
    #[serde(skip_serializing_if = "is_zero")]
    pub gpu_seconds: u64,
    /// The version that was published, with its files and metrics.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub published: Option<TrainReport>,
    /// Name of the AdapterVersion that the run led to. If the same inputs were trained before, it is that version.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub adapter_version: Option<String>,
    /// When the run ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub completion_time: Option<Time>,
}

/// How far the run is: Checking (a pod checks model and data), Admitting (the next attempt waits for a GpuClass, or
/// for the delay after a failure), Training (an attempt runs, or waits for quota or a node), Publishing (the
/// AdapterVersion is about to be recorded), Recorded (its files are verified) or Done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum RunStage {
    /// A pod checks model and data.
    #[default]
    Checking,
    /// The next attempt waits for a GpuClass, or for its time.
    Admitting,
    /// An attempt is under way, or waits for quota or a node.
    Training,
    /// The version is published and is to be recorded.
    Publishing,
    /// The version is recorded and is being verified.
    Recorded,
    /// Nothing more is done.
    Done,
}

/// All that decides a run's result besides the job's spec.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Settled {
    /// Digest of all inputs that decide the result: model, data, method and options.
    pub input_digest: String,
    /// Lowest version number that the run may publish. The trainer takes the next one that no other run has claimed.
    pub version: u32,
    /// The method with its options.
    #[schemars(schema_with = "any_object")]
    pub method: Method,
    /// The training options, with globalBatchSize and bf16 as the plan decided them.
    #[schemars(schema_with = "any_object")]
    pub training: Training,
    /// The version of the same inputs that is copied to the output instead of training. If copying fails, the run
    /// trains.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub copy_of: Option<Artifact>,
}

/// A Job of the run: a try to check, or an attempt to train.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Attempt {
    /// Number of the attempt, from 1.
    pub number: u32,
    /// UID of its Kubernetes Job, once that Job is known to exist.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub job_uid: Option<String>,
    /// When the operator decided on the attempt, just before it created the Job.
    pub decided: Time,
    /// When its first container started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started: Option<Time>,
    /// When the attempt ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended: Option<Time>,
    /// How it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cause: Option<Cause>,
    /// Why the attempt ended without a result.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// Number of GPUs that its pods hold together.
    #[serde(default, skip_serializing_if = "is_zero_u32")]
    pub gpus: u32,
    /// Digest of the trainer's image that the pod ran.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_id: Option<String>,
}

/// How the attempt ended: Done, Disrupted (preempted, evicted or suspended), StoreUnavailable, Failed (retried up to
/// backoffLimit), InputsChanged or VersionTaken (model and data are checked again), Final (an error that would come
/// again) or DeadlineExceeded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum Cause {
    /// With a report of what it did.
    Done,
    /// From outside (preemption, eviction, a lost node, suspension): another attempt follows, and this one does not count.
    Disrupted,
    /// The store did not answer, or refused: it may answer later.
    StoreUnavailable,
    /// With an error after which another attempt may do better.
    Failed,
    /// Model, data or trainer are no longer what was checked: they are checked again.
    InputsChanged,
    /// Another run has claimed its version: the next free number is looked for.
    VersionTaken,
    /// With an error that would come again.
    Final,
    /// activeDeadlineSeconds were over.
    DeadlineExceeded,
}

fn is_zero_u32(count: &u32) -> bool {
    *count == 0
}

impl FineTuneRunStatus {
    /// The attempt that is not over.
    pub fn active(&self) -> Option<&Attempt> {
        self.attempts.last().filter(|attempt| attempt.cause.is_none())
    }

    /// Whether nothing more is done.
    pub fn is_done(&self) -> bool {
        self.stage == Some(RunStage::Done)
    }
}
