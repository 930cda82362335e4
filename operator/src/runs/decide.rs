//! What a run does next: a state machine without a client and without a clock of its own.
//!
//! It reads from top to bottom like a run: check model and data, reuse a version or settle what to train, attempts, the
//! version's record and its gates. Each decision is a new record and steps. The record is written first, against the
//! version that was read; the steps follow from it alone, so that whoever reads it later takes the same.

use k8s_openapi::{apimachinery::pkg::apis::meta::v1::Time, jiff::Timestamp};
use tunesmith_crds::{
    FineTuneJobPhase as Phase, FineTuneRunStatus,
    conditions::reason,
    digest::input_digest,
    fine_tune_run::{Attempt, Cause, KEPT_ATTEMPTS, RunStage, Settled},
    run::{LiveProgress, PreflightReport, TrainStage},
};

use super::{
    active,
    advance::{Advance, Step, publish},
    copied, next_at,
    outcome::{outcome, reuse, served_elsewhere},
    settle::settled,
    task::check_spec,
};
use crate::{
    observed::Observed,
    plan::{Planned, plan},
    run::{Run, Work},
    state::State,
    workload::{JobState, Pods, TrainerJob},
};

/// Decides what the run that serves the job does next.
pub fn advance(run: &Run, observed: &Observed, now: Timestamp) -> Advance {
    let mut advance = Advance { record: settled(run, now), steps: Vec::new(), state: State::suspended() };
    remove_ended(run, &mut advance);
    count_deadline(run, observed, &mut advance.record);
    advance.state = next(run, observed, now, &mut advance);
    advance.record.stage.get_or_insert_default();
    if is_over(&advance.state) {
        advance.record.completion_time.get_or_insert(Time(now));
    }
    if advance.steps.iter().all(|step| matches!(step, Step::Admit { .. }))
        && is_told_later(&run.record, &advance.record)
    {
        advance.record = run.record.clone();
    }
    advance
}

/// Decides how a run ends that serves the job no more: what it is publishing it publishes, and all else stops.
pub fn wind_down(run: &Run, now: Timestamp) -> Advance {
    let mut record = settled(run, now);
    let mut steps = Vec::new();
    let mut state = State::new(Phase::Pending, reason::PENDING, "");
    if record.published.is_some() && record.adapter_version.is_none() {
        publish(run, &mut record, &mut steps);
    }
    match run.job().filter(|_| active(&record).is_some()) {
        Some(job) if run.live().is_some_and(|live| live.stage == TrainStage::Publishing) && !job.deleting => {
            state.message = format!("run {} is publishing: the changed spec waits for it", run.number());
        }
        Some(job) => {
            delete(job, &mut steps);
            state.message = format!("the spec has changed: waits for Job {} to end", job.name);
        }
        None => {
            // A Job that was decided on, and was never seen, is looked for by its name when its record goes.
            if let Some(attempt) = super::active_mut(&mut record) {
                (attempt.cause, attempt.ended) = (Some(Cause::Disrupted), Some(Time(now)));
            }
            record.stage = Some(RunStage::Done);
            if record.adapter_version.is_none() {
                record.message = Some("ended by a change of the spec".into());
                record.reason = Some(reason::SUPERSEDED.into());
            }
            record.completion_time.get_or_insert(Time(now));
        }
    }
    Advance { record, steps, state }
}

/// Whether all that is new in a record is seen again at any time: which Job a try or attempt has, until a pod of an attempt
/// runs. It is written with what comes next.
fn is_told_later(before: &FineTuneRunStatus, after: &FineTuneRunStatus) -> bool {
    let without = |record: &FineTuneRunStatus| {
        let mut record = record.clone();
        if let Some(check) = record.check.as_mut().filter(|check| check.cause.is_none()) {
            (check.job_uid, check.started) = (None, None);
        }
        if let Some(attempt) = record.attempts.last_mut().filter(|attempt| attempt.started.is_none()) {
            attempt.job_uid = None;
        }
        record
    };
    without(before) == without(after)
}

/// A Job that a sidecar keeps alive goes when its trainer's words are on record.
fn remove_ended(run: &Run, advance: &mut Advance) {
    if let Some(job) = run.job()
        && let JobState::Ended(ending) = &job.state
        && ending.outlived
    {
        delete(job, &mut advance.steps);
    }
}

/// A pod's deadline counts from when a node has it, its container's time from when that starts: the run has taken all of its
/// time, although the trainer may have had little of it, or none.
fn count_deadline(run: &Run, observed: &Observed, record: &mut FineTuneRunStatus) {
    let was_active = run.record.attempts.last().is_some_and(|attempt| attempt.cause.is_none());
    let is_over = record.attempts.last().is_some_and(|attempt| attempt.cause == Some(Cause::DeadlineExceeded));
    if was_active && is_over {
        let deadline = observed.job.spec.active_deadline_seconds.and_then(|seconds| u64::try_from(seconds).ok());
        record.seconds = record.seconds.max(deadline.unwrap_or(0));
    }
}

fn next(run: &Run, observed: &Observed, now: Timestamp, advance: &mut Advance) -> State {
    if let Some(state) = outcome(run, observed, advance) {
        return state;
    }
    if let Some(state) = gave_up(&mut advance.record, observed) {
        return state;
    }
    if advance.record.preflight.is_none() {
        return check(run, observed, now, advance);
    }
    if let Some(state) = reuse(observed, run, advance) {
        return state;
    }
    train(run, observed, now, advance)
}

fn is_over(state: &State) -> bool {
    matches!(state.phase, Phase::Succeeded | Phase::Failed)
}

/// Why there is no other try or attempt, if so.
fn gave_up(record: &mut FineTuneRunStatus, observed: &Observed) -> Option<State> {
    let spec = &observed.job.spec;
    if active(record).is_some() {
        return None;
    }
    let is_checked = record.preflight.is_some();
    let last = if is_checked { record.attempts.last() } else { record.check.as_ref() };
    let cause = last.and_then(|last| last.cause);
    let message = record.message.clone().unwrap_or_default();
    let limit = u32::try_from(spec.backoff_limit).unwrap_or(0);
    let seconds = spec.active_deadline_seconds.and_then(|seconds| u64::try_from(seconds).ok());
    let (reason, message) = match cause {
        Some(Cause::Final) if is_checked => (reason::TRAINING_FAILED, message),
        Some(Cause::Final) => (reason::PREFLIGHT_FAILED, message),
        // A store that is down says nothing about the job: the check goes on asking.
        Some(Cause::StoreUnavailable) if !is_checked => return None,
        Some(_) if is_checked && record.failures > limit => {
            let times = record.failures;
            (reason::BACKOFF_LIMIT_EXCEEDED, limit_reached(times, &message))
        }
        Some(Cause::Failed) if !is_checked && record.check_failures > limit => {
            (reason::PREFLIGHT_FAILED, limit_reached(record.check_failures, &message))
        }
        _ if seconds.is_some_and(|seconds| record.seconds >= seconds) => (
            reason::DEADLINE_EXCEEDED,
            format!("the run took longer than activeDeadlineSeconds: {}", seconds.unwrap_or_default()),
        ),
        _ => {
            // It was over, and goes on: a limit was raised.
            if record.stage == Some(RunStage::Done) {
                record.stage = Some(if is_checked { RunStage::Admitting } else { RunStage::Checking });
                (record.reason, record.completion_time) = (None, None);
            }
            return None;
        }
    };
    record.stage = Some(RunStage::Done);
    record.reason = Some(reason.into());
    // The words of the last attempt stay as they are: the sentence around them is made anew each time.
    record.message.get_or_insert_with(|| message.clone());
    Some(State::new(Phase::Failed, reason, message))
}

fn limit_reached(times: u32, message: &str) -> String {
    format!("failed {times} times, backoffLimit reached: {message}")
}

/// Tries to check model and data, one after the other, until one has passed.
fn check(run: &Run, observed: &Observed, now: Timestamp, advance: &mut Advance) -> State {
    let suspend = observed.job.spec.suspend;
    let record = &mut advance.record;
    record.stage = Some(RunStage::Checking);
    let number = match &record.check {
        Some(check) if check.cause.is_none() => {
            return match run.job() {
                Some(job) if suspend => {
                    delete(job, &mut advance.steps);
                    State::suspended()
                }
                Some(job) => checks(run, job),
                None if suspend => State::suspended(),
                None => {
                    advance.steps.push(Step::CreateCheck);
                    checking("checks model and data")
                }
            };
        }
        Some(check) => {
            let wait = next_at(check, record.check_failures, record.short_disruptions).duration_since(now);
            if wait.is_positive() && !suspend {
                let message = format!("tries again: {}", record.message.as_deref().unwrap_or_default());
                let reason = retry_reason(check.cause);
                return State::new(Phase::Preflight, reason, message).again_in(wait.unsigned_abs());
            }
            check.number.saturating_add(1)
        }
        None => 1,
    };
    if suspend {
        return State::suspended();
    }
    let message = match (&record.message, number) {
        (Some(message), 2..) => format!("tries again: {message}"),
        _ => "checks model and data".into(),
    };
    record.check = Some(decided(number, 0, now));
    advance.steps.push(Step::CreateCheck);
    checking(&message)
}

fn retry_reason(cause: Option<Cause>) -> &'static str {
    match cause {
        Some(Cause::StoreUnavailable) => reason::STORE_UNAVAILABLE,
        Some(Cause::InputsChanged) => reason::INPUTS_CHANGED,
        Some(Cause::VersionTaken) => reason::VERSION_TAKEN,
        _ => reason::RETRYING,
    }
}

fn decided(number: u32, gpus: u32, now: Timestamp) -> Attempt {
    Attempt {
        number,
        job_uid: None,
        decided: Time(now),
        started: None,
        ended: None,
        cause: None,
        message: None,
        gpus,
        image_id: None,
    }
}

fn checking(message: &str) -> State {
    State::new(Phase::Preflight, reason::PREFLIGHT, message)
}

/// What the active check does.
fn checks(run: &Run, job: &TrainerJob) -> State {
    match &job.state {
        _ if job.deleting => checking("starts again"),
        JobState::Ended(_) => checking("reads the report"),
        JobState::Active { pods, .. } => match pods {
            Pods::Missing | Pods::Unschedulable(_) => waits(run, pods, Phase::Preflight, ""),
            Pods::Starting(words) => checking(&format!("preflight pod {words}")).soon(),
            Pods::Running { .. } => checking("checks model and data"),
            Pods::Over => checking("reads the report"),
        },
    }
}

/// Attempts, one after the other, until one has published or no more are allowed.
fn train(run: &Run, observed: &Observed, now: Timestamp, advance: &mut Advance) -> State {
    let spec = &observed.job.spec;
    if let Some(attempt) = advance.record.attempts.last().filter(|attempt| attempt.cause.is_none()) {
        return match run.job() {
            Some(job) if spec.suspend => {
                delete(job, &mut advance.steps);
                State::suspended()
            }
            Some(job) => {
                if job.suspended && !job.deleting {
                    advance.steps.push(Step::Admit { name: job.name.clone(), uid: job.uid.clone() });
                }
                let said = said_before(run, attempt.number, observed);
                trains(run, &advance.record, attempt.number, job, said)
            }
            None if spec.suspend => State::suspended(),
            None => match planned(observed, &advance.record) {
                Ok(planned) => {
                    advance.steps.push(Step::CreateAttempt(Box::new(planned)));
                    State::new(Phase::Starting, reason::STARTING, "creates the Job")
                }
                Err(state) => state,
            },
        };
    }
    if spec.suspend {
        return State::suspended();
    }
    if let Some(last) = advance.record.attempts.last() {
        let record = &advance.record;
        let wait = next_at(last, record.failures, record.short_disruptions).duration_since(now);
        if wait.is_positive() {
            let message = record.message.as_deref().unwrap_or_default();
            let message = format!("attempt {} ended: {message}", last.number);
            let state = State::new(Phase::Starting, retry_reason(last.cause), message);
            return state.again_in(wait.unsigned_abs());
        }
    }
    let planned = match planned(observed, &advance.record) {
        Ok(planned) => planned,
        Err(state) => {
            advance.record.stage = Some(RunStage::Admitting);
            return state;
        }
    };
    begin_attempt(run, observed, planned, now, advance)
}

fn planned(observed: &Observed, record: &FineTuneRunStatus) -> Result<Planned, State> {
    let method = record.settled.as_ref().map(|settled| settled.method.name());
    plan(&observed.job.spec, &observed.offers, record.preflight.as_ref(), method).map_err(State::no_class)
}

fn begin_attempt(run: &Run, observed: &Observed, planned: Planned, now: Timestamp, advance: &mut Advance) -> State {
    let Advance { record, steps, .. } = advance;
    let Some(report) = record.preflight.clone() else { return checking("checks model and data") };
    if record.settled.is_none() {
        record.settled = Some(settle(run, observed, &report, &planned));
    }
    record.last_attempt = record.last_attempt.saturating_add(1);
    record.stage = Some(RunStage::Training);
    // A copy takes nothing of a class.
    record.plan = copied(record).is_none().then(|| planned.plan.clone());
    let gpus = record.plan.as_ref().map_or(0, |plan| plan.pods.saturating_mul(plan.gpus_per_pod));
    let surplus = (record.attempts.len() + 1).saturating_sub(KEPT_ATTEMPTS);
    record.attempts.drain(..surplus);
    record.attempts.push(decided(record.last_attempt, gpus, now));
    steps.push(Step::CreateAttempt(Box::new(planned)));
    match &record.message {
        Some(failure) => State::new(Phase::Starting, reason::RETRYING, format!("tries again: {failure}")),
        None => State::new(Phase::Starting, reason::STARTING, "creates the Job"),
    }
}

/// What decides the result, once and for all attempts.
fn settle(run: &Run, observed: &Observed, report: &PreflightReport, planned: &Planned) -> Settled {
    let spec = planned.resolve(check_spec(run, &observed.job));
    let input_digest = input_digest(&spec, &planned.method, report);
    let probe = report.probe_digest.as_deref();
    Settled {
        copy_of: served_elsewhere(observed, &input_digest, probe).map(|version| version.spec.artifact.clone()),
        input_digest,
        version: observed.next_version(report),
        method: planned.method.clone(),
        training: spec.training,
    }
}

/// What the active attempt does.
fn trains(run: &Run, record: &FineTuneRunStatus, number: u32, job: &TrainerJob, said: Option<State>) -> State {
    let retried = match &record.message {
        Some(failure) => format!(" (attempt {number}, after: {failure})"),
        None => String::new(),
    };
    let pods = match &job.state {
        JobState::Active { pods, .. } if !job.deleting => pods,
        _ => return State::new(Phase::Starting, reason::STARTING, format!("waits for Job {} to end", job.name)),
    };
    match pods {
        _ if job.suspended => {
            State::new(Phase::Starting, reason::STARTING, format!("lets Job {} begin{retried}", job.name)).soon()
        }
        Pods::Missing | Pods::Unschedulable(_) => waits(run, pods, Phase::Starting, &retried),
        Pods::Starting(words) => State::new(Phase::Starting, reason::STARTING, format!("pod {words}{retried}")).soon(),
        Pods::Running { .. } if let Some(copied) = copied(record) => {
            State::new(Phase::Publishing, reason::PUBLISHING, format!("copies {}{retried}", copied.uri))
        }
        Pods::Running { .. } => match (run.live(), said) {
            (None, Some(said)) => said,
            (live, _) => runs(live, &retried),
        },
        Pods::Over => said
            .unwrap_or_else(|| State::new(Phase::Running, reason::TRAINING, format!("the pods have ended{retried}"))),
    }
}

/// What the status tells of the attempt's pod, which has not been asked again, or can't be asked any more.
fn said_before(run: &Run, attempt: u32, observed: &Observed) -> Option<State> {
    let status = observed.job.status.as_ref()?;
    status.run.as_ref().filter(|told| (told.number, told.attempt) == (run.number(), attempt))?;
    let reason = match status.phase? {
        Phase::Running => reason::TRAINING,
        Phase::Publishing => reason::PUBLISHING,
        _ => return None,
    };
    Some(State::new(status.phase?, reason, status.message.clone()?))
}

/// The steps are in `status.progress`, which has its own writer.
fn runs(live: Option<&LiveProgress>, retried: &str) -> State {
    let state = |words: &str| State::new(Phase::Running, reason::TRAINING, format!("{words}{retried}"));
    match live.map(|live| live.stage) {
        Some(TrainStage::Loading) => state("loads model, data and checkpoint"),
        // One that was not asked yet: it trains, as far as anybody knows.
        None | Some(TrainStage::Training) => state("trains"),
        Some(TrainStage::Evaluating) => state("evaluates"),
        Some(TrainStage::Publishing) => {
            State::new(Phase::Publishing, reason::PUBLISHING, format!("writes the artifact{retried}"))
        }
    }
}

/// The Job is there, but the cluster has no place for its pods.
fn waits(run: &Run, pods: &Pods, otherwise: Phase, retried: &str) -> State {
    let refusal = match &run.work {
        Work::There { refusal, .. } => refusal.as_ref(),
        _ => None,
    };
    let state = match (pods, refusal) {
        (Pods::Unschedulable(words), _) => {
            State::new(Phase::Queued, reason::UNSCHEDULABLE, format!("no node takes the pod: {words}{retried}"))
        }
        (_, Some(refusal)) => State::new(Phase::Queued, refusal.reason, format!("{}{retried}", refusal.message)),
        _ if otherwise == Phase::Preflight => checking(&format!("waits for the preflight pod{retried}")),
        _ => State::new(Phase::Starting, reason::STARTING, format!("waits for the training pods{retried}")),
    };
    state.soon()
}

fn delete(job: &TrainerJob, steps: &mut Vec<Step>) {
    if !job.deleting {
        steps.push(Step::DeleteJob { name: job.name.clone(), uid: job.uid.clone() });
    }
}
