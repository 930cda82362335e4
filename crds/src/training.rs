//! The training loop's options.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::lr_schedule::{LrScheduler, LrSchedulerKwargs};
use crate::schema::rule;

/// The training loop, in the words of Hugging Face TrainingArguments.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[schemars(extend("x-kubernetes-validations" = rules(&TRAINING_RULES)))]
#[serde(rename_all = "camelCase", default)]
pub struct Training {
    /// Passes over the training rows.
    #[schemars(extend("x-kubernetes-validations" = rule("self > 0.0", "must be greater than 0")))]
    pub num_train_epochs: f64,
    /// Ends after this many optimizer steps instead, whatever numTrainEpochs says.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 100_000_000))]
    pub max_steps: Option<u64>,
    /// Rows (packed sequences with packing) that a pod works through at once.
    #[schemars(range(min = 1, max = 65_536))]
    pub per_device_train_batch_size: u32,
    /// Micro-batches that one optimizer step sums up.
    #[schemars(range(min = 1, max = 65_536))]
    pub gradient_accumulation_steps: u32,
    /// Rows (packed sequences with packing) that one optimizer step sums up, over all pods and GPUs. Left out,
    /// perDeviceTrainBatchSize × gradientAccumulationSteps × the GPUs that the run is first planned for.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_073_741_824))]
    pub global_batch_size: Option<u64>,
    /// The optimizer, in Hugging Face's words.
    pub optim: Optim,
    /// Peak learning rate.
    #[schemars(extend("x-kubernetes-validations" = rule("self > 0.0", "must be greater than 0")))]
    pub learning_rate: f64,
    /// How the learning rate falls after warm-up.
    pub lr_scheduler_type: LrScheduler,
    /// Options of lrSchedulerType; left out, each has its default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lr_scheduler_kwargs: Option<LrSchedulerKwargs>,
    /// Share of all steps over which the learning rate rises from 0. warmupSteps goes before it.
    #[schemars(extend("x-kubernetes-validations" = rule("self >= 0.0 && self <= 1.0", "must lie in [0, 1]")))]
    pub warmup_ratio: f64,
    /// Steps over which the learning rate rises from 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 100_000_000))]
    pub warmup_steps: Option<u64>,
    /// Weight decay: decoupled from the gradient with AdamW. Norm weights and biases never decay.
    #[schemars(extend("x-kubernetes-validations" = rule("self >= 0.0", "must not be negative")))]
    pub weight_decay: f64,
    /// Scales the gradient down to this norm; 0 does not clip.
    #[schemars(extend("x-kubernetes-validations" = rule("self >= 0.0", "must not be negative")))]
    pub max_grad_norm: f64,
    /// What becomes of a step whose loss or gradient is NaN or infinite: Stop ends the run and names the rows. Skip
    /// leaves that step's update out and counts it; after 10 such steps in a row the run ends all the same.
    pub on_non_finite: OnNonFinite,
    /// Tokens of a row at most; overflow says what becomes of longer rows.
    #[schemars(range(min = 2, max = 1_048_576))]
    pub max_length: u32,
    /// What becomes of rows longer than maxLength; preflight counts them.
    pub overflow: Overflow,
    /// Fill sequences of maxLength tokens with several rows each (best fit). Rows never attend to each other, and
    /// padding is never computed, with or without packing.
    pub packing: bool,
    /// Seed of the shuffles, the adapter's first values and dropout.
    #[schemars(range(min = 0, max = 4_294_967_295_u64))]
    pub seed: u64,
    /// Noise on the embeddings while training (NEFTune): uniform within ± alpha / √(tokens · width) of each row.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-kubernetes-validations" = rule("self > 0.0", "must be greater than 0")))]
    pub neftune_noise_alpha: Option<f64>,
    /// Multiply in bfloat16: weights and activations are rounded to it, sums and all that is trained stay in float32. A
    /// frozen base takes half the memory; about 1.6 times as fast on CPUs with AVX512_BF16, and about as fast on others.
    /// Left out, as GPUs compute best: true on a GpuClass with GPUs, false on CPUs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bf16: Option<bool>,
    /// Recompute activations in the backward pass: less memory, about a third more time.
    pub gradient_checkpointing: bool,
    /// Steps between two reported losses.
    #[schemars(range(min = 1, max = 100_000_000))]
    pub logging_steps: u64,
    /// Steps between two evaluations; left out, once before the first step and once after the last.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 100_000_000))]
    pub eval_steps: Option<u64>,
    /// Ends the run after this many evaluations in a row without a better eval loss. Needs evalSteps.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_000_000))]
    pub early_stopping_patience: Option<u32>,
    /// How much lower than the best an eval loss must be to count as better for earlyStoppingPatience. Default 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-kubernetes-validations" = rule("self >= 0.0", "must not be negative")))]
    pub early_stopping_threshold: Option<f64>,
    /// Publish the weights with the lowest eval loss instead of the last ones. Needs evalSteps.
    pub load_best_model_at_end: bool,
    /// Steps between two checkpoints.
    #[schemars(range(min = 1, max = 100_000_000))]
    pub save_steps: u64,
    /// Checkpoints that are kept; the oldest step goes first, but never the best one of loadBestModelAtEnd.
    #[schemars(range(min = 1, max = 1000))]
    pub save_total_limit: u32,
}

impl Default for Training {
    fn default() -> Self {
        Self {
            num_train_epochs: 3.0,
            max_steps: None,
            per_device_train_batch_size: 2,
            gradient_accumulation_steps: 1,
            global_batch_size: None,
            optim: Optim::AdamwTorch,
            learning_rate: 2e-4,
            lr_scheduler_type: LrScheduler::Cosine,
            lr_scheduler_kwargs: None,
            warmup_ratio: 0.03,
            warmup_steps: None,
            weight_decay: 0.0,
            max_grad_norm: 1.0,
            on_non_finite: OnNonFinite::Stop,
            max_length: 1024,
            overflow: Overflow::Truncate,
            packing: false,
            seed: 42,
            neftune_noise_alpha: None,
            bf16: None,
            gradient_checkpointing: false,
            logging_steps: 10,
            eval_steps: None,
            early_stopping_patience: None,
            early_stopping_threshold: None,
            load_best_model_at_end: false,
            save_steps: 50,
            save_total_limit: 2,
        }
    }
}

impl Training {
    /// Rows (or packed sequences) of one optimizer step; on one device, unless [`Self::resolved`] knows of more.
    pub fn global_batch(&self) -> u64 {
        let of_device = u64::from(self.per_device_train_batch_size) * u64::from(self.gradient_accumulation_steps);
        self.global_batch_size.unwrap_or(of_device)
    }

    /// Whether products are computed in bfloat16; on a CPU, unless [`Self::resolved`] knows of GPUs.
    pub fn computes_in_bf16(&self) -> bool {
        self.bf16.unwrap_or(false)
    }

    /// The same with all that a plan decides of the result: on `ranks` devices, which are GPUs or not.
    pub fn resolved(&self, ranks: u32, on_gpus: bool) -> Self {
        let ranks = if self.global_batch_size.is_some() { 1 } else { u64::from(ranks.max(1)) };
        Self {
            global_batch_size: Some(self.global_batch() * ranks),
            bf16: Some(self.bf16.unwrap_or(on_gpus)),
            ..self.clone()
        }
    }
}

/// The optimizer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Optim {
    /// AdamW with torch's betas (0.9, 0.999) and eps (1e-8).
    #[default]
    AdamwTorch,
    /// The same with its state in 8 bits, as bitsandbytes keeps it: a quarter of the memory.
    #[serde(rename = "adamw_bnb_8bit")]
    AdamwBnb8bit,
    /// Adafactor at the given learning rate, with transformers' other defaults: next to no state of a matrix.
    Adafactor,
    /// Stochastic gradient descent without momentum.
    Sgd,
}

/// What becomes of rows longer than maxLength.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Overflow {
    /// They lose their end. A row that has nothing left to train on is refused.
    #[default]
    Truncate,
    /// They are left out.
    Drop,
    /// They are refused.
    Error,
}

/// What becomes of a step whose loss or gradient is NaN or infinite.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum OnNonFinite {
    /// The run ends, and the message names the rows.
    #[default]
    Stop,
    /// The step's update is left out.
    Skip,
}

/// What must hold between the options of the training loop: CEL rules, each with its message.
const TRAINING_RULES: [(&str, &str); 10] = [
    (
        "!has(self.globalBatchSize) || self.gradientAccumulationSteps == 1",
        "give globalBatchSize or gradientAccumulationSteps, not both",
    ),
    (
        "!has(self.globalBatchSize) || self.perDeviceTrainBatchSize <= self.globalBatchSize",
        "perDeviceTrainBatchSize must not be greater than globalBatchSize",
    ),
    (
        "!has(self.earlyStoppingPatience) || has(self.evalSteps)",
        "earlyStoppingPatience counts evaluations: set evalSteps, the steps between two of them",
    ),
    (
        "!has(self.earlyStoppingThreshold) || has(self.earlyStoppingPatience)",
        "earlyStoppingThreshold needs earlyStoppingPatience",
    ),
    (
        "!self.loadBestModelAtEnd || has(self.evalSteps)",
        "loadBestModelAtEnd chooses between evaluations: set evalSteps, the steps between two of them",
    ),
    (
        "self.lrSchedulerType == 'cosine_with_restarts' || !has(self.lrSchedulerKwargs) || !has(self.lrSchedulerKwargs.numCycles)",
        "lrSchedulerKwargs.numCycles is for lrSchedulerType cosine_with_restarts only",
    ),
    (
        "self.lrSchedulerType == 'polynomial' || !has(self.lrSchedulerKwargs) || !(has(self.lrSchedulerKwargs.power) || has(self.lrSchedulerKwargs.lrEnd))",
        "lrSchedulerKwargs.power and lrEnd are for lrSchedulerType polynomial only",
    ),
    (
        "!has(self.lrSchedulerKwargs) || !has(self.lrSchedulerKwargs.lrEnd) || self.lrSchedulerKwargs.lrEnd < self.learningRate",
        "lrSchedulerKwargs.lrEnd must be less than learningRate",
    ),
    (
        "self.lrSchedulerType == 'warmup_stable_decay' || !has(self.lrSchedulerKwargs) || !(has(self.lrSchedulerKwargs.numDecaySteps) || has(self.lrSchedulerKwargs.decayType) || has(self.lrSchedulerKwargs.minLrRatio))",
        "lrSchedulerKwargs.numDecaySteps, decayType and minLrRatio are for lrSchedulerType warmup_stable_decay only",
    ),
    (
        "self.lrSchedulerType != 'warmup_stable_decay' || (has(self.lrSchedulerKwargs) && has(self.lrSchedulerKwargs.numDecaySteps))",
        "lrSchedulerType warmup_stable_decay needs lrSchedulerKwargs.numDecaySteps, the steps of the fall at the end",
    ),
];

/// CEL rules on a type with container-level defaults, which `#[x_kube]` does not take.
fn rules(rules: &[(&str, &str)]) -> serde_json::Value {
    rules.iter().map(|(rule, message)| serde_json::json!({"rule": rule, "message": message})).collect()
}
