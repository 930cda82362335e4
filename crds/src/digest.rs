//! The digest of everything that decides a run's result: inputs with the same digest are not trained twice.

use serde::Serialize;
use sha2::{Digest, Sha256};

use crate::{
    fine_tune_job::{DataFormat, LrScheduler, Training},
    run::{Method, PreflightReport, RunSpec},
};

/// What goes into the digest, in the order in which it is written. How often a run logs, evaluates and saves is left
/// out, and so is recomputation: they change nothing in the weights.
#[derive(Serialize)]
struct Inputs<'a> {
    numerics_version: u32,
    base: &'a str,
    dataset: &'a str,
    format: DataFormat,
    assistant_only_loss: bool,
    eval_fraction: Option<f64>,
    method: &'a Method,
    num_train_epochs: f64,
    max_steps: Option<u64>,
    per_device_train_batch_size: u32,
    gradient_accumulation_steps: u32,
    learning_rate: f64,
    lr_scheduler_type: LrScheduler,
    warmup_ratio: f64,
    warmup_steps: Option<u64>,
    weight_decay: f64,
    max_grad_norm: f64,
    max_length: u32,
    packing: bool,
    seed: u64,
}

/// Digest (`sha256:…`) of a run's inputs: the base model and data that preflight read, the method and every option
/// that changes the result.
pub fn input_digest(spec: &RunSpec, method: &Method, preflight: &PreflightReport) -> String {
    // Destructured, so that a new option can't be forgotten here.
    let Training {
        num_train_epochs,
        max_steps,
        per_device_train_batch_size,
        gradient_accumulation_steps,
        learning_rate,
        lr_scheduler_type,
        warmup_ratio,
        warmup_steps,
        weight_decay,
        max_grad_norm,
        max_length,
        packing,
        seed,
        gradient_checkpointing: _,
        logging_steps: _,
        eval_steps: _,
        save_steps: _,
        save_total_limit: _,
    } = spec.training;
    let inputs = Inputs {
        numerics_version: preflight.numerics_version,
        base: &preflight.base_digest,
        dataset: &preflight.dataset.digest,
        format: spec.dataset.format,
        assistant_only_loss: spec.dataset.assistant_only_loss,
        eval_fraction: spec.dataset.eval_fraction,
        method,
        num_train_epochs,
        max_steps,
        per_device_train_batch_size,
        gradient_accumulation_steps,
        learning_rate,
        lr_scheduler_type,
        warmup_ratio,
        warmup_steps,
        weight_decay,
        max_grad_norm,
        max_length,
        packing,
        seed,
    };
    let mut hash = Sha256::new();
    hash.update(serde_json::to_vec(&inputs).unwrap_or_default());
    format!("sha256:{:x}", hash.finalize())
}
