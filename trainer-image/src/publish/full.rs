//! A fully fine-tuned model as a Hugging Face checkpoint: safetensors in shards of at most 5 GB, their index, and
//! `config.json`.

use std::{borrow::Cow, collections::BTreeMap};

use safetensors::{Dtype, View};
use serde_json::{Value, json};
use tunesmith_engine::NamedTensor;

use super::peft;

/// Bytes of a shard at most, as transformers cuts them.
const SHARD_BYTES: usize = 5_000_000_000;

/// Name and content of each file. `config` is the base model's; with `bf16` weights are rounded to it.
pub(crate) fn files(weights: &[NamedTensor], config: &[u8], bf16: bool) -> BTreeMap<String, Vec<u8>> {
    let mut files = shards(weights, bf16, SHARD_BYTES);
    files.insert("config.json".into(), configuration(config, bf16));
    files
}

/// The base model's configuration, with the type of the published weights.
fn configuration(config: &[u8], bf16: bool) -> Vec<u8> {
    let mut config: Value = serde_json::from_slice(config).unwrap_or_default();
    let key = if config.get("torch_dtype").is_some() { "torch_dtype" } else { "dtype" };
    config[key] = json!(if bf16 { "bfloat16" } else { "float32" });
    format!("{config:#}\n").into_bytes()
}

/// One file, or several and their index.
fn shards(weights: &[NamedTensor], bf16: bool, limit: usize) -> BTreeMap<String, Vec<u8>> {
    let size = |tensor: &NamedTensor| tensor.data.len() * if bf16 { 2 } else { 4 };
    let mut groups: Vec<Vec<&NamedTensor>> = vec![Vec::new()];
    let mut filled = 0;
    for tensor in weights {
        if filled > 0 && filled + size(tensor) > limit {
            groups.push(Vec::new());
            filled = 0;
        }
        filled += size(tensor);
        groups.last_mut().unwrap_or_else(|| unreachable!("there is a group")).push(tensor);
    }
    let serialize = |group: &[&NamedTensor]| {
        let tensors = group.iter().map(|tensor| (tensor.name.as_str(), Stored { tensor, bf16 }));
        safetensors::serialize(tensors, Some(peft::for_pytorch()))
            .unwrap_or_else(|error| unreachable!("names and shapes fit: {error}"))
    };
    if let [group] = groups.as_slice() {
        return [("model.safetensors".to_owned(), serialize(group))].into();
    }
    let name = |i: usize| format!("model-{:05}-of-{:05}.safetensors", i + 1, groups.len());
    let places = groups.iter().enumerate().flat_map(|(i, group)| group.iter().map(move |tensor| (i, tensor)));
    let map: BTreeMap<&str, String> = places.map(|(i, tensor)| (tensor.name.as_str(), name(i))).collect();
    let total: usize = weights.iter().map(size).sum();
    let index = json!({"metadata": {"total_size": total}, "weight_map": map});
    let mut files: BTreeMap<_, _> = groups.iter().enumerate().map(|(i, group)| (name(i), serialize(group))).collect();
    files.insert("model.safetensors.index.json".into(), format!("{index:#}\n").into_bytes());
    files
}

/// A tensor in the form that safetensors writes.
struct Stored<'a> {
    tensor: &'a NamedTensor,
    bf16: bool,
}

impl View for Stored<'_> {
    fn dtype(&self) -> Dtype {
        if self.bf16 { Dtype::BF16 } else { Dtype::F32 }
    }

    fn shape(&self) -> &[usize] {
        &self.tensor.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let values = self.tensor.data.iter();
        match self.bf16 {
            true => values.flat_map(|&x| half::bf16::from_f32(x).to_le_bytes()).collect::<Vec<u8>>().into(),
            false => values.flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>().into(),
        }
    }

    fn data_len(&self) -> usize {
        self.tensor.data.len() * if self.bf16 { 2 } else { 4 }
    }
}

#[cfg(test)]
mod tests {
    use safetensors::SafeTensors;

    use super::*;

    fn weights() -> Vec<NamedTensor> {
        let tensor =
            |name: &str, value: f32| NamedTensor { name: name.into(), shape: vec![2, 3], data: vec![value; 6] };
        vec![tensor("a", 1.0), tensor("b", 2.0), tensor("c", 3.0)]
    }

    #[test]
    fn what_fits_is_one_file_and_the_configuration_names_its_type() {
        for (bf16, name, dtype) in [(false, "float32", Dtype::F32), (true, "bfloat16", Dtype::BF16)] {
            let files = files(&weights(), br#"{"model_type": "llama", "torch_dtype": "float16"}"#, bf16);
            assert_eq!(files.keys().collect::<Vec<_>>(), ["config.json", "model.safetensors"]);
            let config: Value = serde_json::from_slice(&files["config.json"]).unwrap();
            assert_eq!((&config["torch_dtype"], &config["model_type"]), (&json!(name), &json!("llama")));
            let tensors = SafeTensors::deserialize(&files["model.safetensors"]).unwrap();
            assert_eq!(tensors.tensor("b").unwrap().dtype(), dtype);
        }
    }

    #[test]
    fn what_does_not_fit_is_cut_between_tensors_and_indexed() {
        let files = shards(&weights(), false, 50);
        let index: Value = serde_json::from_slice(&files["model.safetensors.index.json"]).unwrap();
        assert_eq!(index["metadata"]["total_size"], 72);
        assert_eq!(files.len(), 3);
        for (name, values) in [("a", 1.0f32), ("b", 2.0), ("c", 3.0)] {
            let file = &files[index["weight_map"][name].as_str().unwrap()];
            let tensors = SafeTensors::deserialize(file).unwrap();
            assert_eq!(tensors.tensor(name).unwrap().data()[..4], values.to_le_bytes());
        }
        assert_eq!(index["weight_map"]["c"], "model-00002-of-00002.safetensors");
    }
}
