//! Every transition of the state machine, one at a time. [`super::simulation`] tests that they go together.

use serde_json::json;
use tunesmith_crds::{
    AdapterVersionPhase, FineTuneJob,
    fine_tune_job::MethodName,
    fine_tune_run::{Cause as Kind, RunStage},
    names::RETRY_ANNOTATION,
    run::{LiveProgress, Outcome, PreflightReport, TrainStage},
};

use super::*;
use crate::{
    admission::Refusal,
    fixtures::{
        at, attempt_ended, check_ended, class, failed, job, observed, observed_checked, observed_published,
        observed_run, observed_training, passed, preflight_report, run, settle, there, train, trained, trainer_job,
        version, with_pods,
    },
    jobs::status::status,
    run::Work,
    runs::{advance::Step, copied, settle::refused, task::digest_of},
    workload::{Cause, JobState, Pods, Stage},
};

/// Long after everything in the fixtures.
fn later() -> Timestamp {
    at(10_000)
}

fn plain() -> FineTuneJob {
    job(json!({}))
}

fn suspended() -> FineTuneJob {
    job(json!({"suspend": true}))
}

fn running() -> Pods {
    Pods::Running { address: None, since: Some(at(20)) }
}

fn check(observed: &Observed, phase: Phase, reason: &str) -> Decision {
    let decision = decide(observed, later());
    assert_eq!((decision.state.phase, decision.state.reason), (phase, reason), "{decision:?}");
    decision
}

/// What is to be done about run 1.
fn advance_of(decision: &Decision) -> &Advance {
    let (number, advance) = decision.advances.first().unwrap_or_else(|| panic!("{decision:?}"));
    assert_eq!(*number, 1);
    advance
}

fn steps(decision: &Decision) -> &[Step] {
    &advance_of(decision).steps
}

fn deletes(decision: &Decision, job: &str) -> bool {
    matches!(steps(decision), [Step::DeleteJob { name, .. }] if name == job)
}

fn digest() -> String {
    let observed = observed_checked(plain(), |_| {});
    let run = &observed.runs[&1];
    digest_of(run, &run.record, &observed).unwrap()
}

fn disrupted() -> Cause {
    Cause::Disrupted { message: "preempted".into() }
}

#[test]
fn a_new_job_starts_its_first_run_and_that_a_check() {
    let decision = check(&observed(plain()), Phase::Preflight, reason::PREFLIGHT);
    assert_eq!((decision.start, decision.advances.len()), (Some((1, Trigger::Generation)), 0));
    let decision = check(&observed_run(plain(), |_| {}), Phase::Preflight, reason::PREFLIGHT);
    assert_eq!(steps(&decision), [Step::CreateCheck]);
    let check = advance_of(&decision).record.check.clone().unwrap();
    assert_eq!(
        (check.number, check.job_uid, check.decided.0),
        (1, None, later()),
        "it is written down before it is made"
    );
}

#[test]
fn a_job_that_no_class_serves_waits_for_one_with_advice() {
    let mut observed = observed(plain());
    observed.offers.classes.clear();
    let decision = check(&observed, Phase::Pending, reason::NO_GPU_CLASS);
    assert_eq!(decision.start, None);
    assert!(decision.state.message.contains("create one"), "{}", decision.state.message);
}

#[test]
fn a_folder_of_the_pod_is_no_place_for_a_version() {
    let output = json!({"adapterName": "support", "uri": "file:///adapters"});
    let decision = check(&observed(job(json!({"output": output}))), Phase::Failed, reason::INVALID);
    assert!(decision.state.message.contains("such as s3://bucket/folder"), "{}", decision.state.message);
}

#[test]
fn a_run_that_can_not_be_read_stops_its_job_and_says_so() {
    let mut observed = observed(plain());
    observed.unreadable = vec!["FineTuneRun j-1 can't be read: missing field `number`".into()];
    assert_eq!(check(&observed, Phase::Failed, reason::UNREADABLE).start, None);
}

#[test]
fn a_suspended_job_starts_nothing() {
    assert_eq!(check(&observed(suspended()), Phase::Suspended, reason::SUSPENDED).start, None);
    let started = observed_run(suspended(), |_| {});
    assert_eq!(steps(&check(&started, Phase::Suspended, reason::SUSPENDED)), []);
    let checked = observed_checked(suspended(), |_| {});
    assert_eq!(steps(&check(&checked, Phase::Suspended, reason::SUSPENDED)), []);
}

#[test]
fn suspending_ends_the_active_job_and_keeps_what_it_took() {
    let mut training = observed_training(suspended(), running());
    assert!(deletes(&check(&training, Phase::Suspended, reason::SUSPENDED), "j-1-1"));
    let run = training.runs.get_mut(&1).unwrap();
    run.record.attempts[0].started = Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(at(20)));
    run.work = Work::Gone;
    let decision = check(&training, Phase::Suspended, reason::SUSPENDED);
    let record = &advance_of(&decision).record;
    assert_eq!((record.attempts[0].cause, record.seconds, record.failures), (Some(Kind::Disrupted), 9_980, 0));
}

#[test]
fn a_decided_job_that_was_never_seen_is_made_again_under_its_name() {
    let decided = observed_training(plain(), running());
    let unseen = |mut observed: Observed| {
        let run = observed.runs.get_mut(&1).unwrap();
        run.work = Work::None;
        run.record.attempts[0].job_uid = None;
        observed
    };
    let decision = check(&unseen(decided), Phase::Starting, reason::STARTING);
    assert!(matches!(steps(&decision), [Step::CreateAttempt(_)]));
    assert_eq!(advance_of(&decision).record.last_attempt, 1);
}

#[test]
fn a_job_counts_by_its_uid_from_when_it_is_seen() {
    let mut observed = observed_training(plain(), running());
    observed.runs.get_mut(&1).unwrap().record.attempts[0].job_uid = None;
    let decision = check(&observed, Phase::Running, reason::TRAINING);
    let attempt = &advance_of(&decision).record.attempts[0];
    assert_eq!(attempt.job_uid.as_deref(), Some("uid-j-1-1"));
    assert_eq!(attempt.started.as_ref().map(|time| time.0), Some(at(20)));
}

#[test]
fn a_preflight_that_finds_an_error_fails_the_job_in_the_trainers_words() {
    let words = "dataset row 17: no assistant turn";
    let observed = observed_run(plain(), |run| check_ended(run, Cause::Final { message: words.into() }));
    let decision = check(&observed, Phase::Failed, reason::PREFLIGHT_FAILED);
    assert_eq!((steps(&decision).len(), decision.state.message.as_str()), (0, words));
    assert_eq!(advance_of(&decision).record.stage, Some(RunStage::Done));
}

#[test]
fn a_preflight_that_was_disrupted_starts_again_under_another_name() {
    let observed = observed_run(plain(), |run| check_ended(run, disrupted()));
    let decision = check(&observed, Phase::Preflight, reason::PREFLIGHT);
    assert_eq!(steps(&decision), [Step::CreateCheck]);
    assert_eq!(advance_of(&decision).record.check.as_ref().unwrap().number, 2);
}

#[test]
fn a_preflight_fails_no_more_often_than_backoff_limit_allows() {
    let with = |times| observed_run(plain(), |run| (0..times).for_each(|_| check_ended(run, failed("crashed"))));
    assert_eq!(steps(&check(&with(1), Phase::Preflight, reason::PREFLIGHT)), [Step::CreateCheck]);
    let decision = check(&with(2), Phase::Failed, reason::PREFLIGHT_FAILED);
    assert!(decision.state.message.ends_with("crashed"), "{}", decision.state.message);
}

#[test]
fn a_store_that_is_down_is_asked_again_later_and_later_and_for_good() {
    let down = || Cause::StoreUnavailable { message: "no answer from the store".into() };
    let observed = observed_run(plain(), |run| (0..50).for_each(|_| check_ended(run, down())));
    let waiting = decide(&observed, at(200));
    assert_eq!((waiting.state.phase, waiting.state.reason), (Phase::Preflight, reason::STORE_UNAVAILABLE));
    assert_eq!((steps(&waiting).len(), waiting.state.requeue.unwrap().as_secs()), (0, 200));
    assert!(waiting.state.message.contains("no answer"), "{}", waiting.state.message);
    assert_eq!(steps(&check(&observed, Phase::Preflight, reason::PREFLIGHT)), [Step::CreateCheck]);
}

#[test]
fn a_passed_preflight_settles_what_to_train_and_begins_the_first_attempt() {
    let mut observed = observed_checked(plain(), |_| {});
    observed.reserved = 4;
    observed.versions = vec![version(2, "sha256:other", None)];
    let decision = check(&observed, Phase::Starting, reason::STARTING);
    let [Step::CreateAttempt(planned)] = steps(&decision) else { panic!("{decision:?}") };
    assert_eq!((planned.plan.gpu_class.as_str(), planned.plan.pods, planned.plan.gpus_per_pod), ("cpu", 1, 0));
    let record = &advance_of(&decision).record;
    let settled = record.settled.as_ref().unwrap();
    assert_eq!((settled.version, settled.method.name(), settled.input_digest.clone()), (5, MethodName::LoRA, digest()));
    assert_eq!((record.last_attempt, record.attempts.len(), record.stage), (1, 1, Some(RunStage::Training)));
}

#[test]
fn a_job_that_is_created_suspended_is_admitted() {
    let mut observed = observed_training(plain(), Pods::Missing);
    let Work::There { job, .. } = &mut observed.runs.get_mut(&1).unwrap().work else { panic!() };
    job.suspended = true;
    let decision = check(&observed, Phase::Starting, reason::STARTING);
    assert!(matches!(steps(&decision), [Step::Admit { name, .. }] if name == "j-1-1"), "{decision:?}");
}

/// The version that the run of a decision settles on.
fn settled_on(decision: &Decision) -> Option<u32> {
    advance_of(decision).record.settled.as_ref().map(|settled| settled.version)
}

/// A job with one gate: eval loss up to `max`. The versions of the fixtures have 1.5.
fn gated(max: f64) -> FineTuneJob {
    job(json!({"evaluation": {"gates": [{"metric": "eval_loss", "max": max}]}}))
}

#[test]
fn a_version_that_fails_a_gate_is_recorded_and_fails_the_job_at_once_and_for_good() {
    let mut observed = observed_published(gated(1.2));
    let recorded = check(&observed, Phase::Publishing, reason::PUBLISHING);
    assert_eq!(steps(&recorded), [Step::CreateVersion]);
    observed.runs.get_mut(&1).unwrap().record = advance_of(&recorded).record.clone();
    for phase in [None, Some(AdapterVersionPhase::Rejected)] {
        observed.versions = vec![version(1, "sha256:x", phase)];
        let decision = check(&observed, Phase::Failed, reason::GATE_FAILED);
        let expected = "AdapterVersion support-v1 must not be served: eval_loss 1.50 is above 1.20";
        assert_eq!((steps(&decision).len(), decision.state.message.as_str()), (0, expected));
    }
}

#[test]
fn a_version_that_passes_its_gates_is_as_good_as_one_without() {
    let mut observed = observed_published(gated(1.5));
    observed.runs.get_mut(&1).unwrap().record.adapter_version = Some("support-v1".into());
    observed.versions = vec![version(1, "sha256:x", None)];
    check(&observed, Phase::Publishing, reason::PUBLISHING);
    observed.versions = vec![version(1, "sha256:x", Some(AdapterVersionPhase::Available))];
    check(&observed, Phase::Succeeded, reason::PUBLISHED);
}

#[test]
fn changed_gates_start_the_next_run() {
    let mut observed = observed_training(gated(1.9), running());
    observed.job.spec.evaluation.gates[0].max = Some(1.8);
    assert!(deletes(&check(&observed, Phase::Pending, reason::PENDING), "j-1-1"));
}

#[test]
fn a_refused_pod_is_queued_with_the_reason_that_the_cluster_gives() {
    let mut observed = observed_training(plain(), Pods::Missing);
    let message = "needs 1 nvidia.com/gpu, 0 of 1 free in ResourceQuota team-gpus";
    let Work::There { refusal, .. } = &mut observed.runs.get_mut(&1).unwrap().work else { panic!() };
    *refusal = Some(Refusal { reason: reason::QUOTA_EXCEEDED, message: message.into(), is_final: false });
    let decision = check(&observed, Phase::Queued, reason::QUOTA_EXCEEDED);
    assert_eq!((steps(&decision).len(), decision.state.message.as_str()), (0, message));
}

#[test]
fn a_pod_goes_from_queued_over_starting_to_running() {
    let with = |pods| observed_training(plain(), pods);
    check(&with(Pods::Missing), Phase::Starting, reason::STARTING);
    check(&with(Pods::Unschedulable("0/3 nodes".into())), Phase::Queued, reason::UNSCHEDULABLE);
    let starting =
        check(&with(Pods::Starting("ImagePullBackOff: no such image".into())), Phase::Starting, reason::STARTING);
    assert!(starting.state.message.contains("no such image"));
    check(&with(running()), Phase::Running, reason::TRAINING);
    check(&with(Pods::Over), Phase::Running, reason::TRAINING);
}

fn say(observed: &mut Observed, stage: TrainStage) {
    let Work::There { live, .. } = &mut observed.runs.get_mut(&1).unwrap().work else { panic!() };
    *live = Some(LiveProgress { stage, ..LiveProgress::default() });
}

#[test]
fn the_pods_own_stage_tells_training_from_evaluating_and_publishing() {
    let mut observed = observed_training(plain(), running());
    say(&mut observed, TrainStage::Training);
    assert_eq!(check(&observed, Phase::Running, reason::TRAINING).state.message, "trains");
    say(&mut observed, TrainStage::Evaluating);
    assert_eq!(check(&observed, Phase::Running, reason::TRAINING).state.message, "evaluates");
    say(&mut observed, TrainStage::Publishing);
    check(&observed, Phase::Publishing, reason::PUBLISHING);
}

#[test]
fn what_a_pod_said_stands_until_it_says_something_else() {
    let mut observed = observed_training(plain(), running());
    say(&mut observed, TrainStage::Publishing);
    let said = check(&observed, Phase::Publishing, reason::PUBLISHING);
    observed.job.status = Some(status(&observed, &said, &said.state, at(10_000)));
    // Another replica, which has not asked it yet, and the end of the pod, which nobody can ask.
    for pods in [running(), Pods::Over] {
        observed.runs.get_mut(&1).unwrap().work = there(with_pods(trainer_job("j-1-1", Stage::Train), pods));
        assert_eq!(check(&observed, Phase::Publishing, reason::PUBLISHING).state, said.state);
    }
    // Of another attempt it says nothing.
    let run = observed.runs.get_mut(&1).unwrap();
    attempt_ended(run, failed("the store is down"));
    train(run, running());
    check(&observed, Phase::Running, reason::TRAINING);
}

#[test]
fn a_failed_attempt_is_followed_by_another_after_a_wait() {
    let observed = observed_checked(plain(), |run| {
        settle(run, 1, "sha256:x");
        attempt_ended(run, failed("the store is down"));
    });
    let waiting = decide(&observed, at(101));
    assert_eq!((waiting.state.phase, waiting.state.reason), (Phase::Starting, reason::RETRYING));
    assert!(steps(&waiting).is_empty() && waiting.state.message.contains("the store is down"));
    assert_eq!(waiting.state.requeue.unwrap().as_secs(), 9);

    let next = check(&observed, Phase::Starting, reason::RETRYING);
    assert!(matches!(steps(&next), [Step::CreateAttempt(_)]), "{next:?}");
    assert_eq!((advance_of(&next).record.last_attempt, settled_on(&next)), (2, Some(1)));
    assert!(next.state.message.contains("the store is down"));
}

#[test]
fn the_failure_stays_visible_while_the_next_attempt_runs() {
    let observed = observed_checked(plain(), |run| {
        settle(run, 1, "sha256:x");
        attempt_ended(run, failed("the store is down"));
        train(run, running());
    });
    let decision = check(&observed, Phase::Running, reason::TRAINING);
    assert!(decision.state.message.contains("the store is down"), "{}", decision.state.message);
}

#[test]
fn no_more_attempts_fail_than_backoff_limit_allows() {
    let mut twice = observed_checked(plain(), |run| {
        settle(run, 1, "sha256:x");
        attempt_ended(run, failed("first"));
        attempt_ended(run, failed("second"));
    });
    let decision = check(&twice, Phase::Failed, reason::BACKOFF_LIMIT_EXCEEDED);
    assert!(steps(&decision).is_empty() && decision.state.message.contains("second"));
    twice.runs.get_mut(&1).unwrap().record = advance_of(&decision).record.clone();
    let again = check(&twice, Phase::Failed, reason::BACKOFF_LIMIT_EXCEEDED);
    assert_eq!(
        (again.state.message.clone(), &advance_of(&again).record),
        (decision.state.message.clone(), &advance_of(&decision).record)
    );
    // Raising the limit goes on in the same run.
    twice.job.spec.backoff_limit = 2;
    let raised = check(&twice, Phase::Starting, reason::RETRYING);
    assert_eq!(
        (advance_of(&raised).record.last_attempt, advance_of(&raised).record.completion_time.clone()),
        (3, None)
    );
}

#[test]
fn a_disrupted_attempt_does_not_count() {
    let observed = observed_checked(job(json!({"backoffLimit": 0})), |run| {
        settle(run, 1, "sha256:x");
        (0..25).for_each(|_| attempt_ended(run, disrupted()));
    });
    let decision = check(&observed, Phase::Starting, reason::RETRYING);
    let record = &advance_of(&decision).record;
    assert_eq!(
        (record.last_attempt, record.attempts.len(), record.seconds),
        (26, 20, 25 * 90),
        "sums outlive the attempts"
    );
}

#[test]
fn inputs_that_changed_since_they_were_checked_are_checked_again() {
    let changed = Cause::InputsChanged { message: "the data has another digest".into() };
    let observed = observed_checked(job(json!({"backoffLimit": 0})), |run| {
        settle(run, 1, "sha256:x");
        attempt_ended(run, changed);
    });
    let decision = check(&observed, Phase::Preflight, reason::PREFLIGHT);
    assert_eq!(steps(&decision), [Step::CreateCheck]);
    let record = &advance_of(&decision).record;
    assert_eq!((&record.settled, &record.preflight, record.last_attempt, record.failures), (&None, &None, 1, 0));
    assert_eq!(
        record.check.as_ref().map(|check| (check.number, check.cause)),
        Some((2, None)),
        "the old report is old"
    );
}

#[test]
fn a_version_that_another_run_has_claimed_makes_the_next_one_of_what_is_trained() {
    let taken = Cause::VersionTaken { message: "s3://adapters/support/v1 belongs to run 1 of dev/support".into() };
    let mut observed = observed_checked(job(json!({"backoffLimit": 0})), |run| {
        settle(run, 1, "sha256:x");
        attempt_ended(run, taken);
    });
    let decision = check(&observed, Phase::Preflight, reason::PREFLIGHT);
    assert_eq!(steps(&decision), [Step::CreateCheck]);
    let run = observed.runs.get_mut(&1).unwrap();
    run.record = advance_of(&decision).record.clone();
    check_ended(run, passed());
    run.record.preflight.as_mut().unwrap().highest_version = 1;
    let decision = check(&observed, Phase::Starting, reason::STARTING);
    let record = &advance_of(&decision).record;
    assert_eq!((record.settled.as_ref().unwrap().version, record.last_attempt, record.failures), (2, 2, 0));
    assert_eq!(record.attempts[0].cause, Some(Kind::VersionTaken));
}

#[test]
fn what_the_api_server_will_never_take_ends_the_run() {
    let mut observed = observed_checked(plain(), |_| {});
    let begun = decide(&observed, at(1000));
    let run = observed.runs.get_mut(&1).unwrap();
    run.record = advance_of(&begun).record.clone();
    run.record = refused(run, "Job j-1-1 was refused: cpu: Invalid value", at(1001));
    let decision = check(&observed, Phase::Failed, reason::TRAINING_FAILED);
    assert_eq!((steps(&decision).len(), decision.state.message.contains("Invalid value")), (0, true));
    assert!(advance_of(&decision).record.is_done());
}

#[test]
fn a_final_failure_is_not_tried_again() {
    let observed = observed_checked(job(json!({"backoffLimit": 9})), |run| {
        settle(run, 1, "sha256:x");
        attempt_ended(run, Cause::Final { message: "the model is damaged".into() });
    });
    let decision = check(&observed, Phase::Failed, reason::TRAINING_FAILED);
    assert_eq!((steps(&decision).len(), decision.state.message.as_str()), (0, "the model is damaged"));
}

fn failing_since(over: i64) -> Observed {
    let mut observed = observed_run(plain(), |run| check_ended(run, Cause::Final { message: "bad row".into() }));
    let failed = decide(&observed, at(over));
    observed.runs.get_mut(&1).unwrap().record = failed.advances[0].1.record.clone();
    observed
}

#[test]
fn the_users_annotation_starts_another_run_of_the_same_spec_at_its_time() {
    let mut observed = failing_since(1_000);
    let mut at_time = |text: &str, now: i64| {
        observed.job.metadata.annotations = Some([(RETRY_ANNOTATION.to_owned(), text.to_owned())].into());
        decide(&observed, at(now))
    };
    let due = at_time("1970-01-01T00:20:00Z", 2_000);
    assert_eq!((due.start, due.state.phase), (Some((2, Trigger::Retry)), Phase::Preflight));
    let early = at_time("1970-01-01T00:40:00Z", 2_000);
    assert_eq!((early.start, early.state.phase, early.state.requeue.unwrap().as_secs()), (None, Phase::Failed, 400));
    let before_it_failed = at_time("1970-01-01T00:10:00Z", 2_000);
    assert_eq!((before_it_failed.start, before_it_failed.state.phase), (None, Phase::Failed));
    let far = at_time("9999-12-30T00:00:00Z", 2_000);
    assert_eq!(far.start, None);
    let odd = at_time("soon", 2_000);
    assert!(odd.state.message.contains("\"soon\" is not a time"), "{}", odd.state.message);
}

#[test]
fn the_deadline_counts_over_all_attempts() {
    let with = |deadline: i64| {
        observed_checked(job(json!({"activeDeadlineSeconds": deadline})), |run| {
            settle(run, 1, "sha256:x");
            attempt_ended(run, failed("x"));
        })
    };
    check(&with(90), Phase::Failed, reason::DEADLINE_EXCEEDED);
    check(&with(150), Phase::Starting, reason::RETRYING);
}

#[test]
fn a_pod_whose_deadline_is_over_ends_the_run_however_little_it_ran() {
    let mut observed = observed_training(job(json!({"activeDeadlineSeconds": 100})), Pods::Missing);
    let Work::There { job, .. } = observed.runs[&1].work.clone() else { panic!() };
    // It had a node, and pulled its image all the time.
    let mut over = crate::fixtures::ended(*job, Cause::DeadlineExceeded);
    let JobState::Ended(ending) = &mut over.state else { panic!() };
    ending.started = None;
    observed.runs.get_mut(&1).unwrap().work = there(over);
    let decision = check(&observed, Phase::Failed, reason::DEADLINE_EXCEEDED);
    assert_eq!((steps(&decision).len(), advance_of(&decision).record.seconds), (0, 100));

    let run = observed.runs.get_mut(&1).unwrap();
    (run.record, run.work) = (advance_of(&decision).record.clone(), Work::None);
    assert_eq!(steps(&check(&observed, Phase::Failed, reason::DEADLINE_EXCEEDED)), []);
    observed.job.spec.active_deadline_seconds = Some(300);
    let raised = check(&observed, Phase::Starting, reason::RETRYING);
    assert!(matches!(steps(&raised), [Step::CreateAttempt(_)]), "{raised:?}");
}

#[test]
fn a_published_version_is_recorded_before_anything_else() {
    let observed = observed_published(suspended());
    let decision = check(&observed, Phase::Publishing, reason::PUBLISHING);
    assert_eq!(steps(&decision), [Step::CreateVersion]);
    assert_eq!(advance_of(&decision).record.adapter_version.as_deref(), Some("support-v1"));
}

#[test]
fn a_record_that_was_decided_on_and_is_not_there_is_made_again() {
    let mut observed = observed_published(plain());
    let record = &mut observed.runs.get_mut(&1).unwrap().record;
    (record.adapter_version, record.stage) = (Some("support-v1".into()), Some(RunStage::Recorded));
    assert_eq!(steps(&check(&observed, Phase::Publishing, reason::PUBLISHING)), [Step::CreateVersion]);
}

#[test]
fn a_report_that_is_not_of_the_runs_task_is_final() {
    for version in [1, 7] {
        let observed = observed_checked(plain(), |run| {
            settle(run, 5, "sha256:x");
            attempt_ended(run, trained(version));
        });
        match version {
            7 => drop(check(&observed, Phase::Publishing, reason::PUBLISHING)),
            _ => {
                let decision = check(&observed, Phase::Failed, reason::TRAINING_FAILED);
                assert!(decision.state.message.contains("version 1, below 5"), "{}", decision.state.message);
            }
        }
    }
}

#[test]
fn a_job_has_succeeded_only_once_its_version_is_available() {
    let with = |versions| {
        let mut observed = observed_published(plain());
        let record = &mut observed.runs.get_mut(&1).unwrap().record;
        (record.adapter_version, record.stage) = (Some("support-v1".into()), Some(RunStage::Done));
        observed.versions = versions;
        observed
    };
    let in_phase = |phase| with(vec![version(1, "sha256:x", phase)]);
    check(&in_phase(None), Phase::Publishing, reason::PUBLISHING);
    check(&in_phase(Some(AdapterVersionPhase::Verifying)), Phase::Publishing, reason::PUBLISHING);
    check(&in_phase(Some(AdapterVersionPhase::Available)), Phase::Succeeded, reason::PUBLISHED);
    check(&in_phase(Some(AdapterVersionPhase::Rejected)), Phase::Failed, reason::REJECTED);
    check(&in_phase(Some(AdapterVersionPhase::Missing)), Phase::Failed, reason::MISSING);
    // A version that its user has deleted is neither made again nor trained again.
    assert_eq!(steps(&check(&with(Vec::new()), Phase::Failed, reason::MISSING)), []);
}

#[test]
fn a_changed_spec_ends_the_run_and_waits_for_its_pods() {
    let mut observed = observed_training(plain(), running());
    observed.job.spec.training.seed += 1;
    assert!(deletes(&check(&observed, Phase::Pending, reason::PENDING), "j-1-1"));

    let Work::There { job, .. } = &mut observed.runs.get_mut(&1).unwrap().work else { panic!() };
    job.deleting = true;
    assert_eq!(steps(&check(&observed, Phase::Pending, reason::PENDING)), []);

    observed.runs.get_mut(&1).unwrap().work = Work::Gone;
    let decision = check(&observed, Phase::Preflight, reason::PREFLIGHT);
    assert_eq!(decision.start, Some((2, Trigger::Generation)));
    let record = &advance_of(&decision).record;
    assert_eq!((record.stage, record.reason.as_deref()), (Some(RunStage::Done), Some(reason::SUPERSEDED)));
}

#[test]
fn a_spec_that_changes_while_a_version_is_written_waits_for_it_and_records_it() {
    let mut observed = observed_training(plain(), running());
    say(&mut observed, TrainStage::Publishing);
    observed.job.spec.training.seed += 1;
    let decision = check(&observed, Phase::Pending, reason::PENDING);
    assert!(steps(&decision).is_empty() && decision.state.message.contains("is publishing"), "{decision:?}");

    observed.runs.get_mut(&1).unwrap().work =
        there(crate::fixtures::ended(trainer_job("j-1-1", Stage::Train), trained(1)));
    let decision = check(&observed, Phase::Preflight, reason::PREFLIGHT);
    assert_eq!((steps(&decision), decision.start), (&[Step::CreateVersion][..], Some((2, Trigger::Generation))));
    assert_eq!(advance_of(&decision).record.adapter_version.as_deref(), Some("support-v1"));
}

#[test]
fn a_job_that_a_sidecar_keeps_alive_is_deleted_once_its_words_are_on_record() {
    let mut observed = observed_training(plain(), running());
    let mut over = crate::fixtures::ended(trainer_job("j-1-1", Stage::Train), failed("crashed"));
    let JobState::Ended(ending) = &mut over.state else { panic!() };
    ending.outlived = true;
    observed.runs.get_mut(&1).unwrap().work = there(over);
    let decision = decide(&observed, at(101));
    assert!(deletes(&decision, "j-1-1"), "{decision:?}");
    assert_eq!(advance_of(&decision).record.failures, 1);
}

#[test]
fn limits_and_suspension_change_no_run() {
    let mut observed = observed_training(plain(), running());
    observed.job.spec.backoff_limit = 7;
    observed.job.spec.active_deadline_seconds = Some(60);
    observed.job.spec.run_history_limit = 1;
    assert!(observed.current().is_some());
    observed.job.spec.resources.memory = Some("4Gi".into());
    assert!(observed.current().is_none());
}

#[test]
fn runs_beyond_the_history_go_with_all_that_they_made() {
    let mut observed = observed_run(job(json!({"runHistoryLimit": 2})), |_| {});
    for number in 1..=5 {
        let mut run = run(&observed.job, number);
        run.record.stage = (number < 5).then_some(RunStage::Done);
        observed.runs.insert(number, run);
    }
    let decision = decide(&observed, later());
    let names: Vec<&str> = decision.forget.iter().map(|run| run.name.as_str()).collect();
    assert_eq!(names, ["j-2", "j-1"]);
}

#[test]
fn auto_takes_qlora_where_lora_is_not_offered() {
    let auto = job(json!({"method": "Auto", "quantization": {"bits": 4, "type": "nf4"}}));
    let gpu = |method| json!({"resourceName": "nvidia.com/gpu", "memory": "24Gi", "methods": [{"method": method, "gpus": 1}]});
    let mut observed = observed_checked(auto, |_| {});
    let method_of = |decision: &Decision| advance_of(decision).record.settled.as_ref().unwrap().method.name();
    for (offered, taken) in [("QLoRA", MethodName::QLoRA), ("LoRA", MethodName::LoRA)] {
        observed.offers.classes = vec![class("small", gpu(offered))];
        assert_eq!(method_of(&decide(&observed, later())), taken);
    }
}

#[test]
fn auto_takes_qlora_for_a_base_in_few_bits_as_these_bits_say() {
    let auto = job(json!({"method": "Auto"}));
    let stored = serde_json::from_value(json!({"bits": 4, "type": "fp4", "doubleQuant": false})).unwrap();
    let mut report = preflight_report();
    report.model.stored_as = Some(stored);
    let mut observed = observed_run(auto, |run| check_ended(run, Cause::done(Outcome::Preflight(report))));
    observed.offers.classes =
        vec![class("cpu", json!({"methods": [{"method": "LoRA", "gpus": 0}, {"method": "QLoRA", "gpus": 0}]}))];
    let decision = decide(&observed, later());
    let settled = advance_of(&decision).record.settled.as_ref().unwrap();
    assert!(serde_json::to_string(&settled.method).unwrap().contains(r#""type":"fp4""#), "{:?}", settled.method);
}

#[test]
fn a_report_of_another_subcommand_fails_the_job() {
    let observed = observed_run(plain(), |run| check_ended(run, trained(1)));
    check(&observed, Phase::Failed, reason::PREFLIGHT_FAILED);
    let observed = observed_checked(plain(), |run| {
        settle(run, 1, "sha256:x");
        attempt_ended(run, passed());
    });
    check(&observed, Phase::Failed, reason::TRAINING_FAILED);
}

mod reuse;
