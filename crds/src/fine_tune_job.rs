//! [`FineTuneJob`]: what a user asks for, and how far it is.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use crate::lr_schedule::{DecayType, LrScheduler, LrSchedulerKwargs};
pub use crate::method::{Lora, LoraBias, MethodName, Quantization, QuantizationType};
pub use crate::training::{OnNonFinite, Optim, Overflow, Training};
use crate::{
    evaluation::{Evaluation, GateResult},
    schema::{MAX_ROLE_ARN, QUANTITY, defaults, is_name, is_quantity, is_role_arn, is_zero, rule},
    uri::Uri,
};

/// Fine-tunes a language model on a data set and publishes the result as an AdapterVersion.
#[derive(CustomResource, KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "tunesmith.dev",
    version = "v1alpha1",
    kind = "FineTuneJob",
    namespaced,
    cel,
    doc = "FineTuneJob fine-tunes a language model on a data set and publishes the result as an AdapterVersion.",
    status = "FineTuneJobStatus",
    derive = "PartialEq",
    shortname = "ftj",
    category = "tunesmith",
    printcolumn(name = "Phase", type_ = "string", json_path = ".status.phase"),
    printcolumn(name = "Method", type_ = "string", json_path = ".spec.method"),
    printcolumn(name = "Class", type_ = "string", json_path = ".status.plan.gpuClass"),
    printcolumn(name = "Progress", type_ = "string", json_path = ".status.progress.summary"),
    printcolumn(name = "Version", type_ = "string", json_path = ".status.latestVersion"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(name = "Message", type_ = "string", json_path = ".status.message", priority = "1"),
    validation = Rule::new("self.metadata.name.matches(r'^[a-z0-9]([-a-z0-9]*[a-z0-9])?$') && self.metadata.name.size() <= 40")
        .message("metadata.name must be a DNS label of at most 40 characters: Jobs and pods are named after it")
)]
#[x_kube(
    validation = Rule::new("self.method != 'QLoRA' || has(self.quantization)")
        .message("method QLoRA needs quantization, e.g. {bits: 4, type: nf4}").field_path(".quantization"),
    validation = Rule::new("!has(self.quantization) || self.method in ['QLoRA', 'Auto']")
        .message("quantization is for method QLoRA or Auto only").field_path(".quantization"),
    validation = Rule::new("self.method != 'Full' || !has(self.lora)")
        .message("method Full trains every parameter and takes no lora").field_path(".lora"),
    validation = Rule::new("has(self.output.serviceAccountName) || !(has(self.baseModel.roleArn) || has(self.dataset.roleArn) || has(self.output.roleArn))")
        .message("a role is assumed with the token of a ServiceAccount: set output.serviceAccountName").field_path(".output.serviceAccountName")
)]
#[serde(rename_all = "camelCase")]
pub struct FineTuneJobSpec {
    /// The model that training starts from.
    pub base_model: BaseModel,
    /// The rows to train on, and the rows to measure the loss on.
    pub dataset: Dataset,
    /// The method. Full trains every weight. LoRA trains small matrices beside a frozen base model. QLoRA does the
    /// same over a base model stored in 4 or 8 bits. Auto takes LoRA if the base model fits the memory of an offered
    /// GpuClass, else QLoRA if the job sets quantization; over a base model that is stored in few bits it takes
    /// QLoRA.
    #[serde(default)]
    pub method: MethodName,
    /// Options of methods LoRA and QLoRA. Each option that is left out has its default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lora: Option<Lora>,
    /// How method QLoRA stores the frozen base model. Method QLoRA needs it. With method Auto it permits QLoRA where
    /// LoRA does not fit. A base model that bitsandbytes has stored in few bits is used as it is stored.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quantization: Option<Quantization>,
    /// Options of the training loop. They have the names of Hugging Face's TrainingArguments.
    #[serde(default)]
    pub training: Training,
    /// The GpuClass, CPU, memory and storage of the training pods. Default: the smallest GpuClass that offers the
    /// method and fits.
    #[serde(default)]
    pub resources: Resources,
    /// Name of the adapter, and the bucket that its versions are published to.
    pub output: Output,
    /// Gates: bounds that a version must reach before it may be served.
    #[serde(default)]
    pub evaluation: Evaluation,
    /// True ends the pods after a checkpoint and starts no others. False goes on from that checkpoint.
    #[serde(default)]
    pub suspend: bool,
    /// How many failed attempts are retried before the job fails. Attempts that were preempted or evicted do not
    /// count. Raise it for a store or a network that fails often.
    #[serde(default = "defaults::backoff_limit")]
    #[schemars(range(min = 0, max = 100))]
    pub backoff_limit: i32,
    /// Seconds that a run may take over all its attempts; then it fails. Default: no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 31_536_000))]
    pub active_deadline_seconds: Option<i64>,
    /// How many finished FineTuneRuns are kept besides the newest. Older ones are deleted; their AdapterVersions
    /// stay.
    #[serde(default = "defaults::run_history_limit")]
    #[schemars(range(min = 0, max = 100))]
    pub run_history_limit: u32,
}

/// The model to start from.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[x_kube(validation = Rule::new("!self.uri.startsWith('hf://datasets/')")
    .message("a base model is hf://owner/name; hf://datasets/ holds data").field_path(".uri"),
    validation = Rule::new("!has(self.roleArn) || self.uri.startsWith('s3://')")
    .message("roleArn is for s3:// alone").field_path(".roleArn"))]
#[serde(rename_all = "camelCase")]
pub struct BaseModel {
    /// Where the model is. It is a Hugging Face folder (config.json, safetensors in one file or in shards,
    /// tokenizer.json, tokenizer_config.json) or a GGUF file (.gguf). It may lie in S3 (`s3://bucket/folder`), Google
    /// Cloud Storage (`gs://bucket/folder`) or Azure Blob Storage (`az://container/folder`), on the Hugging Face Hub
    /// (`hf://owner/name`, `hf://owner/name@revision`), or in a volume (`pvc://claim/folder`).
    pub uri: Uri,
    /// Pins the model: preflight fails if the digest of its files is another one. status.run.baseDigest shows the
    /// digest of a model that was checked. Default: any files are taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = "^sha256:[0-9a-f]{64}$"))]
    pub digest: Option<String>,
    /// Secret with the credentials for the model. Keys for s3://: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY,
    /// AWS_ENDPOINT_URL, AWS_REGION. For gs://: GOOGLE_SERVICE_ACCOUNT_KEY (JSON). For az://:
    /// AZURE_STORAGE_ACCOUNT_NAME, and AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN. For hf://: HF_TOKEN if
    /// the model is private or gated, HF_ENDPOINT for a mirror. Default: output.secretRef, unless roleArn is set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret_ref: Option<SecretRef>,
    /// IAM role with which the pods read an s3:// model, instead of the role in the ServiceAccount's annotation. The
    /// pods assume it with the token of output.serviceAccountName. Default: output.roleArn, unless secretRef is set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = MAX_ROLE_ARN), extend("x-kubernetes-validations" = is_role_arn()))]
    pub role_arn: Option<String>,
}

/// The name of a Secret in the job's namespace. Only the job's pods read it, never the operator.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SecretRef {
    /// Name of the Secret.
    #[schemars(length(min = 1, max = 253), extend("x-kubernetes-validations" = is_name()))]
    pub name: String,
}

/// The rows to train on, and the rows to measure the loss on.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[x_kube(validation = Rule::new("has(self.eval) != has(self.evalFraction)")
    .message("give exactly one of eval.uri and evalFraction"),
    validation = Rule::new("!has(self.roleArn) || self.train.uri.startsWith('s3://') && (!has(self.eval) || self.eval.uri.startsWith('s3://'))")
    .message("roleArn is for s3:// alone").field_path(".roleArn"))]
#[serde(rename_all = "camelCase")]
pub struct Dataset {
    /// The training rows: JSON (one object a line, or one list), CSV, Parquet or Arrow. JSON and CSV may be
    /// compressed with gzip or zstd.
    pub train: DataSource,
    /// Rows that are not trained on, in the same formats. The eval loss is measured on them. Give either this or
    /// evalFraction.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eval: Option<DataSource>,
    /// Share of the training rows that is held out to measure the eval loss, between 0 and 1. training.seed decides
    /// which rows. Give either this or eval.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-kubernetes-validations" = rule("self > 0.0 && self < 1.0", "must lie between 0 and 1")))]
    pub eval_fraction: Option<f64>,
    /// Shape of a row. Auto looks at the columns of the first row. Messages: `{"messages": [{"role", "content"}]}`.
    /// ShareGPT: `{"conversations": [{"from", "value"}]}`. PromptCompletion: `{"prompt", "completion"}`. Alpaca:
    /// `{"instruction", "input", "output"}`. Text: `{"text"}`. Set it if Auto takes the wrong one.
    #[serde(default)]
    pub format: DataFormat,
    /// Names of columns in your files, by the names that the format expects: `{prompt: question, completion:
    /// answer}`. Set it if your columns have other names.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 32, "x-kubernetes-validations" = rule(&format!(
        "self.all(name, name in ['{}'] && self[name].size() >= 1 && self[name].size() <= 253)", COLUMNS.join("', '")
    ), "the names on the left are the format's columns, such as prompt, completion or messages; on the right, the files' own")))]
    pub columns: BTreeMap<String, String>,
    /// Sets what happens if rows can't be used. Error: the job fails, and the message names the first ten rows. Skip:
    /// these rows are left out and counted.
    #[serde(default)]
    pub on_bad_row: OnBadRow,
    /// Jinja chat template that turns messages into text, instead of the base model's own. A template with {%
    /// generation %} marks what is trained.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 65_536))]
    pub chat_template: Option<String>,
    /// The day, such as 2026-11-27, that a chat template writes with `strftime_now` or `date_string`. Default: the
    /// day on which the run begins. Set it if you want the same inputs on every day.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = "^[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])$"), extend("format" = "date"))]
    pub template_date: Option<String>,
    /// True trains on the assistant's turns alone (Messages, ShareGPT), or on the completion alone (PromptCompletion,
    /// Alpaca). False trains on every token. Text rows are always trained whole.
    #[serde(default = "defaults::yes")]
    pub assistant_only_loss: bool,
    /// Secret with the credentials for the data, with the keys of baseModel.secretRef. For hf://datasets/: HF_TOKEN
    /// if the data set is private or gated, HF_ENDPOINT for a mirror. Default: output.secretRef, unless roleArn is
    /// set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret_ref: Option<SecretRef>,
    /// IAM role with which the pods read s3:// data, as baseModel.roleArn does for the model. Default:
    /// output.roleArn, unless secretRef is set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = MAX_ROLE_ARN), extend("x-kubernetes-validations" = is_role_arn()))]
    pub role_arn: Option<String>,
}

/// Files of rows.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[x_kube(validation = Rule::new("!self.uri.startsWith('hf://') || self.uri.startsWith('hf://datasets/')")
    .message("data is read from s3://, gs://, az://, pvc://, file:// or hf://datasets/owner/name").field_path(".uri"))]
#[serde(rename_all = "camelCase")]
pub struct DataSource {
    /// Where the file is. `*` stands for any characters within one part of the path, and `**` for any number of
    /// folders: `s3://datasets/support/part-*.jsonl` is every such file, in the order of their names.
    /// `hf://datasets/owner/name` is the train split of a data set on the Hugging Face Hub, and
    /// `hf://datasets/owner/name@revision/path` names files of it.
    pub uri: Uri,
}

/// Every column that a format knows, by its own name.
pub const COLUMNS: [&str; 15] = [
    "messages",
    "conversations",
    "system",
    "tools",
    "functions",
    "chat_template_kwargs",
    "prompt",
    "completion",
    "instruction",
    "input",
    "output",
    "context",
    "response",
    "history",
    "text",
];

/// Shape of a data row.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum DataFormat {
    /// As the first row's columns say.
    #[default]
    Auto,
    /// `{"messages": [{"role", "content"}]}`.
    Messages,
    /// `{"prompt", "completion"}`: texts, or lists of messages.
    PromptCompletion,
    /// `{"text"}`.
    Text,
    /// `{"conversations": [{"from", "value"}]}`, from human, gpt or system.
    ShareGPT,
    /// `{"instruction", "input", "output"}`; input may be left out.
    Alpaca,
}

/// The treatment of rows that can't be used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum OnBadRow {
    /// The data is refused.
    #[default]
    Error,
    /// They are left out and counted.
    Skip,
}

/// GpuClass, CPU, memory and storage of the training pods.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Resources {
    /// Name of the GpuClass to run on. Default: the smallest class that offers the method, fits the estimated memory
    /// and has devices that the trainer can use.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 63), extend("x-kubernetes-validations" = is_name()))]
    pub gpu_class: Option<String>,
    /// Number of training pods; either all of them start or none. Default: as the GpuClass says for the method.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1024))]
    pub pods: Option<u32>,
    /// GPUs of each pod. Default: as the GpuClass says for the method.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 64))]
    pub gpus_per_pod: Option<u32>,
    /// CPU request of a training pod, as a Kubernetes quantity. Default: cpuLimit if it is set, else 1. Raise it to
    /// train faster on CPUs.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-kubernetes-validations" = is_quantity("500m or 4")))]
    #[schemars(length(min = 1, max = 32), regex(pattern = QUANTITY))]
    pub cpu: Option<String>,
    /// CPU limit of a training pod, as a Kubernetes quantity. Default: no limit. Set it if a ResourceQuota of the
    /// namespace counts CPU limits.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-kubernetes-validations" = is_quantity("4")))]
    #[schemars(length(min = 1, max = 32), regex(pattern = QUANTITY))]
    pub cpu_limit: Option<String>,
    /// Storage of the node that a training pod requests and may use at most, as a Kubernetes quantity. It holds the
    /// model, a checkpoint and the result, which is some four times the model. Default: nothing is requested. Set it
    /// if a ResourceQuota counts it, or if nodes have little storage.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-kubernetes-validations" = is_quantity("64Gi")))]
    #[schemars(length(min = 1, max = 32), regex(pattern = QUANTITY))]
    pub ephemeral_storage: Option<String>,
    /// Memory request and limit of a training pod, as a Kubernetes quantity. Default: an estimate from the model, the
    /// method and the training options. Raise it if a pod was killed for memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-kubernetes-validations" = is_quantity("4Gi")))]
    #[schemars(length(min = 1, max = 32), regex(pattern = QUANTITY))]
    pub memory: Option<String>,
}

/// Name of the adapter, and the bucket that its versions are published to.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[x_kube(validation = Rule::new("!self.uri.startsWith('hf://') && !self.uri.startsWith('pvc://')")
    .message("versions are published to s3://bucket/folder, gs://bucket/folder or az://container/folder").field_path(".uri"),
    validation = Rule::new("!self.uri.contains('*')")
    .message("versions are published to one folder: leave out the '*'").field_path(".uri"),
    validation = Rule::new("!has(self.roleArn) || self.uri.startsWith('s3://')")
    .message("roleArn is for s3:// alone").field_path(".roleArn"))]
#[serde(rename_all = "camelCase")]
pub struct Output {
    /// Name of the adapter, a DNS label. Its versions are AdapterVersions `<adapterName>-v1`, `<adapterName>-v2`, …
    #[schemars(length(min = 1, max = 50))]
    #[schemars(extend("x-kubernetes-validations" = rule("self.matches(r'^[a-z0-9]([-a-z0-9]*[a-z0-9])?$')", "must be a DNS label: lower-case letters, digits and '-', no '-' at either end")))]
    pub adapter_name: String,
    /// Folder that versions are published under, in s3://, gs:// or az://. Files of a version go to
    /// `<uri>/<adapterName>/v<version>/`.
    pub uri: Uri,
    /// Secret with the credentials for the output, with the keys of baseModel.secretRef. Model and data use it too,
    /// unless they name their own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret_ref: Option<SecretRef>,
    /// ServiceAccount of the job's pods. Set it to use a cloud identity instead of keys. On GKE the Secret must say
    /// GOOGLE_USE_METADATA_SERVER=true, on AKS AZURE_STORAGE_ACCOUNT_NAME. The ServiceAccount's Kubernetes token is
    /// not mounted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253), extend("x-kubernetes-validations" = is_name()))]
    pub service_account_name: Option<String>,
    /// IAM role with which the pods write versions and checkpoints to s3://. The pods assume it with the token that
    /// EKS mounts for serviceAccountName (IAM roles for service accounts), so the role must trust that
    /// ServiceAccount.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = MAX_ROLE_ARN), extend("x-kubernetes-validations" = is_role_arn()))]
    pub role_arn: Option<String>,
}

/// The state of a job.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct FineTuneJobStatus {
    /// One word for what the job does now.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub phase: Option<FineTuneJobPhase>,
    /// Says in one sentence what the job does now, or why it waits or failed and what to change.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// The generation of the spec that this status is about.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Ready: the version is available. Reconciling: the operator or a pod is at work. Stalled: nothing happens until
    /// you change something. PreflightPassed: model and data were checked. QuotaReserved: the cluster gave the pods
    /// their place. PodsReady: the training pods run. Published: the files are complete and recorded.
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
    /// The current or last run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub run: Option<RunStatus>,
    /// Steps, losses and speed of the training.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub progress: Option<Progress>,
    /// The resources that the run asks the cluster for, with the estimates that it follows from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub plan: Option<Plan>,
    /// Name of the newest AdapterVersion that this job led to and that passed its gates.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub latest_version: Option<String>,
    /// Each gate with the value that was measured for the current run's version.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub gates: Vec<GateResult>,
    /// The last 10 runs that ended, newest first.
    pub history: Vec<RunRecord>,
}

/// The present state of the job: Pending (nothing started), Preflight (a pod checks model and data), Queued (waits for
/// quota, admission or a node), Starting, Running (trains), Publishing (writes and verifies the files), Succeeded,
/// Failed or Suspended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum FineTuneJobPhase {
    /// Nothing was started yet.
    Pending,
    /// A pod checks model and data.
    Preflight,
    /// Waits for quota, admission or a node.
    Queued,
    /// Pods are scheduled, and their containers start.
    Starting,
    /// Training.
    Running,
    /// All steps are done; the artifact is written and verified.
    Publishing,
    /// An AdapterVersion is available.
    Succeeded,
    /// Ended without a version that may be served: `message` says why.
    Failed,
    /// `spec.suspend` is true.
    Suspended,
}

/// The current or last run: one pass from inputs to a version, over one or more attempts.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct RunStatus {
    /// Number of the run, from 1. A changed spec starts the next run.
    pub number: u32,
    /// Number of the attempt within the run, from 1; 0 before the first.
    pub attempt: u32,
    /// Attempts that failed and count against backoffLimit.
    pub failures: u32,
    /// Digest of all inputs that decide the result: model, data, method and options. Inputs with the same digest are
    /// not trained twice.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub input_digest: Option<String>,
    /// Digest of the base model's files. Copy it to spec.baseModel.digest to pin the model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub base_digest: Option<String>,
    /// When the run began.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub start_time: Option<Time>,
    /// When the run ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub completion_time: Option<Time>,
    /// GPU-seconds that the pods of the run have held, over all attempts.
    pub gpu_seconds: i64,
}

/// Steps, losses and speed of the training.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Progress {
    /// Steps done and steps in all, `step/totalSteps`, for `kubectl get`.
    pub summary: String,
    /// Optimizer steps done.
    pub step: u64,
    /// Optimizer steps in all.
    pub total_steps: u64,
    /// Passes over the data done.
    pub epoch: f64,
    /// Steps whose update was left out because their loss or gradient was NaN or infinite (onNonFinite: Skip).
    #[serde(skip_serializing_if = "is_zero")]
    pub skipped_steps: u64,
    /// Mean loss of a trained token over the last logged steps, in nats.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loss: Option<f64>,
    /// Mean loss of an evaluation token, in nats.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eval_loss: Option<f64>,
    /// Tokens trained in a second. Tokens count as the data has them, without padding.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokens_per_second: Option<f64>,
    /// Estimated seconds until the last step, at the present speed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eta_seconds: Option<u64>,
}

/// The request of a run to the cluster, and the estimates that it follows from.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Plan {
    /// The method that is used (what Auto chose).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub method: Option<MethodName>,
    /// Name of the GpuClass.
    pub gpu_class: String,
    /// Number of training pods.
    pub pods: u32,
    /// GPUs of each pod.
    pub gpus_per_pod: u32,
    /// Estimated memory of all devices of the run together, as a Kubernetes quantity.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub estimated_memory: Option<String>,
    /// Number of parameters that are trained.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trainable_parameters: Option<u64>,
    /// Size of the published weights, as a Kubernetes quantity.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub adapter_size: Option<String>,
}

/// A run that ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RunRecord {
    /// Number of the run.
    pub number: u32,
    /// Succeeded or Failed.
    pub phase: FineTuneJobPhase,
    /// Attempts that it took; 0 if a version was reused.
    pub attempts: u32,
    /// Name of the AdapterVersion that it led to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// When it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub completion_time: Option<Time>,
}

impl FineTuneJobSpec {
    /// The PersistentVolumeClaims that `pvc://` URIs name.
    pub fn claims(&self) -> BTreeSet<&str> {
        let Dataset { train, eval, .. } = &self.dataset;
        let data = [Some(train), eval.as_ref()].into_iter().flatten().map(|source| &source.uri);
        let probe = self.evaluation.probe().map(|probe| &probe.uri);
        [&self.base_model.uri].into_iter().chain(data).chain(probe).filter_map(Uri::claim).collect()
    }
}
