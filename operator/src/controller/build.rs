//! The objects that a decision asks for: pure, and the same for the same input.

use std::collections::BTreeMap;

use k8s_openapi::{
    api::{
        batch::v1::{Job, JobSpec},
        core::v1::{Affinity, ConfigMap, NodeAffinity, NodeSelector, ResourceRequirements},
    },
    apimachinery::pkg::{api::resource::Quantity, apis::meta::v1::ObjectMeta},
};
use kube::{Resource, ResourceExt};
use serde_json::json;
use tunesmith_crds::{
    AdapterVersion, AdapterVersionSpec, FineTuneJob, Method, RunSpec,
    adapter_version::{Artifact, BaseModelRecord, Source},
    names::{self, env_prefix},
    run::{TrainReport, TrainTask},
};

use super::{
    decide::Step,
    observed::{Observed, Run},
};
use crate::{
    apply::Change,
    labels,
    plan::Planned,
    trainer::{
        Image, Stage, TrainerPod,
        ending::ENDING_ANNOTATION,
        job::PLAN_ANNOTATION,
        pod::{CHECK_WORK_LIMIT, RUN_SPEC_KEY, check_resources, retry_policy},
    },
};

/// Key of a run's first ConfigMap that holds the spec that the run serves.
pub const SPEC_KEY: &str = "spec.json";
/// Annotation of a run's first ConfigMap: name of the AdapterVersion that the run led to.
pub const VERSION_ANNOTATION: &str = "tunesmith.dev/version";
/// CPU of a training pod, if the user doesn't say.
const TRAIN_CPU: &str = "1";

/// The change to the cluster that a step means; None if what it is about is gone.
pub fn build(step: &Step, observed: &Observed, image: &Image) -> Option<Change> {
    let job = &observed.job;
    Some(match step {
        Step::RecordEnding { job, ending } => Change::AnnotateJob {
            name: job.clone(),
            key: ENDING_ANNOTATION,
            value: serde_json::to_string(ending).unwrap_or_default(),
        },
        Step::CreateVersion { run, report } => {
            Change::CreateVersion(Box::new(adapter_version(job, observed.runs.get(run)?, report)?))
        }
        Step::SettleRun { run, version } => {
            Change::AnnotateConfigMap { name: check_name(job, *run), key: VERSION_ANNOTATION, value: version.clone() }
        }
        Step::DeleteJob(job) => Change::DeleteJob { name: job.name.clone(), uid: job.uid.clone() },
        Step::DeleteConfigMap(map) => Change::DeleteConfigMap { name: map.name.clone(), uid: Some(map.uid.clone()) },
        Step::StartRun { run } => Change::CreateConfigMap(Box::new(run_config_map(job, *run))),
        Step::CreatePreflight { run } => Change::CreateJob(Box::new(preflight_job(job, *run, image))),
        Step::ReserveVersion { run, version, method, input_digest, preflight, planned } => {
            let task = TrainTask {
                version: *version,
                input_digest: input_digest.clone(),
                base_digest: preflight.base_digest.clone(),
                dataset_digest: preflight.dataset.digest.clone(),
                trainer_image: image.name.clone(),
                template_date: preflight.template_date.clone(),
            };
            let spec = planned
                .resolve(RunSpec::preflight(job, *run))
                .with_training(job.spec.method_as(*method, preflight.model.stored_as.as_ref())?, task);
            Change::CreateConfigMap(Box::new(task_config_map(job, *run, &spec)))
        }
        Step::CreateAttempt { run, attempt, version, planned, deadline } => {
            let attempt = Attempt { run: *run, number: *attempt, version: *version, deadline: *deadline };
            Change::CreateJob(Box::new(training_job(job, &attempt, planned, image)))
        }
    })
}

/// Which attempt a training Job is.
struct Attempt {
    run: u32,
    number: u32,
    version: u32,
    deadline: Option<i64>,
}

/// Name of a run's preflight Job, and of the ConfigMap with its input.
fn check_name(job: &FineTuneJob, run: u32) -> String {
    format!("{}-{run}-preflight", job.name_any())
}

/// Name of the ConfigMap that reserves a version and holds what its attempts work on: one object a version, so that two
/// jobs of one adapter never publish the same.
fn task_name(job: &FineTuneJob, version: u32) -> String {
    format!("{}-run", names::adapter_version(&job.spec.output.adapter_name, version))
}

fn run_config_map(job: &FineTuneJob, run: u32) -> ConfigMap {
    let input = RunSpec::preflight(job, run);
    let data = [(RUN_SPEC_KEY.into(), to_json(&input)), (SPEC_KEY.into(), to_json(&job.spec))];
    config_map(metadata(job, check_name(job, run), labels_of(job, run, Stage::Preflight)), data.into())
}

fn task_config_map(job: &FineTuneJob, run: u32, spec: &RunSpec) -> ConfigMap {
    let version = spec.train.as_ref().map_or(0, |task| task.version);
    let mut labels = labels_of(job, run, Stage::Train);
    labels.insert(names::ADAPTER_LABEL.into(), job.spec.output.adapter_name.clone());
    config_map(metadata(job, task_name(job, version), labels), [(RUN_SPEC_KEY.into(), to_json(spec))].into())
}

/// Preflight leaves retrying to the Job controller: final exit codes end it, disruptions don't count.
fn preflight_job(job: &FineTuneJob, run: u32, image: &Image) -> Job {
    let labels = labels_of(job, run, Stage::Preflight);
    let pod = TrainerPod {
        stage: Stage::Preflight,
        image,
        labels: labels.clone(),
        config_map: check_name(job, run),
        secrets: secrets(job),
        claims: job.spec.claims(),
        service_account_name: job.spec.output.service_account_name.as_deref(),
        resources: check_resources(job.spec.resources.memory.as_deref()),
        work_limit: CHECK_WORK_LIMIT.into(),
        affinity: None,
        tolerations: Vec::new(),
        runtime_class_name: None,
    };
    Job {
        metadata: metadata(job, check_name(job, run), labels),
        spec: Some(JobSpec {
            backoff_limit: Some(job.spec.backoff_limit),
            pod_failure_policy: Some(retry_policy()),
            template: pod.template(),
            ..Default::default()
        }),
        status: None,
    }
}

/// One attempt, created once and never applied again: whoever schedules it may edit it.
fn training_job(job: &FineTuneJob, attempt: &Attempt, planned: &Planned, image: &Image) -> Job {
    let mut labels = labels_of(job, attempt.run, Stage::Train);
    labels.insert(names::ATTEMPT_LABEL.into(), attempt.number.to_string());
    let pod = TrainerPod {
        stage: Stage::Train,
        image,
        labels: labels.clone(),
        config_map: task_name(job, attempt.version),
        secrets: secrets(job),
        claims: job.spec.claims(),
        service_account_name: job.spec.output.service_account_name.as_deref(),
        resources: training_resources(job, planned),
        work_limit: planned.work_limit.clone(),
        affinity: affinity(planned),
        tolerations: planned.class.tolerations.clone(),
        runtime_class_name: planned.class.runtime_class_name.clone(),
    };
    let name = format!("{}-{}-{}", job.name_any(), attempt.run, attempt.number);
    let mut metadata = metadata(job, name, labels);
    metadata.annotations = Some([(PLAN_ANNOTATION.into(), to_json(&planned.plan))].into());
    let pods = planned.plan.pods as i32;
    Job {
        metadata,
        spec: Some(JobSpec {
            backoff_limit: Some(0),
            completions: Some(pods),
            parallelism: Some(pods),
            completion_mode: (pods > 1).then(|| "Indexed".into()),
            pod_replacement_policy: Some("Failed".into()),
            active_deadline_seconds: attempt.deadline,
            template: pod.template(),
            ..Default::default()
        }),
        status: None,
    }
}

fn training_resources(job: &FineTuneJob, planned: &Planned) -> ResourceRequirements {
    let cpu = job.spec.resources.cpu.as_deref().unwrap_or(TRAIN_CPU);
    let memory = Quantity(planned.memory.clone());
    let gpus = planned
        .class
        .resource_name
        .as_ref()
        .filter(|_| planned.plan.gpus_per_pod > 0)
        .map(|resource| (resource.clone(), Quantity(planned.plan.gpus_per_pod.to_string())));
    let limits: BTreeMap<_, _> = gpus.into_iter().chain([("memory".into(), memory)]).collect();
    let requests = limits.clone().into_iter().chain([("cpu".into(), Quantity(cpu.into()))]).collect();
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

/// Model and data are read with the output's Secret unless they name their own.
fn secrets(job: &FineTuneJob) -> Vec<(&'static str, &tunesmith_crds::fine_tune_job::SecretRef)> {
    let spec = &job.spec;
    let output = spec.output.secret_ref.as_ref();
    [
        (env_prefix::MODEL, spec.base_model.secret_ref.as_ref().or(output)),
        (env_prefix::DATASET, spec.dataset.secret_ref.as_ref().or(output)),
        (env_prefix::OUTPUT, output),
    ]
    .into_iter()
    .filter_map(|(prefix, secret)| Some((prefix, secret?)))
    .collect()
}

/// The record of what a run has published. It has no owner: it outlives its job.
fn adapter_version(job: &FineTuneJob, run: &Run, report: &TrainReport) -> Option<AdapterVersion> {
    let spec = run.task.as_ref()?;
    let (task, method) = (spec.train.as_ref()?, spec.method.as_ref()?);
    let (lora, quantization) = match method {
        Method::Full => (None, None),
        Method::LoRA { lora } => (Some(lora), None),
        Method::QLoRA { lora, quantization } => (Some(lora), Some(quantization)),
    };
    let mut hyperparameters = serde_json::Map::from_iter([("training".to_owned(), json!(spec.training))]);
    hyperparameters.extend(lora.map(|lora| ("lora".to_owned(), json!(lora))));
    hyperparameters.extend(quantization.map(|quantization| ("quantization".to_owned(), json!(quantization))));
    // The run's own output: the job's may have changed since.
    let output = &run.spec.as_ref()?.output;
    let mut version = AdapterVersion::new(
        &names::adapter_version(&spec.adapter_name, report.version),
        AdapterVersionSpec {
            adapter_name: spec.adapter_name.clone(),
            version: report.version,
            artifact: Artifact {
                kind: method.artifact_type(),
                uri: report.uri.clone(),
                manifest_digest: report.manifest_digest.clone(),
                size_bytes: report.files.iter().map(|file| file.size).sum(),
                files: report.files.clone(),
                secret_ref: output.secret_ref.clone(),
                service_account_name: output.service_account_name.clone(),
            },
            base_model: BaseModelRecord { uri: spec.base_model.clone(), digest: task.base_digest.clone() },
            dataset: report.dataset.clone(),
            method: method.name(),
            hyperparameters: hyperparameters.into(),
            source: Source {
                job: spec.job.name.clone(),
                uid: spec.job.uid.clone(),
                generation: spec.job.generation,
                run: spec.job.run,
                input_digest: task.input_digest.clone(),
                trainer_image: task.trainer_image.clone(),
                execution: report.execution.clone(),
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

fn labels_of(job: &FineTuneJob, run: u32, stage: Stage) -> BTreeMap<String, String> {
    let mut labels = labels::trainer(&job.name_any(), stage);
    labels.insert(names::JOB_LABEL.into(), job.name_any());
    labels.insert(names::RUN_LABEL.into(), run.to_string());
    labels
}

fn metadata(job: &FineTuneJob, name: String, labels: BTreeMap<String, String>) -> ObjectMeta {
    ObjectMeta {
        name: Some(name),
        namespace: job.namespace(),
        labels: Some(labels),
        owner_references: job.controller_owner_ref(&()).map(|owner| vec![owner]),
        ..Default::default()
    }
}

fn config_map(metadata: ObjectMeta, data: BTreeMap<String, String>) -> ConfigMap {
    ConfigMap { metadata, data: Some(data), immutable: Some(true), binary_data: None }
}

fn to_json(value: &impl serde::Serialize) -> String {
    serde_json::to_string(value).unwrap_or_default()
}

#[cfg(test)]
mod tests;
