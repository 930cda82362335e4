//! `export --format gguf-lora`: a LoRA adapter as a GGUF file, as llama.cpp loads it beside its base model.

use std::{
    fs::{self, File},
    io::BufWriter,
    path::Path,
};

use candle_core::{
    Device, Tensor,
    quantized::{
        GgmlDType, QTensor,
        gguf_file::{Value, write},
    },
};
use serde_json::Value as Json;
use tunesmith_engine::{AdaptedLayer, Model};

use super::{
    ConvertError,
    architecture::Architecture,
    names::{LINEAR, permute},
};

use crate::json_file::json;

/// Writes the adapter of the folder `adapter` over the model of the folder `base`. The file appears when it is whole.
///
/// # Errors
/// Model and adapter don't fit, the adapter has parts that the format has no place for, or `out` exists.
pub fn gguf_lora(base: &Path, adapter: &Path, out: &Path) -> Result<(), ConvertError> {
    if out.exists() {
        return Err(ConvertError::Exists(out.to_owned()));
    }
    let refuse = |problem: String| ConvertError::Adapter(problem);
    refuse_what_does_not_fit(&read_json(&adapter.join("adapter_config.json"))?).map_err(refuse)?;
    let model_type = read_json(&base.join("config.json"))?["model_type"].as_str().unwrap_or_default().to_owned();
    let architecture = Architecture::of_model_type(&model_type)
        .ok_or_else(|| refuse(format!("model_type {model_type:?} has no GGUF architecture that is known here")))?;
    let mut model = Model::load(base).map_err(|error| refuse(error.to_string()))?;
    model.load_adapter(adapter).map_err(|error| refuse(error.to_string()))?;

    let layers = model.adapted_layers();
    // llama.cpp scales every layer by alpha / its rank. A layer whose scale is 0 says nothing of alpha.
    let first = layers.iter().find(|layer| layer.scale != 0.0);
    let first = first.ok_or_else(|| refuse("it changes no layer".into()))?;
    let alpha = first.scale * first.rank as f32;
    let config = model.config();
    let mut tensors = Vec::new();
    for AdaptedLayer { module, rank, a, b, scale } in layers {
        let (block, which) = module.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.')).unzip();
        let name = LINEAR.iter().find(|(_, name)| which == Some(*name));
        let (Some(block), Some((name, _))) = (block, name) else {
            return Err(refuse(format!("{module} has no name in GGUF")));
        };
        let mut b = b;
        let factor = scale * rank as f32 / alpha;
        if factor != 1.0 {
            b.iter_mut().for_each(|x| *x *= factor);
        }
        let heads = match *name {
            "attn_q" => Some(config.num_attention_heads),
            "attn_k" => Some(config.num_key_value_heads),
            _ => None,
        };
        if let Some(heads) = heads.filter(|_| architecture.is_permuted) {
            b = permute(&b, heads, config.head_dim);
        }
        for (part, values, rows) in [("lora_a", &a, rank), ("lora_b", &b, b.len() / rank)] {
            let tensor = Tensor::from_slice(values, (rows, values.len() / rows), &Device::Cpu)
                .and_then(|tensor| QTensor::quantize(&tensor, GgmlDType::F32))
                .map_err(|error| refuse(error.to_string()))?;
            tensors.push((format!("blk.{block}.{name}.weight.{part}"), tensor));
        }
    }
    let text = |text: &str| Value::String(text.to_owned());
    let metadata = [
        ("general.architecture", text(architecture.name)),
        ("general.type", text("adapter")),
        ("adapter.type", text("lora")),
        ("adapter.lora.alpha", Value::F32(alpha)),
    ];
    let metadata: Vec<_> = metadata.iter().map(|(key, value)| (*key, value)).collect();
    let tensors: Vec<_> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();

    let partial = super::sibling(out);
    let mut file = BufWriter::new(File::create(&partial).map_err(ConvertError::io(&partial))?);
    let written = write(&mut file, &metadata, &tensors).map_err(|error| refuse(error.to_string()));
    let written = written.and_then(|()| {
        let file = file.into_inner().map_err(|error| ConvertError::io(&partial)(error.into_error()))?;
        file.sync_all().map_err(ConvertError::io(&partial))?;
        fs::rename(&partial, out).map_err(ConvertError::io(out))
    });
    if written.is_err() {
        // The export's own error says more than a failed clean-up would.
        let _ = fs::remove_file(&partial);
    }
    written
}

/// GGUF adapters hold A and B of linear layers, and nothing else.
fn refuse_what_does_not_fit(adapter: &Json) -> Result<(), String> {
    let what = if adapter["use_dora"] == true {
        "DoRA's magnitudes"
    } else if adapter["bias"].as_str().is_some_and(|bias| bias != "none") {
        "trained biases"
    } else if adapter["modules_to_save"].as_array().is_some_and(|modules| !modules.is_empty()) {
        "whole modules (modules_to_save)"
    } else {
        return Ok(());
    };
    Err(format!("it has {what}, for which GGUF adapters have no place; use `tunesmith-trainer merge`"))
}

fn read_json(path: &Path) -> Result<Json, ConvertError> {
    let text = fs::read(path).map_err(ConvertError::io(path))?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    json(&text).map_err(|problem| ConvertError::Adapter(format!("{name}: {problem}")))
}
