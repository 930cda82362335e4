//! Which run a FineTuneJob should have: a state machine without a client and without a clock of its own.
//!
//! A run serves one spec. Where the newest one serves the job's, it advances ([`crate::runs::decide`]); where none does,
//! the older ones are wound down, and the next begins.

use k8s_openapi::jiff::Timestamp;
use tunesmith_crds::{FineTuneJobPhase as Phase, Uri, conditions::reason, fine_tune_run::Trigger};

use crate::{
    observed::{Observed, Retry},
    plan::plan,
    run::{Object, Run},
    runs::{
        advance::Advance,
        decide::{advance, wind_down},
    },
    state::State,
};

/// What to do, and what the job is then.
#[derive(Clone, Debug, PartialEq)]
pub struct Decision {
    /// What to do about runs that are there, by their numbers.
    pub advances: Vec<(u32, Advance)>,
    /// The run to begin.
    pub start: Option<(u32, Trigger)>,
    /// Runs that the history has no place for.
    pub forget: Vec<Object>,
    /// What the status says.
    pub state: State,
}

/// Decides what to do next.
pub fn decide(observed: &Observed, now: Timestamp) -> Decision {
    let retry = observed.current().map_or(Retry::No, |run| observed.retry(run));
    let current = observed.current().filter(|_| !matches!(retry, Retry::At(time) if time <= now));
    let is_current = |run: &&Run| current.is_some_and(|current| current.number() == run.number());
    let older = observed.runs.values().filter(|run| !is_current(run) && !run.record.is_done());
    let mut advances: Vec<(u32, Advance)> = older.map(|run| (run.number(), wind_down(run, now))).collect();
    let waits =
        advances.iter().find(|(_, advance)| !advance.record.is_done()).map(|(_, advance)| advance.state.clone());

    let mut start = None;
    let state = match (waits, current) {
        _ if !observed.unreadable.is_empty() => {
            let why = observed.unreadable.join("; ");
            State::new(Phase::Failed, reason::UNREADABLE, format!("{why}: delete it, and its run starts anew"))
        }
        (Some(state), _) => state,
        (None, Some(run)) => {
            let advance = advance(run, observed, now);
            let state = told_of_retry(advance.state.clone(), &retry, now);
            advances.push((run.number(), advance));
            state
        }
        (None, None) => begin(observed, &mut start),
    };
    Decision { advances, start, forget: forgotten(observed), state }
}

/// No run serves the spec: the next one begins.
fn begin(observed: &Observed, start: &mut Option<(u32, Trigger)>) -> State {
    let spec = &observed.job.spec;
    if let Uri::File { path } = &spec.output.uri {
        let message = format!(
            "output.uri file://{path} is a folder of the training pod, which goes with it: use a bucket, such as s3://bucket/folder"
        );
        return State::new(Phase::Failed, reason::INVALID, message);
    }
    if spec.suspend {
        return State::suspended();
    }
    if let Err(why) = plan(spec, &observed.offers, None, None) {
        return State::no_class(why);
    }
    *start = Some((observed.next_number(), observed.trigger()));
    State::new(Phase::Preflight, reason::PREFLIGHT, "checks model and data")
}

fn told_of_retry(state: State, retry: &Retry, now: Timestamp) -> State {
    match retry {
        Retry::At(time) => state.again_in(time.duration_since(now).unsigned_abs()),
        Retry::Unreadable(text) => {
            let message = format!(
                "{} (annotation tunesmith.dev/retry-at: {text:?} is not a time such as 2026-11-28T10:00:00Z)",
                state.message
            );
            State { message, ..state }
        }
        Retry::No => state,
    }
}

/// Runs that are over, beyond those that the job keeps; the newest run stays whatever it says.
fn forgotten(observed: &Observed) -> Vec<Object> {
    let kept = usize::try_from(observed.job.spec.run_history_limit).unwrap_or(usize::MAX).saturating_add(1);
    let over = observed.runs.values().rev().skip(kept).filter(|run| run.record.is_done());
    over.map(|run| run.object.clone()).collect()
}

#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;
