//! Checkpoints whose weights are stored in other ways: an output layer beside `tie_word_embeddings`, numbers in f16.

use std::path::Path;

use safetensors::{Dtype, tensor::TensorView};
use tunesmith_engine::{LoraOptions, MicroBatch, Model, ModelConfig, NamedTensor, Precision, Trainer, TrainerOptions};

use crate::adapters::{logits, tokens};
use crate::run::read_tensors;
use crate::{difference, fixture};

/// The model of fixtures/tied with these tensors, in f32 or f16.
fn write(folder: &Path, tensors: &[NamedTensor], dtype: Dtype) {
    std::fs::copy(fixture("tied/model/config.json"), folder.join("config.json")).unwrap();
    let bytes = |tensor: &NamedTensor| -> Vec<u8> {
        match dtype {
            Dtype::F16 => tensor.data.iter().flat_map(|x| half::f16::from_f32(*x).to_le_bytes()).collect(),
            _ => tensor.data.iter().flat_map(|x| x.to_le_bytes()).collect(),
        }
    };
    let stored: Vec<_> = tensors.iter().map(|tensor| (tensor, bytes(tensor))).collect();
    let views = stored
        .iter()
        .map(|(tensor, bytes)| (tensor.name.as_str(), TensorView::new(dtype, tensor.shape.clone(), bytes).unwrap()));
    safetensors::serialize_to_file(views, None, &folder.join("model.safetensors")).unwrap();
}

fn tied() -> Vec<NamedTensor> {
    read_tensors(&fixture("tied/model/model.safetensors"))
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
    let mut tensors = tied();
    let embedding = tensors.iter().find(|tensor| tensor.name == "model.embed_tokens.weight").unwrap().clone();
    tensors.push(NamedTensor { name: "lm_head.weight".into(), ..embedding });
    write(folder.path(), &tensors, Dtype::F32);
    assert!(!Model::load(folder.path()).unwrap().has_own_output());
}

#[test]
fn weights_in_f16_compute_the_bits_of_the_same_numbers_in_f32() {
    let (in_f16, in_f32) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mut tensors = tied();
    tensors.iter_mut().flat_map(|tensor| &mut tensor.data).for_each(|x| *x = half::f16::from_f32(*x).to_f32());
    write(in_f16.path(), &tensors, Dtype::F16);
    write(in_f32.path(), &tensors, Dtype::F32);
    let load = |folder: &tempfile::TempDir| Model::load(folder.path()).unwrap();
    assert_eq!(load(&in_f16).logits(&tokens()).unwrap(), load(&in_f32).logits(&tokens()).unwrap());

    let batch = MicroBatch { tokens: tokens(), targets: tokens(), row_lengths: vec![12] };
    for precision in [Precision::F32, Precision::Bf16] {
        let gradients = |folder| {
            let options = TrainerOptions { precision, ..LoraOptions::default().into() };
            let mut trainer = Trainer::new(load(folder), &options).unwrap();
            trainer.accumulate(&batch, 1.0).unwrap();
            trainer.gradients()
        };
        assert_eq!(gradients(&in_f16), gradients(&in_f32), "{precision:?}");
    }
}
