//! The linear layers of a decoder block.

use crate::config::ModelConfig;

/// A linear layer of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Projection {
    Query,
    Key,
    Value,
    /// Query, key and value in one, where a model fuses them.
    QueryKeyValue,
    Output,
    Gate,
    Up,
    /// Gate and up in one, where a model fuses them.
    GateUp,
    Down,
}

impl Projection {
    /// All that there are, in the order in which a block uses them.
    pub(crate) const ALL: [Projection; 9] = [
        Projection::Query,
        Projection::Key,
        Projection::Value,
        Projection::QueryKeyValue,
        Projection::Output,
        Projection::Gate,
        Projection::Up,
        Projection::GateUp,
        Projection::Down,
    ];

    /// Those that a model has, in the order in which a block uses them.
    pub(crate) fn of(config: &ModelConfig) -> impl Iterator<Item = Projection> + Clone + use<> {
        let fused = config.fused;
        Self::ALL.into_iter().filter(move |which| match which {
            Projection::Query | Projection::Key | Projection::Value | Projection::Gate | Projection::Up => !fused,
            Projection::QueryKeyValue | Projection::GateUp => fused,
            Projection::Output | Projection::Down => true,
        })
    }

    /// The module's name inside its block.
    pub(crate) fn path(self) -> &'static str {
        match self {
            Projection::Query => "self_attn.q_proj",
            Projection::Key => "self_attn.k_proj",
            Projection::Value => "self_attn.v_proj",
            Projection::QueryKeyValue => "self_attn.qkv_proj",
            Projection::Output => "self_attn.o_proj",
            Projection::Gate => "mlp.gate_proj",
            Projection::Up => "mlp.up_proj",
            Projection::GateUp => "mlp.gate_up_proj",
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
        let (query, key_value) = (config.query_size(), config.key_value_size());
        match self {
            Projection::Query => [query, hidden],
            Projection::Key | Projection::Value => [key_value, hidden],
            Projection::QueryKeyValue => [query + 2 * key_value, hidden],
            Projection::Output => [hidden, query],
            Projection::Gate | Projection::Up => [mlp, hidden],
            Projection::GateUp => [2 * mlp, hidden],
            Projection::Down => [hidden, mlp],
        }
    }

    /// Whether it has a bias.
    pub(crate) fn has_bias(self, config: &ModelConfig) -> bool {
        match self {
            Projection::Query | Projection::Key | Projection::Value | Projection::QueryKeyValue => {
                config.query_key_value_bias
            }
            Projection::Output => config.output_bias,
            Projection::Gate | Projection::Up | Projection::GateUp | Projection::Down => config.mlp_bias,
        }
    }
}

/// One value for each projection of a block.
pub(crate) type PerProjection<T> = [T; 9];
