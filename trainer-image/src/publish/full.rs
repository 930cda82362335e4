//! A fully fine-tuned model as a Hugging Face checkpoint: safetensors in shards of at most 5 GB, their index, and
//! `config.json`.

use std::collections::BTreeMap;

use serde_json::json as object;
use tunesmith_engine::LazyTensor;

use crate::{json_file::json, tensors::TensorFile};

/// Bytes of a shard at most, as transformers cuts them.
const SHARD_BYTES: usize = 5_000_000_000;

/// The output layer, where it is not the embedding.
const OUTPUT: &str = "lm_head.weight";

/// A whole model's files: those of its weights, and the others by name and content.
pub(crate) struct ModelFiles<'a> {
    pub(crate) shards: Vec<TensorFile<'a>>,
    pub(crate) others: BTreeMap<String, Vec<u8>>,
}

/// Files of these weights. `config` is the base model's; with `bf16` weights are rounded to it.
///
/// # Errors
/// `config` is no JSON object.
pub(crate) fn files<'a>(weights: &'a [LazyTensor<'a>], config: &[u8], bf16: bool) -> Result<ModelFiles<'a>, String> {
    let mut files = shards(weights, bf16, SHARD_BYTES);
    let has_own_output = weights.iter().any(|tensor| tensor.name == OUTPUT);
    files.others.insert("config.json".into(), configuration(config, bf16, has_own_output)?);
    Ok(files)
}

/// The base model's configuration, with the type of the published weights under both of its names that it has; an output
/// layer among these is tied to nothing, whatever the base model's file says.
fn configuration(config: &[u8], bf16: bool, has_own_output: bool) -> Result<Vec<u8>, String> {
    let mut config = json(config)?;
    let fields = config.as_object_mut().ok_or("not a JSON object")?;
    let names: Vec<&str> = ["torch_dtype", "dtype"].into_iter().filter(|name| fields.contains_key(*name)).collect();
    for name in if names.is_empty() { vec!["dtype"] } else { names } {
        fields.insert(name.into(), if bf16 { "bfloat16" } else { "float32" }.into());
    }
    if has_own_output {
        fields.insert("tie_word_embeddings".into(), false.into());
    }
    Ok(format!("{config:#}\n").into_bytes())
}

/// One file, or several and their index.
fn shards<'a>(weights: &'a [LazyTensor<'a>], bf16: bool, limit: usize) -> ModelFiles<'a> {
    let size = |tensor: &LazyTensor<'_>| tensor.shape.iter().product::<usize>() * if bf16 { 2 } else { 4 };
    let mut groups: Vec<Vec<&LazyTensor<'_>>> = vec![Vec::new()];
    let mut filled = 0;
    for tensor in weights {
        if filled > 0 && filled + size(tensor) > limit {
            groups.push(Vec::new());
            filled = 0;
        }
        filled += size(tensor);
        groups.last_mut().unwrap_or_else(|| unreachable!("there is a group")).push(tensor);
    }
    let count = groups.len();
    let name = |i: usize| match count {
        1 => "model.safetensors".to_owned(),
        _ => format!("model-{:05}-of-{count:05}.safetensors", i + 1),
    };
    let shards = groups.into_iter().enumerate().map(|(i, tensors)| TensorFile { name: name(i), tensors, bf16 });
    let mut files = ModelFiles { shards: shards.collect(), others: BTreeMap::new() };
    if count > 1 {
        let places =
            files.shards.iter().flat_map(|shard| shard.tensors.iter().map(|tensor| (&tensor.name, &shard.name)));
        let map: BTreeMap<&String, &String> = places.collect();
        let total: usize = weights.iter().map(size).sum();
        let index = object!({"metadata": {"total_size": total}, "weight_map": map});
        files.others.insert("model.safetensors.index.json".into(), format!("{index:#}\n").into_bytes());
    }
    files
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};
    use tunesmith_engine::NamedTensor;

    use super::*;

    fn weights() -> [NamedTensor; 3] {
        ["a", "b", "c"].map(|name| NamedTensor { name: name.into(), shape: vec![2, 3], data: vec![1.0; 6] })
    }

    #[test]
    fn what_fits_is_one_file_and_the_configuration_names_its_type() {
        let weights = weights();
        let weights = weights.each_ref().map(LazyTensor::from);
        for (bf16, name) in [(false, "float32"), (true, "bfloat16")] {
            let files = files(&weights, br#"{"model_type": "llama", "torch_dtype": "float16"}"#, bf16).unwrap();
            let [shard] = files.shards.as_slice() else { panic!("one file") };
            assert_eq!((shard.name.as_str(), shard.tensors.len(), shard.bf16), ("model.safetensors", 3, bf16));
            let config: Value = serde_json::from_slice(&files.others["config.json"]).unwrap();
            assert_eq!((&config["torch_dtype"], &config["model_type"]), (&json!(name), &json!("llama")));
            assert_eq!(files.others.len(), 1);
        }
    }

    #[test]
    fn an_output_layer_of_its_own_is_published_as_tied_to_nothing() {
        for (name, tied) in [("lm_head.weight", false), ("model.norm.weight", true)] {
            let weight = NamedTensor { name: name.into(), shape: vec![2, 3], data: vec![1.0; 6] };
            let weights = [LazyTensor::from(&weight)];
            let files = files(&weights, br#"{"model_type": "llama", "tie_word_embeddings": true}"#, true).unwrap();
            let config: Value = serde_json::from_slice(&files.others["config.json"]).unwrap();
            assert_eq!(config["tie_word_embeddings"], tied, "{name}");
        }
    }

    #[test]
    fn what_does_not_fit_is_cut_between_tensors_and_indexed() {
        let weights = weights();
        let weights = weights.each_ref().map(LazyTensor::from);
        let files = shards(&weights, false, 50);
        let index: Value = serde_json::from_slice(&files.others["model.safetensors.index.json"]).unwrap();
        assert_eq!(index["metadata"]["total_size"], 72);
        assert_eq!(files.shards.len(), 2);
        for shard in &files.shards {
            for tensor in &shard.tensors {
                assert_eq!(index["weight_map"][&tensor.name], shard.name.as_str());
            }
        }
        assert_eq!(index["weight_map"]["c"], "model-00002-of-00002.safetensors");
    }

    #[test]
    fn both_names_of_the_type_are_kept_and_a_byte_order_mark_is_no_loss() {
        let config =
            configuration(b"\xef\xbb\xbf{\"dtype\": \"float16\", \"torch_dtype\": \"float16\", \"a\": 1}", true, false);
        let config: Value = serde_json::from_slice(&config.unwrap()).unwrap();
        assert_eq!(config, json!({"dtype": "bfloat16", "torch_dtype": "bfloat16", "a": 1}));
        assert!(configuration(b"{", true, false).unwrap_err().contains("not valid JSON"));
        assert!(configuration(b"[]", true, false).is_err());
    }
}
