//! One run: its record, its Job, and what comes next. [`decide`] reads like a run; [`outcome`] says what it comes to;
//! [`build`] makes the objects that it asks for.

pub mod build;
pub mod decide;
mod outcome;
pub mod settle;

use k8s_openapi::jiff::{SignedDuration, Timestamp};
use tunesmith_crds::{
    FineTuneRunSpec, FineTuneRunStatus,
    conditions::{READY, RECONCILING, STALLED, reason},
    fine_tune_run::{Attempt, Cause},
    run::LiveProgress,
};

use crate::{
    admission::Refusal,
    conditions::{Conditions, Verdict},
    workload::TrainerJob,
};

/// Wait after the first failure; it doubles with each.
const FAILURE_WAIT_SECONDS: i64 = 10;
/// Wait after the first short disruption; it doubles with each in a row.
const DISRUPTION_WAIT_SECONDS: i64 = 5;
/// Longest wait.
const MAX_WAIT_SECONDS: i64 = 300;

/// One run, as its record and its Job show it.
#[derive(Clone, Debug, PartialEq)]
pub struct Run {
    /// The record's name, UID and resourceVersion.
    pub object: Object,
    /// When it began.
    pub created: Timestamp,
    /// What it serves.
    pub spec: FineTuneRunSpec,
    /// How far it is.
    pub record: FineTuneRunStatus,
    /// The Job of the try or attempt that is not over.
    pub work: Work,
}

/// An object, and no other that may have its name later.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Object {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its UID.
    pub uid: String,
    /// The version of it that was read.
    pub resource_version: String,
}

/// The Job of the try or attempt that is not over.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Work {
    /// The record knows of none that is not over, or of one that was never seen to exist.
    #[default]
    None,
    /// It existed, and the API server says that it does so no more.
    Gone,
    /// It is there.
    There {
        /// The Job.
        job: Box<TrainerJob>,
        /// Why it has no pods.
        refusal: Option<Refusal>,
        /// What its pod says of itself.
        live: Option<LiveProgress>,
    },
}

impl Run {
    /// Its number.
    pub fn number(&self) -> u32 {
        self.spec.number
    }

    /// The Job of the try or attempt that is not over, if it is there.
    pub fn job(&self) -> Option<&TrainerJob> {
        match &self.work {
            Work::There { job, .. } => Some(job.as_ref()),
            _ => None,
        }
    }

    /// What its training pod says of itself.
    pub fn live(&self) -> Option<&LiveProgress> {
        match &self.work {
            Work::There { live, .. } => live.as_ref(),
            _ => None,
        }
    }
}

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
