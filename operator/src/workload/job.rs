//! A trainer Job with its pods, read into what the controllers decide by.

use std::net::IpAddr;

use k8s_openapi::{
    api::{
        batch::v1::Job,
        core::v1::{ContainerState, Pod},
    },
    jiff::Timestamp,
};
use kube::{Api, Client, ResourceExt, api::ListParams};
use tunesmith_crds::names::STAGE_LABEL;

use super::{
    Stage,
    ending::{Cause, Ending, finished, outlived, pod_cause, trainer},
};

/// A trainer Job.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainerJob {
    /// Name of the Job.
    pub name: String,
    /// UID of the Job.
    pub uid: String,
    /// What it does.
    pub stage: Stage,
    /// It is being deleted; it stays until its pods are gone.
    pub deleting: bool,
    /// Whoever admits it has not let it begin.
    pub suspended: bool,
    /// How far it is.
    pub state: JobState,
}

/// How far a trainer Job is.
#[derive(Clone, Debug, PartialEq)]
pub enum JobState {
    /// It goes on.
    Active {
        /// How far its pods are.
        pods: Pods,
        /// Why the last of its pods that are over failed.
        last_failure: Option<String>,
    },
    /// It is over.
    Ended(Ending),
}

/// How far the pods of an active Job are: as far as the slowest.
#[derive(Clone, Debug, PartialEq)]
pub enum Pods {
    /// The Job controller has not made them yet.
    Missing,
    /// The scheduler finds no node: its words.
    Unschedulable(String),
    /// A node has them; their containers start: what the kubelet says.
    Starting(String),
    /// All run.
    Running {
        /// Address of rank 0.
        address: Option<IpAddr>,
        /// When the last one started.
        since: Option<Timestamp>,
    },
    /// They are over; the Job controller will say so.
    Over,
}

impl TrainerJob {
    /// Whether [`TrainerJob::read`] needs the Job's pods as the API server has them now, not as a cache had them: their
    /// last words count.
    pub fn needs_fresh_pods(job: &Job, cached: &[Pod]) -> bool {
        finished(job).is_some() || outlived(cached).is_some()
    }

    /// Reads a Job and its pods; None if it has no stage.
    pub fn read(job: &Job, pods: &[Pod]) -> Option<Self> {
        let state = match Ending::of(job, pods) {
            Some(ending) => JobState::Ended(ending),
            None => JobState::Active { pods: read_pods(job, pods), last_failure: last_failure(pods) },
        };
        Some(Self {
            name: job.name_any(),
            uid: job.uid().unwrap_or_default(),
            stage: Stage::from_name(job.labels().get(STAGE_LABEL)?)?,
            deleting: job.metadata.deletion_timestamp.is_some(),
            suspended: job.spec.as_ref().and_then(|spec| spec.suspend) == Some(true),
            state,
        })
    }

    /// How it ended, if it did.
    pub fn ending(&self) -> Option<&Ending> {
        match &self.state {
            JobState::Ended(ending) => Some(ending),
            JobState::Active { .. } => None,
        }
    }

    /// When the last of its pods started, if all run.
    pub fn running_since(&self) -> Option<Timestamp> {
        match &self.state {
            JobState::Active { pods: Pods::Running { since, .. }, .. } => *since,
            _ => None,
        }
    }
}

/// A Job's pods, as the API server has them now.
///
/// # Errors
/// If the API server fails.
pub async fn fresh_pods(client: &Client, job: &Job) -> Result<Vec<Pod>, kube::Error> {
    let pods = Api::<Pod>::namespaced(client.clone(), &job.namespace().unwrap_or_default());
    let selector = format!("batch.kubernetes.io/controller-uid={}", job.uid().unwrap_or_default());
    Ok(pods.list(&ListParams::default().labels(&selector)).await?.items)
}

fn read_pods(job: &Job, pods: &[Pod]) -> Pods {
    let wanted = job.spec.as_ref().and_then(|spec| spec.parallelism).unwrap_or(1);
    let alive: Vec<&Pod> = pods.iter().filter(|pod| pod_cause(pod).is_none() && !is_over(pod)).collect();
    if alive.is_empty() && !pods.is_empty() {
        return Pods::Over;
    }
    if (alive.len() as i32) < wanted {
        return Pods::Missing;
    }
    if let Some(message) = alive.iter().find_map(|pod| unschedulable(pod)) {
        return Pods::Unschedulable(message);
    }
    if let Some(message) = alive.iter().find_map(|pod| starting(pod)) {
        return Pods::Starting(message);
    }
    let rank_0 = alive.iter().min_by_key(|pod| completion_index(pod));
    let address = rank_0.and_then(|pod| pod.status.as_ref()?.pod_ip.as_ref()?.parse().ok());
    Pods::Running { address, since: alive.iter().filter_map(|pod| running_since(pod)).max() }
}

fn is_over(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    matches!(phase, Some("Succeeded" | "Failed"))
}

fn completion_index(pod: &Pod) -> u32 {
    let index = pod.labels().get("batch.kubernetes.io/job-completion-index");
    index.and_then(|index| index.parse().ok()).unwrap_or(0)
}

fn unschedulable(pod: &Pod) -> Option<String> {
    let conditions = pod.status.as_ref()?.conditions.as_ref()?;
    let condition = conditions.iter().find(|c| c.type_ == "PodScheduled" && c.status == "False")?;
    let words = condition.message.clone().or_else(|| condition.reason.clone());
    Some(words.unwrap_or_else(|| "the scheduler gives no reason".into()))
}

fn starting(pod: &Pod) -> Option<String> {
    let wait = |state: &ContainerState| {
        let waiting = state.waiting.as_ref()?;
        let reason = waiting.reason.as_deref().unwrap_or("ContainerCreating");
        Some(match (reason, &waiting.message) {
            ("ContainerCreating" | "PodInitializing", _) => "pulls the image and mounts volumes".into(),
            (reason, Some(message)) => format!("{reason}: {message}"),
            (reason, None) => reason.into(),
        })
    };
    match container_state(pod) {
        None => Some("waits for its node".into()),
        Some(state) if state.running.is_some() => None,
        Some(state) => wait(state),
    }
}

fn running_since(pod: &Pod) -> Option<Timestamp> {
    container_state(pod)?.running.as_ref()?.started_at.as_ref().map(|time| time.0)
}

fn container_state(pod: &Pod) -> Option<&ContainerState> {
    trainer(pod)?.state.as_ref()
}

/// The complaint of the pod that failed last, while the Job controller makes another.
fn last_failure(pods: &[Pod]) -> Option<String> {
    let failed = pods.iter().filter_map(|pod| match pod_cause(pod)? {
        Cause::Done { .. } => None,
        cause => Some((pod.creation_timestamp().map(|time| time.0), cause)),
    });
    let (_, cause) = failed.max_by_key(|(created, _)| *created)?;
    cause.complaint().map(Into::into)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn job(parallelism: i32) -> Job {
        serde_json::from_value(json!({
            "metadata": {"name": "j-1-1", "uid": "u", "labels": {STAGE_LABEL: "train"}},
            "spec": {"parallelism": parallelism, "template": {"spec": {"containers": []}}},
        }))
        .unwrap()
    }

    fn pod(status: Value) -> Pod {
        serde_json::from_value(json!({"status": status})).unwrap()
    }

    fn container(state: Value) -> Pod {
        let status =
            json!({"name": "trainer", "image": "", "imageID": "", "ready": false, "restartCount": 0, "state": state});
        pod(json!({"phase": "Pending", "podIP": "10.0.0.7", "containerStatuses": [status]}))
    }

    fn pods_of(parallelism: i32, pods: &[Pod]) -> Pods {
        let JobState::Active { pods, .. } = TrainerJob::read(&job(parallelism), pods).unwrap().state else { panic!() };
        pods
    }

    #[test]
    fn a_job_is_as_far_as_its_slowest_pod() {
        let running = container(json!({"running": {"startedAt": "2026-01-01T00:00:00Z"}}));
        let pulling = container(json!({"waiting": {"reason": "ContainerCreating"}}));
        assert_eq!(pods_of(2, std::slice::from_ref(&running)), Pods::Missing);
        assert!(matches!(pods_of(2, &[running.clone(), pulling]), Pods::Starting(_)));
        let Pods::Running { address, since } = pods_of(2, &[running.clone(), running]) else { panic!() };
        assert_eq!(address, Some([10, 0, 0, 7].into()));
        assert!(since.is_some());
    }

    #[test]
    fn what_the_kubelet_says_of_an_image_or_a_secret_is_kept() {
        let missing = container(json!({"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}));
        assert_eq!(pods_of(1, &[missing]), Pods::Starting("ImagePullBackOff: no such image".into()));
    }

    #[test]
    fn what_the_scheduler_says_is_kept() {
        let condition =
            json!({"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes"});
        let pending = pod(json!({"phase": "Pending", "conditions": [condition]}));
        assert_eq!(pods_of(1, &[pending]), Pods::Unschedulable("0/3 nodes".into()));
    }

    #[test]
    fn a_job_between_two_pods_keeps_the_complaint_of_the_first() {
        let failed = container(json!({"terminated": {"exitCode": 101, "reason": "Error"}}));
        let job = TrainerJob::read(&job(1), &[failed]).unwrap();
        let JobState::Active { pods, last_failure } = job.state else { panic!() };
        assert_eq!(pods, Pods::Over);
        assert!(last_failure.unwrap().contains("code 101"));
    }
}
