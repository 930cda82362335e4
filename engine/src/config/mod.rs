//! The shape of a decoder language model, read from a Hugging Face `config.json`.
//!
//! All families are one block with parts that are used or not: a family is a configuration, no code of its own. Fields
//! that would change the numbers and that the engine does not know are refused by name: a model that is trained wrongly
//! costs more than one that is refused.

mod family;
mod fields;
mod rope;

use std::path::Path;

use serde_json::Value;

pub use self::rope::{Rope, RopeScaling};
use self::{family::Family, fields::Fields};
use crate::error::{Error, Result};
use crate::quantize::Quantization;

/// The shape of a decoder language model.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Decoder blocks.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads; each serves `num_attention_heads / num_key_value_heads` query heads.
    pub num_key_value_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Longest row that the model was trained on, in tokens.
    pub max_position_embeddings: usize,
    /// Added to the mean square in RMSNorm.
    pub rms_norm_eps: f32,
    /// How the checkpoint stores the linear layers of its blocks, if in few bits.
    pub stored_as: Option<Quantization>,
    /// Whether the output layer shares the embedding's weights.
    pub tie_word_embeddings: bool,
    /// The token whose embedding torch does not train (`padding_idx`).
    pub pad_token_id: Option<u32>,
    /// What the MLP's gate goes through.
    pub activation: Activation,
    /// The rotary embeddings that layers choose from.
    pub ropes: Vec<Rope>,
    /// What differs between blocks, one entry each.
    pub layers: Vec<LayerConfig>,
    /// Whether query, key and value projections have a bias (Qwen 2).
    pub query_key_value_bias: bool,
    /// Whether the attention's output projection has a bias.
    pub output_bias: bool,
    /// Whether the MLP's projections have a bias.
    pub mlp_bias: bool,
    /// Whether queries and keys are normed head by head (Qwen 3, Gemma 3).
    pub query_key_norm: bool,
    /// Whether query, key and value are one projection, and gate and up another (Phi 3).
    pub fused: bool,
    /// Whether attention and MLP are normed behind as well as before (Gemma).
    pub sandwich_norms: bool,
    /// Added to every norm's weight (Gemma stores weights minus one).
    pub norm_offset: f32,
    /// Factor of the embedding (Gemma).
    pub embedding_scale: f32,
    /// Factor of the attention's scores.
    pub attention_scale: f32,
    /// The scores s become c·tanh(s/c) (Gemma 2).
    pub attention_softcap: Option<f32>,
    /// The logits l become c·tanh(l/c) (Gemma).
    pub final_softcap: Option<f32>,
}

/// What the MLP's gate goes through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// x·sigmoid(x).
    Silu,
    /// GELU by its tanh approximation (Hendrycks and Gimpel, 2016).
    GeluTanh,
}

/// What differs between blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerConfig {
    /// Tokens that a token attends to, itself included; none for all before it.
    pub window: Option<usize>,
    /// Index of the block's rotary embedding.
    pub rope: usize,
}

impl ModelConfig {
    /// Reads `dir/config.json`.
    ///
    /// # Errors
    /// The file is missing, is no JSON, or has a field that the engine does not support; the message names it.
    pub fn load(dir: &Path) -> Result<Self> {
        let path = dir.join("config.json");
        let text = std::fs::read_to_string(&path).map_err(|e| Error::io(&path, e))?;
        Self::parse(&text).map_err(|message| Error::config(&path, message))
    }

    /// Reads the text of a `config.json`; the error is a message without the file's name.
    pub fn parse(text: &str) -> std::result::Result<Self, String> {
        let json: Value = serde_json::from_str(text).map_err(|e| format!("not valid JSON: {e}"))?;
        let fields = Fields(json.as_object().ok_or("not a JSON object")?);
        let mut config = Family::of(&fields)?.config(&fields)?;
        config.stored_as = fields.get("quantization_config").map(Quantization::of_config).transpose()?;
        config.validate()?;
        Ok(config)
    }

    fn validate(&self) -> std::result::Result<(), String> {
        let (heads, kv_heads) = (self.num_attention_heads, self.num_key_value_heads);
        if !heads.is_multiple_of(kv_heads) {
            return Err(format!("num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"));
        }
        Ok(())
    }

    /// Width of all query heads together.
    pub fn query_size(&self) -> usize {
        self.num_attention_heads * self.head_dim
    }

    /// Width of all key heads together, which is also that of all value heads.
    pub fn key_value_size(&self) -> usize {
        self.num_key_value_heads * self.head_dim
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SMOL: &str = r#"{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 8192, "rms_norm_eps": 1e-05,
        "rope_theta": 100000, "rope_scaling": null, "tie_word_embeddings": true, "attention_bias": false}"#;

    fn with(changes: Value) -> std::result::Result<ModelConfig, String> {
        let mut json: Value = serde_json::from_str(SMOL).unwrap();
        json.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        ModelConfig::parse(&json.to_string())
    }

    #[test]
    fn smollm2_is_read() {
        let config = ModelConfig::parse(SMOL).unwrap();
        assert_eq!((config.head_dim, config.query_size(), config.key_value_size()), (64, 576, 192));
        assert_eq!(config.ropes, [Rope { theta: 100_000.0, dim: 64, scaling: RopeScaling::None }]);
        assert!(config.tie_word_embeddings);
    }

    #[test]
    fn rope_is_read_where_newer_transformers_write_it() {
        let config = with(serde_json::json!({
            "rope_theta": null,
            "rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 4.0}
        }))
        .unwrap();
        assert_eq!(config.ropes, [Rope { theta: 500_000.0, dim: 64, scaling: RopeScaling::Linear { factor: 4.0 } }]);
    }

    #[test]
    fn what_would_change_the_numbers_is_refused_by_name() {
        for (changes, name) in [
            (serde_json::json!({"attention_dropout": 0.1}), "attention_dropout"),
            (serde_json::json!({"hidden_act": "gelu"}), "hidden_act"),
            (serde_json::json!({"model_type": "mamba"}), "model_type"),
            (serde_json::json!({"rope_scaling": {"type": "yarn", "factor": 2.0}}), "rope_type"),
            (serde_json::json!({"rope_scaling": {"type": "linear"}}), "factor"),
            (serde_json::json!({"hidden_size": 0}), "hidden_size"),
            (serde_json::json!({"vocab_size": 1e30}), "vocab_size"),
            (serde_json::json!({"num_key_value_heads": 4}), "num_key_value_heads"),
            (serde_json::json!({"head_dim": 63}), "head_dim"),
            (serde_json::json!({"quantization_config": {"quant_method": "gptq", "bits": 4}}), "quant_method"),
            (serde_json::json!({"quantization_config": {"quant_method": "bitsandbytes"}}), "load_in_4bit"),
        ] {
            let message = with(changes).unwrap_err();
            assert!(message.contains(name), "{name}: {message}");
        }
    }
    /// Any value that JSON can hold, of the kinds that a damaged or malicious file would.
    fn value() -> impl Strategy<Value = Value> {
        prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            (0u64..70).prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            "[a-z_0-9]{0,12}".prop_map(Value::from),
            Just(serde_json::json!({"rope_type": "dynamic", "factor": 1e300, "full_attention": {"factor": -1}})),
            Just(serde_json::json!(["sliding_attention", 7])),
        ]
    }

    proptest! {
        #[test]
        fn no_configuration_makes_the_engine_panic(
            family in prop::sample::select(vec!["llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3_text"]),
            changes in prop::collection::vec((prop::sample::select(vec![
                "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "num_hidden_layers", "vocab_size",
                "intermediate_size", "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling",
                "rope_parameters", "layer_types", "sliding_window", "use_sliding_window", "max_window_layers",
                "sliding_window_pattern", "partial_rotary_factor", "query_pre_attn_scalar", "attn_logit_softcapping",
                "final_logit_softcapping", "pad_token_id", "hidden_act", "hidden_activation", "tie_word_embeddings",
                "attention_bias", "mlp_bias", "attention_dropout", "architectures",
            ]), value()), 0..4),
        ) {
            let mut json = serde_json::json!({"architectures": null, "model_type": family, "hidden_act": null});
            for (field, value) in changes {
                json[field] = value;
            }
            if let Ok(config) = with(json) {
                prop_assert!(config.layers.len() == config.num_hidden_layers);
                config.ropes.iter().for_each(|rope| drop(rope.frequencies(100_000)));
                prop_assert!(config.tensors().len() < 20_000);
            }
        }
    }
}
