//! The shape of a decoder language model, read from a Hugging Face `config.json`.
//!
//! All families are one block with parts that are used or not: a family is a configuration, no code of its own. Fields
//! that would change the numbers and that the engine does not know are refused by name: a model that is trained wrongly
//! costs more than one that is refused.

mod family;
mod fields;
mod kinds;
mod known;
mod quantization;
mod rope;
#[cfg(test)]
mod tests;

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
        let bytes = std::fs::read(&path).map_err(|e| Error::io(&path, e))?;
        Self::parse_bytes(&bytes).map_err(|message| Error::config(&path, message))
    }

    /// Reads the bytes of a `config.json`; the error is a message without the file's name.
    pub fn parse_bytes(bytes: &[u8]) -> std::result::Result<Self, String> {
        Self::parse(std::str::from_utf8(bytes).map_err(|e| format!("not UTF-8 text: {e}"))?)
    }

    /// Reads the text of a `config.json`; the error is a message without the file's name.
    pub fn parse(text: &str) -> std::result::Result<Self, String> {
        // Some editors of Windows begin a file with a byte order mark.
        let json: Value = serde_json::from_str(text.strip_prefix('\u{feff}').unwrap_or(text))
            .map_err(|e| format!("not valid JSON: {e}"))?;
        let fields = Fields(json.as_object().ok_or("not a JSON object")?);
        let mut config = Family::of(&fields)?.config(&fields)?;
        config.stored_as = fields.get("quantization_config").map(quantization::read).transpose()?;
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
