//! Cross-entropy of a linear output layer: loss[i] = ln Σⱼ exp(l[i, j]) − l[i, target[i]], l = cap(x·Wᵀ); x [tokens,
//! hidden], W [vocabulary, hidden]; cap(l) = c·tanh(l/c) where logits are capped.
//!
//! The vocabulary is taken [`CHUNK`] words at a time with a running maximum and sum, as FlashAttention takes keys, so
//! the logits in memory are [tokens, CHUNK] and every weight is read once. The same trick gives the gradient by x:
//! Σⱼ pⱼ·w[j] is an attention over the vocabulary in which W is both keys and values. The gradient by W, which only full
//! fine-tuning wants, needs the sums first, and so computes the logits a second time.

use rayon::prelude::*;

use super::gemm::{Operand, Output, Term, gemm_sum};
use super::simd::{exp, max, sum, tanh, vectorize};
use super::weight::Matrix;
use crate::backend::Precision;
use crate::cpu::view::{View, ViewMut};

/// Words that are taken at a time.
const CHUNK: usize = 1024;
/// Distance of two rows of logits: not a multiple of 4 KiB, which would put all rows into the same cache sets.
const STRIDE: usize = CHUNK + 16;

/// One output layer and the rows to score.
pub(super) struct Problem<'a> {
    pub(super) x: &'a [f32],
    pub(super) w: Matrix<'a>,
    pub(super) precision: Precision,
    pub(super) targets: &'a [u32],
    pub(super) softcap: Option<f32>,
}

/// A row's softmax as far as it has been seen.
#[derive(Clone, Copy)]
struct Running {
    max: f32,
    sum: f32,
    /// The logit of the target.
    target: f32,
}

/// Where gradients go, times `scale`.
pub(super) struct Gradients<'a> {
    pub(super) scale: f32,
    /// Overwritten.
    pub(super) x: &'a mut [f32],
    /// Added to.
    pub(super) weight: Option<&'a mut [f32]>,
}

impl Problem<'_> {
    /// The length of the scratch that [`Problem::solve`] needs.
    pub(super) fn scratch_len(&self) -> usize {
        self.targets.len() * STRIDE
    }

    /// The losses, and the gradients of their sum if they are wanted.
    pub(super) fn solve(&self, scratch: &mut [f32], gradients: Option<Gradients<'_>>) -> Vec<f32> {
        let (tokens, hidden) = (self.targets.len(), self.w.cols);
        let mut rows = vec![Running { max: f32::NEG_INFINITY, sum: 0.0, target: 0.0 }; tokens];
        let (mut dx, rest) = match gradients {
            None => (None, None),
            Some(Gradients { scale, x, weight }) => (Some(x), Some((scale, weight))),
        };
        for (first, w) in self.chunks() {
            let words = w.rows;
            self.logits(w, scratch);
            self.scan(first, words, scratch, &mut rows, dx.as_deref_mut());
            if let Some(dx) = &mut dx {
                let p = View::strided(scratch, tokens, words, STRIDE);
                let output = if first == 0 { Output::Set } else { Output::Add };
                self.multiply(ViewMut::new(dx, tokens, hidden), output, Term::new(1.0, p, Operand::new(w)));
            }
        }
        if let (Some(dx), Some((scale, weight))) = (dx, rest) {
            self.finish_gradient(dx, scale, &rows);
            if let Some(weight) = weight {
                self.weight_gradient(weight, scratch, scale, &rows);
            }
        }
        rows.iter().map(|row| row.max + row.sum.ln() - row.target).collect()
    }

    fn multiply(&self, c: ViewMut<'_>, output: Output, term: Term<'_>) {
        gemm_sum(c, output, &[term.with(self.precision)]);
    }

    /// The vocabulary in chunks: the first word's number, and the weights.
    fn chunks(&self) -> impl Iterator<Item = (usize, Matrix<'_>)> {
        (0..self.w.rows).step_by(CHUNK).map(|first| (first, self.w.rows(first, CHUNK.min(self.w.rows - first))))
    }

    fn logits(&self, w: Matrix<'_>, scratch: &mut [f32]) {
        let tokens = self.targets.len();
        let x = View::new(self.x, tokens, w.cols);
        let logits = ViewMut::strided(scratch, tokens, w.rows, STRIDE);
        self.multiply(logits, Output::Set, Term::new(1.0, x, Operand::transposed(w)));
    }

    /// Turns logits into e^(logit − max), times the slope of the cap, and updates the running sums; rescales the gradient
    /// where the maximum rose.
    fn scan(&self, first: usize, words: usize, logits: &mut [f32], rows: &mut [Running], dx: Option<&mut [f32]>) {
        let tasks = logits.par_chunks_mut(STRIDE).zip(rows).zip(self.targets);
        let scan = |logits: &mut [f32], row: &mut Running, target: usize| {
            vectorize(
                #[inline(always)]
                || {
                    let logits = &mut logits[..words];
                    if let Some(cap) = self.softcap {
                        logits.iter_mut().for_each(|x| *x = cap * tanh(*x / cap));
                    }
                    if (first..first + words).contains(&target) {
                        row.target = logits[target - first];
                    }
                    let new_max = row.max.max(max(logits));
                    let shrink = exp(row.max - new_max);
                    match self.softcap {
                        None => {
                            for x in logits.iter_mut() {
                                *x = exp(*x - new_max);
                            }
                            row.sum = row.sum * shrink + sum(words, |j| logits[j]);
                        }
                        Some(cap) => {
                            row.sum = row.sum * shrink + sum(words, |j| exp(logits[j] - new_max));
                            for x in logits.iter_mut() {
                                *x = exp(*x - new_max) * slope(*x, cap);
                            }
                        }
                    }
                    row.max = new_max;
                    shrink
                },
            )
        };
        match dx {
            None => tasks.for_each(|((logits, row), &target)| {
                scan(logits, row, target as usize);
            }),
            Some(dx) => tasks.zip(dx.par_chunks_mut(self.w.cols)).for_each(|(((logits, row), &target), dx)| {
                let shrink = scan(logits, row, target as usize);
                if shrink != 1.0 && first > 0 {
                    dx.iter_mut().for_each(|dx| *dx *= shrink);
                }
            }),
        }
    }

    /// dx = scale · (Σⱼ e^(…)·w[j] / sum − w[target]), with the cap's slopes.
    fn finish_gradient(&self, dx: &mut [f32], scale: f32, rows: &[Running]) {
        let tasks = dx.par_chunks_mut(self.w.cols).zip(rows).zip(self.targets);
        tasks.for_each_init(
            || vec![0.0; self.w.cols],
            |word, ((dx, row), &target)| {
                self.w.widen(target as usize, 0, word);
                let normalise = 1.0 / row.sum;
                let slope = self.softcap.map_or(1.0, |cap| slope(row.target, cap));
                for (dx, w) in dx.iter_mut().zip(word.iter()) {
                    *dx = scale * (*dx * normalise - slope * w);
                }
            },
        );
    }

    /// dW[j] += scale · Σᵢ (p[i, j] − [j = target[i]]) · x[i], with the cap's slopes.
    fn weight_gradient(&self, d_weight: &mut [f32], scratch: &mut [f32], scale: f32, rows: &[Running]) {
        let (tokens, hidden) = (self.targets.len(), self.w.cols);
        for (first, w) in self.chunks() {
            self.logits(w, scratch);
            let tasks = scratch.par_chunks_mut(STRIDE).zip(rows).zip(self.targets);
            tasks.for_each(|((logits, row), &target)| {
                let log_sum = row.max + row.sum.ln();
                vectorize(
                    #[inline(always)]
                    || {
                        let logits = &mut logits[..w.rows];
                        let is_here = (first..first + w.rows).contains(&(target as usize));
                        let at_target = is_here.then(|| target as usize - first);
                        let cap = self.softcap;
                        let slope_at_target = cap.map_or(1.0, |cap| slope(row.target, cap));
                        for x in logits.iter_mut() {
                            let (capped, slope) = match cap {
                                None => (*x, 1.0),
                                Some(cap) => {
                                    let capped = cap * tanh(*x / cap);
                                    (capped, slope(capped, cap))
                                }
                            };
                            *x = exp(capped - log_sum) * slope;
                        }
                        if let Some(target) = at_target {
                            logits[target] -= slope_at_target;
                        }
                    },
                )
            });
            let d_logits = View::strided(scratch, tokens, w.rows, STRIDE);
            let d_words = &mut d_weight[first * hidden..][..w.rows * hidden];
            let x = View::new(self.x, tokens, hidden);
            self.multiply(ViewMut::new(d_words, w.rows, hidden), Output::Add, Term::new(scale, d_logits.t(), x));
        }
    }
}

/// The derivative of c·tanh(l/c), from its value.
#[inline(always)]
fn slope(capped: f32, cap: f32) -> f32 {
    let t = capped / cap;
    1.0 - t * t
}
