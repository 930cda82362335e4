//! How a trainer Job ended: its pods' termination messages and exit codes, turned into what the controllers act on.

use k8s_openapi::{
    api::{
        batch::v1::{Job, JobCondition},
        core::v1::{ContainerStateTerminated, ContainerStatus, Pod},
    },
    apimachinery::pkg::apis::meta::v1::Time,
    jiff::Timestamp,
};
use kube::ResourceExt;
use tunesmith_crds::{
    fine_tune_run,
    names::{STAGE_LABEL, exit_code},
    run::{Outcome, ReportError, RunReport},
};

use super::{Stage, pod::CONTAINER};

/// What the kubelet says when it evicts a pod for what the pod itself did. Any other eviction is a disruption.
const OVER_ITS_OWN_LIMIT: [&str; 3] =
    ["exceeds the limit", "exceeds the total limit", "exceeded its local ephemeral storage limit"];

/// How a trainer Job ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Ending {
    /// What came of it.
    pub cause: Cause,
    /// When its pod's container started; None if none did.
    pub started: Option<Time>,
    /// When the Job was over.
    pub finished: Time,
    /// Digest of the image that its container ran.
    pub image_id: Option<String>,
    /// Sidecars keep its pods alive.
    pub outlived: bool,
}

/// What came of a trainer Job.
#[derive(Clone, Debug, PartialEq)]
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
    /// The store did not answer, or refused.
    StoreUnavailable {
        /// Its words.
        message: String,
    },
    /// Model, data or trainer are no longer what was checked.
    InputsChanged {
        /// Which.
        message: String,
    },
    /// Another run has claimed its version.
    VersionTaken {
        /// Which run.
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
    /// activeDeadlineSeconds were over.
    DeadlineExceeded,
}

impl Ending {
    /// How `job` ended, or None while it goes on. `pods` are the Job's pods, as the API server has them now.
    pub fn of(job: &Job, pods: &[Pod]) -> Option<Self> {
        let condition = finished(job);
        let finished = match condition {
            Some(condition) => condition.last_transition_time.clone().unwrap_or(Time(Timestamp::UNIX_EPOCH)),
            None => outlived(pods)?,
        };
        let succeeded = condition.is_some_and(|condition| condition.type_ == "Complete");
        let speaking = pods.iter().filter(|pod| !succeeded || is_first_rank(pod));
        let cause = match condition.and_then(|condition| condition.reason.as_deref()) {
            Some("DeadlineExceeded") => Cause::DeadlineExceeded,
            _ => speaking.filter_map(pod_cause).max_by_key(weight).unwrap_or_else(|| Cause::Disrupted {
                message: "its pods were deleted before they could report".into(),
            }),
        };
        let started = pods.iter().filter_map(|pod| terminated(pod)?.started_at.clone()).min_by_key(|time| time.0);
        let image_id = pods.iter().find_map(|pod| Some(trainer(pod)?.image_id.clone())).filter(|id| !id.is_empty());
        Some(Self { cause, started, finished, image_id, outlived: condition.is_none() })
    }
}

/// When the last trainer of pods ended that sidecars keep alive; None where a trainer runs, or no sidecar does.
pub fn outlived(pods: &[Pod]) -> Option<Time> {
    // The pod's own phase tells nothing: it lags behind its containers.
    let has_sidecar = |pod: &Pod| {
        let containers = pod.status.iter().flat_map(|status| status.container_statuses.iter().flatten());
        containers.into_iter().any(|container| container.state.as_ref().is_some_and(|state| state.running.is_some()))
    };
    let ends: Option<Vec<_>> = pods.iter().map(terminated).collect();
    let kept_alive = pods.iter().any(|pod| has_sidecar(pod) && terminated(pod).is_some());
    let ends = ends.filter(|_| kept_alive)?.into_iter();
    Some(
        ends.filter_map(|end| end.finished_at.clone()).max_by_key(|time| time.0).unwrap_or(Time(Timestamp::UNIX_EPOCH)),
    )
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

    /// One word for the record.
    pub fn kind(&self) -> fine_tune_run::Cause {
        match self {
            Self::Done { .. } => fine_tune_run::Cause::Done,
            Self::Disrupted { .. } => fine_tune_run::Cause::Disrupted,
            Self::StoreUnavailable { .. } => fine_tune_run::Cause::StoreUnavailable,
            Self::InputsChanged { .. } => fine_tune_run::Cause::InputsChanged,
            Self::VersionTaken { .. } => fine_tune_run::Cause::VersionTaken,
            Self::Failed { .. } => fine_tune_run::Cause::Failed,
            Self::Final { .. } => fine_tune_run::Cause::Final,
            Self::DeadlineExceeded => fine_tune_run::Cause::DeadlineExceeded,
        }
    }

    /// What to tell the user, if it did not end well.
    pub fn complaint(&self) -> Option<&str> {
        match self {
            Self::Done { .. } => None,
            Self::Disrupted { message }
            | Self::StoreUnavailable { message }
            | Self::InputsChanged { message }
            | Self::VersionTaken { message }
            | Self::Failed { message }
            | Self::Final { message } => Some(message),
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
    if status.reason.as_deref() == Some("DeadlineExceeded") {
        return Some(Cause::DeadlineExceeded);
    }
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
        exit_code::INPUTS_CHANGED => Cause::InputsChanged { message: failure(report, container) },
        exit_code::VERSION_TAKEN => Cause::VersionTaken { message: failure(report, container) },
        exit_code::STORAGE => Cause::StoreUnavailable { message: failure(report, container) },
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
        let trainer = spec.containers.iter().find(|container| container.name == CONTAINER)?;
        let limits = trainer.resources.as_ref()?.limits.as_ref()?;
        limits.get("memory").map(|quantity| quantity.0.clone())
    });
    let limit = limit.map(|limit| format!(" (its limit is {limit})")).unwrap_or_default();
    let advice = match pod.labels().get(STAGE_LABEL).map(String::as_str) {
        Some(stage) if stage != Stage::Train.name() => "raise trainer.checks.memory in the chart's values",
        _ => "raise spec.resources.memory, or set training.gradientCheckpointing",
    };
    format!("the trainer ran out of memory{limit}: {advice}")
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
    trainer(pod)?.state.as_ref()?.terminated.as_ref()
}

/// The trainer's own container, which sidecars may stand beside.
pub fn trainer(pod: &Pod) -> Option<&ContainerStatus> {
    pod.status.as_ref()?.container_statuses.as_ref()?.iter().find(|container| container.name == CONTAINER)
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
        Cause::StoreUnavailable { .. }
        | Cause::InputsChanged { .. }
        | Cause::VersionTaken { .. }
        | Cause::Failed { .. } => 1,
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
    fn storage_changed_inputs_and_unknown_failures_are_told_apart() {
        for code in [1, 5, 101] {
            let cause = pod_cause(&exited(code, "Error", &failed_with("x")));
            assert_eq!(cause, Some(Cause::Failed { message: "x".into() }), "{code}");
        }
        let store = pod_cause(&exited(4, "Error", &failed_with("x")));
        assert_eq!(store, Some(Cause::StoreUnavailable { message: "x".into() }));
        let changed = pod_cause(&exited(7, "Error", &failed_with("x")));
        assert_eq!(changed, Some(Cause::InputsChanged { message: "x".into() }));
        let Some(Cause::Failed { message }) = pod_cause(&exited(101, "Error", "panicked")) else { panic!() };
        assert!(message.contains("code 101"), "{message}");
    }

    #[test]
    fn out_of_memory_is_named_with_the_limit_and_what_to_raise() {
        let Some(Cause::Failed { message }) = pod_cause(&exited(137, "OOMKilled", "")) else { panic!() };
        assert!(message.contains("2Gi") && message.contains("spec.resources.memory"), "{message}");
        let mut beside = exited(137, "OOMKilled", "");
        let proxy = serde_json::from_value(json!({"name": "proxy", "resources": {"limits": {"memory": "64Mi"}}}));
        beside.spec.as_mut().unwrap().containers.insert(0, proxy.unwrap());
        assert!(matches!(pod_cause(&beside), Some(Cause::Failed { message }) if message.contains("2Gi")));
        let mut check = exited(137, "OOMKilled", "");
        check.metadata.labels = Some([(STAGE_LABEL.to_owned(), "preflight".to_owned())].into());
        let Some(Cause::Failed { message }) = pod_cause(&check) else { panic!() };
        assert!(message.ends_with("raise trainer.checks.memory in the chart's values"), "{message}");
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
        assert_eq!(ending.started, None);
    }

    #[test]
    fn success_without_a_readable_report_is_final() {
        let ending = Ending::of(&job("Complete", ""), &[exited(0, "Completed", "done")]).unwrap();
        assert!(matches!(ending.cause, Cause::Final { .. }), "{ending:?}");
        assert_eq!(ending.finished.0.duration_since(ending.started.unwrap().0).as_secs(), 100);
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
    fn a_trainer_that_a_sidecar_outlives_has_ended_and_is_heard() {
        let trainer = json!({"name": "trainer", "image": "", "imageID": "i@sha256:1", "ready": false, "restartCount": 0,
            "state": {"terminated": {"exitCode": 3, "reason": "Error", "message": failed_with("bad row"),
                "startedAt": "2026-01-01T00:00:00Z", "finishedAt": "2026-01-01T00:00:09Z"}}});
        let proxy = json!({"name": "istio-proxy", "image": "", "imageID": "", "ready": true, "restartCount": 0,
            "state": {"running": {}}});
        let kept = pod(json!({"phase": "Running", "containerStatuses": [proxy, trainer]}));
        let ending = Ending::of(&Job::default(), std::slice::from_ref(&kept)).unwrap();
        assert_eq!(ending.cause, Cause::Final { message: "bad row".into() });
        assert_eq!(ending.image_id.as_deref(), Some("i@sha256:1"));
        let alone = pod(json!({"phase": "Running", "containerStatuses": [trainer]}));
        assert_eq!(Ending::of(&Job::default(), &[alone]), None, "its phase and its Job follow at once");
        let at_work = pod(json!({"phase": "Running", "containerStatuses": [proxy]}));
        assert_eq!(Ending::of(&Job::default(), &[kept, at_work]), None, "another rank's trainer has not ended");
    }

    #[test]
    fn the_deadline_of_a_pod_counts_as_the_runs() {
        let pod = pod(json!({"phase": "Failed", "reason": "DeadlineExceeded", "message": "Pod was active too long"}));
        assert_eq!(pod_cause(&pod), Some(Cause::DeadlineExceeded));
    }
}
