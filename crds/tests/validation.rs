//! What the API server will refuse, tried here without one: every rule has a manifest that breaks it.

use kube::CustomResourceExt;
use serde_json::{Value, json};
use tunesmith_crds::{AdapterVersion, FineTuneJob, GpuClass};

/// A manifest in which every rule holds.
fn job() -> Value {
    json!({
        "apiVersion": "tunesmith.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "support-bot", "namespace": "telecom"},
        "spec": {
            "baseModel": {"uri": "s3://models/llama-2-7b"},
            "dataset": {"train": {"uri": "s3://datasets/train.jsonl"}, "evalFraction": 0.1},
            "method": "LoRA",
            "lora": {"rank": 16},
            "output": {"adapterName": "support-bot", "uri": "s3://adapters"},
        },
    })
}

/// Sets or (with null) removes the value at a JSON pointer.
fn with(mut manifest: Value, changes: &[(&str, Value)]) -> Value {
    for (pointer, value) in changes {
        let (parent, key) = pointer.rsplit_once('/').unwrap();
        let parent = manifest.pointer_mut(parent).unwrap().as_object_mut().unwrap();
        match value {
            Value::Null => parent.remove(key),
            value => parent.insert(key.into(), value.clone()),
        };
    }
    manifest
}

/// The messages of the rules that a FineTuneJob breaks.
fn refusals(manifest: Value) -> String {
    let job: FineTuneJob = serde_json::from_value(manifest).unwrap();
    match job.validate_cel() {
        Ok(()) => String::new(),
        Err(errors) => errors.to_string(),
    }
}

#[test]
fn a_sound_job_passes_every_rule() {
    assert_eq!(refusals(job()), "");
    let quantization = json!({"bits": 4, "type": "nf4"});
    assert_eq!(refusals(with(job(), &[("/spec/method", json!("QLoRA")), ("/spec/quantization", quantization)])), "");
    assert_eq!(refusals(with(job(), &[("/spec/method", json!("Full")), ("/spec/lora", Value::Null)])), "");
    for uri in ["hf://HuggingFaceTB/SmolLM2-135M-Instruct", "hf://owner/name@v1/m.gguf", "pvc://models/llama"] {
        assert_eq!(refusals(with(job(), &[("/spec/baseModel/uri", json!(uri))])), "");
    }
    for uri in [
        "hf://datasets/owner/name",
        "hf://datasets/owner/name@v1/data/train-*.parquet",
        "s3://datasets/my rows/part 1?#.jsonl",
        "pvc://rows/50% off.jsonl",
    ] {
        assert_eq!(refusals(with(job(), &[("/spec/dataset/train/uri", json!(uri))])), "");
    }
    for training in [
        json!({"evalSteps": 10, "earlyStoppingPatience": 3, "earlyStoppingThreshold": 0.01, "loadBestModelAtEnd": true}),
        json!({"lrSchedulerType": "cosine_with_restarts", "lrSchedulerKwargs": {"numCycles": 2}}),
        json!({"lrSchedulerType": "polynomial", "lrSchedulerKwargs": {"power": 2.0, "lrEnd": 0.0}}),
        json!({"lrSchedulerType": "inverse_sqrt", "onNonFinite": "Skip"}),
        json!({"lrSchedulerType": "warmup_stable_decay",
               "lrSchedulerKwargs": {"numDecaySteps": 4, "decayType": "1-sqrt", "minLrRatio": 0.1}}),
    ] {
        assert_eq!(refusals(with(job(), &[("/spec/training", training)])), "");
    }
}

#[test]
fn each_rule_refuses_the_manifest_that_breaks_it_and_says_what_to_do() {
    let int8_in_4_bits = json!({"bits": 4, "type": "int8"});
    let cases: &[(&[(&str, Value)], &str)] = &[
        (&[("/spec/method", json!("QLoRA"))], "method QLoRA needs quantization"),
        (&[("/spec/quantization", json!({"bits": 4, "type": "nf4"}))], "quantization is for method QLoRA or Auto only"),
        (&[("/spec/method", json!("Full"))], "method Full trains every parameter and takes no lora"),
        (&[("/spec/method", json!("QLoRA")), ("/spec/quantization", int8_in_4_bits)], "bits: 8 with type int8"),
        (&[("/spec/lora/rankPattern", json!({"q_proj": 0}))], "each rank must lie in 1..=1024"),
        (&[("/spec/lora/alphaPattern", json!({"q_proj": 0.0}))], "each alpha must be greater than 0"),
        (&[("/spec/lora/loraPlusLrRatio", json!(0.0))], "must be greater than 0"),
        (&[("/spec/training", json!({"neftuneNoiseAlpha": -1.0}))], "must be greater than 0"),
        (&[("/spec/dataset/evalFraction", Value::Null)], "exactly one of eval.uri and evalFraction"),
        (
            &[("/spec/dataset/eval", json!({"uri": "s3://datasets/e.jsonl"}))],
            "exactly one of eval.uri and evalFraction",
        ),
        (&[("/spec/dataset/evalFraction", json!(1.0))], "must lie between 0 and 1"),
        (&[("/spec/dataset/columns", json!({"question": "prompt"}))], "the names on the left are the format's columns"),
        (&[("/spec/dataset/columns", json!({"prompt": ""}))], "on the right, the files' own"),
        (&[("/spec/lora/dropout", json!(1.0))], "must lie in [0, 1)"),
        (&[("/spec/lora/alpha", json!(0.0))], "must be greater than 0"),
        (&[("/spec/training", json!({"learningRate": 0.0}))], "must be greater than 0"),
        (&[("/spec/training", json!({"warmupRatio": 1.5}))], "must lie in [0, 1]"),
        (&[("/spec/training", json!({"earlyStoppingPatience": 3}))], "earlyStoppingPatience counts evaluations"),
        (
            &[("/spec/training", json!({"evalSteps": 10, "earlyStoppingThreshold": 0.1}))],
            "earlyStoppingThreshold needs earlyStoppingPatience",
        ),
        (
            &[("/spec/training", json!({"evalSteps": 10, "earlyStoppingPatience": 1, "earlyStoppingThreshold": -0.1}))],
            "must not be negative",
        ),
        (&[("/spec/training", json!({"loadBestModelAtEnd": true}))], "loadBestModelAtEnd chooses between evaluations"),
        (&[("/spec/training", json!({"lrSchedulerKwargs": {"numCycles": 2}}))], "cosine_with_restarts only"),
        (&[("/spec/training", json!({"lrSchedulerKwargs": {"power": 2.0}}))], "lrSchedulerType polynomial only"),
        (&[("/spec/training", json!({"lrSchedulerKwargs": {"lrEnd": 0.0}}))], "lrSchedulerType polynomial only"),
        (
            &[("/spec/training", json!({"lrSchedulerType": "polynomial", "lrSchedulerKwargs": {"lrEnd": 0.01}}))],
            "lrEnd must be less than learningRate",
        ),
        (&[("/spec/training", json!({"lrSchedulerKwargs": {"minLrRatio": 0.1}}))], "warmup_stable_decay only"),
        (
            &[("/spec/training", json!({"lrSchedulerType": "warmup_stable_decay"}))],
            "warmup_stable_decay needs lrSchedulerKwargs.numDecaySteps",
        ),
        (&[("/spec/resources", json!({"memory": "lots"}))], "must be a quantity such as 4Gi"),
        (&[("/spec/output/adapterName", json!("Support_Bot"))], "must be a DNS label"),
        (&[("/spec/output/uri", json!("pvc://adapters"))], "versions are published to s3://bucket/folder"),
        (
            &[("/spec/dataset/train/uri", json!("hf://owner/name/t.jsonl"))],
            "data is read from s3://, gs://, az://, pvc://, file:// or hf://datasets/owner/name",
        ),
        (&[("/spec/baseModel/uri", json!("hf://datasets/owner/name"))], "a base model is hf://owner/name"),
        (&[("/spec/output/uri", json!("hf://datasets/owner/name"))], "versions are published to s3://bucket/folder"),
        (&[("/metadata/name", json!("support.bot"))], "metadata.name must be a DNS label of at most 40"),
    ];
    for (changes, message) in cases {
        let refused = refusals(with(job(), changes));
        assert!(refused.contains(message), "{changes:?}: expected `{message}`, got `{refused}`");
    }
}

#[test]
fn each_rule_of_a_gate_refuses_the_gate_that_breaks_it() {
    let gates = |gates: Value| refusals(with(job(), &[("/spec/evaluation", json!({"gates": gates}))]));
    let probe = json!({"uri": "s3://datasets/probe.jsonl"});
    let sound = json!([
        {"metric": "eval_loss", "max": 1.9},
        {"metric": "perplexity", "max": 6.7},
        {"metric": "recall", "min": 0.8, "probe": probe},
    ]);
    assert_eq!(gates(sound), "");
    for (gate, message) in [
        (json!({"metric": "recall"}), "metric recall needs min and probe"),
        (json!({"metric": "recall", "min": 0.8}), "metric recall needs min and probe"),
        (json!({"metric": "recall", "probe": probe}), "metric recall needs min and probe"),
        (json!({"metric": "recall", "min": 0.8, "max": 0.9, "probe": probe}), "recall takes min, not max"),
        (json!({"metric": "recall", "min": 0.0, "probe": probe}), "min is a share of the questions"),
        (json!({"metric": "recall", "min": 80.0, "probe": probe}), "min is a share of the questions"),
        (json!({"metric": "eval_loss"}), "need max"),
        (json!({"metric": "perplexity", "min": 2.0}), "need max"),
        (json!({"metric": "eval_loss", "max": 2.0, "min": 0.5}), "min and probe are for metric recall only"),
        (json!({"metric": "eval_loss", "max": 2.0, "probe": probe}), "min and probe are for metric recall only"),
        (json!({"metric": "eval_loss", "max": 0.0}), "max must be greater than 0"),
        (json!({"metric": "perplexity", "max": 1.0}), "than 1 for perplexity"),
    ] {
        let refused = gates(json!([gate]));
        assert!(refused.contains(message), "{gate}: expected `{message}`, got `{refused}`");
    }
    let twice = json!([{"metric": "eval_loss", "max": 1.9}, {"metric": "eval_loss", "max": 2.9}]);
    assert!(gates(twice).contains("give each metric one gate"));
}

#[test]
fn a_role_is_for_s3_and_assumed_by_a_service_account() {
    let arn = "arn:aws:iam::123456789012:role/tuner";
    let roles = ["/spec/baseModel/roleArn", "/spec/dataset/roleArn", "/spec/output/roleArn"];
    let account = ("/spec/output/serviceAccountName", json!("tuner"));
    for role in roles {
        let with = |changes: &[(&str, Value)]| refusals(with(job(), &[&[(role, json!(arn))], changes].concat()));
        assert_eq!(with(std::slice::from_ref(&account)), "", "{role}");
        assert!(with(&[]).contains("set output.serviceAccountName"), "{role}: {}", with(&[]));
        let uri = role.replace("dataset/roleArn", "dataset/train/roleArn").replace("roleArn", "uri");
        let elsewhere = with(&[account.clone(), (&uri, json!("gs://elsewhere/x"))]);
        assert!(elsewhere.contains("roleArn is for s3:// alone"), "{role}: {elsewhere}");
    }
    let eval = [account.clone(), (roles[1], json!(arn)), ("/spec/dataset/evalFraction", Value::Null)];
    let eval = [&eval[..], &[("/spec/dataset/eval", json!({"uri": "gs://data/eval.jsonl"}))]].concat();
    assert!(refusals(with(job(), &eval)).contains("roleArn is for s3:// alone"));
    for role in ["arn:aws-cn:iam::123456789012:role/a/b/tuner", "arn:aws-us-gov:iam::123456789012:role/x+=,.@-_"] {
        assert_eq!(refusals(with(job(), &[(roles[2], json!(role)), account.clone()])), "", "{role}");
    }
    for role in [
        "tuner",
        "arn:aws:iam::12345678901:role/tuner",
        "arn:aws:iam::123456789012:user/tuner",
        "arn:aws:iam::123456789012:role/",
        "arn:aws:iam::123456789012:role/a b",
        "arn:aws:sts::123456789012:assumed-role/tuner/x",
        "arn:aws:iam::123456789012:role/tuner\n",
    ] {
        let refused = refusals(with(job(), &[(roles[2], json!(role)), account.clone()]));
        assert!(refused.contains("must be the ARN of an IAM role"), "{role}: {refused}");
    }
}

#[test]
fn a_uri_of_an_unknown_scheme_is_no_job_at_all() {
    let manifest = with(job(), &[("/spec/baseModel/uri", json!("gopher://models"))]);
    let error = serde_json::from_value::<FineTuneJob>(manifest).unwrap_err().to_string();
    assert!(error.contains("s3://bucket/key"), "{error}");
}

#[test]
fn what_no_option_has_for_a_value_is_no_job_at_all() {
    for (pointer, value) in [("/spec/dataset/format", json!("CSV")), ("/spec/training", json!({"overflow": "Split"}))] {
        let error = serde_json::from_value::<FineTuneJob>(with(job(), &[(pointer, value)])).unwrap_err().to_string();
        assert!(error.contains("unknown variant"), "{error}");
    }
}

#[test]
fn a_pattern_of_files_and_every_option_of_the_data_pass() {
    let changes = [
        ("/spec/dataset/train/uri", json!("s3://datasets/support/part-*.parquet")),
        ("/spec/dataset/train/uri", json!("gs://datasets/support/part-*.parquet")),
        ("/spec/output/uri", json!("az://adapters/team")),
        (
            "/spec/output",
            json!({"adapterName": "a", "uri": "az://adapters", "secretRef": {"name": "account"},
                   "serviceAccountName": "tuner"}),
        ),
        ("/spec/dataset/format", json!("ShareGPT")),
        ("/spec/dataset/columns", json!({"prompt": "question", "completion": "answer"})),
        ("/spec/dataset/onBadRow", json!("Skip")),
        ("/spec/dataset/chatTemplate", json!("{% for m in messages %}{{ m.content }}{% endfor %}")),
        ("/spec/training", json!({"maxLength": 512, "overflow": "Drop"})),
    ];
    assert_eq!(refusals(with(job(), &changes)), "");
}

#[test]
fn bounds_and_defaults_are_in_the_schema() {
    let crd = serde_json::to_value(FineTuneJob::crd()).unwrap();
    let spec = &crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"];
    let rank = &spec["lora"]["properties"]["rank"];
    assert_eq!((&rank["minimum"], &rank["maximum"], &rank["default"]), (&json!(1.0), &json!(1024.0), &json!(8)));
    assert_eq!(spec["training"]["properties"]["learningRate"]["default"], json!(2e-4));
    assert_eq!(spec["training"]["default"]["numTrainEpochs"], json!(3.0));
    assert_eq!(spec["method"]["default"], json!("Auto"));
    let gates = &spec["evaluation"]["properties"]["gates"];
    assert_eq!(gates["maxItems"], json!(8));
    let probe = &gates["items"]["properties"]["probe"]["properties"];
    assert_eq!(probe["maxNewTokens"]["default"], json!(120));
    assert_eq!(spec["training"]["properties"]["overflow"]["enum"], json!(["Truncate", "Drop", "Error"]));
    assert_eq!(spec["training"]["default"]["overflow"], json!("Truncate"));
    let dataset = &spec["dataset"]["properties"];
    assert_eq!(
        (&dataset["chatTemplate"]["minLength"], &dataset["chatTemplate"]["maxLength"]),
        (&json!(1), &json!(65_536))
    );
    assert!(dataset["format"]["enum"].as_array().unwrap().contains(&json!("ShareGPT")));
}

/// Whether every property below has a description, which `kubectl explain` shows.
fn undescribed(path: &str, schema: &Value, missing: &mut Vec<String>) {
    for (name, property) in schema["properties"].as_object().into_iter().flatten() {
        let path = format!("{path}.{name}");
        if property["description"].as_str().is_none_or(str::is_empty) {
            missing.push(path.clone());
        }
        undescribed(&path, property, missing);
    }
    if schema["items"].is_object() {
        undescribed(&format!("{path}[]"), &schema["items"], missing);
    }
}

#[test]
fn every_field_has_a_description() {
    for crd in [FineTuneJob::crd(), AdapterVersion::crd(), GpuClass::crd()] {
        let schema = serde_json::to_value(&crd).unwrap()["spec"]["versions"][0]["schema"]["openAPIV3Schema"].clone();
        let mut missing = Vec::new();
        undescribed(&crd.spec.names.kind, &schema["properties"]["spec"], &mut missing);
        undescribed(&crd.spec.names.kind, &schema["properties"]["status"], &mut missing);
        assert!(missing.is_empty(), "without a description: {missing:#?}");
    }
}

#[test]
fn the_spec_of_an_adapter_version_never_changes() {
    let digest = format!("sha256:{}", "0".repeat(64));
    let version: AdapterVersion = serde_json::from_value(json!({
        "apiVersion": "tunesmith.dev/v1alpha1",
        "kind": "AdapterVersion",
        "metadata": {"name": "support-bot-v1", "namespace": "telecom"},
        "spec": {
            "adapterName": "support-bot",
            "version": 1,
            "artifact": {"type": "LoraAdapter", "uri": "s3://adapters/support-bot/v1",
                         "manifestUri": "s3://adapters/support-bot/v1/manifest.json", "manifestDigest": digest,
                         "fileCount": 1, "sizeBytes": 1},
            "baseModel": {"uri": "s3://models/m", "digest": digest},
            "dataset": {"digest": digest, "rows": 1, "tokens": 1},
            "method": "LoRA",
            "hyperparameters": {},
            "source": {"job": "support-bot", "uid": "u", "generation": 1, "run": 1, "inputDigest": digest,
                       "trainerImage": "tunesmith-trainer:dev"},
            "metrics": {"steps": 1, "tokens": 1, "trainSeconds": 1.0},
        },
    }))
    .unwrap();
    let mut changed = version.clone();
    assert!(changed.validate_cel_update(&version).is_ok());
    changed.spec.artifact.uri = "s3://elsewhere/v1".parse().unwrap();
    assert!(changed.validate_cel_update(&version).unwrap_err().to_string().contains("immutable"));
}

#[test]
fn a_class_of_gpus_and_a_class_of_cpus_are_told_apart() {
    let refusals = |spec: Value| {
        let class: GpuClass = serde_json::from_value(json!({
            "apiVersion": "tunesmith.dev/v1alpha1", "kind": "GpuClass", "metadata": {"name": "c"}, "spec": spec,
        }))
        .unwrap();
        class.validate_cel().err().map(|errors| errors.to_string()).unwrap_or_default()
    };
    let lora = |gpus: u32| json!([{"method": "LoRA", "gpus": gpus}]);
    assert_eq!(refusals(json!({"methods": lora(0)})), "");
    assert_eq!(refusals(json!({"resourceName": "nvidia.com/gpu", "memory": "24Gi", "methods": lora(1)})), "");
    assert!(refusals(json!({"resourceName": "nvidia.com/gpu", "methods": lora(1)})).contains("needs both"));
    assert!(refusals(json!({"methods": lora(1)})).contains("gpus must be 0"));
    let idle = json!({"resourceName": "nvidia.com/gpu", "memory": "24Gi", "methods": lora(0)});
    assert!(refusals(idle).contains("at least 1 GPU"));
    assert!(refusals(json!({"methods": [{"method": "Auto", "gpus": 0}]})).contains("must be Full, LoRA or QLoRA"));
}
