//! `run` on a manifest, with folders instead of S3.

use std::fs;

use tempfile::TempDir;
use tokio::runtime::Runtime;
use tunesmith_crds::run::{Outcome, TrainReport};

use super::{run, summary};
use crate::{
    error::Error,
    progress::Progress,
    store::Stores,
    tiny_model,
    train::{Context, Stop},
};

const MANIFEST: &str = "
apiVersion: tunesmith.dev/v1alpha1
kind: FineTuneJob
metadata: {name: support}
spec:
  baseModel: {uri: s3://models/tiny}
  dataset: {train: {uri: s3://datasets/support/train.jsonl}, evalFraction: 0.2}
  method: LoRA
  training: {maxSteps: 3, warmupSteps: 0, learningRate: 0.01}
  output: {adapterName: support, uri: s3://adapters}
";

fn desk() -> TempDir {
    let desk = tempfile::tempdir().unwrap();
    tiny_model::write(&desk.path().join("store/models/tiny")).unwrap();
    let rows: String =
        (0..8).map(|i| format!("{{\"prompt\": \"{i} + 1 =\", \"completion\": \" {}\"}}\n", i + 1)).collect();
    fs::write(desk.path().join("train.jsonl"), rows).unwrap();
    desk
}

fn run_manifest(desk: &TempDir, manifest: &str) -> Result<Outcome, Error> {
    let path = desk.path().join("job.yaml");
    fs::write(&path, manifest).unwrap();
    let runtime = Runtime::new().unwrap();
    let stores = Stores::from_environment(runtime.handle().clone()).or_local(&desk.path().join("store"));
    let (progress, stop) = (Progress::new(), Stop::default());
    let context = Context { stores: &stores, work: &desk.path().join("work"), progress: &progress, stop: &stop };
    let outcome = run(&path, context)?;
    assert!(summary(&outcome, &stores).unwrap().contains("store/adapters/support/v"));
    Ok(outcome)
}

fn published(desk: &TempDir, manifest: &str) -> TrainReport {
    match run_manifest(desk, manifest).unwrap() {
        Outcome::Trained(report) => report,
        other => panic!("not trained: {other:?}"),
    }
}

#[test]
fn the_same_manifest_trains_once_and_a_changed_one_makes_the_next_version() {
    let desk = desk();
    let first = published(&desk, MANIFEST);
    assert_eq!((first.version, first.metrics.steps), (1, 3));
    assert_eq!(published(&desk, MANIFEST), first);
    let second = published(&desk, &MANIFEST.replace("maxSteps: 3", "maxSteps: 4"));
    assert_eq!(second.version, 2);
    assert_eq!(published(&desk, MANIFEST), first, "the first version still serves its inputs");
    let files: Vec<_> = first.files.iter().map(|file| file.path.as_str()).collect();
    let expected =
        ["README.md", "adapter_config.json", "adapter_model.safetensors", "loss_curve.svg", "trainer_state.json"];
    assert_eq!(files, expected);
}

#[test]
fn a_missing_model_is_explained_with_the_place_where_it_belongs() {
    let error = run_manifest(&desk(), &MANIFEST.replace("models/tiny", "models/other")).unwrap_err();
    assert_eq!(error.exit_code(), 3);
    assert!(error.to_string().contains("store/models/other") && error.to_string().contains("convert"), "{error}");
}

#[test]
fn missing_data_is_named_by_its_uri() {
    let error = run_manifest(&desk(), &MANIFEST.replace("train.jsonl", "absent.jsonl")).unwrap_err();
    assert_eq!(error.exit_code(), 3);
    assert!(error.to_string().contains("no such object s3://datasets/support/absent.jsonl (dataset)"), "{error}");
}

#[test]
fn a_malformed_row_is_named_by_file_and_number() {
    let desk = desk();
    let path = desk.path().join("train.jsonl");
    let rows = fs::read_to_string(&path).unwrap();
    fs::write(&path, rows.replace("{\"prompt\": \"6", "{\"promt\": \"6")).unwrap();
    let error = run_manifest(&desk, MANIFEST).unwrap_err();
    assert_eq!(error.exit_code(), 3);
    assert_eq!(error.to_string(), "train.jsonl row 7: prompt is missing");
}
