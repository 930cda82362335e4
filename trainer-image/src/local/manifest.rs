//! Reading a FineTuneJob from YAML as strictly as the API server does: unknown fields, types, bounds and CEL rules.

mod schema;

use std::path::Path;

use serde_json::Value;
use tunesmith_crds::{FineTuneJob, manifests::crds, names::GROUP};

use crate::error::Error;

const KIND: &str = "FineTuneJob";
const VERSION: &str = "v1alpha1";
/// What every object has, besides what its schema says.
const METADATA: [&str; 15] = [
    "annotations",
    "creationTimestamp",
    "deletionGracePeriodSeconds",
    "deletionTimestamp",
    "finalizers",
    "generateName",
    "generation",
    "labels",
    "managedFields",
    "name",
    "namespace",
    "ownerReferences",
    "resourceVersion",
    "selfLink",
    "uid",
];
/// Those of them that are texts, besides the name.
const METADATA_TEXTS: [&str; 7] =
    ["creationTimestamp", "deletionTimestamp", "generateName", "namespace", "resourceVersion", "selfLink", "uid"];

/// Reads the one FineTuneJob of a file that may hold other objects too.
///
/// # Errors
/// There is none or more than one, or the API server would refuse it.
pub(super) fn read(path: &Path) -> Result<FineTuneJob, Error> {
    let bytes = std::fs::read(path).map_err(|source| Error::File { path: path.to_owned(), source })?;
    let refused = |problem: String| Error::Spec(format!("{}: {problem}", path.display()));
    let text = String::from_utf8(bytes).map_err(|_| refused("it is not UTF-8: save it as such".into()))?;
    parse(text.trim_start_matches('\u{feff}')).map_err(refused)
}

fn parse(text: &str) -> Result<FineTuneJob, String> {
    let documents: Vec<Value> = serde_saphyr::from_multiple(text).map_err(|error| no_yaml(&error))?;
    let objects: Vec<Value> = documents.into_iter().flat_map(items).collect();
    let (jobs, others): (Vec<Value>, Vec<Value>) = objects.into_iter().partition(|object| object["kind"] == KIND);
    let mut jobs = jobs.into_iter();
    let mut manifest = match (jobs.next(), jobs.next()) {
        (Some(job), None) => job,
        (None, _) => return Err(none_among(&others)),
        (Some(_), Some(_)) => return Err("holds several FineTuneJobs; run one file for each".into()),
    };
    let problems = problems(&mut manifest)?;
    if !problems.is_empty() {
        return Err(problems.join("; "));
    }
    let job: FineTuneJob = serde_json::from_value(manifest).map_err(|error| error.to_string())?;
    job.validate_cel().map_err(|errors| errors.to_string())?;
    Ok(job)
}

/// The parser's words, but for its advice to programmers.
fn no_yaml(error: &serde_saphyr::Error) -> String {
    format!("it is no YAML: {error}").replace(", set DuplicateKeyPolicy in Options if acceptable", "")
}

/// The objects of a document: itself, or what a List holds.
fn items(document: Value) -> Vec<Value> {
    match document {
        Value::Object(mut list) if list.get("kind").is_some_and(|kind| kind == "List") => match list.remove("items") {
            Some(Value::Array(items)) => items,
            _ => Vec::new(),
        },
        document => vec![document],
    }
}

/// Says what a file holds in place of a job.
fn none_among(objects: &[Value]) -> String {
    let kind = |object: &Value| match (&object["kind"], object) {
        (Value::String(kind), _) if kind.eq_ignore_ascii_case(KIND) => format!("{kind}, which is spelled {KIND}"),
        (Value::String(kind), _) => kind.clone(),
        (Value::Null, Value::Object(fields)) if fields.contains_key("spec") => "an object without kind".into(),
        (Value::Null, Value::Object(fields)) => {
            let names: Vec<&str> = fields.keys().map(String::as_str).take(3).collect();
            format!("an object without kind ({}…)", names.join(", "))
        }
        _ => "something that is no object".into(),
    };
    let kinds: Vec<String> = objects.iter().map(kind).collect();
    let found = if kinds.is_empty() { "nothing".into() } else { kinds.join(", ") };
    format!("holds no FineTuneJob (kind: {KIND}, apiVersion: {GROUP}/{VERSION}) but {found}")
}

/// Everything that the API server would refuse before its CEL rules.
fn problems(manifest: &mut Value) -> Result<Vec<String>, String> {
    let mut problems = Vec::new();
    let version = format!("{GROUP}/{VERSION}");
    match manifest["apiVersion"].as_str() {
        Some(found) if found == version => {}
        Some(found) => problems.push(format!("apiVersion is {found:?}; expected {version}")),
        None => problems.push(format!("apiVersion is missing: write apiVersion: {version}")),
    }
    check_metadata(&manifest["metadata"], &mut problems);
    for name in manifest.as_object().into_iter().flatten().map(|(name, _)| name) {
        if !["apiVersion", "kind", "metadata", "spec", "status"].contains(&name.as_str()) {
            problems.push(format!("the FineTuneJob has no field `{name}`; does it belong under spec?"));
        }
    }
    match manifest.get_mut("spec") {
        Some(spec) => schema::check("spec", spec, &spec_schema()?, &mut problems),
        None => problems.push("spec is missing".into()),
    }
    // What the cluster writes is none of the user's.
    manifest.as_object_mut().map(|fields| fields.remove("status"));
    Ok(problems)
}

fn check_metadata(metadata: &Value, problems: &mut Vec<String>) {
    let Some(fields) = metadata.as_object() else {
        problems.push("metadata.name is missing".into());
        return;
    };
    match &metadata["name"] {
        Value::String(name) if !name.is_empty() => {}
        Value::Null | Value::String(_) => problems.push("metadata.name is missing".into()),
        other => problems.push(format!("metadata.name is {other}; expected a string: write it in quotes")),
    }
    for (name, field) in fields {
        match (name.as_str(), field) {
            (other, _) if !METADATA.contains(&other) => problems.push(format!("metadata has no field `{name}`")),
            (_, Value::Null) => {}
            ("labels" | "annotations", Value::Object(texts)) => {
                for (key, other) in texts.iter().filter(|(_, text)| !text.is_string()) {
                    problems.push(format!("metadata.{name}.{key} is {other}; expected a string: write it in quotes"));
                }
            }
            ("labels" | "annotations", other) => {
                problems.push(format!("metadata.{name} is {other}; expected an object of strings"));
            }
            (name, other) if METADATA_TEXTS.contains(&name) && !other.is_string() => {
                problems.push(format!("metadata.{name} is {other}; expected a string: write it in quotes"));
            }
            _ => {}
        }
    }
}

/// The schema of a job's spec, as the API server has it.
fn spec_schema() -> Result<Value, String> {
    let crds = crds().map_err(|error| error.to_string())?;
    let crd = crds.iter().find(|(name, _)| name == "finetunejobs.yaml").ok_or("the CRD of FineTuneJob is missing")?;
    let crd: Value = serde_saphyr::from_str(&crd.1).map_err(|error| error.to_string())?;
    Ok(crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"].clone())
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

    /// A value of a field of a FineTuneJob, and whether the API server takes it: `e2e` asks a real one.
    #[derive(serde::Deserialize)]
    struct Case {
        field: String,
        value: Value,
        accepted: bool,
    }

    #[test]
    fn each_field_is_judged_as_the_api_server_judges_it() {
        let cases: Vec<Case> = serde_json::from_str(include_str!("../../../crds/tests/fields.json")).unwrap();
        let mut wrong = Vec::new();
        for Case { field, value, accepted } in cases {
            let mut job: Value = serde_saphyr::from_multiple::<Value>(JOB).unwrap().remove(1);
            job["spec"]["resources"] = serde_json::json!({});
            let (parent, key) = field.rsplit_once('/').unwrap();
            job.pointer_mut(parent).unwrap()[key] = value.clone();
            let verdict = parse(&job.to_string());
            if verdict.is_ok() != accepted {
                wrong.push(format!("{field}: {value}: {:?}", verdict.err()));
            }
        }
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
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

    #[test]
    fn a_value_of_a_wrong_type_is_named_with_its_field_and_what_was_expected() {
        let training = |fields: &str| JOB.replace("method: LoRA", &format!("training: {{{fields}}}"));
        for (changed, expected) in [
            (
                training("learningRate: \"2e-4\""),
                "spec.training.learningRate is \"2e-4\" (a string); expected a number: write it without quotes",
            ),
            (training("seed: 1.5"), "spec.training.seed is 1.5 (a number); expected an integer"),
            (
                training("seed: '7'"),
                "spec.training.seed is \"7\" (a string); expected an integer: write it without quotes",
            ),
            (training("packing: 1"), "spec.training.packing is 1 (a number); expected true or false"),
            (training("packing: \"true\""), "spec.training.packing is \"true\" (a string); expected true or false"),
            (training("learningRate: .nan"), "non-finite float"),
            (training("numTrainEpochs: [3]"), "spec.training.numTrainEpochs is a list of 1; expected a number"),
            (training("optim: AdamW"), "spec.training.optim is \"AdamW\" (a string); it must be one of "),
            (training("learning_rate: 1"), "spec.training has no field `learning_rate`; it is spelled `learningRate`"),
            (
                JOB.replace("method: LoRA", "method: lora"),
                "spec.method is \"lora\" (a string); it must be one of Full, LoRA, QLoRA, Auto",
            ),
            (JOB.replace("method: LoRA", "method: off"), "spec.method is false (a boolean); expected one of Full"),
            (
                JOB.replace("adapterName: support", "adapterName: no"),
                "spec.output.adapterName is false (a boolean); expected a string: write it in quotes",
            ),
            (JOB.replace("adapterName: support", "adapterName: 1.0"), "expected a string: write it in quotes"),
            (JOB.replace("{name: support}", "{name: 7}"), "metadata.name is 7; expected a string"),
            (
                JOB.replace("{name: support}", "{name: support, labels: {tier: 1}}"),
                "metadata.labels.tier is 1; expected a string",
            ),
            (
                JOB.replace("{name: support}", "{name: support, namespace: n}"),
                "metadata.namespace is false; expected a string: write it in quotes",
            ),
            (JOB.replace("{name: support}", "{name: support, uid: 7}"), "metadata.uid is 7; expected a string"),
            (
                JOB.replace("{name: support}", "{name: support, labels: [a]}"),
                "metadata.labels is [\"a\"]; expected an object",
            ),
            (JOB.replace("{name: support}", "{name: support, lables: {}}"), "metadata has no field `lables`"),
            (JOB.replace("{name: support}", "{}"), "metadata.name is missing"),
            (
                JOB.replace("baseModel: {uri: s3://models/m}", "baseModel: s3://models/m"),
                "spec.baseModel is \"s3://models/m\" (a string); expected an object",
            ),
            (JOB.replace("baseModel: {uri: s3://models/m}", "baseModel: {}"), "spec.baseModel.uri is missing"),
            (JOB.replace("  baseModel: {uri: s3://models/m}\n", ""), "spec.baseModel is missing"),
            (
                JOB.replace("{uri: s3://models/m}", "{uri: s3://models/m, digest: abc}"),
                "spec.baseModel.digest is \"abc\"; it must match ^sha256:",
            ),
            (JOB.replace("s3://models/m", "models/m"), "spec.baseModel.uri: `models/m` is not a URI"),
            (JOB.replace("s3://models/m", "\"s3://models/m \""), "it ends in a space"),
            (JOB.replace("spec:\n", "suspend: true\nspec:\n"), "no field `suspend`; does it belong under spec?"),
            (
                JOB.replace("tunesmith.dev/v1alpha1", "kubeflow.org/v1"),
                "apiVersion is \"kubeflow.org/v1\"; expected tunesmith.dev/v1alpha1",
            ),
            (JOB.replace("FineTuneJob", "FinetuneJob"), "but Namespace, FinetuneJob, which is spelled FineTuneJob"),
            ("".into(), "but nothing"),
            ("- a\n".into(), "but something that is no object"),
            (JOB.replace("  method: LoRA", "  method: LoRA\n  method: Full"), "method"),
            (JOB.replace("  method: LoRA", "\tmethod: LoRA"), "it is no YAML"),
            (JOB.replace("{name: support}", "a: b: c"), "it is no YAML"),
        ] {
            let error = parse(&changed).unwrap_err();
            assert!(error.contains(expected), "expected `{expected}`, got `{error}`");
        }
    }

    #[test]
    fn all_problems_are_told_at_once() {
        let changed = JOB.replace("method: LoRA", "method: lora\n  lora: {rank: 0, rnk: 4}").replace("v1alpha1", "v1");
        let error = parse(&changed).unwrap_err();
        for expected in ["apiVersion is", "spec.method is", "spec.lora.rank is 0", "no field `rnk`"] {
            assert!(error.contains(expected), "expected `{expected}`, got `{error}`");
        }
    }

    #[test]
    fn a_list_a_status_and_a_null_are_taken_as_the_api_server_does() {
        let job = JOB.split_once("---\n").unwrap().1;
        let with_status = format!("{job}status: {{phase: Succeeded, conditions: [], history: []}}\n");
        let indented = job.replace('\n', "\n    ");
        let list = format!("apiVersion: v1\nkind: List\nitems:\n  - {}\n", indented.trim());
        let nulls = job.replace("method: LoRA", "training: null\n  lora: null");
        for text in [&with_status, &list, &nulls] {
            assert_eq!(parse(text).unwrap().metadata.name.as_deref(), Some("support"), "{text}");
        }
    }

    #[test]
    fn a_number_may_be_written_in_any_way_that_yaml_has() {
        for (written, rate) in [("2e-4", 2e-4), ("1.0e+0", 1.0), ("2E-4", 2e-4), (".5", 0.5), ("0.00002", 2e-5)] {
            let job = parse(&JOB.replace("method: LoRA", &format!("training: {{learningRate: {written}}}"))).unwrap();
            assert_eq!(job.spec.training.learning_rate, rate, "{written}");
        }
    }
}
