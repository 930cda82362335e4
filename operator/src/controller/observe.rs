//! Reads what a decision needs: the job itself and finished pods from the API server, everything else from caches that
//! watches keep.

use std::collections::BTreeMap;

use futures::future::{BoxFuture, Shared};
use k8s_openapi::{
    api::{
        batch::v1::Job,
        core::v1::{ConfigMap, Node, Pod},
    },
    jiff::Timestamp,
};
use kube::{Api, Client, Resource, ResourceExt, api::ListParams, runtime::reflector::Store};
use tunesmith_crds::{AdapterVersion, FineTuneJob, GpuClass, RunSpec, names};

use super::{
    build::{SPEC_KEY, VERSION_ANNOTATION},
    observed::{Named, Observed, Run},
};
use crate::{
    plan::{Offers, needs_nodes},
    progress, refusal,
    trainer::{JobState, Pods, Stage, TrainerJob, job::fresh_pods, pod::RUN_SPEC_KEY},
};

/// What the watches have seen.
#[derive(Clone)]
pub struct Caches {
    /// Jobs of FineTuneJobs.
    pub jobs: Store<Job>,
    /// Their pods.
    pub pods: Store<Pod>,
    /// ConfigMaps of FineTuneJobs.
    pub config_maps: Store<ConfigMap>,
    /// All AdapterVersions.
    pub versions: Store<AdapterVersion>,
    /// All GpuClasses.
    pub classes: Store<GpuClass>,
    /// Resolves when each has listed once. All reconciles wait for this one future: of several that wait for a [`Store`]
    /// itself, kube 5.0 wakes only the last.
    pub listed: Shared<BoxFuture<'static, ()>>,
}

/// Something that could not be read.
#[derive(Debug, thiserror::Error)]
#[error("cannot read {what}: {source}")]
pub struct ObserveError {
    what: &'static str,
    source: kube::Error,
}

/// Reads everything about a job; None if it is gone or going.
///
/// # Errors
/// If the API server fails.
pub async fn observe(client: &Client, caches: &Caches, job: &FineTuneJob) -> Result<Option<Observed>, ObserveError> {
    let (namespace, name) = (job.namespace().unwrap_or_default(), job.name_any());
    let job = Api::<FineTuneJob>::namespaced(client.clone(), &namespace).get_opt(&name).await;
    let Some(job) = job.map_err(failed("the FineTuneJob"))? else { return Ok(None) };
    if job.metadata.deletion_timestamp.is_some() {
        return Ok(None);
    }
    let runs = read_runs(client, caches, &job).await?;
    let active = runs.values().flat_map(Run::jobs).find(|trainer_job| trainer_job.is_active()).cloned();
    let refusal = match &active {
        Some(active) => refusal::of_job(client, &namespace, active).await.map_err(failed("why a Job has no pods"))?,
        None => None,
    };
    let is_training = active.as_ref().is_some_and(|active| active.stage == Stage::Train);
    let live = match active.as_ref().map(|active| (active.stage, &active.state)) {
        Some((Stage::Train, JobState::Active { pods: Pods::Running { address: Some(address), .. }, .. })) => {
            progress::poll(*address).await
        }
        _ => None,
    };
    Ok(Some(Observed {
        versions: read_versions(client, caches, &job, &runs).await?,
        reserved: reserved_by_others(caches, &job),
        offers: read_offers(client, caches, !is_training).await?,
        refusal,
        live,
        runs,
        job,
    }))
}

async fn read_runs(client: &Client, caches: &Caches, job: &FineTuneJob) -> Result<BTreeMap<u32, Run>, ObserveError> {
    let mut runs = BTreeMap::<u32, Run>::new();
    for config_map in caches.config_maps.state_filter(|config_map| is_of(config_map, job)) {
        let Some(run) = run_of(&*config_map, &mut runs) else { continue };
        run.config_maps.push(Named { name: config_map.name_any(), uid: config_map.uid().unwrap_or_default() });
        match stage_of(&*config_map) {
            Some(Stage::Preflight) => {
                run.spec = json_of(&config_map, SPEC_KEY);
                run.created = config_map.creation_timestamp().map_or(Timestamp::UNIX_EPOCH, |time| time.0);
                run.version = config_map.annotations().get(VERSION_ANNOTATION).cloned();
            }
            _ => run.task = json_of(&config_map, RUN_SPEC_KEY),
        }
    }
    for cached in caches.jobs.state_filter(|cached| is_of(cached, job)) {
        let pods = pods_of(client, caches, &cached).await?;
        let (Some(read), Some(run)) = (TrainerJob::read(&cached, &pods), run_of(&*cached, &mut runs)) else { continue };
        match read.stage {
            Stage::Preflight => run.preflight = Some(read),
            _ => run.attempts.push(read),
        }
    }
    for run in runs.values_mut() {
        run.attempts.sort_by_key(|attempt| attempt.attempt);
    }
    Ok(runs)
}

/// A Job's pods: from the cache, or from the API server when their last words count.
async fn pods_of(client: &Client, caches: &Caches, job: &Job) -> Result<Vec<Pod>, ObserveError> {
    let uid = job.uid().unwrap_or_default();
    let is_of_job = |pod: &Pod| pod.owner_references().iter().any(|owner| owner.uid == uid);
    if !TrainerJob::needs_fresh_pods(job) {
        return Ok(caches.pods.state_filter(is_of_job).iter().map(|pod| (**pod).clone()).collect());
    }
    fresh_pods(client, job).await.map_err(failed("the pods of a Job"))
}

/// The adapter's versions, and those that the job's runs led to. The latter are looked for on the API server before they
/// count as deleted: the cache may not have them yet.
async fn read_versions(
    client: &Client,
    caches: &Caches,
    job: &FineTuneJob,
    runs: &BTreeMap<u32, Run>,
) -> Result<Vec<AdapterVersion>, ObserveError> {
    let adapter = &job.spec.output.adapter_name;
    let cached = caches
        .versions
        .state_filter(|version| version.namespace() == job.namespace() && version.spec.adapter_name == *adapter);
    let mut versions: Vec<AdapterVersion> = cached.iter().map(|version| (**version).clone()).collect();
    let api = Api::<AdapterVersion>::namespaced(client.clone(), &job.namespace().unwrap_or_default());
    for name in runs.values().filter_map(|run| run.version.as_ref()) {
        if !versions.iter().any(|version| version.name_any() == *name) {
            versions.extend(api.get_opt(name).await.map_err(failed("an AdapterVersion"))?);
        }
    }
    Ok(versions)
}

/// The highest version of this adapter that a run of another job has reserved.
fn reserved_by_others(caches: &Caches, job: &FineTuneJob) -> u32 {
    let adapter = &job.spec.output.adapter_name;
    let others = caches.config_maps.state_filter(|config_map| {
        config_map.namespace() == job.namespace()
            && config_map.labels().get(names::ADAPTER_LABEL) == Some(adapter)
            && !is_of(config_map, job)
    });
    let reserved = others.iter().filter_map(|config_map| json_of::<RunSpec>(config_map, RUN_SPEC_KEY)?.train);
    reserved.map(|task| task.version).max().unwrap_or(0)
}

/// What the cluster offers. Nodes are read only if a plan is to be made from them.
async fn read_offers(client: &Client, caches: &Caches, plans: bool) -> Result<Offers, ObserveError> {
    let classes: Vec<GpuClass> = caches.classes.state().iter().map(|class| (**class).clone()).collect();
    let nodes = match plans && classes.iter().any(|class| needs_nodes(&class.spec)) {
        // Any version of the list will do, so that the API server can answer from its cache.
        true => {
            Api::<Node>::all(client.clone())
                .list(&ListParams::default().match_any())
                .await
                .map_err(failed("nodes"))?
                .items
        }
        false => Vec::new(),
    };
    Ok(Offers { classes, nodes })
}

/// Whether an object belongs to this very job, not to one of the same name that was deleted.
fn is_of<K: Resource<DynamicType = ()>>(object: &K, job: &FineTuneJob) -> bool {
    object.namespace() == job.namespace()
        && object.owner_references().iter().any(|owner| Some(&owner.uid) == job.metadata.uid.as_ref())
}

/// The run that an object's label names.
fn run_of<'a, K: ResourceExt>(object: &K, runs: &'a mut BTreeMap<u32, Run>) -> Option<&'a mut Run> {
    let number: u32 = object.labels().get(names::RUN_LABEL)?.parse().ok()?;
    Some(runs.entry(number).or_insert_with(|| Run { number, ..Run::default() }))
}

fn stage_of<K: ResourceExt>(object: &K) -> Option<Stage> {
    Stage::from_name(object.labels().get(names::STAGE_LABEL)?)
}

fn json_of<T: serde::de::DeserializeOwned>(config_map: &ConfigMap, key: &str) -> Option<T> {
    serde_json::from_str(config_map.data.as_ref()?.get(key)?).ok()
}

fn failed(what: &'static str) -> impl Fn(kube::Error) -> ObserveError {
    move |source| ObserveError { what, source }
}
