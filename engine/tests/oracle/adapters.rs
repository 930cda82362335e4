//! What PEFT makes of an adapter's configuration, and transformers of a checkpoint that ties and does not
//! (`e2e/oracle/adapters.py`).

use tunesmith_engine::{Model, ModelConfig};

use crate::run::{read_json, read_tensors};
use crate::{difference, fixture};

/// What the reference computed, by the name of the folder.
fn logits(name: &str) -> Vec<f32> {
    let tensors = read_tensors(&fixture("adapters/logits.safetensors"));
    tensors.into_iter().find(|tensor| tensor.name == name).unwrap_or_else(|| panic!("{name}")).data
}

fn tokens() -> Vec<u32> {
    let tokens: Vec<u32> = read_json(&fixture("tied/tokens.json"));
    tokens[..12].to_vec()
}

#[test]
fn an_adapters_configuration_means_what_peft_makes_of_it() {
    for name in [
        "order",
        "excluded",
        "excluded_by_pattern",
        "layers",
        "layer_pattern",
        "defaults",
        "gaussian",
        "orthogonal",
        "rslora",
        "whole",
    ] {
        let mut model = Model::load(&fixture("tied/model")).unwrap();
        model.load_adapter(&fixture("adapters").join(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
        let difference = difference(&model.logits(&tokens()).unwrap(), &logits(name));
        assert!(difference < 1e-4, "{name}: {difference:.1e}");
    }
}

#[test]
fn an_output_layer_that_is_stored_apart_is_used_though_the_configuration_ties_it() {
    let folder = fixture("adapters/stored_apart");
    assert!(ModelConfig::load(&folder).unwrap().tie_word_embeddings);
    assert!(!ModelConfig::of_folder(&folder).unwrap().tie_word_embeddings);
    let model = Model::load(&folder).unwrap();
    assert!(model.has_own_output() && !model.config().tie_word_embeddings);
    assert!(model.config().tensors().iter().any(|(name, _)| name == "lm_head.weight"));
    let apart = difference(&model.logits(&tokens()).unwrap(), &logits("stored_apart"));
    assert!(apart < 1e-4, "{apart:.1e}");
}

#[test]
fn an_output_layer_that_is_stored_twice_stays_tied() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(fixture("tied/model/config.json"), folder.path().join("config.json")).unwrap();
    let tensors = read_tensors(&fixture("tied/model/model.safetensors"));
    let bytes = |tensor: &tunesmith_engine::NamedTensor| -> Vec<u8> {
        tensor.data.iter().flat_map(|x| x.to_le_bytes()).collect()
    };
    let mut stored: Vec<_> = tensors.iter().map(|t| (t.name.clone(), t.shape.clone(), bytes(t))).collect();
    let embedding = stored.iter().find(|(name, ..)| name == "model.embed_tokens.weight").unwrap().clone();
    stored.push(("lm_head.weight".into(), embedding.1, embedding.2));
    let views = stored.iter().map(|(name, shape, bytes)| {
        (name, safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.clone(), bytes).unwrap())
    });
    safetensors::serialize_to_file(views, None, &folder.path().join("model.safetensors")).unwrap();
    assert!(!Model::load(folder.path()).unwrap().has_own_output());
}
