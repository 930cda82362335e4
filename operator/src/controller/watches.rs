//! What wakes the controller of FineTuneJobs, and fills its caches: watches with server-side selectors, so that the
//! operator holds no object that is not Tunesmith's.

use std::{fmt::Debug, hash::Hash};

use futures::{FutureExt, Stream, StreamExt, future::ready};
use k8s_openapi::api::{
    batch::v1::Job,
    core::v1::{ConfigMap, Pod},
};
use kube::{
    Api, Client, Resource, ResourceExt,
    runtime::{
        Controller, WatchStreamExt,
        reflector::{self, ObjectRef, Store},
        watcher,
    },
};
use serde::de::DeserializeOwned;
use tunesmith_crds::{AdapterVersion, FineTuneJob, GpuClass, names::JOB_LABEL};

use super::observe::Caches;
use crate::context::Context;

/// The controller with its watches, and the caches that they fill while it runs.
pub fn controller(context: &Context) -> (Controller<FineTuneJob>, Caches) {
    let client = &context.client;
    let of_jobs = || watcher::Config::default().labels(JOB_LABEL);
    let (jobs, job_events) = watch::<Job>(client, of_jobs());
    let (pods, pod_events) = watch::<Pod>(client, of_jobs());
    let (config_maps, config_map_events) = watch::<ConfigMap>(client, of_jobs());
    let (versions, version_events) = watch::<AdapterVersion>(client, watcher::Config::default());
    let (classes, class_events) = watch::<GpuClass>(client, watcher::Config::default());

    let controller = Controller::new(Api::<FineTuneJob>::all(client.clone()), watcher::Config::default());
    let all_jobs = controller.store();
    context.metrics.watch_jobs(all_jobs.clone());
    let controller = controller
        .watches_stream(job_events, |job| labelled(&job))
        .watches_stream(pod_events, |pod| labelled(&pod))
        .watches_stream(config_map_events, |config_map| labelled(&config_map))
        .watches_stream(version_events, move |version| of_adapter(&version, &all_jobs))
        .reconcile_all_on(class_events.filter_map(|event| ready(event.ok().map(drop))));
    let listed = all_listed(jobs.clone(), pods.clone(), config_maps.clone(), versions.clone(), classes.clone());
    (controller, Caches { jobs, pods, config_maps, versions, classes, listed: listed.boxed().shared() })
}

/// Resolves when every watch has listed once. A watch that ends early means that the operator stops.
async fn all_listed(
    jobs: Store<Job>,
    pods: Store<Pod>,
    config_maps: Store<ConfigMap>,
    versions: Store<AdapterVersion>,
    classes: Store<GpuClass>,
) {
    let _ = jobs.wait_until_ready().await;
    let _ = pods.wait_until_ready().await;
    let _ = config_maps.wait_until_ready().await;
    let _ = versions.wait_until_ready().await;
    let _ = classes.wait_until_ready().await;
}

/// A cache, and the stream that fills it and tells what has changed.
fn watch<K>(
    client: &Client,
    config: watcher::Config,
) -> (Store<K>, impl Stream<Item = watcher::Result<K>> + Send + use<K>)
where
    K: Resource + Clone + Debug + DeserializeOwned + Send + Sync + 'static,
    K::DynamicType: Default + Eq + Hash + Clone + Send + Sync,
{
    let (store, writer) = reflector::store();
    let events = watcher(Api::<K>::all_with(client.clone(), &K::DynamicType::default()), config)
        .default_backoff()
        .modify(|object| object.managed_fields_mut().clear())
        .reflect(writer)
        .touched_objects();
    (store, events)
}

/// The job that an object's label names.
fn labelled(object: &impl ResourceExt) -> Option<ObjectRef<FineTuneJob>> {
    let name = object.labels().get(JOB_LABEL)?;
    Some(ObjectRef::new(name).within(&object.namespace()?))
}

/// Every job of a version's adapter: one of them may reuse it.
fn of_adapter(version: &AdapterVersion, jobs: &Store<FineTuneJob>) -> Vec<ObjectRef<FineTuneJob>> {
    let same_adapter = jobs.state_filter(|job| {
        job.namespace() == version.namespace() && job.spec.output.adapter_name == version.spec.adapter_name
    });
    same_adapter.iter().map(|job| ObjectRef::from_obj(&**job)).collect()
}
