//! AdamW with decoupled weight decay (Loshchilov and Hutter, 2019), and clipping by global norm, as torch computes them.

use serde::{Deserialize, Serialize};

use crate::backend::AdamWStep;

/// What AdamW is set to.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct AdamWOptions {
    /// Decay of the mean of gradients.
    pub beta1: f64,
    /// Decay of the mean of squared gradients.
    pub beta2: f64,
    /// Added to the root of the mean of squares.
    pub eps: f64,
    /// Share of a weight, times the learning rate, that each step takes away.
    pub weight_decay: f64,
}

impl Default for AdamWOptions {
    fn default() -> Self {
        AdamWOptions { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0 }
    }
}

impl AdamWOptions {
    /// The numbers of step `step`, from 1.
    pub(crate) fn step(&self, step: u64, lr: f64, grad_scale: f32) -> AdamWStep {
        let AdamWOptions { beta1, beta2, eps, weight_decay } = *self;
        AdamWStep { lr, beta1, beta2, eps, weight_decay, step, grad_scale }
    }
}

/// A parameter's running means of gradients and of their squares.
pub(crate) struct Moments<T> {
    pub(crate) exp_avg: T,
    pub(crate) exp_avg_sq: T,
}

/// The factor that brings gradients of norm `grad_norm` to at most `max_grad_norm` (torch's clip_grad_norm_).
pub(crate) fn clip_factor(grad_norm: f64, max_grad_norm: Option<f64>) -> f32 {
    max_grad_norm.map_or(1.0, |limit| (limit / (grad_norm + 1e-6)).min(1.0) as f32)
}
