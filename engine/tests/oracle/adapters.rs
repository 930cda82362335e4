//! What PEFT makes of an adapter's configuration (`e2e/oracle/adapters.py`).

use tunesmith_engine::Model;

use crate::run::{read_json, read_tensors};
use crate::{difference, fixture};

/// What the reference computed, by the name of the folder.
pub(crate) fn logits(name: &str) -> Vec<f32> {
    let tensors = read_tensors(&fixture("adapters/logits.safetensors"));
    tensors.into_iter().find(|tensor| tensor.name == name).unwrap_or_else(|| panic!("{name}")).data
}

pub(crate) fn tokens() -> Vec<u32> {
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
