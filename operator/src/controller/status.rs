//! The status of a FineTuneJob: a view of what was observed and decided, that can be computed anew at any time. Only
//! `history` remembers what has no object any more.

use k8s_openapi::{
    apimachinery::pkg::apis::meta::v1::{Condition, Time},
    jiff::Timestamp,
};
use tunesmith_crds::{
    FineTuneJobPhase as Phase, FineTuneJobStatus, RunSpec,
    conditions::{PODS_READY, PREFLIGHT_PASSED, PUBLISHED, QUOTA_RESERVED, READY, RECONCILING, STALLED, reason},
    digest::input_digest,
    fine_tune_job::{Plan, Progress, RunRecord, RunStatus},
};

use super::{
    decide::State,
    observed::{Observed, Run},
};
use crate::{
    conditions::{Conditions, Verdict},
    plan::plan,
    refusal::Refusal,
};

/// Runs that are remembered.
const HISTORY: usize = 10;

/// What the job is after the cluster has refused something.
pub fn refused(state: State, refusal: Option<Refusal>) -> State {
    match refusal {
        Some(refusal) => State { phase: Phase::Queued, reason: refusal.reason, message: refusal.message, ..state },
        None => state,
    }
}

/// The job's status now.
pub fn status(observed: &Observed, state: &State, now: Timestamp) -> FineTuneJobStatus {
    let job = &observed.job;
    let previous = job.status.clone().unwrap_or_default();
    let run = observed.current();
    FineTuneJobStatus {
        phase: Some(state.phase),
        message: Some(state.message.clone()),
        observed_generation: job.metadata.generation,
        conditions: conditions(observed, run, state, &previous.conditions, now),
        run: run.map(|run| run_status(observed, run, state, &previous, now)),
        progress: run.and_then(|run| progress(observed, run, &previous)),
        plan: current_plan(observed, run),
        latest_version: run.and_then(|run| run.version.clone()).or_else(|| previous.latest_version.clone()),
        history: history(run, state, &previous, now),
    }
}

fn is_over(phase: Phase) -> bool {
    matches!(phase, Phase::Succeeded | Phase::Failed)
}

fn conditions(
    observed: &Observed,
    run: Option<&Run>,
    state: &State,
    previous: &[Condition],
    now: Timestamp,
) -> Vec<Condition> {
    let (reason, message) = (state.reason, state.message.as_str());
    let stalled = state.phase == Phase::Failed || reason == reason::NO_GPU_CLASS;
    let reconciling = !stalled && !matches!(state.phase, Phase::Succeeded | Phase::Suspended);
    let retrying = run.filter(|_| reconciling).and_then(Run::last_failure);
    let mut conditions = Conditions::new(previous, observed.job.metadata.generation, now);
    conditions.set(READY, Verdict::of(state.phase == Phase::Succeeded), reason, message);
    match retrying {
        Some(failure) => conditions.set(RECONCILING, Verdict::True, reason::RETRYING, failure),
        None => conditions.set(RECONCILING, Verdict::of(reconciling), reason, message),
    }
    conditions.set(STALLED, Verdict::of(stalled), reason, message);

    let preflight = run.and_then(|run| run.preflight.as_ref());
    let passed = run.is_some_and(|run| run.preflight_report().is_some());
    match preflight.and_then(|job| job.complaint()) {
        _ if passed => {
            conditions.set(PREFLIGHT_PASSED, Verdict::True, reason::INPUTS_CHECKED, "model and data can be used");
        }
        Some(complaint) if state.reason == reason::PREFLIGHT_FAILED => {
            conditions.set(PREFLIGHT_PASSED, Verdict::False, reason::PREFLIGHT_FAILED, complaint);
        }
        _ => conditions.set(PREFLIGHT_PASSED, Verdict::Unknown, reason, message),
    }
    let has_trained = run.is_some_and(|run| !run.attempts.is_empty());
    match state.phase {
        Phase::Queued => conditions.set(QUOTA_RESERVED, Verdict::False, reason, message),
        Phase::Starting if has_trained => {
            conditions.set(QUOTA_RESERVED, Verdict::True, reason::STARTING, "the pods have their place");
        }
        _ if has_trained => {
            conditions.set(QUOTA_RESERVED, Verdict::True, reason::TRAINING, "the pods had their place");
        }
        _ => conditions.set(QUOTA_RESERVED, Verdict::Unknown, reason, "no training pod was asked for yet"),
    }
    let pods_run = observed.live.is_some() || state.phase == Phase::Running;
    conditions.set(PODS_READY, Verdict::of(pods_run), reason, message);
    let published = state.phase == Phase::Succeeded;
    conditions.set(PUBLISHED, Verdict::of(published), reason, message);
    conditions.into_vec()
}

fn run_status(
    observed: &Observed,
    run: &Run,
    state: &State,
    previous: &FineTuneJobStatus,
    now: Timestamp,
) -> RunStatus {
    let before = previous.run.as_ref().filter(|before| before.number == run.number);
    let report = run.preflight_report();
    let task = run.task.as_ref().and_then(|task| task.train.as_ref());
    let method = observed.job.spec.method_as(observed.job.spec.method);
    let digest = task
        .map(|task| task.input_digest.clone())
        .or_else(|| Some(input_digest(&RunSpec::preflight(&observed.job, run.number), &method?, report?)));
    let gpu_seconds = run.attempts.iter().filter_map(|attempt| {
        let plan = attempt.plan.as_ref()?;
        Some(attempt.ending()?.seconds_held() * i64::from(plan.pods * plan.gpus_per_pod))
    });
    let over = is_over(state.phase).then(|| before.and_then(|before| before.completion_time.clone()));
    RunStatus {
        number: run.number,
        attempt: run.attempt(),
        failures: run.failures(),
        input_digest: digest,
        base_digest: report.map(|report| report.base_digest.clone()),
        start_time: Some(Time(run.created)),
        completion_time: over.map(|time| time.unwrap_or(Time(now))),
        gpu_seconds: gpu_seconds.sum(),
    }
}

/// What the pod says, else what the run published, else what was known before.
fn progress(observed: &Observed, run: &Run, previous: &FineTuneJobStatus) -> Option<Progress> {
    let with_summary =
        |progress: Progress| Progress { summary: format!("{}/{}", progress.step, progress.total_steps), ..progress };
    if let Some(live) = observed.live.as_ref().filter(|live| live.progress.total_steps > 0) {
        return Some(with_summary(live.progress.clone()));
    }
    let before = previous.progress.clone().filter(|_| previous.run.as_ref().is_some_and(|r| r.number == run.number));
    let before = before.unwrap_or_default();
    if let Some(report) = run.train_report() {
        let steps = report.metrics.steps;
        return Some(with_summary(Progress {
            step: steps,
            total_steps: steps,
            loss: report.metrics.train_loss.or(before.loss),
            eval_loss: report.metrics.eval_loss.or(before.eval_loss),
            eta_seconds: Some(0),
            ..before
        }));
    }
    let report = run.preflight_report().filter(|_| run.version.is_none())?;
    Some(with_summary(Progress { total_steps: report.total_steps, ..before }))
}

/// What the last attempt was made from, else what the next one would ask for.
fn current_plan(observed: &Observed, run: Option<&Run>) -> Option<Plan> {
    let made = run.and_then(|run| run.attempts.last()?.plan.clone());
    made.or_else(|| {
        let report = run.and_then(Run::preflight_report);
        Some(plan(&observed.job.spec, &observed.offers, report, None).ok()?.plan)
    })
}

/// The runs that ended, newest first. A run that goes on again (because backoffLimit was raised) leaves it.
fn history(run: Option<&Run>, state: &State, previous: &FineTuneJobStatus, now: Timestamp) -> Vec<RunRecord> {
    let number = run.map(|run| run.number);
    let mut history = previous.history.clone();
    if let Some(before) = previous.run.as_ref().filter(|before| Some(before.number) != number)
        && !history.iter().any(|record| record.number == before.number)
    {
        history.insert(
            0,
            RunRecord {
                number: before.number,
                phase: Phase::Failed,
                attempts: before.attempt,
                version: None,
                message: Some("ended by a change of the spec".into()),
                completion_time: Some(Time(now)),
            },
        );
    }
    if let Some(run) = run {
        let known = history.iter().position(|record| record.number == run.number).map(|at| history.remove(at));
        if is_over(state.phase) {
            history.insert(
                0,
                RunRecord {
                    number: run.number,
                    phase: state.phase,
                    attempts: run.attempt(),
                    version: run.version.clone(),
                    message: (state.phase == Phase::Failed).then(|| state.message.clone()),
                    completion_time: known.and_then(|known| known.completion_time).or(Some(Time(now))),
                },
            );
        }
    }
    history.truncate(HISTORY);
    history
}
