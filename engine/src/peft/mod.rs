//! PEFT's adapter folders: the names of their tensors, and putting one on a model.

mod config;

use std::collections::{BTreeSet, HashSet};
use std::path::Path;

use self::config::AdapterConfig;
use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::linear::LoraLayer;
use crate::lora::{LoraBias, Shape};
use crate::model::Model;
use crate::names::ADAPTER_WEIGHTS;
use crate::param::Weight;
use crate::projection::Projection;
use crate::weights::Checkpoint;
use crate::whole_modules::{WholeModule, whole_modules};

/// PEFT's LoraConfig.
const CONFIG: &str = "adapter_config.json";
/// What PEFT puts before a base model's names.
pub(crate) const PREFIX: &str = "base_model.model.";

impl<B: Backend> Model<B> {
    /// Puts the adapter of a PEFT folder on the model, in place of any other.
    ///
    /// # Errors
    /// The folder is damaged, or was made for another model.
    pub fn load_adapter(&mut self, dir: &Path) -> Result<()> {
        load(dir, self)
    }
}

/// Puts the adapter of a folder (`adapter_config.json` and `adapter_model.safetensors`) on the model. Nothing of it has a
/// gradient: it is there to compute with.
fn load<B: Backend>(dir: &Path, model: &mut Model<B>) -> Result<()> {
    load_files(dir, model).map_err(|error| match error {
        Error::Lora(message) => Error::config(&dir.join(CONFIG), message),
        error => error,
    })
}

fn load_files<B: Backend>(dir: &Path, model: &mut Model<B>) -> Result<()> {
    let adapter = AdapterConfig::load(dir)?;
    let file = dir.join(ADAPTER_WEIGHTS);
    let checkpoint = Checkpoint::open_files(&file, std::slice::from_ref(&file))?;
    let refuse = |problem: String| Error::weights(&file, problem);
    let mut unknown: BTreeSet<String> = checkpoint.names().into_iter().map(str::to_owned).collect();
    if unknown.is_empty() {
        return Err(refuse("it holds no tensor: the base model would answer as if nothing had been trained".into()));
    }
    load_layers(&adapter, &checkpoint, &mut unknown, model)?;
    let missing = load_others(&adapter, &checkpoint, &mut unknown, model)?;
    let broken = checkpoint.names().into_iter().find(|name| !checkpoint.is_finite(name));
    match (unknown.first(), missing.first()) {
        (None, None) => broken.map_or(Ok(()), |name| {
            Err(refuse(format!(
                "NaN or infinite values in {name}: the training that wrote them has failed; train it again"
            )))
        }),
        (Some(name), _) if name.contains(".lora_") => Err(refuse(format!(
            "{name} belongs to no layer of this model that adapter_config.json selects (target_modules, \
             exclude_modules, layers_to_transform, use_dora)"
        ))),
        (Some(name), _) => Err(refuse(format!("{name} belongs to no layer of this model"))),
        (None, Some(name)) => Err(refuse(format!("{PREFIX}{name} is missing, which {}", asks_for(name)))),
    }
}

fn asks_for(name: &str) -> &'static str {
    if name.ends_with(".bias") { "bias: all asks for" } else { "modules_to_save asks for" }
}

/// Puts biases and whole modules on the model, which are under the base model's names; gives the names of those that the
/// file lacks.
fn load_others<B: Backend>(
    adapter: &AdapterConfig,
    checkpoint: &Checkpoint,
    unknown: &mut BTreeSet<String>,
    model: &mut Model<B>,
) -> Result<BTreeSet<String>> {
    let modules = whole_modules(&model.config, &adapter.modules_to_save)?;
    let mut missing: BTreeSet<String> = modules.iter().map(|(name, _)| format!("{name}.weight")).collect();
    if adapter.bias == LoraBias::All {
        missing.extend(model.parameters().into_iter().map(|(name, _)| name).filter(|name| name.ends_with(".bias")));
    }
    let table = [model.config.vocab_size, model.config.hidden_size];
    for name in unknown.clone() {
        let Some(known) = name.strip_prefix(PREFIX).map(base_name) else { continue };
        let module = modules.iter().find(|(module, _)| known.strip_suffix(".weight") == Some(module));
        match module.map(|(_, module)| *module) {
            Some(WholeModule::Output) => {
                let weight = model.backend.weight(checkpoint.tensor(&name, &table)?);
                model.lm_head = Some(Weight::Frozen(weight));
            }
            Some(WholeModule::Embedding) => {
                model.embedding = Weight::Frozen(model.backend.weight(checkpoint.tensor(&name, &table)?));
            }
            _ => {
                let parameters = model.parameters();
                let param = parameters.iter().find(|(parameter, _)| *parameter == known);
                let Some([1, cols]) = param.map(|(_, param)| model.backend.shape(&param.value)) else { continue };
                let values = checkpoint.tensor(&name, &[cols])?.to_f32();
                model.set(&known, &values);
            }
        }
        unknown.remove(&name);
        missing.remove(&known);
    }
    Ok(missing)
}

/// One linear layer's adapter: y += scale · B · A · x.
#[derive(Debug, Clone, PartialEq)]
pub struct AdaptedLayer {
    /// Its name, such as `model.layers.0.self_attn.q_proj`.
    pub module: String,
    /// Rows of A and columns of B.
    pub rank: usize,
    /// [rank, in], row-major.
    pub a: Vec<f32>,
    /// [out, rank], row-major.
    pub b: Vec<f32>,
    /// Factor of the update.
    pub scale: f32,
}

impl<B: Backend> Model<B> {
    /// The layers that have an adapter, block by block. DoRA's magnitudes are no part of it.
    pub fn adapted_layers(&self) -> Vec<AdaptedLayer> {
        let blocks = self.blocks.iter().enumerate();
        blocks
            .flat_map(|(block, layers)| {
                let layer = move |which: Projection| {
                    let adapter = layers.projections[which as usize].as_ref()?.adapter.as_ref()?;
                    let [a, b] = [&adapter.a.value, &adapter.b.value].map(|x| self.backend.download(x));
                    let [rank, _] = self.backend.shape(&adapter.a.value);
                    Some(AdaptedLayer { module: which.name(block), rank, a, b, scale: adapter.scale })
                };
                Projection::ALL.into_iter().filter_map(layer)
            })
            .collect()
    }
}

/// A base model's name for what PEFT calls so: PEFT wraps adapted layers.
fn base_name(name: &str) -> String {
    name.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")
}

fn load_layers<B: Backend>(
    adapter: &AdapterConfig,
    checkpoint: &Checkpoint,
    unknown: &mut BTreeSet<String>,
    model: &mut Model<B>,
) -> Result<()> {
    let shape = adapter.layers(&model.config)?;
    let Model { backend, config, blocks, .. } = model;
    for (block, layers) in blocks.iter_mut().enumerate() {
        for which in Projection::ALL {
            let Some(linear) = &mut layers.projections[which as usize] else { continue };
            let module = which.name(block);
            linear.adapter = None;
            let Some(Shape { rank, scale }) = shape(&module) else { continue };
            let [output, input] = which.shape(config);
            let mut take = |part: &str, shape: &[usize]| {
                let name = format!("{PREFIX}{module}.{part}");
                unknown.remove(&name);
                checkpoint.tensor(&name, shape).map(|tensor| tensor.to_f32())
            };
            let a = backend.upload(&take("lora_A.weight", &[rank, input])?, rank, input);
            let b = backend.upload(&take("lora_B.weight", &[output, rank])?, output, rank);
            let mut layer = LoraLayer::new(a, b, scale);
            if adapter.use_dora {
                let magnitude = backend.upload(&take("lora_magnitude_vector", &[output])?, 1, output);
                layer.add_magnitude(backend, linear.weight.get(), magnitude);
            }
            linear.adapter = Some(layer);
        }
    }
    Ok(())
}

/// The name under which PEFT saves a trained tensor; `adapted` are the layers that PEFT wraps.
pub(crate) fn saved_name(name: &str, adapted: &HashSet<String>) -> String {
    match name.strip_suffix(".bias") {
        Some(module) if adapted.contains(module) => format!("{PREFIX}{module}.base_layer.bias"),
        _ => format!("{PREFIX}{name}"),
    }
}

#[cfg(test)]
mod tests;
