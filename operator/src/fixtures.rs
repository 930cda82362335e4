//! Values that several tests start from.

use std::{collections::BTreeMap, sync::Arc};

use k8s_openapi::{apimachinery::pkg::apis::meta::v1::Time, jiff::Timestamp};
use serde_json::{Value, json};
use tunesmith_crds::{
    AdapterVersion, AdapterVersionPhase, AdapterVersionStatus, FineTuneJob, FineTuneRunStatus, GpuClass,
    adapter_version::DatasetRecord,
    evaluation::Metrics,
    fine_tune_job::MethodName,
    fine_tune_run::{Attempt, RunStage, Settled, Trigger},
    run::{ModelShape, Outcome, PreflightReport, TrainReport},
};

use crate::{
    observed::Observed,
    plan::{Devices, Offers},
    run::{Object, Run, Work},
    runs::{build::new_run, settle::settled},
    workload::{Cause, CheckResources, Ending, JobState, Pods, Stage, TrainerDefaults, TrainerJob},
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
pub fn class(name: &str, spec: Value) -> Arc<GpuClass> {
    Arc::new(GpuClass::new(name, serde_json::from_value(spec).unwrap()))
}

/// Plain CPUs for LoRA.
pub fn cpu() -> Arc<GpuClass> {
    class("cpu", json!({"methods": [{"method": "LoRA", "gpus": 0}]}))
}

/// A job on a cluster with plain CPUs, and nothing else.
pub fn observed(job: FineTuneJob) -> Observed {
    Observed {
        job,
        runs: BTreeMap::new(),
        unreadable: Vec::new(),
        versions: Vec::new(),
        reserved: 0,
        offers: Offers { classes: vec![cpu()], nodes: Vec::new(), devices: Devices { cuda: true } },
    }
}

/// What all trainer pods have in common.
pub fn trainer_defaults() -> TrainerDefaults {
    TrainerDefaults {
        image: "trainer:1".into(),
        pull_policy: "IfNotPresent".into(),
        arch: "amd64".into(),
        cluster: "west".into(),
        checks: CheckResources { memory: "2Gi".into(), cpu_limit: None, ephemeral_storage: None },
    }
}

/// A run that serves the job's spec and has done nothing yet.
pub fn run(job: &FineTuneJob, number: u32) -> Run {
    let object = new_run(job, number, Trigger::Generation, &trainer_defaults());
    Run {
        object: Object {
            namespace: "team".into(),
            name: object.metadata.name.unwrap_or_default(),
            uid: format!("uid-run-{number}"),
            resource_version: "1".into(),
        },
        created: at(0),
        spec: object.spec,
        record: FineTuneRunStatus::default(),
        work: Work::None,
    }
}

/// A job with a run that serves its spec.
pub fn observed_run(job: FineTuneJob, change: impl FnOnce(&mut Run)) -> Observed {
    let mut run = run(&job, 1);
    change(&mut run);
    Observed { runs: [(1, run)].into(), ..observed(job) }
}

/// The same, with a preflight that has passed.
pub fn observed_checked(job: FineTuneJob, change: impl FnOnce(&mut Run)) -> Observed {
    observed_run(job, |run| {
        check_ended(run, passed());
        change(run);
    })
}

/// The same, settled on a version and with an attempt under way, whose Job's pods get so far.
pub fn observed_training(job: FineTuneJob, pods: Pods) -> Observed {
    observed_checked(job, |run| {
        settle(run, 1, "sha256:x");
        train(run, pods);
    })
}

/// The same, with a published version 1.
pub fn observed_published(job: FineTuneJob) -> Observed {
    observed_checked(job, |run| {
        settle(run, 1, "sha256:x");
        attempt_ended(run, trained(1));
    })
}

/// The run's try to check ends.
pub fn check_ended(run: &mut Run, cause: Cause) {
    let number = run.record.check.as_ref().map_or(0, |check| check.number) + 1;
    let name = format!("j-1-preflight-{number}");
    run.record.check = Some(entry(number, &name));
    run.work = there(ended(trainer_job(&name, Stage::Preflight), cause));
    run.record = settled(run, at(100));
    run.work = Work::None;
}

/// The run's next attempt is under way, and its pods get so far.
pub fn train(run: &mut Run, pods: Pods) {
    let number = run.record.last_attempt + 1;
    let name = format!("j-1-{number}");
    run.record.last_attempt = number;
    run.record.stage = Some(RunStage::Training);
    run.record.attempts.push(entry(number, &name));
    run.work = there(with_pods(trainer_job(&name, Stage::Train), pods));
}

/// The run's next attempt begins and ends.
pub fn attempt_ended(run: &mut Run, cause: Cause) {
    train(run, Pods::Missing);
    let Work::There { job, .. } = run.work.clone() else { panic!("the attempt has a Job") };
    run.work = there(ended(*job, cause));
    run.record = settled(run, at(100));
    run.work = Work::None;
}

/// The run is settled on a version for these inputs.
pub fn settle(run: &mut Run, version: u32, input_digest: &str) {
    let spec = &run.spec.job_spec;
    run.record.settled = Some(Settled {
        input_digest: input_digest.into(),
        version,
        method: spec.method_as(MethodName::LoRA, None).unwrap(),
        training: spec.training.resolved(1, false),
        copy_of: None,
    });
}

fn entry(number: u32, name: &str) -> Attempt {
    Attempt {
        number,
        job_uid: Some(format!("uid-{name}")),
        decided: Time(at(0)),
        started: None,
        ended: None,
        cause: None,
        message: None,
        gpus: 0,
        image_id: None,
    }
}

/// A Job that is there.
pub fn there(job: TrainerJob) -> Work {
    Work::There { job: Box::new(job), refusal: None, live: None }
}

/// An active trainer Job without pods.
pub fn trainer_job(name: &str, stage: Stage) -> TrainerJob {
    TrainerJob {
        name: name.into(),
        uid: format!("uid-{name}"),
        stage,
        deleting: false,
        suspended: false,
        state: JobState::Active { pods: Pods::Missing, last_failure: None },
    }
}

/// The same with pods.
pub fn with_pods(job: TrainerJob, pods: Pods) -> TrainerJob {
    TrainerJob { state: JobState::Active { pods, last_failure: None }, ..job }
}

/// The same, over after 100 seconds.
pub fn ended(job: TrainerJob, cause: Cause) -> TrainerJob {
    let ending =
        Ending { cause, started: Some(Time(at(10))), finished: Time(at(100)), image_id: None, outlived: false };
    TrainerJob { state: JobState::Ended(ending), ..job }
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
        file_count: 8,
        size_bytes: 42,
        dataset: DatasetRecord { digest: "sha256:data".into(), rows: 10, tokens: 1000, skipped_rows: 0 },
        metrics: Metrics { steps: 400, eval_loss: Some(1.5), ..Metrics::default() },
        execution: Default::default(),
    }
}

/// A training that published this version.
pub fn trained(version: u32) -> Cause {
    Cause::done(Outcome::Trained(train_report(version)))
}

/// A record of the adapter, made from these inputs.
pub fn version(number: u32, input_digest: &str, phase: Option<AdapterVersionPhase>) -> AdapterVersion {
    let report = train_report(number);
    let spec = json!({
        "adapterName": "support",
        "version": number,
        "artifact": {
            "type": "LoraAdapter", "uri": report.uri, "manifestUri": report.uri.join("manifest.json"),
            "manifestDigest": report.manifest_digest, "fileCount": 8, "sizeBytes": 42, "secretRef": {"name": "s3"},
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
