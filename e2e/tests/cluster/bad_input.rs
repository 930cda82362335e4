//! Input that cannot be used: a Failed phase that names it, and nothing published.

use anyhow::{Context, Result};
use k8s_openapi::{api::core::v1::Secret, jiff::Timestamp};
use kube::api::{Patch, PatchParams, PostParams};
use serde_json::{Value, json};
use tunesmith_crds::{FineTuneJob, FineTuneJobPhase, FineTuneRun, conditions, names::RETRY_ANNOTATION};
use tunesmith_e2e::run;

use crate::tenant::{Tenant, condition, message, phase_of, rows};

/// Applies a job that must fail, and returns its message.
async fn failure(team: &Tenant, changes: Value) -> Result<String> {
    team.apply(&team.job("doomed", changes)).await?;
    let job = team.until_phase("doomed", FineTuneJobPhase::Failed).await?;
    let text = message(&job).to_owned();
    let (stalled, _, stalled_message) = condition(&job, conditions::STALLED).expect("a Stalled condition");
    assert_eq!((stalled, stalled_message), ("True", text.as_str()));
    assert_eq!(condition(&job, conditions::READY).map(|(status, ..)| status), Some("False"));
    assert!(team.versions().await?.is_empty(), "a failed job must leave no AdapterVersion");
    assert!(!team.published().await?.iter().any(|key| key.ends_with("manifest.json")), "and no manifest");
    Ok(text)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_model_is_named() -> Result<()> {
    let team = Tenant::new("no-model").await?;
    let text = failure(&team, json!({"baseModel": {"uri": "s3://models/no-such-model"}})).await?;
    assert!(text.contains("s3://models/no-such-model"), "{text}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_malformed_row_is_named_by_its_number() -> Result<()> {
    let team = Tenant::new("bad-row").await?;
    let mut lines = rows(40);
    lines[16] = r#"{"messages": [{"role": "user"}]}"#.into();
    team.write("datasets", "train.jsonl", &lines.join("\n")).await?;
    let text = failure(&team, json!({})).await?;
    assert!(text.contains("row 17") && text.contains("content"), "{text}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_s3_key_is_named_and_never_shown() -> Result<()> {
    let team = Tenant::new("bad-key").await?;
    let secret = "wrong-secret-4711";
    let mut wrong: std::collections::BTreeMap<_, _> = team.s3.env().into_iter().collect();
    wrong.insert("AWS_SECRET_ACCESS_KEY", secret);
    let secret_object: Secret = serde_json::from_value(json!({"metadata": {"name": "wrong"}, "stringData": wrong}))?;
    team.api::<Secret>().create(&PostParams::default(), &secret_object).await?;
    let text = failure(&team, json!({"output": {"secretRef": {"name": "wrong"}}})).await?;
    assert!(text.contains("AWS_SECRET_ACCESS_KEY"), "{text}");
    assert!(!text.contains(secret), "{text}");
    for pod in team.pods("doomed", None).await? {
        let name = pod.metadata.name.unwrap_or_default();
        let logs = team.cluster.kubectl().args(["logs", "-n", &team.namespace, &name]).output()?;
        assert!(!String::from_utf8_lossy(&logs.stdout).contains(secret));
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_attempt_that_runs_out_of_memory_is_tried_again_as_often_as_allowed() -> Result<()> {
    let team = Tenant::new("oom").await?;
    // All rows at once: activations that no pod of this size can hold.
    team.write("datasets", "train.jsonl", &rows(3000).join("\n")).await?;
    let greedy =
        json!({"training": {"perDeviceTrainBatchSize": 3000}, "resources": {"memory": "64Mi"}, "backoffLimit": 1});
    let text = failure(&team, greedy).await?;
    assert!(text.contains("memory"), "{text}");
    assert_eq!(team.training_jobs("doomed").await?.len(), 2);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn full_fine_tuning_asks_for_four_a100s_and_says_that_no_node_has_them() -> Result<()> {
    let team = Tenant::new("full").await?;
    team.apply(&team.job("large", json!({"method": "Full", "resources": {"gpuClass": null}}))).await?;
    let waits = |job: &FineTuneJob| {
        phase_of(job) == Some(FineTuneJobPhase::Queued) && message(job).contains("no node takes the pod")
    };
    let job = team.until("large", "waiting for a node", waits).await?;
    let plan = job.status.and_then(|status| status.plan).expect("a plan");
    assert_eq!((plan.gpu_class.as_str(), plan.pods, plan.gpus_per_pod), ("a100-80gb", 1, 4));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_whose_data_came_late_runs_again_when_asked() -> Result<()> {
    let team = Tenant::new("late").await?;
    let late = json!({"dataset": {"train": {"uri": format!("s3://datasets/{}/late.jsonl", team.namespace)}}});
    let text = failure(&team, late).await?;
    assert!(text.contains("late.jsonl"), "{text}");

    team.write("datasets", "late.jsonl", &rows(40).join("\n")).await?;
    let ask = json!({"metadata": {"annotations": {RETRY_ANNOTATION: Timestamp::now().to_string()}}});
    team.api::<FineTuneJob>().patch("doomed", &PatchParams::default(), &Patch::Merge(ask)).await?;
    let runs_again = |job: &FineTuneJob| {
        let number = job.status.as_ref().and_then(|status| status.run.as_ref()).map(|run| run.number);
        number == Some(2) && phase_of(job) != Some(FineTuneJobPhase::Failed)
    };
    team.until("doomed", "running again", runs_again).await?;
    team.until_phase("doomed", FineTuneJobPhase::Succeeded).await?;
    assert_eq!(team.versions().await?, ["doomed-v1"]);

    // Both runs are on record, in words that need no code beside them.
    for (name, reason) in
        [("doomed-1", conditions::reason::PREFLIGHT_FAILED), ("doomed-2", conditions::reason::PUBLISHED)]
    {
        let status = team.api::<FineTuneRun>().get(name).await?.status.context("a status")?;
        let ready = status.conditions.iter().find(|condition| condition.type_ == conditions::READY).context("Ready")?;
        assert_eq!((status.reason.as_deref(), ready.reason.as_str()), (Some(reason), reason));
    }
    let table = run(team.cluster.kubectl().args(["get", "ftr", "-n", &team.namespace]))?;
    let table: Vec<Vec<&str>> = table.lines().map(|line| line.split_whitespace().collect()).collect();
    let columns = ["NAME", "JOB", "TRIGGER", "STAGE", "RESULT", "ATTEMPT", "CLASS", "VERSION", "AGE"];
    assert_eq!(table[0], columns);
    assert_eq!(table[1][..5], ["doomed-1", "doomed", "Generation", "Done", "PreflightFailed"]);
    assert_eq!(table[2][..8], ["doomed-2", "doomed", "Retry", "Done", "Published", "1", "cpu", "doomed-v1"]);
    Ok(())
}
