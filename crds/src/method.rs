//! The methods of fine-tuning and their options.

use std::collections::BTreeMap;

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::schema::{defaults, rule};
use crate::training::Training;

/// The method: Full (every weight), LoRA (small matrices beside a frozen base model), QLoRA (LoRA over a base model
/// in 4 or 8 bits) or Auto.
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

/// How to train, with the options that this takes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "name", deny_unknown_fields)]
pub enum Method {
    /// Every parameter.
    Full,
    /// A frozen base and small trained matrices.
    LoRA {
        /// Their options.
        lora: Lora,
    },
    /// LoRA over a quantized base.
    QLoRA {
        /// Options of the trained matrices.
        lora: Lora,
        /// How the base is stored.
        quantization: Quantization,
    },
}

impl Method {
    /// The method's name.
    pub fn name(&self) -> MethodName {
        match self {
            Self::Full => MethodName::Full,
            Self::LoRA { .. } => MethodName::LoRA,
            Self::QLoRA { .. } => MethodName::QLoRA,
        }
    }

    /// Every option of a training: what is recorded with its version.
    pub fn hyperparameters(&self, training: &Training) -> serde_json::Value {
        let mut hyperparameters = serde_json::json!({"training": training});
        match self {
            Self::Full => {}
            Self::LoRA { lora } => hyperparameters["lora"] = serde_json::json!(lora),
            Self::QLoRA { lora, quantization } => {
                hyperparameters["lora"] = serde_json::json!(lora);
                hyperparameters["quantization"] = serde_json::json!(quantization);
            }
        }
        hyperparameters
    }
}

/// Options of LoRA. They have PEFT's names, in camelCase.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Lora {
    /// Inner dimension r of the trained matrices. A higher rank can learn more, and takes more memory and a larger
    /// file.
    #[schemars(range(min = 1, max = 1024))]
    pub rank: u32,
    /// Scale of the adapter: its output is multiplied by alpha / rank, or by alpha / √rank with useRslora.
    #[schemars(extend("x-kubernetes-validations" = rule("self > 0.0", "must be greater than 0")))]
    pub alpha: f64,
    /// Share of the adapter's inputs that each training step sets to zero, from 0 to less than 1.
    #[schemars(extend("x-kubernetes-validations" = rule("self >= 0.0 && self < 1.0", "must lie in [0, 1)")))]
    pub dropout: f64,
    /// Linear layers that get an adapter. A name matches a module that has it as its whole name or as the last part
    /// of its name. `all-linear` alone takes every linear layer but the output layer.
    #[schemars(length(min = 1, max = 64), inner(length(min = 1, max = 253)))]
    pub target_modules: Vec<String>,
    /// Regular expression for the whole names of the linear layers that get an adapter. It replaces targetModules.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 1024))]
    pub target_modules_regex: Option<String>,
    /// True scales by alpha / √rank instead of alpha / rank (rsLoRA). Set it for high ranks, which learn too slowly
    /// otherwise.
    pub use_rslora: bool,
    /// True trains the length of each row of an adapted weight apart from its direction (DoRA). vLLM does not serve
    /// such adapters.
    pub use_dora: bool,
    /// Biases that are trained beside the adapter: none, all of the model (all), or those of adapted layers
    /// (lora_only).
    pub bias: LoraBias,
    /// Modules that are trained whole and saved with the adapter, such as lm_head, embed_tokens or norms. A name
    /// takes all modules whose names end so. vLLM does not serve such adapters.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), inner(length(min = 1, max = 253)))]
    pub modules_to_save: Vec<String>,
    /// Ranks of some layers that differ from rank. Each key is a regular expression for the end of a layer's name.
    /// Each key must match a layer, and keys that match the same layer must have the same value.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("x-kubernetes-validations" = rule(
        "self.size() <= 64 && self.all(key, self[key] >= 1 && self[key] <= 1024)", "each rank must lie in 1..=1024, in at most 64 entries")))]
    #[schemars(extend("maxProperties" = 64))]
    pub rank_pattern: BTreeMap<String, u32>,
    /// Alphas of some layers that differ from alpha. Keys are as in rankPattern.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("x-kubernetes-validations" = rule(
        "self.all(key, self[key] > 0.0)", "each alpha must be greater than 0")))]
    #[schemars(extend("maxProperties" = 64))]
    pub alpha_pattern: BTreeMap<String, f64>,
    /// LoRA+: the learning rate of the matrices B and of vectors is learningRate times this number. 1 trains all
    /// alike.
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
    /// Bits of a stored weight: 4 or 8. Four bits need the least memory.
    #[schemars(extend("x-kubernetes-validations" = rule("self in [4, 8]", "must be 4 or 8")))]
    pub bits: u32,
    /// Code of a stored weight: nf4 (4-bit NormalFloat, the usual choice) or fp4 (4-bit float) with 4 bits, int8
    /// (8-bit integers, a scale for each row) with 8.
    #[serde(rename = "type")]
    pub kind: QuantizationType,
    /// True stores the scales in 8 bits too, which saves a little more memory. For 4 bits only.
    #[serde(default = "defaults::yes")]
    pub double_quant: bool,
    /// For 8 bits: rounds the inputs of layers to 8 bits too, except in columns that have a magnitude of at least
    /// this number. This is LLM.int8(), and transformers' llm_int8_threshold, which is 6.0 there. Default: inputs are
    /// not rounded, as when bitsandbytes trains on a CPU.
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
