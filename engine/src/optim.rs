//! Optimizers as torch and transformers compute them: AdamW with decoupled weight decay (Loshchilov and Hutter, 2019),
//! Adafactor (Shazeer and Stern, 2018), stochastic gradient descent; and clipping by global norm. Norm weights and biases never decay.

use serde::{Deserialize, Serialize};

use crate::backend::{AdafactorStep, AdamWStep, Backend, SecondMoment, SgdStep};
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
    /// AdamW with its state in 8 bits, as bitsandbytes': a quarter of the memory. Embeddings and small tensors keep
    /// theirs in 32.
    AdamW8bit {
        /// Decay of the mean of gradients.
        beta1: f64,
        /// Decay of the mean of squared gradients.
        beta2: f64,
        /// Added to the root of the mean of squares.
        eps: f64,
    },
    /// Adafactor with a given learning rate and transformers' other defaults: of a matrix it remembers one number a row and
    /// one a column.
    Adafactor,
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

/// Tensors below this size keep their state in 32 bits (bitsandbytes' min_8bit_size).
const MIN_8BIT_SIZE: usize = 4096;

/// What an optimizer remembers of one parameter.
pub(crate) enum OptimizerState<B: Backend> {
    /// Running means of gradients and of their squares.
    AdamW {
        exp_avg: B::Tensor,
        exp_avg_sq: B::Tensor,
    },
    /// The same in 8 bits.
    AdamW8bit {
        state1: B::State8bit,
        state2: B::State8bit,
    },
    /// Mean squares of a matrix's rows and columns.
    Factored {
        exp_avg_sq_row: B::Tensor,
        exp_avg_sq_col: B::Tensor,
    },
    /// The running mean of squares alone.
    Squares {
        exp_avg_sq: B::Tensor,
    },
    Sgd {
        momentum_buffer: Option<B::Tensor>,
    },
}

/// A tensor of an optimizer's state as it is saved.
pub(crate) struct Part<'a> {
    pub(crate) name: &'static str,
    pub(crate) shape: [usize; 2],
    pub(crate) values: Box<dyn Fn() -> Vec<f32> + 'a>,
    /// Whether these are codes of 8 bits.
    pub(crate) is_codes: bool,
}

impl<B: Backend> OptimizerState<B> {
    /// The tensors, with the names of torch or bitsandbytes. Codes are given as numbers.
    pub(crate) fn parts<'a>(&'a self, backend: &'a B) -> Vec<Part<'a>> {
        let plain = |name, x: &'a B::Tensor| {
            let values: Box<dyn Fn() -> Vec<f32> + 'a> = Box::new(|| backend.download(x));
            Part { name, shape: backend.shape(x), values, is_codes: false }
        };
        let quantized = |names: [&'static str; 2], x: &'a B::State8bit| {
            let lengths = backend.lengths_8bit(x);
            let codes = Box::new(|| backend.download_8bit(x).0.into_iter().map(f32::from).collect());
            let absmax = Box::new(|| backend.download_8bit(x).1);
            [
                Part { name: names[0], shape: [1, lengths[0]], values: codes, is_codes: true },
                Part { name: names[1], shape: [1, lengths[1]], values: absmax, is_codes: false },
            ]
        };
        match self {
            OptimizerState::AdamW { exp_avg, exp_avg_sq } => {
                vec![plain("exp_avg", exp_avg), plain("exp_avg_sq", exp_avg_sq)]
            }
            OptimizerState::AdamW8bit { state1, state2 } => {
                let parts = [quantized(["state1", "absmax1"], state1), quantized(["state2", "absmax2"], state2)];
                parts.into_iter().flatten().collect()
            }
            OptimizerState::Factored { exp_avg_sq_row, exp_avg_sq_col } => {
                vec![plain("exp_avg_sq_row", exp_avg_sq_row), plain("exp_avg_sq_col", exp_avg_sq_col)]
            }
            OptimizerState::Squares { exp_avg_sq } => vec![plain("exp_avg_sq", exp_avg_sq)],
            OptimizerState::Sgd { momentum_buffer } => {
                momentum_buffer.iter().map(|x| plain("momentum_buffer", x)).collect()
            }
        }
    }

    /// Takes the values of [`OptimizerState::parts`], in that order and of those sizes.
    pub(crate) fn set<E>(
        &mut self,
        backend: &B,
        mut values: impl FnMut(&'static str) -> std::result::Result<Vec<f32>, E>,
    ) -> std::result::Result<(), E> {
        let mut plain = |name, x: &mut B::Tensor| {
            let [rows, cols] = backend.shape(x);
            *x = backend.upload(&values(name)?, rows, cols);
            Ok(())
        };
        match self {
            OptimizerState::AdamW { exp_avg, exp_avg_sq } => {
                plain("exp_avg", exp_avg)?;
                plain("exp_avg_sq", exp_avg_sq)
            }
            OptimizerState::AdamW8bit { state1, state2 } => {
                let mut quantized = |names: [&'static str; 2], x: &mut B::State8bit| {
                    let codes: Vec<u8> = values(names[0])?.iter().map(|&code| code as u8).collect();
                    backend.upload_8bit(x, &codes, &values(names[1])?);
                    Ok(())
                };
                quantized(["state1", "absmax1"], state1)?;
                quantized(["state2", "absmax2"], state2)
            }
            OptimizerState::Factored { exp_avg_sq_row, exp_avg_sq_col } => {
                plain("exp_avg_sq_row", exp_avg_sq_row)?;
                plain("exp_avg_sq_col", exp_avg_sq_col)
            }
            OptimizerState::Squares { exp_avg_sq } => plain("exp_avg_sq", exp_avg_sq),
            OptimizerState::Sgd { momentum_buffer } => {
                momentum_buffer.iter_mut().try_for_each(|x| plain("momentum_buffer", x))
            }
        }
    }
}

impl Optimizer {
    /// The state of a parameter before its first step.
    pub(crate) fn state<B: Backend>(&self, backend: &B, param: &Param<B::Tensor>) -> OptimizerState<B> {
        let [rows, cols] = backend.shape(&param.value);
        let zeros = || backend.zeros(rows, cols);
        let is_8bit = rows * cols >= MIN_8BIT_SIZE && param.group != Group::Embedding;
        match self.rule {
            Rule::AdamW8bit { .. } if is_8bit => OptimizerState::AdamW8bit {
                state1: backend.zeros_8bit(rows * cols, true),
                state2: backend.zeros_8bit(rows * cols, false),
            },
            Rule::AdamW { .. } | Rule::AdamW8bit { .. } => {
                OptimizerState::AdamW { exp_avg: zeros(), exp_avg_sq: zeros() }
            }
            // What torch keeps as a vector is one row here.
            Rule::Adafactor if rows > 1 => OptimizerState::Factored {
                exp_avg_sq_row: backend.zeros(1, rows),
                exp_avg_sq_col: backend.zeros(1, cols),
            },
            Rule::Adafactor => OptimizerState::Squares { exp_avg_sq: zeros() },
            Rule::Sgd { momentum } => OptimizerState::Sgd { momentum_buffer: (momentum != 0.0).then(zeros) },
        }
    }

    /// Step `step` (from 1) of one parameter, whose gradient is zeroed.
    pub(crate) fn update<B: Backend>(
        &self,
        backend: &B,
        param: &mut Param<B::Tensor>,
        state: &mut OptimizerState<B>,
        step: u64,
        lr: f64,
        grad_scale: f32,
    ) {
        let Param { value, grad: Some(grad), group } = param else { return };
        // As PEFT groups them: B, and whatever is a vector.
        let has_own_rate = matches!(group, Group::LoraB | Group::Magnitude | Group::Vector);
        let lr = if has_own_rate { lr * self.lora_plus_lr_ratio } else { lr };
        let weight_decay = if *group == Group::Vector { 0.0 } else { self.weight_decay };
        let adamw = |beta1, beta2, eps| AdamWStep { lr, beta1, beta2, eps, weight_decay, step, grad_scale };
        let adafactor =
            AdafactorStep { lr, decay_rate: -0.8, eps: 1e-30, clip_threshold: 1.0, weight_decay, step, grad_scale };
        match (self.rule, state) {
            (
                Rule::AdamW { beta1, beta2, eps } | Rule::AdamW8bit { beta1, beta2, eps },
                OptimizerState::AdamW { exp_avg, exp_avg_sq },
            ) => backend.adamw(value, grad, (exp_avg, exp_avg_sq), &adamw(beta1, beta2, eps)),
            (Rule::AdamW8bit { beta1, beta2, eps }, OptimizerState::AdamW8bit { state1, state2 }) => {
                backend.adamw_8bit(value, grad, (state1, state2), &adamw(beta1, beta2, eps));
            }
            (Rule::Adafactor, OptimizerState::Factored { exp_avg_sq_row: row, exp_avg_sq_col: col }) => {
                backend.adafactor(value, grad, SecondMoment::Factored { row, col }, &adafactor);
            }
            (Rule::Adafactor, OptimizerState::Squares { exp_avg_sq }) => {
                backend.adafactor(value, grad, SecondMoment::Whole(exp_avg_sq), &adafactor);
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
