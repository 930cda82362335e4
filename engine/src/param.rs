//! What the optimizer changes.

use crate::backend::{Backend, Precision, WeightRef};

/// A tensor that is trained, if it has a gradient.
pub(crate) struct Param<T> {
    pub(crate) value: T,
    pub(crate) grad: Option<T>,
    pub(crate) group: Group,
}

/// Parameters that an optimizer treats alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Group {
    /// Matrices: their weights decay.
    Matrix,
    /// The embedding, also where it is the output layer. It decays too.
    Embedding,
    /// Norm weights and biases, which never decay.
    Vector,
    /// LoRA's B, which may have a learning rate of its own.
    LoraB,
    /// DoRA's lengths of rows, which decay.
    Magnitude,
}

impl<T> Param<T> {
    /// A tensor that stays as it is.
    pub(crate) fn frozen(value: T, group: Group) -> Self {
        Param { value, grad: None, group }
    }

    pub(crate) fn is_trained(&self) -> bool {
        self.grad.is_some()
    }

    /// Gives the tensor a gradient, which is zero.
    pub(crate) fn train<B: Backend<Tensor = T>>(&mut self, backend: &B) {
        let [rows, cols] = backend.shape(&self.value);
        self.grad = Some(backend.zeros(rows, cols));
    }
}

/// A weight [out, in].
pub(crate) enum Weight<B: Backend> {
    /// In the backend's own form.
    Frozen(B::Weight),
    /// Trained in f32; computed with as it is, or rounded to bf16.
    Trained {
        master: Param<B::Tensor>,
        /// The rounded copy.
        bf16: Option<B::Weight>,
    },
}

impl<B: Backend> Weight<B> {
    pub(crate) fn get(&self) -> WeightRef<'_, B> {
        match self {
            Weight::Frozen(weight) | Weight::Trained { bf16: Some(weight), .. } => WeightRef::Frozen(weight),
            Weight::Trained { master, bf16: None } => WeightRef::Trained(&master.value),
        }
    }

    pub(crate) fn param(&self) -> Option<&Param<B::Tensor>> {
        match self {
            Weight::Frozen(_) => None,
            Weight::Trained { master, .. } => Some(master),
        }
    }

    pub(crate) fn param_mut(&mut self) -> Option<&mut Param<B::Tensor>> {
        match self {
            Weight::Frozen(_) => None,
            Weight::Trained { master, .. } => Some(master),
        }
    }

    pub(crate) fn frozen_mut(&mut self) -> Option<&mut B::Weight> {
        match self {
            Weight::Frozen(weight) => Some(weight),
            Weight::Trained { .. } => None,
        }
    }

    /// Where the gradient is added, if the weight is trained, beside the weight.
    pub(crate) fn grad_mut(&mut self) -> Option<&mut B::Tensor> {
        self.param_mut()?.grad.as_mut()
    }

    /// Makes a trained weight of one that holds `value`.
    pub(crate) fn trained(backend: &B, value: B::Tensor, group: Group) -> Self {
        let mut master = Param::frozen(value, group);
        master.train(backend);
        let rounds = backend.precision() == Precision::Bf16;
        let bf16 = rounds.then(|| backend.bf16_weight(&master.value));
        Weight::Trained { master, bf16 }
    }

    /// Rounds anew what the optimizer has changed.
    pub(crate) fn refresh(&mut self, backend: &B) {
        if let Weight::Trained { master, bf16: Some(bf16) } = self {
            backend.set_bf16_weight(bf16, &master.value);
        }
    }
}
