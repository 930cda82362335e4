//! What evaluations decide: which weights are the best, and when training is of no more use. As transformers' Trainer
//! and its EarlyStoppingCallback decide it, and from the history alone, so that a resumed run decides the same.

use super::{EvalPoint, History};

impl History {
    /// The lowest eval loss, of equal ones the first. The base model's does not count.
    pub fn best(&self) -> Option<&EvalPoint> {
        self.adapter_evals().reduce(|best, eval| if eval.loss < best.loss { eval } else { best })
    }

    /// Evaluations in a row, up to the last, whose loss was not lower than the best before by more than `threshold`.
    pub fn evals_without_improvement(&self, threshold: f64) -> u32 {
        let (mut best, mut count) = (f64::INFINITY, 0);
        for eval in self.adapter_evals() {
            count = if best - eval.loss > threshold { 0 } else { count + 1 };
            best = best.min(eval.loss);
        }
        count
    }

    fn adapter_evals(&self) -> impl Iterator<Item = &EvalPoint> {
        self.evals.iter().filter(|eval| eval.step > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Evaluations at step 0, which is the base model's, 1, 2, ….
    fn history(losses: &[f64]) -> History {
        let eval = |(step, &loss)| EvalPoint { step: step as u64, loss, ..EvalPoint::default() };
        History { evals: losses.iter().enumerate().map(eval).collect(), ..History::default() }
    }

    #[test]
    fn the_best_is_the_first_of_the_lowest_and_never_the_base_model() {
        let best = |losses: &[f64]| history(losses).best().map(|eval| eval.step);
        assert_eq!(best(&[1.0]), None);
        assert_eq!(best(&[1.0, 3.0, 2.0, 2.0, 2.5]), Some(2));
    }

    #[test]
    fn patience_counts_what_is_not_better_by_more_than_the_threshold() {
        let count = |losses: &[f64], threshold| history(losses).evals_without_improvement(threshold);
        assert_eq!(count(&[1.0, 3.0], 0.0), 0, "the first is an improvement, whatever the base model's loss");
        assert_eq!(count(&[1.0, 3.0, 3.0, 3.5], 0.0), 2);
        assert_eq!(count(&[1.0, 3.0, 3.5, 2.9], 0.0), 0);
        // As in transformers, small steps down move the best, and with it the mark to beat.
        assert_eq!(count(&[1.0, 3.0, 2.75, 2.5], 0.25), 2);
        assert_eq!(count(&[1.0, 3.0, 2.75, 2.25], 0.25), 0);
    }
}
