//! Whole runs of a tiny model over folders: checkpoints, resumption and publishing.

mod best;
mod execution;
mod gates;
mod methods;
mod non_finite;
mod preflight;

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::runtime::Runtime;
use tunesmith_crds::{
    FineTuneJob, Method, RunReport, RunSpec,
    adapter_version::Artifact,
    digest::input_digest,
    fine_tune_job::Lora,
    names::exit_code,
    run::{MAX_REPORT_BYTES, Outcome, TrainReport, TrainTask, Verdict},
};

use super::{Context, train};
use crate::{
    error::Error,
    generate::Writer,
    model::Keep,
    preflight::preflight,
    progress::Progress,
    publish::Manifest,
    stop::Stop,
    store::{Role, Stores},
    tiny_model,
    verify::verify,
};

/// The day of a template that writes one.
const TODAY: chrono::NaiveDate = chrono::NaiveDate::from_ymd_opt(2026, 11, 27).unwrap();

/// A model, data, and folders for results and downloads.
struct Bench {
    runtime: Runtime,
    folder: TempDir,
}

impl Bench {
    fn new() -> Self {
        let bench = Self { runtime: Runtime::new().unwrap(), folder: tempfile::tempdir().unwrap() };
        tiny_model::write(&bench.path("model")).unwrap();
        let rows = |from: usize, to: usize| -> String {
            let row = |i: usize| {
                let question = "what? ".repeat(1 + i % 4);
                let messages = [("user", question), ("assistant", format!("answer number {}", i % 3))];
                let messages = messages.map(|(role, content)| json!({"role": role, "content": content}));
                format!("{}\n", json!({"messages": messages}))
            };
            (from..to).map(row).collect()
        };
        fs::write(bench.path("train.jsonl"), rows(0, 14)).unwrap();
        fs::write(bench.path("eval.jsonl"), rows(14, 18)).unwrap();
        bench
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A job with two epochs of seven steps; `training` replaces options.
    fn spec(&self, training: Value) -> RunSpec {
        let uri = |name: &str| format!("file://{}", self.path(name).display());
        let mut job = json!({
            "apiVersion": "tunesmith.dev/v1alpha1", "kind": "FineTuneJob",
            "metadata": {"name": "support", "namespace": "telecom", "uid": "0b5f8d5e-0000-4000-8000-000000000000"},
            "spec": {
                "baseModel": {"uri": uri("model")},
                "dataset": {"train": {"uri": uri("train.jsonl")}, "eval": {"uri": uri("eval.jsonl")}},
                "method": "LoRA",
                "lora": {"rank": 2, "alpha": 4, "dropout": 0.1},
                "training": {"numTrainEpochs": 2, "learningRate": 0.01, "loggingSteps": 3, "saveSteps": 4,
                             "warmupSteps": 1, "maxLength": 256},
                "output": {"adapterName": "support", "uri": uri("adapters")},
            },
        });
        let options = job["spec"]["training"].as_object_mut().unwrap();
        options.extend(training.as_object().unwrap().clone());
        let job: FineTuneJob = serde_json::from_value(job).unwrap();
        RunSpec::preflight(&job, 1)
    }

    fn with_context<T>(&self, stop: &Stop, work: impl FnOnce(Context<'_>) -> T) -> T {
        let stores = Stores::from_environment(self.runtime.handle().clone());
        let context = Context { stores: &stores, work: &self.path("work"), progress: &Progress::new(), stop };
        work(context)
    }

    fn checked(&self, training: Value, version: u32) -> RunSpec {
        self.check(self.spec(training), version)
    }

    /// The spec after its preflight.
    fn check(&self, spec: RunSpec, version: u32) -> RunSpec {
        let report =
            self.with_context(&Stop::default(), |context| preflight(&spec, context, Keep::Headers)).unwrap().report;
        let method = spec.method.clone().unwrap();
        let task = TrainTask {
            version,
            input_digest: input_digest(&spec, &method, &report),
            base_digest: report.base_digest,
            dataset_digest: report.dataset.digest,
            template_date: report.template_date,
            numerics_version: report.numerics_version,
            copy_of: None,
            trainer_image: "registry.example.com/tunesmith/tunesmith-trainer:v0.1.0".into(),
            cluster: String::new(),
        };
        spec.with_training(method, task)
    }

    fn train(&self, spec: &RunSpec, stop: &Stop) -> Result<Outcome, Error> {
        self.with_context(stop, |context| train(spec, context))
    }

    fn publish(&self, training: Value, version: u32) -> TrainReport {
        trained(self.train(&self.checked(training, version), &Stop::default()).unwrap())
    }

    fn weights(&self, version: u32) -> Vec<u8> {
        fs::read(self.path(&format!("adapters/support/v{version}/adapter_model.safetensors"))).unwrap()
    }

    fn checkpoints(&self) -> PathBuf {
        let folders = fs::read_dir(self.path("adapters/support/checkpoints")).unwrap();
        folders.map(|folder| folder.unwrap().path()).next().unwrap()
    }

    fn forget(&self) {
        fs::remove_dir_all(self.path("adapters")).unwrap();
    }
}

fn trained(outcome: Outcome) -> TrainReport {
    match outcome {
        Outcome::Trained(report) => report,
        other => panic!("not trained: {other:?}"),
    }
}

fn log(version: &Path) -> Value {
    let text = fs::read(version.join("trainer_state.json")).unwrap();
    serde_json::from_slice::<Value>(&text).unwrap()["log_history"].clone()
}

#[test]
fn a_run_publishes_an_adapter_that_learned_and_the_engine_loads() {
    let bench = Bench::new();
    let report = bench.publish(json!({}), 1);
    let (before, after) = (report.metrics.base_eval_loss.unwrap(), report.metrics.eval_loss.unwrap());
    assert!(after < before - 0.1, "eval loss {before} -> {after}");
    assert_eq!(report.metrics.steps, 14);
    let mut model = tunesmith_engine::Model::load(&bench.path("model")).unwrap();
    model.load_adapter(&bench.path("adapters/support/v1")).unwrap();
    let log = log(&bench.path("adapters/support/v1"));
    let steps: Vec<u64> = log.as_array().unwrap().iter().map(|entry| entry["step"].as_u64().unwrap()).collect();
    assert_eq!(steps, [0, 3, 6, 9, 12, 14, 14]);
}

#[test]
fn a_run_that_is_stopped_again_and_again_ends_with_the_same_bytes() {
    let bench = Bench::new();
    // Two micro-batches a step, so that some stops fall into the middle of one; evaluations on the way.
    let training = json!({"perDeviceTrainBatchSize": 1, "gradientAccumulationSteps": 2, "evalSteps": 5});
    let spec = bench.checked(training, 1);
    let whole = trained(bench.train(&spec, &Stop::default()).unwrap());
    let (weights, history) = (bench.weights(1), log(&bench.path("adapters/support/v1")));
    for checks in [3, 4, 7, 12] {
        bench.forget();
        let mut stops = 0;
        let report = loop {
            match bench.train(&spec, &Stop::after(checks)).unwrap() {
                Outcome::Preempted { .. } => stops += 1,
                outcome => break trained(outcome),
            }
            assert!(stops < 40, "no progress from stop to stop");
        };
        assert!(stops > 1);
        assert!(bench.weights(1) == weights, "other weights after {stops} stops, each after {checks} checks");
        assert_eq!(log(&bench.path("adapters/support/v1")), history);
        assert_eq!(report.metrics.base_eval_loss, whole.metrics.base_eval_loss);
        assert_eq!(report.metrics.tokens, whole.metrics.tokens);
    }
}

#[test]
fn a_run_that_was_killed_goes_on_from_its_last_whole_checkpoint() {
    let bench = Bench::new();
    let spec = bench.checked(json!({}), 1);
    bench.train(&spec, &Stop::default()).unwrap();
    let weights = bench.weights(1);
    bench.forget();
    // As a kill in the middle of saving would leave it: the last checkpoint is not whole.
    let stopped = bench.train(&spec, &Stop::after(11)).unwrap();
    assert_eq!(stopped, Outcome::Preempted { step: 10 });
    let mut kept: Vec<_> = fs::read_dir(bench.checkpoints()).unwrap().map(|e| e.unwrap().file_name()).collect();
    kept.sort();
    assert_eq!(kept, ["step-10", "step-8"], "saveTotalLimit is 2");
    fs::remove_file(bench.checkpoints().join("step-10/COMPLETE.json")).unwrap();
    let report = trained(bench.train(&spec, &Stop::default()).unwrap());
    assert_eq!(report.metrics.steps, 14);
    assert!(bench.weights(1) == weights);
}

#[test]
fn checkpoints_go_when_their_version_is_published_at_the_latest_on_the_next_start() {
    let bench = Bench::new();
    let spec = bench.checked(json!({}), 1);
    bench.train(&spec, &Stop::after(11)).unwrap();
    let (checkpoint, saved) = (bench.checkpoints().join("step-10"), bench.path("saved"));
    fs::create_dir(&saved).unwrap();
    let copy = |from: &Path, to: &Path| {
        for file in fs::read_dir(from).unwrap() {
            let name = file.unwrap().file_name();
            fs::copy(from.join(&name), to.join(&name)).unwrap();
        }
    };
    copy(&checkpoint, &saved);
    let published = trained(bench.train(&spec, &Stop::default()).unwrap());
    assert!(!bench.path("adapters/support/checkpoints").exists());
    // As a crash between the manifest and the removal would leave it.
    fs::create_dir_all(&checkpoint).unwrap();
    copy(&saved, &checkpoint);
    assert_eq!(trained(bench.train(&spec, &Stop::default()).unwrap()), published);
    assert!(!bench.path("adapters/support/checkpoints").exists());
}

#[test]
fn a_version_comes_with_the_base_models_tokenizer() {
    let bench = Bench::new();
    fs::write(bench.path("model/special_tokens_map.json"), r#"{"eos_token": "<|im_end|>"}"#).unwrap();
    fs::write(bench.path("model/chat_template.jinja"), "{% for m in messages %}{{ m['content'] }}{% endfor %}")
        .unwrap();
    bench.publish(json!({"maxSteps": 2}), 1);
    let manifest = Manifest::parse(&fs::read(bench.path("adapters/support/v1/manifest.json")).unwrap()).unwrap();
    for name in ["chat_template.jinja", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"] {
        let read = |folder: &str| fs::read(bench.path(folder).join(name)).unwrap();
        assert_eq!(read("adapters/support/v1"), read("model"), "{name}");
        assert!(manifest.files.iter().any(|file| file.path == name), "{name} is not in the manifest");
    }
}

#[test]
fn a_version_is_asked_with_the_chat_template_that_it_was_trained_with() {
    let bench = Bench::new();
    let template = "{% for m in messages %}[{{ m['content'] }}]{{ eos_token }}{% endfor %}";
    let mut spec = bench.spec(json!({"maxSteps": 2}));
    spec.dataset.chat_template = Some(template.into());
    trained(bench.train(&bench.check(spec, 1), &Stop::default()).unwrap());
    let read = |name: &str| fs::read_to_string(bench.path("adapters/support/v1").join(name)).unwrap();
    assert_eq!(read("chat_template.jinja"), template);

    let load = |adapter: Option<&str>| {
        let stores = Stores::from_environment(bench.runtime.handle().clone());
        let path = |name: &str| bench.path(name).display().to_string();
        let writer = Writer::load(&path("model"), adapter.map(path).as_deref(), &stores, &bench.path("work")).unwrap();
        writer.into_parts().1.prompt(None, "Hi").unwrap()
    };
    let (base, tuned) = (load(None), load(Some("adapters/support/v1")));
    assert_eq!(tuned.len(), "[Hi]".len() + 1, "a token a byte, and the end token");
    assert!(base.len() > tuned.len(), "{base:?}");
}

#[test]
fn accumulation_weighs_tokens_not_micro_batches() {
    let bench = Bench::new();
    // Dropout draws other masks for other micro-batches, so it is off.
    let without_dropout = |mut spec: RunSpec| {
        spec.method = Some(Method::LoRA { lora: Lora { rank: 2, dropout: 0.0, ..Lora::default() } });
        spec
    };
    let mut losses = Vec::new();
    for (version, (batch, accumulation)) in [(4, 1), (1, 4), (2, 2)].into_iter().enumerate() {
        let training = json!({"perDeviceTrainBatchSize": batch, "gradientAccumulationSteps": accumulation});
        let spec = without_dropout(bench.checked(training, version as u32 + 1));
        losses.push(trained(bench.train(&spec, &Stop::default()).unwrap()).metrics.eval_loss.unwrap());
    }
    assert!(losses.iter().all(|loss| (loss - losses[0]).abs() < 1e-4), "{losses:?}");
}

#[test]
fn the_same_version_is_published_once_and_never_overwritten() {
    let bench = Bench::new();
    let spec = bench.checked(json!({}), 1);
    let first = trained(bench.train(&spec, &Stop::default()).unwrap());
    assert_eq!(trained(bench.train(&spec, &Stop::default()).unwrap()), first);
    let other = bench.checked(json!({"seed": 7}), 1);
    let error = bench.train(&other, &Stop::default()).unwrap_err();
    assert_eq!(error.exit_code(), exit_code::VERSION_TAKEN);
    assert!(
        error.to_string().contains("version conflict") && error.to_string().contains("run 1 of support"),
        "{error}"
    );
}

#[test]
fn a_version_that_another_run_has_claimed_is_left_alone() {
    let bench = Bench::new();
    let spec = bench.checked(json!({}), 1);
    let mut other = spec.clone();
    (other.job.namespace, other.job.uid) = ("staging".into(), "1".into());
    other.train.as_mut().unwrap().cluster = "west".into();
    let version = bench.path("adapters/support/v1");
    trained(bench.train(&other, &Stop::default()).unwrap());
    // The other run is in the middle of its writing.
    fs::remove_file(version.join("manifest.json")).unwrap();
    fs::write(version.join("adapter_model.safetensors"), b"half").unwrap();
    assert_eq!(
        bench.with_context(&Stop::default(), |context| {
            preflight(&bench.spec(json!({})), context, Keep::Headers).unwrap().report.highest_version
        }),
        1
    );
    let error = bench.train(&spec, &Stop::default()).unwrap_err();
    assert_eq!(error.exit_code(), exit_code::VERSION_TAKEN);
    assert!(error.to_string().contains("run 1 of staging/support in cluster west"), "{error}");
    assert_eq!(bench.weights(1), b"half");
    // Its own next attempt makes it good.
    trained(bench.train(&other, &Stop::default()).unwrap());
    assert_ne!(bench.weights(1), b"half");
}

#[test]
fn a_crash_before_the_manifest_leaves_nothing_visible_and_is_made_good() {
    let bench = Bench::new();
    let spec = bench.checked(json!({}), 1);
    let first = trained(bench.train(&spec, &Stop::default()).unwrap());
    let version = bench.path("adapters/support/v1");
    fs::remove_file(version.join("manifest.json")).unwrap();
    fs::write(version.join("adapter_model.safetensors"), b"half").unwrap();
    assert_eq!(trained(bench.train(&spec, &Stop::default()).unwrap()).file_count, first.file_count);
    assert_ne!(bench.weights(1), b"half");
}

#[test]
fn inputs_that_changed_after_preflight_are_to_be_checked_again() {
    let bench = Bench::new();
    let spec = bench.checked(json!({}), 1);
    let mut other = spec.clone();
    other.train.as_mut().unwrap().numerics_version = u32::MAX;
    let error = bench.train(&other, &Stop::default()).unwrap_err();
    assert_eq!(error.exit_code(), exit_code::INPUTS_CHANGED);
    assert!(error.to_string().contains("arithmetic"), "{error}");

    let data = fs::read_to_string(bench.path("train.jsonl")).unwrap();
    fs::write(bench.path("train.jsonl"), data.replace("answer", "reply")).unwrap();
    let error = bench.train(&spec, &Stop::default()).unwrap_err();
    assert_eq!(error.exit_code(), exit_code::INPUTS_CHANGED);
    assert!(error.to_string().contains("the dataset has changed"), "{error}");
}

#[test]
fn an_adapter_that_learned_nothing_is_not_published() {
    let bench = Bench::new();
    // The one step is all warm-up, with learning rate 0.
    let spec = bench.checked(json!({"maxSteps": 1}), 1);
    let error = bench.train(&spec, &Stop::default()).unwrap_err();
    assert_eq!(error.exit_code(), exit_code::BAD_INPUT);
    assert!(error.to_string().contains("lora_B") && error.to_string().contains("warmupSteps"), "{error}");
    assert!(!bench.path("adapters/support/v1").exists());
}

#[test]
fn a_loss_that_explodes_names_step_and_rows() {
    let bench = Bench::new();
    let spec = bench.checked(json!({"learningRate": 1e39, "maxGradNorm": 0}), 1);
    let error = bench.train(&spec, &Stop::default()).unwrap_err();
    assert_eq!(error.exit_code(), exit_code::BAD_INPUT);
    let text = error.to_string();
    assert!(text.starts_with("step 3: the ") && text.contains("on rows "), "{text}");
}

#[test]
fn the_report_fits_a_termination_message() {
    let bench = Bench::new();
    let mut report = bench.publish(json!({}), 1);
    report.uri = format!("s3://{}/{}/v1234", "b".repeat(63), "a".repeat(200)).parse().unwrap();
    let number = Some(12345.678901);
    let metrics = &mut report.metrics;
    (metrics.base_perplexity, metrics.perplexity, metrics.base_recall, metrics.recall) =
        (number, number, number, number);
    metrics.probe_digest = Some(format!("sha256:{}", "0".repeat(64)));
    let text = RunReport::new(Outcome::Trained(report)).to_termination_message();
    assert!(text.len() < MAX_REPORT_BYTES / 2, "{} bytes", text.len());
    RunReport::from_termination_message(&text).unwrap();
}

#[test]
fn a_damaged_or_missing_file_fails_verification() {
    let bench = Bench::new();
    let report = bench.publish(json!({}), 1);
    let artifact = Artifact {
        kind: tunesmith_crds::adapter_version::ArtifactType::LoraAdapter,
        uri: report.uri.clone(),
        manifest_uri: report.uri.join("manifest.json"),
        manifest_digest: report.manifest_digest,
        file_count: report.file_count,
        size_bytes: report.size_bytes,
        secret_ref: None,
        service_account_name: None,
        role_arn: None,
    };
    let check = || {
        let folder =
            Stores::from_environment(bench.runtime.handle().clone()).open(Role::Output, &artifact.uri).unwrap();
        verify(&artifact, &folder).unwrap()
    };
    assert_eq!((check().verdict, check().message.as_str()), (Verdict::Intact, ""));
    let weights = bench.path("adapters/support/v1/adapter_model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&weights, bytes).unwrap();
    assert_eq!(check().verdict, Verdict::Corrupt);
    assert!(check().message.contains("adapter_model.safetensors is not what was published"));
    fs::remove_file(&weights).unwrap();
    assert_eq!(check().verdict, Verdict::Missing);
}

#[test]
fn preflight_tells_what_the_planner_needs_and_refuses_what_cannot_be_trained() {
    let bench = Bench::new();
    let check = |spec: &RunSpec| {
        bench
            .with_context(&Stop::default(), |context| preflight(spec, context, Keep::Headers).map(|found| found.report))
    };
    let report = check(&bench.spec(json!({}))).unwrap();
    assert_eq!((report.total_steps, report.dataset.rows, report.eval_rows), (14, 14, 4));
    // Rank 2; q_proj: 32 + 32; v_proj: 32 + 16; two layers.
    assert_eq!(report.lora_parameters, 2 * 2 * (64 + 48));
    assert_eq!((report.model.bytes_per_parameter, report.highest_version), (4, 0));
    assert_eq!(report.probe_digest, None);
    let asked = check(&bench.asked(bench.spec(json!({})), "why?", "x")).unwrap().probe_digest;
    assert!(asked.is_some() && asked != check(&bench.asked(bench.spec(json!({})), "how?", "x")).unwrap().probe_digest);
    bench.publish(json!({}), 1);
    assert_eq!(check(&bench.spec(json!({}))).unwrap().highest_version, 1);

    let full = RunSpec { method: Some(Method::Full), ..bench.spec(json!({})) };
    assert_eq!(check(&full).unwrap().lora_parameters, 0);
    // What is trained beside the matrices takes memory too, and Auto has the job's options.
    let lora = Lora {
        rank: 3,
        use_dora: true,
        modules_to_save: vec!["input_layernorm".into()],
        rank_pattern: [("v_proj".to_owned(), 2)].into(),
        ..Lora::default()
    };
    let auto = RunSpec { method: None, lora: lora.clone(), ..bench.spec(json!({})) };
    assert_eq!(check(&auto).unwrap().lora_parameters, 2 * (3 * 64 + 2 * 48 + 32 + 16 + 32));
    let lora = Lora { modules_to_save: vec!["lm_hat".into()], ..lora };
    let error = check(&RunSpec { method: None, lora, ..bench.spec(json!({})) }).unwrap_err().to_string();
    assert!(error.contains("modules_to_save: \"lm_hat\" is no lm_head, embed_tokens or norm"), "{error}");
    let lora = Lora { target_modules: vec!["q_proj".into(), "nose_proj".into()], ..Lora::default() };
    let error = check(&RunSpec { method: Some(Method::LoRA { lora }), ..bench.spec(json!({})) }).unwrap_err();
    assert_eq!(error.exit_code(), exit_code::BAD_SPEC);
    assert!(error.to_string().contains("\"nose_proj\" matches no linear layer"), "{error}");

    fs::remove_file(bench.path("model/tokenizer.json")).unwrap();
    let error = check(&bench.spec(json!({}))).unwrap_err();
    assert_eq!(error.exit_code(), exit_code::BAD_INPUT);
    assert!(error.to_string().contains("has no tokenizer.json"), "{error}");
}

#[test]
fn the_trainer_state_has_the_fields_that_transformers_knows_and_no_other() {
    let bench = Bench::new();
    let training = json!({"maxSteps": 4, "evalSteps": 2, "loadBestModelAtEnd": true, "earlyStoppingPatience": 9});
    bench.publish(training, 1);
    let text = fs::read(bench.path("adapters/support/v1/trainer_state.json")).unwrap();
    let state: Value = serde_json::from_slice(&text).unwrap();
    let fields: Vec<&str> = state.as_object().unwrap().keys().map(String::as_str).collect();
    // Those of transformers 5.23's TrainerState, which raises at any other.
    let theirs = "best_global_step best_metric best_model_checkpoint epoch eval_steps global_step is_hyper_param_search \
        is_local_process_zero is_world_process_zero log_history logging_steps max_steps num_input_tokens_seen \
        num_train_epochs save_steps stateful_callbacks total_flos train_batch_size trial_name trial_params";
    assert_eq!(fields, theirs.split(' ').collect::<Vec<_>>());
    assert_eq!(state["best_metric"], log(&bench.path("adapters/support/v1"))[4]["eval_loss"]);
}
