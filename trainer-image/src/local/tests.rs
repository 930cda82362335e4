//! `run` on a manifest, with folders instead of S3.

use std::{fs, path::Path};

use tempfile::TempDir;
use tokio::runtime::Runtime;
use tunesmith_crds::{
    adapter_version::ArtifactFile,
    run::{Outcome, TrainReport},
};

use super::{Ended, check, for_pods, forecast, manifest, prepare, run, stand_in, summary};
use crate::{
    error::Error, progress::Progress, publish::Manifest, stop::Stop, store::Stores, tiny_model, train::Context,
};

const MANIFEST: &str = "
apiVersion: tunesmith.dev/v1alpha1
kind: FineTuneJob
metadata: {name: support}
spec:
  baseModel: {uri: s3://models/tiny}
  dataset: {train: {uri: s3://datasets/support/train.jsonl}, evalFraction: 0.2}
  method: LoRA
  training: {maxSteps: 3, warmupSteps: 0, learningRate: 0.01}
  output: {adapterName: support, uri: s3://adapters}
";

fn desk() -> TempDir {
    let desk = tempfile::tempdir().unwrap();
    tiny_model::write(&desk.path().join("store/models/tiny")).unwrap();
    let rows: String =
        (0..8).map(|i| format!("{{\"prompt\": \"{i} + 1 =\", \"completion\": \" {}\"}}\n", i + 1)).collect();
    fs::write(desk.path().join("train.jsonl"), rows).unwrap();
    desk
}

fn run_manifest(desk: &TempDir, manifest: &str) -> Result<Ended, Error> {
    with_context(desk, manifest, |path, context| {
        let ended = run(path, context)?;
        let summary = summary(&ended, context.stores).unwrap();
        assert!(summary.contains("store/adapters/support/v"), "{summary}");
        assert_eq!(summary.matches("\ngate ").count(), ended.gates.len(), "{summary}");
        Ok(ended)
    })
}

fn with_context<T>(desk: &TempDir, manifest: &str, work: impl FnOnce(&Path, Context<'_>) -> T) -> T {
    let path = desk.path().join("job.yaml");
    fs::write(&path, manifest).unwrap();
    let runtime = Runtime::new().unwrap();
    let stores = Stores::from_environment(runtime.handle().clone()).or_local(&desk.path().join("store"));
    let (progress, stop) = (Progress::new(), Stop::default());
    work(&path, Context { stores: &stores, work: &desk.path().join("work"), progress: &progress, stop: &stop })
}

fn published(desk: &TempDir, manifest: &str) -> TrainReport {
    trained(run_manifest(desk, manifest).unwrap())
}

fn trained(ended: Ended) -> TrainReport {
    match ended.outcome {
        Outcome::Trained(report) => report,
        other => panic!("not trained: {other:?}"),
    }
}

fn files_of(desk: &TempDir, version: u32) -> Vec<ArtifactFile> {
    let manifest = desk.path().join(format!("store/adapters/support/v{version}/manifest.json"));
    Manifest::parse(&fs::read(manifest).unwrap()).unwrap().files
}

fn with_gates(gates: &str) -> String {
    MANIFEST.replace("  method: LoRA\n", &format!("  method: LoRA\n  evaluation: {{gates: [{gates}]}}\n"))
}

#[test]
fn the_same_manifest_trains_once_and_a_changed_one_makes_the_next_version() {
    let desk = desk();
    let first = published(&desk, MANIFEST);
    assert_eq!((first.version, first.metrics.steps), (1, 3));
    assert_eq!(published(&desk, MANIFEST), first);
    let second = published(&desk, &MANIFEST.replace("maxSteps: 3", "maxSteps: 4"));
    assert_eq!(second.version, 2);
    assert_eq!(published(&desk, MANIFEST), first, "the first version still serves its inputs");
    let files: Vec<_> = files_of(&desk, 1).into_iter().map(|file| file.path).collect();
    let expected = [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "loss_curve.svg",
        "runs/events.out.tfevents.0.tunesmith",
        "tokenizer.json",
        "tokenizer_config.json",
        "trainer_state.json",
    ];
    assert_eq!(files, expected);
}

#[test]
fn a_run_that_ended_while_it_published_goes_on_with_its_own_version() {
    let desk = desk();
    let first = published(&desk, MANIFEST);
    let version = desk.path().join("store/adapters/support/v1");
    fs::remove_file(version.join("manifest.json")).unwrap();
    assert_eq!(published(&desk, &MANIFEST.replace("maxSteps: 3", "maxSteps: 4")).version, 2, "it is another run's");
    fs::remove_dir_all(desk.path().join("store/adapters/support/v2")).unwrap();
    assert_eq!(published(&desk, MANIFEST).version, first.version);
}

#[test]
fn gates_are_judged_by_what_is_recorded_and_trained_anew_only_for_what_is_not() {
    let desk = desk();
    let first = published(&desk, MANIFEST);
    let loose =
        run_manifest(&desk, &with_gates("{metric: eval_loss, max: 100}, {metric: perplexity, max: 1.0e+9}")).unwrap();
    assert_eq!(loose.gates.iter().map(|gate| gate.passed).collect::<Vec<_>>(), [true, true]);
    assert_eq!(trained(loose), first);
    let strict = run_manifest(&desk, &with_gates("{metric: eval_loss, max: 0.01}")).unwrap();
    assert_eq!(strict.gates[0].value, first.metrics.eval_loss);
    assert!(!strict.gates[0].passed);
    assert_eq!(trained(strict).version, 1);

    // The probe lies beside the manifest; the training goes on from the last checkpoint and asks both models.
    let row = r#"{"id": "a", "question": "1 + 1 =", "must_contain": ["no model says this"]}"#;
    fs::write(desk.path().join("probe.jsonl"), row).unwrap();
    let gate = "{metric: recall, min: 0.5, probe: {uri: s3://datasets/support/probe.jsonl, maxNewTokens: 4}}";
    let asked = run_manifest(&desk, &with_gates(gate)).unwrap();
    assert_eq!((asked.gates[0].value, asked.gates[0].passed), (Some(0.0), false));
    let second = trained(asked);
    assert_eq!((second.version, second.metrics.base_recall, second.metrics.steps), (2, Some(0.0), 3));
    let weights = |version| files_of(&desk, version).into_iter().find(|file| file.path.ends_with(".safetensors"));
    assert_eq!(weights(2), weights(1));
    assert_eq!(published(&desk, &with_gates(gate)), second);
    // Other questions are another metric.
    fs::write(desk.path().join("probe.jsonl"), row.replace("1 + 1", "2 + 2")).unwrap();
    assert_eq!(published(&desk, &with_gates(gate)).version, 3);
}

#[test]
fn a_malformed_probe_row_is_named_before_anything_is_trained() {
    let desk = desk();
    fs::write(desk.path().join("probe.jsonl"), r#"{"id": "a", "question": "why?", "must_contain": []}"#).unwrap();
    let gate = "{metric: recall, min: 0.5, probe: {uri: s3://datasets/support/probe.jsonl}}";
    let error = run_manifest(&desk, &with_gates(gate)).err().unwrap();
    assert_eq!(error.exit_code(), 3);
    assert!(error.to_string().starts_with("probe.jsonl row 1: must_contain is empty"), "{error}");
    assert!(!desk.path().join("store/adapters/support/checkpoints").exists());
}

#[test]
fn a_missing_model_is_explained_with_the_place_where_it_belongs() {
    let error = run_manifest(&desk(), &MANIFEST.replace("models/tiny", "models/other")).err().unwrap();
    assert_eq!(error.exit_code(), 3);
    assert!(error.to_string().contains("store/models/other") && error.to_string().contains("convert"), "{error}");
}

#[test]
fn missing_data_is_named_by_its_uri() {
    let error = run_manifest(&desk(), &MANIFEST.replace("train.jsonl", "absent.jsonl")).err().unwrap();
    assert_eq!(error.exit_code(), 3);
    assert!(error.to_string().contains("no such object s3://datasets/support/absent.jsonl (dataset)"), "{error}");
}

#[test]
fn a_malformed_row_is_named_by_file_and_number() {
    let desk = desk();
    let path = desk.path().join("train.jsonl");
    let rows = fs::read_to_string(&path).unwrap();
    fs::write(&path, rows.replace("{\"prompt\": \"6", "{\"promt\": \"6")).unwrap();
    let error = run_manifest(&desk, MANIFEST).err().unwrap();
    assert_eq!(error.exit_code(), 3);
    assert_eq!(error.to_string(), "train.jsonl row 7: prompt is missing");
}

/// Eight rows in files of these names, in that order, and a manifest that asks for all of them.
fn desk_with_parts(folder: &str, names: [&str; 2]) -> (TempDir, String) {
    let desk = desk();
    let rows = fs::read_to_string(desk.path().join("train.jsonl")).unwrap();
    fs::create_dir_all(desk.path().join(folder)).unwrap();
    let middle = rows.match_indices('\n').nth(3).unwrap().0 + 1;
    for (name, rows) in names.into_iter().zip([&rows[..middle], &rows[middle..]]) {
        fs::write(desk.path().join(folder).join(name), rows).unwrap();
    }
    (desk, MANIFEST.replace("support/train.jsonl", "support/part-*"))
}

const IN_STORE: &str = "store/datasets/support";

#[test]
fn a_pattern_is_all_its_files_in_order_whatever_their_names() {
    let digest = |names| {
        let (desk, manifest) = desk_with_parts(IN_STORE, names);
        let report = published(&desk, &manifest);
        assert_eq!(report.dataset.rows, 6, "two of eight are held out");
        report.dataset.digest
    };
    let first = digest(["part-1", "part-2"]);
    assert_eq!(digest(["part-a.jsonl", "part-b.jsonl"]), first, "other names, same rows in the same order");
    assert_ne!(digest(["part-2", "part-1"]), first, "another order");
}

#[test]
fn a_row_of_a_pattern_is_named_by_its_own_file() {
    let (desk, manifest) = desk_with_parts(IN_STORE, ["part-1", "part-2"]);
    let path = desk.path().join(IN_STORE).join("part-2");
    let rows = fs::read_to_string(&path).unwrap();
    fs::write(&path, rows.replace("{\"prompt\": \"6", "{\"promt\": \"6")).unwrap();
    assert_eq!(run_manifest(&desk, &manifest).err().unwrap().to_string(), "part-2 row 3: prompt is missing");
}

#[test]
fn files_beside_the_manifest_stand_in_for_a_pattern_and_a_pattern_of_nothing_is_refused() {
    let (desk, manifest) = desk_with_parts("", ["part-1", "part-2"]);
    assert_eq!(published(&desk, &manifest).dataset.rows, 6);
    let error = run_manifest(&desk, &manifest.replace("part-*", "piece-*")).err().unwrap();
    assert_eq!(error.exit_code(), 3);
    assert!(error.to_string().contains("no object matches s3://datasets/support/piece-* (dataset)"), "{error}");
}

#[test]
fn a_check_finds_what_is_wrong_and_publishes_nothing() {
    let desk = desk();
    with_context(&desk, MANIFEST, check).unwrap();
    assert!(!desk.path().join("store/adapters/support/v1").exists());
    let error = with_context(&desk, &MANIFEST.replace("maxSteps: 3", "maxLength: 4, overflow: Error"), check);
    assert!(error.unwrap_err().to_string().contains("train.jsonl row 1: has 10 tokens"));
}

#[test]
fn another_chat_template_is_another_version_and_a_broken_one_is_the_jobs_fault() {
    let desk = desk();
    let first = published(&desk, MANIFEST);
    let with_template = |template: &str| {
        let dataset = format!("evalFraction: 0.2, chatTemplate: \"{template}\"");
        MANIFEST.replace("evalFraction: 0.2", &dataset)
    };
    let second = published(&desk, &with_template("{{ messages[0].content }}"));
    assert_eq!((first.version, second.version), (1, 2));
    let error = run_manifest(&desk, &with_template("{% if %}")).err().unwrap();
    assert_eq!(error.exit_code(), 2);
    assert!(error.to_string().starts_with("dataset.chatTemplate: "), "{error}");
}

#[test]
fn a_manifest_in_the_working_directory_has_its_data_beside_it() {
    let desk = desk();
    with_context(&desk, MANIFEST, |path, context| {
        let mut job = manifest::read(path).unwrap();
        let data = job.spec.dataset.train.uri.clone();
        stand_in(&mut job, Path::new(""), context).unwrap();
        assert_eq!(job.spec.dataset.train.uri, data, "no train.jsonl here");
    });
}

#[test]
fn identities_of_pods_are_named_and_not_used() {
    let desk = desk();
    let arn = "arn:aws:iam::123456789012:role/tuner";
    let account = format!("uri: s3://adapters, serviceAccountName: tuner, roleArn: '{arn}'}}");
    let manifest_of_pods = MANIFEST
        .replace("uri: s3://adapters}", &account)
        .replace("uri: s3://models/tiny}", &format!("uri: s3://models/tiny, roleArn: '{arn}'}}"));
    with_context(&desk, &manifest_of_pods, |path, context| {
        let note = for_pods(&manifest::read(path).unwrap().spec).unwrap();
        assert!(note.contains("alone: baseModel.roleArn, output.roleArn, output.serviceAccountName;"), "{note}");
        check(path, context).unwrap();
    });
    with_context(&desk, MANIFEST, |path, _| assert_eq!(for_pods(&manifest::read(path).unwrap().spec), None));
}

#[test]
fn a_check_says_what_the_run_takes_and_where_a_cluster_would_run_it() {
    let desk = desk();
    let told = |manifest: &str| {
        with_context(&desk, manifest, |path, context| {
            let mut job = manifest::read(path).unwrap();
            let (_, method, report) = prepare(&mut job, path, context).unwrap();
            forecast::lines(&job.spec, &method, &report)
        })
    };
    let of_class = |class: &str| {
        let [_, cluster] =
            told(&MANIFEST.replace("  output:", &format!("  resources: {{gpuClass: {class}}}\n  output:")));
        cluster
    };
    let [here, cluster] = told(MANIFEST);
    assert!(here.starts_with("here it takes about ") && here.contains("Mi of memory; "), "{here}");
    assert!(cluster.ends_with("as LoRA on GpuClass cpu: 1 pod without a GPU"), "{cluster}");
    let refused = of_class("consumer-24gb");
    assert!(refused.contains("refuses it: GpuClass consumer-24gb has GPUs, and"), "{refused}");
    let unknown = of_class("h200");
    assert!(unknown.starts_with("GpuClass h200 is none of the chart's defaults"), "{unknown}");
}
