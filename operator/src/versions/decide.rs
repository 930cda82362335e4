//! What to do next for an AdapterVersion: a state machine without a client.

use std::time::Duration;

use k8s_openapi::jiff::{SignedDuration, Timestamp};
use kube::ResourceExt;
use tunesmith_crds::{
    AdapterVersion, AdapterVersionPhase as Phase,
    conditions::reason,
    evaluation::failure,
    names::VERIFY_ANNOTATION,
    run::{Outcome, Verdict},
};

use super::inspections::Found;
use crate::{
    admission::Refusal,
    workload::{Cause, JobState, Pods, TrainerJob},
};

/// A verification that failed (storage down, say) is tried again after this.
const TRY_AGAIN: SignedDuration = SignedDuration::from_mins(5);
/// Begins what is told of an annotation, behind a verdict.
const ANNOTATION: &str = " (annotation ";
/// A verification that is asked for later is looked at this often.
const LONGEST_WAIT: Duration = Duration::from_secs(3600);
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
    /// What an inspection has found of its files.
    pub found: Option<Found>,
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
    /// When a pod came to this verdict, if it is a new one.
    pub verified: Option<Timestamp>,
    /// When its files were looked up, if they were anew.
    pub inspected: Option<Timestamp>,
}

impl State {
    fn of(phase: Phase, reason: &'static str) -> Self {
        Self { phase, reason, message: String::new(), requeue: None, verified: None, inspected: None }
    }

    fn verifying(message: impl Into<String>) -> Self {
        let message = message.into();
        let requeue = Some(LOOK_AGAIN);
        Self { requeue, message, ..Self::of(Phase::Verifying, reason::PUBLISHING) }
    }

    fn verdict(phase: Phase, message: &str) -> Self {
        let (reason, words) = match phase {
            Phase::Verifying | Phase::Available => (reason::VERIFIED, "every file is as the manifest says"),
            Phase::Rejected => (reason::REJECTED, "a file differs from the manifest"),
            Phase::Missing => (reason::MISSING, "the manifest or a file is gone"),
        };
        let message = if message.is_empty() { words } else { message };
        Self { message: message.into(), ..Self::of(phase, reason) }
    }

    fn gate_failed(failed: String) -> Self {
        Self { message: failed, ..Self::of(Phase::Rejected, reason::GATE_FAILED) }
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

/// Whether the user's annotation asks for another verification.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Again {
    /// No, or it was done.
    No,
    /// From this time on.
    At(Timestamp),
    /// It is no time.
    Unreadable(String),
}

impl Again {
    fn of(version: &AdapterVersion) -> Self {
        let verified = version.status.as_ref().and_then(|status| status.verified_time.as_ref());
        let Some(text) = version.annotations().get(VERIFY_ANNOTATION) else { return Self::No };
        match text.parse::<Timestamp>() {
            Ok(time) if verified.is_none_or(|verified| verified.0 < time) => Self::At(time),
            Ok(_) => Self::No,
            Err(_) => Self::Unreadable(text.clone()),
        }
    }
}

/// Decides what to do next.
pub fn decide(observed: &Observed, now: Timestamp) -> Decision {
    let steps = || observed.job.as_ref().map(tidy).unwrap_or_default();
    if let Some(failed) = failure(&observed.version.spec.gates) {
        return Decision { steps: steps(), state: State::gate_failed(failed) };
    }
    let Some(state) = settled(&observed.version) else { return verify(observed, None, now) };
    let state = inspected(state, observed);
    match Again::of(&observed.version) {
        Again::No => Decision { steps: steps(), state },
        Again::At(time) if time > now => {
            let wait = time.duration_since(now).unsigned_abs().clamp(Duration::from_secs(1), LONGEST_WAIT);
            Decision { steps: steps(), state: State { requeue: Some(wait), ..state } }
        }
        // Until the new verdict the old one holds.
        Again::At(time) => {
            let decision = verify(observed, Some(time), now);
            let told = match decision.state.is_verdict() {
                true => decision.state,
                false => State { requeue: decision.state.requeue, ..state },
            };
            Decision { steps: decision.steps, state: told }
        }
        Again::Unreadable(text) => {
            let message = format!(
                "{}{ANNOTATION}{VERIFY_ANNOTATION}: {text:?} is not a time such as 2026-11-28T10:00:00Z)",
                state.message
            );
            Decision { steps: steps(), state: State { message, ..state } }
        }
    }
}

/// What is served is so until its files are found to be gone, or others.
fn inspected(state: State, observed: &Observed) -> State {
    let Some(found) = observed.found.as_ref().filter(|_| state.phase == Phase::Available) else { return state };
    let state = match found.verdict {
        Verdict::Intact => state,
        Verdict::Corrupt => State::verdict(Phase::Rejected, &found.message),
        Verdict::Missing => State::verdict(Phase::Missing, &found.message),
    };
    State { inspected: Some(found.time), ..state }
}

fn remove(job: &TrainerJob) -> Vec<Step> {
    match job.deleting {
        true => Vec::new(),
        false => vec![Step::Remove { uid: job.uid.clone() }],
    }
}

/// One that is over goes by itself after a while, unless a sidecar keeps its pod alive.
fn tidy(job: &TrainerJob) -> Vec<Step> {
    match &job.state {
        JobState::Ended(ending) if !ending.outlived => Vec::new(),
        _ => remove(job),
    }
}

/// Verifies; what a Job says that was over before `since` is old.
fn verify(observed: &Observed, since: Option<Timestamp>, now: Timestamp) -> Decision {
    let Some(job) = &observed.job else {
        return Decision { steps: vec![Step::Start], state: State::verifying("creates the verify Job") };
    };
    let (steps, state) = match &job.state {
        _ if job.deleting => (Vec::new(), State::verifying("starts again")),
        JobState::Active { pods, last_failure } => (Vec::new(), waits(observed, pods, last_failure.as_deref())),
        JobState::Ended(ending) if since.is_some_and(|since| ending.finished.0 < since) => {
            (remove(job), State::verifying("starts again"))
        }
        JobState::Ended(ending) => match (&ending.cause, ending.cause.outcome()) {
            (_, Some(Outcome::Verified(report))) => {
                let phase = match report.verdict {
                    Verdict::Intact => Phase::Available,
                    Verdict::Corrupt => Phase::Rejected,
                    Verdict::Missing => Phase::Missing,
                };
                let state = State::verdict(phase, &report.message);
                (tidy(job), State { verified: Some(ending.finished.0), ..state })
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

/// Whether the status holds a verdict, and nobody asks for another.
pub fn is_settled(version: &AdapterVersion) -> bool {
    settled(version).is_some() && Again::of(version) == Again::No
}

/// The verdict that the status holds already.
fn settled(version: &AdapterVersion) -> Option<State> {
    let status = version.status.as_ref()?;
    let phase = status.phase.filter(|phase| *phase != Phase::Verifying)?;
    let ready = status.conditions.iter().find(|condition| condition.type_ == "Ready");
    let words = ready.map_or("", |condition| &condition.message);
    // What was told of an annotation is no part of the verdict.
    Some(State::verdict(phase, words.split(ANNOTATION).next().unwrap_or_default()))
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
        Observed { version: version(1, "sha256:x", phase), job, refusal: None, found: None }
    }

    fn reported(verdict: Verdict, message: &str) -> TrainerJob {
        let report = VerifyReport { verdict, message: message.into() };
        ended(job(), Cause::done(Outcome::Verified(report)))
    }

    fn removes(decision: &Decision) -> bool {
        matches!(&decision.steps[..], [Step::Remove { .. }])
    }

    #[test]
    fn what_an_inspection_finds_is_the_verdict_on_what_is_served_and_nothing_else() {
        let found = |verdict, message: &str| Some(Found { time: at(500), verdict, message: message.into() });
        let decided = |phase, found| decide(&Observed { found, ..observed(Some(phase), None) }, at(1000)).state;
        let intact = decided(Phase::Available, found(Verdict::Intact, ""));
        assert_eq!((intact.phase, intact.inspected, intact.verified), (Phase::Available, Some(at(500)), None));
        let gone = decided(Phase::Available, found(Verdict::Missing, "s3://a/README.md is gone"));
        assert_eq!((gone.phase, gone.message.as_str()), (Phase::Missing, "s3://a/README.md is gone"));
        assert_eq!(decided(Phase::Available, found(Verdict::Corrupt, "")).phase, Phase::Rejected);
        for phase in [Phase::Missing, Phase::Rejected] {
            assert_eq!(decided(phase, found(Verdict::Intact, "")).phase, phase);
        }
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
    fn a_version_is_verified_once_more_when_its_user_asks_and_is_what_it_was_until_then() {
        let asked = |at: &str, job: Option<TrainerJob>| {
            let mut observed = observed(Some(Phase::Available), job);
            observed.version.metadata.annotations = Some([(VERIFY_ANNOTATION.to_owned(), at.to_owned())].into());
            observed
        };
        let (then, now) = ("1970-01-01T00:15:00Z", at(1000));
        let available = |decision: &Decision| assert_eq!(decision.state.phase, Phase::Available);
        let begins = decide(&asked(then, None), now);
        available(&begins);
        assert_eq!(begins.steps, [Step::Start]);
        // What was found at 100 s is no answer to a question of 900 s.
        let old = decide(&asked(then, Some(reported(Verdict::Missing, ""))), now);
        available(&old);
        assert!(removes(&old));
        let mut job = reported(Verdict::Missing, "");
        let JobState::Ended(ending) = &mut job.state else { panic!() };
        ending.finished.0 = at(950);
        let mut found = asked(then, Some(job));
        let decision = decide(&found, now);
        assert_eq!((decision.state.phase, decision.state.verified), (Phase::Missing, Some(at(950))));
        found.version.status = Some(super::super::status::status(&found.version, &decision.state, now));
        assert!(is_settled(&found.version), "it was done");

        let later = decide(&asked("1970-01-01T00:20:00Z", None), now);
        available(&later);
        assert_eq!((later.steps.len(), later.state.requeue), (0, Some(Duration::from_secs(200))));
        let unreadable = decide(&asked("tonight", None), now);
        available(&unreadable);
        assert!(unreadable.state.message.contains("\"tonight\" is not a time"), "{}", unreadable.state.message);
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
