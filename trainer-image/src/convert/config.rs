//! The model's dimensions: from GGUF metadata to `config.json` and `generation_config.json`.

use serde_json::{Value, json};

use super::{ConvertError, Gguf, tokenizer::Tokenizer};

/// Sizes above this are refused.
const MAX_SIZE: usize = 1 << 24;

/// Dimensions of a Llama.
pub(super) struct LlamaShape {
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
    rope_theta: f64,
    rms_norm_eps: f64,
}

impl LlamaShape {
    pub(super) fn read(gguf: &Gguf) -> Result<Self, ConvertError> {
        let refuse = |key: &str, found: String, supported: &str| ConvertError::UnsupportedKey {
            key: key.into(),
            found,
            supported: supported.into(),
        };
        // Products of two sizes must not overflow, nor what a damaged file says allocate the machine away.
        let size = |key: &str, most: usize| match gguf.optional_number(key)? {
            Some(found) if found > most => Err(refuse(key, found.to_string(), &format!("at most {most}"))),
            found => Ok(found),
        };
        let number = |key: &str| size(key, MAX_SIZE)?.ok_or_else(|| ConvertError::MissingKey(key.to_owned()));
        let architecture = gguf.text("general.architecture")?;
        if architecture != "llama" {
            return Err(refuse("general.architecture", format!("\"{architecture}\""), "llama"));
        }
        if gguf.has("llama.rope.scaling.type") && gguf.text("llama.rope.scaling.type")? != "none" {
            let found = gguf.text("llama.rope.scaling.type")?.to_owned();
            return Err(refuse("llama.rope.scaling.type", found, "none"));
        }
        if let Some(experts @ 1..) = gguf.optional_number("llama.expert_count")? {
            return Err(refuse("llama.expert_count", experts.to_string(), "0 (no mixture of experts)"));
        }
        let (hidden, heads) = (number("llama.embedding_length")?, number("llama.attention.head_count")?);
        if heads == 0 || !hidden.is_multiple_of(heads) {
            return Err(refuse("llama.attention.head_count", heads.to_string(), "a divisor of llama.embedding_length"));
        }
        let head_dim = size("llama.attention.key_length", MAX_SIZE)?.unwrap_or(hidden / heads);
        let rotated = size("llama.rope.dimension_count", MAX_SIZE)?.unwrap_or(head_dim);
        if rotated != head_dim {
            return Err(refuse(
                "llama.rope.dimension_count",
                rotated.to_string(),
                &format!("{head_dim}, the whole head"),
            ));
        }
        let layers = number("llama.block_count")?;
        // Each block has tensors.
        size("llama.block_count", gguf.tensor_names().count())?;
        Ok(Self {
            layers,
            hidden,
            feed_forward: number("llama.feed_forward_length")?,
            heads,
            key_value_heads: size("llama.attention.head_count_kv", MAX_SIZE)?.unwrap_or(heads),
            head_dim,
            vocabulary: gguf.texts("tokenizer.ggml.tokens")?.len(),
            context_length: number("llama.context_length")?,
            tied: !gguf.tensor_names().any(|name| name == "output.weight"),
            rope_theta: if gguf.has("llama.rope.freq_base") { gguf.float("llama.rope.freq_base")? } else { 10_000.0 },
            rms_norm_eps: gguf.float("llama.attention.layer_norm_rms_epsilon")?,
        })
    }

    pub(super) fn config_json(&self, tokenizer: &Tokenizer) -> Value {
        json!({
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": false,
            "attention_dropout": 0.0,
            "bos_token_id": tokenizer.bos,
            "eos_token_id": tokenizer.eos,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.feed_forward,
            "max_position_embeddings": self.context_length,
            "mlp_bias": false,
            "model_type": "llama",
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.key_value_heads,
            "pad_token_id": tokenizer.pad,
            "pretraining_tp": 1,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_scaling": null,
            "rope_theta": self.rope_theta,
            "tie_word_embeddings": self.tied,
            "torch_dtype": "float32",
            "use_cache": true,
            "vocab_size": self.vocabulary,
        })
    }
}

pub(super) fn generation_config_json(tokenizer: &Tokenizer) -> Value {
    json!({
        "_from_model_config": true,
        "bos_token_id": tokenizer.bos,
        "eos_token_id": tokenizer.eos,
        "pad_token_id": tokenizer.pad,
    })
}
