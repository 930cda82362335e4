//! The weights: GGUF tensors, dequantized one after the other, into `model.safetensors`.

use std::{
    collections::BTreeSet,
    fs::File,
    io::{BufWriter, Write},
    path::Path,
};

use safetensors::Dtype;

use super::{
    ConvertError, Gguf,
    config::Dimensions,
    names::{CONFIGURING, unpermute},
};
use crate::tensors::header;

/// A weight under both of its names.
struct Weight {
    gguf: String,
    hugging_face: String,
    /// [out, in], or [n] of a norm or bias.
    shape: Vec<usize>,
    difference: Difference,
}

/// How GGUF's values differ from Hugging Face's.
#[derive(Clone, Copy)]
enum Difference {
    None,
    /// The rows of so many heads are in another order.
    Permuted(usize),
    /// They are one more.
    PlusOne,
}

/// Writes all weights in f32.
pub(super) fn write(gguf: &mut Gguf, dimensions: &Dimensions, path: &Path) -> Result<(), ConvertError> {
    let weights = checked(gguf, dimensions)?;
    let mut file = BufWriter::new(File::create(path).map_err(ConvertError::io(path))?);
    file.write_all(&header_of(&weights)).map_err(ConvertError::io(path))?;
    for weight in &weights {
        let mut values = gguf.dequantize(&weight.gguf)?;
        match weight.difference {
            Difference::None => (),
            Difference::Permuted(heads) => values = unpermute(&values, heads, dimensions.head_dim),
            Difference::PlusOne => values.iter_mut().for_each(|value| *value -= 1.0),
        }
        let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        file.write_all(&bytes).map_err(ConvertError::io(path))?;
    }
    let file = file.into_inner().map_err(|error| ConvertError::io(path)(error.into_error()))?;
    file.sync_all().map_err(ConvertError::io(path))
}

/// Writes the header of the same file, and a hole in place of the weights. Returns the names there of the tensors `named`.
pub(super) fn outline(
    gguf: &mut Gguf,
    dimensions: &Dimensions,
    path: &Path,
    named: &[String],
) -> Result<Vec<String>, ConvertError> {
    let weights = checked(gguf, dimensions)?;
    weights.iter().try_for_each(|weight| gguf.check_data(&weight.gguf))?;
    let header = header_of(&weights);
    let bytes: u64 = weights.iter().map(|weight| 4 * weight.shape.iter().product::<usize>() as u64).sum();
    let mut file = File::create(path).map_err(ConvertError::io(path))?;
    let written = file.write_all(&header).and_then(|()| file.set_len(header.len() as u64 + bytes));
    written.map_err(ConvertError::io(path))?;
    let named = weights.into_iter().filter(|weight| named.contains(&weight.gguf));
    Ok(named.map(|weight| weight.hugging_face).collect())
}

/// The weights of a file that has all of them, and no tensor besides.
fn checked(gguf: &Gguf, dimensions: &Dimensions) -> Result<Vec<Weight>, ConvertError> {
    let weights = weights(dimensions);
    for weight in &weights {
        gguf.check_tensor(&weight.gguf, &weight.shape)?;
    }
    let known: BTreeSet<&str> = weights.iter().map(|weight| weight.gguf.as_str()).chain(CONFIGURING).collect();
    match gguf.tensor_names().find(|name| !known.contains(name)) {
        Some(name) => Err(ConvertError::UnknownTensor(name.to_owned(), "no model that can be converted has it")),
        None => Ok(weights),
    }
}

fn header_of(weights: &[Weight]) -> Vec<u8> {
    header(weights.iter().map(|weight| (weight.hugging_face.clone(), weight.shape.clone(), Dtype::F32)))
}

fn weights(dimensions: &Dimensions) -> Vec<Weight> {
    use Difference::{None, Permuted, PlusOne};
    let Dimensions { architecture, hidden, feed_forward, heads, key_value_heads, head_dim, .. } = *dimensions;
    let (query, key_value) = (heads * head_dim, key_value_heads * head_dim);
    let of_norm = if architecture.is_gemma { PlusOne } else { None };
    let of_heads = |heads| if architecture.is_permuted { Permuted(heads) } else { None };
    let weight = |gguf: &str, own: &str, shape: &[usize], difference| Weight {
        gguf: gguf.to_owned(),
        hugging_face: own.to_owned(),
        shape: shape.to_vec(),
        difference,
    };
    let table = [dimensions.vocabulary, hidden];
    let mut weights = vec![weight("token_embd.weight", "model.embed_tokens.weight", &table, None)];
    for layer in 0..dimensions.layers {
        let mut add = |gguf: &str, own: &str, shape: &[usize], difference| {
            weights.push(weight(
                &format!("blk.{layer}.{gguf}"),
                &format!("model.layers.{layer}.{own}"),
                shape,
                difference,
            ));
        };
        add("attn_norm.weight", "input_layernorm.weight", &[hidden], of_norm);
        if architecture.is_fused {
            add("attn_qkv.weight", "self_attn.qkv_proj.weight", &[query + 2 * key_value, hidden], None);
        } else {
            add("attn_q.weight", "self_attn.q_proj.weight", &[query, hidden], of_heads(heads));
            add("attn_k.weight", "self_attn.k_proj.weight", &[key_value, hidden], of_heads(key_value_heads));
            add("attn_v.weight", "self_attn.v_proj.weight", &[key_value, hidden], None);
        }
        if architecture.has_biases {
            add("attn_q.bias", "self_attn.q_proj.bias", &[query], of_heads(heads));
            add("attn_k.bias", "self_attn.k_proj.bias", &[key_value], of_heads(key_value_heads));
            add("attn_v.bias", "self_attn.v_proj.bias", &[key_value], None);
        }
        if architecture.norms_heads {
            add("attn_q_norm.weight", "self_attn.q_norm.weight", &[head_dim], of_norm);
            add("attn_k_norm.weight", "self_attn.k_norm.weight", &[head_dim], of_norm);
        }
        add("attn_output.weight", "self_attn.o_proj.weight", &[hidden, query], None);
        if architecture.is_gemma {
            add("post_attention_norm.weight", "post_attention_layernorm.weight", &[hidden], of_norm);
            add("ffn_norm.weight", "pre_feedforward_layernorm.weight", &[hidden], of_norm);
            add("post_ffw_norm.weight", "post_feedforward_layernorm.weight", &[hidden], of_norm);
        } else {
            add("ffn_norm.weight", "post_attention_layernorm.weight", &[hidden], of_norm);
        }
        if architecture.is_fused {
            add("ffn_up.weight", "mlp.gate_up_proj.weight", &[2 * feed_forward, hidden], None);
        } else {
            add("ffn_gate.weight", "mlp.gate_proj.weight", &[feed_forward, hidden], None);
            add("ffn_up.weight", "mlp.up_proj.weight", &[feed_forward, hidden], None);
        }
        add("ffn_down.weight", "mlp.down_proj.weight", &[hidden, feed_forward], None);
    }
    weights.push(weight("output_norm.weight", "model.norm.weight", &[hidden], of_norm));
    if !dimensions.tied {
        weights.push(weight("output.weight", "lm_head.weight", &table, None));
    }
    weights
}
