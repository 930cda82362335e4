//! Every transition of the state machine, one at a time. [`super::model`] tests that they go together.

use serde_json::json;
use tunesmith_crds::{
    AdapterVersionPhase, FineTuneJob,
    run::{LiveProgress, Outcome},
};

use super::*;
use crate::{
    fixtures::{
        at, attempt, class, ended, failed, job, observed, observed_checked, observed_run, passed, preflight_report,
        task, train_report, trained, trainer_job, version, with_pods,
    },
    refusal::Refusal,
    trainer::Stage,
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

fn preflight() -> TrainerJob {
    trainer_job("j-1-preflight", Stage::Preflight, 0)
}

fn check(observed: &Observed, phase: Phase, reason: &str) -> Decision {
    let decision = decide(observed, later());
    assert_eq!((decision.state.phase, decision.state.reason), (phase, reason), "{decision:?}");
    decision
}

fn digest() -> String {
    let observed = observed_checked(plain(), |_| {});
    let run = &observed.runs[&1];
    digest_of(&observed, run, run.preflight_report().unwrap()).unwrap()
}

#[test]
fn a_new_job_starts_its_first_run_with_a_preflight() {
    let decision = check(&observed(plain()), Phase::Preflight, reason::PREFLIGHT);
    assert_eq!(decision.steps, [Step::StartRun { run: 1 }, Step::CreatePreflight { run: 1 }]);
}

#[test]
fn a_job_that_no_class_serves_waits_for_one_with_advice() {
    let mut observed = observed(plain());
    observed.offers.classes.clear();
    let decision = check(&observed, Phase::Pending, reason::NO_GPU_CLASS);
    assert_eq!(decision.steps, []);
    assert!(decision.state.message.contains("create one"), "{}", decision.state.message);
}

#[test]
fn a_suspended_job_starts_nothing() {
    assert_eq!(check(&observed(suspended()), Phase::Suspended, reason::SUSPENDED).steps, []);
    let started = observed_run(suspended(), |_| {});
    assert_eq!(check(&started, Phase::Suspended, reason::SUSPENDED).steps, []);
    let checked = observed_checked(suspended(), |_| {});
    assert_eq!(check(&checked, Phase::Suspended, reason::SUSPENDED).steps, []);
}

#[test]
fn suspending_ends_the_active_job_and_waits_for_its_pods() {
    let checking = observed_run(suspended(), |run| run.preflight = Some(preflight()));
    let decision = check(&checking, Phase::Suspended, reason::SUSPENDED);
    assert!(matches!(&decision.steps[..], [Step::DeleteJob(job)] if job.name == "j-1-preflight"));

    let mut training = observed_checked(suspended(), |run| run.attempts = vec![attempt(1)]);
    let decision = check(&training, Phase::Suspended, reason::SUSPENDED);
    assert!(matches!(&decision.steps[..], [Step::DeleteJob(job)] if job.name == "j-1-1"));

    training.job.spec.suspend = false;
    training.runs.get_mut(&1).unwrap().attempts[0].deleting = true;
    assert_eq!(check(&training, Phase::Starting, reason::STARTING).steps, []);
}

#[test]
fn a_run_whose_preflight_job_was_lost_gets_it_again() {
    let observed = observed_run(plain(), |_| {});
    let decision = check(&observed, Phase::Preflight, reason::PREFLIGHT);
    assert_eq!(decision.steps, [Step::CreatePreflight { run: 1 }]);
}

#[test]
fn a_preflight_that_finds_an_error_fails_the_job_in_the_trainers_words() {
    let words = "dataset row 17: no assistant turn";
    let observed = observed_run(plain(), |run| {
        run.preflight = Some(ended(preflight(), Cause::Final { message: words.into() }));
    });
    let decision = check(&observed, Phase::Failed, reason::PREFLIGHT_FAILED);
    assert_eq!((decision.steps.len(), decision.state.message.as_str()), (0, words));
}

#[test]
fn a_preflight_that_was_disrupted_starts_again() {
    let observed = observed_run(plain(), |run| {
        run.preflight = Some(ended(preflight(), Cause::Disrupted { message: "its node went".into() }));
    });
    let decision = check(&observed, Phase::Preflight, reason::PREFLIGHT);
    assert!(matches!(&decision.steps[..], [Step::DeleteJob(_)]));
}

#[test]
fn a_preflight_pod_that_failed_shows_why_while_the_next_one_comes() {
    let observed = observed_run(plain(), |run| {
        let state = JobState::Active { pods: Pods::Over, last_failure: Some("no answer from the store".into()) };
        run.preflight = Some(TrainerJob { state, ..preflight() });
    });
    let decision = check(&observed, Phase::Preflight, reason::RETRYING);
    assert_eq!(decision.state.message, "no answer from the store");
}

#[test]
fn a_passed_preflight_leads_to_a_reserved_version_and_the_first_attempt() {
    let mut observed = observed_checked(plain(), |_| {});
    observed.reserved = 4;
    observed.versions = vec![version(2, "sha256:other", None)];
    let decision = check(&observed, Phase::Starting, reason::STARTING);
    let [
        Step::ReserveVersion { version: 5, run: 1, method: MethodName::LoRA, .. },
        Step::CreateAttempt { attempt: 1, version: 5, planned, deadline: None, run: 1 },
    ] = &decision.steps[..]
    else {
        panic!("{decision:?}")
    };
    assert_eq!((planned.plan.gpu_class.as_str(), planned.plan.pods, planned.plan.gpus_per_pod), ("cpu", 1, 0));
}

#[test]
fn inputs_that_an_available_version_was_trained_from_are_not_trained_again() {
    let mut observed = observed_checked(plain(), |_| {});
    observed.versions = vec![version(3, &digest(), Some(AdapterVersionPhase::Available))];
    let decision = check(&observed, Phase::Publishing, reason::PUBLISHING);
    assert_eq!(decision.steps, [Step::SettleRun { run: 1, version: "support-v3".into() }]);

    observed.runs.get_mut(&1).unwrap().version = Some("support-v3".into());
    assert_eq!(check(&observed, Phase::Succeeded, reason::REUSED).steps, []);
}

#[test]
fn a_version_of_the_same_inputs_that_is_being_verified_is_waited_for() {
    let mut observed = observed_checked(plain(), |_| {});
    observed.versions = vec![version(3, &digest(), None)];
    assert_eq!(check(&observed, Phase::Publishing, reason::PUBLISHING).steps, []);
}

#[test]
fn a_corrupt_version_of_the_same_inputs_is_trained_anew() {
    let mut observed = observed_checked(plain(), |_| {});
    observed.versions = vec![version(3, &digest(), Some(AdapterVersionPhase::Rejected))];
    let decision = check(&observed, Phase::Starting, reason::STARTING);
    assert!(matches!(decision.steps[0], Step::ReserveVersion { version: 4, .. }));
}

/// A job with one gate: eval loss up to `max`. The versions of the fixtures have 1.5.
fn gated(max: f64) -> FineTuneJob {
    job(json!({"evaluation": {"gates": [{"metric": "eval_loss", "max": max}]}}))
}

#[test]
fn a_version_that_fails_a_gate_is_recorded_and_fails_the_job_at_once_and_for_good() {
    let mut observed = observed_checked(gated(1.2), |run| {
        run.task = Some(task(&gated(1.2), 1, 1, "sha256:x"));
        run.attempts = vec![ended(attempt(1), trained(1))];
    });
    let recorded = check(&observed, Phase::Publishing, reason::PUBLISHING);
    assert!(matches!(&recorded.steps[..], [Step::CreateVersion { .. }, Step::SettleRun { .. }]), "{recorded:?}");

    observed.runs.get_mut(&1).unwrap().version = Some("support-v1".into());
    for phase in [None, Some(AdapterVersionPhase::Rejected)] {
        observed.versions = vec![version(1, "sha256:x", phase)];
        let decision = check(&observed, Phase::Failed, reason::GATE_FAILED);
        let expected = "AdapterVersion support-v1 must not be served: eval_loss 1.50 is above 1.20";
        assert_eq!((decision.steps.len(), decision.state.message.as_str()), (0, expected));
    }
}

#[test]
fn a_version_that_passes_its_gates_is_as_good_as_one_without() {
    let mut observed = observed_checked(gated(1.5), |run| {
        run.task = Some(task(&gated(1.5), 1, 1, "sha256:x"));
        run.attempts = vec![ended(attempt(1), trained(1))];
        run.version = Some("support-v1".into());
    });
    observed.versions = vec![version(1, "sha256:x", None)];
    check(&observed, Phase::Publishing, reason::PUBLISHING);
    observed.versions = vec![version(1, "sha256:x", Some(AdapterVersionPhase::Available))];
    check(&observed, Phase::Succeeded, reason::PUBLISHED);
}

#[test]
fn inputs_whose_recorded_metrics_fail_the_gates_are_not_trained_again() {
    // Whatever became of the version: with gates of its own it is Rejected, without any it may be Available.
    let phases = [None, Some(AdapterVersionPhase::Rejected), Some(AdapterVersionPhase::Available)];
    for phase in phases {
        let mut observed = observed_checked(gated(1.2), |_| {});
        observed.versions = vec![version(3, &digest(), phase)];
        let decision = check(&observed, Phase::Publishing, reason::PUBLISHING);
        assert_eq!(decision.steps, [Step::SettleRun { run: 1, version: "support-v3".into() }]);

        observed.runs.get_mut(&1).unwrap().version = Some("support-v3".into());
        let decision = check(&observed, Phase::Failed, reason::GATE_FAILED);
        let expected = "AdapterVersion support-v3, trained from the same inputs, must not be served: eval_loss 1.50 is \
            above 1.20";
        assert_eq!((decision.steps.len(), decision.state.message.as_str()), (0, expected));
    }
}

#[test]
fn gates_that_the_recorded_metrics_pass_reuse_an_available_version() {
    let mut observed = observed_checked(gated(1.9), |_| {});
    observed.versions = vec![version(3, &digest(), None)];
    assert_eq!(check(&observed, Phase::Publishing, reason::PUBLISHING).steps, []);
    observed.versions = vec![version(3, &digest(), Some(AdapterVersionPhase::Available))];
    let decision = check(&observed, Phase::Publishing, reason::PUBLISHING);
    assert_eq!(decision.steps, [Step::SettleRun { run: 1, version: "support-v3".into() }]);
    observed.runs.get_mut(&1).unwrap().version = Some("support-v3".into());
    check(&observed, Phase::Succeeded, reason::REUSED);
}

#[test]
fn gates_that_ask_for_what_was_not_measured_train_anew() {
    let recall = json!({"metric": "recall", "min": 0.8, "probe": {"uri": "s3://data/probe.jsonl"}});
    let asks = job(json!({"evaluation": {"gates": [recall]}}));
    let with_probe = |recorded: Option<&str>| {
        let mut observed = observed_checked(asks.clone(), |run| {
            let outcome =
                Outcome::Preflight(PreflightReport { probe_digest: Some("sha256:asked".into()), ..preflight_report() });
            run.preflight = Some(ended(preflight(), Cause::done(outcome)));
        });
        let mut there = version(3, &digest(), Some(AdapterVersionPhase::Available));
        there.spec.metrics.recall = recorded.map(|_| 0.9);
        there.spec.metrics.probe_digest = recorded.map(str::to_owned);
        observed.versions = vec![there];
        observed
    };
    for recorded in [None, Some("sha256:other")] {
        let decision = check(&with_probe(recorded), Phase::Starting, reason::STARTING);
        assert!(matches!(decision.steps[0], Step::ReserveVersion { version: 4, .. }), "{decision:?}");
    }
    let decision = check(&with_probe(Some("sha256:asked")), Phase::Publishing, reason::PUBLISHING);
    assert_eq!(decision.steps, [Step::SettleRun { run: 1, version: "support-v3".into() }]);
}

#[test]
fn a_rejected_version_that_passes_looser_gates_is_followed_by_a_new_one() {
    let mut observed = observed_checked(gated(1.9), |_| {});
    observed.versions = vec![version(3, &digest(), Some(AdapterVersionPhase::Rejected))];
    let decision = check(&observed, Phase::Starting, reason::STARTING);
    assert!(matches!(decision.steps[0], Step::ReserveVersion { version: 4, .. }), "{decision:?}");
}

#[test]
fn changed_gates_start_the_next_run() {
    let mut observed = observed_checked(gated(1.9), |run| run.attempts = vec![attempt(1)]);
    observed.job.spec.evaluation.gates[0].max = Some(1.8);
    let decision = check(&observed, Phase::Pending, reason::PENDING);
    assert!(matches!(&decision.steps[..], [Step::DeleteJob(job)] if job.name == "j-1-1"));
}

#[test]
fn a_refused_pod_is_queued_with_the_reason_that_the_cluster_gives() {
    let mut observed = observed_checked(plain(), |run| run.attempts = vec![attempt(1)]);
    let message = "needs 1 nvidia.com/gpu, 0 of 1 free in ResourceQuota team-gpus";
    observed.refusal = Some(Refusal { reason: reason::QUOTA_EXCEEDED, message: message.into() });
    let decision = check(&observed, Phase::Queued, reason::QUOTA_EXCEEDED);
    assert_eq!((decision.steps.len(), decision.state.message.as_str()), (0, message));
}

#[test]
fn a_pod_goes_from_queued_over_starting_to_running() {
    let with = |pods| observed_checked(plain(), |run| run.attempts = vec![with_pods(attempt(1), pods)]);
    check(&with(Pods::Missing), Phase::Starting, reason::STARTING);
    check(&with(Pods::Unschedulable("0/3 nodes".into())), Phase::Queued, reason::UNSCHEDULABLE);
    let starting =
        check(&with(Pods::Starting("ImagePullBackOff: no such image".into())), Phase::Starting, reason::STARTING);
    assert!(starting.state.message.contains("no such image"));
    let running = Pods::Running { address: None, since: None };
    assert_eq!(check(&with(running), Phase::Running, reason::TRAINING).state.requeue, POLL);
    check(&with(Pods::Over), Phase::Running, reason::TRAINING);
}

#[test]
fn the_pods_own_stage_tells_training_from_evaluating_and_publishing() {
    let running = Pods::Running { address: None, since: None };
    let mut observed = observed_checked(plain(), |run| run.attempts = vec![with_pods(attempt(1), running)]);
    let mut live = LiveProgress { stage: TrainStage::Training, ..LiveProgress::default() };
    (live.progress.step, live.progress.total_steps) = (120, 400);
    observed.live = Some(live.clone());
    assert_eq!(check(&observed, Phase::Running, reason::TRAINING).state.message, "step 120 of 400");
    observed.live = Some(LiveProgress { stage: TrainStage::Evaluating, ..live.clone() });
    let evaluating = check(&observed, Phase::Running, reason::TRAINING).state.message;
    assert_eq!(evaluating, "evaluating after step 120 of 400");
    observed.live = Some(LiveProgress { stage: TrainStage::Publishing, ..live });
    check(&observed, Phase::Publishing, reason::PUBLISHING);
}

#[test]
fn a_failed_attempt_is_followed_by_another_after_a_wait() {
    let observed = observed_checked(plain(), |run| {
        run.task = Some(task(&plain(), 1, 1, "sha256:x"));
        run.attempts = vec![ended(attempt(1), failed("the store is down"))];
    });
    let waiting = decide(&observed, at(101));
    assert_eq!((waiting.state.phase, waiting.state.reason), (Phase::Starting, reason::RETRYING));
    assert!(waiting.steps.is_empty() && waiting.state.message.contains("the store is down"));
    assert_eq!(waiting.state.requeue.as_secs(), 9);

    let next = check(&observed, Phase::Starting, reason::RETRYING);
    assert!(matches!(&next.steps[..], [Step::CreateAttempt { attempt: 2, version: 1, .. }]), "{next:?}");
    assert!(next.state.message.contains("the store is down"));
}

#[test]
fn the_failure_stays_visible_while_the_next_attempt_runs() {
    let running = Pods::Running { address: None, since: None };
    let observed = observed_checked(plain(), |run| {
        run.attempts = vec![ended(attempt(1), failed("the store is down")), with_pods(attempt(2), running)];
    });
    let decision = check(&observed, Phase::Running, reason::TRAINING);
    assert!(decision.state.message.contains("the store is down"), "{}", decision.state.message);
}

#[test]
fn no_more_attempts_fail_than_backoff_limit_allows() {
    let twice = |job| {
        observed_checked(job, |run| {
            run.task = Some(task(&plain(), 1, 1, "sha256:x"));
            run.attempts = vec![ended(attempt(1), failed("first")), ended(attempt(2), failed("second"))];
        })
    };
    let decision = check(&twice(plain()), Phase::Failed, reason::BACKOFF_LIMIT_EXCEEDED);
    assert!(decision.steps.is_empty() && decision.state.message.contains("second"));
    // Raising the limit goes on in the same run.
    let raised = check(&twice(job(json!({"backoffLimit": 2}))), Phase::Starting, reason::RETRYING);
    assert!(matches!(&raised.steps[..], [Step::CreateAttempt { run: 1, attempt: 3, .. }]));
}

#[test]
fn a_disrupted_attempt_does_not_count() {
    let observed = observed_checked(job(json!({"backoffLimit": 0})), |run| {
        run.attempts = (1..=5).map(|n| ended(attempt(n), Cause::Disrupted { message: "preempted".into() })).collect();
    });
    let decision = check(&observed, Phase::Starting, reason::RETRYING);
    assert!(matches!(decision.steps.last(), Some(Step::CreateAttempt { attempt: 6, .. })));
}

#[test]
fn attempts_that_are_disrupted_at_once_wait_longer_each_time() {
    let wait = |times: u32, lasted: i64| {
        let observed = observed_checked(plain(), |run| {
            run.attempts = (1..=times)
                .map(|n| {
                    let job = TrainerJob { created: at(100 - lasted), ..attempt(n) };
                    ended(job, Cause::Disrupted { message: "preempted".into() })
                })
                .collect();
        });
        observed.runs[&1].next_attempt_at().as_second() - 100
    };
    assert_eq!([wait(1, 10), wait(2, 10), wait(3, 10), wait(50, 10)], [5, 10, 20, 300]);
    assert_eq!(wait(50, 90), 0);
}

#[test]
fn a_final_failure_is_not_tried_again() {
    let observed = observed_checked(job(json!({"backoffLimit": 9})), |run| {
        run.attempts = vec![ended(attempt(1), Cause::Final { message: "the model changed".into() })];
    });
    let decision = check(&observed, Phase::Failed, reason::TRAINING_FAILED);
    assert_eq!((decision.steps.len(), decision.state.message.as_str()), (0, "the model changed"));
}

#[test]
fn the_deadline_counts_over_all_attempts() {
    let with = |deadline: i64| {
        observed_checked(job(json!({"activeDeadlineSeconds": deadline})), |run| {
            run.task = Some(task(&plain(), 1, 1, "sha256:x"));
            run.attempts = vec![ended(attempt(1), failed("x"))];
        })
    };
    check(&with(100), Phase::Failed, reason::DEADLINE_EXCEEDED);
    let decision = check(&with(150), Phase::Starting, reason::RETRYING);
    assert!(matches!(&decision.steps[..], [Step::CreateAttempt { deadline: Some(50), .. }]));
}

#[test]
fn a_published_version_is_recorded_before_anything_else() {
    let observed = observed_checked(suspended(), |run| {
        run.task = Some(task(&plain(), 1, 1, "sha256:x"));
        run.attempts = vec![ended(attempt(1), trained(1))];
    });
    let decision = check(&observed, Phase::Publishing, reason::PUBLISHING);
    let version = "support-v1".to_owned();
    let report = train_report(1);
    assert_eq!(decision.steps, [Step::CreateVersion { run: 1, report }, Step::SettleRun { run: 1, version }]);
}

#[test]
fn a_job_has_succeeded_only_once_its_version_is_available() {
    let with = |versions| {
        let mut observed = observed_checked(plain(), |run| {
            run.task = Some(task(&plain(), 1, 1, "sha256:x"));
            run.attempts = vec![ended(attempt(1), trained(1))];
            run.version = Some("support-v1".into());
        });
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
    assert_eq!(check(&with(Vec::new()), Phase::Failed, reason::MISSING).steps, []);
}

#[test]
fn an_ending_is_written_down_before_the_next_attempt() {
    let observed = observed_checked(plain(), |run| {
        let mut over = ended(attempt(1), failed("x"));
        let JobState::Ended { recorded, .. } = &mut over.state else { panic!() };
        *recorded = false;
        run.task = Some(task(&plain(), 1, 1, "sha256:x"));
        run.attempts = vec![over];
    });
    let decision = decide(&observed, later());
    let steps = decision.steps;
    assert!(matches!(&steps[..], [Step::RecordEnding { .. }, Step::CreateAttempt { .. }]), "{steps:?}");
}

#[test]
fn a_changed_spec_ends_the_run_and_waits_for_its_pods() {
    let mut observed = observed_checked(plain(), |run| run.attempts = vec![attempt(1)]);
    observed.job.spec.training.seed += 1;
    let decision = check(&observed, Phase::Pending, reason::PENDING);
    assert!(matches!(&decision.steps[..], [Step::DeleteJob(job)] if job.name == "j-1-1"));

    observed.runs.get_mut(&1).unwrap().attempts[0].deleting = true;
    assert_eq!(check(&observed, Phase::Pending, reason::PENDING).steps, []);

    observed.runs.get_mut(&1).unwrap().attempts.clear();
    let decision = check(&observed, Phase::Preflight, reason::PREFLIGHT);
    assert_eq!(decision.steps, [Step::StartRun { run: 2 }, Step::CreatePreflight { run: 2 }]);
}

#[test]
fn limits_and_suspension_change_no_run() {
    let mut observed = observed_checked(plain(), |run| run.attempts = vec![attempt(1)]);
    observed.job.spec.backoff_limit = 7;
    observed.job.spec.active_deadline_seconds = Some(60);
    assert!(observed.current().is_some());
    observed.job.spec.resources.memory = Some("4Gi".into());
    assert!(observed.current().is_none());
}

#[test]
fn objects_of_older_runs_go_once_the_next_run_is_there() {
    let mut observed = observed_checked(plain(), |run| {
        run.attempts = vec![ended(attempt(1), failed("x"))];
    });
    let next = Run { number: 2, spec: Some(observed.job.spec.clone()), ..Run::default() };
    observed.runs.insert(2, next);
    let decision = check(&observed, Phase::Preflight, reason::PREFLIGHT);
    let deleted = decision.steps.iter().filter(|step| matches!(step, Step::DeleteJob(_))).count();
    assert_eq!(deleted, 2);

    let older = observed.runs.get_mut(&1).unwrap();
    (older.preflight, older.attempts) = (None, Vec::new());
    let decision = check(&observed, Phase::Preflight, reason::PREFLIGHT);
    let [Step::DeleteConfigMap(config_map), ..] = &decision.steps[..] else { panic!("{decision:?}") };
    assert_eq!(config_map.name, "j-1-preflight");
}

#[test]
fn a_run_waits_for_the_pods_of_an_older_one() {
    let mut observed = observed_run(plain(), |run| run.attempts = vec![attempt(1)]);
    let next = Run { number: 2, spec: Some(observed.job.spec.clone()), ..Run::default() };
    observed.runs.insert(2, next);
    let decision = check(&observed, Phase::Pending, reason::PENDING);
    assert!(matches!(&decision.steps[..], [Step::DeleteJob(job)] if job.name == "j-1-1"));
}

#[test]
fn auto_takes_qlora_where_lora_is_not_offered() {
    let auto = job(json!({"method": "Auto", "quantization": {"bits": 4, "type": "nf4"}}));
    let gpu = |method| json!({"resourceName": "nvidia.com/gpu", "memory": "24Gi", "methods": [{"method": method, "gpus": 1}]});
    let mut observed = observed_checked(auto, |_| {});
    observed.offers.classes = vec![class("small", gpu("QLoRA"))];
    let decision = decide(&observed, later());
    assert!(matches!(&decision.steps[0], Step::ReserveVersion { method: MethodName::QLoRA, .. }), "{decision:?}");
    observed.offers.classes = vec![class("small", gpu("LoRA"))];
    let decision = decide(&observed, later());
    assert!(matches!(&decision.steps[0], Step::ReserveVersion { method: MethodName::LoRA, .. }), "{decision:?}");
}

#[test]
fn auto_takes_qlora_for_a_base_in_few_bits_as_these_bits_say() {
    let auto = job(json!({"method": "Auto"}));
    let stored = serde_json::from_value(json!({"bits": 4, "type": "fp4", "doubleQuant": false})).unwrap();
    let mut report = preflight_report();
    report.model.stored_as = Some(stored);
    let mut observed = observed_checked(auto, |run| {
        run.preflight = Some(ended(preflight(), Cause::done(Outcome::Preflight(report.clone()))))
    });
    observed.offers.classes =
        vec![class("cpu", json!({"methods": [{"method": "LoRA", "gpus": 0}, {"method": "QLoRA", "gpus": 0}]}))];
    let decision = decide(&observed, later());
    assert!(matches!(&decision.steps[0], Step::ReserveVersion { method: MethodName::QLoRA, .. }), "{decision:?}");
    let planned = plan(&observed.job.spec, &observed.offers, Some(&report), None).unwrap();
    assert!(serde_json::to_string(&planned.method).unwrap().contains(r#""type":"fp4""#), "{:?}", planned.method);
}

#[test]
fn a_report_of_another_subcommand_fails_the_job() {
    let observed = observed_run(plain(), |run| run.preflight = Some(ended(preflight(), trained(1))));
    check(&observed, Phase::Failed, reason::PREFLIGHT_FAILED);
    let observed = observed_checked(plain(), |run| run.attempts = vec![ended(attempt(1), passed())]);
    check(&observed, Phase::Failed, reason::TRAINING_FAILED);
}
