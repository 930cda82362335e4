//! PEFT's adapter folders: the names of their tensors, and putting one on a model.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::path::Path;

use serde::Deserialize;

use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::lora::{LoraBias, TargetModules, fresh, patterns, scale};
use crate::model::Model;
use crate::projection::Projection;
use crate::weights::Checkpoint;
use crate::whole_modules::whole_modules;

/// What PEFT puts before a base model's names.
pub(crate) const PREFIX: &str = "base_model.model.";

/// The fields of `adapter_config.json` that decide the numbers.
#[derive(Deserialize)]
struct AdapterConfig {
    peft_type: String,
    r: usize,
    lora_alpha: f64,
    #[serde(default)]
    use_rslora: bool,
    #[serde(default)]
    use_dora: bool,
    #[serde(default)]
    bias: LoraBias,
    #[serde(default)]
    modules_to_save: Option<Vec<String>>,
    #[serde(default)]
    target_modules: Option<TargetModules>,
    /// With these, PEFT adapts fewer than it targets.
    #[serde(default)]
    layers_to_transform: Option<serde_json::Value>,
    #[serde(default)]
    exclude_modules: Option<serde_json::Value>,
    #[serde(default)]
    rank_pattern: Option<BTreeMap<String, usize>>,
    #[serde(default)]
    alpha_pattern: Option<BTreeMap<String, f64>>,
}

impl AdapterConfig {
    fn load(dir: &Path) -> Result<Self> {
        let path = dir.join("adapter_config.json");
        let text = std::fs::read_to_string(&path).map_err(|e| Error::io(&path, e))?;
        let config: Self = serde_json::from_str(&text)
            .map_err(|e| Error::config(&path, format!("not an adapter configuration: {e}")))?;
        if config.peft_type != "LORA" {
            return Err(Error::config(&path, format!("peft_type is {}; supported: LORA", config.peft_type)));
        }
        let ranks = config.rank_pattern.iter().flatten().map(|(key, rank)| (key.as_str(), *rank));
        if let Some((key, _)) = [("r", config.r)].into_iter().chain(ranks).find(|(_, rank)| *rank == 0) {
            return Err(Error::config(&path, format!("{key} is 0; it must be at least 1")));
        }
        Ok(config)
    }
}

/// Puts the adapter of a folder (`adapter_config.json` and `adapter_model.safetensors`) on the model.
pub(crate) fn load<B: Backend>(dir: &Path, model: &mut Model<B>) -> Result<()> {
    let adapter = AdapterConfig::load(dir)?;
    let file = dir.join("adapter_model.safetensors");
    let checkpoint = Checkpoint::open_files(&file, std::slice::from_ref(&file))?;
    let mut unknown: BTreeSet<String> = checkpoint.names().into_iter().map(str::to_owned).collect();
    let refuse = |problem: String| Error::weights(&file, problem);
    if unknown.is_empty() {
        return Err(refuse("it holds no tensor: the base model would answer as if nothing had been trained".into()));
    }
    load_layers(&adapter, &checkpoint, &mut unknown, model)?;
    if adapter.bias != LoraBias::None {
        model.train_biases();
    }
    model.train_modules(adapter.modules_to_save.as_deref().unwrap_or_default())?;
    // Biases and whole modules, under the base model's names.
    let backend_shape = |model: &Model<B>, name: &str| {
        let parameters = model.parameters();
        let (_, param) = parameters.iter().find(|(known, _)| *known == name)?;
        Some(model.backend.shape(&param.value))
    };
    let modules = whole_modules(&model.config, adapter.modules_to_save.as_deref().unwrap_or_default())?;
    let mut missing: BTreeSet<String> = modules.into_iter().map(|(name, _)| format!("{name}.weight")).collect();
    for name in unknown.clone() {
        let Some(known) = name.strip_prefix(PREFIX).map(base_name) else { continue };
        let Some([rows, cols]) = backend_shape(model, &known) else { continue };
        let shape = if rows == 1 { vec![cols] } else { vec![rows, cols] };
        let values = checkpoint.tensor(&name, &shape)?.to_f32();
        model.set(&known, &values);
        unknown.remove(&name);
        missing.remove(&known);
    }
    match (unknown.first(), missing.first()) {
        (None, None) => Ok(()),
        (Some(name), _) => Err(refuse(format!("{name} belongs to no layer of this model"))),
        (None, Some(name)) => Err(refuse(format!("{PREFIX}{name} is missing, which modules_to_save asks for"))),
    }
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
    let none = (BTreeMap::new(), BTreeMap::new());
    let ranks = patterns("rank_pattern", adapter.rank_pattern.as_ref().unwrap_or(&none.0))?;
    let alphas = patterns("alpha_pattern", adapter.alpha_pattern.as_ref().unwrap_or(&none.1))?;
    let targets = adapter.target_modules.as_ref().map(TargetModules::matcher).transpose()?;
    let targets = targets.filter(|_| adapter.layers_to_transform.is_none() && adapter.exclude_modules.is_none());
    let Model { backend, config, blocks, .. } = model;
    for (block, layers) in blocks.iter_mut().enumerate() {
        for which in Projection::ALL {
            let Some(linear) = &mut layers.projections[which as usize] else { continue };
            let module = which.name(block);
            let [a, b] = ["lora_A", "lora_B"].map(|part| format!("{PREFIX}{module}.{part}.weight"));
            let magnitude = format!("{PREFIX}{module}.lora_magnitude_vector");
            linear.adapter = None;
            let is_targeted = targets.as_ref().is_some_and(|targets| targets(&module));
            if !is_targeted && !unknown.contains(&a) && !unknown.contains(&b) {
                continue;
            }
            unknown.remove(&a);
            unknown.remove(&b);
            let rank = ranks.iter().find(|(key, _)| key.is_match(&module)).map_or(adapter.r, |(_, rank)| **rank);
            let alpha = alphas.iter().find(|(key, _)| key.is_match(&module));
            let alpha = alpha.map_or(adapter.lora_alpha, |(_, alpha)| **alpha);
            let [output, input] = which.shape(config);
            let a = backend.upload(&checkpoint.tensor(&a, &[rank, input])?.to_f32(), rank, input);
            let b = backend.upload(&checkpoint.tensor(&b, &[output, rank])?.to_f32(), output, rank);
            let scale = scale(rank, alpha, adapter.use_rslora);
            let mut layer = fresh(backend, linear, a, b, scale, adapter.use_dora);
            if let Some(param) = &mut layer.magnitude {
                unknown.remove(&magnitude);
                param.value = backend.upload(&checkpoint.tensor(&magnitude, &[output])?.to_f32(), 1, output);
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
