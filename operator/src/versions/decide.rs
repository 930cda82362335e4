//! What to do next for an AdapterVersion: a state machine without a client.

use std::time::Duration;

use k8s_openapi::jiff::{SignedDuration, Timestamp};
use tunesmith_crds::{
    AdapterVersion, AdapterVersionPhase as Phase,
    conditions::reason,
    evaluation::failure,
    run::{Outcome, Verdict},
};

use crate::{
    admission::Refusal,
    workload::{Cause, JobState, Pods, TrainerJob},
};

/// A verification that failed (storage down, say) is tried again after this.
const TRY_AGAIN: SignedDuration = SignedDuration::from_mins(5);
/// A pod that waits is looked at this often.
const LOOK_AGAIN: Duration = Duration::from_secs(5);

/// What a decision is made from.
#[derive(Clone, Debug)]
pub struct Observed {
    /// The version, as the API server has it now.
    pub version: AdapterVersion,
    /// The Job that verifies it.
    pub job: Option<TrainerJob>,
    /// Why that has no pod.
    pub refusal: Option<Refusal>,
}

/// What to do, and what the version is then.
#[derive(Clone, Debug, PartialEq)]
pub struct Decision {
    /// What to do.
    pub steps: Vec<Step>,
    /// What the status says.
    pub state: State,
}

/// One change to the cluster.
#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    /// Create the verify Job.
    Start,
    /// Delete the Job.
    Remove {
        /// UID of the Job.
        uid: String,
    },
}

/// What a version is, for its status.
#[derive(Clone, Debug, PartialEq)]
pub struct State {
    /// One word.
    pub phase: Phase,
    /// Reason of the conditions.
    pub reason: &'static str,
    /// One sentence.
    pub message: String,
    /// When to look again without an event.
    pub requeue: Option<Duration>,
}

impl State {
    fn verifying(message: impl Into<String>) -> Self {
        let message = message.into();
        Self { phase: Phase::Verifying, reason: reason::PUBLISHING, message, requeue: Some(LOOK_AGAIN) }
    }

    fn verdict(phase: Phase, message: &str) -> Self {
        let (reason, words) = match phase {
            Phase::Verifying | Phase::Available => (reason::VERIFIED, "every file is as the manifest says"),
            Phase::Rejected => (reason::REJECTED, "a file differs from the manifest"),
            Phase::Missing => (reason::MISSING, "the manifest or a file is gone"),
        };
        let message = if message.is_empty() { words } else { message };
        Self { phase, reason, message: message.into(), requeue: None }
    }

    fn gate_failed(failed: String) -> Self {
        Self { phase: Phase::Rejected, reason: reason::GATE_FAILED, message: failed, requeue: None }
    }

    /// The same, after the cluster has refused the Job.
    pub fn refused(self, refusal: &Refusal) -> Self {
        Self { reason: refusal.reason, message: refusal.message.clone(), ..self }
    }

    /// Whether it is settled.
    pub fn is_verdict(&self) -> bool {
        self.phase != Phase::Verifying
    }

    /// Whether the version can't be served.
    pub fn is_bad(&self) -> bool {
        matches!(self.phase, Phase::Rejected | Phase::Missing)
    }
}

/// Decides what to do next.
pub fn decide(observed: &Observed, now: Timestamp) -> Decision {
    let remove = |job: &TrainerJob| match job.deleting {
        true => Vec::new(),
        false => vec![Step::Remove { uid: job.uid.clone() }],
    };
    // One that is over goes by itself after a while, unless a sidecar keeps its pod alive.
    let tidy = |job: &TrainerJob| match &job.state {
        JobState::Ended(ending) if !ending.outlived => Vec::new(),
        _ => remove(job),
    };
    let gated = failure(&observed.version.spec.gates).map(State::gate_failed);
    if let Some(state) = gated.or_else(|| settled(&observed.version)) {
        return Decision { steps: observed.job.as_ref().map(tidy).unwrap_or_default(), state };
    }
    let Some(job) = &observed.job else {
        return Decision { steps: vec![Step::Start], state: State::verifying("creates the verify Job") };
    };
    let (steps, state) = match &job.state {
        _ if job.deleting => (Vec::new(), State::verifying("starts again")),
        JobState::Active { pods, last_failure } => (Vec::new(), waits(observed, pods, last_failure.as_deref())),
        JobState::Ended(ending) => match (&ending.cause, ending.cause.outcome()) {
            (_, Some(Outcome::Verified(report))) => {
                let phase = match report.verdict {
                    Verdict::Intact => Phase::Available,
                    Verdict::Corrupt => Phase::Rejected,
                    Verdict::Missing => Phase::Missing,
                };
                (tidy(job), State::verdict(phase, &report.message))
            }
            (Cause::Disrupted { message }, _) => (remove(job), State::verifying(format!("starts again: {message}"))),
            (cause, _) => {
                let again = ending.finished.0.saturating_add(TRY_AGAIN).unwrap_or(now);
                let left = again.duration_since(now);
                let steps = if left.is_positive() { Vec::new() } else { remove(job) };
                let words = cause.complaint().unwrap_or("the pod left the report of another subcommand");
                let state = State { reason: reason::RETRYING, ..State::verifying(words) };
                (steps, State { requeue: Some(left.unsigned_abs().max(LOOK_AGAIN)), ..state })
            }
        },
    };
    Decision { steps, state }
}

/// Whether the status holds a verdict.
pub fn is_settled(version: &AdapterVersion) -> bool {
    settled(version).is_some()
}

/// The verdict that the status holds already.
fn settled(version: &AdapterVersion) -> Option<State> {
    let status = version.status.as_ref()?;
    let phase = status.phase.filter(|phase| *phase != Phase::Verifying)?;
    let ready = status.conditions.iter().find(|condition| condition.type_ == "Ready");
    Some(State::verdict(phase, ready.map_or("", |condition| &condition.message)))
}

fn waits(observed: &Observed, pods: &Pods, last_failure: Option<&str>) -> State {
    match (pods, &observed.refusal, last_failure) {
        (Pods::Missing, Some(refusal), _) => State::verifying("").refused(refusal),
        (_, _, Some(failure)) => State { reason: reason::RETRYING, ..State::verifying(failure) },
        (Pods::Unschedulable(words), ..) => {
            State { reason: reason::UNSCHEDULABLE, ..State::verifying(format!("no node takes the pod: {words}")) }
        }
        (Pods::Starting(words), ..) => State::verifying(format!("verify pod {words}")),
        _ => State::verifying("compares the files with the manifest"),
    }
}

#[cfg(test)]
mod tests {
    use tunesmith_crds::run::VerifyReport;

    use super::*;
    use crate::{
        fixtures::{at, ended, trainer_job, version},
        workload::Stage,
    };

    fn job() -> TrainerJob {
        trainer_job("support-v1-verify", Stage::Verify)
    }

    fn observed(phase: Option<Phase>, job: Option<TrainerJob>) -> Observed {
        Observed { version: version(1, "sha256:x", phase), job, refusal: None }
    }

    fn reported(verdict: Verdict, message: &str) -> TrainerJob {
        let report = VerifyReport { verdict, message: message.into() };
        ended(job(), Cause::done(Outcome::Verified(report)))
    }

    fn removes(decision: &Decision) -> bool {
        matches!(&decision.steps[..], [Step::Remove { .. }])
    }

    #[test]
    fn a_new_version_is_verified() {
        let decision = decide(&observed(None, None), at(1000));
        assert_eq!((decision.steps, decision.state.phase), (vec![Step::Start], Phase::Verifying));
    }

    #[test]
    fn the_report_is_the_verdict_and_the_job_goes_by_itself() {
        for (verdict, phase, reason) in [
            (Verdict::Intact, Phase::Available, reason::VERIFIED),
            (Verdict::Corrupt, Phase::Rejected, reason::REJECTED),
            (Verdict::Missing, Phase::Missing, reason::MISSING),
        ] {
            let decision = decide(&observed(Some(Phase::Verifying), Some(reported(verdict, ""))), at(1000));
            assert_eq!((decision.state.phase, decision.state.reason), (phase, reason));
            assert!(decision.steps.is_empty() && !decision.state.message.is_empty());
        }
    }

    #[test]
    fn a_verdict_is_final_and_cleans_up_after_itself() {
        let decision = decide(&observed(Some(Phase::Available), None), at(1000));
        assert_eq!((decision.steps.len(), decision.state.phase), (0, Phase::Available));
        let over = reported(Verdict::Corrupt, "");
        let mut kept_alive = over.clone();
        let JobState::Ended(ending) = &mut kept_alive.state else { panic!() };
        ending.outlived = true;
        for (left_behind, goes) in [(over, false), (kept_alive, true), (job(), true)] {
            let decision = decide(&observed(Some(Phase::Available), Some(left_behind)), at(1000));
            assert_eq!((removes(&decision), decision.state.phase), (goes, Phase::Available));
        }
    }

    #[test]
    fn a_version_that_failed_a_gate_is_rejected_without_a_pod_and_says_which() {
        let mut gated = observed(None, None);
        gated.version.spec.gates = serde_json::from_value(serde_json::json!([
            {"metric": "eval_loss", "value": 1.5, "max": 1.9, "passed": true},
            {"metric": "recall", "value": 0.02, "min": 0.8, "passed": false},
        ]))
        .unwrap();
        let expected = (Phase::Rejected, reason::GATE_FAILED, "recall 0.02 is below 0.80");
        for status in [None, Some(Phase::Rejected)] {
            gated.version.status = observed(status, None).version.status;
            let decision = decide(&gated, at(1000));
            let State { phase, reason, message, .. } = &decision.state;
            assert_eq!((*phase, *reason, message.as_str()), expected);
            assert!(decision.steps.is_empty() && decision.state.is_verdict() && decision.state.is_bad());
        }
        let status = super::super::status::status(&gated.version, &decide(&gated, at(1000)).state, at(1000));
        let ready = status.conditions.iter().find(|condition| condition.type_ == "Ready").unwrap();
        assert_eq!((ready.status.as_str(), ready.reason.as_str()), ("False", reason::GATE_FAILED));
        assert_eq!((ready.message.as_str(), status.verified_time), (expected.2, None), "no file was read");
    }

    #[test]
    fn a_version_that_passed_its_gates_is_verified_like_any_other() {
        let mut passed = observed(None, None);
        passed.version.spec.gates = serde_json::from_value(
            serde_json::json!([{"metric": "eval_loss", "value": 1.5, "max": 1.9, "passed": true}]),
        )
        .unwrap();
        assert_eq!(decide(&passed, at(1000)).steps, [Step::Start]);
    }

    #[test]
    fn a_verification_that_failed_is_tried_again_later() {
        let down = Some(ended(job(), Cause::Failed { message: "the store is down".into() }));
        let soon = decide(&observed(None, down.clone()), at(101));
        assert_eq!((soon.steps.len(), soon.state.phase, soon.state.reason), (0, Phase::Verifying, reason::RETRYING));
        assert_eq!(soon.state.message, "the store is down");
        assert_eq!(soon.state.requeue, Some(Duration::from_secs(299)));
        assert!(removes(&decide(&observed(None, down), at(400))));
    }

    #[test]
    fn a_disrupted_verification_starts_again_at_once() {
        let disrupted = ended(job(), Cause::Disrupted { message: "its node went".into() });
        let decision = decide(&observed(None, Some(disrupted)), at(101));
        assert!(removes(&decision));
        assert_eq!(decision.state.phase, Phase::Verifying);
    }

    #[test]
    fn what_keeps_the_pod_from_running_is_told() {
        let mut waiting = observed(None, Some(job()));
        waiting.refusal = Some(Refusal { reason: reason::QUOTA_EXCEEDED, message: "no room".into(), is_final: false });
        let state = decide(&waiting, at(1000)).state;
        assert_eq!((state.reason, state.message.as_str()), (reason::QUOTA_EXCEEDED, "no room"));
    }
}
