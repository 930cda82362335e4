//! The training loop's options.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::lr_schedule::{LrScheduler, LrSchedulerKwargs};
use crate::schema::rule;

/// Options of the training loop. They have the names of Hugging Face's TrainingArguments.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[schemars(extend("x-kubernetes-validations" = rules(&TRAINING_RULES)))]
#[serde(rename_all = "camelCase", default)]
pub struct Training {
    /// How often the run passes over the training rows. A fraction is allowed. maxSteps goes before it.
    #[schemars(extend("x-kubernetes-validations" = rule("self > 0.0", "must be greater than 0")))]
    pub num_train_epochs: f64,
    /// Number of optimizer steps, instead of numTrainEpochs. Default: as many as numTrainEpochs needs. Set it for a
    /// short trial.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 100_000_000))]
    pub max_steps: Option<u64>,
    /// Rows (with packing: sequences) that a device computes at once. A larger number is often faster and needs more
    /// memory.
    #[schemars(range(min = 1, max = 65_536))]
    pub per_device_train_batch_size: u32,
    /// Micro-batches whose gradients are summed for one optimizer step. Raise it for a larger batch in the same
    /// memory.
    #[schemars(range(min = 1, max = 65_536))]
    pub gradient_accumulation_steps: u32,
    /// Rows (with packing: sequences) of one optimizer step over all pods and GPUs. Default: perDeviceTrainBatchSize
    /// × gradientAccumulationSteps × the number of devices that the run is first planned for. Set it if the result
    /// must not depend on the number of devices.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_073_741_824))]
    pub global_batch_size: Option<u64>,
    /// The optimizer. adamw_torch: AdamW with torch's defaults (betas 0.9 and 0.999, eps 1e-8). adamw_bnb_8bit: the
    /// same with its state in 8 bits, a quarter of the memory. adafactor: next to no state of a matrix. sgd:
    /// stochastic gradient descent without momentum.
    pub optim: Optim,
    /// The highest learning rate, which is reached after warm-up. Lower it if the loss jumps or turns NaN.
    #[schemars(extend("x-kubernetes-validations" = rule("self > 0.0", "must be greater than 0")))]
    pub learning_rate: f64,
    /// How the learning rate falls after warm-up. linear and cosine: to 0. cosine_with_restarts: to 0 several times,
    /// each time from the peak. polynomial: to lrSchedulerKwargs.lrEnd. inverse_sqrt: with the inverse square root of
    /// the step. warmup_stable_decay: only in the last lrSchedulerKwargs.numDecaySteps. constant: not at all.
    pub lr_scheduler_type: LrScheduler,
    /// Options of lrSchedulerType. Each option that is left out has its default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lr_scheduler_kwargs: Option<LrSchedulerKwargs>,
    /// Share of all steps, from 0 to 1, over which the learning rate rises from 0. warmupSteps goes before it.
    #[schemars(extend("x-kubernetes-validations" = rule("self >= 0.0 && self <= 1.0", "must lie in [0, 1]")))]
    pub warmup_ratio: f64,
    /// Number of steps over which the learning rate rises from 0. Default: as warmupRatio says.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 100_000_000))]
    pub warmup_steps: Option<u64>,
    /// Weight decay. With AdamW it is decoupled from the gradient. Norm weights and biases never decay.
    #[schemars(extend("x-kubernetes-validations" = rule("self >= 0.0", "must not be negative")))]
    pub weight_decay: f64,
    /// A gradient with a larger norm is scaled down to this norm. 0 does not clip.
    #[schemars(extend("x-kubernetes-validations" = rule("self >= 0.0", "must not be negative")))]
    pub max_grad_norm: f64,
    /// Sets what happens if the loss or the gradient of a step is NaN or infinite. Stop ends the run, and the message
    /// names the rows. Skip leaves the update of that step out and counts it; after 10 such steps in a row the run
    /// ends all the same.
    pub on_non_finite: OnNonFinite,
    /// Most tokens of a row. overflow says what happens to longer rows. A larger number needs more memory.
    #[schemars(range(min = 2, max = 1_048_576))]
    pub max_length: u32,
    /// Sets what happens to rows longer than maxLength. Truncate cuts off their end. Drop leaves them out. Error fails the
    /// job. Preflight counts these rows.
    pub overflow: Overflow,
    /// True fills sequences of maxLength tokens with several whole rows each (best fit). Rows never attend to each
    /// other. Padding is never computed, with or without packing. Set it for many short rows.
    pub packing: bool,
    /// Seed of the order of rows, of the adapter's first values and of dropout. Another seed counts as another input,
    /// so the job is trained anew.
    #[schemars(range(min = 0, max = 4_294_967_295_u64))]
    pub seed: u64,
    /// Adds noise to the embeddings during training (NEFTune): uniform within ± alpha / √(tokens · width) of each
    /// row. Default: no noise.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-kubernetes-validations" = rule("self > 0.0", "must be greater than 0")))]
    pub neftune_noise_alpha: Option<f64>,
    /// True multiplies in bfloat16: weights and activations are rounded to it, and sums and trained values stay in
    /// float32. A frozen base model then takes half the memory. CPUs with AVX512_BF16 train about 1.6 times as fast,
    /// others about as fast as in float32. Default: true on a GpuClass with GPUs, false on CPUs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bf16: Option<bool>,
    /// True computes activations again in the backward pass instead of keeping them. The run needs less memory and
    /// about a third more time.
    pub gradient_checkpointing: bool,
    /// Number of steps between two reported losses.
    #[schemars(range(min = 1, max = 100_000_000))]
    pub logging_steps: u64,
    /// Number of steps between two evaluations. Default: one evaluation before the first step and one after the last.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 100_000_000))]
    pub eval_steps: Option<u64>,
    /// Ends the run after this many evaluations in a row without a better eval loss. It needs evalSteps. Default: the
    /// run makes all its steps.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_000_000))]
    pub early_stopping_patience: Option<u32>,
    /// How much lower than the best an eval loss must be to count as better, for earlyStoppingPatience. Default: 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-kubernetes-validations" = rule("self >= 0.0", "must not be negative")))]
    pub early_stopping_threshold: Option<f64>,
    /// True publishes the weights with the lowest eval loss instead of the last weights. It needs evalSteps.
    pub load_best_model_at_end: bool,
    /// Number of steps between two checkpoints. After a preemption or a failure, the steps since the last checkpoint
    /// are trained again.
    #[schemars(range(min = 1, max = 100_000_000))]
    pub save_steps: u64,
    /// Number of checkpoints that are kept in the store. The oldest goes first, but never the best one of
    /// loadBestModelAtEnd.
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

/// The treatment of rows longer than maxLength.
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

/// The treatment of a step whose loss or gradient is NaN or infinite.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum OnNonFinite {
    /// The run ends, and the message names the rows.
    #[default]
    Stop,
    /// The step's update is left out.
    Skip,
}

/// The conditions between the options of the training loop: CEL rules, each with its message.
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
