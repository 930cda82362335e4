//! What tells one model family from another in `config.json`: defaults, field names, and which parts of the block are
//! used. Defaults are those of transformers' configuration classes.

use serde_json::{Map, Value};

use super::fields::Fields;
use super::{Activation, LayerConfig, ModelConfig, Rope};

/// A model family, by transformers' `model_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Family {
    Llama,
    Mistral,
    Qwen2,
    Qwen3,
    Phi3,
    Gemma2,
    Gemma3,
}

/// More blocks than any model has: what is allocated for each must not grow with what a damaged file says.
const MAX_LAYERS: usize = 1024;

/// `model_type` and class of each family.
const FAMILIES: [(&str, &str, Family); 7] = [
    ("llama", "LlamaForCausalLM", Family::Llama),
    ("mistral", "MistralForCausalLM", Family::Mistral),
    ("qwen2", "Qwen2ForCausalLM", Family::Qwen2),
    ("qwen3", "Qwen3ForCausalLM", Family::Qwen3),
    ("phi3", "Phi3ForCausalLM", Family::Phi3),
    ("gemma2", "Gemma2ForCausalLM", Family::Gemma2),
    ("gemma3_text", "Gemma3ForCausalLM", Family::Gemma3),
];

impl Family {
    pub(super) fn of(fields: &Fields<'_>) -> Result<Self, String> {
        let model_type = fields.optional_text("model_type")?.unwrap_or("missing");
        let Some((_, class, family)) = FAMILIES.iter().find(|(name, ..)| *name == model_type) else {
            let supported: Vec<&str> = FAMILIES.iter().map(|(name, ..)| *name).collect();
            return Err(format!("model_type is {model_type}; supported: {}", supported.join(", ")));
        };
        if let Some(names) = fields.get("architectures")
            && !names.as_array().is_some_and(|names| names.iter().any(|name| name == class))
        {
            return Err(format!("architectures is {names}; supported for model_type {model_type}: {class}"));
        }
        Ok(*family)
    }

    fn is_gemma(self) -> bool {
        matches!(self, Family::Gemma2 | Family::Gemma3)
    }

    pub(super) fn config(self, fields: &Fields<'_>) -> Result<ModelConfig, String> {
        refuse_unsupported(fields)?;
        let hidden_size = fields.size("hidden_size")?;
        let num_attention_heads = fields.size("num_attention_heads")?;
        let num_hidden_layers = fields.size("num_hidden_layers")?;
        if num_hidden_layers > MAX_LAYERS {
            return Err(format!("num_hidden_layers is {num_hidden_layers}; at most {MAX_LAYERS}"));
        }
        let head_dim = fields.optional_size("head_dim")?.unwrap_or(match self {
            Family::Qwen3 => 128,
            Family::Gemma2 | Family::Gemma3 => 256,
            _ => hidden_size / num_attention_heads,
        });
        let max_position_embeddings = fields.optional_size("max_position_embeddings")?.unwrap_or(2048);
        let ropes = self.ropes(fields, head_dim, max_position_embeddings)?;
        let attention_bias = fields.flag("attention_bias")?;
        let eps = fields.optional_positive("rms_norm_eps")?.unwrap_or(if self == Family::Phi3 { 1e-5 } else { 1e-6 });
        let query_scale = match self.is_gemma() {
            true => fields.optional_positive("query_pre_attn_scalar")?.unwrap_or(256.0),
            false => head_dim as f64,
        };
        let [attention_softcap, final_softcap] = [("attn_logit_softcapping", 50.0), ("final_logit_softcapping", 30.0)]
            .map(|(name, default)| match self {
                Family::Gemma2 if fields.is_absent(name) => Ok(Some(default)),
                Family::Gemma2 | Family::Gemma3 => fields.optional_positive(name).map(|cap| cap.map(|cap| cap as f32)),
                _ => Ok(None),
            });
        Ok(ModelConfig {
            vocab_size: fields.size("vocab_size")?,
            hidden_size,
            intermediate_size: fields.size("intermediate_size")?,
            num_hidden_layers,
            num_attention_heads,
            num_key_value_heads: fields.optional_size("num_key_value_heads")?.unwrap_or(num_attention_heads),
            head_dim,
            max_position_embeddings,
            rms_norm_eps: eps as f32,
            stored_as: None,
            tie_word_embeddings: fields.optional_flag("tie_word_embeddings")?.unwrap_or(self.is_gemma()),
            pad_token_id: self.pad_token_id(fields)?,
            activation: self.activation(fields)?,
            layers: self.layers(fields, num_hidden_layers, ropes.len())?,
            ropes,
            query_key_value_bias: attention_bias || self == Family::Qwen2,
            output_bias: attention_bias && self != Family::Qwen2,
            mlp_bias: fields.flag("mlp_bias")?,
            query_key_norm: matches!(self, Family::Qwen3 | Family::Gemma3),
            fused: self == Family::Phi3,
            sandwich_norms: self.is_gemma(),
            norm_offset: if self.is_gemma() { 1.0 } else { 0.0 },
            embedding_scale: if self.is_gemma() { (hidden_size as f64).sqrt() as f32 } else { 1.0 },
            attention_scale: query_scale.powf(-0.5) as f32,
            attention_softcap: if self == Family::Gemma2 { attention_softcap? } else { None },
            final_softcap: final_softcap?,
        })
    }

    fn pad_token_id(self, fields: &Fields<'_>) -> Result<Option<u32>, String> {
        let Some(id) = fields.get("pad_token_id") else {
            let default = match self {
                Family::Phi3 => Some(32_000),
                Family::Gemma2 | Family::Gemma3 => Some(0),
                _ => None,
            };
            return Ok(default.filter(|_| fields.is_absent("pad_token_id")));
        };
        // -1 stands for none in some older files.
        match id.as_i64() {
            Some(-1) => Ok(None),
            Some(id) if (0..=i64::from(u32::MAX)).contains(&id) => Ok(Some(id as u32)),
            _ => Err(format!("pad_token_id is {id}; expected the number of a token")),
        }
    }

    fn activation(self, fields: &Fields<'_>) -> Result<Activation, String> {
        let name = if self.is_gemma() { "hidden_activation" } else { "hidden_act" };
        let default = if self.is_gemma() { "gelu_pytorch_tanh" } else { "silu" };
        match fields.optional_text(name)?.unwrap_or(default) {
            "silu" => Ok(Activation::Silu),
            "gelu_pytorch_tanh" => Ok(Activation::GeluTanh),
            other => Err(format!("{name} is {other:?}; supported: silu, gelu_pytorch_tanh")),
        }
    }

    /// The rotary embeddings. Newer transformers write base and scaling into `rope_parameters` (Gemma 3: one object for
    /// each type of layer), older ones `rope_theta` and `rope_scaling` at the top.
    fn ropes(self, fields: &Fields<'_>, head_dim: usize, longest: usize) -> Result<Vec<Rope>, String> {
        let empty = Map::new();
        let parameters = fields.optional_object("rope_parameters")?;
        if self != Family::Gemma3 {
            let parameters = parameters.or(fields.optional_object("rope_scaling")?);
            let theta = fields.optional_number("rope_theta")?.unwrap_or(10_000.0);
            let mut rope = parameters.map_or_else(|| empty.clone(), |parameters| parameters.0.clone());
            if let (Some(share), false) =
                (fields.get("partial_rotary_factor"), rope.contains_key("partial_rotary_factor"))
            {
                rope.insert("partial_rotary_factor".into(), share.clone());
            }
            return Ok(vec![Rope::read(&Fields(&rope), theta, head_dim, longest)?]);
        }
        let of = |layers: &str, older: Option<Fields<'_>>, base: &str, default: f64| {
            let newer = parameters.map(|parameters| parameters.optional_object(layers)).transpose()?.flatten();
            let theta = fields.optional_number(base)?.unwrap_or(default);
            Rope::read(&newer.or(older).unwrap_or(Fields(&empty)), theta, head_dim, longest)
        };
        let older = fields.optional_object("rope_scaling")?;
        Ok(vec![
            of("full_attention", older, "rope_theta", 1e6)?,
            of("sliding_attention", None, "rope_local_base_freq", 1e4)?,
        ])
    }

    /// The window and the rotary embedding of each layer.
    fn layers(self, fields: &Fields<'_>, number: usize, ropes: usize) -> Result<Vec<LayerConfig>, String> {
        let window = match (self, fields.optional_size("sliding_window")?) {
            (Family::Llama, _) => None,
            (Family::Mistral | Family::Gemma2 | Family::Gemma3, None) if fields.is_absent("sliding_window") => {
                Some(4096)
            }
            (Family::Qwen2 | Family::Qwen3, _) if !fields.flag("use_sliding_window")? => None,
            (_, window) => window,
        };
        let full_layers = fields.optional_size("max_window_layers")?.unwrap_or(28);
        let pattern = fields.optional_size("sliding_window_pattern")?.unwrap_or(6);
        let listed = match fields.get("layer_types") {
            Some(types) if !matches!(self, Family::Llama | Family::Mistral | Family::Phi3) => {
                Some(layer_types(types, number)?)
            }
            _ => None,
        };
        let slides = |i: usize| match (&listed, self) {
            (Some(listed), _) => listed[i],
            (None, Family::Qwen2 | Family::Qwen3) => i >= full_layers,
            (None, Family::Gemma2) => i.is_multiple_of(2),
            (None, Family::Gemma3) => !(i + 1).is_multiple_of(pattern),
            _ => true,
        };
        Ok((0..number)
            .map(|i| LayerConfig { window: window.filter(|_| slides(i)), rope: usize::from(ropes > 1 && slides(i)) })
            .collect())
    }
}

/// Whether each layer slides.
fn layer_types(types: &Value, number: usize) -> Result<Vec<bool>, String> {
    let types = types.as_array().filter(|types| types.len() == number);
    let types = types.ok_or_else(|| format!("layer_types must list {number} layers"))?;
    let slides = types.iter().map(|kind| match kind.as_str() {
        Some("full_attention") => Ok(false),
        Some("sliding_attention") => Ok(true),
        _ => Err(format!("layer_types has {kind}; supported: full_attention, sliding_attention")),
    });
    slides.collect()
}

/// Fields that would change the numbers, in any family.
fn refuse_unsupported(fields: &Fields<'_>) -> Result<(), String> {
    if let Some(tp) = fields.get("pretraining_tp").filter(|tp| tp.as_u64() != Some(1)) {
        return Err(format!("pretraining_tp is {tp}; supported: 1"));
    }
    for name in ["attention_dropout", "resid_pdrop", "embd_pdrop"] {
        if let Some(share) = fields.optional_number(name)?.filter(|share| *share != 0.0) {
            return Err(format!("{name} is {share}; supported: 0 (set lora.dropout instead)"));
        }
    }
    if fields.flag("use_bidirectional_attention")? {
        return Err("use_bidirectional_attention is true; only causal models can be trained".into());
    }
    Ok(())
}
