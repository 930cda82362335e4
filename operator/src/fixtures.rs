//! Values that several tests start from.

use std::collections::BTreeMap;

use k8s_openapi::{apimachinery::pkg::apis::meta::v1::Time, jiff::Timestamp};
use serde_json::{Value, json};
use tunesmith_crds::{
    AdapterVersion, AdapterVersionPhase, AdapterVersionStatus, FineTuneJob, GpuClass, RunSpec,
    adapter_version::{ArtifactFile, DatasetRecord, Metrics},
    fine_tune_job::MethodName,
    run::{ModelShape, Outcome, PreflightReport, TrainReport, TrainTask},
};

use crate::{
    controller::observed::{Named, Observed, Run},
    plan::Offers,
    trainer::{Cause, Ending, JobState, Pods, Stage, TrainerJob},
};

/// A LoRA job named `j` for the adapter `support`, with changes to its spec merged in.
pub fn job(changes: Value) -> FineTuneJob {
    let mut spec = json!({
        "baseModel": {"uri": "s3://models/m"},
        "dataset": {"train": {"uri": "s3://data/t.jsonl"}, "evalFraction": 0.1},
        "method": "LoRA",
        "output": {"adapterName": "support", "uri": "s3://adapters", "secretRef": {"name": "s3"}},
        "backoffLimit": 1,
    });
    for (key, value) in changes.as_object().into_iter().flatten() {
        spec[key] = value.clone();
    }
    serde_json::from_value(json!({
        "apiVersion": "tunesmith.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "j", "namespace": "team", "uid": "uid-j", "generation": 1},
        "spec": spec,
    }))
    .unwrap()
}

/// A GpuClass; `spec` as in YAML.
pub fn class(name: &str, spec: Value) -> GpuClass {
    GpuClass::new(name, serde_json::from_value(spec).unwrap())
}

/// Plain CPUs for LoRA.
pub fn cpu() -> GpuClass {
    class("cpu", json!({"methods": [{"method": "LoRA", "gpus": 0}]}))
}

/// A job on a cluster with plain CPUs, and nothing else.
pub fn observed(job: FineTuneJob) -> Observed {
    Observed {
        job,
        runs: BTreeMap::new(),
        versions: Vec::new(),
        reserved: 0,
        offers: Offers { classes: vec![cpu()], nodes: Vec::new() },
        refusal: None,
        live: None,
    }
}

/// The same, with a run that serves the job's spec.
pub fn observed_run(job: FineTuneJob, change: impl FnOnce(&mut Run)) -> Observed {
    let mut run = Run { number: 1, spec: Some(job.spec.clone()), ..Run::default() };
    run.config_maps = vec![Named { name: "j-1-preflight".into(), uid: "uid-config".into() }];
    change(&mut run);
    Observed { runs: [(1, run)].into(), ..observed(job) }
}

/// The same, with a preflight that has passed.
pub fn observed_checked(job: FineTuneJob, change: impl FnOnce(&mut Run)) -> Observed {
    observed_run(job, |run| {
        run.preflight = Some(ended(trainer_job("j-1-preflight", Stage::Preflight, 0), passed()));
        change(run);
    })
}

/// An active trainer Job without pods.
pub fn trainer_job(name: &str, stage: Stage, attempt: u32) -> TrainerJob {
    TrainerJob {
        name: name.into(),
        uid: format!("uid-{name}"),
        stage,
        attempt,
        created: at(0),
        deleting: false,
        plan: None,
        state: JobState::Active { pods: Pods::Missing, last_failure: None },
    }
}

/// The same with pods.
pub fn with_pods(job: TrainerJob, pods: Pods) -> TrainerJob {
    TrainerJob { state: JobState::Active { pods, last_failure: None }, ..job }
}

/// The same, over after 100 seconds.
pub fn ended(job: TrainerJob, cause: Cause) -> TrainerJob {
    let ending = Ending { cause, started: Some(Time(at(10))), finished: Time(at(100)) };
    TrainerJob { state: JobState::Ended { ending, recorded: true }, ..job }
}

/// Attempt `number` of run 1.
pub fn attempt(number: u32) -> TrainerJob {
    trainer_job(&format!("j-1-{number}"), Stage::Train, number)
}

/// A failure that may be tried again.
pub fn failed(message: &str) -> Cause {
    Cause::Failed { message: message.into() }
}

/// What a preflight that passes reports.
pub fn preflight_report() -> PreflightReport {
    PreflightReport {
        base_digest: "sha256:base".into(),
        dataset: DatasetRecord { digest: "sha256:data".into(), rows: 10, tokens: 1000, skipped_rows: 0 },
        eval_rows: 1,
        truncated_rows: 0,
        dropped_rows: 0,
        skipped_rows: 0,
        warnings: Vec::new(),
        template_date: None,
        total_steps: 400,
        model: ModelShape {
            parameters: 1 << 20,
            layers: 2,
            hidden_size: 64,
            intermediate_size: 128,
            vocab_size: 1000,
            bytes_per_parameter: 2,
            stored_as: None,
        },
        lora_parameters: 4096,
        numerics_version: 1,
        highest_version: 0,
        probe_digest: None,
    }
}

/// A preflight that passes.
pub fn passed() -> Cause {
    Cause::done(Outcome::Preflight(preflight_report()))
}

/// What a training of this version reports.
pub fn train_report(version: u32) -> TrainReport {
    TrainReport {
        version,
        uri: format!("s3://adapters/support/v{version}").parse().unwrap(),
        manifest_digest: format!("sha256:{}", "0".repeat(64)),
        files: vec![ArtifactFile { path: "adapter_model.safetensors".into(), sha256: "0".repeat(64), size: 42 }],
        dataset: DatasetRecord { digest: "sha256:data".into(), rows: 10, tokens: 1000, skipped_rows: 0 },
        metrics: Metrics { steps: 400, eval_loss: Some(1.5), ..Metrics::default() },
        execution: Default::default(),
    }
}

/// A training that published this version.
pub fn trained(version: u32) -> Cause {
    Cause::done(Outcome::Trained(train_report(version)))
}

/// What the attempts of a run that has reserved `version` work on.
pub fn task(job: &FineTuneJob, run: u32, version: u32, input_digest: &str) -> RunSpec {
    let method = job.spec.method_as(MethodName::LoRA, None).unwrap();
    RunSpec::preflight(job, run).resolved(1, false).with_training(
        method,
        TrainTask {
            version,
            input_digest: input_digest.into(),
            base_digest: "sha256:base".into(),
            dataset_digest: "sha256:data".into(),
            trainer_image: "trainer:1".into(),
            template_date: None,
        },
    )
}

/// A record of the adapter, made from these inputs.
pub fn version(number: u32, input_digest: &str, phase: Option<AdapterVersionPhase>) -> AdapterVersion {
    let report = train_report(number);
    let spec = json!({
        "adapterName": "support",
        "version": number,
        "artifact": {
            "type": "LoraAdapter", "uri": report.uri, "manifestDigest": report.manifest_digest, "sizeBytes": 42,
            "files": report.files,
        },
        "baseModel": {"uri": "s3://models/m", "digest": "sha256:base"},
        "dataset": report.dataset,
        "method": "LoRA",
        "hyperparameters": {},
        "source": {
            "job": "j", "uid": "uid-j", "generation": 1, "run": 1, "inputDigest": input_digest, "trainerImage": "t",
        },
        "metrics": report.metrics,
    });
    let mut version = AdapterVersion::new(&format!("support-v{number}"), serde_json::from_value(spec).unwrap());
    version.metadata.namespace = Some("team".into());
    version.metadata.uid = Some(format!("uid-support-v{number}"));
    version.status = phase.map(|phase| AdapterVersionStatus { phase: Some(phase), ..Default::default() });
    version
}

/// So many seconds after the start of time.
pub fn at(second: i64) -> Timestamp {
    Timestamp::from_second(second).unwrap()
}
