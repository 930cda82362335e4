//! A linear layer, y = W·x + bias, with a low-rank update if it is adapted: frozen, adapted or trained whole.
//!
//! DoRA (Liu et al., 2024) multiplies what W and the update give by magnitude / ‖W + scale·B·A‖; as in PEFT, the norm
//! counts as a constant in the backward pass.

use crate::backend::{AdaptedForward, Backend, Dropout, InputGrad, LoraGrads, LoraRef};
use crate::param::{Param, Weight};

/// A linear layer of a block.
pub(crate) struct Linear<B: Backend> {
    pub(crate) weight: Weight<B>,
    pub(crate) bias: Option<Param<B::Tensor>>,
    pub(crate) adapter: Option<LoraLayer<B::Tensor>>,
}

/// The low-rank update of a linear layer.
pub(crate) struct LoraLayer<T> {
    /// [rank, in].
    pub(crate) a: Param<T>,
    /// [out, rank].
    pub(crate) b: Param<T>,
    /// Factor of the update.
    pub(crate) scale: f32,
    /// DoRA's length of each row of the adapted weight, [1, out].
    pub(crate) magnitude: Option<Param<T>>,
}

/// What the backward pass needs of an adapted layer's forward pass.
pub(crate) struct LoraKept<T> {
    /// dropout(x) · Aᵀ.
    hidden: T,
    /// DoRA's factors, and what they multiplied.
    dora: Option<(T, T)>,
}

impl<T> LoraLayer<T> {
    pub(crate) fn as_ref(&self, dropout: Option<Dropout>) -> LoraRef<'_, T> {
        LoraRef { a: &self.a.value, b: &self.b.value, scale: self.scale, dropout }
    }
}

impl<B: Backend> Linear<B> {
    /// Whether the backward pass needs the layer's input.
    pub(crate) fn needs_input(&self) -> bool {
        self.adapter.is_some() || self.weight.param().is_some()
    }

    /// Whether anything of the layer learns.
    pub(crate) fn is_trained(&self) -> bool {
        self.needs_input() || self.bias.as_ref().is_some_and(Param::is_trained)
    }

    /// y = W·x + bias, with the update.
    pub(crate) fn forward(
        &self,
        backend: &B,
        x: &B::Tensor,
        dropout: Option<Dropout>,
    ) -> (B::Tensor, Option<LoraKept<B::Tensor>>) {
        self.forward_from(backend, x, dropout, None)
    }

    /// residual + W·x + bias, with the update.
    pub(crate) fn forward_onto(
        &self,
        backend: &B,
        x: &B::Tensor,
        dropout: Option<Dropout>,
        residual: &B::Tensor,
    ) -> (B::Tensor, Option<LoraKept<B::Tensor>>) {
        if self.adapter.as_ref().is_some_and(|adapter| adapter.magnitude.is_some()) {
            let (mut y, kept) = self.forward(backend, x, dropout);
            backend.add(&mut y, residual);
            return (y, kept);
        }
        self.forward_from(backend, x, dropout, Some(backend.copy(residual)))
    }

    /// `onto` + W·x + bias, with the update.
    fn forward_from(
        &self,
        backend: &B,
        x: &B::Tensor,
        dropout: Option<Dropout>,
        onto: Option<B::Tensor>,
    ) -> (B::Tensor, Option<LoraKept<B::Tensor>>) {
        let w = self.weight.get();
        let (mut y, kept) = match (&self.adapter, onto) {
            (None, None) => (backend.linear(x, w), None),
            (None, Some(mut y)) => {
                backend.linear_add(x, w, &mut y);
                (y, None)
            }
            (Some(adapter), onto) => {
                let lora = adapter.as_ref(dropout);
                let (mut y, hidden) = backend.adapted_linear(x, w, &lora, onto);
                let dora = adapter.magnitude.as_ref().map(|magnitude| {
                    let factors = backend.dora_factors(w, &lora, &magnitude.value);
                    let scaled = backend.scale_columns(&y, &factors);
                    (factors, std::mem::replace(&mut y, scaled))
                });
                (y, Some(LoraKept { hidden, dora }))
            }
        };
        if let Some(bias) = &self.bias {
            backend.add_bias(&mut y, &bias.value);
        }
        (y, kept)
    }

    /// Adds the gradients of what is trained, and gives that of the input. `x` is there if [`Linear::needs_input`].
    pub(crate) fn backward(
        &mut self,
        backend: &B,
        x: Option<&B::Tensor>,
        kept: Option<&LoraKept<B::Tensor>>,
        dropout: Option<Dropout>,
        dy: &B::Tensor,
        dx: InputGrad<B::Tensor>,
    ) -> Option<B::Tensor> {
        if let Some(grad) = self.bias.as_mut().and_then(|bias| bias.grad.as_mut()) {
            backend.bias_backward(dy, grad);
        }
        let scaled = self.dora_backward(backend, kept, dy);
        let dy = scaled.as_ref().unwrap_or(dy);
        if let (Some(grad), Some(x)) = (self.weight.grad_mut(), x) {
            backend.linear_weight_backward(x, dy, grad);
        }
        let w = self.weight.get();
        if let (Some(adapter), Some(x), Some(kept)) = (&mut self.adapter, x, kept) {
            let LoraLayer { a, b, scale, .. } = adapter;
            let lora = LoraRef { a: &a.value, b: &b.value, scale: *scale, dropout };
            if let (Some(a), Some(b)) = (&mut a.grad, &mut b.grad) {
                let forward = AdaptedForward { x, hidden: &kept.hidden };
                return backend.adapted_linear_backward(forward, w, &lora, dy, LoraGrads { a, b }, dx);
            }
        }
        match dx {
            InputGrad::None => None,
            InputGrad::Fresh => Some(backend.linear_backward(dy, w)),
            InputGrad::Onto(mut dx) => {
                backend.linear_backward_add(dy, w, &mut dx);
                Some(dx)
            }
        }
    }

    /// The gradient of what DoRA's factors multiplied, and that of the magnitude added up.
    fn dora_backward(&mut self, backend: &B, kept: Option<&LoraKept<B::Tensor>>, dy: &B::Tensor) -> Option<B::Tensor> {
        let (factors, y) = kept?.dora.as_ref()?;
        let Param { value, grad, .. } = self.adapter.as_mut()?.magnitude.as_mut()?;
        if let Some(grad) = grad {
            backend.dora_backward(y, dy, factors, value, grad);
        }
        Some(backend.scale_columns(dy, factors))
    }
}
