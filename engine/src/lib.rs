//! Explicit forward and backward passes of decoder language models, LoRA and optimizers.
//!
//! [`Model`] holds the weights, [`Trainer`] trains all of them or a LoRA adapter, [`Generator`] writes tokens. The mathematics is written once over [`Backend`]; [`cpu::Cpu`] computes it here.

pub mod backend;
pub mod batch;
mod block;
pub mod config;
pub mod cpu;
pub mod error;
mod finite;
pub mod generate;
pub mod host_tensor;
mod linear;
pub mod lora;
mod merge;
pub mod model;
mod names;
pub mod optim;
mod param;
mod pattern;
mod peft;
mod projection;
pub mod quantize;
mod random;
pub mod schedule;
mod shared;
pub mod tensors;
pub mod trainer;
pub mod weights;
mod whole_modules;

pub use backend::{Backend, Precision};
pub use batch::{IGNORE, MicroBatch};
pub use config::{Activation, ModelConfig};
pub use error::{Error, Result};
pub use finite::FiniteScan;
pub use generate::{Generator, Sampling};
pub use lora::{LoraBias, LoraOptions, TargetModules};
pub use model::{Model, Recompute};
pub use optim::{Optimizer, Rule};
pub use peft::AdaptedLayer;
pub use quantize::{FourBitCode, Quantization};
pub use schedule::{Schedule, ScheduleKind, Warmup};
pub use tensors::{LazyTensor, NamedTensor};
pub use trainer::{LossSum, StateSource, StepStats, TrainState, Trainer, TrainerOptions, Tuning};

/// Changes whenever the same inputs may give other numbers; part of a run's input digest.
pub const NUMERICS_VERSION: u32 = 7;
