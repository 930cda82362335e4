//! What a run comes to: a version of its own or one of the same inputs, and whether that may be served.

use tunesmith_crds::{
    AdapterVersion, AdapterVersionPhase, Evaluation, FineTuneJobPhase as Phase, conditions::reason,
    evaluation::failure, fine_tune_job::Output, fine_tune_run::RunStage,
};

use super::{
    advance::{Advance, Step, over, publish},
    task::digest_of,
};
use crate::{observed::Observed, run::Run, state::State};

/// A run that has published, or whose inputs had been trained before, is as good as its version.
pub(super) fn outcome(run: &Run, observed: &Observed, advance: &mut Advance) -> Option<State> {
    let Advance { record, steps, .. } = advance;
    if record.published.is_some() && record.adapter_version.is_none() {
        publish(run, record, steps);
        return Some(State::new(Phase::Publishing, reason::PUBLISHING, "records the version"));
    }
    let name = record.adapter_version.clone()?;
    let reuses = record.published.is_none();
    let Some(version) = observed.version(&name) else {
        if record.stage != Some(RunStage::Done) && !reuses {
            steps.push(Step::CreateVersion);
            return Some(State::new(Phase::Publishing, reason::PUBLISHING, "records the version"));
        }
        let message = format!("AdapterVersion {name} was deleted: change the spec to train again");
        return Some(over(record, reason::MISSING, message));
    };
    let state = published(version, &name, &observed.job.spec.evaluation, reuses);
    record.stage = Some(match state.phase {
        Phase::Succeeded | Phase::Failed => RunStage::Done,
        _ => RunStage::Recorded,
    });
    if record.stage == Some(RunStage::Done) {
        record.reason = Some(state.reason.into());
        record.message = Some(state.message.clone());
    }
    Some(state)
}

/// Nothing was trained yet: the same inputs may have led to a version before, with all that the gates ask for on record,
/// where the job wants its versions.
///
/// What failed the gates would fail them again. What passes them, but was Rejected (by other gates, or as corrupt), is
/// followed by a new version: a record never changes, and the new training goes on from the last checkpoint.
pub(super) fn reuse(observed: &Observed, run: &Run, advance: &mut Advance) -> Option<State> {
    if advance.record.last_attempt > 0 {
        return None;
    }
    let digest = digest_of(run, &advance.record, observed)?;
    let probe = advance.record.preflight.as_ref()?.probe_digest.as_deref();
    let spec = &observed.job.spec;
    let twins = twins(observed, &digest, probe);
    let newest = |wanted: &dyn Fn(&AdapterVersion) -> bool| {
        let versions = twins.iter().filter(|version| wanted(version));
        versions.max_by_key(|version| version.spec.version).and_then(|version| name_of(version))
    };
    let is_here = |version: &AdapterVersion| is_where_wanted(version, &spec.output);
    if let Some(name) =
        newest(&|version| is_served(version) && is_here(version) || gate_failure(version, &spec.evaluation).is_some())
    {
        let message = format!("AdapterVersion {name} has the same inputs");
        advance.record.adapter_version = Some(name.into());
        advance.record.stage = Some(RunStage::Recorded);
        return Some(State::new(Phase::Publishing, reason::PUBLISHING, message));
    }
    let is_verifying =
        |version: &AdapterVersion| matches!(phase_of(version), None | Some(AdapterVersionPhase::Verifying));
    let name = match newest(&|version| is_verifying(version) && is_here(version)) {
        Some(name) => name,
        // It is copied.
        None if newest(&is_served).is_some() => return None,
        None => newest(&is_verifying)?,
    };
    let message = format!("AdapterVersion {name} has the same inputs and is being verified");
    Some(State::new(Phase::Publishing, reason::PUBLISHING, message))
}

/// The newest version of these inputs that may be served, and lies elsewhere than where the job wants its versions, or is
/// read with other credentials.
pub(super) fn served_elsewhere<'a>(
    observed: &'a Observed,
    digest: &str,
    probe: Option<&str>,
) -> Option<&'a AdapterVersion> {
    let output = &observed.job.spec.output;
    let served = twins(observed, digest, probe).into_iter().filter(|version| is_served(version));
    served.filter(|version| !is_where_wanted(version, output)).max_by_key(|version| version.spec.version)
}

/// The adapter's versions of the same inputs, with all that the gates ask for on record.
fn twins<'a>(observed: &'a Observed, digest: &str, probe: Option<&str>) -> Vec<&'a AdapterVersion> {
    let gates = &observed.job.spec.evaluation;
    let versions = observed.versions.iter().filter(|version| {
        version.spec.source.input_digest == digest && gates.is_measured_by(&version.spec.metrics, probe)
    });
    versions.collect()
}

fn is_where_wanted(version: &AdapterVersion, output: &Output) -> bool {
    let (artifact, folder) = (&version.spec.artifact, output.uri.join(&output.adapter_name));
    artifact.uri == folder.join(&format!("v{}", version.spec.version))
        && artifact.secret_ref == output.secret_ref
        && artifact.service_account_name == output.service_account_name
        && artifact.role_arn == output.role_arn
}

fn phase_of(version: &AdapterVersion) -> Option<AdapterVersionPhase> {
    version.status.as_ref().and_then(|status| status.phase)
}

fn is_served(version: &AdapterVersion) -> bool {
    phase_of(version) == Some(AdapterVersionPhase::Available)
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
