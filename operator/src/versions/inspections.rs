//! Inspections: the files of Available versions are looked up again and again, where the admin asks for that. One small pod
//! does it for all versions of a namespace that lie under one prefix and are read with the same credentials.
//!
//! Nothing of it is on record but when a version was last inspected: an inspection that is lost is made again. So a Job counts
//! only for the process that made it.

use std::{
    collections::{BTreeMap, HashMap},
    hash::{DefaultHasher, Hash, Hasher},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures::future::pending;
use k8s_openapi::{
    api::batch::v1::{Job, JobSpec},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
    jiff::{SignedDuration, Timestamp},
};
use kube::{Api, ResourceExt};
use serde_json::json;
use tokio::time::sleep;
use tunesmith_crds::{
    AdapterVersion, Uri,
    adapter_version::Artifact,
    names::env_prefix,
    run::{Finding, InspectReport, InspectSpec, Inspected, Outcome, SCHEMA_VERSION, Verdict},
};

use crate::{
    apply::{ApplyError, Change, apply},
    cache::{Caches, VersionNote},
    context::Context,
    labels,
    workload::{
        Stage, TrainerDefaults, TrainerJob, TrainerPod,
        ending::finished,
        job::fresh_pods,
        pod::{KEPT_SECONDS, RETRIES, retry_policy},
    },
};

/// Versions that are due are looked for this often.
const TICK: Duration = Duration::from_secs(15);
/// Inspections at once.
const AT_ONCE: usize = 4;
/// Versions that one pod inspects at most.
const MOST_VERSIONS: usize = 200;
/// Bytes of a Job's annotation that it may take to name them.
const MOST_BYTES: usize = 150_000;
/// An inspection that has taken so long fails: one that a namespace has no place for must not keep others waiting.
const LONGEST_SECONDS: i64 = 1800;
/// A Job that was created and is not seen after so long will not come.
const PATIENCE: SignedDuration = SignedDuration::from_mins(5);
/// Begins the name of each Job.
const PREFIX: &str = "tunesmith-inspect-";

/// What inspections have found, until the versions' statuses tell it: by namespace and name.
#[derive(Clone, Default)]
pub struct Findings(Arc<Mutex<HashMap<(String, String), Found>>>);

/// What an inspection has found of a version.
#[derive(Clone, Debug, PartialEq)]
pub struct Found {
    /// When.
    pub time: Timestamp,
    /// Whether its files are there.
    pub verdict: Verdict,
    /// What is wrong.
    pub message: String,
}

impl Findings {
    /// What was found of a version last.
    pub fn of(&self, version: &impl ResourceExt) -> Option<Found> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(&place(version)).cloned()
    }

    /// The version's status tells it.
    pub fn forget(&self, version: &impl ResourceExt) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&place(version));
    }

    fn put(&self, place: (String, String), found: Found) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(place, found);
    }
}

fn place(version: &impl ResourceExt) -> (String, String) {
    (version.namespace().unwrap_or_default(), version.name_any())
}

/// What one pod can inspect: all of a namespace under a prefix, with the same credentials.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Group {
    namespace: String,
    prefix: String,
    secret: Option<String>,
    service_account: Option<String>,
    role: Option<String>,
}

impl Group {
    fn of(version: &AdapterVersion) -> Self {
        let artifact = &version.spec.artifact;
        Self {
            namespace: version.namespace().unwrap_or_default(),
            prefix: prefix(&artifact.uri, version),
            secret: artifact.secret_ref.as_ref().map(|secret| secret.name.clone()),
            service_account: artifact.service_account_name.clone(),
            role: artifact.role_arn.clone(),
        }
    }

    /// Name of its Job.
    fn job_name(&self) -> String {
        let mut hasher = DefaultHasher::new();
        self.hash(&mut hasher);
        format!("{PREFIX}{:016x}", hasher.finish())
    }
}

/// The folder of all adapters: versions lie in `<prefix>/<adapter>/v<N>`.
fn prefix(uri: &Uri, version: &AdapterVersion) -> String {
    let uri = uri.to_string();
    let tail = format!("/{}/v{}", version.spec.adapter_name, version.spec.version);
    uri.strip_suffix(&tail).unwrap_or(&uri).to_owned()
}

/// An inspection under way.
struct Running {
    namespace: String,
    /// Name and UID of its Job.
    job: (String, String),
    /// The versions, in the order in which the pod looks at them.
    versions: Vec<String>,
    since: Timestamp,
}

/// Inspects whatever is due, as long as it is polled.
pub async fn run(context: Arc<Context>, caches: Caches, findings: Findings) {
    let Some(every) = context.inspect_every else { return pending().await };
    let mut running: Vec<Running> = Vec::new();
    loop {
        sleep(TICK).await;
        collect(&context, &caches, &findings, &mut running).await;
        let now = Timestamp::now();
        for (group, versions) in due(&caches, every, now) {
            if running.len() >= AT_ONCE {
                break;
            }
            let name = group.job_name();
            if running.iter().any(|running| running.job.0 == name && running.namespace == group.namespace) {
                continue;
            }
            match start(&context, &caches, &group, &versions).await {
                Ok(Some(uid)) => running.push(Running {
                    namespace: group.namespace,
                    job: (name, uid),
                    versions: versions.into_iter().map(|version| version.name).collect(),
                    since: now,
                }),
                Ok(None) => {}
                Err(error) => tracing::warn!(%error, namespace = group.namespace, "an inspection can't begin"),
            }
        }
    }
}

/// Groups with a version that is due, and their versions to inspect.
fn due(caches: &Caches, every: SignedDuration, now: Timestamp) -> Vec<(Group, Vec<Inspected>)> {
    let older_than = |age: SignedDuration, note: &VersionNote| {
        note.inspected.is_some_and(|inspected| now.as_second().saturating_sub(inspected) >= age.as_secs())
    };
    let notes = caches.versions.notes();
    if !notes.iter().any(|(_, note)| older_than(every, note)) {
        return Vec::new();
    }
    // What is due soon goes with what is due: one pod, not two.
    let soon = notes.into_iter().filter(|(_, note)| older_than(every / 2, note));
    let read = |(place, note): (Arc<(Option<String>, String)>, VersionNote)| {
        let version = caches.versions.named(place.0.as_deref().unwrap_or_default(), &place.1)?;
        Some((note.inspected?, version.0.ok()?))
    };
    grouped(soon.filter_map(read).collect(), now.as_second().saturating_sub(every.as_secs()))
}

/// Versions by groups, where one was last inspected at `limit` or before: the longest uninspected first.
fn grouped(versions: Vec<(i64, AdapterVersion)>, limit: i64) -> Vec<(Group, Vec<Inspected>)> {
    let mut groups: BTreeMap<Group, Vec<(i64, Inspected)>> = BTreeMap::new();
    for (time, version) in versions {
        let inspected = Inspected { name: version.name_any(), artifact: version.spec.artifact.clone() };
        groups.entry(Group::of(&version)).or_default().push((time, inspected));
    }
    let due = groups.into_iter().filter(|(_, versions)| versions.iter().any(|(time, _)| *time <= limit));
    due.map(|(group, versions)| (group, most(versions))).collect()
}

/// As many as one pod takes.
fn most(mut versions: Vec<(i64, Inspected)>) -> Vec<Inspected> {
    versions.sort_by(|a, b| (a.0, &a.1.name).cmp(&(b.0, &b.1.name)));
    let mut bytes = 0;
    let fits = |version: &Inspected| {
        bytes += json!(version).to_string().len();
        bytes <= MOST_BYTES
    };
    versions.into_iter().map(|(_, version)| version).take(MOST_VERSIONS).take_while(fits).collect()
}

/// Creates the Job of an inspection, and tells its UID; none if the namespace has no place for it, or another one is there.
async fn start(
    context: &Context,
    caches: &Caches,
    group: &Group,
    versions: &[Inspected],
) -> Result<Option<String>, Box<dyn std::error::Error>> {
    let (namespace, name) = (&group.namespace, group.job_name());
    if let Some(there) = caches.verifications.named(namespace, &name).and_then(|job| job.0.ok()) {
        // One that has failed stays for a while; one that goes on is that of another process, and counts for nobody.
        if let Some(uid) = there.metadata.uid.clone().filter(|_| finished(&there).is_none()) {
            delete(context, namespace, &name, uid).await?;
        }
        return Ok(None);
    }
    let job = inspect_job(group, versions, &context.trainer);
    if let Some(refusal) = apply(&context.client, namespace, vec![Change::CreateJob(Box::new(job))]).await? {
        tracing::warn!(namespace, message = refusal.message, "an inspection can't begin");
        return Ok(None);
    }
    let there = Api::<Job>::namespaced(context.client.clone(), namespace).get_opt(&name).await?;
    Ok(there.and_then(|job| job.metadata.uid))
}

async fn delete(context: &Context, namespace: &str, name: &str, uid: String) -> Result<(), ApplyError> {
    let change = Change::DeleteJob { name: name.into(), uid };
    apply(&context.client, namespace, vec![change]).await.map(drop)
}

/// Takes in what inspections have found that are over.
async fn collect(context: &Context, caches: &Caches, findings: &Findings, running: &mut Vec<Running>) {
    let mut going_on = Vec::new();
    for inspection in running.drain(..) {
        match ended(context, caches, &inspection).await {
            Ok(None) => going_on.push(inspection),
            Ok(Some(Some((report, time)))) => {
                for (name, found) in found_of(&inspection.versions, report, time) {
                    findings.put((inspection.namespace.clone(), name.clone()), found);
                    caches.version_queue.wake(&inspection.namespace, &name);
                }
                let (name, uid) = inspection.job;
                if let Err(error) = delete(context, &inspection.namespace, &name, uid).await {
                    tracing::warn!(%error, "the Job of an inspection stays until its time is over");
                }
            }
            // Its Job stays for a while, for whoever wants to see the log; until then there is no other.
            Ok(Some(None)) => {}
            Err(error) => {
                tracing::warn!(%error, "an inspection can't be read");
                going_on.push(inspection);
            }
        }
    }
    *running = going_on;
}

/// Whether an inspection is over, and what it has found then, if anything, and when.
async fn ended(
    context: &Context,
    caches: &Caches,
    inspection: &Running,
) -> Result<Option<Option<(InspectReport, Timestamp)>>, kube::Error> {
    let (name, uid) = &inspection.job;
    let job = caches.verifications.named(&inspection.namespace, name).and_then(|job| job.0.ok());
    let Some(job) = job.filter(|job| job.metadata.uid.as_ref() == Some(uid)) else {
        let is_late = Timestamp::now().duration_since(inspection.since) > PATIENCE;
        return Ok(is_late.then_some(None));
    };
    if finished(&job).is_none() {
        return Ok(None);
    }
    let read = TrainerJob::read(&job, &fresh_pods(&context.client, &job).await?);
    let Some(ending) = read.as_ref().and_then(TrainerJob::ending) else { return Ok(None) };
    if let Some(Outcome::Inspected(report)) = ending.cause.outcome() {
        return Ok(Some(Some((report.clone(), ending.finished.0))));
    }
    let message = ending.cause.complaint().unwrap_or("the pod left the report of another subcommand");
    tracing::warn!(namespace = inspection.namespace, job = name, message, "an inspection has failed");
    Ok(Some(None))
}

/// What a report says of each version that its pod got to.
fn found_of(versions: &[String], report: InspectReport, time: Timestamp) -> Vec<(String, Found)> {
    let seen = usize::try_from(report.inspected).unwrap_or(usize::MAX);
    let mut faults: HashMap<String, Finding> =
        report.findings.into_iter().map(|finding| (finding.name.clone(), finding)).collect();
    let found = versions.iter().take(seen).map(|name| {
        let fault = faults.remove(name).map(|finding| (finding.verdict, finding.message));
        let (verdict, message) = fault.unwrap_or((Verdict::Intact, String::new()));
        (name.clone(), Found { time, verdict, message })
    });
    found.collect()
}

/// It has no owner, and goes when its report is read, or by itself.
fn inspect_job(group: &Group, versions: &[Inspected], trainer: &TrainerDefaults) -> Job {
    let name = group.job_name();
    let labels = labels::trainer(&name, Stage::Inspect);
    let task = InspectSpec { schema_version: SCHEMA_VERSION, versions: versions.to_vec() };
    let artifact: Option<&Artifact> = versions.first().map(|version| &version.artifact);
    let secret = artifact.and_then(|artifact| artifact.secret_ref.as_ref());
    let pod = TrainerPod {
        secrets: secret.into_iter().map(|secret| (env_prefix::OUTPUT, secret)).collect(),
        roles: group.role.iter().map(|role| (env_prefix::OUTPUT, role.as_str())).collect(),
        service_account_name: group.service_account.as_deref(),
        ..TrainerPod::small(Stage::Inspect, trainer, labels.clone(), json!(task).to_string())
    };
    Job {
        metadata: ObjectMeta {
            name: Some(name),
            namespace: Some(group.namespace.clone()),
            labels: Some(labels),
            ..Default::default()
        },
        spec: Some(JobSpec {
            active_deadline_seconds: Some(LONGEST_SECONDS),
            backoff_limit: Some(RETRIES),
            ttl_seconds_after_finished: Some(KEPT_SECONDS),
            pod_failure_policy: Some(retry_policy()),
            template: pod.template(),
            ..Default::default()
        }),
        status: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures::{at, trainer_defaults, version};

    /// A version that was last inspected then, with these changes.
    fn inspected(number: u32, time: i64, change: impl FnOnce(&mut AdapterVersion)) -> (i64, AdapterVersion) {
        let mut version = version(number, "sha256:x", None);
        change(&mut version);
        (time, version)
    }

    fn moved(version: &mut AdapterVersion) {
        version.spec.artifact.uri = "s3://elsewhere/support/v3".parse().unwrap();
    }

    #[test]
    fn versions_under_one_prefix_are_inspected_together_when_one_is_due() {
        let other_secret = |version: &mut AdapterVersion| version.spec.artifact.secret_ref = None;
        let other_adapter = |version: &mut AdapterVersion| {
            version.spec.adapter_name = "sales".into();
            version.metadata.name = Some("sales-v1".into());
            version.spec.artifact.uri = "s3://adapters/sales/v1".parse().unwrap();
        };
        let versions = vec![
            inspected(2, 90, |_| {}),
            inspected(1, 50, |_| {}),
            inspected(1, 100, other_adapter),
            inspected(3, 60, moved),
            inspected(4, 10, other_secret),
        ];
        let names = |limit| -> Vec<Vec<String>> {
            let groups = grouped(versions.clone(), limit).into_iter();
            groups.map(|(_, versions)| versions.into_iter().map(|version| version.name).collect()).collect()
        };
        assert_eq!(names(9), Vec::<Vec<String>>::new());
        let all = [vec!["support-v4"], vec!["support-v1", "support-v2", "sales-v1"], vec!["support-v3"]];
        assert_eq!(names(60), all);
        assert_eq!(names(50), all[..2]);
    }

    #[test]
    fn one_pod_takes_no_more_than_its_annotation_holds() {
        let versions = |bytes: usize| -> Vec<(i64, Inspected)> {
            let artifact = || {
                let mut artifact = version(1, "sha256:x", None).spec.artifact;
                artifact.uri = format!("s3://adapters/{}", "a".repeat(bytes)).parse().unwrap();
                artifact
            };
            (0..500).map(|number| (number, Inspected { name: format!("v{number}"), artifact: artifact() })).collect()
        };
        let few = most(versions(10));
        assert_eq!((few.len(), few[0].name.as_str()), (MOST_VERSIONS, "v0"));
        let spec = InspectSpec { schema_version: SCHEMA_VERSION, versions: most(versions(900)) };
        assert!(spec.versions.len() > 50 && json!(spec).to_string().len() <= MOST_BYTES + 100);
    }

    #[test]
    fn a_report_speaks_of_the_versions_that_its_pod_got_to() {
        let versions = ["v1", "v2", "v3"].map(str::to_owned);
        let finding = Finding { name: "v2".into(), verdict: Verdict::Missing, message: "it is gone".into() };
        // One that was not asked about is nobody's.
        let foreign = Finding { name: "other".into(), ..finding.clone() };
        let report = InspectReport { inspected: 2, findings: vec![finding, foreign] };
        let found = found_of(&versions, report, at(9));
        let told: Vec<_> = found.iter().map(|(name, found)| (name.as_str(), found.verdict)).collect();
        assert_eq!(told, [("v1", Verdict::Intact), ("v2", Verdict::Missing)]);
    }

    #[test]
    fn its_job_is_a_small_pod_with_the_credentials_of_its_versions() {
        let groups = grouped(vec![inspected(1, 0, |_| {}), inspected(2, 0, |_| {})], 0);
        let [(group, versions)] = &groups[..] else { panic!("{groups:?}") };
        let job = json!(inspect_job(group, versions, &trainer_defaults()));
        let pod = &job["spec"]["template"]["spec"];
        assert_eq!(pod["containers"][0]["args"], json!(["inspect"]));
        let secret = json!([{"prefix": "TUNESMITH_OUTPUT_", "secretRef": {"name": "s3"}}]);
        assert_eq!((&pod["containers"][0]["envFrom"], &job["metadata"]["namespace"]), (&secret, &json!("team")));
        assert!(job["metadata"]["name"].as_str().unwrap().len() <= 63);
        assert_eq!(job["spec"]["activeDeadlineSeconds"], LONGEST_SECONDS, "without a pod it would never end");
        let (mut other, versions) = groups[0].clone();
        other.secret = None;
        assert_ne!(other.job_name(), group.job_name());
        assert_eq!(versions.len(), 2);
    }
}
