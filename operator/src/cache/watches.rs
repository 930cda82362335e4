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
use crate::{context::scoped, workload::Stage};

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

    /// Watches for as long as it is polled.
    pub async fn run(self) {
        let Self { client, scope, caches, mut jobs, mut versions } = self;
        let (all, of_jobs) = (watcher::Config::default, || watcher::Config::default().labels(JOB_LABEL));
        let verifications = watcher::Config::default().labels(&format!("{STAGE_LABEL}={}", Stage::Verify.name()));
        tokio::join!(
            watch(
                api(&client, &scope),
                all(),
                &caches.jobs,
                |event| jobs.take(event),
                |job| {
                    caches.job_queue.wake(&namespace_of(job), &job.name_any());
                }
            ),
            watch(
                api(&client, &scope),
                all(),
                &caches.versions,
                |event| versions.take(event),
                |version| {
                    caches.version_queue.wake(&namespace_of(version), &version.name_any());
                    // One of the adapter's jobs may reuse it.
                    for key in AdapterVersion::keys(version) {
                        for place in caches.jobs.places_with_key(&key) {
                            caches.job_queue.wake(place.0.as_deref().unwrap_or_default(), &place.1);
                        }
                    }
                }
            ),
            watch(api(&client, &scope), all(), &caches.runs, |_| {}, wake_job(&caches)),
            watch(api(&client, &scope), of_jobs(), &caches.trainers, |_| {}, wake_job(&caches)),
            watch(api(&client, &scope), of_jobs(), &caches.pods, |_| {}, wake_job(&caches)),
            watch(
                api(&client, &scope),
                verifications,
                &caches.verifications,
                |_| {},
                |job| {
                    if let Some(version) = version_of(job) {
                        caches.version_queue.wake(&namespace_of(job), &version);
                    }
                }
            ),
        );
    }
}

/// Watches what has no namespace, for as long as it is polled. Nodes come and go without waking anybody: who waits for one
/// looks again by itself.
pub async fn watch_cluster(client: Client, cluster: Cluster, scopes: Vec<Caches>) {
    let all = watcher::Config::default;
    tokio::join!(
        watch(
            Api::all(client.clone()),
            all(),
            &cluster.classes,
            |_| {},
            |_| {
                for caches in &scopes {
                    let waiting = caches.jobs.notes().into_iter().filter(|(_, job)| !job.is_over);
                    waiting.for_each(|(place, _)| {
                        caches.job_queue.wake(place.0.as_deref().unwrap_or_default(), &place.1);
                    });
                }
            }
        ),
        watch(Api::all(client.clone()), all(), &cluster.nodes, |_| {}, |_| {}),
    );
}

/// Fills an index for as long as it is polled. A watch that fails is logged, and goes on by itself.
async fn watch<K: Indexed + Clone + Debug + Send>(
    objects: Api<Raw<K>>,
    config: watcher::Config,
    index: &Index<K>,
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
fn wake_job<K: Resource<DynamicType = ()>>(caches: &Caches) -> impl Fn(&Raw<K>) {
    |object| {
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
