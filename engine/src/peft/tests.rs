//! Adapters that are loaded to compute with.

use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::{Map, Value, json};

use super::*;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

/// The adapter of this folder with other fields and tensors, on the model of fixtures/tied.
fn load_changed(name: &str, changes: Value, tensors: impl Fn(&str) -> Option<String>) -> Result<Model> {
    let folder = tempfile::tempdir().unwrap();
    let adapter = fixtures().join(name);
    let config = std::fs::read_to_string(adapter.join("adapter_config.json")).unwrap();
    let mut config: Map<String, Value> = serde_json::from_str(&config).unwrap();
    config.extend(changes.as_object().unwrap().clone());
    std::fs::write(folder.path().join("adapter_config.json"), Value::Object(config).to_string()).unwrap();
    let bytes = std::fs::read(adapter.join("adapter_model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let kept = file.iter().filter_map(|(name, view)| {
        let view = TensorView::new(Dtype::F32, view.shape().to_vec(), view.data()).unwrap();
        Some((tensors(name)?, view))
    });
    safetensors::serialize_to_file(kept, None, &folder.path().join("adapter_model.safetensors")).unwrap();
    let mut model = Model::load(&fixtures().join("tied/model"))?;
    model.load_adapter(folder.path())?;
    Ok(model)
}

fn message(result: Result<Model>) -> String {
    result.err().expect("an error").to_string()
}

fn as_it_is(name: &str) -> Option<String> {
    Some(name.to_owned())
}

#[test]
fn an_adapter_that_is_computed_with_holds_no_gradient() {
    for (name, changes) in [("tied/adapter", json!({})), ("adapters/whole", json!({}))] {
        let model = load_changed(name, changes, as_it_is).unwrap();
        let bytes = |param: &crate::param::Param<_>| {
            param.grad.as_ref().map_or(0, |grad| 4 * model.backend.shape(grad).iter().product::<usize>())
        };
        let held: usize = model.parameters().into_iter().map(|(_, param)| bytes(param)).sum();
        assert_eq!(held, 0, "{name}: bytes of gradients");
        // Modules that were trained whole lie as they are stored.
        assert!(model.embedding.param().is_none());
        assert_eq!(model.lm_head.is_some(), name == "adapters/whole");
        assert!(model.lm_head.as_ref().is_none_or(|weight| weight.param().is_none()));
    }
}

#[test]
fn tensors_of_layers_that_the_configuration_does_not_select_are_refused() {
    let error = message(load_changed("tied/adapter", json!({"target_modules": ["q_proj"]}), as_it_is));
    assert!(
        error.contains("v_proj.lora_A.weight belongs to no layer of this model that adapter_config.json"),
        "{error}"
    );
    let error =
        message(load_changed("tied/adapter", json!({"exclude_modules": ["layers.0.self_attn.q_proj"]}), as_it_is));
    assert!(error.contains("layers.0.self_attn.q_proj.lora_A.weight belongs to no layer"), "{error}");
    let error =
        message(load_changed("tied/adapter", json!({"target_modules": ["q_proj", "v_proj", "o_proj"]}), as_it_is));
    assert!(error.contains("o_proj.lora_A.weight is missing"), "{error}");
    let renamed = |name: &str| Some(name.replace("lora_B.weight", "lora_B.bias"));
    assert!(message(load_changed("tied/adapter", json!({}), renamed)).contains("lora_B.weight is missing"));
}

#[test]
fn a_refused_configuration_names_its_file() {
    let error = message(load_changed("tied/adapter", json!({"use_qalora": true}), as_it_is));
    assert!(error.contains("adapter_config.json: use_qalora is true"), "{error}");
    let error = message(load_changed("tied/adapter", json!({"target_modules": "(?i).*Q_PROJ"}), as_it_is));
    assert!(error.contains("target_modules: \"(?i).*Q_PROJ\" has \"(?i\""), "{error}");
    for (changes, expected) in [
        (json!({"alpha_pattern": {"[": 2}}), "adapter_config.json: alpha_pattern: \"[\" is no regular expression"),
        (json!({"rank_pattern": {"(?!x)q": 2}}), "adapter_config.json: rank_pattern: \"(?!x)q\" has"),
        (json!({"modules_to_save": ["score"]}), "adapter_config.json: modules_to_save: \"score\" is no"),
        (json!({"r": 9}), "adapter_config.json asks for [9,"),
    ] {
        let error = message(load_changed("tied/adapter", changes, as_it_is));
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn an_adapter_that_is_not_finite_is_refused_by_the_name_of_its_tensor() {
    for name in ["tied/adapter", "adapters/whole"] {
        let adapter = fixtures().join(name);
        let bytes = std::fs::read(adapter.join(ADAPTER_WEIGHTS)).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        for damaged in file.names() {
            let folder = tempfile::tempdir().unwrap();
            std::fs::copy(adapter.join(CONFIG), folder.path().join(CONFIG)).unwrap();
            let mut data: Vec<_> =
                file.iter().map(|(name, view)| (name, view.shape().to_vec(), view.data().to_vec())).collect();
            let (_, _, values) = data.iter_mut().find(|(name, ..)| *name == damaged).unwrap();
            values[..4].copy_from_slice(&f32::NAN.to_le_bytes());
            let views = data
                .iter()
                .map(|(name, shape, data)| (*name, TensorView::new(Dtype::F32, shape.clone(), data).unwrap()));
            safetensors::serialize_to_file(views, None, &folder.path().join(ADAPTER_WEIGHTS)).unwrap();
            let mut model = Model::load(&fixtures().join("tied/model")).unwrap();
            let error = model.load_adapter(folder.path()).unwrap_err().to_string();
            assert!(error.contains(&format!("NaN or infinite values in {damaged}")), "{error}");
        }
    }
}
