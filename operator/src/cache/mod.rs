//! What the operator knows of the cluster: watches with server-side selectors, whose objects lie in indexes as they were sent
//! ([`raw`]), packed. An object that can't be read is in its index all the same, with the reason: it stops nobody else.
//!
//! Every replica watches, whether it leads or not: one that begins to lead knows the cluster already.

mod index;
mod kinds;
mod packed;
mod queue;
mod raw;
mod watches;

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use k8s_openapi::api::{
    batch::v1::Job,
    core::v1::{Node, Pod},
};
use kube::{ResourceExt, core::DeserializeGuard};
use tunesmith_crds::{AdapterVersion, FineTuneJob, FineTuneRun, GpuClass, fine_tune_run::Attempt};

use self::kinds::adapter_key;
pub use self::{
    index::Index,
    kinds::VersionNote,
    queue::{Name, Queue},
    watches::{Watches, watch_cluster},
};

use crate::run::Run;

/// An object as it was read, or why it can't be.
pub type Guarded<K> = DeserializeGuard<K>;

/// What the watches of a scope have seen.
#[derive(Clone)]
pub struct Caches {
    /// FineTuneJobs.
    pub jobs: Arc<Index<FineTuneJob>>,
    /// AdapterVersions.
    pub versions: Arc<Index<AdapterVersion>>,
    /// The Jobs that verify and inspect AdapterVersions.
    pub verifications: Arc<Index<Job>>,
    /// Which FineTuneJobs to look at.
    pub job_queue: Arc<Queue<FineTuneJob>>,
    /// Which AdapterVersions to look at.
    pub version_queue: Arc<Queue<AdapterVersion>>,
    runs: Arc<Index<FineTuneRun>>,
    trainers: Arc<Index<Job>>,
    pods: Arc<Index<Pod>>,
    cluster: Cluster,
    claims: Claims,
}

/// What has no namespace: all scopes share it.
#[derive(Clone, Default)]
pub struct Cluster {
    /// GpuClasses.
    pub classes: Arc<Index<GpuClass>>,
    nodes: Arc<Index<Node>>,
}

impl Cluster {
    /// All GpuClasses that can be read.
    pub fn all_classes(&self) -> Vec<Arc<GpuClass>> {
        let mut classes: Vec<_> = self.classes.notes().into_iter().filter_map(|(_, class)| class).collect();
        classes.sort_by_key(|class| class.name_any());
        classes
    }

    /// Resolves when all has been listed once.
    pub async fn listed(&self) {
        self.classes.listed().await;
        self.nodes.listed().await;
    }
}

impl Caches {
    /// Resolves when all has been listed once.
    pub async fn listed(&self) {
        self.cluster.listed().await;
        self.jobs.listed().await;
        self.runs.listed().await;
        self.versions.listed().await;
        self.trainers.listed().await;
        self.verifications.listed().await;
        self.pods.listed().await;
    }

    /// The runs of this very job, not of one of the same name that was deleted.
    pub fn runs_of(&self, job: &FineTuneJob) -> Vec<Guarded<FineTuneRun>> {
        self.runs.with_key(job.metadata.uid.as_deref().unwrap_or_default())
    }

    /// The Job of a try or attempt: the one of its UID, or of its name and owner where that is not known yet.
    pub fn job(&self, run: &Run, attempt: &Attempt, name: &str) -> Option<Job> {
        self.trainers.named(&run.object.namespace, name)?.0.ok().filter(|job| counts(job, run, attempt))
    }

    /// A Job's pods.
    pub fn pods_of(&self, job: &Job) -> Vec<Pod> {
        let pods = self.pods.with_key(job.metadata.uid.as_deref().unwrap_or_default());
        pods.into_iter().filter_map(|pod| pod.0.ok()).collect()
    }

    /// The versions of a job's adapter in its namespace, whoever made them.
    pub fn versions_of(&self, job: &FineTuneJob) -> Vec<AdapterVersion> {
        let versions = self.versions.with_key(&adapter_key(job, &job.spec.output.adapter_name));
        versions.into_iter().filter_map(|version| version.0.ok()).collect()
    }

    /// The highest version of a job's adapter that a run of another job has settled on.
    pub fn reserved_by_others(&self, job: &FineTuneJob) -> u32 {
        let key = adapter_key(job, &job.spec.output.adapter_name);
        let uid = job.metadata.uid.as_deref();
        let others = self.runs.notes_with_key(&key).into_iter().filter(|run| Some(&*run.job_uid) != uid);
        others.map(|run| run.version).max().unwrap_or(0).max(self.claims.of_others(&key, job))
    }

    /// Claims a version of a job's adapter for it; false if another job was faster, which the caches may not know yet.
    pub fn claim(&self, job: &FineTuneJob, version: u32) -> bool {
        self.claims.claim(adapter_key(job, &job.spec.output.adapter_name), version, job)
    }

    /// Whether somebody needs a GpuClass: a run that is planned onto it and not over, or a job that asks for it by name.
    pub fn uses_class(&self, name: &str) -> bool {
        self.runs.notes().iter().any(|(_, run)| run.class.as_deref() == Some(name))
            || self.jobs.notes().iter().any(|(_, job)| job.class.as_deref() == Some(name))
    }

    /// All GpuClasses that can be read.
    pub fn all_classes(&self) -> Vec<Arc<GpuClass>> {
        self.cluster.all_classes()
    }

    /// All nodes, with their labels and what they can allocate.
    pub fn all_nodes(&self) -> Vec<Arc<Node>> {
        self.cluster.nodes.notes().into_iter().filter_map(|(_, node)| node).collect()
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
