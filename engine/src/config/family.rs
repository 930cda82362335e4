//! What tells one model family from another in `config.json`: defaults, field names, and which parts of the block are
//! used. Defaults are those of transformers' configuration classes.

use serde_json::{Map, Value};

use super::fields::Fields;
use super::kinds::{refuse_class, refuse_other_kinds};
use super::known::{refuse_unknown, refuse_unknown_in, shown};
use super::rope::RopeContext;
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
            refuse_other_kinds(fields)?;
            refuse_class(fields)?;
            let supported: Vec<&str> = FAMILIES.iter().map(|(name, ..)| *name).collect();
            return Err(format!("model_type is {model_type}; supported: {}", supported.join(", ")));
        };
        let names = fields.get("architectures").filter(|names| names.as_array().is_none_or(|names| !names.is_empty()));
        if let Some(names) = names
            && !names.as_array().is_some_and(|names| names.iter().any(|name| name == class))
        {
            refuse_class(fields)?;
            return Err(format!("architectures is {}; supported for model_type {model_type}: {class}", shown(names)));
        }
        Ok(*family)
    }

    /// Fields that this family reads, besides those that all do.
    fn fields(self) -> &'static [&'static str] {
        match self {
            Family::Llama => {
                &["hidden_act", "attention_bias", "mlp_bias", "layer_types", "sliding_window", "rope_theta", ORIGINAL]
            }
            Family::Mistral => &["hidden_act", "layer_types", "sliding_window", "rope_theta", ORIGINAL],
            Family::Qwen2 | Family::Qwen3 => &[
                "hidden_act",
                "attention_bias",
                "layer_types",
                "sliding_window",
                "use_sliding_window",
                "rope_theta",
                ORIGINAL,
            ],
            Family::Phi3 => &["hidden_act", "layer_types", "sliding_window", "rope_theta", ORIGINAL],
            Family::Gemma2 => &[
                "hidden_act",
                "hidden_activation",
                "attention_bias",
                "attn_logit_softcapping",
                "final_logit_softcapping",
                "layer_types",
                "query_pre_attn_scalar",
                "rope_theta",
                "sliding_window",
                ORIGINAL,
            ],
            Family::Gemma3 => &[
                "hidden_act",
                "hidden_activation",
                "_sliding_window_pattern",
                "attention_bias",
                "final_logit_softcapping",
                "layer_types",
                "query_pre_attn_scalar",
                "rope_local_base_freq",
                "rope_theta",
                "sliding_window",
                "sliding_window_pattern",
            ],
        }
    }

    fn model_type(self) -> &'static str {
        FAMILIES.iter().find(|(_, _, family)| *family == self).map_or("", |(name, ..)| name)
    }

    fn is_gemma(self) -> bool {
        matches!(self, Family::Gemma2 | Family::Gemma3)
    }

    pub(super) fn config(self, fields: &Fields<'_>) -> Result<ModelConfig, String> {
        refuse_other_kinds(fields)?;
        refuse_unknown(fields.0, self.model_type(), self.fields())?;
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
        let max_position_embeddings = fields.optional_size("max_position_embeddings")?.unwrap_or(match self {
            Family::Llama => 2048,
            Family::Phi3 => 4096,
            Family::Gemma2 => 8192,
            Family::Qwen2 | Family::Qwen3 => 32_768,
            Family::Mistral | Family::Gemma3 => 131_072,
        });
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
            layers: self.layers(fields, num_hidden_layers, max_position_embeddings, ropes.len())?,
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
        let activation = fields.optional_text(name)?.unwrap_or(default);
        // Gemma has both, and the older one counts no more.
        if let Some(older) = fields.optional_text("hidden_act")?.filter(|older| *older != activation) {
            return Err(format!(
                "hidden_act is {older:?}, and hidden_activation {activation:?}: they must be the same"
            ));
        }
        match activation {
            "silu" => Ok(Activation::Silu),
            "gelu_pytorch_tanh" => Ok(Activation::GeluTanh),
            other => Err(format!("{name} is {other:?}; supported: silu, gelu_pytorch_tanh")),
        }
    }

    /// The rotary embeddings. Newer transformers write base and scaling into `rope_parameters` (Gemma 3: one object for
    /// each type of layer), older ones `rope_theta` and `rope_scaling` at the top.
    fn ropes(self, fields: &Fields<'_>, head_dim: usize, longest: usize) -> Result<Vec<Rope>, String> {
        let [newer, older] = ["rope_parameters", "rope_scaling"]
            .map(|name| Ok::<_, String>(fields.optional_object(name)?.filter(|object| !object.0.is_empty())));
        let (newer, older) = (newer?, older?);
        if let (Some(newer), Some(older)) = (newer, older)
            && newer.0 != older.0
        {
            return Err(
                "rope_parameters and rope_scaling are both there, and differ: put what holds into rope_parameters, \
                        rope_theta too, and remove rope_scaling"
                    .into(),
            );
        }
        let context = RopeContext {
            theta: 10_000.0,
            head_dim,
            max_position_embeddings: longest,
            // Where Phi 3 does not say it, transformers takes that of its first model.
            original_max_position_embeddings: fields
                .optional_positive(ORIGINAL)?
                .or((self == Family::Phi3).then_some(4096.0)),
            may_be_partial: self == Family::Phi3,
        };
        let objects = (newer, older);
        match self {
            Family::Gemma3 => gemma3_ropes(fields, objects, context),
            _ => Ok(vec![one_rope(fields, objects, context)?]),
        }
    }

    /// The window and the rotary embedding of each layer.
    fn layers(
        self,
        fields: &Fields<'_>,
        number: usize,
        longest: usize,
        ropes: usize,
    ) -> Result<Vec<LayerConfig>, String> {
        let window = self.window(fields, longest)?;
        let full_layers = fields.optional_size("max_window_layers")?.unwrap_or(28);
        let pattern = fields.optional_size("sliding_window_pattern")?.unwrap_or(6);
        let listed = fields.get("layer_types").map(|types| layer_types(types, number)).transpose()?;
        if listed.is_none() && fields.optional_size("_sliding_window_pattern")?.is_some_and(|other| other != pattern) {
            return Err("_sliding_window_pattern counts only with layer_types: set sliding_window_pattern".into());
        }
        let alternates = !matches!(self, Family::Llama | Family::Mistral | Family::Phi3);
        let slides = |i: usize| match (&listed, self) {
            (Some(listed), _) => listed[i],
            (None, Family::Qwen2 | Family::Qwen3) => i >= full_layers,
            (None, Family::Gemma2) => i.is_multiple_of(2),
            (None, Family::Gemma3) => !(i + 1).is_multiple_of(pattern),
            _ => window.is_some(),
        };
        let all_slide = |slides: bool| listed.as_ref().is_none_or(|listed| listed.iter().all(|layer| *layer == slides));
        match window {
            None if !all_slide(false) => {
                return Err("layer_types has sliding_attention, and sliding_window is null or not used".into());
            }
            Some(_) if !alternates && !all_slide(true) => {
                let model_type = self.model_type();
                return Err(format!("layer_types has full_attention: all layers of model_type {model_type} slide"));
            }
            _ => {}
        }
        Ok((0..number)
            .map(|i| LayerConfig { window: window.filter(|_| slides(i)), rope: usize::from(ropes > 1 && slides(i)) })
            .collect())
    }

    /// The window of the layers that slide.
    fn window(self, fields: &Fields<'_>, longest: usize) -> Result<Option<usize>, String> {
        let window = fields.optional_size("sliding_window")?;
        match self {
            // The family has none; models that were made from others may still name theirs.
            Family::Llama => match window.filter(|window| *window < longest) {
                Some(window) if fields.optional_flag("use_sliding_window")? != Some(false) => {
                    Err(format!("sliding_window is {window}; model_type llama has none"))
                }
                _ => Ok(None),
            },
            Family::Qwen2 | Family::Qwen3 if !fields.flag("use_sliding_window")? => Ok(None),
            Family::Mistral | Family::Gemma2 | Family::Gemma3 if fields.is_absent("sliding_window") => Ok(Some(4096)),
            _ => Ok(window),
        }
    }
}

/// Longest row of pre-training, which some models name at the top.
const ORIGINAL: &str = "original_max_position_embeddings";

/// The rotary embedding of all layers.
fn one_rope(fields: &Fields<'_>, (newer, older): RopeObjects<'_>, context: RopeContext) -> Result<Rope, String> {
    let object = if newer.is_some() { "rope_parameters" } else { "rope_scaling" };
    let mut rope = newer.or(older).map_or_else(Map::new, |rope| rope.0.clone());
    for (name, default) in [("rope_theta", None), ("partial_rotary_factor", Some(Value::from(1.0)))] {
        let Some(top) = fields.get(name) else { continue };
        match rope.get(name).filter(|inner| !inner.is_null()) {
            Some(inner) if inner.as_f64() != top.as_f64() && default.as_ref() != Some(top) => {
                return Err(format!("{name} is {top} at the top, and {inner} in {object}: they must be the same"));
            }
            Some(_) => {}
            None => drop(rope.insert(name.to_owned(), top.clone())),
        }
    }
    Rope::read(object, &Fields(&rope), context)
}

/// `rope_parameters` and `rope_scaling`, where they hold anything.
type RopeObjects<'a> = (Option<Fields<'a>>, Option<Fields<'a>>);

/// The rotary embeddings of Gemma 3's layers: first of those that see all, then of those that slide.
fn gemma3_ropes(
    fields: &Fields<'_>,
    (newer, older): RopeObjects<'_>,
    context: RopeContext,
) -> Result<Vec<Rope>, String> {
    const FULL: &str = "full_attention";
    const SLIDING: &str = "sliding_attention";
    if let Some(newer) = newer {
        refuse_unknown_in("rope_parameters", newer.0, &[FULL, SLIDING])?;
    }
    let empty = Map::new();
    let of = |layers: &str, older: Option<Fields<'_>>, base: &str, default: f64| {
        let newer = newer.map(|newer| newer.optional_object(layers)).transpose()?.flatten();
        let theta = fields.optional_number(base)?;
        let inner = newer.map(|newer| newer.optional_number("rope_theta")).transpose()?.flatten();
        if let (Some(top), Some(inner)) = (theta, inner)
            && top != inner
        {
            return Err(format!(
                "{base} is {top}, and rope_theta {inner} in rope_parameters.{layers}: they must be the same"
            ));
        }
        let context = RopeContext { theta: theta.unwrap_or(default), ..context };
        let object = if newer.is_some() { format!("rope_parameters.{layers}") } else { "rope_scaling".to_owned() };
        Rope::read(&object, &newer.or(older).unwrap_or(Fields(&empty)), context)
    };
    Ok(vec![of(FULL, older, "rope_theta", 1e6)?, of(SLIDING, None, "rope_local_base_freq", 1e4)?])
}

/// Whether each layer slides.
fn layer_types(types: &Value, number: usize) -> Result<Vec<bool>, String> {
    let types = types.as_array().filter(|types| types.len() == number);
    let types = types.ok_or_else(|| format!("layer_types must list {number} layers"))?;
    let slides = types.iter().map(|kind| match kind.as_str() {
        Some("full_attention") => Ok(false),
        Some("sliding_attention") => Ok(true),
        _ => Err(format!("layer_types has {}; supported: full_attention, sliding_attention", shown(kind))),
    });
    slides.collect()
}
