//! The status of a FineTuneJob: a view of its runs' records and of what was decided, that can be computed anew at any time.
//! `progress` is not in it: that has a writer of its own ([`crate::progress`]).

use k8s_openapi::{
    apimachinery::pkg::apis::meta::v1::{Condition, Time},
    jiff::Timestamp,
};
use tunesmith_crds::{
    AdapterVersionPhase, FineTuneJobPhase as Phase, FineTuneJobStatus, FineTuneRunStatus,
    conditions::{PODS_READY, PREFLIGHT_PASSED, PUBLISHED, QUOTA_RESERVED, READY, RECONCILING, STALLED, reason},
    evaluation::GateResult,
    fine_tune_job::{Plan, RunRecord, RunStatus},
    fine_tune_run::Attempt,
    run::PreflightReport,
};

use super::decide::Decision;
use crate::{
    conditions::{Conditions, Verdict},
    observed::Observed,
    plan::plan,
    run::Run,
    runs::{copied, task::digest_of},
    state::State,
    workload::{JobState, Pods, TrainerJob},
};

/// Runs that are listed.
const HISTORY: usize = 10;

/// A run with its record as it is now.
struct Current<'a> {
    run: &'a Run,
    record: &'a FineTuneRunStatus,
}

/// The job's status now. `state` is the decision's, or what became of it.
pub fn status(observed: &Observed, decision: &Decision, state: &State, now: Timestamp) -> FineTuneJobStatus {
    let job = &observed.job;
    let previous = job.status.clone().unwrap_or_default();
    let current = observed.current().map(|run| Current { run, record: record_of(run, decision) });
    let current = current.as_ref();
    FineTuneJobStatus {
        phase: Some(state.phase),
        message: Some(state.message.clone()),
        observed_generation: job.metadata.generation,
        conditions: conditions(observed, current, state, &previous.conditions, now),
        run: current.map(|current| run_status(observed, current)),
        progress: None,
        plan: current_plan(observed, current),
        latest_version: latest(observed, decision, &previous),
        gates: current.map(|current| gates(observed, current, &previous)).unwrap_or_default(),
        history: history(observed, decision),
    }
}

/// The record of a run, as it was just decided.
fn record_of<'a>(run: &'a Run, decision: &'a Decision) -> &'a FineTuneRunStatus {
    let advance = decision.advances.iter().find(|(number, _)| *number == run.number());
    advance.map_or(&run.record, |(_, advance)| &advance.record)
}

/// The sort of what a job or a run does, for kstatus.
fn set_kstatus(conditions: &mut Conditions, state: &State, retrying: Option<&str>) {
    let (reason, message) = (state.reason, state.message.as_str());
    let stalled = state.phase == Phase::Failed || reason == reason::NO_GPU_CLASS;
    let reconciling = !stalled && !matches!(state.phase, Phase::Succeeded | Phase::Suspended);
    conditions.set(READY, Verdict::of(state.phase == Phase::Succeeded), reason, message);
    match retrying.filter(|_| reconciling) {
        Some(failure) => conditions.set(RECONCILING, Verdict::True, reason::RETRYING, failure),
        None => conditions.set(RECONCILING, Verdict::of(reconciling), reason, message),
    }
    conditions.set(STALLED, Verdict::of(stalled), reason, message);
}

fn conditions(
    observed: &Observed,
    current: Option<&Current>,
    state: &State,
    previous: &[Condition],
    now: Timestamp,
) -> Vec<Condition> {
    let (reason, message) = (state.reason, state.message.as_str());
    let record = current.map(|current| current.record);
    let mut conditions = Conditions::new(previous, observed.job.metadata.generation, now);
    set_kstatus(&mut conditions, state, record.and_then(failure_of));

    match record.and_then(|record| record.preflight.as_ref()) {
        Some(report) => {
            conditions.set(PREFLIGHT_PASSED, Verdict::True, reason::INPUTS_CHECKED, &what_was_checked(report));
        }
        None if reason == reason::PREFLIGHT_FAILED => {
            conditions.set(PREFLIGHT_PASSED, Verdict::False, reason::PREFLIGHT_FAILED, message);
        }
        None => conditions.set(PREFLIGHT_PASSED, Verdict::Unknown, reason, message),
    }
    let attempt = record.and_then(|record| record.attempts.last());
    let job = current.filter(|_| record.is_some_and(|record| record.active().is_some()));
    let job = job.and_then(|current| current.run.job());
    match (attempt, job) {
        (None, _) => conditions.set(QUOTA_RESERVED, Verdict::Unknown, reason, "no training pod was asked for yet"),
        (Some(_), Some(job)) if has_its_place(job) => {
            conditions.set(QUOTA_RESERVED, Verdict::True, reason::STARTING, "the pods have their place");
        }
        (Some(Attempt { cause: Some(_), started: Some(_), .. }), _) => {
            conditions.set(QUOTA_RESERVED, Verdict::True, reason::TRAINING, "the pods had their place");
        }
        _ => conditions.set(QUOTA_RESERVED, Verdict::False, reason, message),
    }
    let pods_run = job.is_some_and(|job| job.running_since().is_some());
    conditions.set(PODS_READY, Verdict::of(pods_run), reason, message);
    // A version that failed its gates is published all the same: nothing is lost.
    let published = state.phase == Phase::Succeeded || reason == reason::GATE_FAILED;
    conditions.set(PUBLISHED, Verdict::of(published), reason, message);
    conditions.into_vec()
}

/// Whether the cluster gave an attempt what it asks for: its pods are there, and nodes have them.
fn has_its_place(job: &TrainerJob) -> bool {
    let pods = match &job.state {
        JobState::Active { pods, .. } => pods,
        JobState::Ended(_) => return true,
    };
    !job.suspended && matches!(pods, Pods::Starting(_) | Pods::Running { .. } | Pods::Over)
}

/// Why the last try or attempt that is over came to nothing, while another one is to come.
fn failure_of(record: &FineTuneRunStatus) -> Option<&str> {
    record.message.as_deref().filter(|_| record.adapter_version.is_none() && !record.is_done())
}

fn run_status(observed: &Observed, Current { run, record }: &Current) -> RunStatus {
    RunStatus {
        number: run.number(),
        attempt: record.last_attempt,
        failures: record.failures,
        input_digest: digest_of(run, record, observed),
        base_digest: record.preflight.as_ref().map(|report| report.base_digest.clone()),
        start_time: Some(Time(run.created)),
        completion_time: record.completion_time.clone(),
        gpu_seconds: i64::try_from(record.gpu_seconds).unwrap_or(i64::MAX),
    }
}

/// The newest version that the job's runs led to and that may be served now.
fn latest(observed: &Observed, decision: &Decision, previous: &FineTuneJobStatus) -> Option<String> {
    let runs = observed.runs.values().rev();
    let of_runs = runs.filter_map(|run| record_of(run, decision).adapter_version.as_ref());
    of_runs.chain(&previous.latest_version).find(|name| is_available(observed, name)).cloned()
}

fn is_available(observed: &Observed, name: &str) -> bool {
    let phase = observed.version(name).and_then(|version| version.status.as_ref()?.phase);
    phase == Some(AdapterVersionPhase::Available)
}

/// What the gates say of the run's version; what they said, once its record was deleted.
fn gates(observed: &Observed, Current { run, record }: &Current, previous: &FineTuneJobStatus) -> Vec<GateResult> {
    let known = previous.run.as_ref().filter(|before| before.number == run.number());
    match record.adapter_version.as_ref().and_then(|name| observed.version(name)) {
        Some(version) => observed.job.spec.evaluation.judge(&version.spec.metrics),
        None => known.map(|_| previous.gates.clone()).unwrap_or_default(),
    }
}

/// What the last attempt was made from, else what the next one would ask for.
fn current_plan(observed: &Observed, current: Option<&Current>) -> Option<Plan> {
    let record = current.map(|current| current.record);
    if record.and_then(copied).is_some() {
        return None;
    }
    let made = record.and_then(|record| record.plan.clone());
    made.or_else(|| {
        let report = record.and_then(|record| record.preflight.as_ref());
        Some(plan(&observed.job.spec, &observed.offers, report, None).ok()?.plan)
    })
}

/// The runs that are over, newest first.
fn history(observed: &Observed, decision: &Decision) -> Vec<RunRecord> {
    let runs = observed.runs.values().rev().map(|run| (run, record_of(run, decision)));
    let over = runs.filter(|(_, record)| record.is_done());
    let record = |(run, record): (&Run, &FineTuneRunStatus)| {
        let succeeded = matches!(record.reason.as_deref(), Some(reason::PUBLISHED | reason::REUSED));
        RunRecord {
            number: run.number(),
            phase: if succeeded { Phase::Succeeded } else { Phase::Failed },
            attempts: record.last_attempt,
            version: record.adapter_version.clone(),
            message: record.message.clone().filter(|_| !succeeded),
            completion_time: record.completion_time.clone(),
        }
    };
    over.map(record).take(HISTORY).collect()
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
        admission::Refusal,
        fixtures::{
            at, attempt_ended, failed, job, observed, observed_checked, observed_published, observed_run,
            observed_training, preflight_report, run, settle, train, version,
        },
        jobs::decide::decide,
        workload::Pods,
    };

    fn status_of(observed: &Observed) -> FineTuneJobStatus {
        let now = at(10_000);
        let decision = decide(observed, now);
        status(observed, &decision, &decision.state, now)
    }

    fn verdict<'a>(status: &'a FineTuneJobStatus, type_: &str) -> (&'a str, &'a str) {
        let condition = status.conditions.iter().find(|condition| condition.type_ == type_).unwrap();
        assert_eq!(condition.observed_generation, Some(1), "{type_}");
        (&condition.status, &condition.reason)
    }

    fn running() -> Pods {
        Pods::Running { address: None, since: Some(at(20)) }
    }

    /// A job whose run has published version 1, which is in this phase.
    fn published(job: tunesmith_crds::FineTuneJob, phase: AdapterVersionPhase) -> Observed {
        let mut observed = observed_published(job);
        observed.runs.get_mut(&1).unwrap().record.adapter_version = Some("support-v1".into());
        observed.versions = vec![version(1, "sha256:x", Some(phase))];
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
        let observed = observed_training(job(json!({})), Pods::Missing);
        let refusal = Refusal { reason: reason::ADMISSION_REFUSED, message: "webhook down".into(), is_final: false };
        let decision = decide(&observed, at(10_000));
        let state = decision.state.clone().refused(Some(refusal));
        let status = status(&observed, &decision, &state, at(10_000));
        assert_eq!((status.phase, status.message.as_deref()), (Some(Phase::Queued), Some("webhook down")));
        assert_eq!(verdict(&status, QUOTA_RESERVED), ("False", reason::ADMISSION_REFUSED));
        assert_eq!(verdict(&status, PREFLIGHT_PASSED), ("True", reason::INPUTS_CHECKED));
    }

    #[test]
    fn quota_is_reserved_only_while_nodes_have_the_pods() {
        let of = |pods| {
            let status = status_of(&observed_training(job(json!({})), pods));
            (verdict(&status, QUOTA_RESERVED).0.to_owned(), verdict(&status, PODS_READY).0.to_owned())
        };
        let both = |quota: &str, pods: &str| (quota.to_owned(), pods.to_owned());
        assert_eq!(of(Pods::Missing), both("False", "False"));
        assert_eq!(of(Pods::Unschedulable("no node".into())), both("False", "False"));
        assert_eq!(of(Pods::Starting("pulls".into())), both("True", "False"));
        assert_eq!(of(running()), both("True", "True"));
        let unasked = status_of(&observed(job(json!({}))));
        assert_eq!(verdict(&unasked, QUOTA_RESERVED).0, "Unknown");
    }

    #[test]
    fn a_success_is_ready_and_stays_the_same_when_looked_at_again() {
        let mut observed = published(job(json!({})), AdapterVersionPhase::Available);
        let first = status_of(&observed);
        assert_eq!(verdict(&first, READY), ("True", reason::PUBLISHED));
        assert_eq!(verdict(&first, PUBLISHED).0, "True");
        assert_eq!(verdict(&first, PODS_READY).0, "False");
        assert_eq!(first.latest_version.as_deref(), Some("support-v1"));
        assert_eq!(first.history.len(), 1);
        let now = at(20_000);
        observed.runs.get_mut(&1).unwrap().record = decide(&observed, at(10_000)).advances[0].1.record.clone();
        observed.job.status = Some(first.clone());
        let decision = decide(&observed, now);
        assert_eq!(status(&observed, &decision, &decision.state, now), first);
    }

    #[test]
    fn the_latest_version_is_one_that_may_be_served_now() {
        let latest = |phase, before: &str| {
            let mut observed = published(job(json!({})), phase);
            observed.versions.push(version(0, "sha256:old", Some(AdapterVersionPhase::Available)));
            let status = FineTuneJobStatus { latest_version: Some(before.into()), ..FineTuneJobStatus::default() };
            observed.job.status = Some(status);
            status_of(&observed).latest_version
        };
        assert_eq!(latest(AdapterVersionPhase::Available, "support-v0").as_deref(), Some("support-v1"));
        for phase in [AdapterVersionPhase::Verifying, AdapterVersionPhase::Rejected, AdapterVersionPhase::Missing] {
            assert_eq!(latest(phase, "support-v0").as_deref(), Some("support-v0"), "{phase:?}");
            assert_eq!(latest(phase, "support-v1"), None, "{phase:?}");
            assert_eq!(latest(phase, "support-v9"), None, "{phase:?}: it is gone");
        }
    }

    #[test]
    fn a_version_that_fails_a_gate_is_published_and_shown_but_not_the_latest() {
        let gates = json!({"evaluation": {"gates": [{"metric": "eval_loss", "max": 1.2}]}});
        let mut observed = published(job(gates), AdapterVersionPhase::Rejected);
        let status = status_of(&observed);
        assert_eq!(verdict(&status, READY), ("False", reason::GATE_FAILED));
        assert_eq!(verdict(&status, STALLED), ("True", reason::GATE_FAILED));
        assert_eq!(verdict(&status, PUBLISHED), ("True", reason::GATE_FAILED));
        assert_eq!(status.latest_version, None);
        let [gate] = &status.gates[..] else { panic!("{:?}", status.gates) };
        assert_eq!((gate.value, gate.max, gate.passed), (Some(1.5), Some(1.2), false));
        let [record] = &status.history[..] else { panic!("{:?}", status.history) };
        assert_eq!((record.phase, record.version.as_deref()), (Phase::Failed, Some("support-v1")));
        assert!(record.message.as_deref().unwrap().contains("eval_loss 1.50 is above 1.20"), "{record:?}");

        // Once its record is deleted, what was measured is still there to read.
        observed.runs.get_mut(&1).unwrap().record = decide(&observed, at(10_000)).advances[0].1.record.clone();
        observed.job.status = Some(status);
        observed.versions.clear();
        assert_eq!(status_of(&observed).gates.len(), 1);
    }

    #[test]
    fn the_last_failure_is_the_reason_for_reconciling_while_the_next_attempt_runs() {
        let status = status_of(&observed_checked(job(json!({})), |run| {
            settle(run, 1, "sha256:x");
            attempt_ended(run, failed("store down"));
            train(run, running());
        }));
        assert_eq!(verdict(&status, RECONCILING), ("True", reason::RETRYING));
        assert_eq!(verdict(&status, PODS_READY), ("True", reason::TRAINING));
        let run = status.run.unwrap();
        assert_eq!((run.attempt, run.failures), (2, 1));
    }

    #[test]
    fn gpu_seconds_count_the_gpus_of_each_attempt() {
        let status = status_of(&observed_checked(job(json!({})), |run| {
            settle(run, 1, "sha256:x");
            train(run, running());
            run.record.attempts[0].gpus = 8;
            let crate::run::Work::There { job, .. } = run.work.clone() else { panic!() };
            run.work = crate::fixtures::there(crate::fixtures::ended(*job, failed("x")));
        }));
        assert_eq!(status.run.unwrap().gpu_seconds, 90 * 8);
    }

    #[test]
    fn a_run_that_a_changed_spec_has_ended_stays_in_the_history() {
        let mut observed = observed_checked(job(json!({})), |_| {});
        observed.job.spec.training.seed += 1;
        let status = status_of(&observed);
        let [record] = &status.history[..] else { panic!("{:?}", status.history) };
        assert_eq!((record.number, record.phase), (1, Phase::Failed));
        assert!(record.message.as_deref().unwrap().contains("change of the spec"));
    }

    #[test]
    fn a_failed_run_that_goes_on_leaves_the_history() {
        let mut failing = observed_checked(job(json!({})), |run| {
            settle(run, 1, "sha256:x");
            attempt_ended(run, failed("a"));
            attempt_ended(run, failed("b"));
        });
        let over = status_of(&failing);
        assert_eq!((over.phase, over.history.len()), (Some(Phase::Failed), 1));
        failing.runs.get_mut(&1).unwrap().record = decide(&failing, at(10_000)).advances[0].1.record.clone();
        failing.job.spec.backoff_limit = 5;
        let status = status_of(&failing);
        assert_eq!((status.phase, status.history.len()), (Some(Phase::Starting), 0));
        assert_eq!(status.run.unwrap().completion_time, None);
    }

    #[test]
    fn the_history_shows_the_last_10_runs() {
        let mut observed = observed(job(json!({})));
        for number in 1..=12 {
            let mut run = run(&observed.job, number);
            run.record.stage = Some(tunesmith_crds::fine_tune_run::RunStage::Done);
            observed.runs.insert(number, run);
        }
        observed.job.spec.training.seed += 1;
        let history = status_of(&observed).history;
        assert_eq!((history.len(), history[0].number, history[9].number), (10, 12, 3));
    }
}
