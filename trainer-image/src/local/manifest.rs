//! Reading a FineTuneJob from YAML as strictly as the API server does: unknown fields, bounds and CEL rules.

use std::path::Path;

use serde_json::Value;
use tunesmith_crds::{FineTuneJob, manifests::crds};

use crate::error::Error;

/// Reads the one FineTuneJob of a file that may hold other objects too.
///
/// # Errors
/// There is none or more than one, or the API server would refuse it.
pub(super) fn read(path: &Path) -> Result<FineTuneJob, Error> {
    let text = std::fs::read_to_string(path).map_err(|source| Error::File { path: path.to_owned(), source })?;
    parse(&text).map_err(|problem| Error::Spec(format!("{}: {problem}", path.display())))
}

fn parse(text: &str) -> Result<FineTuneJob, String> {
    let documents: Vec<Value> = serde_saphyr::from_multiple(text).map_err(|error| error.to_string())?;
    let mut jobs = documents.into_iter().filter(|document| document["kind"] == "FineTuneJob");
    let manifest = match (jobs.next(), jobs.next()) {
        (Some(job), None) => job,
        (None, _) => return Err("holds no FineTuneJob".into()),
        (Some(_), Some(_)) => return Err("holds several FineTuneJobs; run one file for each".into()),
    };
    let mut problems = Vec::new();
    check("spec", &manifest["spec"], &spec_schema()?, &mut problems);
    if !problems.is_empty() {
        return Err(problems.join("; "));
    }
    let job: FineTuneJob = serde_json::from_value(manifest).map_err(|error| error.to_string())?;
    job.validate_cel().map_err(|errors| errors.to_string())?;
    Ok(job)
}

/// The schema of a job's spec, as the API server has it.
fn spec_schema() -> Result<Value, String> {
    let crds = crds().map_err(|error| error.to_string())?;
    let crd = crds.iter().find(|(name, _)| name == "finetunejobs.yaml").ok_or("the CRD of FineTuneJob is missing")?;
    let crd: Value = serde_saphyr::from_str(&crd.1).map_err(|error| error.to_string())?;
    Ok(crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"].clone())
}

/// What of a JSON schema serde and CEL do not check: unknown fields, bounds, and lengths.
fn check(path: &str, value: &Value, schema: &Value, problems: &mut Vec<String>) {
    let mut at_most = |what: &str, found: f64, low: &str, high: &str| {
        let (low, high) = (schema[low].as_f64(), schema[high].as_f64());
        if low.is_some_and(|low| found < low) || high.is_some_and(|high| found > high) {
            let bound = |bound: Option<f64>| bound.map_or("any".to_owned(), |bound| bound.to_string());
            problems.push(format!("{path}{what} is {found}; it must lie between {} and {}", bound(low), bound(high)));
        }
    };
    match value {
        Value::Number(number) => at_most("", number.as_f64().unwrap_or_default(), "minimum", "maximum"),
        Value::String(text) => at_most("'s length", text.chars().count() as f64, "minLength", "maxLength"),
        Value::Array(items) => {
            at_most("'s length", items.len() as f64, "minItems", "maxItems");
            for (i, item) in items.iter().enumerate() {
                check(&format!("{path}[{i}]"), item, &schema["items"], problems);
            }
        }
        Value::Object(fields) => {
            for (name, field) in fields {
                let known = &schema["properties"][name];
                match if known.is_null() { &schema["additionalProperties"] } else { known } {
                    Value::Null => problems.push(format!("{path} has no field `{name}`")),
                    schema => check(&format!("{path}.{name}"), field, schema, problems),
                }
            }
        }
        Value::Null | Value::Bool(_) => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const JOB: &str = "
kind: Namespace
apiVersion: v1
metadata: {name: telecom}
---
apiVersion: tunesmith.dev/v1alpha1
kind: FineTuneJob
metadata: {name: support}
spec:
  baseModel: {uri: s3://models/m}
  dataset: {train: {uri: s3://datasets/train.jsonl}, evalFraction: 0.1}
  method: LoRA
  output: {adapterName: support, uri: s3://adapters}
";

    #[test]
    fn the_job_is_found_among_other_objects_and_has_its_defaults() {
        let job = parse(JOB).unwrap();
        assert_eq!(job.metadata.name.as_deref(), Some("support"));
        assert_eq!(job.spec.training.max_length, 1024);
    }

    #[test]
    fn maps_have_any_keys_and_their_values_are_checked() {
        let with = |rank: u32| {
            let lora = format!("lora: {{rankPattern: {{q_proj: {rank}}}, alphaPattern: {{'k_proj': 4.5}}}}");
            parse(&JOB.replace("method: LoRA", &format!("method: LoRA\n  {lora}")))
        };
        assert_eq!(with(4).unwrap().spec.lora.unwrap().rank_pattern["q_proj"], 4);
        assert!(with(2000).unwrap_err().contains("each rank must lie in 1..=1024"));
    }

    #[test]
    fn every_example_is_what_the_api_server_takes() {
        let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples");
        let folders = std::fs::read_dir(&examples).unwrap().map(|entry| entry.unwrap().path());
        let files = folders.filter(|path| path.is_dir()).flat_map(|folder| std::fs::read_dir(folder).unwrap());
        let manifests =
            files.map(|entry| entry.unwrap().path()).filter(|path| path.extension().is_some_and(|x| x == "yaml"));
        let read: Vec<_> = manifests.map(|path| read(&path).unwrap_or_else(|error| panic!("{error}"))).collect();
        assert!(read.len() >= 6, "{}", read.len());
    }

    #[test]
    fn what_the_api_server_refuses_is_refused_here_with_the_same_words() {
        for (changed, expected) in [
            (
                JOB.replace("evalFraction: 0.1", "evalFraction: 0.1, eval: {uri: s3://datasets/e.jsonl}"),
                "exactly one of eval.uri",
            ),
            (JOB.replace("method: LoRA", "method: LoRA\n  lora: {rnk: 4}"), "spec.lora has no field `rnk`"),
            (
                JOB.replace("method: LoRA", "method: LoRA\n  lora: {rank: 0}"),
                "spec.lora.rank is 0; it must lie between 1 and 1024",
            ),
            (
                JOB.replace("method: LoRA", "training: {perDeviceTrainBatchSize: 0}"),
                "spec.training.perDeviceTrainBatchSize is 0",
            ),
            (
                JOB.replace("method: LoRA", "evaluation: {gates: [{metric: recall, min: 0.8}]}"),
                "metric recall needs min and probe",
            ),
            (
                JOB.replace("method: LoRA", "evaluation: {gates: [{metric: eval_loss, max: 2, mox: 1}]}"),
                "spec.evaluation.gates[0] has no field `mox`",
            ),
            (JOB.replace("s3://models/m", "models/m"), "s3://bucket/key"),
            (JOB.replace("adapterName: support", "adapterName: Support_1"), "must be a DNS label"),
            (JOB.replace("FineTuneJob", "Job"), "holds no FineTuneJob"),
        ] {
            let error = parse(&changed).unwrap_err();
            assert!(error.contains(expected), "expected `{expected}`, got `{error}`");
        }
    }
}
