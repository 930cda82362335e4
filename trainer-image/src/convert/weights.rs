//! The weights: GGUF tensors, dequantized one after the other, into `model.safetensors`.

use std::{
    collections::BTreeSet,
    fs::File,
    io::{BufWriter, Write},
    path::Path,
};

use safetensors::Dtype;

use super::{ConvertError, Gguf, config::LlamaShape, names::unpermute};
use crate::tensors::header;

/// A weight under both of its names.
struct Weight {
    gguf: String,
    hugging_face: String,
    /// [out, in], or [n] of a norm.
    shape: Vec<usize>,
    /// Heads whose rows GGUF keeps in another order.
    permuted_heads: Option<usize>,
}

/// Writes all weights in f32.
pub(super) fn write(gguf: &mut Gguf, shape: &LlamaShape, path: &Path) -> Result<(), ConvertError> {
    let weights = weights(shape);
    for weight in &weights {
        gguf.check_tensor(&weight.gguf, &weight.shape)?;
    }
    let known: BTreeSet<&str> = weights.iter().map(|weight| weight.gguf.as_str()).collect();
    if let Some(name) = gguf.tensor_names().find(|name| !known.contains(name)) {
        return Err(ConvertError::UnknownTensor(name.to_owned()));
    }

    let mut file = BufWriter::new(File::create(path).map_err(ConvertError::io(path))?);
    let shapes = weights.iter().map(|weight| (weight.hugging_face.clone(), weight.shape.clone()));
    file.write_all(&header(shapes, Dtype::F32)).map_err(ConvertError::io(path))?;
    for weight in &weights {
        let mut values = gguf.dequantize(&weight.gguf)?;
        if let Some(heads) = weight.permuted_heads {
            values = unpermute(&values, heads, shape.head_dim);
        }
        let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        file.write_all(&bytes).map_err(ConvertError::io(path))?;
    }
    let file = file.into_inner().map_err(|error| ConvertError::io(path)(error.into_error()))?;
    file.sync_all().map_err(ConvertError::io(path))
}

fn weights(shape: &LlamaShape) -> Vec<Weight> {
    let (hidden, feed_forward) = (shape.hidden, shape.feed_forward);
    let query = shape.heads * shape.head_dim;
    let key_value = shape.key_value_heads * shape.head_dim;
    let weight = |gguf: &str, hugging_face: &str, shape: &[usize]| Weight {
        gguf: format!("{gguf}.weight"),
        hugging_face: format!("{hugging_face}.weight"),
        shape: shape.to_vec(),
        permuted_heads: None,
    };
    let mut weights = vec![weight("token_embd", "model.embed_tokens", &[shape.vocabulary, hidden])];
    for layer in 0..shape.layers {
        let weight = |gguf: &str, hugging_face: &str, shape: &[usize]| {
            weight(&format!("blk.{layer}.{gguf}"), &format!("model.layers.{layer}.{hugging_face}"), shape)
        };
        let permuted = |weight: Weight, heads| Weight { permuted_heads: Some(heads), ..weight };
        weights.extend([
            weight("attn_norm", "input_layernorm", &[hidden]),
            permuted(weight("attn_q", "self_attn.q_proj", &[query, hidden]), shape.heads),
            permuted(weight("attn_k", "self_attn.k_proj", &[key_value, hidden]), shape.key_value_heads),
            weight("attn_v", "self_attn.v_proj", &[key_value, hidden]),
            weight("attn_output", "self_attn.o_proj", &[hidden, query]),
            weight("ffn_norm", "post_attention_layernorm", &[hidden]),
            weight("ffn_gate", "mlp.gate_proj", &[feed_forward, hidden]),
            weight("ffn_up", "mlp.up_proj", &[feed_forward, hidden]),
            weight("ffn_down", "mlp.down_proj", &[hidden, feed_forward]),
        ]);
    }
    weights.push(weight("output_norm", "model.norm", &[hidden]));
    if !shape.tied {
        weights.push(weight("output", "lm_head", &[shape.vocabulary, hidden]));
    }
    weights
}
