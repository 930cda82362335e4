//! One decoder block, forward and backward:
//!
//! ```text
//! middle = x + o_proj(attention(rope(q_proj(n)), rope(k_proj(n)), v_proj(n))),  n = rms_norm(x)
//! y = middle + down_proj(silu(gate_proj(m)) · up_proj(m)),                      m = rms_norm(middle)
//! ```
//!
//! The weights are frozen, so the backward pass needs of the activations only what [`Kept`] holds. Norms and SwiGLU
//! are computed again where an adapter asks for its input: that is cheaper than keeping them.

use crate::backend::{AttentionForward, Backend, Dropout, Heads, LoraGrads, LoraRef};
use crate::lora::{BlockAdapter, BlockGrads};
use crate::projection::{PerProjection, Projection};
use crate::random;

/// The frozen weights of a block.
pub(crate) struct Block<B: Backend> {
    pub(crate) input_norm: B::Tensor,
    pub(crate) post_attention_norm: B::Tensor,
    pub(crate) projections: PerProjection<B::Weight>,
}

/// What one pass through one block needs besides activations.
pub(crate) struct Pass<'a, B: Backend> {
    pub(crate) backend: &'a B,
    pub(crate) heads: Heads,
    pub(crate) eps: f32,
    pub(crate) rows: &'a B::Rows,
    pub(crate) adapter: Option<&'a BlockAdapter<B::Tensor>>,
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
    x: B::Tensor,
    q: B::Tensor,
    k: B::Tensor,
    v: B::Tensor,
    attended: B::Tensor,
    log_sums: B::Tensor,
    middle: B::Tensor,
    gate: B::Tensor,
    up: B::Tensor,
    lora_hidden: PerProjection<Option<B::Tensor>>,
}

impl<B: Backend> Kept<B> {
    /// The block's input alone, from which [`Block::recompute`] gets the rest.
    pub(crate) fn into_input(self) -> B::Tensor {
        self.x
    }
}

/// Keys and values of the tokens that a row already has, [capacity, key-value heads · dim].
pub(crate) struct KvCache<B: Backend> {
    pub(crate) keys: B::Tensor,
    pub(crate) values: B::Tensor,
}

impl<B: Backend> Pass<'_, B> {
    fn lora(&self, which: Projection) -> Option<LoraRef<'_, B::Tensor>> {
        let layer = self.adapter?[which as usize].as_ref()?;
        let dropout = self.dropout.map(|source| Dropout { p: source.p, key: random::key(source.key, &[which as u64]) });
        Some(LoraRef { a: &layer.a, b: &layer.b, scale: layer.scale, dropout })
    }

    fn adapts(&self, which: &[Projection]) -> bool {
        which.iter().any(|&which| self.lora(which).is_some())
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
        if pass.adapts(&[Projection::Down]) {
            self.output(pass, &mut kept);
        }
        kept
    }

    fn keep(&self, pass: &Pass<'_, B>, x: B::Tensor) -> Kept<B> {
        let mut hidden = PerProjection::default();
        let [q, k, v] = self.queries_keys_values(pass, &x, &mut hidden);
        let (attended, log_sums) = pass.backend.attention(&q, &k, &v, pass.heads, pass.rows);
        let middle = self.add_projection(pass, Projection::Output, &attended, &x, &mut hidden);
        let [gate, up] = self.gate_up(pass, &middle, &mut hidden);
        Kept { x, q, k, v, attended, log_sums, middle, gate, up, lora_hidden: hidden }
    }

    fn output(&self, pass: &Pass<'_, B>, kept: &mut Kept<B>) -> B::Tensor {
        let activated = pass.backend.swiglu(&kept.gate, &kept.up);
        let hidden = &mut kept.lora_hidden;
        self.add_projection(pass, Projection::Down, &activated, &kept.middle, hidden)
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
        let mut hidden = PerProjection::default();
        let [q, k, v] = self.queries_keys_values(pass, &x, &mut hidden);
        backend.write_rows(&mut cache.keys, &k, past);
        backend.write_rows(&mut cache.values, &v, past);
        let attended = match past {
            0 => backend.attention(&q, &k, &v, pass.heads, pass.rows).0,
            _ => backend.attention_cached(&q, &cache.keys, &cache.values, pass.heads, past),
        };
        let middle = self.add_projection(pass, Projection::Output, &attended, &x, &mut hidden);
        let [gate, up] = self.gate_up(pass, &middle, &mut hidden);
        let activated = backend.swiglu(&gate, &up);
        self.add_projection(pass, Projection::Down, &activated, &middle, &mut hidden)
    }

    fn queries_keys_values(
        &self,
        pass: &Pass<'_, B>,
        x: &B::Tensor,
        hidden: &mut PerProjection<Option<B::Tensor>>,
    ) -> [B::Tensor; 3] {
        let normed = pass.backend.rms_norm(x, &self.input_norm, pass.eps);
        let mut q = self.project(pass, Projection::Query, &normed, hidden);
        let mut k = self.project(pass, Projection::Key, &normed, hidden);
        let v = self.project(pass, Projection::Value, &normed, hidden);
        pass.backend.rope(&mut q, pass.heads.dim, pass.rows);
        pass.backend.rope(&mut k, pass.heads.dim, pass.rows);
        [q, k, v]
    }

    fn gate_up(
        &self,
        pass: &Pass<'_, B>,
        middle: &B::Tensor,
        hidden: &mut PerProjection<Option<B::Tensor>>,
    ) -> [B::Tensor; 2] {
        let normed = pass.backend.rms_norm(middle, &self.post_attention_norm, pass.eps);
        [Projection::Gate, Projection::Up].map(|which| self.project(pass, which, &normed, hidden))
    }

    /// x · Wᵀ with the adapter's update.
    fn project(
        &self,
        pass: &Pass<'_, B>,
        which: Projection,
        x: &B::Tensor,
        hidden: &mut PerProjection<Option<B::Tensor>>,
    ) -> B::Tensor {
        let mut y = pass.backend.linear(x, &self.projections[which as usize]);
        if let Some(lora) = pass.lora(which) {
            hidden[which as usize] = Some(pass.backend.lora(x, &lora, &mut y));
        }
        y
    }

    /// residual + x · Wᵀ with the adapter's update.
    fn add_projection(
        &self,
        pass: &Pass<'_, B>,
        which: Projection,
        x: &B::Tensor,
        residual: &B::Tensor,
        hidden: &mut PerProjection<Option<B::Tensor>>,
    ) -> B::Tensor {
        let mut y = pass.backend.copy(residual);
        pass.backend.linear_add(x, &self.projections[which as usize], &mut y);
        if let Some(lora) = pass.lora(which) {
            hidden[which as usize] = Some(pass.backend.lora(x, &lora, &mut y));
        }
        y
    }

    /// Adds the adapters' gradients to `grads` and returns the gradient of the block's input, if it is wanted.
    pub(crate) fn backward(
        &self,
        pass: &Pass<'_, B>,
        kept: Kept<B>,
        dy: B::Tensor,
        grads: &mut BlockGrads<B::Tensor>,
        want_dx: bool,
    ) -> Option<B::Tensor> {
        let mut back = Backward { block: self, pass, hidden: &kept.lora_hidden, grads };
        let d_middle = back.mlp(&kept, dy);
        back.attention(&kept, d_middle, want_dx)
    }
}

struct Backward<'a, B: Backend> {
    block: &'a Block<B>,
    pass: &'a Pass<'a, B>,
    hidden: &'a PerProjection<Option<B::Tensor>>,
    grads: &'a mut BlockGrads<B::Tensor>,
}

impl<B: Backend> Backward<'_, B> {
    /// The gradient of `middle` from that of the block's output.
    fn mlp(&mut self, kept: &Kept<B>, mut dy: B::Tensor) -> B::Tensor {
        use Projection::{Down, Gate, Up};
        let Pass { backend, eps, .. } = *self.pass;
        let activated = self.input_of(&[Down], || backend.swiglu(&kept.gate, &kept.up));
        let d_activated = self.linear(Down, activated.as_ref(), &dy, None);
        let (d_gate, d_up) = backend.swiglu_backward(&kept.gate, &kept.up, &d_activated);
        drop((activated, d_activated));

        let norm = &self.block.post_attention_norm;
        let normed = self.input_of(&[Gate, Up], || backend.rms_norm(&kept.middle, norm, eps));
        let d_normed = self.linear(Gate, normed.as_ref(), &d_gate, None);
        let d_normed = self.linear(Up, normed.as_ref(), &d_up, Some(d_normed));
        backend.rms_norm_backward(&kept.middle, norm, eps, &d_normed, &mut dy);
        dy
    }

    /// The gradient of x from that of `middle`.
    fn attention(&mut self, kept: &Kept<B>, mut dy: B::Tensor, want_dx: bool) -> Option<B::Tensor> {
        use Projection::{Key, Output, Query, Value};
        let Pass { backend, eps, heads, rows, .. } = *self.pass;
        let inputs = [Query, Key, Value];
        if !want_dx && !self.pass.adapts(&inputs) {
            self.lora(Output, Some(&kept.attended), &dy, None);
            return None;
        }
        let d_attended = self.linear(Output, Some(&kept.attended), &dy, None);
        let Kept { q, k, v, attended: out, log_sums, .. } = kept;
        let forward = AttentionForward { q, k, v, out, log_sums };
        let mut d_inputs = backend.attention_backward(forward, &d_attended, heads, rows);
        drop(d_attended);
        backend.rope_backward(&mut d_inputs[0], heads.dim, rows);
        backend.rope_backward(&mut d_inputs[1], heads.dim, rows);

        let norm = &self.block.input_norm;
        let normed = self.input_of(&inputs, || backend.rms_norm(&kept.x, norm, eps));
        let mut d_normed = None;
        for (which, d) in inputs.into_iter().zip(&d_inputs) {
            if want_dx {
                d_normed = Some(self.linear(which, normed.as_ref(), d, d_normed));
            } else {
                self.lora(which, normed.as_ref(), d, None);
            }
        }
        backend.rms_norm_backward(&kept.x, norm, eps, &d_normed?, &mut dy);
        Some(dy)
    }

    /// An adapter's input, computed again if one of these projections has an adapter.
    fn input_of(&self, which: &[Projection], x: impl FnOnce() -> B::Tensor) -> Option<B::Tensor> {
        self.pass.adapts(which).then(x)
    }

    /// dx (+)= dy · W, with the adapter's part, whose gradients are added.
    fn linear(&mut self, which: Projection, x: Option<&B::Tensor>, dy: &B::Tensor, dx: Option<B::Tensor>) -> B::Tensor {
        let weight = &self.block.projections[which as usize];
        let mut dx = match dx {
            None => self.pass.backend.linear_backward(dy, weight),
            Some(mut dx) => {
                self.pass.backend.linear_backward_add(dy, weight, &mut dx);
                dx
            }
        };
        self.lora(which, x, dy, Some(&mut dx));
        dx
    }

    fn lora(&mut self, which: Projection, x: Option<&B::Tensor>, dy: &B::Tensor, dx: Option<&mut B::Tensor>) {
        let Some(lora) = self.pass.lora(which) else { return };
        let (Some(x), Some(hidden), Some(grads)) = (x, &self.hidden[which as usize], &mut self.grads[which as usize])
        else {
            unreachable!("an adapted projection's input, hidden values and gradients exist");
        };
        let grads = LoraGrads { a: &mut grads.a, b: &mut grads.b };
        self.pass.backend.lora_backward(x, hidden, &lora, dy, grads, dx);
    }
}
