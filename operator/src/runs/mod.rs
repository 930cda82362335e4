//! One run: its record, its Job, and what comes next. [`decide`] reads like a run; [`outcome`] says what it comes to;
//! [`build`] makes the objects that it asks for.

pub mod advance;
pub mod build;
pub mod decide;
mod outcome;
pub mod settle;
pub mod task;

use k8s_openapi::jiff::{SignedDuration, Timestamp};
use tunesmith_crds::{
    FineTuneRunStatus,
    adapter_version::Artifact,
    conditions::{READY, RECONCILING, STALLED, reason},
    fine_tune_run::{Attempt, Cause},
};

use crate::conditions::{Conditions, Verdict};

/// Wait after the first failure; it doubles with each.
const FAILURE_WAIT_SECONDS: i64 = 10;
/// Wait after the first short disruption; it doubles with each in a row.
const DISRUPTION_WAIT_SECONDS: i64 = 5;
/// Longest wait.
const MAX_WAIT_SECONDS: i64 = 300;

/// A record with the conditions that follow from it.
#[must_use]
pub fn with_conditions(record: FineTuneRunStatus, now: Timestamp) -> FineTuneRunStatus {
    let succeeded = matches!(record.reason.as_deref(), Some(reason::PUBLISHED | reason::REUSED));
    let (over, stage) = (record.is_done(), record.stage.unwrap_or_default());
    let stage = format!("{stage:?}");
    let reason = record.reason.as_deref().filter(|_| over).unwrap_or(&stage);
    let message = record.message.as_deref().unwrap_or_default();
    let mut conditions = Conditions::new(&record.conditions, None, now);
    conditions.set(READY, Verdict::of(over && succeeded), reason, message);
    conditions.set(RECONCILING, Verdict::of(!over), reason, message);
    conditions.set(STALLED, Verdict::of(over && !succeeded), reason, message);
    let conditions = conditions.into_vec();
    FineTuneRunStatus { conditions, ..record }
}

/// The try to check, or the attempt to train, that is not over.
pub fn active(record: &FineTuneRunStatus) -> Option<&Attempt> {
    record.check.iter().chain(record.attempts.last()).find(|attempt| attempt.cause.is_none())
}

/// The same, to be changed.
fn active_mut(record: &mut FineTuneRunStatus) -> Option<&mut Attempt> {
    record.check.iter_mut().chain(record.attempts.last_mut()).find(|attempt| attempt.cause.is_none())
}

/// When the next try or attempt may start: later after each failure, and after each disruption that came at once.
fn next_at(last: &Attempt, failures: u32, short_disruptions: u32) -> Timestamp {
    let Some(ended) = &last.ended else { return Timestamp::UNIX_EPOCH };
    let wait = match last.cause {
        Some(Cause::Disrupted | Cause::InputsChanged | Cause::VersionTaken) => {
            doubled(DISRUPTION_WAIT_SECONDS, short_disruptions)
        }
        _ => doubled(FAILURE_WAIT_SECONDS, failures),
    };
    ended.0.saturating_add(wait).unwrap_or(ended.0)
}

/// `base`, doubled with each time after the first; nothing for no time.
fn doubled(base: i64, times: u32) -> SignedDuration {
    match times.checked_sub(1) {
        None => SignedDuration::ZERO,
        Some(doublings) => SignedDuration::from_secs((base << doublings.min(16)).min(MAX_WAIT_SECONDS)),
    }
}

/// The version that the run copies instead of training, if it does.
pub fn copied(record: &FineTuneRunStatus) -> Option<&Artifact> {
    record.settled.as_ref()?.copy_of.as_ref()
}
