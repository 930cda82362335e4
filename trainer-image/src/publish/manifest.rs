//! `manifest.json`: what a version consists of, and where it comes from.

use serde::{Deserialize, Serialize};
use tunesmith_crds::{
    Method, RunSpec, Uri,
    adapter_version::{ArtifactFile, ArtifactType, BaseModelRecord, DatasetRecord, Execution, Source},
    evaluation::{GateResult, Metrics},
    fine_tune_job::MethodName,
    run::{TrainReport, TrainTask},
};

use crate::digest;

/// Version of its format.
const SCHEMA_VERSION: u32 = 1;

/// A version's files and lineage.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Manifest {
    schema_version: u32,
    adapter_name: String,
    version: u32,
    #[serde(rename = "type")]
    kind: ArtifactType,
    base_model: BaseModelRecord,
    /// What it was trained on.
    pub dataset: DatasetRecord,
    method: MethodName,
    hyperparameters: serde_json::Value,
    /// What made it.
    pub source: Source,
    /// What was measured.
    pub metrics: Metrics,
    /// What it was held to.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub gates: Vec<GateResult>,
    /// Every file but this one.
    pub files: Vec<ArtifactFile>,
}

impl Manifest {
    /// The manifest of a run's version, still without files.
    pub fn new(
        spec: &RunSpec,
        task: &TrainTask,
        method: &Method,
        dataset: DatasetRecord,
        (metrics, execution): (Metrics, Execution),
    ) -> Self {
        Self {
            schema_version: SCHEMA_VERSION,
            adapter_name: spec.adapter_name.clone(),
            version: task.version,
            kind: method.artifact_type(),
            base_model: BaseModelRecord { uri: spec.base_model.clone(), digest: task.base_digest.clone() },
            dataset,
            method: method.name(),
            hyperparameters: method.hyperparameters(&spec.training),
            source: Source {
                job: spec.job.name.clone(),
                uid: spec.job.uid.clone(),
                generation: spec.job.generation,
                run: spec.job.run,
                input_digest: task.input_digest.clone(),
                trainer_image: task.trainer_image.clone(),
                execution,
                copied_from: task.copy_of.as_ref().map(|copied| copied.uri.clone()),
            },
            gates: spec.evaluation.judge(&metrics),
            metrics,
            files: Vec::new(),
        }
    }

    /// Reads a manifest.
    ///
    /// # Errors
    /// It is none, or one of another release.
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        let manifest: Self = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
        match manifest.schema_version {
            SCHEMA_VERSION => Ok(manifest),
            other => Err(format!("schemaVersion is {other}, this release reads {SCHEMA_VERSION}")),
        }
    }

    /// The file's content.
    pub fn to_json(&self) -> Vec<u8> {
        let json = serde_json::to_value(self).unwrap_or_default();
        format!("{json:#}\n").into_bytes()
    }

    /// What the trainer reports of a version with this manifest, whose file holds `bytes`.
    pub fn report(&self, folder: &Uri, bytes: &[u8]) -> TrainReport {
        TrainReport {
            version: self.version,
            uri: folder.clone(),
            manifest_digest: digest::of_bytes(bytes),
            file_count: u32::try_from(self.files.len()).unwrap_or(u32::MAX),
            size_bytes: self.files.iter().map(|file| file.size).sum(),
            dataset: self.dataset.clone(),
            metrics: self.metrics.clone(),
            execution: self.source.execution.clone(),
        }
    }
}
