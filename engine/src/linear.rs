//! A linear layer, y = W·x + bias, with a low-rank update if it is adapted: frozen, adapted or trained whole.
//!
//! DoRA (Liu et al., 2024) multiplies what W and the update give by magnitude / ‖W + scale·B·A‖; as in PEFT, the norm
//! counts as a constant in the backward pass. With dropout, also as in PEFT, it multiplies what they give of the dropped
//! input, and what W gives of the rest of the input is added as it is.

use crate::backend::{AdaptedForward, Backend, Dropout, InputGrad, LoraGrads, LoraRef, WeightRef};
use crate::param::{Group, Param, Weight};

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
    pub(crate) dora: Option<Dora<T>>,
}

/// What DoRA adds to a layer's update.
pub(crate) struct Dora<T> {
    /// The length of each row of the adapted weight, [1, out].
    pub(crate) magnitude: Param<T>,
    /// magnitude / ‖W + scale·B·A‖, [1, out]. To compute them takes as long as a forward pass of several tokens: they are
    /// computed when the layer changes ([`Linear::refresh`]), not when it is used.
    pub(crate) factors: T,
}

/// What the backward pass needs of an adapted layer's forward pass.
pub(crate) struct LoraKept<T> {
    /// dropout(x) · Aᵀ.
    hidden: T,
    /// What DoRA's factors multiplied.
    adapted: Option<T>,
}

impl<T> LoraLayer<T> {
    /// A frozen update with these matrices.
    pub(crate) fn new(a: T, b: T, scale: f32) -> Self {
        LoraLayer { a: Param::frozen(a, Group::Matrix), b: Param::frozen(b, Group::LoraB), scale, dora: None }
    }

    /// Makes it DoRA's, with these lengths.
    pub(crate) fn add_magnitude<B: Backend<Tensor = T>>(&mut self, backend: &B, w: WeightRef<'_, B>, magnitude: T) {
        let factors = backend.dora_factors(w, &self.as_ref(None), &magnitude);
        self.dora = Some(Dora { magnitude: Param::frozen(magnitude, Group::Magnitude), factors });
    }

    /// Gives all of it a gradient, which is zero.
    pub(crate) fn train<B: Backend<Tensor = T>>(&mut self, backend: &B) {
        let magnitude = self.dora.as_mut().map(|dora| &mut dora.magnitude);
        [&mut self.a, &mut self.b].into_iter().chain(magnitude).for_each(|param| param.train(backend));
    }

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

    /// Computes anew what follows from weights that have changed: a rounded copy, and DoRA's factors.
    pub(crate) fn refresh(&mut self, backend: &B) {
        self.weight.refresh(backend);
        if let Some(LoraLayer { a, b, scale, dora: Some(Dora { magnitude, factors }) }) = &mut self.adapter {
            let lora = LoraRef { a: &a.value, b: &b.value, scale: *scale, dropout: None };
            *factors = backend.dora_factors(self.weight.get(), &lora, &magnitude.value);
        }
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
        if self.adapter.as_ref().is_some_and(|adapter| adapter.dora.is_some()) {
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
            (Some(adapter), onto) => match &adapter.dora {
                None => {
                    let (y, hidden) = backend.adapted_linear(x, w, &adapter.as_ref(dropout), onto);
                    (y, Some(LoraKept { hidden, adapted: None }))
                }
                Some(Dora { factors, .. }) => {
                    let (lora, dropped) = (adapter.as_ref(None), dropout.map(|dropout| backend.drop_out(x, dropout)));
                    let (adapted, hidden) = backend.adapted_linear(dropped.as_ref().unwrap_or(x), w, &lora, None);
                    let mut y = backend.scale_columns(&adapted, factors);
                    if let Some(dropped) = dropped {
                        let mut rest = backend.copy(x);
                        backend.subtract(&mut rest, &dropped);
                        backend.linear_add(&rest, w, &mut y);
                    }
                    (y, Some(LoraKept { hidden, adapted: Some(adapted) }))
                }
            },
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
        if let (Some(grad), Some(x)) = (self.weight.grad_mut(), x) {
            backend.linear_weight_backward(x, dy, grad);
        }
        let w = self.weight.get();
        if let (Some(adapter), Some(x), Some(LoraKept { hidden, .. })) = (&mut self.adapter, x, kept) {
            let LoraLayer { a, b, scale, .. } = adapter;
            let lora = |dropout| LoraRef { a: &a.value, b: &b.value, scale: *scale, dropout };
            if let (Some(a), Some(b)) = (&mut a.grad, &mut b.grad) {
                let grads = LoraGrads { a, b };
                return match (&scaled, dropout) {
                    (Some(scaled), Some(dropout)) => {
                        let adapted = |dropped: &B::Tensor, dx| {
                            let forward = AdaptedForward { x: dropped, hidden };
                            backend.adapted_linear_backward(forward, w, &lora(None), scaled, grads, dx)
                        };
                        dropped_backward(backend, x, dropout, adapted, || backend.linear_backward(dy, w), dx)
                    }
                    _ => {
                        let (forward, dy) = (AdaptedForward { x, hidden }, scaled.as_ref().unwrap_or(dy));
                        backend.adapted_linear_backward(forward, w, &lora(dropout), dy, grads, dx)
                    }
                };
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
        let y = kept?.adapted.as_ref()?;
        let Dora { magnitude: Param { value, grad, .. }, factors } = self.adapter.as_mut()?.dora.as_mut()?;
        if let Some(grad) = grad {
            backend.dora_backward(y, dy, factors, value, grad);
        }
        Some(backend.scale_columns(dy, factors))
    }
}

/// The gradient of x, of which `dropped` gets the dropped part and gives its gradient, and `rest` gives that of what is
/// left.
fn dropped_backward<B: Backend>(
    backend: &B,
    x: &B::Tensor,
    dropout: Dropout,
    dropped: impl FnOnce(&B::Tensor, InputGrad<B::Tensor>) -> Option<B::Tensor>,
    rest: impl FnOnce() -> B::Tensor,
    dx: InputGrad<B::Tensor>,
) -> Option<B::Tensor> {
    let wanted = if let InputGrad::None = dx { InputGrad::None } else { InputGrad::Fresh };
    let mut d_dropped = dropped(&backend.drop_out(x, dropout), wanted)?;
    let d_rest = rest();
    backend.subtract(&mut d_dropped, &d_rest);
    let mut d_x = backend.drop_out(&d_dropped, dropout);
    backend.add(&mut d_x, &d_rest);
    if let InputGrad::Onto(dx) = dx {
        backend.add(&mut d_x, &dx);
    }
    Some(d_x)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::{Cpu, Tensor};
    use crate::host_tensor::HostTensor;
    use crate::random::normal;

    /// [rows, cols] in f64.
    #[derive(Clone)]
    struct Plain(usize, usize, Vec<f64>);

    impl Plain {
        fn of(x: &Tensor) -> Self {
            Plain(x.rows(), x.cols(), x.values().iter().map(|x| f64::from(*x)).collect())
        }

        fn t(&self) -> Self {
            let Plain(rows, cols, x) = self;
            Plain(*cols, *rows, (0..cols * rows).map(|i| x[i % rows * cols + i / rows]).collect())
        }

        fn times(&self, other: &Self) -> Self {
            let (Plain(m, k, a), Plain(_, n, b)) = (self, other);
            let dot = |i: usize| (0..*k).map(|l| a[i / n * k + l] * b[l * n + i % n]).sum();
            Plain(*m, *n, (0..m * n).map(dot).collect())
        }

        fn with(&self, other: &Self, f: impl Fn(f64, f64) -> f64) -> Self {
            let Plain(rows, cols, x) = self;
            // A single row meets every row.
            Plain(*rows, *cols, x.iter().enumerate().map(|(i, x)| f(*x, other.2[i % other.2.len()])).collect())
        }

        fn assert_is(&self, name: &str, ours: &Tensor) {
            let worst = self.2.iter().zip(ours.values()).map(|(a, b)| (a - f64::from(*b)).abs()).fold(0.0, f64::max);
            assert!(worst < 1e-4, "{name}: {worst:.1e}");
        }
    }

    /// The factors follow from the weights alone: a layer that is used many times between two changes computes them once.
    #[test]
    fn doras_factors_are_computed_when_the_layer_changes_and_not_when_it_is_used() {
        let cpu = Cpu::default();
        let tensor = |rows: usize, cols: usize, seed| cpu.upload(&normal(rows * cols, seed), rows, cols);
        let weight = Weight::Frozen(cpu.weight(HostTensor::new(normal(60, 1), vec![5, 12])));
        let mut adapter = LoraLayer::new(tensor(3, 12, 2), tensor(5, 3, 3), 0.5);
        adapter.add_magnitude(&cpu, weight.get(), tensor(1, 5, 4));
        let mut linear = Linear { weight, bias: None, adapter: Some(adapter) };
        let x = tensor(1, 12, 5);
        let y = |linear: &Linear<Cpu>| linear.forward(&cpu, &x, None).0.values().to_vec();
        let before = y(&linear);
        let factors =
            |linear: &Linear<Cpu>| linear.adapter.as_ref().unwrap().dora.as_ref().unwrap().factors.values().to_vec();
        let old = factors(&linear);

        let dora = linear.adapter.as_mut().unwrap().dora.as_mut().unwrap();
        dora.magnitude.value.values_mut().iter_mut().for_each(|m| *m *= 2.0);
        assert_eq!(y(&linear), before, "they were computed again");
        linear.refresh(&cpu);
        assert_eq!(factors(&linear), old.iter().map(|factor| 2.0 * factor).collect::<Vec<f32>>());
        assert_eq!(y(&linear), before.iter().map(|y| 2.0 * y).collect::<Vec<f32>>());
    }

    /// PEFT's DoraLinearVariant in training: result + (factor − 1) · W·dropped + factor · scale · B·A·dropped.
    #[test]
    fn dora_with_dropout_is_that_of_peft() {
        let cpu = Cpu::default();
        let [tokens, input, output, rank] = [7, 12, 5, 3];
        let tensor = |rows: usize, cols: usize, seed| cpu.upload(&normal(rows * cols, seed), rows, cols);
        let weight = HostTensor::new(normal(output * input, 1), vec![output, input]);
        let scale = 0.5;
        let weight = Weight::Frozen(cpu.weight(weight));
        let mut adapter = LoraLayer::new(tensor(rank, input, 2), tensor(output, rank, 3), scale);
        adapter.add_magnitude(&cpu, weight.get(), tensor(1, output, 4));
        adapter.train(&cpu);
        let mut linear = Linear { weight, bias: None, adapter: Some(adapter) };
        let (x, dy, residual) = (tensor(tokens, input, 5), tensor(tokens, output, 6), tensor(tokens, input, 7));
        let dropout = Dropout { p: 0.4, key: 9 };
        let (y, kept) = linear.forward(&cpu, &x, Some(dropout));
        let dx = InputGrad::Onto(cpu.copy(&residual));
        let dx = linear.backward(&cpu, Some(&x), kept.as_ref(), Some(dropout), &dy, dx).unwrap();

        let ones = cpu.upload(&vec![1.0; tokens * input], tokens, input);
        let mask = Plain::of(&cpu.drop_out(&ones, dropout));
        let w = Plain(output, input, normal(output * input, 1).into_iter().map(f64::from).collect());
        let LoraLayer { a, b, dora, .. } = linear.adapter.as_ref().unwrap();
        let magnitude = &dora.as_ref().unwrap().magnitude;
        let [plain_a, plain_b, m] = [a, b, magnitude].map(|param| Plain::of(&param.value));
        let scaled = |x: Plain| Plain(x.0, x.1, x.2.into_iter().map(|x| x * f64::from(scale)).collect());
        let (x, dy) = (Plain::of(&x), Plain::of(&dy));
        let dropped = x.with(&mask, |x, mask| x * mask);
        let adapted = w.with(&scaled(plain_b.times(&plain_a)), |w, update| w + update);
        let lengths = adapted.2.chunks(input).map(|row| row.iter().map(|x| x * x).sum::<f64>().sqrt());
        let factors = m.with(&Plain(1, output, lengths.collect()), |m, length| m / length);
        let hidden = dropped.times(&plain_a.t());
        let u = dropped.times(&adapted.t());
        let expected = x.times(&w.t()).with(&u.with(&factors, |u, f| u * f), |a, b| a + b);
        expected.with(&dropped.times(&w.t()), |a, b| a - b).assert_is("y", &y);

        let du = dy.with(&factors, |dy, f| dy * f);
        let d_hidden = scaled(du.times(&plain_b));
        scaled(du.t().times(&hidden)).assert_is("dB", b.grad.as_ref().unwrap());
        d_hidden.t().times(&dropped).assert_is("dA", a.grad.as_ref().unwrap());
        let sums = dy.with(&u, |dy, u| dy * u).t().times(&Plain(tokens, 1, vec![1.0; tokens])).t();
        let per_length = factors.with(&m, |f, m| f / m);
        sums.with(&per_length, |sum, per_length| sum * per_length).assert_is("dm", magnitude.grad.as_ref().unwrap());
        let d_rest = dy.times(&w);
        let d_dropped = du.times(&w).with(&d_hidden.times(&plain_a), |a, b| a + b);
        let d_x = d_dropped.with(&d_rest, |a, b| a - b).with(&mask, |d, mask| d * mask).with(&d_rest, |a, b| a + b);
        d_x.with(&Plain::of(&residual), |a, b| a + b).assert_is("dx", &dx);
    }
}
