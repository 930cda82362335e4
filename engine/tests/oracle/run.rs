//! A training run as `e2e/oracle` writes it, done by the engine. Shared by the fixture tests and `examples/oracle.rs`.

use std::path::Path;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use tunesmith_engine::{
    LoraOptions, MicroBatch, Model, NamedTensor, Optimizer, Precision, Recompute, Rule, Schedule, ScheduleKind,
    Trainer, TrainerOptions, Tuning, Warmup,
};

/// The options of a run, and per optimizer step its micro-batches.
#[derive(Deserialize)]
pub struct Run {
    /// None trains every weight.
    lora: Option<LoraOptions>,
    optim: RunOptim,
    schedule: RunSchedule,
    max_grad_norm: f64,
    pub steps: Vec<Vec<MicroBatch>>,
}

#[derive(Deserialize)]
struct RunOptim {
    beta1: f64,
    beta2: f64,
    eps: f64,
    weight_decay: f64,
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

/// A trainer whose adapter is that of a PEFT folder, or one of every weight.
pub fn trainer(model: &Path, adapter: &Path, run: &Run, recompute: Recompute) -> Trainer {
    trainer_of(Model::load(model).expect("a model folder"), adapter, run, recompute, Precision::F32)
}

/// The same of a loaded model.
pub fn trainer_of(model: Model, adapter: &Path, run: &Run, recompute: Recompute, precision: Precision) -> Trainer {
    let RunOptim { beta1, beta2, eps, weight_decay } = run.optim;
    let rule = Rule::AdamW { beta1, beta2, eps };
    let tuning = run.lora.clone().map_or(Tuning::Full, Tuning::Lora);
    let options = TrainerOptions {
        optimizer: Optimizer { rule, weight_decay, ..Optimizer::default() },
        recompute,
        precision,
        ..TrainerOptions::new(tuning)
    };
    let mut trainer = Trainer::new(model, &options).expect("valid options");
    if run.lora.is_none() {
        return trainer;
    }
    // The state of a trainer that has not stepped yet, with the folder's weights in it.
    let mut state = trainer.state();
    for tensor in read_tensors(&adapter.join("adapter_model.safetensors")) {
        match state.tensors.iter_mut().find(|known| known.name == tensor.name) {
            Some(place) => *place = tensor,
            None => panic!("{} is not trained", tensor.name),
        }
    }
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
