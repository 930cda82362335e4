//! Inputs that were trained before: the version is taken, or copied, or trained anew.

use super::*;

#[test]
fn inputs_that_an_available_version_was_trained_from_are_not_trained_again() {
    let mut observed = observed_checked(plain(), |_| {});
    observed.versions = vec![version(3, &digest(), Some(AdapterVersionPhase::Available))];
    let decision = check(&observed, Phase::Publishing, reason::PUBLISHING);
    assert_eq!(steps(&decision), []);
    observed.runs.get_mut(&1).unwrap().record = advance_of(&decision).record.clone();
    let decision = check(&observed, Phase::Succeeded, reason::REUSED);
    assert_eq!((steps(&decision).len(), advance_of(&decision).record.stage), (0, Some(RunStage::Done)));
}

#[test]
fn a_version_elsewhere_is_not_taken_for_one_where_the_job_wants_it() {
    let output = json!({"adapterName": "support", "uri": "s3://elsewhere", "secretRef": {"name": "s3"}});
    let mut observed = observed_checked(job(json!({"output": output})), |_| {});
    observed.versions = vec![version(3, &digest(), Some(AdapterVersionPhase::Available))];
    let decision = check(&observed, Phase::Starting, reason::STARTING);
    assert!(matches!(steps(&decision), [Step::CreateAttempt(_)]));
    let record = &advance_of(&decision).record;
    assert_eq!(copied(record), Some(&observed.versions[0].spec.artifact), "it is copied as the next version");
    assert_eq!((settled_on(&decision), &record.plan, record.attempts[0].gpus), (Some(4), &None, 0));
}

#[test]
fn a_version_that_is_read_with_other_credentials_is_copied_too() {
    for output in [
        json!({"adapterName": "support", "uri": "s3://adapters", "secretRef": {"name": "other"}}),
        json!({"adapterName": "support", "uri": "s3://adapters"}),
        json!({
            "adapterName": "support", "uri": "s3://adapters", "secretRef": {"name": "s3"},
            "roleArn": "arn:aws:iam::123456789012:role/write",
        }),
        json!({"adapterName": "support", "uri": "s3://adapters", "secretRef": {"name": "s3"}, "serviceAccountName": "a"}),
    ] {
        let mut observed = observed_checked(job(json!({"output": output})), |_| {});
        observed.versions = vec![version(3, &digest(), Some(AdapterVersionPhase::Available))];
        let decision = check(&observed, Phase::Starting, reason::STARTING);
        assert!(copied(&advance_of(&decision).record).is_some(), "{output}");
    }
}

#[test]
fn of_two_versions_of_the_same_inputs_the_one_where_the_job_wants_it_counts() {
    let mut observed = observed_checked(plain(), |_| {});
    let served = Some(AdapterVersionPhase::Available);
    let mut elsewhere = version(4, &digest(), served);
    elsewhere.spec.artifact.uri = "s3://elsewhere/support/v4".parse().unwrap();
    observed.versions = vec![version(3, &digest(), served), elsewhere.clone()];
    let decision = check(&observed, Phase::Publishing, reason::PUBLISHING);
    assert_eq!(advance_of(&decision).record.adapter_version.as_deref(), Some("support-v3"));
    observed.versions = vec![version(3, &digest(), None), elsewhere];
    let decision = check(&observed, Phase::Publishing, reason::PUBLISHING);
    assert_eq!((steps(&decision).len(), &advance_of(&decision).record.adapter_version), (0, &None), "it waits");
}

#[test]
fn a_copy_that_fails_is_given_up_for_training_and_counts_as_no_failure() {
    let causes = [
        failed("crashed"),
        Cause::StoreUnavailable { message: "no answer".into() },
        Cause::Final { message: "it is gone".into() },
    ];
    for cause in causes {
        let mut observed = observed_checked(plain(), |run| {
            settle(run, 4, "sha256:x");
            let elsewhere = version(3, "sha256:x", None).spec.artifact;
            run.record.settled.as_mut().unwrap().copy_of = Some(elsewhere);
            attempt_ended(run, cause.clone());
        });
        let record = &observed.runs[&1].record;
        assert_eq!((record.failures, copied(record)), (0, None));
        let decision = check(&observed, Phase::Starting, reason::RETRYING);
        assert!(decision.state.message.contains("s3://adapters/support/v3 was not copied"), "{decision:?}");
        assert!(matches!(steps(&decision), [Step::CreateAttempt(_)]));
        assert!(advance_of(&decision).record.plan.is_some() && settled_on(&decision) == Some(4));
        // One that is ended from outside goes on.
        observed = observed_checked(plain(), |run| {
            settle(run, 4, "sha256:x");
            run.record.settled.as_mut().unwrap().copy_of = Some(version(3, "sha256:x", None).spec.artifact);
            attempt_ended(run, Cause::Disrupted { message: "evicted".into() });
        });
        assert!(copied(&advance_of(&check(&observed, Phase::Starting, reason::RETRYING)).record).is_some());
    }
}

#[test]
fn a_version_of_the_same_inputs_that_is_being_verified_is_waited_for() {
    let mut observed = observed_checked(plain(), |_| {});
    observed.versions = vec![version(3, &digest(), None)];
    assert_eq!(steps(&check(&observed, Phase::Publishing, reason::PUBLISHING)), []);
}

#[test]
fn a_corrupt_version_of_the_same_inputs_is_trained_anew() {
    let mut observed = observed_checked(plain(), |_| {});
    observed.versions = vec![version(3, &digest(), Some(AdapterVersionPhase::Rejected))];
    assert_eq!(settled_on(&check(&observed, Phase::Starting, reason::STARTING)), Some(4));
}

#[test]
fn inputs_whose_recorded_metrics_fail_the_gates_are_not_trained_again() {
    // Whatever became of the version: with gates of its own it is Rejected, without any it may be Available.
    let phases = [None, Some(AdapterVersionPhase::Rejected), Some(AdapterVersionPhase::Available)];
    for phase in phases {
        let mut observed = observed_checked(gated(1.2), |_| {});
        observed.versions = vec![version(3, &digest(), phase)];
        let decision = check(&observed, Phase::Publishing, reason::PUBLISHING);
        observed.runs.get_mut(&1).unwrap().record = advance_of(&decision).record.clone();
        let decision = check(&observed, Phase::Failed, reason::GATE_FAILED);
        let expected = "AdapterVersion support-v3, trained from the same inputs, must not be served: eval_loss 1.50 is \
            above 1.20";
        assert_eq!((steps(&decision).len(), decision.state.message.as_str()), (0, expected));
    }
}

#[test]
fn gates_that_ask_for_what_was_not_measured_train_anew() {
    let recall = json!({"metric": "recall", "min": 0.8, "probe": {"uri": "s3://data/probe.jsonl"}});
    let asks = job(json!({"evaluation": {"gates": [recall]}}));
    let with_probe = |recorded: Option<&str>| {
        let mut observed = observed_run(asks.clone(), |run| {
            let report = PreflightReport { probe_digest: Some("sha256:asked".into()), ..preflight_report() };
            check_ended(run, Cause::done(Outcome::Preflight(report)));
        });
        let mut there = version(3, &digest(), Some(AdapterVersionPhase::Available));
        there.spec.metrics.recall = recorded.map(|_| 0.9);
        there.spec.metrics.probe_digest = recorded.map(str::to_owned);
        observed.versions = vec![there];
        observed
    };
    for recorded in [None, Some("sha256:other")] {
        assert_eq!(settled_on(&check(&with_probe(recorded), Phase::Starting, reason::STARTING)), Some(4));
    }
    let decision = check(&with_probe(Some("sha256:asked")), Phase::Publishing, reason::PUBLISHING);
    assert_eq!(advance_of(&decision).record.adapter_version.as_deref(), Some("support-v3"));
}

#[test]
fn a_rejected_version_that_passes_looser_gates_is_followed_by_a_new_one() {
    let mut observed = observed_checked(gated(1.9), |_| {});
    observed.versions = vec![version(3, &digest(), Some(AdapterVersionPhase::Rejected))];
    assert_eq!(settled_on(&check(&observed, Phase::Starting, reason::STARTING)), Some(4));
}
