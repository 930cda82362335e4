//! What a version must reach before it may be served.

use anyhow::{Context, Result};
use serde_json::{Value, json};
use tunesmith_crds::{
    AdapterVersion, FineTuneJobPhase,
    conditions::{self, reason},
};
use tunesmith_e2e::run;

use crate::tenant::{Tenant, condition, message};

/// Questions that the tiny model has no answers to, and a gate that asks for them.
async fn recall_gate(team: &Tenant) -> Result<Value> {
    let row = |n: u32| json!({"id": format!("q{n}"), "question": format!("What is {n} and {n}?"), "must_contain": ["a word no model says"]});
    let rows: Vec<String> = (0..3).map(|n| row(n).to_string()).collect();
    team.write("datasets", "probe.jsonl", &rows.join("\n")).await?;
    let probe = json!({"uri": format!("s3://datasets/{}/probe.jsonl", team.namespace), "maxNewTokens": 8});
    Ok(json!({"evaluation": {"gates": [{"metric": "recall", "min": 0.8, "probe": probe}]}}))
}

#[tokio::test(flavor = "multi_thread")]
async fn an_adapter_that_learned_nothing_is_published_but_rejected_and_not_trained_again() -> Result<()> {
    let team = Tenant::new("gates").await?;
    let gated = recall_gate(&team).await?;
    team.apply(&team.job("bot", gated.clone())).await?;
    let job = team.until_phase("bot", FineTuneJobPhase::Failed).await?;
    let (ready, why, words) = condition(&job, conditions::READY).context("a Ready condition")?;
    assert_eq!((ready, why), ("False", reason::GATE_FAILED), "{words}");
    assert!(words.contains("bot-v1") && words.contains("recall 0.00 is below 0.80"), "{words}");
    let status = job.status.context("a status")?;
    assert_eq!((status.latest_version, status.gates.len()), (None, 1));
    let history: Vec<_> = status.history.iter().map(|run| (run.phase, run.version.as_deref())).collect();
    assert_eq!(history, [(FineTuneJobPhase::Failed, Some("bot-v1"))]);
    assert_eq!(team.training_jobs("bot").await?.len(), 1, "a failed gate is not tried again");

    // Nothing is lost: the files are there, and the record says why they are not to be served.
    assert!(team.published().await?.contains(&"bot/v1/manifest.json".into()));
    let wait = ["--for=jsonpath={.status.phase}=Rejected", "--timeout=60s", "-n", &team.namespace];
    run(team.cluster.kubectl().args(["wait", "adapterversion/bot-v1"]).args(wait))?;
    let version: AdapterVersion = team.api().get("bot-v1").await?;
    let metrics = &version.spec.metrics;
    assert_eq!((metrics.base_recall, metrics.recall), (Some(0.0), Some(0.0)));
    let conditions = version.status.context("a status")?.conditions;
    let ready = conditions.iter().find(|condition| condition.type_ == conditions::READY).context("Ready")?;
    assert_eq!((ready.reason.as_str(), ready.message.as_str()), (reason::GATE_FAILED, "recall 0.00 is below 0.80"));
    let events = run(team.cluster.kubectl().args(["get", "events", "-n", &team.namespace]))?;
    assert!(events.contains(reason::GATE_FAILED), "{events}");

    // Applied again, as a GitOps tool would after someone deleted it.
    team.delete_job("bot").await?;
    team.apply(&team.job("bot", gated)).await?;
    let job = team.until_phase("bot", FineTuneJobPhase::Failed).await?;
    assert!(message(&job).contains("bot-v1, trained from the same inputs"), "{}", message(&job));
    assert!(team.training_jobs("bot").await?.is_empty());
    assert_eq!(team.versions().await?, ["bot-v1"]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn looser_gates_publish_the_same_weights_anew_and_stricter_ones_fail_without_training() -> Result<()> {
    let team = Tenant::new("looser").await?;
    team.apply(&team.job("bot", recall_gate(&team).await?)).await?;
    team.until_phase("bot", FineTuneJobPhase::Failed).await?;
    let loss = |max: f64| json!({"evaluation": {"gates": [{"metric": "eval_loss", "max": max}]}});

    team.apply(&team.job("bot", loss(100.0))).await?;
    let job = team.until_phase("bot", FineTuneJobPhase::Succeeded).await?;
    let status = job.status.context("a status")?;
    assert_eq!(status.latest_version.as_deref(), Some("bot-v2"));
    assert!(status.gates[0].passed);
    let (first, second) = (team.weights("bot", 1).await?, team.weights("bot", 2).await?);
    assert_eq!(first, second, "the training goes on from its last checkpoint");

    team.apply(&team.job("bot", loss(0.01))).await?;
    let job = team.until_phase("bot", FineTuneJobPhase::Failed).await?;
    assert_eq!(condition(&job, conditions::READY).map(|(_, reason, _)| reason), Some(reason::GATE_FAILED));
    let status = job.status.context("a status")?;
    assert_eq!(status.latest_version.as_deref(), Some("bot-v2"), "what passed before is still the latest");
    assert_eq!(team.versions().await?, ["bot-v1", "bot-v2"]);
    Ok(())
}
