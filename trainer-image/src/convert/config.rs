//! The model's dimensions: from GGUF metadata to `config.json` and `generation_config.json`.

use serde_json::{Value, json};

use super::{
    ConvertError, Gguf,
    architecture::{ARCHITECTURES, Architecture},
    kinds::refuse_unknown_keys,
    names::{LONGROPE_FACTORS, ROPE_FACTORS},
    tokenizer::Tokenizer,
};

/// Sizes above this are refused: products of two must not overflow, nor what a damaged file says allocate the machine
/// away.
const MAX_SIZE: usize = 1 << 24;

/// Dimensions of a model.
pub(super) struct Dimensions {
    pub(super) architecture: &'static Architecture,
    pub(super) layers: usize,
    pub(super) hidden: usize,
    pub(super) feed_forward: usize,
    pub(super) heads: usize,
    pub(super) key_value_heads: usize,
    pub(super) head_dim: usize,
    pub(super) vocabulary: usize,
    pub(super) context_length: usize,
    /// Whether the output layer is the embedding.
    pub(super) tied: bool,
    rms_norm_eps: f64,
    rope_theta: f64,
    /// transformers' `rope_scaling`.
    rope_scaling: Value,
    /// Fields of `config.json` that only this family has.
    of_family: Value,
}

/// A file's metadata of one architecture.
#[derive(Clone, Copy)]
struct Keys<'a> {
    gguf: &'a Gguf,
    architecture: &'static Architecture,
}

impl Keys<'_> {
    fn name(self, key: &str) -> String {
        format!("{}.{key}", self.architecture.name)
    }

    fn refuse(self, key: &str, found: impl ToString, supported: &str) -> ConvertError {
        ConvertError::UnsupportedKey { key: self.name(key), found: found.to_string(), supported: supported.into() }
    }

    fn optional_size(self, key: &str) -> Result<Option<usize>, ConvertError> {
        match self.gguf.optional_number(&self.name(key))? {
            Some(found) if found > MAX_SIZE => Err(self.refuse(key, found, &format!("at most {MAX_SIZE}"))),
            found => Ok(found),
        }
    }

    /// A size that is 1 at least.
    fn size(self, key: &str) -> Result<usize, ConvertError> {
        match self.optional_size(key)? {
            Some(0) => Err(self.refuse(key, 0, "at least 1")),
            found => found.ok_or_else(|| ConvertError::MissingKey(self.name(key))),
        }
    }

    fn optional_float(self, key: &str) -> Result<Option<f64>, ConvertError> {
        self.gguf.has(&self.name(key)).then(|| self.gguf.float(&self.name(key))).transpose()
    }
}

impl Dimensions {
    pub(super) fn read(gguf: &mut Gguf) -> Result<Self, ConvertError> {
        let name = gguf.text("general.architecture")?;
        let Some(architecture) = ARCHITECTURES.iter().find(|known| known.name == name) else {
            let known: Vec<&str> = ARCHITECTURES.iter().map(|known| known.name).collect();
            return Err(ConvertError::UnsupportedKey {
                key: "general.architecture".into(),
                found: format!("\"{name}\""),
                supported: known.join(", "),
            });
        };
        refuse_unknown_keys(gguf, architecture.name)?;
        let keys = Keys { gguf, architecture };
        if keys.gguf.optional_flag(&keys.name("attention.causal"))? == Some(false) {
            return Err(keys.refuse("attention.causal", false, "true"));
        }
        if let Some(experts @ 1..) = keys.optional_size("expert_count")? {
            return Err(keys.refuse("expert_count", experts, "0 (no mixture of experts)"));
        }
        let (hidden, heads) = (keys.size("embedding_length")?, keys.size("attention.head_count")?);
        let head_dim = match keys.optional_size("attention.key_length")? {
            Some(head_dim) if head_dim > 0 && head_dim.is_multiple_of(2) => head_dim,
            Some(odd) => return Err(keys.refuse("attention.key_length", odd, "an even number above 0")),
            None if hidden.is_multiple_of(2 * heads) => hidden / heads,
            None => return Err(keys.refuse("attention.head_count", heads, "a divisor of half the embedding's length")),
        };
        if let Some(length) = keys.optional_size("attention.value_length")?.filter(|length| *length != head_dim) {
            return Err(keys.refuse("attention.value_length", length, &format!("{head_dim}, the length of keys")));
        }
        let key_value_heads = match keys.optional_size("attention.head_count_kv")? {
            Some(0) => return Err(keys.refuse("attention.head_count_kv", 0, "at least 1")),
            found => found.unwrap_or(heads),
        };
        let layers = keys.size("block_count")?;
        let tensors = gguf.tensor_names().count();
        if layers > tensors {
            return Err(keys.refuse("block_count", layers, &format!("at most {tensors}, as each block has tensors")));
        }
        let rope_theta = keys.optional_float("rope.freq_base")?.unwrap_or(10_000.0);
        let rotated = keys.optional_size("rope.dimension_count")?.unwrap_or(head_dim);
        if rotated != head_dim && !architecture.is_fused {
            return Err(keys.refuse("rope.dimension_count", rotated, &format!("{head_dim}, the whole head")));
        }
        let context_length = keys.size("context_length")?;
        if let Some(window) = keys.optional_size("attention.sliding_window")?
            && ["llama", "qwen2", "qwen3"].contains(&architecture.name)
            && (1..context_length).contains(&window)
        {
            return Err(keys.refuse("attention.sliding_window", window, "none in this architecture"));
        }
        let of_family = of_family(keys, layers, hidden, heads, head_dim, rotated)?;
        let dimensions = Self {
            architecture,
            layers,
            hidden,
            feed_forward: keys.size("feed_forward_length")?,
            heads,
            key_value_heads,
            head_dim,
            vocabulary: gguf.texts("tokenizer.ggml.tokens")?.len(),
            context_length,
            tied: !gguf.has_tensor("output.weight"),
            rms_norm_eps: keys
                .optional_float("attention.layer_norm_rms_epsilon")?
                .ok_or_else(|| ConvertError::MissingKey(keys.name("attention.layer_norm_rms_epsilon")))?,
            rope_theta,
            rope_scaling: rope_scaling(keys)?,
            of_family,
        };
        if LONGROPE_FACTORS.iter().any(|name| gguf.has_tensor(name)) {
            let rope_scaling = longrope_scaling(gguf, dimensions.rope_scaling, rotated)?;
            return Ok(Self { rope_scaling, ..dimensions });
        }
        if dimensions.rope_scaling["rope_type"] == "longrope" {
            return Err(ConvertError::MissingTensor(LONGROPE_FACTORS[0].into()));
        }
        if !gguf.has_tensor(ROPE_FACTORS) {
            return Ok(dimensions);
        }
        gguf.check_tensor(ROPE_FACTORS, &[head_dim / 2])?;
        let rope_scaling = llama3_scaling(&gguf.dequantize(ROPE_FACTORS)?, rope_theta, head_dim)?;
        Ok(Self { rope_scaling, ..dimensions })
    }

    pub(super) fn config_json(&self, tokenizer: &Tokenizer) -> Value {
        let mut config = json!({
            "architectures": [self.architecture.class],
            "attention_dropout": 0.0,
            "bos_token_id": tokenizer.bos,
            "eos_token_id": tokenizer.eos,
            "head_dim": self.head_dim,
            "hidden_size": self.hidden,
            "intermediate_size": self.feed_forward,
            "max_position_embeddings": self.context_length,
            "model_type": self.architecture.model_type,
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.key_value_heads,
            "pad_token_id": tokenizer.pad,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_scaling": self.rope_scaling,
            "rope_theta": self.rope_theta,
            "tie_word_embeddings": self.tied,
            "torch_dtype": "float32",
            "use_cache": true,
            "vocab_size": self.vocabulary,
        });
        if let (Some(config), Value::Object(of_family)) = (config.as_object_mut(), self.of_family.clone()) {
            config.extend(of_family);
        }
        config
    }
}

/// What llama.cpp's `rope.scaling` is to transformers. LongRoPE's divisors are tensors, and come later.
fn rope_scaling(keys: Keys<'_>) -> Result<Value, ConvertError> {
    const TYPE: &str = "rope.scaling.type";
    let kind = match keys.gguf.has(&keys.name(TYPE)) {
        true => keys.gguf.text(&keys.name(TYPE))?,
        // Phi 3's files have the divisors alone.
        false if keys.gguf.has_tensor(LONGROPE_FACTORS[0]) => "longrope",
        false => "none",
    };
    let factor = keys.optional_float("rope.scaling.factor")?;
    let needed = |key: &str| ConvertError::MissingKey(keys.name(key));
    if kind != "longrope" {
        refuse_unless(keys, "rope.scaling.attn_factor", 1.0)?;
    }
    match kind {
        "none" => Ok(Value::Null),
        "linear" => Ok(json!({"rope_type": "linear", "factor": factor.ok_or_else(|| needed("rope.scaling.factor"))?})),
        "yarn" => {
            for (key, plain) in [("yarn_ext_factor", 1.0), ("yarn_attn_factor", 1.0), ("yarn_log_multiplier", 0.0)] {
                refuse_unless(keys, &format!("rope.scaling.{key}"), plain)?;
            }
            Ok(json!({
                "rope_type": "yarn",
                "factor": factor.ok_or_else(|| needed("rope.scaling.factor"))?,
                "original_max_position_embeddings": keys.size("rope.scaling.original_context_length")?,
                "beta_fast": keys.optional_float("rope.scaling.yarn_beta_fast")?,
                "beta_slow": keys.optional_float("rope.scaling.yarn_beta_slow")?,
            }))
        }
        "longrope" => Ok(json!({
            "rope_type": "longrope",
            "original_max_position_embeddings": keys.size("rope.scaling.original_context_length")?,
            "attention_factor": keys.optional_float("rope.scaling.attn_factor")?,
        })),
        other => Err(keys.refuse(TYPE, format!("\"{other}\""), "none, linear, yarn, longrope")),
    }
}

/// Refuses a factor that has no counterpart in transformers.
fn refuse_unless(keys: Keys<'_>, key: &str, plain: f64) -> Result<(), ConvertError> {
    match keys.optional_float(key)?.filter(|found| *found != plain) {
        Some(found) => Err(keys.refuse(key, found, &plain.to_string())),
        None => Ok(()),
    }
}

fn longrope_scaling(gguf: &mut Gguf, mut scaling: Value, rotated: usize) -> Result<Value, ConvertError> {
    if scaling["rope_type"] != "longrope" {
        return Err(ConvertError::UnknownTensor(LONGROPE_FACTORS[0].into(), "its rope.scaling.type is not longrope"));
    }
    for (tensor, field) in LONGROPE_FACTORS.into_iter().zip(["long_factor", "short_factor"]) {
        gguf.check_tensor(tensor, &[rotated / 2])?;
        scaling[field] = gguf.dequantize(tensor)?.into();
    }
    Ok(scaling)
}

/// The scaling whose divisors these are. The file does not have its numbers; all Llama 3 have these but for the largest
/// divisor.
fn llama3_scaling(factors: &[f32], theta: f64, head_dim: usize) -> Result<Value, ConvertError> {
    let (low, high, original) = (1.0, 4.0, 8192.0);
    let factor = f64::from(factors.iter().copied().fold(1.0, f32::max));
    let expected = |i: usize| {
        let wavelength = 2.0 * std::f64::consts::PI * theta.powf((2 * i) as f64 / head_dim as f64);
        let kept = ((original / wavelength - low) / (high - low)).clamp(0.0, 1.0);
        1.0 / ((1.0 - kept) / factor + kept)
    };
    let is_known = factors.iter().enumerate().all(|(i, found)| (f64::from(*found) / expected(i) - 1.0).abs() < 1e-4);
    match is_known {
        true => Ok(json!({
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": original as usize,
        })),
        false => Err(ConvertError::UnknownTensor(ROPE_FACTORS.into(), "its divisors are not those of Llama 3")),
    }
}

/// Fields of `config.json` that other families don't have.
fn of_family(
    keys: Keys<'_>,
    layers: usize,
    hidden: usize,
    heads: usize,
    head_dim: usize,
    rotated: usize,
) -> Result<Value, ConvertError> {
    Ok(match keys.architecture.name {
        "llama" => json!({"hidden_act": "silu", "attention_bias": false, "mlp_bias": false, "pretraining_tp": 1}),
        "qwen3" => json!({"hidden_act": "silu", "attention_bias": false, "use_sliding_window": false}),
        "phi3" => json!({
            "hidden_act": "silu",
            "embd_pdrop": 0.0,
            "resid_pdrop": 0.0,
            "original_max_position_embeddings": match keys.optional_size("rope.scaling.original_context_length")? {
                Some(original) => original,
                None => keys.size("context_length")?,
            },
            "partial_rotary_factor": rotated as f64 / head_dim as f64,
            "sliding_window": keys.optional_size("attention.sliding_window")?.filter(|window| *window > 0),
        }),
        "gemma2" | "gemma3" => gemma(keys, layers, hidden, heads, head_dim)?,
        _ => json!({"hidden_act": "silu", "use_sliding_window": false}),
    })
}

fn gemma(keys: Keys<'_>, layers: usize, hidden: usize, heads: usize, head_dim: usize) -> Result<Value, ConvertError> {
    let is_gemma3 = keys.architecture.name == "gemma3";
    // The file does not say what scores are divided by: of the largest of each, known by its layers, it is not the head.
    let is_largest = layers == if is_gemma3 { 62 } else { 46 };
    let mut config = json!({
        "attention_bias": false,
        "attn_logit_softcapping": keys.optional_float("attn_logit_softcapping")?,
        "final_logit_softcapping": keys.optional_float("final_logit_softcapping")?,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": if is_largest { hidden / heads } else { head_dim },
        "sliding_window": keys.size("attention.sliding_window")?,
    });
    let pattern = match is_gemma3 {
        true => keys.optional_size("attention.sliding_window_pattern")?.unwrap_or(6).max(1),
        false => 2,
    };
    let kind = |i: usize| if (i + 1).is_multiple_of(pattern) { "full_attention" } else { "sliding_attention" };
    config["layer_types"] = (0..layers).map(kind).collect();
    if is_gemma3 {
        let local = keys.optional_float("rope.freq_base_swa")?;
        config["rope_local_base_freq"] = local.unwrap_or(10_000.0).into();
    }
    Ok(config)
}

pub(super) fn generation_config_json(tokenizer: &Tokenizer) -> Value {
    json!({
        "_from_model_config": true,
        "bos_token_id": tokenizer.bos,
        "eos_token_id": match tokenizer.end_of_turn {
            Some(end) if end != tokenizer.eos => json!([tokenizer.eos, end]),
            _ => json!(tokenizer.eos),
        },
        "pad_token_id": tokenizer.pad,
    })
}
