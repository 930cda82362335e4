//! Cross-entropy of a linear output layer: loss[i] = ln Σⱼ exp(x[i]·w[j]) − x[i]·w[target[i]]; x [tokens, hidden],
//! W [vocabulary, hidden].
//!
//! The vocabulary is taken [`CHUNK`] words at a time with a running maximum and sum, as FlashAttention takes keys, so
//! the logits in memory are [tokens, CHUNK] and every weight is read once. The same trick gives the gradient: Σⱼ pⱼ·w[j]
//! is an attention over the vocabulary in which W is both keys and values.

use rayon::prelude::*;

use super::gemm::{Output, View, ViewMut, gemm};
use super::simd::{exp, max, sum, vectorize};

/// Words that are taken at a time.
const CHUNK: usize = 2048;
/// Distance of two rows of logits: not a multiple of 4 KiB, which would put all rows into the same cache sets.
const STRIDE: usize = CHUNK + 16;

/// One output layer and the rows to score.
pub(super) struct Problem<'a> {
    pub(super) x: &'a [f32],
    pub(super) w: &'a [f32],
    pub(super) targets: &'a [u32],
    pub(super) hidden: usize,
}

/// A row's softmax as far as it has been seen.
#[derive(Clone, Copy)]
struct Running {
    max: f32,
    sum: f32,
    target: f32,
}

impl Problem<'_> {
    /// The length of the scratch that [`Problem::solve`] needs.
    pub(super) fn scratch_len(&self) -> usize {
        self.targets.len() * STRIDE
    }

    /// The losses, and in `dx` (if given) grad_scale times the gradient of their sum.
    pub(super) fn solve(&self, scratch: &mut [f32], mut dx: Option<(&mut [f32], f32)>) -> Vec<f32> {
        let tokens = self.targets.len();
        let vocabulary = self.w.len() / self.hidden;
        let x = View::new(self.x, tokens, self.hidden);
        let mut rows = vec![Running { max: f32::NEG_INFINITY, sum: 0.0, target: 0.0 }; tokens];
        for first in (0..vocabulary).step_by(CHUNK) {
            let words = CHUNK.min(vocabulary - first);
            let w = View::new(&self.w[first * self.hidden..], words, self.hidden);
            let logits = ViewMut::strided(scratch, tokens, words, STRIDE);
            gemm(logits, Output::Set, 1.0, x, w.t());
            match &mut dx {
                None => self.scan(first, words, scratch, &mut rows, None),
                Some((dx, _)) => {
                    self.scan(first, words, scratch, &mut rows, Some(dx));
                    let p = View::strided(scratch, tokens, words, STRIDE);
                    let output = if first == 0 { Output::Set } else { Output::Add };
                    gemm(ViewMut::new(dx, tokens, self.hidden), output, 1.0, p, w);
                }
            }
        }
        if let Some((dx, grad_scale)) = dx {
            self.finish_gradient(dx, grad_scale, &rows);
        }
        rows.iter().map(|row| row.max + row.sum.ln() - row.target).collect()
    }

    /// Turns logits into e^(logit − max) and updates the running sums; rescales the gradient where the maximum rose.
    fn scan(&self, first: usize, words: usize, logits: &mut [f32], rows: &mut [Running], dx: Option<&mut [f32]>) {
        let tasks = logits.par_chunks_mut(STRIDE).zip(rows).zip(self.targets);
        let scan = |logits: &mut [f32], row: &mut Running, target: usize| {
            vectorize(
                #[inline(always)]
                || {
                    let logits = &mut logits[..words];
                    if (first..first + words).contains(&target) {
                        row.target = logits[target - first];
                    }
                    let new_max = row.max.max(max(logits));
                    let shrink = exp(row.max - new_max);
                    for x in logits.iter_mut() {
                        *x = exp(*x - new_max);
                    }
                    row.sum = row.sum * shrink + sum(words, |j| logits[j]);
                    row.max = new_max;
                    shrink
                },
            )
        };
        match dx {
            None => tasks.for_each(|((logits, row), &target)| {
                scan(logits, row, target as usize);
            }),
            Some(dx) => tasks.zip(dx.par_chunks_mut(self.hidden)).for_each(|(((logits, row), &target), dx)| {
                let shrink = scan(logits, row, target as usize);
                if shrink != 1.0 && first > 0 {
                    dx.iter_mut().for_each(|dx| *dx *= shrink);
                }
            }),
        }
    }

    /// dx = grad_scale · (Σⱼ e^(…)·w[j] / sum − w[target]).
    fn finish_gradient(&self, dx: &mut [f32], grad_scale: f32, rows: &[Running]) {
        let tasks = dx.par_chunks_mut(self.hidden).zip(rows).zip(self.targets);
        tasks.for_each(|((dx, row), &target)| {
            let word = &self.w[target as usize * self.hidden..][..self.hidden];
            let normalise = 1.0 / row.sum;
            for (dx, w) in dx.iter_mut().zip(word) {
                *dx = grad_scale * (*dx * normalise - w);
            }
        });
    }
}
