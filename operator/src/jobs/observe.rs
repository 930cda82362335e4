//! Reads what a decision needs: from caches that watches keep, and from the API server what counts only as it is now (the
//! last words of pods, and whether something is gone).

use std::collections::BTreeMap;

use k8s_openapi::{
    api::{batch::v1::Job, core::v1::Pod},
    jiff::Timestamp,
};
use kube::{Api, Client, ResourceExt};
use tunesmith_crds::{AdapterVersion, FineTuneJob, FineTuneRun, fine_tune_run::Attempt};

use crate::{
    admission,
    cache::{Caches, counts},
    observed::Observed,
    plan::{Devices, Offers},
    progress::Live,
    run::{Object, Run, Work},
    runs::{
        active,
        build::{attempt_name, check_name},
    },
    workload::{JobState, Pods, Stage, TrainerJob, ending::finished, job::fresh_pods},
};

/// Something that could not be read.
#[derive(Debug, thiserror::Error)]
#[error("cannot read {what}: {source}")]
pub struct ObserveError {
    what: &'static str,
    source: kube::Error,
}

/// Reads everything about a job.
///
/// # Errors
/// If the API server fails.
pub async fn observe(
    client: &Client,
    caches: &Caches,
    live: &Live,
    devices: Devices,
    job: &FineTuneJob,
) -> Result<Observed, ObserveError> {
    let (mut runs, mut unreadable) = (BTreeMap::new(), Vec::new());
    for run in caches.runs_of(job) {
        match &run.0 {
            Ok(run) => {
                let run = read_run(client, caches, live, run).await?;
                runs.insert(run.number(), run);
            }
            Err(error) => {
                let name = error.metadata.name.as_deref().unwrap_or_default();
                unreadable.push(format!("FineTuneRun {name} can't be read: {error}"));
            }
        }
    }
    let observed = Observed {
        versions: read_versions(client, caches, job, &runs).await?,
        reserved: caches.reserved_by_others(job),
        offers: Offers { classes: caches.all_classes(), nodes: caches.all_nodes(), devices },
        runs,
        unreadable,
        job: job.clone(),
    };
    Ok(observed)
}

async fn read_run(client: &Client, caches: &Caches, live: &Live, run: &FineTuneRun) -> Result<Run, ObserveError> {
    let object = Object {
        namespace: run.namespace().unwrap_or_default(),
        name: run.name_any(),
        uid: run.uid().unwrap_or_default(),
        resource_version: run.resource_version().unwrap_or_default(),
    };
    let mut read = Run {
        object,
        created: run.creation_timestamp().map_or(Timestamp::UNIX_EPOCH, |time| time.0),
        spec: run.spec.clone(),
        record: run.status.clone().unwrap_or_default(),
        work: Work::None,
    };
    read.work = read_work(client, caches, live, &read).await?;
    Ok(read)
}

/// The Job of the try or attempt that is not over; or of the last one, where a sidecar keeps it alive.
async fn read_work(client: &Client, caches: &Caches, live: &Live, run: &Run) -> Result<Work, ObserveError> {
    let Some((attempt, name)) = at_work(run) else { return Ok(Work::None) };
    let namespace = &run.object.namespace;
    let job = match caches.job(run, attempt, &name) {
        Some(job) => job,
        None if attempt.cause.is_some() => return Ok(Work::None),
        // A cache that lags says nothing about what is not there.
        None => {
            let job = Api::<Job>::namespaced(client.clone(), namespace).get_opt(&name).await;
            match (job.map_err(failed("a Job"))?.filter(|job| counts(job, run, attempt)), &attempt.job_uid) {
                (Some(job), _) => job,
                (None, Some(_)) => return Ok(Work::Gone),
                (None, None) => return Ok(Work::None),
            }
        }
    };
    if attempt.cause.is_some() && finished(&job).is_some() {
        return Ok(Work::None);
    }
    let pods = pods_of(client, caches, &job).await?;
    let Some(read) = TrainerJob::read(&job, &pods) else { return Ok(Work::None) };
    let is_missing = matches!(read.state, JobState::Active { pods: Pods::Missing, .. });
    let refusal = match is_missing && attempt.cause.is_none() {
        true => admission::of_job(client, namespace, &read).await.map_err(failed("why a Job has no pods"))?,
        false => None,
    };
    let live = live.of(&read.uid).filter(|_| read.stage == Stage::Train);
    Ok(Work::There { job: Box::new(read), refusal, live })
}

/// The try or attempt whose Job counts, and that Job's name.
fn at_work(run: &Run) -> Option<(&Attempt, String)> {
    let record = &run.record;
    let last = active(record).or(record.attempts.last()).or(record.check.as_ref())?;
    let is_check = record.check.as_ref().is_some_and(|check| std::ptr::eq(check, last));
    let name = if is_check { check_name(run, last.number) } else { attempt_name(run, last.number) };
    Some((last, name))
}

/// A Job's pods: from the cache, or from the API server when their last words count.
async fn pods_of(client: &Client, caches: &Caches, job: &Job) -> Result<Vec<Pod>, ObserveError> {
    let cached = caches.pods_of(job);
    match TrainerJob::needs_fresh_pods(job, &cached) {
        true => fresh_pods(client, job).await.map_err(failed("the pods of a Job")),
        false => Ok(cached),
    }
}

/// The adapter's versions, and those that the job's runs led to. The latter are looked for on the API server before they
/// count as deleted: the cache may not have them yet.
async fn read_versions(
    client: &Client,
    caches: &Caches,
    job: &FineTuneJob,
    runs: &BTreeMap<u32, Run>,
) -> Result<Vec<AdapterVersion>, ObserveError> {
    let mut versions = caches.versions_of(job);
    let api = Api::<AdapterVersion>::namespaced(client.clone(), &job.namespace().unwrap_or_default());
    let newest = runs.values().next_back().and_then(|run| run.record.adapter_version.as_ref());
    if let Some(name) = newest.filter(|name| !versions.iter().any(|version| version.name_any() == **name)) {
        versions.extend(api.get_opt(name).await.map_err(failed("an AdapterVersion"))?);
    }
    Ok(versions)
}

fn failed(what: &'static str) -> impl Fn(kube::Error) -> ObserveError {
    move |source| ObserveError { what, source }
}
