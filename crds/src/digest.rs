//! The digest of everything that decides a run's result: inputs with the same digest are not trained twice.

use std::collections::BTreeMap;

use serde::Serialize;
use sha2::{Digest, Sha256};

use crate::{
    fine_tune_job::{
        DataFormat, Dataset, LrScheduler, LrSchedulerKwargs, OnBadRow, OnNonFinite, Optim, Overflow, Training,
    },
    method::Method,
    run::{PreflightReport, RunSpec},
};

/// The inputs of the digest, in the order in which it is written. How often a run logs and saves is left out, and so are
/// recomputation and the gates: they change nothing in the weights. How often it evaluates goes in where evaluations decide
/// which weights are published.
#[derive(Serialize)]
struct Inputs<'a> {
    numerics_version: u32,
    base: &'a str,
    dataset: &'a str,
    format: DataFormat,
    columns: &'a BTreeMap<String, String>,
    on_bad_row: OnBadRow,
    chat_template: Option<&'a str>,
    template_date: Option<&'a str>,
    assistant_only_loss: bool,
    eval_fraction: Option<f64>,
    method: &'a Method,
    num_train_epochs: f64,
    max_steps: Option<u64>,
    global_batch_size: u64,
    optim: Optim,
    learning_rate: f64,
    lr_scheduler_type: LrScheduler,
    lr_scheduler_kwargs: LrSchedulerKwargs,
    warmup_ratio: f64,
    warmup_steps: Option<u64>,
    weight_decay: f64,
    max_grad_norm: f64,
    on_non_finite: OnNonFinite,
    max_length: u32,
    overflow: Overflow,
    packing: bool,
    seed: u64,
    neftune_noise_alpha: Option<f64>,
    bf16: bool,
    evaluation: Option<Evaluation>,
}

/// How evaluations decide which weights are published.
#[derive(Serialize)]
struct Evaluation {
    eval_steps: Option<u64>,
    early_stopping_patience: Option<u32>,
    early_stopping_threshold: f64,
    load_best_model_at_end: bool,
}

/// Digest (`sha256:…`) of a run's inputs: the base model and data that preflight read, the method and every option
/// that changes the result. `spec` is that of [`RunSpec::resolved`]: how many rows a step sums up and how exactly it
/// computes follow from the plan where the job does not say. How the work is divided, the devices, the day and the
/// trainer's image are no inputs ([`Execution`](crate::adapter_version::Execution)).
pub fn input_digest(spec: &RunSpec, method: &Method, preflight: &PreflightReport) -> String {
    // Destructured, so that a new option can't be forgotten here.
    let Training {
        num_train_epochs,
        max_steps,
        per_device_train_batch_size: _,
        gradient_accumulation_steps: _,
        global_batch_size: _,
        optim,
        learning_rate,
        lr_scheduler_type,
        lr_scheduler_kwargs,
        warmup_ratio,
        warmup_steps,
        weight_decay,
        max_grad_norm,
        on_non_finite,
        max_length,
        overflow,
        packing,
        seed,
        neftune_noise_alpha,
        bf16: _,
        gradient_checkpointing: _,
        logging_steps: _,
        eval_steps,
        early_stopping_patience,
        early_stopping_threshold,
        load_best_model_at_end,
        save_steps: _,
        save_total_limit: _,
    } = spec.training;
    let decides = early_stopping_patience.is_some() || load_best_model_at_end;
    let evaluation = decides.then(|| Evaluation {
        eval_steps,
        early_stopping_patience,
        early_stopping_threshold: early_stopping_threshold.unwrap_or_default(),
        load_best_model_at_end,
    });
    // The data's digest covers the files behind the URIs.
    let Dataset {
        train: _,
        eval: _,
        eval_fraction,
        format,
        columns,
        on_bad_row,
        chat_template,
        template_date,
        assistant_only_loss,
        secret_ref: _,
        role_arn: _,
    } = &spec.dataset;
    let inputs = Inputs {
        numerics_version: preflight.numerics_version,
        base: &preflight.base_digest,
        dataset: &preflight.dataset.digest,
        format: *format,
        columns,
        on_bad_row: *on_bad_row,
        chat_template: chat_template.as_deref(),
        template_date: template_date.as_deref(),
        assistant_only_loss: *assistant_only_loss,
        eval_fraction: *eval_fraction,
        method,
        num_train_epochs,
        max_steps,
        global_batch_size: spec.training.global_batch(),
        optim,
        learning_rate,
        lr_scheduler_type,
        lr_scheduler_kwargs: lr_scheduler_kwargs.unwrap_or_default(),
        warmup_ratio,
        warmup_steps,
        weight_decay,
        max_grad_norm,
        on_non_finite,
        max_length,
        overflow,
        packing,
        seed,
        neftune_noise_alpha,
        bf16: spec.training.computes_in_bf16(),
        evaluation,
    };
    let mut hash = Sha256::new();
    hash.update(serde_json::to_vec(&inputs).unwrap_or_default());
    format!("sha256:{:x}", hash.finalize())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::{FineTuneJob, adapter_version::DatasetRecord, fine_tune_job::MethodName};

    fn job() -> FineTuneJob {
        serde_json::from_value(json!({
            "apiVersion": "tunesmith.dev/v1alpha1",
            "kind": "FineTuneJob",
            "metadata": {"name": "support-bot"},
            "spec": {
                "baseModel": {"uri": "s3://models/m"},
                "dataset": {"train": {"uri": "s3://datasets/t.jsonl"}, "evalFraction": 0.1},
                "output": {"adapterName": "support-bot", "uri": "s3://adapters"},
            },
        }))
        .unwrap()
    }

    fn preflight() -> PreflightReport {
        PreflightReport {
            base_digest: "sha256:b".into(),
            dataset: DatasetRecord { digest: "sha256:d".into(), rows: 1, tokens: 1, skipped_rows: 0 },
            eval_rows: 1,
            truncated_rows: 0,
            dropped_rows: 0,
            skipped_rows: 0,
            warnings: Vec::new(),
            template_date: None,
            total_steps: 1,
            model: Default::default(),
            lora_parameters: 1,
            numerics_version: 1,
            highest_version: 0,
            probe_digest: None,
        }
    }

    fn digest_of(job: &FineTuneJob, preflight: &PreflightReport) -> String {
        let method = job.spec.method_as(MethodName::LoRA, None).unwrap();
        input_digest(&RunSpec::preflight(job, 1), &method, preflight)
    }

    #[test]
    fn what_changes_the_weights_changes_the_digest_and_nothing_else_does() {
        let same = digest_of(&job(), &preflight());
        assert!(same.starts_with("sha256:") && same.len() == 71, "{same}");

        let mut logs_more = job();
        logs_more.spec.training.logging_steps = 1;
        logs_more.spec.training.gradient_checkpointing = true;
        logs_more.spec.training.eval_steps = Some(5);
        logs_more.spec.training.lr_scheduler_kwargs = Some(LrSchedulerKwargs::default());
        logs_more.spec.backoff_limit = 9;
        logs_more.spec.evaluation = serde_json::from_value(serde_json::json!({
            "gates": [{"metric": "eval_loss", "max": 1.5}],
        }))
        .unwrap();
        assert_eq!(digest_of(&logs_more, &preflight()), same);

        let mut other_seed = job();
        other_seed.spec.training.seed += 1;
        assert_ne!(digest_of(&other_seed, &preflight()), same);

        let mut other_rank = job();
        other_rank.spec.lora = Some(crate::fine_tune_job::Lora { rank: 4, ..Default::default() });
        assert_ne!(digest_of(&other_rank, &preflight()), same);

        for (pointer, value) in [
            ("/dataset/chatTemplate", json!("{{ messages }}")),
            ("/dataset/format", json!("Alpaca")),
            ("/dataset/columns", json!({"prompt": "question"})),
            ("/dataset/onBadRow", json!("Skip")),
            ("/dataset/templateDate", json!("2026-11-27")),
            ("/dataset/assistantOnlyLoss", json!(false)),
            ("/training/overflow", json!("Drop")),
            ("/training/maxLength", json!(512)),
        ] {
            let mut changed = serde_json::to_value(job()).unwrap();
            let (part, field) = pointer[1..].split_once('/').unwrap();
            changed["spec"][part][field] = value;
            let changed = serde_json::from_value(changed).unwrap();
            assert_ne!(digest_of(&changed, &preflight()), same, "{pointer}");
        }

        let other_data = PreflightReport {
            dataset: DatasetRecord { digest: "sha256:e".into(), rows: 1, tokens: 1, skipped_rows: 0 },
            ..preflight()
        };
        assert_ne!(digest_of(&job(), &other_data), same);
    }

    #[test]
    fn the_digest_means_the_rows_of_a_step_and_the_precision_and_not_how_the_work_is_divided() {
        let digest = |options: serde_json::Value, ranks: u32, on_gpus: bool| {
            let mut job = job();
            job.spec.training = serde_json::from_value(options).unwrap();
            let method = job.spec.method_as(MethodName::LoRA, None).unwrap();
            input_digest(&RunSpec::preflight(&job, 1).resolved(ranks, on_gpus), &method, &preflight())
        };
        let eight = digest(json!({"perDeviceTrainBatchSize": 8}), 1, false);
        for (options, ranks) in [
            (json!({"perDeviceTrainBatchSize": 2, "gradientAccumulationSteps": 4}), 1),
            (json!({"perDeviceTrainBatchSize": 2}), 4),
            (json!({"perDeviceTrainBatchSize": 2, "globalBatchSize": 8}), 1),
            (json!({"perDeviceTrainBatchSize": 2, "globalBatchSize": 8}), 4),
            (json!({"perDeviceTrainBatchSize": 8, "bf16": false}), 1),
        ] {
            assert_eq!(digest(options.clone(), ranks, false), eight, "{options} on {ranks}");
        }
        assert_ne!(
            digest(json!({"perDeviceTrainBatchSize": 8}), 4, false),
            eight,
            "four devices see four times the rows"
        );
        let bf16 = digest(json!({"perDeviceTrainBatchSize": 8, "bf16": true}), 1, false);
        assert_ne!(bf16, eight);
        assert_eq!(digest(json!({"perDeviceTrainBatchSize": 8}), 1, true), bf16, "GPUs compute in bf16");
        assert_eq!(
            digest(json!({"perDeviceTrainBatchSize": 8, "bf16": false}), 1, true),
            eight,
            "unless the job says no"
        );
    }

    #[test]
    fn every_option_of_the_training_loop_that_changes_the_weights_is_in_the_digest() {
        let digest = |options: serde_json::Value| {
            let mut job = job();
            job.spec.training = serde_json::from_value(options).unwrap();
            digest_of(&job, &preflight())
        };
        let digests = [
            serde_json::json!({}),
            serde_json::json!({"lrSchedulerType": "polynomial"}),
            serde_json::json!({"lrSchedulerType": "polynomial", "lrSchedulerKwargs": {"power": 2.0}}),
            serde_json::json!({"lrSchedulerType": "polynomial", "lrSchedulerKwargs": {"lrEnd": 1e-6}}),
            serde_json::json!({"onNonFinite": "Skip"}),
            serde_json::json!({"evalSteps": 5, "loadBestModelAtEnd": true}),
            serde_json::json!({"evalSteps": 10, "loadBestModelAtEnd": true}),
            serde_json::json!({"evalSteps": 10, "earlyStoppingPatience": 3}),
            serde_json::json!({"evalSteps": 10, "earlyStoppingPatience": 4}),
            serde_json::json!({"evalSteps": 10, "earlyStoppingPatience": 4, "earlyStoppingThreshold": 0.1}),
        ]
        .map(digest);
        let different: std::collections::BTreeSet<&String> = digests.iter().collect();
        assert_eq!(different.len(), digests.len());
    }
}
