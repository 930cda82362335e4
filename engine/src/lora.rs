//! Low-rank adapters (Hu et al., 2021), named and shaped as PEFT's: y = W·x + scale · B·A·dropout(x). Their options and the
//! layers that these select; [`install`] puts one on a model.

mod install;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::pattern::{Patterns, compile};
use crate::projection::{PerProjection, Projection};
use crate::whole_modules::whole_modules;

/// What the adapter is made of.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LoraOptions {
    /// Rows of A and columns of B.
    pub rank: usize,
    /// The update is scaled by alpha / rank, or alpha / √rank with `use_rslora`.
    pub alpha: f64,
    /// Share of the adapter's input that is zeroed while training, in [0, 1).
    pub dropout: f64,
    /// The linear layers that get an adapter.
    pub target_modules: TargetModules,
    /// Rank-stabilised scaling (Kalajdzievski, 2023).
    pub use_rslora: bool,
    /// Trains the length of each adapted weight's rows apart from their direction (Liu et al., 2024).
    #[serde(default)]
    pub use_dora: bool,
    /// The biases that are trained beside the adapter.
    #[serde(default)]
    pub bias: LoraBias,
    /// Modules that are trained whole and saved with the adapter: `lm_head`, `embed_tokens`, or norms; each takes all
    /// whose names end so, as in PEFT.
    #[serde(default)]
    pub modules_to_save: Vec<String>,
    /// Other ranks for some modules. A key is a regular expression that must match the end of a module's name, from a
    /// dot on. Keys that match the same module must agree: their order is none that PEFT would know.
    #[serde(default)]
    pub rank_pattern: BTreeMap<String, usize>,
    /// Other alphas for some modules.
    #[serde(default)]
    pub alpha_pattern: BTreeMap<String, f64>,
    /// Seed of A's initial values and of dropout.
    pub seed: u64,
}

/// The biases that are trained beside an adapter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LoraBias {
    /// None.
    #[default]
    None,
    /// All of the model's.
    All,
    /// Those of adapted layers.
    LoraOnly,
}

/// Which linear layers get an adapter.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum TargetModules {
    /// One string: `all-linear` (every linear layer but the output layer), or a regular expression that must match
    /// a module's whole name, such as `model.layers.0.self_attn.q_proj`.
    Pattern(String),
    /// Names: a module is taken if its name is one of these, or ends with `.` and one of these.
    Names(Vec<String>),
}

impl Default for LoraOptions {
    /// PEFT's defaults, on queries and values.
    fn default() -> Self {
        LoraOptions {
            rank: 8,
            alpha: 8.0,
            dropout: 0.0,
            target_modules: TargetModules::Names(vec!["q_proj".into(), "v_proj".into()]),
            use_rslora: false,
            use_dora: false,
            bias: LoraBias::None,
            modules_to_save: Vec::new(),
            rank_pattern: BTreeMap::new(),
            alpha_pattern: BTreeMap::new(),
            seed: 0,
        }
    }
}

/// Rank and scale of one module's adapter.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Shape {
    pub(crate) rank: usize,
    pub(crate) scale: f32,
}

impl LoraOptions {
    fn validate(&self) -> Result<()> {
        let ranks = [("rank", &self.rank)].into_iter();
        let ranks = ranks.chain(self.rank_pattern.iter().map(|(key, rank)| (key.as_str(), rank)));
        if let Some((name, _)) = ranks.into_iter().find(|(_, rank)| **rank == 0) {
            return Err(Error::Lora(format!("{name} is 0; it must be at least 1")));
        }
        let alphas = [("alpha", &self.alpha)].into_iter();
        let alphas = alphas.chain(self.alpha_pattern.iter().map(|(key, alpha)| (key.as_str(), alpha)));
        if let Some((name, alpha)) = alphas.into_iter().find(|(_, alpha)| !alpha.is_finite()) {
            return Err(Error::Lora(format!("{name} is {alpha}; it must be a number")));
        }
        if !(0.0..1.0).contains(&self.dropout) {
            return Err(Error::Lora(format!("dropout is {}; it must be in [0, 1)", self.dropout)));
        }
        Ok(())
    }

    /// Rank and scale of each module that is adapted.
    pub(crate) fn shapes(&self, config: &ModelConfig) -> Result<Vec<PerProjection<Option<Shape>>>> {
        self.validate()?;
        let blocks = self.target_modules.select(config)?;
        let adapted = |(block, targets): (usize, &PerProjection<bool>)| {
            let targets = *targets;
            let adapted = Projection::ALL.into_iter().filter(move |which| targets[*which as usize]);
            adapted.map(move |which| which.name(block))
        };
        let adapted: Vec<String> = blocks.iter().enumerate().flat_map(adapted).collect();
        let ranks = Patterns::new("rank_pattern", &self.rank_pattern)?;
        let alphas = Patterns::new("alpha_pattern", &self.alpha_pattern)?;
        ranks.check(&adapted)?;
        alphas.check(&adapted)?;
        let shape = |name: &str| {
            let rank = ranks.first(name).unwrap_or(self.rank);
            Shape { rank, scale: scale(rank, alphas.first(name).unwrap_or(self.alpha), self.use_rslora) }
        };
        let shapes = |(block, targets): (usize, PerProjection<bool>)| {
            Projection::ALL.map(|which| targets[which as usize].then(|| shape(&which.name(block))))
        };
        Ok(blocks.into_iter().enumerate().map(shapes).collect())
    }

    /// Parameters that are trained: low-rank matrices, DoRA's magnitudes, biases and whole modules.
    ///
    /// # Errors
    /// The options are out of range, or select no layer or a module that is not there.
    pub fn parameters(&self, config: &ModelConfig) -> Result<usize> {
        let of_layer = |which: Projection, shape: Option<Shape>| {
            let [output, input] = which.shape(config);
            let magnitudes = if self.use_dora { output } else { 0 };
            let matrices = shape.map_or(0, |shape| shape.rank * (output + input) + magnitudes);
            let trains_bias = match self.bias {
                LoraBias::None => false,
                LoraBias::All => true,
                LoraBias::LoraOnly => shape.is_some(),
            };
            matrices + if trains_bias && which.has_bias(config) { output } else { 0 }
        };
        let blocks = self.shapes(config)?;
        let layers = blocks.iter().flat_map(|block| Projection::of(config).map(|which| (which, block[which as usize])));
        let modules = whole_modules(config, &self.modules_to_save)?;
        let layers: usize = layers.map(|(which, shape)| of_layer(which, shape)).sum();
        Ok(layers + modules.into_iter().map(|(_, module)| module.parameters(config)).sum::<usize>())
    }
}

pub(crate) fn scale(rank: usize, alpha: f64, use_rslora: bool) -> f32 {
    let rank = rank as f64;
    (alpha / if use_rslora { rank.sqrt() } else { rank }) as f32
}

/// Whether a module's whole name is selected.
pub(crate) type Matcher = Box<dyn Fn(&str) -> bool>;

/// Stands for every linear layer but the output layer.
pub(crate) const ALL_LINEAR: &str = "all-linear";

/// Modules that PEFT could adapt and the engine cannot.
const UNSUPPORTED: [&str; 2] = ["lm_head", "model.embed_tokens"];

impl TargetModules {
    /// Whether each projection of each block gets an adapter.
    fn select(&self, config: &ModelConfig) -> Result<Vec<PerProjection<bool>>> {
        let matches = self.matcher()?;
        let choices = || choices(config);
        if let Some(name) = UNSUPPORTED.iter().find(|name| matches(name)) {
            return Err(Error::Lora(format!(
                "target_modules selects {name}, which cannot have an adapter here; choose from {}",
                choices()
            )));
        }
        let selected: Vec<_> = (0..config.num_hidden_layers)
            .map(|block| {
                let exists: Vec<Projection> = Projection::of(config).collect();
                Projection::ALL.map(|which| exists.contains(&which) && matches(&which.name(block)))
            })
            .collect();
        if let TargetModules::Names(names) = self {
            for name in names {
                let alone = TargetModules::Names(vec![name.clone()]);
                let matches = alone.matcher()?;
                let blocks = 0..config.num_hidden_layers;
                let mut all = blocks.flat_map(|block| Projection::of(config).map(move |which| which.name(block)));
                if !all.any(|module| matches(&module)) {
                    return Err(Error::Lora(format!(
                        "target_modules: {name:?} matches no linear layer; choose from {}",
                        choices()
                    )));
                }
            }
        }
        if !selected.iter().flatten().any(|&selected| selected) {
            return Err(Error::Lora(format!(
                "target_modules matches no linear layer; choose from {}, or a pattern for whole names such as {}",
                choices(),
                Projection::Output.name(0)
            )));
        }
        Ok(selected)
    }

    pub(crate) fn matcher(&self) -> Result<Matcher> {
        Ok(match self {
            TargetModules::Pattern(all) if all == ALL_LINEAR => Box::new(|name| !UNSUPPORTED.contains(&name)),
            TargetModules::Pattern(pattern) => {
                let regex = compile("target_modules", pattern, &format!("^(?:{pattern})$"))?;
                Box::new(move |name| regex.is_match(name))
            }
            TargetModules::Names(names) => {
                let names = names.clone();
                Box::new(move |module| names.iter().any(|name| is_named(module, name)))
            }
        })
    }
}

/// Whether a module's name is `name`, or ends with `.` and it.
fn is_named(module: &str, name: &str) -> bool {
    module == name || module.strip_suffix(name).is_some_and(|rest| rest.ends_with('.'))
}

fn choices(config: &ModelConfig) -> String {
    let names: Vec<&str> = Projection::of(config).filter_map(|which| which.path().split('.').nth(1)).collect();
    names.join(", ")
}
