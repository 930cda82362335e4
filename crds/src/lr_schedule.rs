//! The learning-rate schedules of [`crate::fine_tune_job::Training`], in transformers' words.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::schema::rule;

/// How the learning rate falls after warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum LrScheduler {
    /// In a straight line to 0.
    Linear,
    /// Along half a cosine to 0.
    #[default]
    Cosine,
    /// Along half a cosine to 0, lrSchedulerKwargs.numCycles times, each from the peak again.
    CosineWithRestarts,
    /// To lrSchedulerKwargs.lrEnd, along a power of the share of steps that is left.
    Polynomial,
    /// With the inverse square root of the step; it does not reach 0.
    InverseSqrt,
    /// Not at all, until the last lrSchedulerKwargs.numDecaySteps.
    WarmupStableDecay,
    /// Not at all.
    Constant,
}

/// Options of lrSchedulerType. They have the names of transformers' schedules.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct LrSchedulerKwargs {
    /// For cosine_with_restarts: how many times the learning rate falls. Default: 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 10_000))]
    pub num_cycles: Option<u32>,
    /// For polynomial: the power of the curve; 1 is a straight line. Default: 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-kubernetes-validations" = rule("self > 0.0", "must be greater than 0")))]
    pub power: Option<f64>,
    /// For polynomial: the learning rate after the last step. Default: 1e-7.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-kubernetes-validations" = rule("self >= 0.0", "must not be negative")))]
    pub lr_end: Option<f64>,
    /// For warmup_stable_decay, which needs it: the number of last steps over which the learning rate falls.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 100_000_000))]
    pub num_decay_steps: Option<u64>,
    /// The shape of warmup_stable_decay's fall. Default cosine.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decay_type: Option<DecayType>,
    /// For warmup_stable_decay: the learning rate at the start of the rise and at the end of the fall, as a share of
    /// learningRate. Default: 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-kubernetes-validations" = rule("self >= 0.0 && self < 1.0", "must lie in [0, 1)")))]
    pub min_lr_ratio: Option<f64>,
}

/// For warmup_stable_decay: the shape of the fall: linear, cosine or 1-sqrt (fast at first). Default: cosine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum DecayType {
    /// A straight line.
    Linear,
    /// Half a cosine.
    #[default]
    Cosine,
    /// One minus the square root, which falls fast at first.
    #[serde(rename = "1-sqrt")]
    OneMinusSqrt,
}
