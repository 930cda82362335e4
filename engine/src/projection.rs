//! The seven linear layers of a decoder block.

use crate::config::ModelConfig;

/// A linear layer of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Projection {
    Query,
    Key,
    Value,
    Output,
    Gate,
    Up,
    Down,
}

impl Projection {
    /// All, in the order in which a block uses them.
    pub(crate) const ALL: [Projection; 7] = [
        Projection::Query,
        Projection::Key,
        Projection::Value,
        Projection::Output,
        Projection::Gate,
        Projection::Up,
        Projection::Down,
    ];

    /// The module's name inside its block.
    pub(crate) fn path(self) -> &'static str {
        match self {
            Projection::Query => "self_attn.q_proj",
            Projection::Key => "self_attn.k_proj",
            Projection::Value => "self_attn.v_proj",
            Projection::Output => "self_attn.o_proj",
            Projection::Gate => "mlp.gate_proj",
            Projection::Up => "mlp.up_proj",
            Projection::Down => "mlp.down_proj",
        }
    }

    /// The module's whole name.
    pub(crate) fn name(self, block: usize) -> String {
        format!("model.layers.{block}.{}", self.path())
    }

    /// The weight's shape, [out, in].
    pub(crate) fn shape(self, config: &ModelConfig) -> [usize; 2] {
        let (hidden, mlp) = (config.hidden_size, config.intermediate_size);
        match self {
            Projection::Query => [config.query_size(), hidden],
            Projection::Key | Projection::Value => [config.key_value_size(), hidden],
            Projection::Output => [hidden, config.query_size()],
            Projection::Gate | Projection::Up => [mlp, hidden],
            Projection::Down => [hidden, mlp],
        }
    }
}

/// One value for each projection of a block.
pub(crate) type PerProjection<T> = [T; 7];
