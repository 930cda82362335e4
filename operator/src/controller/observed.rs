//! What a decision about a FineTuneJob is made from: plain values, read by [`super::observe`].

use std::collections::BTreeMap;

use k8s_openapi::jiff::{SignedDuration, Timestamp};
use tunesmith_crds::{
    AdapterVersion, FineTuneJob, FineTuneJobSpec, RunSpec,
    run::{LiveProgress, Outcome, PreflightReport, TrainReport},
};

use crate::{
    plan::Offers,
    refusal::Refusal,
    trainer::{Cause, TrainerJob},
};

/// An attempt that lasted less than this makes the next one wait.
const SHORT: SignedDuration = SignedDuration::from_secs(60);
/// Wait after the first failed attempt; it doubles with each.
const FAILURE_WAIT_SECONDS: i64 = 10;
/// Wait after the first short disrupted attempt; it doubles with each in a row.
const DISRUPTION_WAIT_SECONDS: i64 = 5;
/// Longest wait.
const MAX_WAIT_SECONDS: i64 = 300;

/// Everything that a decision is made from.
#[derive(Clone, Debug)]
pub struct Observed {
    /// The job, as the API server has it now.
    pub job: FineTuneJob,
    /// Its runs by number.
    pub runs: BTreeMap<u32, Run>,
    /// The adapter's versions in the job's namespace, whoever made them.
    pub versions: Vec<AdapterVersion>,
    /// The highest version that a run of another job has reserved, 0 if none.
    pub reserved: u32,
    /// What the cluster offers.
    pub offers: Offers,
    /// Why the active Job has no pod.
    pub refusal: Option<Refusal>,
    /// What the training pod says of itself.
    pub live: Option<LiveProgress>,
}

/// One run, as its objects show it.
#[derive(Clone, Debug, Default)]
pub struct Run {
    /// Its number, from 1.
    pub number: u32,
    /// The spec that it serves; None if its first ConfigMap is gone or unreadable.
    pub spec: Option<FineTuneJobSpec>,
    /// When it began.
    pub created: Timestamp,
    /// Name of the AdapterVersion that it led to, once that is recorded.
    pub version: Option<String>,
    /// Its preflight.
    pub preflight: Option<TrainerJob>,
    /// What its attempts work on, once a version is reserved.
    pub task: Option<RunSpec>,
    /// Its attempts, in order.
    pub attempts: Vec<TrainerJob>,
    /// Its ConfigMaps.
    pub config_maps: Vec<Named>,
}

/// An object, and no other that may have its name later.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Named {
    /// Its name.
    pub name: String,
    /// Its UID.
    pub uid: String,
}

impl Observed {
    /// The run that serves the job's spec.
    pub fn current(&self) -> Option<&Run> {
        let (_, run) = self.runs.last_key_value()?;
        run.spec.as_ref().is_some_and(|spec| serves(spec, &self.job.spec)).then_some(run)
    }

    /// Number of the next run.
    pub fn next_number(&self) -> u32 {
        let from_status = self.job.status.as_ref().and_then(|status| status.run.as_ref()).map_or(0, |run| run.number);
        self.runs.keys().last().copied().unwrap_or(0).max(from_status) + 1
    }

    /// Number of the last attempt of a run. A suspended attempt's Job is gone: the status remembers its number, so that
    /// no name is used twice, and a cache that lags behind leads to a conflict.
    pub fn last_attempt(&self, run: &Run) -> u32 {
        let status = self.job.status.as_ref().and_then(|status| status.run.as_ref());
        let remembered = status.filter(|status| status.number == run.number).map_or(0, |status| status.attempt);
        run.attempts.last().map_or(0, |attempt| attempt.attempt).max(remembered)
    }

    /// The lowest version that nobody has, given what preflight saw in the store.
    pub fn next_version(&self, preflight: &PreflightReport) -> u32 {
        let recorded = self.versions.iter().map(|version| version.spec.version).max().unwrap_or(0);
        recorded.max(self.reserved).max(preflight.highest_version) + 1
    }

    /// The record of this name.
    pub fn version(&self, name: &str) -> Option<&AdapterVersion> {
        self.versions.iter().find(|version| version.metadata.name.as_deref() == Some(name))
    }
}

impl Run {
    /// All its Jobs.
    pub fn jobs(&self) -> impl Iterator<Item = &TrainerJob> {
        self.preflight.iter().chain(&self.attempts)
    }

    /// What preflight found, if it passed.
    pub fn preflight_report(&self) -> Option<&PreflightReport> {
        match self.preflight.as_ref()?.ending()?.cause.outcome()? {
            Outcome::Preflight(report) => Some(report),
            _ => None,
        }
    }

    /// What its training published.
    pub fn train_report(&self) -> Option<&TrainReport> {
        self.attempts.iter().find_map(|attempt| match attempt.ending()?.cause.outcome()? {
            Outcome::Trained(report) => Some(report),
            _ => None,
        })
    }

    /// Attempts that count against backoffLimit.
    pub fn failures(&self) -> u32 {
        let failed = |attempt: &&TrainerJob| {
            attempt.ending().is_some_and(|ending| matches!(ending.cause, Cause::Failed { .. } | Cause::Final { .. }))
        };
        self.attempts.iter().filter(failed).count() as u32
    }

    /// Why the last attempt that is over failed.
    pub fn last_failure(&self) -> Option<&str> {
        self.attempts.iter().rev().find_map(|attempt| attempt.complaint())
    }

    /// When the next attempt may start: later after each failure, and after each disruption that came at once.
    pub fn next_attempt_at(&self) -> Timestamp {
        let Some(last) = self.attempts.last() else { return Timestamp::UNIX_EPOCH };
        let Some(ending) = last.ending() else { return Timestamp::UNIX_EPOCH };
        let wait = match ending.cause {
            Cause::Failed { .. } => doubled(FAILURE_WAIT_SECONDS, self.failures()),
            _ => doubled(DISRUPTION_WAIT_SECONDS, self.short_disruptions()),
        };
        ending.finished.0 + wait
    }

    /// Seconds that its attempts have taken.
    pub fn seconds_taken(&self) -> i64 {
        self.attempts
            .iter()
            .filter_map(|attempt| Some(attempt.ending()?.finished.0.as_second() - attempt.created.as_second()))
            .sum()
    }

    fn short_disruptions(&self) -> u32 {
        let short = |attempt: &&TrainerJob| {
            attempt.ending().is_some_and(|ending| {
                matches!(ending.cause, Cause::Disrupted { .. })
                    && ending.finished.0.duration_since(attempt.created) < SHORT
            })
        };
        self.attempts.iter().rev().take_while(short).count() as u32
    }
}

/// `base`, doubled with each time after the first; nothing for no time.
fn doubled(base: i64, times: u32) -> SignedDuration {
    match times.checked_sub(1) {
        None => SignedDuration::ZERO,
        Some(doublings) => SignedDuration::from_secs((base << doublings.min(16)).min(MAX_WAIT_SECONDS)),
    }
}

/// Whether a run of `started` serves a job that now asks for `wanted`. Suspending, and other limits, change no run;
/// anything else starts the next. Both are compared as types, so that a field that a newer operator adds (with its
/// default) ends no run.
fn serves(started: &FineTuneJobSpec, wanted: &FineTuneJobSpec) -> bool {
    let adjusted = FineTuneJobSpec {
        suspend: wanted.suspend,
        backoff_limit: wanted.backoff_limit,
        active_deadline_seconds: wanted.active_deadline_seconds,
        ..started.clone()
    };
    adjusted == *wanted
}
