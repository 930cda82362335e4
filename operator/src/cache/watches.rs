//! The watches that fill the caches, and what they wake.

use std::{fmt::Debug, pin::pin, sync::Arc};

use futures::StreamExt;
use k8s_openapi::{NamespaceResourceScope, api::batch::v1::Job};
use kube::{
    Api, Client, Resource, ResourceExt,
    runtime::{
        WatchStreamExt,
        watcher::{self, Event, watcher},
    },
};
use tokio::task::JoinSet;
use tunesmith_crds::{
    AdapterVersion, FineTuneJob,
    names::{JOB_LABEL, STAGE_LABEL},
};

use super::{
    Caches, Claims, Cluster,
    index::{Index, Indexed},
    queue::{Names, Queue},
    raw::Raw,
};
use crate::workload::Stage;

/// Objects that a list brings at once: they lie in memory as text meanwhile.
const PAGE: u32 = 250;

/// The watches of a scope.
pub struct Watches {
    client: Client,
    scope: Option<String>,
    caches: Caches,
    jobs: Names<FineTuneJob>,
    versions: Names<AdapterVersion>,
}

impl Watches {
    /// Watches for one scope, which have seen nothing yet, and what they will fill.
    pub fn new(client: Client, scope: Option<String>, cluster: Cluster) -> (Self, Caches) {
        let ((job_queue, jobs), (version_queue, versions)) = (Queue::new(), Queue::new());
        let caches = Caches {
            jobs: Arc::default(),
            versions: Arc::default(),
            verifications: Arc::default(),
            job_queue: Arc::new(job_queue),
            version_queue: Arc::new(version_queue),
            runs: Arc::default(),
            trainers: Arc::default(),
            pods: Arc::default(),
            cluster,
            claims: Claims::default(),
        };
        (Self { client, scope, caches: caches.clone(), jobs, versions }, caches)
    }

    /// Watches, each kind in a task of its own, until the tasks are dropped.
    pub fn spawn(self, tasks: &mut JoinSet<()>) {
        let Self { client, scope, caches, mut jobs, mut versions } = self;
        let (all, of_jobs) = (watcher::Config::default, || watcher::Config::default().labels(JOB_LABEL));
        let (verify, inspect) = (Stage::Verify.name(), Stage::Inspect.name());
        let verifications = watcher::Config::default().labels(&format!("{STAGE_LABEL} in ({verify},{inspect})"));
        tasks.spawn(watch(api(&client, &scope), all(), caches.jobs.clone(), move |event| jobs.take(event), {
            let caches = caches.clone();
            move |job| caches.job_queue.wake(&namespace_of(job), &job.name_any())
        }));
        tasks.spawn(watch(api(&client, &scope), all(), caches.versions.clone(), move |event| versions.take(event), {
            let caches = caches.clone();
            move |version| {
                caches.version_queue.wake(&namespace_of(version), &version.name_any());
                // One of the adapter's jobs may reuse it.
                for key in AdapterVersion::keys(version) {
                    for place in caches.jobs.places_with_key(&key) {
                        caches.job_queue.wake(place.0.as_deref().unwrap_or_default(), &place.1);
                    }
                }
            }
        }));
        tasks.spawn(watch(api(&client, &scope), all(), caches.runs.clone(), |_| {}, wake_job(&caches)));
        tasks.spawn(watch(api(&client, &scope), of_jobs(), caches.trainers.clone(), |_| {}, wake_job(&caches)));
        tasks.spawn(watch(api(&client, &scope), of_jobs(), caches.pods.clone(), |_| {}, wake_job(&caches)));
        tasks.spawn(watch(
            api(&client, &scope),
            verifications,
            caches.verifications.clone(),
            |_| {},
            move |job| {
                if let Some(version) = version_of(job) {
                    caches.version_queue.wake(&namespace_of(job), &version);
                }
            },
        ));
    }
}

/// Watches what has no namespace, in the same way. Nodes come and go without waking anybody: who waits for one looks again
/// by itself.
pub fn watch_cluster(client: Client, cluster: &Cluster, scopes: Vec<Caches>, tasks: &mut JoinSet<()>) {
    let all = watcher::Config::default;
    tasks.spawn(watch(
        Api::all(client.clone()),
        all(),
        cluster.classes.clone(),
        |_| {},
        move |_| {
            for caches in &scopes {
                let waiting = caches.jobs.notes().into_iter().filter(|(_, job)| !job.is_over);
                waiting.for_each(|(place, _)| {
                    caches.job_queue.wake(place.0.as_deref().unwrap_or_default(), &place.1);
                });
            }
        },
    ));
    tasks.spawn(watch(Api::all(client), all(), cluster.nodes.clone(), |_| {}, |_| {}));
}

/// Fills an index for as long as it is polled. A watch that fails is logged, and goes on by itself.
async fn watch<K: Indexed + Clone + Debug + Send>(
    objects: Api<Raw<K>>,
    config: watcher::Config,
    index: Arc<Index<K>>,
    mut seen: impl FnMut(&Event<Raw<K>>),
    touched: impl Fn(&Raw<K>),
) {
    let mut events = pin!(watcher(objects, config.page_size(PAGE)).default_backoff());
    while let Some(event) = events.next().await {
        match event {
            Ok(event) => {
                seen(&event);
                index.take(event).iter().for_each(&touched);
            }
            Err(error) => tracing::warn!(kind = %K::kind(&()), %error, "a watch failed"),
        }
    }
}

fn api<K>(client: &Client, scope: &Option<String>) -> Api<Raw<K>>
where
    K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>,
{
    scoped(client, scope.as_deref())
}

fn namespace_of(object: &impl ResourceExt) -> String {
    object.namespace().unwrap_or_default()
}

/// Wakes the FineTuneJob that an object's label names.
fn wake_job<K: Resource<DynamicType = ()>>(caches: &Caches) -> impl Fn(&Raw<K>) + use<K> {
    let caches = caches.clone();
    move |object| {
        if let Some(job) = object.labels().get(JOB_LABEL) {
            caches.job_queue.wake(&namespace_of(object), job);
        }
    }
}

/// The version that a Job verifies.
fn version_of(job: &Raw<Job>) -> Option<String> {
    let owner = job.owner_references().iter().find(|owner| owner.kind == AdapterVersion::kind(&()))?;
    Some(owner.name.clone())
}

/// Objects of a namespace; of all namespaces, if none is named.
fn scoped<K>(client: &Client, namespace: Option<&str>) -> Api<K>
where
    K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>,
{
    match namespace {
        Some(namespace) => Api::namespaced(client.clone(), namespace),
        None => Api::all(client.clone()),
    }
}
