//! A training run as `e2e/oracle` writes it, done by the engine. Shared by the fixture tests and `examples/oracle.rs`.

use std::path::Path;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use tunesmith_engine::{
    AdamWOptions, LoraOptions, MicroBatch, Model, NamedTensor, Recompute, Schedule, ScheduleKind, TrainState, Trainer,
    Warmup,
};

/// The options of a run, and per optimizer step its micro-batches.
#[derive(Deserialize)]
pub struct Run {
    lora: LoraOptions,
    optim: AdamWOptions,
    schedule: RunSchedule,
    max_grad_norm: f64,
    pub steps: Vec<Vec<MicroBatch>>,
}

#[derive(Deserialize)]
struct RunSchedule {
    kind: ScheduleKind,
    peak: f64,
    warmup: u64,
}

/// Mean loss per trained token and gradient norm of each step.
#[derive(Debug, Default)]
pub struct Curve {
    pub losses: Vec<f64>,
    pub grad_norms: Vec<f64>,
}

pub fn read_json<T: DeserializeOwned>(path: &Path) -> T {
    let text = std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

pub fn read_tensors(path: &Path) -> Vec<NamedTensor> {
    let bytes = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let file = safetensors::SafeTensors::deserialize(&bytes).expect("a safetensors file");
    let floats = |bytes: &[u8]| bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
    file.iter()
        .map(|(name, view)| {
            assert_eq!(view.dtype(), safetensors::Dtype::F32, "{name}");
            NamedTensor { name: name.into(), shape: view.shape().to_vec(), data: floats(view.data()) }
        })
        .collect()
}

/// A trainer whose adapter is that of a PEFT folder.
pub fn trainer(model: &Path, adapter: &Path, run: &Run, recompute: Recompute) -> Trainer {
    let model = Model::load(model).expect("a model folder");
    let mut trainer = Trainer::new(model, &run.lora, run.optim, recompute).expect("valid options");
    let mut tensors = Vec::new();
    for tensor in read_tensors(&adapter.join("adapter_model.safetensors")) {
        for moment in ["exp_avg", "exp_avg_sq"] {
            let (name, data) = (format!("{}.{moment}", tensor.name), vec![0.0; tensor.data.len()]);
            tensors.push(NamedTensor { name, data, shape: tensor.shape.clone() });
        }
        tensors.push(tensor);
    }
    let state = TrainState { tensors, step: 0, micro_step: 0 };
    trainer.restore(&state).expect("the adapter fits the options");
    trainer
}

/// Accumulates one optimizer step's micro-batches; the mean loss.
pub fn accumulate(trainer: &mut Trainer, micro_batches: &[MicroBatch]) -> f64 {
    let trained = |batch: &MicroBatch| batch.targets.iter().filter(|t| **t != tunesmith_engine::IGNORE).count();
    let tokens: usize = micro_batches.iter().map(trained).sum();
    let losses =
        micro_batches.iter().map(|batch| trainer.accumulate(batch, 1.0 / tokens as f32).expect("a valid batch").sum);
    losses.sum::<f64>() / tokens as f64
}

/// Trains all steps.
pub fn train(trainer: &mut Trainer, run: &Run) -> Curve {
    let RunSchedule { kind, peak, warmup } = run.schedule;
    let schedule = Schedule::new(kind, peak, Warmup::Steps(warmup), run.steps.len() as u64);
    let mut curve = Curve::default();
    for (step, micro_batches) in run.steps.iter().enumerate() {
        curve.losses.push(accumulate(trainer, micro_batches));
        let lr = schedule.learning_rate(step as u64);
        let stats = trainer.step(lr, Some(run.max_grad_norm)).expect("finite gradients");
        curve.grad_norms.push(stats.grad_norm);
    }
    curve
}
