//! The objects that a run asks for: pure, and the same for the same record.

use std::collections::BTreeMap;

use k8s_openapi::{
    api::{
        batch::v1::{Job, JobSpec},
        core::v1::{Affinity, NodeAffinity, NodeSelector, ResourceRequirements},
    },
    apimachinery::pkg::{
        api::resource::Quantity,
        apis::meta::v1::{ObjectMeta, OwnerReference},
    },
};
use kube::{Resource, ResourceExt};
use serde_json::json;
use tunesmith_crds::{
    AdapterVersion, AdapterVersionSpec, FineTuneJob, FineTuneJobSpec, FineTuneRun, FineTuneRunSpec, FineTuneRunStatus,
    RunSpec,
    adapter_version::{Artifact, BaseModelRecord, Source},
    fine_tune_job::SecretRef,
    fine_tune_run::{RunOf, Trigger},
    names::{self, env_prefix},
};

use crate::{
    apply::Change,
    labels,
    plan::Planned,
    run::Run,
    runs::{
        advance::Step,
        task::{check_spec, task_spec},
    },
    workload::{Stage, TrainerDefaults, TrainerPod},
};

/// CPU of a training pod, if the user doesn't say.
const TRAIN_CPU: &str = "1";

/// The changes to the cluster that a step means, for a run whose record says `record`.
pub fn build(
    step: &Step,
    job: &FineTuneJob,
    run: &Run,
    record: &FineTuneRunStatus,
    trainer: &TrainerDefaults,
) -> Vec<Change> {
    let trainer = &TrainerDefaults { image: image_of(run, record), ..trainer.clone() };
    match step {
        Step::CreateCheck => {
            let check = record.check.iter();
            check.map(|check| Change::CreateJob(Box::new(check_job(job, run, check.number, trainer)))).collect()
        }
        Step::CreateAttempt(planned) => {
            let (Some(task), Some(attempt)) = (task_spec(job, run, record, trainer), record.attempts.last()) else {
                return Vec::new();
            };
            let deadline = job
                .spec
                .active_deadline_seconds
                .map(|seconds| seconds.saturating_sub(i64::try_from(record.seconds).unwrap_or(i64::MAX)).max(1));
            let pod = match task.train.as_ref().and_then(|task| task.copy_of.as_ref()) {
                Some(copied) => copying_pod(run, attempt.number, &task, copied, trainer),
                None => training_pod(job, run, attempt.number, &task, planned, trainer),
            };
            let pod = TrainerPod { deadline, ..pod };
            vec![Change::CreateJob(Box::new(attempt_job(run, attempt.number, pod, record)))]
        }
        Step::Admit { name, uid } => vec![Change::Admit { name: name.clone(), uid: uid.clone() }],
        Step::DeleteJob { name, uid } => vec![Change::DeleteJob { name: name.clone(), uid: uid.clone() }],
        Step::CreateVersion => {
            let version = adapter_version(job, run, record, trainer);
            version.into_iter().map(|version| Change::CreateVersion(Box::new(version))).collect()
        }
    }
}

/// The image of a run's pods: the one that the check ran, by its digest, so that a tag that moves on changes no attempt. An
/// image that no registry knows by that digest goes by its name.
fn image_of(run: &Run, record: &FineTuneRunStatus) -> String {
    let image = &run.spec.image;
    let (folder, file) = image.rsplit_once('/').map_or(("", image.as_str()), |(folder, file)| (folder, file));
    let file = file.split(['@', ':']).next().unwrap_or(file);
    let repository = if folder.is_empty() { file.to_owned() } else { format!("{folder}/{file}") };
    let ran = record.check.as_ref().and_then(|check| check.image_id.as_deref()).unwrap_or_default();
    match ran.rsplit_once("://").map_or(ran, |(_, id)| id).split_once('@') {
        Some((place, digest)) if is_place_of(place, &repository) => format!("{repository}@{digest}"),
        _ => image.clone(),
    }
}

/// Whether a repository is the one that a short name means.
fn is_place_of(place: &str, repository: &str) -> bool {
    ["", "docker.io/", "docker.io/library/"].iter().any(|prefix| place == format!("{prefix}{repository}"))
}

/// The record of the job's next run.
pub fn new_run(job: &FineTuneJob, number: u32, trigger: Trigger, trainer: &TrainerDefaults) -> FineTuneRun {
    let spec = FineTuneRunSpec {
        job: RunOf {
            name: job.name_any(),
            uid: job.uid().unwrap_or_default(),
            generation: job.metadata.generation.unwrap_or_default(),
        },
        number,
        trigger,
        image: trainer.image.clone(),
        job_spec: job.spec.clone(),
    };
    let mut run = FineTuneRun::new(&run_name(job, number), spec);
    run.metadata.namespace = job.namespace();
    run.metadata.labels = Some(
        [
            (labels::MANAGED_BY.into(), labels::OPERATOR.into()),
            (names::JOB_LABEL.into(), job.name_any()),
            (names::ADAPTER_LABEL.into(), job.spec.output.adapter_name.clone()),
            (names::RUN_LABEL.into(), number.to_string()),
        ]
        .into(),
    );
    run.metadata.owner_references = job.controller_owner_ref(&()).map(|owner| vec![owner]);
    run
}

/// Name of a run's record.
pub fn run_name(job: &FineTuneJob, number: u32) -> String {
    format!("{}-{number}", job.name_any())
}

/// Name of the Job of a try to check.
pub fn check_name(run: &Run, number: u32) -> String {
    format!("{}-preflight-{number}", run.object.name)
}

/// Name of the Job of an attempt to train.
pub fn attempt_name(run: &Run, number: u32) -> String {
    format!("{}-{number}", run.object.name)
}

/// One try, and no other by the Job controller: what became of it is for the record.
fn check_job(job: &FineTuneJob, run: &Run, number: u32, trainer: &TrainerDefaults) -> Job {
    let labels = labels_of(run, Stage::Preflight);
    let spec = &run.spec.job_spec;
    let task = json!(check_spec(run, job)).to_string();
    let pod = TrainerPod {
        secrets: secrets(spec),
        roles: roles(spec),
        claims: spec.claims(),
        service_account_name: spec.output.service_account_name.as_deref(),
        ..TrainerPod::small(Stage::Preflight, trainer, labels.clone(), task)
    };
    Job {
        metadata: metadata(run, &check_name(run, number), labels),
        spec: Some(JobSpec {
            backoff_limit: Some(0),
            pod_replacement_policy: Some("Failed".into()),
            template: pod.template(),
            ..Default::default()
        }),
        status: None,
    }
}

fn training_pod<'a>(
    job: &FineTuneJob,
    run: &'a Run,
    number: u32,
    task: &RunSpec,
    planned: &Planned,
    trainer: &'a TrainerDefaults,
) -> TrainerPod<'a> {
    let spec = &run.spec.job_spec;
    let has_gpus = planned.plan.gpus_per_pod > 0;
    TrainerPod {
        stage: Stage::Train,
        trainer,
        labels: attempt_labels(run, Stage::Train, number),
        task: json!(task).to_string(),
        secrets: secrets(spec),
        roles: roles(spec),
        claims: spec.claims(),
        service_account_name: spec.output.service_account_name.as_deref(),
        resources: training_resources(job, planned),
        work_limit: planned.work_limit.clone(),
        affinity: affinity(planned),
        tolerations: planned.class.tolerations.clone(),
        runtime_class_name: planned.class.runtime_class_name.clone().filter(|_| has_gpus),
        grace_seconds: planned.grace_seconds,
        deadline: None,
    }
}

/// It has what both sides are read and written with; but a pod has one ServiceAccount.
fn copying_pod<'a>(
    run: &'a Run,
    number: u32,
    task: &RunSpec,
    copied: &'a Artifact,
    trainer: &'a TrainerDefaults,
) -> TrainerPod<'a> {
    let output = &run.spec.job_spec.output;
    let secrets = [(env_prefix::OUTPUT, &output.secret_ref), (env_prefix::COPIED, &copied.secret_ref)];
    let roles = [(env_prefix::OUTPUT, &output.role_arn), (env_prefix::COPIED, &copied.role_arn)];
    let accounts = [&output.service_account_name, &copied.service_account_name];
    let labels = attempt_labels(run, Stage::Copy, number);
    TrainerPod {
        secrets: secrets.into_iter().filter_map(|(prefix, secret)| Some((prefix, secret.as_ref()?))).collect(),
        roles: roles.into_iter().filter_map(|(prefix, role)| Some((prefix, role.as_deref()?))).collect(),
        service_account_name: accounts.into_iter().flatten().next().map(String::as_str),
        ..TrainerPod::small(Stage::Copy, trainer, labels, json!(task).to_string())
    }
}

/// One attempt, created suspended, once, and never applied again: whoever admits it may edit it.
fn attempt_job(run: &Run, number: u32, pod: TrainerPod<'_>, record: &FineTuneRunStatus) -> Job {
    let pods = record.plan.as_ref().map_or(1, |plan| i32::try_from(plan.pods).unwrap_or(i32::MAX));
    Job {
        metadata: metadata(run, &attempt_name(run, number), pod.labels.clone()),
        spec: Some(JobSpec {
            suspend: Some(true),
            backoff_limit: Some(0),
            completions: Some(pods),
            parallelism: Some(pods),
            completion_mode: (pods > 1).then(|| "Indexed".into()),
            pod_replacement_policy: Some("Failed".into()),
            template: pod.template(),
            ..Default::default()
        }),
        status: None,
    }
}

fn training_resources(job: &FineTuneJob, planned: &Planned) -> ResourceRequirements {
    let asked = &job.spec.resources;
    let cpu = asked.cpu.as_deref().or(asked.cpu_limit.as_deref()).unwrap_or(TRAIN_CPU);
    let storage = asked.ephemeral_storage.clone().map(|storage| ("ephemeral-storage".into(), Quantity(storage)));
    let memory = Quantity(planned.memory.clone());
    let gpus = planned
        .class
        .resource_name
        .as_ref()
        .filter(|_| planned.plan.gpus_per_pod > 0)
        .map(|resource| (resource.clone(), Quantity(planned.plan.gpus_per_pod.to_string())));
    let both: BTreeMap<_, _> = gpus.into_iter().chain(storage).chain([("memory".into(), memory)]).collect();
    let requests = both.clone().into_iter().chain([("cpu".into(), Quantity(cpu.into()))]).collect();
    let limit = asked.cpu_limit.clone().map(|limit| ("cpu".into(), Quantity(limit)));
    let limits = both.into_iter().chain(limit).collect();
    ResourceRequirements { limits: Some(limits), requests: Some(requests), claims: None }
}

fn affinity(planned: &Planned) -> Option<Affinity> {
    let terms = &planned.class.node_selector_terms;
    (!terms.is_empty()).then(|| Affinity {
        node_affinity: Some(NodeAffinity {
            required_during_scheduling_ignored_during_execution: Some(NodeSelector {
                node_selector_terms: terms.clone(),
            }),
            ..Default::default()
        }),
        ..Default::default()
    })
}

/// Model and data are read with the output's Secret unless they name their own, or a role.
fn secrets(spec: &FineTuneJobSpec) -> Vec<(&'static str, &SecretRef)> {
    let (model, dataset, output) = (&spec.base_model, &spec.dataset, spec.output.secret_ref.as_ref());
    [
        (env_prefix::MODEL, model.secret_ref.as_ref().or(output.filter(|_| model.role_arn.is_none()))),
        (env_prefix::DATASET, dataset.secret_ref.as_ref().or(output.filter(|_| dataset.role_arn.is_none()))),
        (env_prefix::OUTPUT, output),
    ]
    .into_iter()
    .filter_map(|(prefix, secret)| Some((prefix, secret?)))
    .collect()
}

/// Model and data are read with the output's IAM role unless they name their own, or a Secret.
fn roles(spec: &FineTuneJobSpec) -> Vec<(&'static str, &str)> {
    let (model, dataset, output) = (&spec.base_model, &spec.dataset, spec.output.role_arn.as_ref());
    [
        (env_prefix::MODEL, model.role_arn.as_ref().or(output.filter(|_| model.secret_ref.is_none()))),
        (env_prefix::DATASET, dataset.role_arn.as_ref().or(output.filter(|_| dataset.secret_ref.is_none()))),
        (env_prefix::OUTPUT, output),
    ]
    .into_iter()
    .filter_map(|(prefix, role)| Some((prefix, role?.as_str())))
    .collect()
}

/// The record of what a run has published. It has no owner: it outlives its job.
fn adapter_version(
    job: &FineTuneJob,
    run: &Run,
    record: &FineTuneRunStatus,
    trainer: &TrainerDefaults,
) -> Option<AdapterVersion> {
    let report = record.published.as_ref()?;
    let spec = task_spec(job, run, record, trainer)?;
    let (task, method) = (spec.train.as_ref()?, spec.method.as_ref()?);
    let output = &run.spec.job_spec.output;
    let mut version = AdapterVersion::new(
        &names::adapter_version(&spec.adapter_name, report.version),
        AdapterVersionSpec {
            adapter_name: spec.adapter_name.clone(),
            version: report.version,
            artifact: Artifact {
                kind: method.artifact_type(),
                uri: report.uri.clone(),
                manifest_uri: report.uri.join("manifest.json"),
                manifest_digest: report.manifest_digest.clone(),
                file_count: report.file_count,
                size_bytes: report.size_bytes,
                secret_ref: output.secret_ref.clone(),
                service_account_name: output.service_account_name.clone(),
                role_arn: output.role_arn.clone(),
            },
            base_model: BaseModelRecord { uri: spec.base_model.clone(), digest: task.base_digest.clone() },
            dataset: report.dataset.clone(),
            method: method.name(),
            hyperparameters: method.hyperparameters(&spec.training),
            source: Source {
                job: spec.job.name.clone(),
                uid: spec.job.uid.clone(),
                generation: spec.job.generation,
                run: spec.job.run,
                input_digest: task.input_digest.clone(),
                trainer_image: task.trainer_image.clone(),
                execution: report.execution.clone(),
                copied_from: task.copy_of.as_ref().map(|copied| copied.uri.clone()),
            },
            metrics: report.metrics.clone(),
            gates: spec.evaluation.judge(&report.metrics),
        },
    );
    version.metadata.namespace = job.namespace();
    version.metadata.labels = Some(
        [
            (labels::MANAGED_BY.into(), labels::OPERATOR.into()),
            (names::ADAPTER_LABEL.into(), spec.adapter_name.clone()),
            (names::JOB_LABEL.into(), job.name_any()),
        ]
        .into(),
    );
    Some(version)
}

fn attempt_labels(run: &Run, stage: Stage, number: u32) -> BTreeMap<String, String> {
    let mut labels = labels_of(run, stage);
    labels.insert(names::ATTEMPT_LABEL.into(), number.to_string());
    labels
}

fn labels_of(run: &Run, stage: Stage) -> BTreeMap<String, String> {
    let mut labels = labels::trainer(&run.spec.job.name, stage);
    labels.insert(names::JOB_LABEL.into(), run.spec.job.name.clone());
    labels.insert(names::RUN_LABEL.into(), run.number().to_string());
    labels
}

/// They go with the run's record.
fn metadata(run: &Run, name: &str, labels: BTreeMap<String, String>) -> ObjectMeta {
    let owner = OwnerReference {
        api_version: FineTuneRun::api_version(&()).into_owned(),
        kind: FineTuneRun::kind(&()).into_owned(),
        name: run.object.name.clone(),
        uid: run.object.uid.clone(),
        controller: Some(true),
        block_owner_deletion: Some(true),
    };
    ObjectMeta {
        name: Some(name.to_owned()),
        namespace: Some(run.object.namespace.clone()),
        labels: Some(labels),
        owner_references: Some(vec![owner]),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests;
