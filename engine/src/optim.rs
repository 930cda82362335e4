//! Optimizers as torch computes them: AdamW with decoupled weight decay (Loshchilov and Hutter, 2019), stochastic
//! gradient descent; and clipping by global norm. Norm weights and biases never decay.

use serde::{Deserialize, Serialize};

use crate::backend::{AdamWStep, Backend, SgdStep};
use crate::param::{Group, Param};

/// How gradients become steps.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Optimizer {
    /// The rule.
    pub rule: Rule,
    /// Share of a weight, times the learning rate, that each step takes away (SGD: added to the gradient).
    pub weight_decay: f64,
    /// The learning rate of LoRA's B, divided by that of all else (LoRA+; Hayou et al., 2024).
    pub lora_plus_lr_ratio: f64,
}

/// An optimizer's rule.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub enum Rule {
    /// AdamW.
    AdamW {
        /// Decay of the mean of gradients.
        beta1: f64,
        /// Decay of the mean of squared gradients.
        beta2: f64,
        /// Added to the root of the mean of squares.
        eps: f64,
    },
    /// Stochastic gradient descent.
    Sgd {
        /// How much of the last step's direction is kept.
        momentum: f64,
    },
}

impl Default for Optimizer {
    /// AdamW with torch's defaults, without weight decay.
    fn default() -> Self {
        let rule = Rule::AdamW { beta1: 0.9, beta2: 0.999, eps: 1e-8 };
        Optimizer { rule, weight_decay: 0.0, lora_plus_lr_ratio: 1.0 }
    }
}

/// What an optimizer remembers of one parameter.
pub(crate) enum OptimizerState<T> {
    /// Running means of gradients and of their squares.
    AdamW {
        exp_avg: T,
        exp_avg_sq: T,
    },
    Sgd {
        momentum_buffer: Option<T>,
    },
}

impl<T> OptimizerState<T> {
    /// The tensors, with torch's names.
    pub(crate) fn parts(&self) -> Vec<(&'static str, &T)> {
        match self {
            OptimizerState::AdamW { exp_avg, exp_avg_sq } => vec![("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)],
            OptimizerState::Sgd { momentum_buffer } => momentum_buffer.iter().map(|x| ("momentum_buffer", x)).collect(),
        }
    }

    pub(crate) fn parts_mut(&mut self) -> Vec<&mut T> {
        match self {
            OptimizerState::AdamW { exp_avg, exp_avg_sq } => vec![exp_avg, exp_avg_sq],
            OptimizerState::Sgd { momentum_buffer } => momentum_buffer.iter_mut().collect(),
        }
    }
}

impl Optimizer {
    /// The state of a parameter before its first step.
    pub(crate) fn state<B: Backend>(&self, backend: &B, param: &B::Tensor) -> OptimizerState<B::Tensor> {
        let [rows, cols] = backend.shape(param);
        let zeros = || backend.zeros(rows, cols);
        match self.rule {
            Rule::AdamW { .. } => OptimizerState::AdamW { exp_avg: zeros(), exp_avg_sq: zeros() },
            Rule::Sgd { momentum } => OptimizerState::Sgd { momentum_buffer: (momentum != 0.0).then(zeros) },
        }
    }

    /// Step `step` (from 1) of one parameter, whose gradient is zeroed.
    pub(crate) fn update<B: Backend>(
        &self,
        backend: &B,
        param: &mut Param<B::Tensor>,
        state: &mut OptimizerState<B::Tensor>,
        step: u64,
        lr: f64,
        grad_scale: f32,
    ) {
        let Param { value, grad: Some(grad), group } = param else { return };
        let lr = if *group == Group::LoraB { lr * self.lora_plus_lr_ratio } else { lr };
        let weight_decay = if *group == Group::Vector { 0.0 } else { self.weight_decay };
        match (self.rule, state) {
            (Rule::AdamW { beta1, beta2, eps }, OptimizerState::AdamW { exp_avg, exp_avg_sq }) => {
                let numbers = AdamWStep { lr, beta1, beta2, eps, weight_decay, step, grad_scale };
                backend.adamw(value, grad, (exp_avg, exp_avg_sq), &numbers);
            }
            (Rule::Sgd { momentum }, OptimizerState::Sgd { momentum_buffer }) => {
                let numbers = SgdStep { lr, momentum, weight_decay, grad_scale };
                backend.sgd(value, grad, momentum_buffer.as_mut(), &numbers);
            }
            _ => unreachable!("a state is made by its rule"),
        }
        backend.clear(grad);
    }
}

/// The factor that brings gradients of norm `grad_norm` to at most `max_grad_norm` (torch's clip_grad_norm_).
pub(crate) fn clip_factor(grad_norm: f64, max_grad_norm: Option<f64>) -> f32 {
    max_grad_norm.map_or(1.0, |limit| (limit / (grad_norm + 1e-6)).min(1.0) as f32)
}
