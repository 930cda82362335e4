//! What a decision about a FineTuneJob is made from: plain values, read by [`crate::jobs`].

use std::collections::BTreeMap;

use k8s_openapi::jiff::Timestamp;
use tunesmith_crds::{
    AdapterVersion, FineTuneJob, FineTuneJobSpec, conditions::reason, fine_tune_run::Trigger, names::RETRY_ANNOTATION,
    run::PreflightReport,
};

use crate::{plan::Offers, run::Run};

/// Everything that a decision is made from.
#[derive(Clone, Debug)]
pub struct Observed {
    /// The job.
    pub job: FineTuneJob,
    /// Its runs by number.
    pub runs: BTreeMap<u32, Run>,
    /// Runs of it that can't be read, and why.
    pub unreadable: Vec<String>,
    /// The adapter's versions in the job's namespace, whoever made them.
    pub versions: Vec<AdapterVersion>,
    /// The highest version that a run of another job has settled on, 0 if none.
    pub reserved: u32,
    /// What the cluster offers.
    pub offers: Offers,
}

/// What the user's annotation asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Retry {
    /// Nothing, or what has been done.
    No,
    /// Another run at this time.
    At(Timestamp),
    /// It is no time.
    Unreadable(String),
}

impl Observed {
    /// The newest run, if it serves the job's spec.
    pub fn current(&self) -> Option<&Run> {
        let (_, run) = self.runs.last_key_value()?;
        serves(&run.spec.job_spec, &self.job.spec).then_some(run)
    }

    /// What the user's annotation asks for, after this run.
    pub fn retry(&self, run: &Run) -> Retry {
        let succeeded = matches!(run.record.reason.as_deref(), Some(reason::PUBLISHED | reason::REUSED));
        let over = run.record.completion_time.as_ref().filter(|_| run.record.is_done() && !succeeded);
        let annotation = self.job.metadata.annotations.as_ref().and_then(|all| all.get(RETRY_ANNOTATION));
        match (over, annotation, annotation.and_then(|text| text.parse::<Timestamp>().ok())) {
            (Some(over), _, Some(time)) if time > over.0 => Retry::At(time),
            (Some(_), Some(text), None) => Retry::Unreadable(text.clone()),
            _ => Retry::No,
        }
    }

    /// Why the next run would be started.
    pub fn trigger(&self) -> Trigger {
        if self.current().is_some() { Trigger::Retry } else { Trigger::Generation }
    }

    /// Number of the next run.
    pub fn next_number(&self) -> u32 {
        let from_status = self.job.status.as_ref().and_then(|status| status.run.as_ref()).map_or(0, |run| run.number);
        self.runs.keys().last().copied().unwrap_or(0).max(from_status).saturating_add(1)
    }

    /// The lowest version that nobody is known to have, given what preflight saw in the store.
    pub fn next_version(&self, preflight: &PreflightReport) -> u32 {
        let recorded = self.versions.iter().map(|version| version.spec.version).max().unwrap_or(0);
        recorded.max(self.reserved).max(preflight.highest_version).saturating_add(1)
    }

    /// The record of this name.
    pub fn version(&self, name: &str) -> Option<&AdapterVersion> {
        self.versions.iter().find(|version| version.metadata.name.as_deref() == Some(name))
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
        run_history_limit: wanted.run_history_limit,
        ..started.clone()
    };
    adjusted == *wanted
}
