//! The shape of a Llama-family model, read from a Hugging Face `config.json`.
//!
//! Fields that would change the numbers but are not implemented are refused by name: a model that is trained wrongly
//! costs more than one that is refused.

use std::path::Path;

use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// The shape of a decoder of the Llama family.
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
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// How the rotary frequencies are stretched for long rows.
    pub rope_scaling: RopeScaling,
    /// Whether the output layer shares the embedding's weights.
    pub tie_word_embeddings: bool,
}

/// How rotary frequencies are changed for rows longer than those of pre-training.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RopeScaling {
    /// As pre-trained.
    None,
    /// All frequencies are divided by `factor`.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama 3.1: low frequencies are divided by `factor`, high ones kept, and those between blended.
    Llama3 {
        /// The divisor of the low frequencies.
        factor: f64,
        /// Wavelengths above `original / low_freq_factor` are low frequencies.
        low_freq_factor: f64,
        /// Wavelengths below `original / high_freq_factor` are high frequencies.
        high_freq_factor: f64,
        /// Longest row of pre-training, in tokens.
        original_max_position_embeddings: f64,
    },
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
        fields.refuse_unsupported()?;

        let hidden_size = fields.size("hidden_size")?;
        let num_attention_heads = fields.size("num_attention_heads")?;
        let rope = fields.rope()?;
        let config = ModelConfig {
            vocab_size: fields.size("vocab_size")?,
            hidden_size,
            intermediate_size: fields.size("intermediate_size")?,
            num_hidden_layers: fields.size("num_hidden_layers")?,
            num_attention_heads,
            num_key_value_heads: fields.optional_size("num_key_value_heads")?.unwrap_or(num_attention_heads),
            head_dim: fields.optional_size("head_dim")?.unwrap_or(hidden_size / num_attention_heads),
            max_position_embeddings: fields.optional_size("max_position_embeddings")?.unwrap_or(2048),
            rms_norm_eps: fields.optional_number("rms_norm_eps")?.unwrap_or(1e-6) as f32,
            rope_theta: rope.0,
            rope_scaling: rope.1,
            tie_word_embeddings: fields.flag("tie_word_embeddings")?,
        };
        config.validate()?;
        Ok(config)
    }

    fn validate(&self) -> std::result::Result<(), String> {
        let (heads, kv_heads) = (self.num_attention_heads, self.num_key_value_heads);
        if !heads.is_multiple_of(kv_heads) {
            return Err(format!("num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"));
        }
        if !self.head_dim.is_multiple_of(2) || self.head_dim == 0 {
            return Err(format!("head_dim is {}; rotary embedding needs an even number", self.head_dim));
        }
        if !(self.rms_norm_eps.is_finite() && self.rms_norm_eps > 0.0) {
            return Err(format!("rms_norm_eps is {}; it must be above 0", self.rms_norm_eps));
        }
        if !(self.rope_theta.is_finite() && self.rope_theta > 0.0) {
            return Err(format!("rope_theta is {}; it must be above 0", self.rope_theta));
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

    /// Rotary frequencies, `head_dim / 2` of them, in radians per position.
    pub fn rope_frequencies(&self) -> Vec<f32> {
        (0..self.head_dim / 2)
            .map(|i| {
                // transformers computes the exponent and the power in f32.
                let exponent = (2 * i) as f32 / self.head_dim as f32;
                let frequency = 1.0 / (self.rope_theta as f32).powf(exponent);
                self.rope_scaling.apply(frequency)
            })
            .collect()
    }
}

impl RopeScaling {
    fn apply(self, frequency: f32) -> f32 {
        match self {
            RopeScaling::None => frequency,
            RopeScaling::Linear { factor } => frequency / factor as f32,
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings: original,
            } => {
                let f = f64::from(frequency);
                let wavelength = 2.0 * std::f64::consts::PI / f;
                let scaled = if wavelength > original / low_freq_factor {
                    f / factor
                } else if wavelength < original / high_freq_factor {
                    f
                } else {
                    let smooth = (original / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
                    (1.0 - smooth) * f / factor + smooth * f
                };
                scaled as f32
            }
        }
    }
}

/// Sizes above this are refused, so that no product of two of them overflows or allocates the machine away.
const MAX_SIZE: u64 = 1 << 24;

struct Fields<'a>(&'a Map<String, Value>);

impl<'a> Fields<'a> {
    /// The field's value; absent and `null` are the same.
    fn get(&self, name: &str) -> Option<&'a Value> {
        self.0.get(name).filter(|v| !v.is_null())
    }

    fn size(&self, name: &str) -> std::result::Result<usize, String> {
        self.optional_size(name)?.ok_or_else(|| format!("{name} is missing"))
    }

    fn optional_size(&self, name: &str) -> std::result::Result<Option<usize>, String> {
        self.get(name)
            .map(|value| match value.as_u64() {
                Some(n @ 1..=MAX_SIZE) => Ok(n as usize),
                _ => Err(format!("{name} is {value}; expected a whole number from 1 to {MAX_SIZE}")),
            })
            .transpose()
    }

    fn optional_number(&self, name: &str) -> std::result::Result<Option<f64>, String> {
        self.get(name)
            .map(|value| value.as_f64().ok_or_else(|| format!("{name} is {value}; expected a number")))
            .transpose()
    }

    fn number(&self, name: &str) -> std::result::Result<f64, String> {
        self.optional_number(name)?.ok_or_else(|| format!("{name} is missing"))
    }

    fn flag(&self, name: &str) -> std::result::Result<bool, String> {
        match self.get(name) {
            None => Ok(false),
            Some(value) => value.as_bool().ok_or_else(|| format!("{name} is {value}; expected true or false")),
        }
    }

    fn refuse_unsupported(&self) -> std::result::Result<(), String> {
        match self.get("model_type").and_then(Value::as_str) {
            Some("llama") => {}
            other => {
                return Err(format!("model_type is {}; supported: llama", other.unwrap_or("missing")));
            }
        }
        if let Some(names) = self.get("architectures")
            && !names.as_array().is_some_and(|a| a.iter().any(|n| n == "LlamaForCausalLM"))
        {
            return Err(format!("architectures is {names}; supported: LlamaForCausalLM"));
        }
        match self.get("hidden_act") {
            None => {}
            Some(Value::String(act)) if act == "silu" => {}
            Some(other) => return Err(format!("hidden_act is {other}; supported: silu")),
        }
        for name in ["attention_bias", "mlp_bias"] {
            if self.flag(name)? {
                return Err(format!("{name} is true; linear layers with a bias are not supported"));
            }
        }
        if self.get("quantization_config").is_some() {
            return Err("quantization_config is set; give the unquantized checkpoint".into());
        }
        if let Some(tp) = self.get("pretraining_tp").filter(|tp| tp.as_u64() != Some(1)) {
            return Err(format!("pretraining_tp is {tp}; supported: 1"));
        }
        Ok(())
    }

    /// Base and scaling of the rotary embedding. Newer transformers write both into `rope_parameters`, older ones
    /// `rope_theta` and `rope_scaling` at the top.
    fn rope(&self) -> std::result::Result<(f64, RopeScaling), String> {
        let empty = Map::new();
        let parameters = match (self.get("rope_parameters"), self.get("rope_scaling")) {
            (None, None) => &empty,
            (Some(value), _) | (None, Some(value)) => {
                value.as_object().ok_or_else(|| format!("rope parameters are {value}; expected an object"))?
            }
        };
        let rope = Fields(parameters);
        let theta = match rope.optional_number("rope_theta")? {
            Some(theta) => theta,
            None => self.optional_number("rope_theta")?.unwrap_or(10_000.0),
        };
        let kind = rope.get("rope_type").or(rope.get("type"));
        let scaling = match kind.map(|k| k.as_str().unwrap_or_default()) {
            None | Some("default") => RopeScaling::None,
            Some("linear") => RopeScaling::Linear { factor: rope.number("factor")? },
            Some("llama3") => RopeScaling::Llama3 {
                factor: rope.number("factor")?,
                low_freq_factor: rope.number("low_freq_factor")?,
                high_freq_factor: rope.number("high_freq_factor")?,
                original_max_position_embeddings: rope.number("original_max_position_embeddings")?,
            },
            Some(other) => {
                return Err(format!("rope_type is {other:?}; supported: default, linear, llama3"));
            }
        };
        Ok((theta, scaling))
    }
}

#[cfg(test)]
mod tests {
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
        assert_eq!(config.rope_theta, 100_000.0);
        assert!(config.tie_word_embeddings);
        assert_eq!(config.rope_scaling, RopeScaling::None);
    }

    #[test]
    fn rope_is_read_where_newer_transformers_write_it() {
        let config = with(serde_json::json!({
            "rope_theta": null,
            "rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 4.0}
        }))
        .unwrap();
        assert_eq!(config.rope_theta, 500_000.0);
        assert_eq!(config.rope_scaling, RopeScaling::Linear { factor: 4.0 });
    }

    #[test]
    fn what_would_change_the_numbers_is_refused_by_name() {
        for (changes, name) in [
            (serde_json::json!({"attention_bias": true}), "attention_bias"),
            (serde_json::json!({"mlp_bias": true}), "mlp_bias"),
            (serde_json::json!({"hidden_act": "gelu"}), "hidden_act"),
            (serde_json::json!({"model_type": "qwen3"}), "model_type"),
            (serde_json::json!({"rope_scaling": {"type": "yarn", "factor": 2.0}}), "rope_type"),
            (serde_json::json!({"rope_scaling": {"type": "linear"}}), "factor"),
            (serde_json::json!({"hidden_size": 0}), "hidden_size"),
            (serde_json::json!({"vocab_size": 1e30}), "vocab_size"),
            (serde_json::json!({"num_key_value_heads": 4}), "num_key_value_heads"),
            (serde_json::json!({"head_dim": 63}), "head_dim"),
            (serde_json::json!({"quantization_config": {"bits": 4}}), "quantization_config"),
        ] {
            let message = with(changes).unwrap_err();
            assert!(message.contains(name), "{name}: {message}");
        }
    }

    #[test]
    fn llama3_scaling_keeps_high_frequencies_and_divides_low_ones() {
        let config = with(serde_json::json!({"rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3",
            "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192}}))
        .unwrap();
        let plain = ModelConfig { rope_scaling: RopeScaling::None, ..config.clone() }.rope_frequencies();
        let scaled = config.rope_frequencies();
        assert_eq!(scaled[0], plain[0]);
        assert!((scaled[31] - plain[31] / 8.0).abs() < 1e-12);
        assert!(scaled.iter().zip(&plain).any(|(s, p)| *s < p * 0.9 && *s > p / 7.0), "none is blended");
    }
}
