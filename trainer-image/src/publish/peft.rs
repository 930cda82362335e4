//! The adapter as PEFT 0.21 writes it: `adapter_config.json` and `adapter_model.safetensors`.

use std::collections::BTreeSet;

use serde_json::{Value, json};
use tunesmith_crds::{Uri, fine_tune_job::Lora};
use tunesmith_engine::LazyTensor;

/// Every classic field of PEFT's LoraConfig, with sorted keys and an indent of 2.
pub(super) fn config(lora: &Lora, adapter: &[LazyTensor<'_>], base_model: &Uri) -> String {
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
fn target_modules(lora: &Lora, adapter: &[LazyTensor<'_>]) -> Value {
    if let Some(regex) = &lora.target_modules_regex {
        return json!(regex);
    }
    if lora.target_modules != ["all-linear"] {
        return json!(lora.target_modules.iter().collect::<BTreeSet<_>>());
    }
    let module = |tensor: &LazyTensor<'_>| Some(tensor.name.split_once(".lora_")?.0.rsplit('.').next()?.to_owned());
    json!(adapter.iter().filter_map(module).collect::<BTreeSet<_>>())
}

/// Whether no lora_B was trained.
pub(super) fn is_zero(adapter: &[LazyTensor<'_>]) -> bool {
    adapter.iter().filter(|tensor| tensor.name.contains(".lora_B.")).all(|b| b.values().iter().all(|&x| x == 0.0))
}

#[cfg(test)]
mod tests {
    use tunesmith_engine::NamedTensor;

    use super::*;

    fn adapter(b: f32) -> [NamedTensor; 2] {
        [("lora_A", 1.0), ("lora_B", b)].map(|(part, value)| NamedTensor {
            name: format!("base_model.model.model.layers.0.self_attn.q_proj.{part}.weight"),
            shape: vec![1, 2],
            data: vec![value; 2],
        })
    }

    #[test]
    fn a_zero_adapter_is_known_by_lora_b_alone() {
        assert!(is_zero(&adapter(0.0).each_ref().map(LazyTensor::from)));
        assert!(!is_zero(&adapter(1e-30).each_ref().map(LazyTensor::from)));
    }

    #[test]
    fn the_configuration_reads_as_peft_writes_it() {
        let lora = Lora { target_modules: vec!["all-linear".into()], ..Lora::default() };
        let text = config(&lora, &adapter(1.0).each_ref().map(LazyTensor::from), &"s3://models/m".parse().unwrap());
        let config: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(config["target_modules"], json!(["q_proj"]));
        assert_eq!((&config["r"], &config["lora_alpha"]), (&json!(8), &json!(32)));
        assert!(text.starts_with("{\n  \"alpha_pattern\": {},\n  \"auto_mapping\": null"), "{text}");
    }
}
