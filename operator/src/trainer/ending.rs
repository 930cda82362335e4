//! How a trainer Job ended: its pods' termination messages and exit codes, turned into what the controllers act on.

use k8s_openapi::{
    api::{
        batch::v1::{Job, JobCondition},
        core::v1::{ContainerStateTerminated, Pod},
    },
    apimachinery::pkg::apis::meta::v1::Time,
    jiff::Timestamp,
};
use serde::{Deserialize, Serialize};
use tunesmith_crds::{
    names::exit_code,
    run::{Outcome, ReportError, RunReport},
};

/// Annotation of a trainer Job that has ended: its [`Ending`] as JSON. It outlives the pods, so that an attempt is
/// counted in one way only, whatever becomes of them.
pub const ENDING_ANNOTATION: &str = "tunesmith.dev/ending";

/// What the kubelet says when it evicts a pod for what the pod itself did. Any other eviction is a disruption.
const OVER_ITS_OWN_LIMIT: [&str; 3] =
    ["exceeds the limit", "exceeds the total limit", "exceeded its local ephemeral storage limit"];

/// How a trainer Job ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Ending {
    /// What came of it.
    pub cause: Cause,
    /// When its pod's container started; None if none did.
    pub started: Option<Time>,
    /// When the Job was over.
    pub finished: Time,
}

/// What came of a trainer Job.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind")]
pub enum Cause {
    /// Exit code 0 and a report.
    Done {
        /// What the report says.
        outcome: Box<Outcome>,
    },
    /// It was ended from outside: another attempt follows, and this one does not count.
    Disrupted {
        /// By what.
        message: String,
    },
    /// It failed: another attempt may follow.
    Failed {
        /// Why, for the user.
        message: String,
    },
    /// It failed, and would fail again.
    Final {
        /// Why, for the user.
        message: String,
    },
    /// The Job's activeDeadlineSeconds were over.
    DeadlineExceeded,
}

impl Ending {
    /// How `job` ended, or None while it goes on. `pods` are the Job's pods, as the API server has them now.
    pub fn of(job: &Job, pods: &[Pod]) -> Option<Self> {
        let condition = finished(job)?;
        let over = condition.last_transition_time.clone().unwrap_or(Time(Timestamp::UNIX_EPOCH));
        let succeeded = condition.type_ == "Complete";
        let speaking = pods.iter().filter(|pod| !succeeded || is_first_rank(pod));
        let cause = match condition.reason.as_deref() {
            Some("DeadlineExceeded") => Cause::DeadlineExceeded,
            _ => speaking.filter_map(pod_cause).max_by_key(weight).unwrap_or_else(|| Cause::Disrupted {
                message: "its pods were deleted before they could report".into(),
            }),
        };
        let started = pods.iter().filter_map(|pod| terminated(pod)?.started_at.clone()).min_by_key(|time| time.0);
        Some(Self { cause, started, finished: over })
    }

    /// Seconds for which the pods held their resources.
    pub fn seconds_held(&self) -> i64 {
        self.started.as_ref().map_or(0, |started| (self.finished.0.as_second() - started.0.as_second()).max(0))
    }
}

impl Cause {
    /// The end of a pod that left this report.
    pub fn done(outcome: Outcome) -> Self {
        Self::Done { outcome: Box::new(outcome) }
    }

    /// What its report says, if it ended well.
    pub fn outcome(&self) -> Option<&Outcome> {
        match self {
            Self::Done { outcome } => Some(outcome),
            _ => None,
        }
    }

    /// What to tell the user, if it did not end well.
    pub fn complaint(&self) -> Option<&str> {
        match self {
            Self::Done { .. } => None,
            Self::Disrupted { message } | Self::Failed { message } | Self::Final { message } => Some(message),
            Self::DeadlineExceeded => Some("activeDeadlineSeconds are over"),
        }
    }
}

/// The condition that says that a Job and all its pods are over.
pub fn finished(job: &Job) -> Option<&JobCondition> {
    let conditions = job.status.as_ref()?.conditions.as_ref()?;
    conditions.iter().find(|c| (c.type_ == "Complete" || c.type_ == "Failed") && c.status == "True")
}

/// What one pod has to say, or None while it runs.
pub fn pod_cause(pod: &Pod) -> Option<Cause> {
    let status = pod.status.as_ref()?;
    let kubelet = [status.reason.as_deref(), status.message.as_deref()].into_iter().flatten().collect::<Vec<_>>();
    let kubelet = kubelet.join(": ");
    if OVER_ITS_OWN_LIMIT.iter().any(|words| kubelet.contains(words)) {
        return Some(Cause::Failed { message: kubelet });
    }
    let Some(container) = terminated(pod) else {
        let message = if kubelet.is_empty() { "its node lost it".into() } else { kubelet };
        return (status.phase.as_deref() == Some("Failed")).then_some(Cause::Disrupted { message });
    };
    Some(container_cause(pod, container))
}

fn container_cause(pod: &Pod, container: &ContainerStateTerminated) -> Cause {
    let report = RunReport::from_termination_message(container.message.as_deref().unwrap_or_default());
    match container.exit_code {
        0 => match report {
            Ok(RunReport { outcome: Outcome::Failed { message }, .. }) => Cause::Final { message },
            Ok(report) => Cause::done(report.outcome),
            Err(error) => Cause::Final { message: format!("the trainer exited with 0, but left {error}") },
        },
        exit_code::BAD_SPEC | exit_code::BAD_INPUT => Cause::Final { message: failure(report, container) },
        exit_code::PREEMPTED => Cause::Disrupted {
            message: match report {
                Ok(RunReport { outcome: Outcome::Preempted { step }, .. }) => {
                    format!("it was preempted, with a checkpoint at step {step}")
                }
                _ => "it was preempted".into(),
            },
        },
        _ if container.reason.as_deref() == Some("OOMKilled") => Cause::Failed { message: out_of_memory(pod) },
        _ if is_disrupted(pod) => Cause::Disrupted { message: format!("its pod was ended: {}", disruption(pod)) },
        _ => Cause::Failed { message: failure(report, container) },
    }
}

/// The trainer's own words, or what is known without them.
fn failure(report: Result<RunReport, ReportError>, container: &ContainerStateTerminated) -> String {
    match report {
        Ok(RunReport { outcome: Outcome::Failed { message }, .. }) => message,
        _ => {
            let reason = container.reason.as_deref().unwrap_or("Error");
            format!("the trainer exited with code {} ({reason}) and no report: see its log", container.exit_code)
        }
    }
}

fn out_of_memory(pod: &Pod) -> String {
    let limit = pod.spec.as_ref().and_then(|spec| {
        let limits = spec.containers.first()?.resources.as_ref()?.limits.as_ref()?;
        limits.get("memory").map(|quantity| quantity.0.clone())
    });
    let limit = limit.map(|limit| format!(" (its limit is {limit})")).unwrap_or_default();
    format!("the trainer ran out of memory{limit}: raise spec.resources.memory, or set training.gradientCheckpointing")
}

fn is_disrupted(pod: &Pod) -> bool {
    pod.metadata.deletion_timestamp.is_some() || disruption_condition(pod).is_some()
}

fn disruption(pod: &Pod) -> &str {
    disruption_condition(pod).and_then(|condition| condition.message.as_deref()).unwrap_or("it was deleted")
}

fn disruption_condition(pod: &Pod) -> Option<&k8s_openapi::api::core::v1::PodCondition> {
    let conditions = pod.status.as_ref()?.conditions.as_ref()?;
    conditions.iter().find(|c| c.type_ == "DisruptionTarget" && c.status == "True")
}

fn terminated(pod: &Pod) -> Option<&ContainerStateTerminated> {
    let containers = pod.status.as_ref()?.container_statuses.as_ref()?;
    containers.first()?.state.as_ref()?.terminated.as_ref()
}

/// Rank 0 publishes and reports; the others just end.
fn is_first_rank(pod: &Pod) -> bool {
    let labels = pod.metadata.labels.as_ref();
    labels.and_then(|labels| labels.get("batch.kubernetes.io/job-completion-index")).is_none_or(|index| index == "0")
}

/// Of several pods, the one that says most is heard.
fn weight(cause: &Cause) -> u8 {
    match cause {
        Cause::Disrupted { .. } | Cause::DeadlineExceeded => 0,
        Cause::Failed { .. } => 1,
        Cause::Final { .. } => 2,
        Cause::Done { .. } => 3,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod(status: serde_json::Value) -> Pod {
        let container = json!({"name": "trainer", "resources": {"limits": {"memory": "2Gi"}}});
        serde_json::from_value(json!({"spec": {"containers": [container]}, "status": status})).unwrap()
    }

    fn exited(code: i32, reason: &str, message: &str) -> Pod {
        let state = json!({"terminated": {
            "exitCode": code, "reason": reason, "message": message, "startedAt": "2026-01-01T00:00:00Z",
        }});
        let container =
            json!({"name": "trainer", "image": "", "imageID": "", "ready": false, "restartCount": 0, "state": state});
        pod(json!({"phase": if code == 0 { "Succeeded" } else { "Failed" }, "containerStatuses": [container]}))
    }

    fn report(outcome: Outcome) -> String {
        RunReport::new(outcome).to_termination_message()
    }

    fn job(condition: &str, reason: &str) -> Job {
        serde_json::from_value(json!({"status": {"conditions": [
            {"type": condition, "status": "True", "reason": reason, "lastTransitionTime": "2026-01-01T00:01:40Z"},
        ]}}))
        .unwrap()
    }

    fn failed_with(message: &str) -> String {
        report(Outcome::Failed { message: message.into() })
    }

    #[test]
    fn bad_data_is_final_and_keeps_the_trainers_words() {
        let cause = pod_cause(&exited(3, "Error", &failed_with("dataset row 17: no assistant turn")));
        assert_eq!(cause, Some(Cause::Final { message: "dataset row 17: no assistant turn".into() }));
    }

    #[test]
    fn storage_and_unknown_failures_are_tried_again() {
        for code in [1, 4, 5, 101] {
            let cause = pod_cause(&exited(code, "Error", &failed_with("x")));
            assert_eq!(cause, Some(Cause::Failed { message: "x".into() }), "{code}");
        }
        let Some(Cause::Failed { message }) = pod_cause(&exited(101, "Error", "panicked")) else { panic!() };
        assert!(message.contains("code 101"), "{message}");
    }

    #[test]
    fn out_of_memory_is_named_with_the_limit_and_what_to_raise() {
        let Some(Cause::Failed { message }) = pod_cause(&exited(137, "OOMKilled", "")) else { panic!() };
        assert!(message.contains("2Gi") && message.contains("spec.resources.memory"), "{message}");
    }

    #[test]
    fn a_preempted_pod_does_not_count() {
        let cause = pod_cause(&exited(143, "Error", &report(Outcome::Preempted { step: 40 })));
        assert!(matches!(cause, Some(Cause::Disrupted { message }) if message.contains("step 40")));
    }

    #[test]
    fn a_killed_pod_counts_only_if_nobody_meant_to_end_it() {
        assert!(matches!(pod_cause(&exited(137, "Error", "")), Some(Cause::Failed { .. })));
        let mut deleted = exited(137, "Error", "");
        deleted.metadata.deletion_timestamp = Some(Time(Timestamp::UNIX_EPOCH));
        assert!(matches!(pod_cause(&deleted), Some(Cause::Disrupted { .. })));
    }

    #[test]
    fn an_eviction_counts_only_if_the_pod_broke_its_own_limit() {
        let evicted = |message: &str| pod(json!({"phase": "Failed", "reason": "Evicted", "message": message}));
        let own = evicted("Usage of EmptyDir volume \"work\" exceeds the limit \"1Gi\". ");
        assert!(matches!(pod_cause(&own), Some(Cause::Failed { .. })));
        let pressure = evicted("The node was low on resource: memory.");
        assert!(matches!(pod_cause(&pressure), Some(Cause::Disrupted { .. })));
    }

    #[test]
    fn a_job_whose_pods_are_gone_was_disrupted() {
        let ending = Ending::of(&job("Failed", "BackoffLimitExceeded"), &[]).unwrap();
        assert!(matches!(ending.cause, Cause::Disrupted { .. }));
        assert_eq!(ending.seconds_held(), 0);
    }

    #[test]
    fn success_without_a_readable_report_is_final() {
        let ending = Ending::of(&job("Complete", ""), &[exited(0, "Completed", "done")]).unwrap();
        assert!(matches!(ending.cause, Cause::Final { .. }), "{ending:?}");
        assert_eq!(ending.seconds_held(), 100);
    }

    #[test]
    fn the_deadline_of_a_job_is_its_own_ending() {
        let ending = Ending::of(&job("Failed", "DeadlineExceeded"), &[exited(143, "Error", "")]).unwrap();
        assert_eq!(ending.cause, Cause::DeadlineExceeded);
    }

    #[test]
    fn the_first_failure_of_many_pods_is_heard_over_those_that_were_stopped_for_it() {
        let pods = [exited(143, "Error", ""), exited(3, "Error", &failed_with("bad row")), exited(143, "Error", "")];
        let ending = Ending::of(&job("Failed", "BackoffLimitExceeded"), &pods).unwrap();
        assert_eq!(ending.cause, Cause::Final { message: "bad row".into() });
    }

    #[test]
    fn a_running_job_has_no_ending() {
        assert_eq!(Ending::of(&Job::default(), &[]), None);
    }

    #[test]
    fn an_ending_survives_its_annotation() {
        let ending = Ending::of(&job("Failed", ""), &[exited(4, "Error", &failed_with("no answer"))]).unwrap();
        let json = serde_json::to_string(&ending).unwrap();
        assert_eq!(serde_json::from_str::<Ending>(&json).unwrap(), ending);
    }
}
