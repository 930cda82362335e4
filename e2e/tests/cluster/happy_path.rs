//! The example of the README, shortened: a real model, real text, a real adapter.

use std::fs;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use tunesmith_crds::{AdapterVersion, FineTuneJobPhase, conditions};
use tunesmith_e2e::{model, programs_folder, repository, run};

use crate::{
    tenant::{Tenant, condition},
    testbed::upload,
};

/// Converts SmolLM2-135M-Instruct and puts it into S3, as the demo does.
async fn real_model(team: &Tenant) -> Result<()> {
    let folder = tokio::task::spawn_blocking(|| {
        let gguf = model::fetch()?;
        let folder = std::env::temp_dir().join(format!("tunesmith-model-{}", std::process::id()));
        let trainer = programs_folder().join("tunesmith-trainer");
        run(std::process::Command::new(trainer).arg("convert").arg(&gguf).arg("--out").arg(&folder))?;
        anyhow::Ok(folder)
    })
    .await??;
    upload(&team.s3, "models", "smollm2-135m-instruct", &folder).await?;
    fs::remove_dir_all(folder)?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn from_apply_to_a_verified_adapter_in_s3() -> Result<()> {
    let team = Tenant::new("telecom").await?;
    real_model(&team).await?;
    let example = repository().join("examples/telecom-support");
    let first_lines = |file: &str, count: usize| -> Result<String> {
        let text = fs::read_to_string(example.join(file)).with_context(|| format!("cannot read {file}"))?;
        Ok(text.lines().take(count).collect::<Vec<_>>().join("\n"))
    };
    team.write("datasets", "train.jsonl", &first_lines("train.jsonl", 200)?).await?;
    team.write("datasets", "eval.jsonl", &first_lines("eval.jsonl", 16)?).await?;

    let manifest = fs::read_to_string(example.join("finetunejob.yaml"))?;
    let mut manifest: Value = serde_saphyr::from_str(&manifest)?;
    let own = |bucket: &str, name: &str| json!(format!("s3://{bucket}/{}{name}", team.namespace));
    manifest["metadata"]["namespace"] = json!(team.namespace);
    manifest["spec"]["dataset"]["train"]["uri"] = own("datasets", "/train.jsonl");
    manifest["spec"]["dataset"]["eval"]["uri"] = own("datasets", "/eval.jsonl");
    manifest["spec"]["output"]["uri"] = own("adapters", "");
    manifest["spec"]["training"]["maxSteps"] = json!(8);
    manifest["spec"]["training"]["perDeviceTrainBatchSize"] = json!(4);
    team.apply(&manifest).await?;

    // Conditions are there from the first reconcile on: a job without them would count as done.
    let job = team.until("telecom-support", "reconciled", |job| condition(job, conditions::READY).is_some()).await?;
    assert_eq!(condition(&job, conditions::READY).map(|(status, ..)| status), Some("False"));
    assert_eq!(condition(&job, conditions::RECONCILING).map(|(status, ..)| status), Some("True"));
    team.until_step("telecom-support", 1).await?;
    check_pod(&team).await?;

    let job = team.until_phase("telecom-support", FineTuneJobPhase::Succeeded).await?;
    for (kind, status) in [
        (conditions::READY, "True"),
        (conditions::RECONCILING, "False"),
        (conditions::STALLED, "False"),
        (conditions::PREFLIGHT_PASSED, "True"),
        (conditions::QUOTA_RESERVED, "True"),
        (conditions::PUBLISHED, "True"),
    ] {
        assert_eq!(condition(&job, kind).map(|(status, ..)| status), Some(status), "{kind}");
    }
    let version: AdapterVersion = team.api().get("telecom-support-v1").await?;
    let metrics = &version.spec.metrics;
    let (before, after) = (metrics.base_eval_loss.context("base loss")?, metrics.eval_loss.context("eval loss")?);
    assert!((2.5..3.8).contains(&before), "a right model starts near 3.3, not at {before}");
    assert!(after < before - 0.3, "eval loss {before} → {after}");

    let keys = team.published().await?;
    let files = team.files("telecom-support", 1).await?;
    let artifact = &version.spec.artifact;
    assert_eq!((artifact.file_count as usize, artifact.size_bytes), (files.len(), files.iter().map(|f| f.size).sum()));
    for file in &files {
        let key = format!("telecom-support/v1/{}", file.path);
        assert!(keys.contains(&key), "{key} is not in {keys:?}");
        assert_eq!(team.read_published(&key).await?.len() as u64, file.size);
    }
    let config: Value = serde_json::from_slice(&team.read_published("telecom-support/v1/adapter_config.json").await?)?;
    assert_eq!((&config["r"], &config["lora_alpha"], &config["peft_type"]), (&json!(16), &json!(32), &json!("LORA")));
    assert!(team.read_published("telecom-support/v1/loss_curve.svg").await?.starts_with(b"<svg"));

    let table = run(team.cluster.kubectl().args(["get", "finetunejobs", "-n", &team.namespace]))?;
    assert!(table.contains("Succeeded") && table.contains("cpu") && table.contains("telecom-support-v1"), "{table}");
    Ok(())
}

/// The training pod is as locked up as it is said to be.
async fn check_pod(team: &Tenant) -> Result<()> {
    let pods = team.pods("telecom-support", Some("train")).await?;
    let spec = serde_json::to_value(pods.first().and_then(|pod| pod.spec.as_ref()).context("a training pod")?)?;
    let container = &spec["containers"][0];
    assert_eq!(spec["automountServiceAccountToken"], json!(false));
    assert_eq!(container["securityContext"]["readOnlyRootFilesystem"], json!(true));
    assert_eq!(spec["securityContext"]["runAsNonRoot"], json!(true));
    let mounts = container["volumeMounts"].as_array().context("mounts")?;
    assert!(mounts.iter().all(|mount| !mount["mountPath"].as_str().unwrap_or_default().contains("serviceaccount")));
    Ok(())
}
