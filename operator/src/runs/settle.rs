//! What is seen of a run's Job goes into the record, once: the Job may be deleted then, and changes nothing any more.

use k8s_openapi::{apimachinery::pkg::apis::meta::v1::Time, jiff::Timestamp};
use tunesmith_crds::{
    FineTuneRunStatus,
    fine_tune_run::{Attempt, Cause as Kind, RunStage},
    names,
    run::{Outcome, TrainReport},
};

use super::{active, active_mut, copied};
use crate::{
    run::{Run, Work},
    workload::{Cause, Ending, JobState},
};

/// An attempt that lasted less than this makes the next one wait.
const SHORT_SECONDS: i64 = 60;

/// The record with all that the run's Job has come to.
pub fn settled(run: &Run, now: Timestamp) -> FineTuneRunStatus {
    let mut record = run.record.clone();
    match &run.work {
        _ if active(&record).is_none() => {}
        Work::None => {}
        Work::Gone => end(run, &mut record, ending_of_lost(now)),
        Work::There { job, .. } => {
            if let Some(attempt) = active_mut(&mut record) {
                attempt.job_uid.get_or_insert_with(|| job.uid.clone());
                if let (None, Some(since)) = (&attempt.started, job.running_since()) {
                    attempt.started = Some(Time(since));
                }
            }
            if let JobState::Ended(ending) = &job.state {
                end(run, &mut record, ending.clone());
            }
        }
    }
    record
}

/// The record of a run whose Job the API server will never take.
pub fn refused(run: &Run, message: &str, now: Timestamp) -> FineTuneRunStatus {
    let mut record = run.record.clone();
    end(run, &mut record, without_pod(Cause::Final { message: message.into() }, now));
    record
}

fn ending_of_lost(now: Timestamp) -> Ending {
    without_pod(Cause::Disrupted { message: "its Job was deleted".into() }, now)
}

fn without_pod(cause: Cause, now: Timestamp) -> Ending {
    Ending { cause, started: None, finished: Time(now), image_id: None, outlived: false }
}

/// Writes an ending into the record of the try or attempt that it ended.
fn end(run: &Run, record: &mut FineTuneRunStatus, ending: Ending) {
    let is_check = record.check.as_ref().is_some_and(|check| check.cause.is_none());
    let cause = match (is_check, ending.cause) {
        (true, Cause::Done { outcome }) => match *outcome {
            Outcome::Preflight(report) => {
                record.preflight = Some(report.clone());
                Cause::done(Outcome::Preflight(report))
            }
            _ => other_subcommand(),
        },
        (false, Cause::Done { outcome }) => match *outcome {
            Outcome::Trained(report) => match unlike(run, record, &report) {
                None => {
                    record.published = Some(report.clone());
                    Cause::done(Outcome::Trained(report))
                }
                Some(problem) => Cause::Final { message: problem },
            },
            _ => other_subcommand(),
        },
        (_, cause) => cause,
    };
    // A copy that fails is given up for training, which is another thing.
    let gives_up_copy = !is_check && has_failed(cause.kind()) && copied(record).is_some();
    let kind = if gives_up_copy { Kind::Failed } else { cause.kind() };
    let Some(attempt) = active_mut(record) else { return };
    attempt.cause = Some(kind);
    attempt.message = cause.complaint().map(Into::into);
    attempt.image_id = ending.image_id;
    if attempt.started.is_none() {
        attempt.started = ending.started;
    }
    attempt.ended = Some(ending.finished);
    let attempt = attempt.clone();
    count(record, &attempt, is_check);
    if let Some(settled) = record.settled.as_mut().filter(|_| gives_up_copy)
        && let Some(copied) = settled.copy_of.take()
    {
        record.failures = record.failures.saturating_sub(1);
        let words = record.message.take().unwrap_or_default();
        record.message = Some(format!("{} was not copied: {words}", copied.uri));
    }
}

fn has_failed(kind: Kind) -> bool {
    matches!(kind, Kind::Failed | Kind::Final | Kind::StoreUnavailable)
}

fn other_subcommand() -> Cause {
    Cause::Final { message: "the pod left the report of another subcommand".into() }
}

/// Keeps the sums, and starts over where model or data are no longer what was checked.
fn count(record: &mut FineTuneRunStatus, attempt: &Attempt, is_check: bool) {
    let kind = attempt.cause.unwrap_or(Kind::Failed);
    let has_failed = has_failed(kind);
    let seconds = seconds_of(attempt);
    let was_short =
        matches!(kind, Kind::Disrupted | Kind::InputsChanged | Kind::VersionTaken) && seconds < SHORT_SECONDS;
    record.short_disruptions = match was_short {
        true => record.short_disruptions.saturating_add(1),
        // What passed says nothing about the attempts before it.
        false if is_check && kind == Kind::Done => record.short_disruptions,
        false => 0,
    };
    record.message.clone_from(&attempt.message);
    if is_check {
        record.check_failures = if has_failed { record.check_failures.saturating_add(1) } else { 0 };
        return;
    }
    let seconds = u64::try_from(seconds).unwrap_or(0);
    record.seconds = record.seconds.saturating_add(seconds);
    record.gpu_seconds = record.gpu_seconds.saturating_add(seconds.saturating_mul(attempt.gpus.into()));
    if has_failed {
        record.failures = record.failures.saturating_add(1);
    }
    record.stage = Some(RunStage::Admitting);
    // A check looks for the next free number too.
    if matches!(kind, Kind::InputsChanged | Kind::VersionTaken) {
        // The last check stays: its Job is there, and the next one must not have its name.
        (record.preflight, record.settled) = (None, None);
        record.stage = Some(RunStage::Checking);
    }
}

/// Seconds for which an attempt's pods have run.
pub fn seconds_of(attempt: &Attempt) -> i64 {
    match (&attempt.started, &attempt.ended) {
        (Some(started), Some(ended)) => ended.0.as_second().saturating_sub(started.0.as_second()).max(0),
        _ => 0,
    }
}

/// What in a report can't come from the task that the attempt was given.
fn unlike(run: &Run, record: &FineTuneRunStatus, report: &TrainReport) -> Option<String> {
    let task = record.settled.as_ref()?;
    let output = &run.spec.job_spec.output;
    let folder = output.uri.join(&output.adapter_name).join(&format!("v{}", report.version));
    let dataset = record.preflight.as_ref().map(|report| &report.dataset.digest);
    let problem = match () {
        () if report.version < task.version => format!("version {}, below {}", report.version, task.version),
        () if report.uri != folder => format!("{} instead of {folder}", report.uri),
        () if Some(&report.dataset.digest) != dataset => format!("data of digest {}", report.dataset.digest),
        () => return None,
    };
    let name = names::adapter_version(&output.adapter_name, report.version);
    Some(format!("the report of {name} is not of this run's task: it names {problem}"))
}
