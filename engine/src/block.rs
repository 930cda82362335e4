//! One decoder block, forward and backward:
//!
//! ```text
//! middle = x + o_proj(attention(rope(q_proj(n)), rope(k_proj(n)), v_proj(n))),  n = norm(x)
//! y = middle + down_proj(activation(gate_proj(m)) · up_proj(m)),                m = norm(middle)
//! ```
//!
//! Some families norm queries and keys head by head before they are rotated, or what attention and MLP give before it
//! is added. The backward pass needs of the activations only what [`Kept`] holds. Norms and the gated product are
//! computed again where a layer asks for its input: that is cheaper than keeping them.

use crate::backend::{Attention, AttentionForward, Backend, Dropout, Heads, InputGrad, RmsNorm};
use crate::config::{LayerConfig, ModelConfig};
use crate::linear::{Linear, LoraKept};
use crate::param::Param;
use crate::projection::{PerProjection, Projection};
use crate::random;

/// The weights of a block.
pub(crate) struct Block<B: Backend> {
    pub(crate) norms: PerNorm<Option<Param<B::Tensor>>>,
    pub(crate) projections: PerProjection<Option<Linear<B>>>,
}

/// A norm of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Norm {
    /// Before attention.
    AttentionIn,
    /// Of each head's query.
    Query,
    /// Of each head's key.
    Key,
    /// Behind attention.
    AttentionOut,
    /// Before the MLP.
    MlpIn,
    /// Behind the MLP.
    MlpOut,
}

/// One value for each norm of a block.
pub(crate) type PerNorm<T> = [T; 6];

impl Norm {
    /// All that there are, in the order in which a block uses them.
    pub(crate) const ALL: [Norm; 6] =
        [Norm::AttentionIn, Norm::Query, Norm::Key, Norm::AttentionOut, Norm::MlpIn, Norm::MlpOut];

    /// The module's name inside its block, if the model has it.
    pub(crate) fn path(self, config: &ModelConfig) -> Option<&'static str> {
        let (sandwich, heads) = (config.sandwich_norms, config.query_key_norm);
        match self {
            Norm::AttentionIn => Some("input_layernorm"),
            Norm::Query => heads.then_some("self_attn.q_norm"),
            Norm::Key => heads.then_some("self_attn.k_norm"),
            Norm::AttentionOut => sandwich.then_some("post_attention_layernorm"),
            Norm::MlpIn if sandwich => Some("pre_feedforward_layernorm"),
            Norm::MlpIn => Some("post_attention_layernorm"),
            Norm::MlpOut => sandwich.then_some("post_feedforward_layernorm"),
        }
    }

    /// The weight's length.
    pub(crate) fn len(self, config: &ModelConfig) -> usize {
        match self {
            Norm::Query | Norm::Key => config.head_dim,
            _ => config.hidden_size,
        }
    }
}

/// What one pass through one block needs besides activations.
pub(crate) struct Pass<'a, B: Backend> {
    pub(crate) backend: &'a B,
    pub(crate) config: &'a ModelConfig,
    /// The block's index.
    pub(crate) layer: usize,
    pub(crate) rows: &'a B::Rows,
    pub(crate) dropout: Option<DropoutSource>,
}

/// Where the masks of one micro-batch come from.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DropoutSource {
    pub(crate) p: f32,
    /// Differs between micro-batches and blocks.
    pub(crate) key: u64,
}

/// Activations that the backward pass needs.
pub(crate) struct Kept<B: Backend> {
    attention: AttentionKept<B>,
    middle: B::Tensor,
    gate: B::Tensor,
    up: B::Tensor,
    /// What the MLP gives, if it is normed.
    mlp_out: Option<B::Tensor>,
    lora: PerProjection<Option<LoraKept<B::Tensor>>>,
}

/// What attention leaves of it.
struct AttentionKept<B: Backend> {
    x: B::Tensor,
    /// Queries and keys before their norms, if they have any.
    unnormed: Option<[B::Tensor; 2]>,
    q: B::Tensor,
    k: B::Tensor,
    v: B::Tensor,
    /// What attention gives, if the layer behind it needs its input.
    attended: Option<B::Tensor>,
    log_sums: B::Tensor,
    /// What the layer behind attention gives, if it is normed.
    out: Option<B::Tensor>,
}

impl<B: Backend> Kept<B> {
    /// The block's input alone, from which [`Block::recompute`] gets the rest.
    pub(crate) fn into_input(self) -> B::Tensor {
        self.attention.x
    }
}

/// Keys and values of the tokens that a row already has, [capacity, key-value heads · dim].
pub(crate) struct KvCache<B: Backend> {
    pub(crate) keys: B::Tensor,
    pub(crate) values: B::Tensor,
}

impl<B: Backend> Pass<'_, B> {
    fn dropout(&self, which: Projection) -> Option<Dropout> {
        self.dropout.map(|source| Dropout { p: source.p, key: random::key(source.key, &[which as u64]) })
    }

    fn layer(&self) -> LayerConfig {
        self.config.layers[self.layer]
    }

    fn attention(&self) -> Attention {
        let config = self.config;
        let heads =
            Heads { query: config.num_attention_heads, key_value: config.num_key_value_heads, dim: config.head_dim };
        Attention {
            heads,
            scale: config.attention_scale,
            softcap: config.attention_softcap,
            window: self.layer().window,
        }
    }
}

impl<B: Backend> Block<B> {
    /// The block's output, and what its backward pass needs.
    pub(crate) fn forward(&self, pass: &Pass<'_, B>, x: B::Tensor) -> (B::Tensor, Kept<B>) {
        let mut kept = self.keep(pass, x);
        let y = self.output(pass, &mut kept);
        (y, kept)
    }

    /// All of the forward pass that the backward pass needs, from the block's input alone.
    pub(crate) fn recompute(&self, pass: &Pass<'_, B>, x: B::Tensor) -> Kept<B> {
        let mut kept = self.keep(pass, x);
        if self.norms[Norm::MlpOut as usize].is_some() || self.linear(Projection::Down).adapter.is_some() {
            self.output(pass, &mut kept);
        }
        kept
    }

    /// Whether anything of the block learns.
    pub(crate) fn is_trained(&self) -> bool {
        self.norms.iter().flatten().any(Param::is_trained) || self.projections.iter().flatten().any(Linear::is_trained)
    }

    /// Whether only a gradient of the block's input leads to all that learns: its first norm does.
    pub(crate) fn trains_first_norm(&self) -> bool {
        self.norms[Norm::AttentionIn as usize].as_ref().is_some_and(Param::is_trained)
    }

    fn linear(&self, which: Projection) -> &Linear<B> {
        self.projections[which as usize].as_ref().expect("the model has this projection")
    }

    fn keep(&self, pass: &Pass<'_, B>, x: B::Tensor) -> Kept<B> {
        let mut lora = PerProjection::default();
        let ([q, k, v], unnormed) = self.queries_keys_values(pass, &x, &mut lora);
        let (attended, log_sums) = pass.backend.attention(&q, &k, &v, pass.attention(), pass.rows);
        let (middle, out) = self.residual(pass, Projection::Output, &attended, &x, Norm::AttentionOut, &mut lora);
        let [gate, up] = self.gate_up(pass, &middle, &mut lora);
        let attended = self.linear(Projection::Output).needs_input().then_some(attended);
        let attention = AttentionKept { x, unnormed, q, k, v, attended, log_sums, out };
        Kept { attention, middle, gate, up, mlp_out: None, lora }
    }

    fn output(&self, pass: &Pass<'_, B>, kept: &mut Kept<B>) -> B::Tensor {
        let activated = pass.backend.gated(pass.config.activation, &kept.gate, &kept.up);
        let lora = &mut kept.lora;
        let (y, mlp_out) = self.residual(pass, Projection::Down, &activated, &kept.middle, Norm::MlpOut, lora);
        kept.mlp_out = mlp_out;
        y
    }

    /// The block's output for new tokens of one row of which `past` are in the cache, to which they are added.
    pub(crate) fn forward_cached(
        &self,
        pass: &Pass<'_, B>,
        x: B::Tensor,
        cache: &mut KvCache<B>,
        past: usize,
    ) -> B::Tensor {
        let backend = pass.backend;
        let mut lora = PerProjection::default();
        let ([q, k, v], _) = self.queries_keys_values(pass, &x, &mut lora);
        backend.write_rows(&mut cache.keys, &k, past);
        backend.write_rows(&mut cache.values, &v, past);
        let attended = match past {
            0 => backend.attention(&q, &k, &v, pass.attention(), pass.rows).0,
            _ => backend.attention_cached(&q, &cache.keys, &cache.values, pass.attention(), past),
        };
        let (middle, _) = self.residual(pass, Projection::Output, &attended, &x, Norm::AttentionOut, &mut lora);
        let [gate, up] = self.gate_up(pass, &middle, &mut lora);
        let activated = backend.gated(pass.config.activation, &gate, &up);
        self.residual(pass, Projection::Down, &activated, &middle, Norm::MlpOut, &mut lora).0
    }

    /// Rotated queries and keys, and values; and the queries and keys before their norms.
    #[allow(clippy::type_complexity)]
    fn queries_keys_values(
        &self,
        pass: &Pass<'_, B>,
        x: &B::Tensor,
        lora: &mut PerProjection<Option<LoraKept<B::Tensor>>>,
    ) -> ([B::Tensor; 3], Option<[B::Tensor; 2]>) {
        use Projection::{Key, Query, QueryKeyValue, Value};
        let Pass { backend, config, rows, .. } = *pass;
        let normed = self.normed(pass, Norm::AttentionIn, x).expect("every block has this norm");
        let [mut q, mut k, v] = match config.fused {
            true => {
                let all = self.project(pass, QueryKeyValue, &normed, lora);
                let (query, key) = (config.query_size(), config.key_value_size());
                [(0, query), (query, key), (query + key, key)].map(|(from, count)| backend.columns(&all, from, count))
            }
            false => [Query, Key, Value].map(|which| self.project(pass, which, &normed, lora)),
        };
        let unnormed = match (self.normed(pass, Norm::Query, &q), self.normed(pass, Norm::Key, &k)) {
            (Some(normed_q), Some(normed_k)) => {
                Some([std::mem::replace(&mut q, normed_q), std::mem::replace(&mut k, normed_k)])
            }
            _ => None,
        };
        let rope = pass.layer().rope;
        backend.rope(&mut q, config.head_dim, rows, rope);
        backend.rope(&mut k, config.head_dim, rows, rope);
        ([q, k, v], unnormed)
    }

    fn gate_up(
        &self,
        pass: &Pass<'_, B>,
        middle: &B::Tensor,
        lora: &mut PerProjection<Option<LoraKept<B::Tensor>>>,
    ) -> [B::Tensor; 2] {
        let normed = self.normed(pass, Norm::MlpIn, middle).expect("every block has this norm");
        if !pass.config.fused {
            return [Projection::Gate, Projection::Up].map(|which| self.project(pass, which, &normed, lora));
        }
        let both = self.project(pass, Projection::GateUp, &normed, lora);
        let width = pass.config.intermediate_size;
        [0, width].map(|from| pass.backend.columns(&both, from, width))
    }

    fn normed(&self, pass: &Pass<'_, B>, which: Norm, x: &B::Tensor) -> Option<B::Tensor> {
        let weight = self.norms[which as usize].as_ref()?;
        Some(pass.backend.rms_norm(x, &weight.value, rms_norm(pass.config)))
    }

    fn project(
        &self,
        pass: &Pass<'_, B>,
        which: Projection,
        x: &B::Tensor,
        lora: &mut PerProjection<Option<LoraKept<B::Tensor>>>,
    ) -> B::Tensor {
        let (y, kept) = self.linear(which).forward(pass.backend, x, pass.dropout(which));
        lora[which as usize] = kept;
        y
    }

    /// residual + projection(x), or residual + norm(projection(x)) and what was normed.
    fn residual(
        &self,
        pass: &Pass<'_, B>,
        which: Projection,
        x: &B::Tensor,
        residual: &B::Tensor,
        norm: Norm,
        lora: &mut PerProjection<Option<LoraKept<B::Tensor>>>,
    ) -> (B::Tensor, Option<B::Tensor>) {
        if self.norms[norm as usize].is_none() {
            let dropout = pass.dropout(which);
            let (y, kept) = self.linear(which).forward_onto(pass.backend, x, dropout, residual);
            lora[which as usize] = kept;
            return (y, None);
        }
        let out = self.project(pass, which, x, lora);
        let mut y = self.normed(pass, norm, &out).expect("the norm is there");
        pass.backend.add(&mut y, residual);
        (y, Some(out))
    }

    /// Adds the gradients of what is trained and returns the gradient of the block's input, if it is wanted.
    pub(crate) fn backward(
        &mut self,
        pass: &Pass<'_, B>,
        kept: Kept<B>,
        dy: B::Tensor,
        want_dx: bool,
    ) -> Option<B::Tensor> {
        let Kept { attention, middle, gate, up, mlp_out, lora } = kept;
        let mut back = Backward { block: self, pass, lora: &lora };
        let d_middle = back.mlp(middle, [gate, up], mlp_out, dy);
        back.attention(attention, d_middle, want_dx)
    }
}

struct Backward<'a, B: Backend> {
    block: &'a mut Block<B>,
    pass: &'a Pass<'a, B>,
    lora: &'a PerProjection<Option<LoraKept<B::Tensor>>>,
}

impl<B: Backend> Backward<'_, B> {
    /// The gradient of `middle` from that of the block's output.
    fn mlp(
        &mut self,
        middle: B::Tensor,
        [gate, up]: [B::Tensor; 2],
        out: Option<B::Tensor>,
        mut dy: B::Tensor,
    ) -> B::Tensor {
        use Projection::{Down, Gate, GateUp, Up};
        let Pass { backend, config, .. } = *self.pass;
        let d_out = out.map(|out| self.normed(Norm::MlpOut, &out, &dy));
        let activated = self.input_of(&[Down], || backend.gated(config.activation, &gate, &up));
        let d_out = d_out.as_ref().unwrap_or(&dy);
        let d_activated = self.linear(Down, activated.as_ref(), d_out, InputGrad::Fresh).expect("it is wanted");
        drop(activated);
        let [d_gate, d_up] = backend.gated_backward(config.activation, gate, up, d_activated);

        let inputs: &[Projection] = if config.fused { &[GateUp] } else { &[Gate, Up] };
        let normed = self.input_of(inputs, || self.input_norm(Norm::MlpIn, &middle));
        let d_normed = match config.fused {
            true => {
                let both = backend.join_columns(&[&d_gate, &d_up]);
                self.linear(GateUp, normed.as_ref(), &both, InputGrad::Fresh)
            }
            false => {
                let d_normed = self.linear(Gate, normed.as_ref(), &d_gate, InputGrad::Fresh);
                self.linear(Up, normed.as_ref(), &d_up, d_normed.map_or(InputGrad::None, InputGrad::Onto))
            }
        };
        self.norm(Norm::MlpIn, &middle, &d_normed.expect("it is wanted"), &mut dy);
        dy
    }

    /// The gradient of x from that of `middle`.
    fn attention(&mut self, kept: AttentionKept<B>, mut dy: B::Tensor, want_dx: bool) -> Option<B::Tensor> {
        use Projection::{Key, Output, Query, QueryKeyValue, Value};
        let Pass { backend, config, rows, .. } = *self.pass;
        let inputs: &[Projection] = if config.fused { &[QueryKeyValue] } else { &[Query, Key, Value] };
        let below = want_dx
            || inputs.iter().any(|&which| self.block.linear(which).is_trained())
            || [Norm::Query, Norm::Key].iter().any(|&norm| self.trains(norm));
        let d_out = kept.out.as_ref().map(|out| self.normed(Norm::AttentionOut, out, &dy));
        let d_out = d_out.as_ref().unwrap_or(&dy);
        let wanted = if below { InputGrad::Fresh } else { InputGrad::None };
        let d_attended = self.linear(Output, kept.attended.as_ref(), d_out, wanted)?;
        let AttentionKept { x, unnormed, q, k, v, log_sums, .. } = kept;
        let forward = AttentionForward { q: &q, k: &k, v: &v, log_sums: &log_sums };
        let [mut dq, mut dk, dv] = backend.attention_backward(forward, &d_attended, self.pass.attention(), rows);
        drop((q, k, v, log_sums, d_attended));
        let rope = self.pass.layer().rope;
        backend.rope_backward(&mut dq, config.head_dim, rows, rope);
        backend.rope_backward(&mut dk, config.head_dim, rows, rope);
        if let Some([q, k]) = unnormed {
            dq = self.normed(Norm::Query, &q, &dq);
            dk = self.normed(Norm::Key, &k, &dk);
        }

        let normed = self.input_of(inputs, || self.input_norm(Norm::AttentionIn, &x));
        let fused = config.fused.then(|| backend.join_columns(&[&dq, &dk, &dv]));
        let outputs: Vec<&B::Tensor> = fused.as_ref().map_or_else(|| vec![&dq, &dk, &dv], |fused| vec![fused]);
        let mut d_normed = None;
        for (&which, d) in inputs.iter().zip(outputs) {
            let wanted = match (want_dx, d_normed.take()) {
                (false, _) => InputGrad::None,
                (true, None) => InputGrad::Fresh,
                (true, Some(d_normed)) => InputGrad::Onto(d_normed),
            };
            d_normed = self.linear(which, normed.as_ref(), d, wanted);
        }
        self.norm(Norm::AttentionIn, &x, &d_normed?, &mut dy);
        Some(dy)
    }

    fn trains(&self, norm: Norm) -> bool {
        self.block.norms[norm as usize].as_ref().is_some_and(Param::is_trained)
    }

    /// A layer's input, computed again if one of these projections needs it.
    fn input_of(&self, which: &[Projection], x: impl FnOnce() -> B::Tensor) -> Option<B::Tensor> {
        which.iter().any(|&which| self.block.linear(which).needs_input()).then(x)
    }

    fn input_norm(&self, which: Norm, x: &B::Tensor) -> B::Tensor {
        self.block.normed(self.pass, which, x).expect("every block has this norm")
    }

    fn linear(
        &mut self,
        which: Projection,
        x: Option<&B::Tensor>,
        dy: &B::Tensor,
        dx: InputGrad<B::Tensor>,
    ) -> Option<B::Tensor> {
        let linear = self.block.projections[which as usize].as_mut().expect("the model has this projection");
        let kept = self.lora[which as usize].as_ref();
        linear.backward(self.pass.backend, x, kept, self.pass.dropout(which), dy, dx)
    }

    /// Adds a norm's gradients, that of its input to `dx`.
    fn norm(&mut self, which: Norm, x: &B::Tensor, dy: &B::Tensor, dx: &mut B::Tensor) {
        let weight = self.block.norms[which as usize].as_mut().expect("the block has this norm");
        let norm = rms_norm(self.pass.config);
        self.pass.backend.rms_norm_backward(x, &weight.value, norm, dy, dx, weight.grad.as_mut());
    }

    /// The gradient of a norm's input alone.
    fn normed(&mut self, which: Norm, x: &B::Tensor, dy: &B::Tensor) -> B::Tensor {
        let [rows, cols] = self.pass.backend.shape(x);
        let mut dx = self.pass.backend.zeros(rows, cols);
        self.norm(which, x, dy, &mut dx);
        dx
    }
}

/// What the model's norms add.
pub(crate) fn rms_norm(config: &ModelConfig) -> RmsNorm {
    RmsNorm { eps: config.rms_norm_eps, offset: config.norm_offset }
}
