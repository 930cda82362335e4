//! The termination messages of trainer pods.

use serde_json::{Value, json};

/// Steps that a training makes.
pub(crate) const STEPS: u64 = 400;

/// What a preflight reports.
pub(crate) fn preflight() -> Value {
    report(json!({
        "kind": "Preflight",
        "baseDigest": digest('b'),
        "dataset": dataset(),
        "evalRows": 120,
        "truncatedRows": 3,
        "totalSteps": STEPS,
        "model": {
            "parameters": 134_515_008, "layers": 30, "hiddenSize": 576, "intermediateSize": 1536, "vocabSize": 49_152,
            "bytesPerParameter": 4,
        },
        "loraParameters": 4_884_480,
        "numericsVersion": 1,
        "highestVersion": 0,
    }))
}

/// What a training reports, whose input is this `RunSpec`.
pub(crate) fn trained(spec: &Value) -> Value {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let version = &spec["train"]["version"];
    let uri = format!("{}/{}/v{version}", text(&spec["output"]), text(&spec["adapterName"]));
    let file = |path: &str, size: u64| json!({"path": path, "sha256": "0".repeat(64), "size": size});
    report(json!({
        "kind": "Trained",
        "version": version,
        "uri": uri,
        "manifestDigest": digest('c'),
        "files": [
            file("README.md", 1830), file("adapter_config.json", 894), file("adapter_model.safetensors", 19_593_064),
            file("loss_curve.svg", 2135), file("tokenizer.json", 3_522_658), file("trainer_state.json", 6614),
        ],
        "fileCount": 6,
        "sizeBytes": 23_127_195,
        "dataset": dataset(),
        "metrics": {
            "baseEvalLoss": 3.438, "evalLoss": 2.449_725, "basePerplexity": 31.12, "perplexity": 11.58,
            "trainLoss": 2.51, "steps": STEPS, "tokens": 163_840, "trainSeconds": 33.1,
        },
    }))
}

/// What an attempt reports after which another may do better.
pub(crate) fn failed() -> Value {
    report(json!({"kind": "Failed", "message": "the loss is NaN"}))
}

/// What a verification reports.
pub(crate) fn verified() -> Value {
    report(json!({"kind": "Verified", "verdict": "Intact", "message": ""}))
}

/// What `GET /progress` answers.
pub(crate) fn progress(stage: &str, step: u64) -> Value {
    json!({
        "stage": stage,
        "progress": {
            "summary": "", "step": step, "totalSteps": STEPS, "epoch": 0.1, "loss": 2.5, "tokensPerSecond": 1200.0,
            "etaSeconds": STEPS.saturating_sub(step),
        },
    })
}

fn report(outcome: Value) -> Value {
    json!({"schemaVersion": tunesmith_crds::run::SCHEMA_VERSION, "outcome": outcome})
}

fn dataset() -> Value {
    json!({"digest": digest('d'), "rows": 1750, "tokens": 103_211})
}

fn digest(digit: char) -> String {
    format!("sha256:{}", digit.to_string().repeat(64))
}

#[cfg(test)]
mod tests {
    use tunesmith_crds::run::{LiveProgress, Outcome, RunReport};

    use super::*;

    #[test]
    fn the_operator_can_read_what_pods_report() {
        let read = |report: Value| RunReport::from_termination_message(&report.to_string()).unwrap().outcome;
        let spec = json!({"output": "s3://adapters", "adapterName": "a", "train": {"version": 2}});
        let Outcome::Trained(trained) = read(trained(&spec)) else { panic!() };
        assert_eq!((trained.version, trained.uri.to_string().as_str()), (2, "s3://adapters/a/v2"));
        assert!(matches!(read(preflight()), Outcome::Preflight(_)));
        assert!(matches!(read(verified()), Outcome::Verified(_)));
        assert!(matches!(read(failed()), Outcome::Failed { .. }));
        assert!(serde_json::from_value::<LiveProgress>(progress("Training", 3)).is_ok());
    }
}
