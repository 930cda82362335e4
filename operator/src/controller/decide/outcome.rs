//! What a run comes to: a version of its own or one of the same inputs, and whether that may be served.

use tunesmith_crds::{
    AdapterVersion, AdapterVersionPhase, Evaluation, FineTuneJobPhase as Phase, conditions::reason, evaluation::failure,
};

use super::{State, Step, digest_of};
use crate::controller::observed::{Observed, Run};

/// A run that has published, or whose inputs had been trained before, is as good as its version.
pub(super) fn outcome(observed: &Observed, run: &Run, steps: &mut Vec<Step>) -> Option<State> {
    if let Some(name) = &run.version {
        let reuses = run.attempts.is_empty();
        return Some(match observed.version(name) {
            Some(version) => published(version, name, &observed.job.spec.evaluation, reuses),
            None => State::new(
                Phase::Failed,
                reason::MISSING,
                format!("AdapterVersion {name} was deleted: change the spec to train again"),
            ),
        });
    }
    if let Some(report) = run.train_report() {
        return Some(match &run.task {
            Some(_) => State::new(Phase::Publishing, reason::PUBLISHING, "records the version"),
            None => State::new(
                Phase::Failed,
                reason::TRAINING_FAILED,
                format!(
                    "version {} is published, but the run's ConfigMap was deleted: change the spec",
                    report.version
                ),
            ),
        });
    }
    reuse(observed, run, steps)
}

/// Nothing was trained yet: the same inputs may have led to a version before, with all that the gates ask for on record.
///
/// What failed the gates would fail them again. What passes them, but was Rejected (by other gates, or as corrupt), is
/// followed by a new version: a record never changes, and the new training goes on from the last checkpoint.
fn reuse(observed: &Observed, run: &Run, steps: &mut Vec<Step>) -> Option<State> {
    let report = run.preflight_report().filter(|_| run.attempts.is_empty())?;
    let digest = digest_of(observed, run, report)?;
    let gates = &observed.job.spec.evaluation;
    let probe = report.probe_digest.as_deref();
    let same = |wanted: &dyn Fn(&AdapterVersion) -> bool| {
        let versions = observed.versions.iter().filter(|version| {
            version.spec.source.input_digest == digest && gates.is_measured_by(&version.spec.metrics, probe)
        });
        versions.filter(|version| wanted(version)).max_by_key(|version| version.spec.version).and_then(name_of)
    };
    let phase = |version: &AdapterVersion| version.status.as_ref().and_then(|status| status.phase);
    let served = |version: &AdapterVersion| phase(version) == Some(AdapterVersionPhase::Available);
    if let Some(name) = same(&|version| served(version) || gate_failure(version, gates).is_some()) {
        steps.push(Step::SettleRun { run: run.number, version: name.into() });
        let message = format!("AdapterVersion {name} has the same inputs");
        return Some(State::new(Phase::Publishing, reason::PUBLISHING, message));
    }
    let name = same(&|version| matches!(phase(version), None | Some(AdapterVersionPhase::Verifying)))?;
    let message = format!("AdapterVersion {name} has the same inputs and is being verified");
    Some(State::new(Phase::Publishing, reason::PUBLISHING, message))
}

/// Which of `gates` a version's recorded metrics miss, in words.
fn gate_failure(version: &AdapterVersion, gates: &Evaluation) -> Option<String> {
    failure(&gates.judge(&version.spec.metrics))
}

fn published(version: &AdapterVersion, name: &str, gates: &Evaluation, reused: bool) -> State {
    if let Some(failed) = gate_failure(version, gates) {
        let origin = if reused { ", trained from the same inputs," } else { "" };
        let message = format!("AdapterVersion {name}{origin} must not be served: {failed}");
        return State::new(Phase::Failed, reason::GATE_FAILED, message);
    }
    let status = version.status.as_ref();
    let ready = status.and_then(|status| status.conditions.iter().find(|c| c.type_ == "Ready"));
    let words = ready.map(|condition| condition.message.as_str()).filter(|message| !message.is_empty());
    match status.and_then(|status| status.phase) {
        Some(AdapterVersionPhase::Available) if reused => State::new(
            Phase::Succeeded,
            reason::REUSED,
            format!("AdapterVersion {name} was trained from the same inputs"),
        ),
        Some(AdapterVersionPhase::Available) => {
            State::new(Phase::Succeeded, reason::PUBLISHED, format!("AdapterVersion {name} is available"))
        }
        Some(AdapterVersionPhase::Rejected) => {
            State::new(Phase::Failed, reason::REJECTED, format!("{name}: {}", words.unwrap_or("its files are corrupt")))
        }
        Some(AdapterVersionPhase::Missing) => {
            State::new(Phase::Failed, reason::MISSING, format!("{name}: {}", words.unwrap_or("its files are gone")))
        }
        None | Some(AdapterVersionPhase::Verifying) => {
            let words = words.map(|words| format!(": {words}")).unwrap_or_default();
            State::new(Phase::Publishing, reason::PUBLISHING, format!("verifies AdapterVersion {name}{words}"))
        }
    }
}

fn name_of(version: &AdapterVersion) -> Option<&str> {
    version.metadata.name.as_deref()
}
