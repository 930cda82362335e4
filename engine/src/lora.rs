//! Low-rank adapters (Hu et al., 2021), named and shaped as PEFT's: y = W·x + scale · B·A·dropout(x).

use std::collections::BTreeSet;
use std::path::Path;

use regex::Regex;
use serde::{Deserialize, Serialize};

use crate::backend::Backend;
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::projection::{PerProjection, Projection};
use crate::random;
use crate::weights::Checkpoint;

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
    /// Seed of A's initial values and of dropout.
    pub seed: u64,
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

/// One linear layer's adapter.
pub(crate) struct LoraLayer<T> {
    /// [rank, in].
    pub(crate) a: T,
    /// [out, rank].
    pub(crate) b: T,
    pub(crate) scale: f32,
}

/// Values shaped like one linear layer's adapter: gradients, moments.
pub(crate) struct LoraPair<T> {
    pub(crate) a: T,
    pub(crate) b: T,
}

pub(crate) type BlockAdapter<T> = PerProjection<Option<LoraLayer<T>>>;
pub(crate) type BlockGrads<T> = PerProjection<Option<LoraPair<T>>>;
/// One adapter for each block.
pub(crate) type Adapter<T> = Vec<BlockAdapter<T>>;

impl LoraOptions {
    /// The factor of the update.
    pub fn scale(&self) -> f32 {
        scale(self.rank, self.alpha, self.use_rslora)
    }

    fn validate(&self) -> Result<()> {
        if self.rank == 0 {
            return Err(Error::Lora("rank is 0; it must be at least 1".into()));
        }
        if !self.alpha.is_finite() {
            return Err(Error::Lora(format!("alpha is {}; it must be a number", self.alpha)));
        }
        if !(0.0..1.0).contains(&self.dropout) {
            return Err(Error::Lora(format!("dropout is {}; it must be in [0, 1)", self.dropout)));
        }
        Ok(())
    }

    /// Parameters that each rank trains: the sum of in + out features over the adapted layers.
    ///
    /// # Errors
    /// The options are out of range or select no layer.
    pub fn parameters_per_rank(&self, config: &ModelConfig) -> Result<usize> {
        self.validate()?;
        let targets = self.target_modules.select(config)?;
        let adapted = targets.into_iter().flat_map(|block| Projection::ALL.into_iter().zip(block));
        let sizes = adapted.filter(|(_, adapted)| *adapted).map(|(which, _)| which.shape(config).iter().sum::<usize>());
        Ok(sizes.sum())
    }

    /// A fresh adapter: A uniform within ±1/√in (torch's kaiming_uniform with a = √5), B zero.
    pub(crate) fn init<B: Backend>(&self, backend: &B, config: &ModelConfig) -> Result<Adapter<B::Tensor>> {
        self.validate()?;
        let targets = self.target_modules.select(config)?;
        let layer = |block: usize, which: Projection| {
            let [output, input] = which.shape(config);
            let key = random::key(self.seed, &[block as u64, which as u64]);
            let a = random::uniform(self.rank * input, 1.0 / (input as f32).sqrt(), key);
            LoraLayer {
                a: backend.upload(&a, self.rank, input),
                b: backend.zeros(output, self.rank),
                scale: self.scale(),
            }
        };
        let block = |(block, targets): (usize, PerProjection<bool>)| {
            Projection::ALL.map(|which| targets[which as usize].then(|| layer(block, which)))
        };
        Ok(targets.into_iter().enumerate().map(block).collect())
    }
}

fn scale(rank: usize, alpha: f64, use_rslora: bool) -> f32 {
    let rank = rank as f64;
    (alpha / if use_rslora { rank.sqrt() } else { rank }) as f32
}

/// Whether a module's whole name is selected.
type Matcher<'a> = Box<dyn Fn(&str) -> bool + 'a>;

/// Modules that PEFT could adapt and the engine cannot.
const UNSUPPORTED: [&str; 2] = ["lm_head", "model.embed_tokens"];

impl TargetModules {
    /// Whether each projection of each block gets an adapter.
    fn select(&self, config: &ModelConfig) -> Result<Vec<PerProjection<bool>>> {
        let matches = self.matcher()?;
        if let Some(name) = UNSUPPORTED.iter().find(|name| matches(name)) {
            return Err(Error::Lora(format!(
                "target_modules selects {name}, which cannot have an adapter here; choose from {}",
                choices()
            )));
        }
        let selected: Vec<_> = (0..config.num_hidden_layers)
            .map(|block| Projection::ALL.map(|which| matches(&which.name(block))))
            .collect();
        if let TargetModules::Names(names) = self {
            for name in names {
                let alone = TargetModules::Names(vec![name.clone()]);
                let matches = alone.matcher()?;
                let all =
                    (0..config.num_hidden_layers).flat_map(|block| Projection::ALL.map(|which| which.name(block)));
                if !all.into_iter().any(|module| matches(&module)) {
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
                Projection::Query.name(0)
            )));
        }
        Ok(selected)
    }

    fn matcher(&self) -> Result<Matcher<'_>> {
        Ok(match self {
            TargetModules::Pattern(all) if all == "all-linear" => Box::new(|name| !UNSUPPORTED.contains(&name)),
            TargetModules::Pattern(pattern) => {
                let regex = Regex::new(&format!("^(?:{pattern})$"))
                    .map_err(|e| Error::Lora(format!("target_modules is no regular expression: {e}")))?;
                Box::new(move |name| regex.is_match(name))
            }
            TargetModules::Names(names) => Box::new(|module| {
                names
                    .iter()
                    .any(|name| module == name || module.strip_suffix(name.as_str()).is_some_and(|s| s.ends_with('.')))
            }),
        })
    }
}

fn choices() -> String {
    let names: Vec<&str> = Projection::ALL.iter().filter_map(|which| which.path().split('.').nth(1)).collect();
    names.join(", ")
}

/// A weight's name in PEFT's files: `part` is `lora_A` or `lora_B`.
pub(crate) fn peft_name(block: usize, which: Projection, part: &str) -> String {
    format!("base_model.model.{}.{part}.weight", which.name(block))
}

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
    bias: Option<String>,
    #[serde(default)]
    modules_to_save: Option<Vec<String>>,
    #[serde(default)]
    rank_pattern: Option<serde_json::Map<String, serde_json::Value>>,
    #[serde(default)]
    alpha_pattern: Option<serde_json::Map<String, serde_json::Value>>,
}

impl AdapterConfig {
    fn load(dir: &Path) -> Result<Self> {
        let path = dir.join("adapter_config.json");
        let text = std::fs::read_to_string(&path).map_err(|e| Error::io(&path, e))?;
        let config: Self = serde_json::from_str(&text)
            .map_err(|e| Error::config(&path, format!("not an adapter configuration: {e}")))?;
        let refuse = |field: &str| Err(Error::config(&path, format!("{field} is not supported")));
        if config.peft_type != "LORA" {
            return refuse(&format!("peft_type {}", config.peft_type));
        }
        if config.r == 0 {
            return refuse("r = 0");
        }
        if config.use_dora {
            return refuse("use_dora");
        }
        if config.bias.as_deref().is_some_and(|bias| bias != "none") {
            return refuse("a bias other than none");
        }
        if config.modules_to_save.as_ref().is_some_and(|modules| !modules.is_empty()) {
            return refuse("modules_to_save");
        }
        if config.rank_pattern.as_ref().is_some_and(|pattern| !pattern.is_empty()) {
            return refuse("rank_pattern");
        }
        if config.alpha_pattern.as_ref().is_some_and(|pattern| !pattern.is_empty()) {
            return refuse("alpha_pattern");
        }
        Ok(config)
    }
}

/// Reads a PEFT adapter folder: `adapter_config.json` and `adapter_model.safetensors`.
pub(crate) fn load<B: Backend>(dir: &Path, backend: &B, config: &ModelConfig) -> Result<Adapter<B::Tensor>> {
    let adapter_config = AdapterConfig::load(dir)?;
    let rank = adapter_config.r;
    let scale = scale(rank, adapter_config.lora_alpha, adapter_config.use_rslora);
    let file = dir.join("adapter_model.safetensors");
    let checkpoint = Checkpoint::open_files(&file, std::slice::from_ref(&file))?;
    let mut unknown: BTreeSet<&str> = checkpoint.names().into_iter().collect();
    let mut adapter = Adapter::new();
    for block in 0..config.num_hidden_layers {
        let mut layers = BlockAdapter::default();
        for which in Projection::ALL {
            let [a, b] = ["lora_A", "lora_B"].map(|part| peft_name(block, which, part));
            if !unknown.remove(a.as_str()) & !unknown.remove(b.as_str()) {
                continue;
            }
            let [output, input] = which.shape(config);
            let a = checkpoint.tensor(&a, &[rank, input])?.to_f32();
            let b = checkpoint.tensor(&b, &[output, rank])?.to_f32();
            let (a, b) = (backend.upload(&a, rank, input), backend.upload(&b, output, rank));
            layers[which as usize] = Some(LoraLayer { a, b, scale });
        }
        adapter.push(layers);
    }
    if let Some(name) = unknown.first() {
        return Err(Error::weights(&file, format!("{name} belongs to no linear layer of this model")));
    }
    Ok(adapter)
}
