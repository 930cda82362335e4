//! The adapter as PEFT 0.21 writes it: `adapter_config.json` and `adapter_model.safetensors`.

use std::{
    borrow::Cow,
    collections::{BTreeSet, HashMap},
};

use safetensors::{Dtype, View};
use serde_json::{Value, json};
use tunesmith_crds::{Uri, fine_tune_job::Lora};
use tunesmith_engine::NamedTensor;

/// Every classic field of PEFT's LoraConfig, with sorted keys and an indent of 2.
pub(super) fn config(lora: &Lora, adapter: &[NamedTensor], base_model: &Uri) -> String {
    let (base_model, revision) = base_model.model_name();
    let config = json!({
        "alpha_pattern": lora.alpha_pattern,
        "auto_mapping": null,
        "base_model_name_or_path": base_model,
        "bias": lora.bias,
        "corda_config": null,
        "eva_config": null,
        "exclude_modules": null,
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": true,
        "layer_replication": null,
        "layers_pattern": null,
        "layers_to_transform": null,
        "loftq_config": {},
        "lora_alpha": whole_if_possible(lora.alpha),
        "lora_bias": false,
        "lora_dropout": lora.dropout,
        "megatron_config": null,
        "megatron_core": "megatron.core",
        "modules_to_save": (!lora.modules_to_save.is_empty()).then_some(&lora.modules_to_save),
        "peft_type": "LORA",
        "r": lora.rank,
        "rank_pattern": lora.rank_pattern,
        "revision": revision,
        "target_modules": target_modules(lora, adapter),
        "target_parameters": null,
        "task_type": "CAUSAL_LM",
        "trainable_token_indices": null,
        "use_dora": lora.use_dora,
        "use_rslora": lora.use_rslora,
    });
    format!("{config:#}")
}

/// PEFT's alpha is an int; other software reads it as one.
fn whole_if_possible(alpha: f64) -> Value {
    match alpha.fract() == 0.0 && alpha.abs() < 1e15 {
        true => json!(alpha as i64),
        false => json!(alpha),
    }
}

/// As the job names them; for `all-linear` the last parts of the adapted modules' names, as PEFT resolves it.
fn target_modules(lora: &Lora, adapter: &[NamedTensor]) -> Value {
    if let Some(regex) = &lora.target_modules_regex {
        return json!(regex);
    }
    if lora.target_modules != ["all-linear"] {
        return json!(lora.target_modules.iter().collect::<BTreeSet<_>>());
    }
    let module = |tensor: &NamedTensor| Some(tensor.name.split_once(".lora_")?.0.rsplit('.').next()?.to_owned());
    json!(adapter.iter().filter_map(module).collect::<BTreeSet<_>>())
}

/// Whether no lora_B was trained.
pub(super) fn is_zero(adapter: &[NamedTensor]) -> bool {
    adapter.iter().filter(|tensor| tensor.name.contains(".lora_B.")).all(|b| b.data.iter().all(|&x| x == 0.0))
}

/// A safetensors file of these tensors in f32, marked for PyTorch.
pub(crate) fn weights(tensors: &[NamedTensor]) -> Vec<u8> {
    let tensors = tensors.iter().map(|tensor| (tensor.name.as_str(), F32(tensor)));
    safetensors::serialize(tensors, Some(for_pytorch()))
        .unwrap_or_else(|error| unreachable!("names and shapes fit: {error}"))
}

/// What transformers wants to see in a safetensors file.
pub(super) fn for_pytorch() -> HashMap<String, String> {
    HashMap::from([("format".to_owned(), "pt".to_owned())])
}

/// A tensor in the form that safetensors writes.
struct F32<'a>(&'a NamedTensor);

impl View for F32<'_> {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }

    fn shape(&self) -> &[usize] {
        &self.0.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        self.0.data.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>().into()
    }

    fn data_len(&self) -> usize {
        self.0.data.len() * size_of::<f32>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn adapter(b: f32) -> Vec<NamedTensor> {
        let tensor = |part: &str, value: f32| NamedTensor {
            name: format!("base_model.model.model.layers.0.self_attn.q_proj.{part}.weight"),
            shape: vec![1, 2],
            data: vec![value; 2],
        };
        vec![tensor("lora_A", 1.0), tensor("lora_B", b)]
    }

    #[test]
    fn a_zero_adapter_is_known_by_lora_b_alone() {
        assert!(is_zero(&adapter(0.0)));
        assert!(!is_zero(&adapter(1e-30)));
    }

    #[test]
    fn the_configuration_reads_as_peft_writes_it() {
        let lora = Lora { target_modules: vec!["all-linear".into()], ..Lora::default() };
        let text = config(&lora, &adapter(1.0), &"s3://models/m".parse().unwrap());
        let config: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(config["target_modules"], json!(["q_proj"]));
        assert_eq!((&config["r"], &config["lora_alpha"]), (&json!(8), &json!(32)));
        assert!(text.starts_with("{\n  \"alpha_pattern\": {},\n  \"auto_mapping\": null"), "{text}");
    }

    #[test]
    fn the_weights_say_that_they_are_for_pytorch() {
        let bytes = weights(&adapter(1.0));
        let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
        assert_eq!(header.metadata().as_ref().unwrap()["format"], "pt");
        let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(
            tensors.tensor("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight").unwrap().shape(),
            [1, 2]
        );
    }
}
