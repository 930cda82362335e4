//! Low-rank adapters (Hu et al., 2021), named and shaped as PEFT's: y = W·x + scale · B·A·dropout(x).

use serde::{Deserialize, Serialize};

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
