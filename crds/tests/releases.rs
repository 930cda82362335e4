//! A run keeps the trainer's image that it began with, also under an operator of the next release. So that image must read
//! what the newer operator writes, and the newer operator what that image reports: `tests/release` holds both as the first
//! release has them.

use serde_json::{Value, json};
use tunesmith_crds::{
    FineTuneJob, Method, RunSpec,
    fine_tune_job::Lora,
    run::{Outcome, RunReport, SCHEMA_VERSION, TrainTask, VerifySpec},
};

fn job() -> FineTuneJob {
    serde_json::from_value(json!({
        "apiVersion": "tunesmith.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "j", "namespace": "team", "uid": "u", "generation": 1},
        "spec": {
            "baseModel": {"uri": "s3://models/m"},
            "dataset": {"train": {"uri": "s3://data/t.jsonl"}},
            "output": {"adapterName": "support", "uri": "s3://adapters"},
        },
    }))
    .unwrap()
}

fn release(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}

const ADVICE: &str = "the image of the release before refuses a field that it doesn't know: leave out a new one while it has \
                      its default, so that runs which began before read the same as ever";

#[test]
fn the_task_of_a_run_without_new_options_reads_as_in_the_first_release() {
    let check = RunSpec::preflight(&job(), 1);
    assert_eq!(json!(check), release(include_str!("release/preflight.json")), "{ADVICE}");
    let task = TrainTask {
        version: 1,
        input_digest: "sha256:inputs".into(),
        base_digest: "sha256:base".into(),
        dataset_digest: "sha256:data".into(),
        trainer_image: "trainer@sha256:1".into(),
        cluster: String::new(),
        template_date: None,
        numerics_version: 4,
        copy_of: None,
    };
    let train = check.resolved(1, false).with_training(Method::LoRA { lora: Lora::default() }, task);
    assert_eq!(json!(train), release(include_str!("release/train.json")), "{ADVICE}");
}

#[test]
fn the_task_of_a_verification_reads_as_in_the_first_release() {
    let verify: VerifySpec = serde_json::from_str(include_str!("release/verify.json")).unwrap();
    assert_eq!(json!(verify), release(include_str!("release/verify.json")), "{ADVICE}");
    assert_eq!(verify.schema_version, SCHEMA_VERSION);
}

#[test]
fn reports_of_the_first_release_are_read() {
    for report in release(include_str!("release/reports.json")).as_array().unwrap() {
        let read = RunReport::from_termination_message(&report.to_string()).unwrap();
        assert!(!matches!(read.outcome, Outcome::Failed { .. }) || report["outcome"]["kind"] == "Failed");
        let kind = report["outcome"]["kind"].as_str().unwrap();
        assert_eq!(json!(read)["outcome"]["kind"], kind);
    }
}
