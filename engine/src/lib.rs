//! Explicit forward and backward passes of decoder language models, LoRA and optimizers.
//!
//! [`Model`] holds the frozen base, [`Trainer`] a model with a LoRA adapter and its AdamW state, [`Generator`] writes
//! tokens. The mathematics is written once over [`Backend`]; [`cpu::Cpu`] computes it here.

pub mod backend;
mod block;
pub mod config;
pub mod cpu;
pub mod error;
pub mod generate;
pub mod lora;
pub mod model;
pub mod optim;
mod projection;
mod random;
pub mod schedule;
pub mod trainer;
pub mod weights;

pub use backend::Backend;
pub use config::{ModelConfig, RopeScaling};
pub use error::{Error, Result};
pub use generate::{Generator, Sampling};
pub use lora::{LoraOptions, TargetModules};
pub use model::{Model, NamedTensor, Recompute};
pub use optim::AdamWOptions;
pub use schedule::{Schedule, ScheduleKind, Warmup};
pub use trainer::{IGNORE, LossSum, MicroBatch, StepStats, TrainState, Trainer};

/// Changes whenever the same inputs may give other numbers; part of a run's input digest.
pub const NUMERICS_VERSION: u32 = 1;
