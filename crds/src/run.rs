//! The contract between operator and trainer: a [`RunSpec`] or [`VerifySpec`] goes into a pod as a JSON file, a
//! [`RunReport`] comes out as its termination message, and [`LiveProgress`] is what `/progress` answers meanwhile.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    adapter_version::{Artifact, DatasetRecord, Execution},
    evaluation::{Evaluation, Metrics},
    fine_tune_job::{Dataset, FineTuneJob, FineTuneJobSpec, Lora, MethodName, Progress, Quantization, Training},
    method::Method,
    uri::Uri,
};

/// Version of [`RunSpec`], [`VerifySpec`] and [`RunReport`]; a trainer refuses any other.
pub const SCHEMA_VERSION: u32 = 1;

/// The kubelet keeps this much of a termination message, in bytes.
pub const MAX_REPORT_BYTES: usize = 4096;

/// The task of a `preflight` or `train` pod.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RunSpec {
    /// [`SCHEMA_VERSION`].
    pub schema_version: u32,
    /// The job and its run.
    pub job: JobRef,
    /// Where the base model is.
    pub base_model: Uri,
    /// The digest that the user pinned it to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base_digest_pin: Option<String>,
    /// The training data.
    pub dataset: Dataset,
    /// How to train; None in a preflight whose job leaves it to Auto.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub method: Option<Method>,
    /// Options of LoRA, for a preflight whose job leaves the method to Auto.
    #[serde(default)]
    pub lora: Lora,
    /// The training loop.
    pub training: Training,
    /// The measurements after the last step.
    #[serde(default)]
    pub evaluation: Evaluation,
    /// Name of the adapter.
    pub adapter_name: String,
    /// Folder of the adapter's versions and checkpoints is `<output>/<adapterName>`.
    pub output: Uri,
    /// The part of a task that only a training pod has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub train: Option<TrainTask>,
}

/// The job and its run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct JobRef {
    /// Namespace of the FineTuneJob.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its UID.
    pub uid: String,
    /// Generation of its spec.
    pub generation: i64,
    /// Number of its run, from 1.
    pub run: u32,
}

/// The part of a task that only a training pod has.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct TrainTask {
    /// The version that it publishes.
    pub version: u32,
    /// Digest of all that decides the result.
    pub input_digest: String,
    /// As preflight found it; the training refuses inputs that changed since.
    pub base_digest: String,
    /// As preflight found it; the training refuses inputs that changed since.
    pub dataset_digest: String,
    /// The trainer's own image, for the record.
    pub trainer_image: String,
    /// Name of the cluster, for the claim that the run lays on its version; empty if nobody gave it one.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub cluster: String,
    /// The day that the chat template writes, where it writes one and the job pins none: that of the preflight.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template_date: Option<String>,
    /// Version of the arithmetic with which model and data were checked; another image may have another. 0: any.
    #[serde(default)]
    pub numerics_version: u32,
    /// The version of the same inputs that is copied; None to train.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub copy_of: Option<Artifact>,
}

impl FineTuneJobSpec {
    /// The methods that the job may be run with, for a base model that is stored like this: adapters over a base in few
    /// bits are QLoRA's, and else Auto weighs LoRA against QLoRA if it may quantize.
    pub fn methods(&self, stored_as: Option<&Quantization>) -> Vec<MethodName> {
        match self.method {
            MethodName::Auto if stored_as.is_some() => vec![MethodName::QLoRA],
            MethodName::Auto if self.quantization.is_some() => vec![MethodName::LoRA, MethodName::QLoRA],
            MethodName::Auto => vec![MethodName::LoRA],
            method => vec![method],
        }
    }

    /// The method with its options, as if the job had asked for `name`; None for Auto, and for QLoRA where neither the job
    /// nor the base model says how it is quantized.
    pub fn method_as(&self, name: MethodName, stored_as: Option<&Quantization>) -> Option<Method> {
        let lora = self.lora.clone().unwrap_or_default();
        match name {
            MethodName::Full => Some(Method::Full),
            MethodName::LoRA => Some(Method::LoRA { lora }),
            MethodName::QLoRA => {
                let asked = self.quantization.as_ref();
                let outlier_threshold = asked.and_then(|asked| asked.outlier_threshold);
                let quantization = Quantization { outlier_threshold, ..stored_as.or(asked)?.clone() };
                Some(Method::QLoRA { lora, quantization })
            }
            MethodName::Auto => None,
        }
    }
}

impl RunSpec {
    /// The preflight of a job's run.
    pub fn preflight(job: &FineTuneJob, run: u32) -> Self {
        let (spec, metadata) = (&job.spec, &job.metadata);
        Self {
            schema_version: SCHEMA_VERSION,
            job: JobRef {
                namespace: metadata.namespace.clone().unwrap_or_default(),
                name: metadata.name.clone().unwrap_or_default(),
                uid: metadata.uid.clone().unwrap_or_default(),
                generation: metadata.generation.unwrap_or_default(),
                run,
            },
            base_model: spec.base_model.uri.clone(),
            base_digest_pin: spec.base_model.digest.clone(),
            dataset: spec.dataset.clone(),
            method: spec.method_as(spec.method, None),
            lora: spec.lora.clone().unwrap_or_default(),
            training: spec.training.clone(),
            evaluation: spec.evaluation.clone(),
            adapter_name: spec.output.adapter_name.clone(),
            output: spec.output.uri.clone(),
            train: None,
        }
    }

    /// The training that follows this preflight.
    pub fn with_training(self, method: Method, task: TrainTask) -> Self {
        Self { method: Some(method), train: Some(task), ..self }
    }

    /// The same with all that its plan decides of the result: on `ranks` devices, which are GPUs or not.
    pub fn resolved(self, ranks: u32, on_gpus: bool) -> Self {
        Self { training: self.training.resolved(ranks, on_gpus), ..self }
    }

    /// Folder of the adapter: its versions `v1`, `v2`, … and its `checkpoints`.
    pub fn adapter_uri(&self) -> Uri {
        self.output.join(&self.adapter_name)
    }
}

/// The task of a `verify` pod.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct VerifySpec {
    /// [`SCHEMA_VERSION`].
    pub schema_version: u32,
    /// The files to compare with their manifest.
    pub artifact: Artifact,
}

/// The task of an `inspect` pod: versions that are read with the same credentials.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct InspectSpec {
    /// [`SCHEMA_VERSION`].
    pub schema_version: u32,
    /// The versions to look up, in this order.
    pub versions: Vec<Inspected>,
}

/// A version whose files are looked up.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Inspected {
    /// Name of the AdapterVersion.
    pub name: String,
    /// Its files.
    pub artifact: Artifact,
}

/// How a pod ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RunReport {
    /// [`SCHEMA_VERSION`].
    pub schema_version: u32,
    /// The outcome.
    pub outcome: Outcome,
}

/// The outcome of a pod's work.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind")]
pub enum Outcome {
    /// Model and data can be used.
    Preflight(PreflightReport),
    /// A version is published.
    Trained(TrainReport),
    /// The files were compared with the manifest.
    Verified(VerifyReport),
    /// The files of several versions were looked up.
    Inspected(InspectReport),
    /// SIGTERM came; a checkpoint of this step is complete.
    Preempted {
        /// Optimizer steps done.
        step: u64,
    },
    /// An error; the exit code says whether it is final ([`crate::names::exit_code`]).
    Failed {
        /// Says what is wrong and what to do, for the user. Never holds credentials.
        message: String,
    },
}

/// The findings of a preflight.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PreflightReport {
    /// Digest of the base model's files.
    pub base_digest: String,
    /// Digest, rows and tokens of the data. The digest covers training and evaluation rows.
    pub dataset: DatasetRecord,
    /// Number of evaluation rows.
    pub eval_rows: u64,
    /// Number of training rows that are longer than maxLength and lose their end.
    pub truncated_rows: u64,
    /// Number of training rows that are longer than maxLength and are left out.
    #[serde(default)]
    pub dropped_rows: u64,
    /// Number of training and evaluation rows that can't be used and are left out (dataset.onBadRow: Skip).
    #[serde(default)]
    pub skipped_rows: u64,
    /// Parts of model and data that are left out or changed, one sentence each.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
    /// The day that the chat template wrote. It is absent if the template writes no day, or if the job pins one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template_date: Option<String>,
    /// Number of optimizer steps that the run will make.
    pub total_steps: u64,
    /// Dimensions of the model, from which the planner estimates memory.
    pub model: ModelShape,
    /// Number of parameters that the job's LoRA options train: matrices, magnitudes, biases and whole modules. 0 if
    /// every parameter is trained.
    pub lora_parameters: u64,
    /// Version of the trainer's arithmetic. Another version may give other weights for the same inputs.
    pub numerics_version: u32,
    /// Highest version number that is in the output folder already, 0 if there is none.
    pub highest_version: u32,
    /// Digest of the probe, if a gate has one. A recall on record counts for the gates only if it was measured with
    /// the same probe.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub probe_digest: Option<String>,
}

/// Dimensions of a decoder language model.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ModelShape {
    /// Number of all parameters.
    pub parameters: u64,
    /// Number of decoder blocks.
    pub layers: u64,
    /// Width of the residual stream.
    pub hidden_size: u64,
    /// Width of the feed-forward layers.
    pub intermediate_size: u64,
    /// Number of entries of the vocabulary.
    pub vocab_size: u64,
    /// Bytes that a parameter takes in the file.
    pub bytes_per_parameter: u64,
    /// How bitsandbytes has stored the model, if in 4 or 8 bits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stored_as: Option<Quantization>,
}

/// The version that a training published.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TrainReport {
    /// Number of the version.
    pub version: u32,
    /// Folder of the version.
    pub uri: Uri,
    /// SHA-256 of the version's manifest.json, `sha256:…`.
    pub manifest_digest: String,
    /// Number of files, without manifest.json.
    pub file_count: u32,
    /// Size of all files together, in bytes, without manifest.json.
    pub size_bytes: u64,
    /// The data that it was trained on.
    pub dataset: DatasetRecord,
    /// Losses, recall and time, as the run measured them.
    pub metrics: Metrics,
    /// Devices and day of the run, which are no inputs.
    #[serde(default)]
    pub execution: Execution,
}

/// The findings of a verification.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct VerifyReport {
    /// Whether the files are as the manifest says.
    pub verdict: Verdict,
    /// Says what differs, for the user; empty if nothing does.
    pub message: String,
}

/// The findings of an inspection.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct InspectReport {
    /// Versions that it got to, from the first on.
    pub inspected: u32,
    /// Those of them with a fault.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub findings: Vec<Finding>,
}

/// A version whose files are not there as they were published.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Finding {
    /// Name of the AdapterVersion.
    pub name: String,
    /// Says what is wrong with it.
    pub verdict: Verdict,
    /// The first file that is gone or differs, and how.
    pub message: String,
}

/// Whether an artifact's files are as its manifest says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Verdict {
    /// They are.
    Intact,
    /// A file's size or digest differs.
    Corrupt,
    /// The manifest or a file is gone.
    Missing,
}

/// The answer of a training pod to `GET /progress`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LiveProgress {
    /// The phase that the pod is in.
    pub stage: TrainStage,
    /// How far it is.
    pub progress: Progress,
}

/// The phase of a training pod.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum TrainStage {
    /// Fetches model, data and checkpoint.
    #[default]
    Loading,
    /// Trains.
    Training,
    /// Measures the loss on the held-out rows, or asks the probe's questions.
    Evaluating,
    /// Writes the artifact.
    Publishing,
}

impl RunReport {
    /// A report of this version.
    pub fn new(outcome: Outcome) -> Self {
        Self { schema_version: SCHEMA_VERSION, outcome }
    }

    /// JSON of at most [`MAX_REPORT_BYTES`]; a failure's message is cut and a preflight's warnings are left out if need be.
    pub fn to_termination_message(&self) -> String {
        let json = serde_json::to_string(self).unwrap_or_default();
        match &self.outcome {
            Outcome::Failed { message } if json.len() > MAX_REPORT_BYTES => {
                // Every character may take 6 bytes when escaped.
                let short = message.chars().take(MAX_REPORT_BYTES / 6 - 64).chain(['…']).collect();
                serde_json::to_string(&Self::new(Outcome::Failed { message: short })).unwrap_or_default()
            }
            Outcome::Preflight(report) if json.len() > MAX_REPORT_BYTES => {
                let warnings = vec![format!("{} warnings, which the pod's log tells", report.warnings.len())];
                let short = Outcome::Preflight(PreflightReport { warnings, ..report.clone() });
                serde_json::to_string(&Self::new(short)).unwrap_or_default()
            }
            _ => json,
        }
    }

    /// Reads a termination message.
    ///
    /// # Errors
    /// If it is no report of this version, e.g. because the container was killed.
    pub fn from_termination_message(text: &str) -> Result<Self, ReportError> {
        let report: Self = serde_json::from_str(text)?;
        match report.schema_version {
            SCHEMA_VERSION => Ok(report),
            other => Err(ReportError::Version(other)),
        }
    }
}

/// Why a termination message is no report.
#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    /// Not JSON, or of another shape.
    #[error("not a run report: {0}")]
    Json(#[from] serde_json::Error),
    /// Another version.
    #[error(
        "run report has schemaVersion {0}, this operator reads {SCHEMA_VERSION}: use operator and trainer of one release"
    )]
    Version(u32),
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fine_tune_job::QuantizationType;

    #[test]
    fn a_long_failure_still_fits_the_termination_message() {
        let report = RunReport::new(Outcome::Failed { message: "\u{1}é".repeat(9000) });
        let text = report.to_termination_message();
        assert!(text.len() <= MAX_REPORT_BYTES, "{}", text.len());
        let Outcome::Failed { message } = RunReport::from_termination_message(&text).unwrap().outcome else { panic!() };
        assert!(message.ends_with('…'));
    }

    #[test]
    fn a_preflight_of_many_warnings_still_fits_the_termination_message() {
        let report = serde_json::json!({
            "baseDigest": "sha256:b", "dataset": {"digest": "sha256:d", "rows": 1, "tokens": 1}, "evalRows": 1,
            "truncatedRows": 0, "totalSteps": 1, "model": ModelShape::default(), "loraParameters": 1,
            "numericsVersion": 1, "highestVersion": 0, "warnings": vec!["é".repeat(1000); 9],
        });
        let report: PreflightReport = serde_json::from_value(report).unwrap();
        let text = RunReport::new(Outcome::Preflight(report.clone())).to_termination_message();
        assert!(text.len() <= MAX_REPORT_BYTES, "{}", text.len());
        let warnings = vec!["9 warnings, which the pod's log tells".to_owned()];
        let expected = Outcome::Preflight(PreflightReport { warnings, ..report });
        assert_eq!(RunReport::from_termination_message(&text).unwrap().outcome, expected);
    }

    #[test]
    fn a_base_that_is_stored_in_8_bits_keeps_the_jobs_outlier_threshold() {
        let quantization = |threshold: Option<f64>| Quantization {
            bits: 8,
            kind: QuantizationType::Int8,
            double_quant: false,
            outlier_threshold: threshold,
        };
        let spec = serde_json::json!({
            "baseModel": {"uri": "s3://models/m"}, "method": "QLoRA",
            "dataset": {"train": {"uri": "s3://datasets/t.jsonl"}, "evalFraction": 0.1},
            "output": {"adapterName": "a", "uri": "s3://adapters"},
        });
        let mut spec: FineTuneJobSpec = serde_json::from_value(spec).unwrap();
        spec.quantization = Some(quantization(Some(6.0)));
        let method = spec.method_as(MethodName::QLoRA, Some(&quantization(None)));
        let Some(Method::QLoRA { quantization, .. }) = method else { panic!() };
        assert_eq!(quantization.outlier_threshold, Some(6.0));
    }

    #[test]
    fn a_report_of_another_version_is_named() {
        let text = r#"{"schemaVersion":9,"outcome":{"kind":"Preempted","step":3}}"#;
        assert!(RunReport::from_termination_message(text).unwrap_err().to_string().contains("schemaVersion 9"));
        assert!(RunReport::from_termination_message("Killed").is_err());
    }
}
