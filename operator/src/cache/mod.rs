//! What the operator knows of the cluster: watches with server-side selectors, whose objects lie in indexes, without what
//! nobody reads. An object that can't be read is in its index all the same, with the reason: it stops nobody else.

mod index;

use std::{
    collections::{HashMap, HashSet},
    fmt::Debug,
    sync::{Arc, Mutex, PoisonError},
};

use futures::{
    FutureExt, Stream, StreamExt,
    future::{BoxFuture, Shared, join, ready},
    stream,
};
use k8s_openapi::api::{
    batch::v1::Job,
    core::v1::{Node, Pod},
};
use kube::{
    Api, Resource, ResourceExt,
    core::DeserializeGuard,
    runtime::{
        Controller, WatchStreamExt,
        reflector::{self, ObjectRef},
        watcher,
    },
};
use serde::de::DeserializeOwned;
use tunesmith_crds::{
    AdapterVersion, FineTuneJob, FineTuneRun, GpuClass,
    fine_tune_run::Attempt,
    names::{self, ADAPTER_LABEL, JOB_LABEL},
};

pub use self::index::Index;
use crate::{context::Context, runs::Run};

/// An object as it was read, or why it can't be.
pub type Guarded<K> = DeserializeGuard<K>;

/// The annotation in which kubectl keeps a whole object a second time.
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";

/// What the watches have seen.
#[derive(Clone)]
pub struct Caches {
    jobs: Arc<Index<Job>>,
    pods: Arc<Index<Pod>>,
    runs: Arc<Index<Guarded<FineTuneRun>>>,
    versions: Arc<Index<Guarded<AdapterVersion>>>,
    classes: Arc<Index<Guarded<GpuClass>>>,
    nodes: Arc<Index<Node>>,
    claims: Claims,
    /// Resolves when each has listed once.
    pub listed: Shared<BoxFuture<'static, ()>>,
}

/// The controller of FineTuneJobs with its watches, and the caches that they fill while it runs.
pub fn controller(context: &Context) -> (Controller<Guarded<FineTuneJob>>, Caches) {
    let of_jobs = || watcher::Config::default().labels(JOB_LABEL);
    let (jobs, job_events) = watch(context.api(), of_jobs(), owners::<Job>, trim_nothing);
    let (pods, pod_events) = watch(context.api(), of_jobs(), owners::<Pod>, trim_pod);
    let (runs, run_events) = watch(context.api(), watcher::Config::default(), run_keys, trim_nothing);
    let (versions, version_events) = watch(context.api(), watcher::Config::default(), version_keys, trim_nothing);
    let (classes, class_events) =
        watch(Api::all(context.client.clone()), watcher::Config::default(), no_keys, trim_nothing);
    let (nodes, node_events) = watch(Api::all(context.client.clone()), watcher::Config::default(), no_keys, trim_node);

    let (store, writer) = reflector::store::<Guarded<FineTuneJob>>();
    let adapters = Adapters::default();
    let all_jobs = watcher(context.api::<Guarded<FineTuneJob>>(), watcher::Config::default())
        .default_backoff()
        .modify(slim)
        .reflect(writer)
        .touched_objects()
        .inspect({
            let adapters = adapters.clone();
            move |event| event.iter().for_each(|job| adapters.note(job))
        });
    context.metrics.watch_jobs(context.scope.clone(), store.clone());
    let of_run = |run: Arc<Guarded<FineTuneRun>>| labelled(&*run);
    // Nodes come and go without waking anybody: who waits for one looks again by itself.
    let drained = node_events.filter_map(|_| ready(None::<ObjectRef<Guarded<FineTuneJob>>>));
    let controller = Controller::for_stream(all_jobs, store.clone())
        .reconcile_on(touched(job_events, |job| labelled(&*job)))
        .reconcile_on(touched(pod_events, |pod| labelled(&*pod)))
        .reconcile_on(touched(run_events, of_run))
        .reconcile_on(version_events.flat_map(move |event| {
            let jobs = event.map(|version| adapters.of(&version)).unwrap_or_default();
            stream::iter(jobs)
        }))
        .reconcile_on(drained)
        .reconcile_all_on(class_events.filter_map(|event| ready(event.ok().map(drop))));

    let listed = {
        let (jobs, pods, runs) = (jobs.clone(), pods.clone(), runs.clone());
        let (versions, classes, nodes) = (versions.clone(), classes.clone(), nodes.clone());
        async move {
            jobs.listed().await;
            pods.listed().await;
            runs.listed().await;
            versions.listed().await;
            classes.listed().await;
            nodes.listed().await;
        }
    };
    let stored = async move { drop(store.wait_until_ready().await) };
    let listed = join(listed, stored).map(drop).boxed().shared();
    (controller, Caches { jobs, pods, runs, versions, classes, nodes, claims: Claims::default(), listed })
}

impl Caches {
    /// The runs of this very job, not of one of the same name that was deleted.
    pub fn runs_of(&self, job: &FineTuneJob) -> Vec<Arc<Guarded<FineTuneRun>>> {
        self.runs.with_key(job.metadata.uid.as_deref().unwrap_or_default())
    }

    /// The Job of a try or attempt: the one of its UID, or of its name and owner where that is not known yet.
    pub fn job(&self, run: &Run, attempt: &Attempt, name: &str) -> Option<Arc<Job>> {
        self.jobs.named(&run.object.namespace, name).filter(|job| counts(job, run, attempt))
    }

    /// A Job's pods.
    pub fn pods_of(&self, job: &Job) -> Vec<Pod> {
        let pods = self.pods.with_key(job.metadata.uid.as_deref().unwrap_or_default());
        pods.iter().map(|pod| (**pod).clone()).collect()
    }

    /// The versions of a job's adapter in its namespace, whoever made them.
    pub fn versions_of(&self, job: &FineTuneJob) -> Vec<AdapterVersion> {
        let key = adapter_key(job.namespace().as_deref(), &job.spec.output.adapter_name);
        self.versions.with_key(&key).iter().filter_map(|version| version.0.as_ref().ok().cloned()).collect()
    }

    /// The highest version of a job's adapter that a run of another job has settled on.
    pub fn reserved_by_others(&self, job: &FineTuneJob) -> u32 {
        let runs = self.runs.with_key(&adapter_key(job.namespace().as_deref(), &job.spec.output.adapter_name));
        let others = runs.iter().filter_map(|run| run.0.as_ref().ok());
        let others = others.filter(|run| Some(&run.spec.job.uid) != job.metadata.uid.as_ref());
        let settled = others.filter_map(|run| run.status.as_ref());
        let versions = settled.flat_map(|record| {
            let published = record.published.as_ref().map(|report| report.version);
            record.settled.as_ref().map(|settled| settled.version).into_iter().chain(published)
        });
        let key = adapter_key(job.namespace().as_deref(), &job.spec.output.adapter_name);
        versions.max().unwrap_or(0).max(self.claims.of_others(&key, job))
    }

    /// Claims a version of a job's adapter for it; false if another job was faster, which the caches may not know yet.
    pub fn claim(&self, job: &FineTuneJob, version: u32) -> bool {
        let key = adapter_key(job.namespace().as_deref(), &job.spec.output.adapter_name);
        self.claims.claim(key, version, job)
    }

    /// All GpuClasses that can be read.
    pub fn all_classes(&self) -> Vec<GpuClass> {
        let mut classes: Vec<GpuClass> =
            self.classes.all().iter().filter_map(|class| class.0.as_ref().ok().cloned()).collect();
        classes.sort_by_key(ResourceExt::name_any);
        classes
    }

    /// All nodes, with their labels and what they can allocate.
    pub fn all_nodes(&self) -> Vec<Arc<Node>> {
        self.nodes.all()
    }
}

/// Whether a Job is that of a try or attempt: by its UID, or by its owner where that is not known yet.
pub fn counts(job: &Job, run: &Run, attempt: &Attempt) -> bool {
    match &attempt.job_uid {
        Some(uid) => job.metadata.uid.as_ref() == Some(uid),
        None => job.owner_references().iter().any(|owner| owner.uid == run.object.uid),
    }
}

/// The versions of each adapter that a run has settled on while this process leads, by the UIDs of their jobs. They are in the
/// runs' records, too, but caches lag behind those, and jobs are reconciled side by side.
#[derive(Clone, Default)]
struct Claims(Arc<Mutex<HashMap<String, HashMap<u32, String>>>>);

impl Claims {
    fn claim(&self, key: String, version: u32, job: &FineTuneJob) -> bool {
        let uid = job.metadata.uid.clone().unwrap_or_default();
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *all.entry(key).or_default().entry(version).or_insert_with(|| uid.clone()) == uid
    }

    fn of_others(&self, key: &str, job: &FineTuneJob) -> u32 {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let claims = all.get(key).into_iter().flatten();
        claims
            .filter(|(_, uid)| Some(*uid) != job.metadata.uid.as_ref())
            .map(|(version, _)| *version)
            .max()
            .unwrap_or(0)
    }
}

/// The jobs that each adapter has had. One that is gone stays: reconciling it does nothing.
#[derive(Clone, Default)]
struct Adapters(Arc<Mutex<HashMap<String, HashSet<String>>>>);

impl Adapters {
    fn note(&self, job: &Guarded<FineTuneJob>) {
        let Ok(job) = &job.0 else { return };
        let key = adapter_key(job.namespace().as_deref(), &job.spec.output.adapter_name);
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.entry(key).or_default().insert(job.name_any());
    }

    /// Every job of a version's adapter: one of them may reuse it.
    fn of(&self, version: &Guarded<AdapterVersion>) -> Vec<ObjectRef<Guarded<FineTuneJob>>> {
        let Ok(version) = &version.0 else { return Vec::new() };
        let namespace = version.namespace().unwrap_or_default();
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let jobs = all.get(&adapter_key(Some(&namespace), &version.spec.adapter_name)).into_iter().flatten();
        jobs.map(|name| ObjectRef::new(name).within(&namespace)).collect()
    }
}

/// An index, and the stream that fills it and tells what has changed.
pub fn watch<K>(
    objects: Api<K>,
    config: watcher::Config,
    keys: fn(&K) -> Vec<String>,
    trim: fn(&mut K),
) -> (Arc<Index<K>>, impl Stream<Item = watcher::Result<Arc<K>>> + Send + use<K>)
where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + Sync + 'static,
{
    let index = Arc::new(Index::new(keys));
    let filled = index.clone();
    let events = watcher(objects, config)
        .default_backoff()
        .modify(move |object| {
            slim(object);
            trim(object);
        })
        .flat_map(move |event| {
            let touched = match event {
                Ok(event) => filled.take(event).into_iter().map(Ok).collect(),
                Err(error) => vec![Err(error)],
            };
            stream::iter(touched)
        });
    (index, events)
}

/// The objects to reconcile after what a watch has seen. Its errors are logged: it goes on by itself.
pub fn touched<K, T: Resource + 'static>(
    events: impl Stream<Item = watcher::Result<Arc<K>>> + Send + 'static,
    object_of: impl Fn(Arc<K>) -> Option<ObjectRef<T>> + Send + 'static,
) -> impl Stream<Item = ObjectRef<T>> + Send + 'static
where
    T::DynamicType: Send,
{
    events.filter_map(move |event| {
        let job = match event {
            Ok(object) => object_of(object),
            Err(error) => {
                tracing::warn!(%error, "a watch failed");
                None
            }
        };
        ready(job)
    })
}

/// Leaves out what nobody reads.
fn slim<K: Resource>(object: &mut K) {
    let metadata = object.meta_mut();
    metadata.managed_fields = None;
    if let Some(annotations) = &mut metadata.annotations {
        annotations.remove(LAST_APPLIED);
    }
}

fn trim_nothing<K>(_: &mut K) {}

/// Of a pod, its status counts, and the limits of its containers.
fn trim_pod(pod: &mut Pod) {
    if let Some(spec) = &mut pod.spec {
        spec.volumes = None;
        spec.affinity = None;
        spec.tolerations = None;
        for container in &mut spec.containers {
            container.env = None;
            container.env_from = None;
            container.volume_mounts = None;
        }
    }
}

/// Of a node, its labels count, and what it can allocate.
fn trim_node(node: &mut Node) {
    node.spec = None;
    node.metadata.annotations = None;
    if let Some(status) = node.status.take() {
        let allocatable = status.allocatable;
        node.status = Some(k8s_openapi::api::core::v1::NodeStatus { allocatable, ..Default::default() });
    }
}

fn no_keys<K>(_: &K) -> Vec<String> {
    Vec::new()
}

/// The UIDs of an object's owners.
pub fn owners<K: Resource>(object: &K) -> Vec<String> {
    object.owner_references().iter().map(|owner| owner.uid.clone()).collect()
}

/// The job that a run belongs to, and its adapter.
fn run_keys(run: &Guarded<FineTuneRun>) -> Vec<String> {
    let adapter = run.labels().get(ADAPTER_LABEL).map(|adapter| adapter_key(run.namespace().as_deref(), adapter));
    owners(run).into_iter().chain(adapter).collect()
}

fn version_keys(version: &Guarded<AdapterVersion>) -> Vec<String> {
    let adapter = version.0.as_ref().ok().map(|version| version.spec.adapter_name.as_str());
    adapter.map(|adapter| adapter_key(version.namespace().as_deref(), adapter)).into_iter().collect()
}

fn adapter_key(namespace: Option<&str>, adapter: &str) -> String {
    format!("{}/{adapter}", namespace.unwrap_or_default())
}

/// The job that an object's label names.
fn labelled(object: &impl ResourceExt) -> Option<ObjectRef<Guarded<FineTuneJob>>> {
    let name = object.labels().get(names::JOB_LABEL)?;
    Some(ObjectRef::new(name).within(&object.namespace()?))
}
