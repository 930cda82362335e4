//! What the pods of a run work on, and the digest of its inputs.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use tunesmith_crds::{
    FineTuneJob, FineTuneRunStatus,
    digest::input_digest,
    run::{RunSpec, TrainTask},
};

use crate::{observed::Observed, plan::plan, run::Run, workload::TrainerDefaults};

/// What a check works on.
pub fn check_spec(run: &Run, job: &FineTuneJob) -> RunSpec {
    let served = FineTuneJob {
        metadata: ObjectMeta { generation: Some(run.spec.job.generation), ..job.metadata.clone() },
        spec: run.spec.job_spec.clone(),
        status: None,
    };
    RunSpec::preflight(&served, run.number())
}

/// What an attempt works on; None before that is settled.
pub(super) fn task_spec(
    job: &FineTuneJob,
    run: &Run,
    record: &FineTuneRunStatus,
    trainer: &TrainerDefaults,
) -> Option<RunSpec> {
    let (settled, preflight) = (record.settled.as_ref()?, record.preflight.as_ref()?);
    let task = TrainTask {
        version: settled.version,
        input_digest: settled.input_digest.clone(),
        base_digest: preflight.base_digest.clone(),
        dataset_digest: preflight.dataset.digest.clone(),
        trainer_image: trainer.image.clone(),
        cluster: trainer.cluster.clone(),
        template_date: preflight.template_date.clone(),
        numerics_version: preflight.numerics_version,
        copy_of: settled.copy_of.clone(),
    };
    let spec = RunSpec { training: settled.training.clone(), ..check_spec(run, job) };
    Some(spec.with_training(settled.method.clone(), task))
}

/// Digest of the run's inputs, as they are settled; before that, as they would be now. None if no class can say what Auto
/// means, how many devices share the work and how exactly they compute.
pub fn digest_of(run: &Run, record: &FineTuneRunStatus, observed: &Observed) -> Option<String> {
    if let Some(settled) = &record.settled {
        return Some(settled.input_digest.clone());
    }
    let report = record.preflight.as_ref()?;
    let planned = plan(&observed.job.spec, &observed.offers, Some(report), None).ok()?;
    let spec: RunSpec = planned.resolve(check_spec(run, &observed.job));
    Some(input_digest(&spec, &planned.method, report))
}
