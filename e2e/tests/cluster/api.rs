//! What the API server refuses, in which words.

use anyhow::{Context, Result};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::{Api, CustomResourceExt, api::PostParams};
use serde_json::{Value, json};
use tunesmith_crds::{AdapterVersion, FineTuneJob, FineTuneRun, GpuClass};
use tunesmith_e2e::run;

use crate::tenant::Tenant;

#[tokio::test(flavor = "multi_thread")]
async fn the_api_server_refuses_a_bad_manifest_and_says_what_to_do() -> Result<()> {
    let team = Tenant::new("api").await?;
    let recall = json!({"gates": [{"metric": "recall", "min": 0.8}]});
    let twice = json!({"gates": [{"metric": "eval_loss", "max": 2.0}, {"metric": "eval_loss", "max": 1.0}]});
    let four_bits = json!({"bits": 4, "type": "nf4", "outlierThreshold": 6.0});
    let cases: [(Value, &str); 11] = [
        (json!({"method": "QLoRA"}), "method QLoRA needs quantization"),
        (json!({"method": "QLoRA", "quantization": four_bits}), "outlierThreshold goes with bits: 8"),
        (json!({"method": "Full", "lora": {"rank": 8}}), "method Full trains every parameter and takes no lora"),
        (json!({"lora": {"rank": 4096}}), "should be less than or equal to 1024"),
        (json!({"lora": {"dropout": 1.0}}), "must lie in [0, 1)"),
        (json!({"training": {"learningRate": 0}}), "must be greater than 0"),
        (json!({"dataset": {"evalFraction": null}}), "exactly one of eval.uri and evalFraction"),
        (json!({"evaluation": recall}), "metric recall needs min and probe"),
        (json!({"evaluation": twice}), "give each metric one gate"),
        (
            json!({"baseModel": {"uri": "gopher://models"}}),
            "must be s3://bucket/key, gs://bucket/key, az://container/key, hf://owner/name, pvc://claim/path or file:///path",
        ),
        (json!({"output": {"adapterName": "Support_Bot"}}), "must be a DNS label"),
    ];
    for (changes, words) in cases {
        let error = team.apply(&team.job("refused", changes)).await.expect_err(words).to_string();
        assert!(error.contains(words), "expected `{words}`, got `{error}`");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_misspelt_field_is_refused() -> Result<()> {
    let team = Tenant::new("typo").await?;
    let error = team.apply(&team.job("typo", json!({"trainnig": {}}))).await.unwrap_err().to_string();
    assert!(error.contains("trainnig"), "{error}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_minimal_manifest_gets_every_default() -> Result<()> {
    let team = Tenant::new("defaults").await?;
    let minimal: FineTuneJob = serde_json::from_value(json!({
        "apiVersion": "tunesmith.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": "minimal"},
        "spec": {
            "baseModel": {"uri": "s3://models/m"},
            "dataset": {"train": {"uri": "s3://datasets/t.jsonl"}, "evalFraction": 0.1},
            "output": {"adapterName": "minimal", "uri": "s3://adapters"},
        },
    }))?;
    let explained = team.cluster.kubectl().args(["explain", "finetunejob.spec.lora.rank"]).output()?;
    assert!(String::from_utf8_lossy(&explained.stdout).contains("Inner dimension r"));
    let dry_run = PostParams { dry_run: true, ..PostParams::default() };
    let created = team.api::<FineTuneJob>().create(&dry_run, &minimal).await?;
    // What the server filled in is what the types fill in.
    assert_eq!(created.spec, minimal.spec);
    Ok(())
}

/// The fields below `schema` that say nothing of themselves.
fn undescribed(path: &str, schema: &Value, found: &mut Vec<String>) {
    for (name, field) in schema["properties"].as_object().into_iter().flatten() {
        let path = format!("{path}.{name}");
        if field["description"].as_str().is_none_or(|words| words.trim().is_empty()) {
            found.push(path.clone());
        }
        for within in [field, &field["items"], &field["additionalProperties"]] {
            undescribed(&path, within, found);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_field_of_every_kind_explains_itself() -> Result<()> {
    let team = Tenant::new("explain").await?;
    let definitions = Api::<CustomResourceDefinition>::all(team.client.clone());
    let names = [FineTuneJob::crd_name(), FineTuneRun::crd_name(), AdapterVersion::crd_name(), GpuClass::crd_name()];
    let mut found = Vec::new();
    for name in names {
        let definition = serde_json::to_value(definitions.get(name).await?)?;
        let schema = &definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"];
        assert!(schema["properties"]["spec"]["properties"].is_object(), "{name} has no schema");
        for part in ["spec", "status"] {
            undescribed(&format!("{name} {part}"), &schema["properties"][part], &mut found);
        }
    }
    assert!(found.is_empty(), "without a description: {found:#?}");

    let explain = |field: &str| run(team.cluster.kubectl().args(["explain", field]));
    for (field, words) in [
        ("finetunerun.spec.trigger", "asked for another run"),
        ("finetunerun.status.stage", "Recorded (its files are verified)"),
        ("finetunerun.status.reason", "GateFailed"),
        ("finetunerun.status.attempts.cause", "up to backoffLimit"),
    ] {
        let text = explain(field).context("kubectl explain")?;
        // kubectl wraps lines.
        let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(text.contains(words), "{field}: {text}");
    }
    Ok(())
}
