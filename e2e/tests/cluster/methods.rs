//! Each method of fine-tuning, from apply to a version.

use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use tunesmith_crds::{AdapterVersion, FineTuneJobPhase, adapter_version::ArtifactType};

use crate::tenant::{Tenant, merge};

/// Trains and checks that the version has learned, and is what its method publishes.
async fn trains(name: &str, spec: Value, kind: ArtifactType, files: &[&str]) -> Result<()> {
    let team = Tenant::new(name).await?;
    team.apply(&team.job("bot", spec)).await?;
    team.until_phase("bot", FineTuneJobPhase::Succeeded).await?;
    let version: AdapterVersion = team.api().get("bot-v1").await?;
    let metrics = &version.spec.metrics;
    let (before, after) = (metrics.base_eval_loss.context("base loss")?, metrics.eval_loss.context("eval loss")?);
    assert!(after < before - 0.05, "{name}: eval loss {before} → {after}");
    assert_eq!(version.spec.artifact.kind, kind);
    let published = team.published().await?;
    for file in files {
        assert!(published.contains(&format!("bot/v1/{file}")), "{name}: {file} is not in {published:?}");
    }
    Ok(())
}

/// The method of an example, with its options.
fn example(file: &str) -> Result<Value> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples").join(file);
    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let job: Value = serde_saphyr::from_str(&text).with_context(|| path.display().to_string())?;
    let options = ["method", "lora", "quantization"].into_iter();
    let given = options.filter_map(|key| Some((key.to_owned(), job["spec"].get(key)?.clone())));
    Ok(Value::Object(given.collect()))
}

/// The same with other options.
fn changed(mut example: Value, changes: Value) -> Value {
    merge(&mut example, changes);
    example
}

const ADAPTER: [&str; 3] = ["adapter_config.json", "adapter_model.safetensors", "tokenizer.json"];

#[tokio::test(flavor = "multi_thread")]
async fn full_fine_tuning_publishes_a_model() -> Result<()> {
    let training = json!({"training": {"maxSteps": 20, "learningRate": 0.003, "optim": "adamw_bnb_8bit"}});
    let files = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"];
    trains("method-full", changed(example("methods/full.yaml")?, training), ArtifactType::FullModel, &files).await
}

#[tokio::test(flavor = "multi_thread")]
async fn lora_with_dora_on_every_layer_publishes_an_adapter() -> Result<()> {
    let changes =
        json!({"lora": {"rank": 4, "targetModules": ["all-linear"], "useDora": true}, "training": {"maxSteps": 20}});
    let spec = changed(example("telecom-support/finetunejob.yaml")?, changes);
    trains("method-lora", spec, ArtifactType::LoraAdapter, &ADAPTER).await
}

#[tokio::test(flavor = "multi_thread")]
async fn qlora_in_four_bits_publishes_an_adapter() -> Result<()> {
    let spec = changed(example("methods/qlora-nf4.yaml")?, json!({"training": {"maxSteps": 20, "bf16": true}}));
    trains("method-nf4", spec, ArtifactType::LoraAdapter, &ADAPTER).await
}

#[tokio::test(flavor = "multi_thread")]
async fn qlora_in_eight_bits_publishes_an_adapter() -> Result<()> {
    let changes = json!({"quantization": {"outlierThreshold": 6.0}, "training": {"maxSteps": 20}});
    let spec = changed(example("methods/qlora-int8.yaml")?, changes);
    trains("method-int8", spec, ArtifactType::LoraAdapter, &ADAPTER).await
}
