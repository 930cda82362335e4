//! The methods of fine-tuning and their options.

use std::collections::BTreeMap;

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::fine_tune_job::defaults;
use crate::schema::rule;

/// How to train.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
pub enum MethodName {
    /// Every parameter.
    Full,
    /// A frozen base and small trained matrices.
    LoRA,
    /// LoRA over a base stored in 4 or 8 bits.
    QLoRA,
    /// LoRA where the base fits, else QLoRA.
    #[default]
    Auto,
}

/// Options of LoRA, in PEFT's words.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Lora {
    /// Inner dimension r of the trained matrices.
    #[schemars(range(min = 1, max = 1024))]
    pub rank: u32,
    /// Scale: the adapter's output is multiplied by alpha / rank (alpha / √rank with useRslora).
    #[schemars(extend("x-kubernetes-validations" = rule("self > 0.0", "must be greater than 0")))]
    pub alpha: f64,
    /// Share of the adapter's inputs that a training step zeroes, in [0, 1).
    #[schemars(extend("x-kubernetes-validations" = rule("self >= 0.0 && self < 1.0", "must lie in [0, 1)")))]
    pub dropout: f64,
    /// Linear layers to adapt: names matched exactly or as the last part of a module's name, or `all-linear` alone for
    /// every one but the output layer.
    #[schemars(length(min = 1, max = 64), inner(length(min = 1, max = 253)))]
    pub target_modules: Vec<String>,
    /// Regular expression that the whole name of a linear layer must match, instead of targetModules.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 1024))]
    pub target_modules_regex: Option<String>,
    /// Scale by alpha / √rank, which keeps high ranks learning.
    pub use_rslora: bool,
    /// Train the length of each adapted weight's rows apart from their direction (DoRA). vLLM does not serve it.
    pub use_dora: bool,
    /// The biases that are trained beside the adapter.
    pub bias: LoraBias,
    /// Modules that are trained whole and saved with the adapter: lm_head, embed_tokens or norms; a name takes all
    /// modules that end so. vLLM does not serve them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), inner(length(min = 1, max = 253)))]
    pub modules_to_save: Vec<String>,
    /// Other ranks for some layers: each key is a regular expression for the end of a layer's name. Each must match a
    /// layer; keys that match the same layer must agree.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("x-kubernetes-validations" = rule(
        "self.size() <= 64 && self.all(key, self[key] >= 1 && self[key] <= 1024)", "each rank must lie in 1..=1024, in at most 64 entries")))]
    #[schemars(extend("maxProperties" = 64))]
    pub rank_pattern: BTreeMap<String, u32>,
    /// Other alphas for some layers, like rankPattern.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("x-kubernetes-validations" = rule(
        "self.all(key, self[key] > 0.0)", "each alpha must be greater than 0")))]
    #[schemars(extend("maxProperties" = 64))]
    pub alpha_pattern: BTreeMap<String, f64>,
    /// Learning rate of B and of vectors, divided by that of all else (LoRA+); 1 treats all alike.
    #[serde(rename = "loraPlusLrRatio")]
    #[schemars(extend("x-kubernetes-validations" = rule("self > 0.0", "must be greater than 0")))]
    pub lora_plus_lr_ratio: f64,
}

/// The biases that are trained beside an adapter, in PEFT's words.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum LoraBias {
    /// None.
    #[default]
    None,
    /// All of the model's.
    All,
    /// Those of adapted layers.
    LoraOnly,
}

impl Default for Lora {
    fn default() -> Self {
        Self {
            rank: 8,
            alpha: 32.0,
            dropout: 0.05,
            target_modules: vec!["q_proj".into(), "v_proj".into()],
            target_modules_regex: None,
            use_rslora: false,
            use_dora: false,
            bias: LoraBias::None,
            modules_to_save: Vec::new(),
            rank_pattern: BTreeMap::new(),
            alpha_pattern: BTreeMap::new(),
            lora_plus_lr_ratio: 1.0,
        }
    }
}

/// How QLoRA stores the frozen base.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[x_kube(validation = Rule::new("(self.bits == 8) == (self.type == 'int8')")
    .message("bits: 4 goes with type nf4 or fp4, bits: 8 with type int8"))]
#[x_kube(validation = Rule::new("!has(self.outlierThreshold) || self.bits == 8")
    .message("outlierThreshold goes with bits: 8"))]
#[serde(rename_all = "camelCase")]
pub struct Quantization {
    /// Bits of a stored weight: 4 or 8.
    #[schemars(extend("x-kubernetes-validations" = rule("self in [4, 8]", "must be 4 or 8")))]
    pub bits: u32,
    /// The code of a stored weight.
    #[serde(rename = "type")]
    pub kind: QuantizationType,
    /// Quantize the scales too (4 bits only).
    #[serde(default = "defaults::yes")]
    pub double_quant: bool,
    /// Round the inputs of 8-bit layers to 8 bits too, but for the columns in which a magnitude reaches this: LLM.int8(),
    /// transformers' llm_int8_threshold, there 6.0. Unset, inputs stay as they are, as when bitsandbytes trains on a CPU.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-kubernetes-validations" = rule("self > 0.0", "must be greater than 0")))]
    pub outlier_threshold: Option<f64>,
}

/// The code of a stored weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum QuantizationType {
    /// 4-bit NormalFloat.
    Nf4,
    /// 4-bit float.
    Fp4,
    /// Row-wise 8-bit integers.
    Int8,
}
