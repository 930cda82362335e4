//! The weights: GGUF tensors, dequantized one after the other, into `model.safetensors`.

use std::{
    collections::BTreeSet,
    fs::File,
    io::{BufWriter, Write},
    path::Path,
};

use serde_json::{Map, json};

use super::{ConvertError, Gguf, config::LlamaShape, names::unpermute};

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
    file.write_all(&header(&weights)).map_err(ConvertError::io(path))?;
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

/// The header of a safetensors file that holds these weights one after the other, with its length before it.
fn header(weights: &[Weight]) -> Vec<u8> {
    let mut entries = Map::new();
    entries.insert("__metadata__".into(), json!({"format": "pt"}));
    let mut start = 0;
    for weight in weights {
        let end = start + weight.shape.iter().product::<usize>() * size_of::<f32>();
        let entry = json!({"dtype": "F32", "shape": weight.shape, "data_offsets": [start, end]});
        entries.insert(weight.hugging_face.clone(), entry);
        start = end;
    }
    let mut json = serde_json::Value::Object(entries).to_string().into_bytes();
    json.resize(json.len().next_multiple_of(8), b' ');
    [&(json.len() as u64).to_le_bytes(), json.as_slice()].concat()
}
