//! [`AdapterVersion`]: the immutable record of one published result.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    evaluation::{GateResult, Metrics},
    fine_tune_job::{MethodName, SecretRef},
    method::Method,
    schema::{any_object, is_zero},
    uri::Uri,
};

/// Records one published result of a FineTuneJob. It outlives the job.
#[derive(CustomResource, KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "tunesmith.dev",
    version = "v1alpha1",
    kind = "AdapterVersion",
    namespaced,
    cel,
    doc = "AdapterVersion records one published result of a FineTuneJob. Its spec never changes, and it outlives the job.",
    status = "AdapterVersionStatus",
    derive = "PartialEq",
    shortname = "av",
    category = "tunesmith",
    printcolumn(name = "Adapter", type_ = "string", json_path = ".spec.adapterName"),
    printcolumn(name = "Version", type_ = "integer", json_path = ".spec.version"),
    printcolumn(name = "Phase", type_ = "string", json_path = ".status.phase"),
    printcolumn(name = "Method", type_ = "string", json_path = ".spec.method"),
    printcolumn(name = "Eval-Loss", type_ = "number", json_path = ".spec.metrics.evalLoss"),
    printcolumn(name = "URI", type_ = "string", json_path = ".spec.artifact.uri", priority = "1"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[x_kube(validation = Rule::new("self == oldSelf").message("an AdapterVersion's spec is immutable"))]
#[serde(rename_all = "camelCase")]
pub struct AdapterVersionSpec {
    /// Name of the adapter.
    #[schemars(length(min = 1, max = 50))]
    pub adapter_name: String,
    /// Number of the version, from 1.
    #[schemars(range(min = 1))]
    pub version: u32,
    /// The published files: where they are, and the digest of their manifest.
    pub artifact: Artifact,
    /// The model that was trained from. A server must load the adapter over the same model.
    pub base_model: BaseModelRecord,
    /// The data that was trained on.
    pub dataset: DatasetRecord,
    /// The method that was used: Full, LoRA or QLoRA.
    pub method: MethodName,
    /// Every option of the training, with defaults: the job's spec.lora, spec.quantization and spec.training.
    #[schemars(schema_with = "any_object")]
    pub hyperparameters: serde_json::Value,
    /// The job, the run and the trainer image that made this version.
    pub source: Source,
    /// Losses, recall and time, as its run measured them.
    pub metrics: Metrics,
    /// The gates that the version was held to when it was published. A gate that failed makes the version Rejected.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 8))]
    pub gates: Vec<GateResult>,
}

/// The published files.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Artifact {
    /// Kind of the files: LoraAdapter (a PEFT folder) or FullModel (a Hugging Face model folder).
    #[serde(rename = "type")]
    pub kind: ArtifactType,
    /// Folder of the files, with manifest.json.
    pub uri: Uri,
    /// Where manifest.json is. It lists every other file with its SHA-256 and size.
    pub manifest_uri: Uri,
    /// SHA-256 of manifest.json itself, as `sha256:…`.
    #[schemars(regex(pattern = "^sha256:[0-9a-f]{64}$"))]
    pub manifest_digest: String,
    /// Number of files, without manifest.json.
    pub file_count: u32,
    /// Size of all files together, in bytes, without manifest.json.
    pub size_bytes: u64,
    /// Secret of this namespace with which the files can be read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret_ref: Option<SecretRef>,
    /// ServiceAccount of this namespace with which the files can be read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service_account_name: Option<String>,
    /// IAM role that the ServiceAccount's token assumes to read the files.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub role_arn: Option<String>,
}

/// Kind of published files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ArtifactType {
    /// A PEFT LoRA folder.
    LoraAdapter,
    /// A Hugging Face model folder.
    FullModel,
}

impl Method {
    /// The type of the files that a run of this method publishes.
    pub fn artifact_type(&self) -> ArtifactType {
        match self {
            Self::Full => ArtifactType::FullModel,
            Self::LoRA { .. } | Self::QLoRA { .. } => ArtifactType::LoraAdapter,
        }
    }
}

/// One published file, as manifest.json lists it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ArtifactFile {
    /// Path in the artifact's folder.
    pub path: String,
    /// SHA-256 of the content, 64 hexadecimal digits.
    pub sha256: String,
    /// Size in bytes.
    pub size: u64,
}

/// The model that a version was trained from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct BaseModelRecord {
    /// Where the model was when it was trained from.
    pub uri: Uri,
    /// Digest of its files, `sha256:…`.
    pub digest: String,
}

/// The data that a version was trained on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DatasetRecord {
    /// Digest of training and evaluation data, `sha256:…`.
    pub digest: String,
    /// Number of training rows.
    pub rows: u64,
    /// Number of tokens in the training rows.
    pub tokens: u64,
    /// Number of training and evaluation rows that could not be used and were left out (dataset.onBadRow: Skip).
    #[serde(default, skip_serializing_if = "is_zero")]
    pub skipped_rows: u64,
}

/// The job, run and image that made a version.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Source {
    /// Name of the FineTuneJob.
    pub job: String,
    /// UID of the FineTuneJob.
    pub uid: String,
    /// Generation of the FineTuneJob's spec.
    pub generation: i64,
    /// Number of the FineTuneJob's run.
    pub run: u32,
    /// Digest of all inputs that decided the result: model, data, method and options. Inputs with the same digest are
    /// not trained twice.
    #[schemars(regex(pattern = "^sha256:[0-9a-f]{64}$"))]
    pub input_digest: String,
    /// Image of the trainer.
    pub trainer_image: String,
    /// Devices and day of the run. They are on record, and are no inputs.
    #[serde(default)]
    pub execution: Execution,
    /// Folder that the files were copied from. It is set if the same inputs had been trained and published there
    /// before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub copied_from: Option<Uri>,
}

/// How a run was executed: on record with its checkpoints and its version, and no input.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Execution {
    /// Kind of the devices that trained: cpu or cuda.
    pub device: String,
    /// Number of devices that shared the work.
    pub world_size: u32,
    /// The day that the chat template wrote. It is absent if the template writes no day, or if the job pinned one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub template_date: Option<String>,
}

/// Whether a version can be served.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct AdapterVersionStatus {
    /// One word for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub phase: Option<AdapterVersionPhase>,
    /// The generation that this status is about.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Ready: the version may be served. Reconciling: a pod verifies it. Stalled: nothing happens until you change
    /// something; the message says what is wrong.
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
    /// When the files were last compared with the manifest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub verified_time: Option<Time>,
    /// When the files were last looked up, each with its size. This happens only if the chart's value
    /// inspections.every is set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub inspected_time: Option<Time>,
}

/// Whether the version can be served. Verifying: a pod compares the files with the manifest. Available: all files are
/// right, and all gates passed. Rejected: a gate failed, or a file differs. Missing: the manifest or a file is gone.
/// Serve only Available versions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum AdapterVersionPhase {
    /// A pod compares the files with the manifest.
    Verifying,
    /// Every file is as the manifest says, and every gate passed.
    Available,
    /// A gate failed, or a file differs from the manifest: `Ready` says which.
    Rejected,
    /// The manifest or a file is gone.
    Missing,
}
