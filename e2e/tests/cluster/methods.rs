//! Each method of fine-tuning, from apply to a version.

use anyhow::{Context, Result};
use serde_json::{Value, json};
use tunesmith_crds::{AdapterVersion, FineTuneJobPhase, adapter_version::ArtifactType};

use crate::tenant::Tenant;

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

const ADAPTER: [&str; 3] = ["adapter_config.json", "adapter_model.safetensors", "tokenizer.json"];

#[tokio::test(flavor = "multi_thread")]
async fn full_fine_tuning_publishes_a_model() -> Result<()> {
    let spec =
        json!({"method": "Full", "training": {"maxSteps": 20, "learningRate": 0.003, "optim": "adamw_bnb_8bit"}});
    let files = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"];
    trains("method-full", spec, ArtifactType::FullModel, &files).await
}

#[tokio::test(flavor = "multi_thread")]
async fn lora_with_dora_on_every_layer_publishes_an_adapter() -> Result<()> {
    let spec = json!({
        "method": "LoRA",
        "lora": {"rank": 4, "targetModules": ["all-linear"], "useDora": true},
        "training": {"maxSteps": 20},
    });
    trains("method-lora", spec, ArtifactType::LoraAdapter, &ADAPTER).await
}

#[tokio::test(flavor = "multi_thread")]
async fn qlora_in_four_bits_publishes_an_adapter() -> Result<()> {
    let spec = json!({
        "method": "QLoRA",
        "quantization": {"bits": 4, "type": "nf4"},
        "training": {"maxSteps": 20, "bf16": true},
    });
    trains("method-nf4", spec, ArtifactType::LoraAdapter, &ADAPTER).await
}

#[tokio::test(flavor = "multi_thread")]
async fn qlora_in_eight_bits_publishes_an_adapter() -> Result<()> {
    let spec = json!({
        "method": "QLoRA",
        "quantization": {"bits": 8, "type": "int8", "outlierThreshold": 6.0},
        "training": {"maxSteps": 20},
    });
    trains("method-int8", spec, ArtifactType::LoraAdapter, &ADAPTER).await
}
