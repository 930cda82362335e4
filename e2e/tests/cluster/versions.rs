//! Which version a spec leads to.

use std::time::Duration;

use anyhow::{Context, Result};
use k8s_openapi::{
    api::core::v1::{Pod, Secret},
    jiff::Timestamp,
};
use kube::{
    api::{DeleteParams, ListParams, ObjectMeta, Patch, PatchParams, PostParams},
    runtime::wait::await_condition,
};
use serde_json::json;
use tokio::time::timeout;
use tunesmith_crds::{
    AdapterVersion, AdapterVersionPhase, FineTuneJobPhase, conditions, fine_tune_job::SecretRef,
    names::VERIFY_ANNOTATION,
};

use crate::tenant::{Tenant, condition, merge};

#[tokio::test(flavor = "multi_thread")]
async fn the_same_inputs_are_never_trained_twice() -> Result<()> {
    let team = Tenant::new("reuse").await?;
    team.apply(&team.job("first", json!({}))).await?;
    team.until_phase("first", FineTuneJobPhase::Succeeded).await?;

    // A second job for the same adapter, and the first one recreated as a GitOps tool would.
    let second = json!({"output": {"adapterName": "first"}, "training": {"loggingSteps": 2}});
    team.apply(&team.job("second", second)).await?;
    let job = team.until_phase("second", FineTuneJobPhase::Succeeded).await?;
    assert_eq!(condition(&job, conditions::READY).map(|(_, reason, _)| reason), Some(conditions::reason::REUSED));
    assert_eq!(job.status.and_then(|status| status.latest_version).as_deref(), Some("first-v1"));
    assert!(team.training_jobs("second").await?.is_empty());

    team.delete_job("first").await?;
    team.apply(&team.job("first", json!({}))).await?;
    team.until_phase("first", FineTuneJobPhase::Succeeded).await?;
    assert!(team.training_jobs("first").await?.is_empty());
    assert_eq!(team.versions().await?, ["first-v1"]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_version_is_copied_to_where_its_job_wants_it_now() -> Result<()> {
    let team = Tenant::new("copied").await?;
    team.apply(&team.job("bot", json!({}))).await?;
    team.until_phase("bot", FineTuneJobPhase::Succeeded).await?;

    let moved = json!({"output": {"uri": format!("s3://adapters/{}/moved", team.namespace)}});
    team.apply(&team.job("bot", moved)).await?;
    let job = team.until_phase("bot", FineTuneJobPhase::Succeeded).await?;
    assert_eq!(job.status.and_then(|status| status.latest_version).as_deref(), Some("bot-v2"));
    assert_eq!(team.training_jobs("bot").await?.len(), 1, "it is trained again");
    assert_eq!(team.weights("bot", 1).await?, team.weights("moved/bot", 2).await?);
    let version: AdapterVersion = team.api().get("bot-v2").await?;
    let old: AdapterVersion = team.api().get("bot-v1").await?;
    assert_eq!(version.spec.source.copied_from, Some(old.spec.artifact.uri));
    assert_eq!(version.spec.metrics, old.spec.metrics);

    // What can't be copied is trained again.
    team.write("adapters", "bot/v1/README.md", "another").await?;
    team.write("adapters", "moved/bot/v2/README.md", "another").await?;
    let elsewhere = json!({"output": {"uri": format!("s3://adapters/{}/elsewhere", team.namespace)}});
    team.apply(&team.job("bot", elsewhere)).await?;
    team.until_phase("bot", FineTuneJobPhase::Succeeded).await?;
    let version: AdapterVersion = team.api().get("bot-v3").await?;
    assert_eq!((version.spec.source.copied_from, team.training_jobs("bot").await?.len()), (None, 2));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_spec_leads_to_the_next_version() -> Result<()> {
    let team = Tenant::new("changed").await?;
    team.apply(&team.job("bot", json!({}))).await?;
    team.until_phase("bot", FineTuneJobPhase::Succeeded).await?;
    team.apply(&team.job("bot", json!({"training": {"seed": 7}}))).await?;
    let job = team.until_phase("bot", FineTuneJobPhase::Succeeded).await?;
    let status = job.status.expect("a status");
    assert_eq!(status.latest_version.as_deref(), Some("bot-v2"));
    assert_eq!(status.run.map(|run| run.number), Some(2));
    let history: Vec<_> = status.history.iter().map(|run| (run.number, run.version.as_deref())).collect();
    assert_eq!(history, [(2, Some("bot-v2")), (1, Some("bot-v1"))]);
    assert_eq!(team.versions().await?, ["bot-v1", "bot-v2"]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn namespaces_that_share_a_folder_never_share_a_version() -> Result<()> {
    let (prod, dev) = tokio::try_join!(Tenant::new("prod"), Tenant::new("dev"))?;
    let output = json!({"output": {"uri": format!("s3://adapters/{}", prod.namespace)}});
    prod.apply(&prod.job("bot", json!({"training": {"seed": 1}}))).await?;
    let mut changes = json!({"training": {"seed": 2}});
    merge(&mut changes, output);
    dev.apply(&dev.job("bot", changes)).await?;
    for team in [&prod, &dev] {
        team.until_phase("bot", FineTuneJobPhase::Succeeded).await?;
    }
    let mut both = [prod.versions().await?, dev.versions().await?].concat();
    both.sort();
    assert_eq!(both, ["bot-v1", "bot-v2"]);
    assert_ne!(prod.weights("bot", 1).await?, prod.weights("bot", 2).await?);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_version_outlives_its_job_and_never_changes() -> Result<()> {
    let team = Tenant::new("outlives").await?;
    team.apply(&team.job("gone", json!({}))).await?;
    team.until_phase("gone", FineTuneJobPhase::Succeeded).await?;
    team.delete_job("gone").await?;

    let mut version: AdapterVersion = team.api().get("gone-v1").await?;
    assert_eq!(version.metadata.owner_references, None);
    assert_eq!(version.status.as_ref().and_then(|status| status.phase), Some(AdapterVersionPhase::Available));
    assert!(team.published().await?.contains(&"gone/v1/manifest.json".into()));

    version.spec.version = 9;
    let error = team.api().replace("gone-v1", &Default::default(), &version).await.unwrap_err().to_string();
    assert!(error.contains("immutable"), "{error}");

    // Somebody writes over one of its files; whoever asks is told.
    team.write("adapters", "gone/v1/README.md", "another").await?;
    let ask = json!({"metadata": {"annotations": {VERIFY_ANNOTATION: Timestamp::now().to_string()}}});
    team.api::<AdapterVersion>().patch("gone-v1", &PatchParams::default(), &Patch::Merge(ask)).await?;
    until_verdict(&team, "gone-v1", AdapterVersionPhase::Rejected).await
}

/// Waits until a version has this verdict.
async fn until_verdict(team: &Tenant, name: &str, phase: AdapterVersionPhase) -> Result<()> {
    let has_it =
        |version: Option<&AdapterVersion>| version.and_then(|version| version.status.as_ref()?.phase) == Some(phase);
    let verdict = timeout(Duration::from_secs(120), await_condition(team.api::<AdapterVersion>(), name, has_it));
    verdict.await.with_context(|| format!("{name} is not {phase:?}"))??;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_admin_verifies_a_copy_of_a_tenants_version_in_a_namespace_of_their_own() -> Result<()> {
    let (team, admin) = tokio::try_join!(Tenant::new("untrusted"), Tenant::new("serving"))?;
    team.apply(&team.job("bot", json!({}))).await?;
    team.until_phase("bot", FineTuneJobPhase::Succeeded).await?;
    let original: AdapterVersion = team.api().get("bot-v1").await?;
    // The tenant's Secret is not there: the admin's own one reads the bucket.
    let mut secret: Secret = admin.api().get("s3-credentials").await?;
    secret.metadata = ObjectMeta { name: Some("reader".into()), ..ObjectMeta::default() };
    admin.api().create(&PostParams::default(), &secret).await?;
    admin.api::<Secret>().delete("s3-credentials", &DeleteParams::default()).await?;
    let mut spec = original.spec;
    spec.artifact.secret_ref = Some(SecretRef { name: "reader".into() });
    let copy = async |name: &str| {
        let copy = AdapterVersion::new(name, spec.clone());
        admin.api().create(&PostParams::default(), &copy).await
    };
    copy("bot-v1").await?;
    until_verdict(&admin, "bot-v1", AdapterVersionPhase::Available).await?;
    let verifying = ListParams::default().labels("app.kubernetes.io/instance=bot-v1,tunesmith.dev/stage=verify");
    assert_eq!(admin.api::<Pod>().list(&verifying).await?.items.len(), 1, "a pod of the admin's reads the files");

    // The tenant's own record still says what it said.
    team.write("adapters", "bot/v1/README.md", "another").await?;
    copy("bot-v1-again").await?;
    until_verdict(&admin, "bot-v1-again", AdapterVersionPhase::Rejected).await?;
    until_verdict(&team, "bot-v1", AdapterVersionPhase::Available).await
}
