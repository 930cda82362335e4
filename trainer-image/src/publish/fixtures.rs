//! A small published version, for tests.

use serde_json::json;
use tunesmith_crds::{
    FineTuneJob, Method, RunSpec, adapter_version::Artifact, evaluation::Metrics, fine_tune_job::Lora, run::TrainTask,
};

use super::{Manifest, seal};
use crate::{
    digest,
    layout::MANIFEST,
    store::{Role, Stores},
};

const DIGEST: &str = "sha256:1111111111111111111111111111111111111111111111111111111111111111";

/// A store with one version.
pub struct Bench {
    _folder: tempfile::TempDir,
    _runtime: tokio::runtime::Runtime,
    /// The store.
    pub stores: Stores,
    /// The version.
    pub artifact: Artifact,
}

/// What a run works on that publishes this version.
pub fn task(version: u32, copy_of: Option<Artifact>) -> TrainTask {
    TrainTask {
        version,
        input_digest: DIGEST.into(),
        base_digest: "sha256:base".into(),
        dataset_digest: "sha256:data".into(),
        trainer_image: "trainer:1".into(),
        cluster: String::new(),
        template_date: None,
        numerics_version: 1,
        copy_of,
    }
}

/// A run's task whose versions are wanted there.
pub fn spec(output: &str, task: TrainTask) -> RunSpec {
    let job: FineTuneJob = serde_json::from_value(json!({
        "apiVersion": "tunesmith.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "j", "namespace": "team", "uid": "u", "generation": 1},
        "spec": {
            "baseModel": {"uri": "s3://models/m"},
            "dataset": {"train": {"uri": "s3://data/t.jsonl"}},
            "output": {"adapterName": "support", "uri": output},
        },
    }))
    .unwrap();
    RunSpec::preflight(&job, task.version).with_training(Method::LoRA { lora: Lora::default() }, task)
}

/// Version 1 of two files under s3://old.
pub fn bench() -> Bench {
    let (desk, runtime) = (tempfile::tempdir().unwrap(), tokio::runtime::Runtime::new().unwrap());
    let stores = Stores::from_variables(runtime.handle().clone(), []).or_local(desk.path());
    let (task, method) = (task(1, None), Method::LoRA { lora: Lora::default() });
    let old = spec("s3://old", task.clone());
    let folder = stores.open(Role::Output, &old.adapter_uri().join("v1")).unwrap();
    let metrics = Metrics { eval_loss: Some(1.5), ..Default::default() };
    let dataset = serde_json::from_value(json!({"digest": "sha256:data", "rows": 1, "tokens": 2})).unwrap();
    let mut manifest = Manifest::new(&old, &task, &method, dataset, (metrics, Default::default()));
    for (name, bytes) in [("adapter_model.safetensors", vec![7; 100_000]), ("README.md", b"card".to_vec())] {
        manifest.files.push(digest::file_of_bytes(name, &bytes));
        folder.join(name).write(bytes).unwrap();
    }
    let report = seal(&folder, manifest, DIGEST).unwrap();
    let artifact = serde_json::from_value(json!({
        "type": "LoraAdapter", "uri": report.uri, "manifestUri": report.uri.join(MANIFEST),
        "manifestDigest": report.manifest_digest, "fileCount": 2, "sizeBytes": report.size_bytes,
    }));
    Bench { _folder: desk, _runtime: runtime, stores, artifact: artifact.unwrap() }
}
