//! The status of a FineTuneJob: a view of what was observed and decided, that can be computed anew at any time. Only
//! `history` remembers what has no object any more.

use k8s_openapi::{
    apimachinery::pkg::apis::meta::v1::{Condition, Time},
    jiff::Timestamp,
};
use tunesmith_crds::{
    FineTuneJobPhase as Phase, FineTuneJobStatus,
    conditions::{PODS_READY, PREFLIGHT_PASSED, PUBLISHED, QUOTA_RESERVED, READY, RECONCILING, STALLED, reason},
    evaluation::{GateResult, failure},
    fine_tune_job::{Plan, Progress, RunRecord, RunStatus},
    run::PreflightReport,
};

use super::{
    decide::{State, digest_of},
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
        latest_version: run.and_then(|run| latest(observed, run)).or_else(|| previous.latest_version.clone()),
        gates: run.map(|run| gates(observed, run, &previous)).unwrap_or_default(),
        history: history(observed, run, state, &previous, now),
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
    match (run.and_then(Run::preflight_report), preflight.and_then(|job| job.complaint())) {
        (Some(report), _) => {
            conditions.set(PREFLIGHT_PASSED, Verdict::True, reason::INPUTS_CHECKED, &what_was_checked(report));
        }
        (None, Some(complaint)) if state.reason == reason::PREFLIGHT_FAILED => {
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
    // A version that failed its gates is published all the same: nothing is lost.
    let published = state.phase == Phase::Succeeded || reason == reason::GATE_FAILED;
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
    let digest = report.and_then(|report| digest_of(observed, run, report));
    let gpu_seconds = run.attempts.iter().filter_map(|attempt| {
        let plan = attempt.plan.as_ref()?;
        Some(attempt.ending()?.seconds_held() * i64::from(plan.pods * plan.gpus_per_pod))
    });
    let over = is_over(state.phase).then(|| before.and_then(|before| before.completion_time.clone()));
    RunStatus {
        number: run.number,
        attempt: observed.last_attempt(run),
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

/// The version that the run led to, unless it failed the gates.
fn latest(observed: &Observed, run: &Run) -> Option<String> {
    let name = run.version.as_ref()?;
    let results = observed.job.spec.evaluation.judge(&observed.version(name)?.spec.metrics);
    failure(&results).is_none().then(|| name.clone())
}

/// What the gates say of the run's version; what they said, once its record was deleted.
fn gates(observed: &Observed, run: &Run, previous: &FineTuneJobStatus) -> Vec<GateResult> {
    let known = previous.run.as_ref().filter(|before| before.number == run.number);
    match run.version.as_ref().and_then(|name| observed.version(name)) {
        Some(version) => observed.job.spec.evaluation.judge(&version.spec.metrics),
        None => known.map(|_| previous.gates.clone()).unwrap_or_default(),
    }
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
fn history(
    observed: &Observed,
    run: Option<&Run>,
    state: &State,
    previous: &FineTuneJobStatus,
    now: Timestamp,
) -> Vec<RunRecord> {
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
                    attempts: observed.last_attempt(run),
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

/// What a preflight says of model and data: what of the rows is used, and what is not as it stands.
fn what_was_checked(report: &PreflightReport) -> String {
    let PreflightReport { dataset, eval_rows, truncated_rows, dropped_rows, skipped_rows, warnings, .. } = report;
    let does = |rows: &u64, one: &str, many: &str| match rows {
        0 => None,
        1 => Some(format!("1 {one}")),
        rows => Some(format!("{rows} {many}")),
    };
    let truncated = does(truncated_rows, "row loses its end", "rows lose their end");
    let dropped = does(dropped_rows, "is left out", "are left out");
    let long: Vec<String> = truncated.into_iter().chain(dropped).collect();
    let mut parts = vec![format!("model and data can be used: {} rows, and {eval_rows} for evaluation", dataset.rows)];
    if !long.is_empty() {
        parts.push(format!("longer than maxLength: {}", long.join(", ")));
    }
    parts.extend(does(skipped_rows, "bad row is left out (onBadRow: Skip)", "bad rows are left out (onBadRow: Skip)"));
    if !warnings.is_empty() {
        parts.push(format!("warnings: {}", warnings.join(", ")));
    }
    parts.join("; ")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::{
        controller::decide::decide,
        fixtures::{
            at, attempt, ended, failed, job, observed, observed_checked, observed_run, preflight_report, task, trained,
            version, with_pods,
        },
        trainer::Pods,
    };

    fn status_of(observed: &Observed) -> FineTuneJobStatus {
        let now = at(10_000);
        status(observed, &decide(observed, now).state, now)
    }

    fn verdict<'a>(status: &'a FineTuneJobStatus, type_: &str) -> (&'a str, &'a str) {
        let condition = status.conditions.iter().find(|condition| condition.type_ == type_).unwrap();
        assert_eq!(condition.observed_generation, Some(1), "{type_}");
        (&condition.status, &condition.reason)
    }

    fn succeeded() -> Observed {
        let job = job(json!({}));
        let mut observed = observed_checked(job.clone(), |run| {
            run.task = Some(task(&job, 1, 1, "sha256:x"));
            run.attempts = vec![ended(attempt(1), trained(1))];
            run.version = Some("support-v1".into());
        });
        observed.versions = vec![version(1, "sha256:x", Some(tunesmith_crds::AdapterVersionPhase::Available))];
        observed
    }

    #[test]
    fn a_job_has_every_condition_from_its_first_reconcile_on() {
        let status = status_of(&observed(job(json!({}))));
        assert_eq!(status.observed_generation, Some(1));
        let types: Vec<&str> = status.conditions.iter().map(|condition| condition.type_.as_str()).collect();
        assert_eq!(types, [READY, RECONCILING, STALLED, PREFLIGHT_PASSED, QUOTA_RESERVED, PODS_READY, PUBLISHED]);
        assert_eq!(verdict(&status, READY), ("False", reason::PREFLIGHT));
        assert_eq!(verdict(&status, RECONCILING), ("True", reason::PREFLIGHT));
        assert_eq!(verdict(&status, STALLED), ("False", reason::PREFLIGHT));
        assert_eq!(status.plan.map(|plan| plan.gpu_class), Some("cpu".into()));
    }

    #[test]
    fn what_preflight_did_to_long_rows_is_told() {
        let report = preflight_report();
        assert_eq!(what_was_checked(&report), "model and data can be used: 10 rows, and 1 for evaluation");
        let report = PreflightReport { truncated_rows: 3, dropped_rows: 1, ..report };
        let message = what_was_checked(&report);
        assert!(message.ends_with("longer than maxLength: 3 rows lose their end, 1 is left out"), "{message}");
    }

    #[test]
    fn rows_that_are_left_out_and_what_is_not_used_are_told() {
        let warnings = ["column \"id\" is not used (9 rows)".to_owned(), "and 2 more".to_owned()].to_vec();
        let report = PreflightReport { skipped_rows: 2, warnings, ..preflight_report() };
        assert_eq!(
            what_was_checked(&report),
            "model and data can be used: 10 rows, and 1 for evaluation; 2 bad rows are left out (onBadRow: Skip); warnings: \
             column \"id\" is not used (9 rows), and 2 more"
        );
    }

    #[test]
    fn a_job_that_waits_for_its_user_is_stalled_and_not_reconciling() {
        let mut observed = observed(job(json!({})));
        observed.offers.classes.clear();
        let status = status_of(&observed);
        assert_eq!(verdict(&status, STALLED), ("True", reason::NO_GPU_CLASS));
        assert_eq!(verdict(&status, RECONCILING).0, "False");
        let suspended = status_of(&observed_run(job(json!({"suspend": true})), |_| {}));
        assert_eq!(verdict(&suspended, STALLED), ("False", reason::SUSPENDED));
        assert_eq!(verdict(&suspended, RECONCILING).0, "False");
    }

    #[test]
    fn a_job_that_the_cluster_refuses_is_queued_with_quota_not_reserved() {
        let observed = observed_checked(job(json!({})), |_| {});
        let refusal = Refusal { reason: reason::ADMISSION_REFUSED, message: "webhook down".into() };
        let state = refused(decide(&observed, at(10_000)).state, Some(refusal));
        let status = status(&observed, &state, at(10_000));
        assert_eq!((status.phase, status.message.as_deref()), (Some(Phase::Queued), Some("webhook down")));
        assert_eq!(verdict(&status, QUOTA_RESERVED), ("False", reason::ADMISSION_REFUSED));
        assert_eq!(verdict(&status, PREFLIGHT_PASSED), ("True", reason::INPUTS_CHECKED));
    }

    #[test]
    fn a_success_is_ready_and_stays_the_same_when_looked_at_again() {
        let mut observed = succeeded();
        let first = status_of(&observed);
        assert_eq!(verdict(&first, READY), ("True", reason::PUBLISHED));
        assert_eq!(verdict(&first, PUBLISHED).0, "True");
        assert_eq!(verdict(&first, PODS_READY).0, "False");
        assert_eq!(first.latest_version.as_deref(), Some("support-v1"));
        assert_eq!(first.progress.as_ref().map(|progress| progress.summary.as_str()), Some("400/400"));
        assert_eq!(first.history.len(), 1);
        observed.job.status = Some(first.clone());
        let now = at(20_000);
        assert_eq!(status(&observed, &decide(&observed, now).state, now), first);
    }

    #[test]
    fn a_version_that_fails_a_gate_is_published_and_shown_but_not_the_latest() {
        let gates = json!({"evaluation": {"gates": [{"metric": "eval_loss", "max": 1.2}]}});
        let mut observed = succeeded();
        observed.job.status =
            Some(FineTuneJobStatus { latest_version: Some("support-v0".into()), ..FineTuneJobStatus::default() });
        observed.job.spec = job(gates).spec;
        observed.runs.get_mut(&1).unwrap().spec = Some(observed.job.spec.clone());
        let status = status_of(&observed);
        assert_eq!(verdict(&status, READY), ("False", reason::GATE_FAILED));
        assert_eq!(verdict(&status, STALLED), ("True", reason::GATE_FAILED));
        assert_eq!(verdict(&status, PUBLISHED), ("True", reason::GATE_FAILED));
        assert_eq!(status.latest_version.as_deref(), Some("support-v0"));
        let [gate] = &status.gates[..] else { panic!("{:?}", status.gates) };
        assert_eq!((gate.value, gate.max, gate.passed), (Some(1.5), Some(1.2), false));
        let [record] = &status.history[..] else { panic!("{:?}", status.history) };
        assert_eq!((record.phase, record.version.as_deref()), (Phase::Failed, Some("support-v1")));
        assert!(record.message.as_deref().unwrap().contains("eval_loss 1.50 is above 1.20"), "{record:?}");

        // Once its record is deleted, what was measured is still there to read.
        observed.job.status = Some(status);
        observed.versions.clear();
        let status = status_of(&observed);
        assert_eq!((status.gates.len(), status.latest_version.as_deref()), (1, Some("support-v0")));
    }

    #[test]
    fn the_last_failure_is_the_reason_for_reconciling_while_the_next_attempt_runs() {
        let running = Pods::Running { address: None, since: None };
        let status = status_of(&observed_checked(job(json!({})), |run| {
            run.attempts = vec![ended(attempt(1), failed("store down")), with_pods(attempt(2), running)];
        }));
        assert_eq!(verdict(&status, RECONCILING), ("True", reason::RETRYING));
        assert_eq!(verdict(&status, PODS_READY), ("True", reason::TRAINING));
        let run = status.run.unwrap();
        assert_eq!((run.attempt, run.failures), (2, 1));
    }

    #[test]
    fn gpu_seconds_count_the_gpus_of_each_attempt() {
        let status = status_of(&observed_checked(job(json!({})), |run| {
            let mut attempt = ended(attempt(1), failed("x"));
            attempt.plan = Some(Plan { pods: 4, gpus_per_pod: 2, ..Plan::default() });
            run.attempts = vec![attempt];
        }));
        assert_eq!(status.run.unwrap().gpu_seconds, 90 * 8);
    }

    #[test]
    fn a_run_that_a_changed_spec_has_ended_stays_in_the_history() {
        let mut observed = observed_checked(job(json!({})), |_| {});
        observed.job.status = Some(status_of(&observed));
        observed.job.spec.training.seed += 1;
        let status = status_of(&observed);
        let [record] = &status.history[..] else { panic!("{:?}", status.history) };
        assert_eq!((record.number, record.phase), (1, Phase::Failed));
        assert!(record.message.as_deref().unwrap().contains("change of the spec"));
    }

    #[test]
    fn a_failed_run_that_goes_on_leaves_the_history() {
        let failing = |job| {
            observed_checked(job, |run| {
                run.attempts = vec![ended(attempt(1), failed("a")), ended(attempt(2), failed("b"))];
            })
        };
        let over = status_of(&failing(job(json!({}))));
        assert_eq!((over.phase, over.history.len()), (Some(Phase::Failed), 1));
        let mut raised = failing(job(json!({"backoffLimit": 5})));
        raised.job.status = Some(over);
        let status = status_of(&raised);
        assert_eq!((status.phase, status.history.len()), (Some(Phase::Starting), 0));
        assert_eq!(status.run.unwrap().completion_time, None);
    }

    #[test]
    fn the_history_keeps_the_last_10_runs() {
        let mut observed = succeeded();
        let record = |number| RunRecord {
            number,
            phase: Phase::Failed,
            attempts: 1,
            version: None,
            message: None,
            completion_time: None,
        };
        observed.job.status =
            Some(FineTuneJobStatus { history: (2..=11).map(record).collect(), ..FineTuneJobStatus::default() });
        let history = status_of(&observed).history;
        assert_eq!((history.len(), history[0].number, history[9].number), (10, 1, 10));
    }
}
