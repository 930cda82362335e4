//! The order of training: which rows each optimizer step sees. It follows from the step's number and the seed alone,
//! so a resumed run needs no other memory of where it was.

use tunesmith_crds::fine_tune_job::Training;
use tunesmith_engine::MicroBatch;

use super::{Example, packing::best_fit_decreasing, shuffle::permutation};

/// Rows that each step trains on.
pub struct Batches {
    /// What is shuffled: single rows, or packed sequences of rows.
    sequences: Vec<Vec<usize>>,
    sequences_per_micro_batch: usize,
    sequences_per_step: usize,
    seed: u64,
    total_steps: u64,
}

impl Batches {
    /// The order of training on these examples, of which there is at least one.
    pub fn new(examples: &[Example], training: &Training) -> Self {
        let sequences = match training.packing {
            true => {
                let lengths: Vec<usize> = examples.iter().map(|example| example.tokens.len()).collect();
                best_fit_decreasing(&lengths, training.max_length as usize)
            }
            false => (0..examples.len()).map(|row| vec![row]).collect(),
        };
        let micro_batch = training.per_device_train_batch_size as usize;
        let mut batches = Self {
            sequences,
            sequences_per_micro_batch: micro_batch,
            sequences_per_step: micro_batch * training.gradient_accumulation_steps as usize,
            seed: training.seed,
            total_steps: 0,
        };
        let by_epochs = (training.num_train_epochs * batches.steps_per_epoch() as f64).ceil() as u64;
        batches.total_steps = training.max_steps.unwrap_or(by_epochs.max(1));
        batches
    }

    /// Optimizer steps in all.
    pub fn total_steps(&self) -> u64 {
        self.total_steps
    }

    /// Passes over the data after this many steps.
    pub fn epoch(&self, steps: u64) -> f64 {
        steps as f64 / self.steps_per_epoch() as f64
    }

    /// The micro-batches of optimizer step `step` (the first is 0), each a list of rows. The last step of an epoch
    /// may be smaller.
    pub fn step(&self, step: u64) -> Vec<Vec<usize>> {
        let (epoch, index) = (step / self.steps_per_epoch(), step % self.steps_per_epoch());
        let order = permutation(self.sequences.len(), self.seed, epoch);
        let sequences = order.iter().map(|&sequence| &self.sequences[sequence]);
        let sequences: Vec<_> =
            sequences.skip(index as usize * self.sequences_per_step).take(self.sequences_per_step).collect();
        let micro_batches = sequences.chunks(self.sequences_per_micro_batch);
        micro_batches.map(|sequences| sequences.iter().copied().flatten().copied().collect()).collect()
    }

    fn steps_per_epoch(&self) -> u64 {
        self.sequences.len().div_ceil(self.sequences_per_step) as u64
    }
}

/// Rows one after the other, as the engine takes them.
pub fn micro_batch(examples: &[Example], rows: &[usize]) -> MicroBatch {
    let mut batch = MicroBatch::default();
    for example in rows.iter().map(|&row| &examples[row]) {
        batch.tokens.extend(&example.tokens);
        batch.targets.extend(&example.targets);
        batch.row_lengths.push(example.tokens.len());
    }
    batch
}

/// All rows in order, in groups of at most `tokens` tokens (or one row).
pub fn in_order(examples: &[Example], tokens: usize) -> Vec<Vec<usize>> {
    let mut groups: Vec<Vec<usize>> = Vec::new();
    let mut filled = 0;
    for (row, example) in examples.iter().enumerate() {
        filled += example.tokens.len();
        match groups.last_mut() {
            Some(group) if filled <= tokens => group.push(row),
            _ => {
                filled = example.tokens.len();
                groups.push(vec![row]);
            }
        }
    }
    groups
}

/// Splits rows into those to train on and a `fraction` to evaluate on (rounded up), chosen by `seed`; both keep the
/// file's order. None if no row is left for either.
pub fn hold_out(examples: Vec<Example>, fraction: f64, seed: u64) -> Option<(Vec<Example>, Vec<Example>)> {
    let held = (examples.len() as f64 * fraction).ceil() as usize;
    if held == 0 || held >= examples.len() {
        return None;
    }
    let mut is_held = vec![false; examples.len()];
    for row in permutation(examples.len(), seed, u64::MAX).into_iter().take(held) {
        is_held[row] = true;
    }
    let (eval, train): (Vec<_>, Vec<_>) = examples.into_iter().zip(is_held).partition(|(_, held)| *held);
    let rows = |rows: Vec<(Example, bool)>| rows.into_iter().map(|(example, _)| example).collect();
    Some((rows(train), rows(eval)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn examples(lengths: &[usize]) -> Vec<Example> {
        let example = |&length| Example { row: 0, tokens: vec![0; length], targets: vec![0; length], truncated: false };
        lengths.iter().map(example).collect()
    }

    fn training(batch: u32, accumulation: u32, packing: bool) -> Training {
        Training {
            per_device_train_batch_size: batch,
            gradient_accumulation_steps: accumulation,
            max_length: 32,
            packing,
            ..Training::default()
        }
    }

    #[test]
    fn steps_are_counted_as_hugging_face_counts_them() {
        let steps = |training: Training| Batches::new(&examples(&[1; 10]), &training).total_steps();
        assert_eq!(steps(training(2, 2, false)), 9, "ten rows make two whole steps and a small one, three times");
        assert_eq!(steps(Training { num_train_epochs: 0.5, ..training(2, 1, false) }), 3);
        assert_eq!(steps(Training { max_steps: Some(7), ..training(2, 1, false) }), 7);
        assert_eq!(steps(Training { num_train_epochs: 0.01, ..training(2, 1, false) }), 1);
    }

    #[test]
    fn rows_are_held_out_without_loss() {
        let (train, eval) = hold_out(examples(&(1..=10).collect::<Vec<_>>()), 0.25, 7).unwrap();
        assert_eq!((train.len(), eval.len()), (7, 3));
        let mut lengths: Vec<usize> = train.iter().chain(&eval).map(|example| example.tokens.len()).collect();
        lengths.sort_unstable();
        assert_eq!(lengths, (1..=10).collect::<Vec<_>>());
        assert!(hold_out(examples(&[1]), 0.5, 7).is_none());
    }

    proptest! {
        #[test]
        fn an_epoch_sees_every_row_once(
            lengths in prop::collection::vec(1usize..32, 1..60), batch in 1u32..4, accumulation in 1u32..4, packing: bool,
        ) {
            let batches = Batches::new(&examples(&lengths), &training(batch, accumulation, packing));
            for epoch in 0..2 {
                let steps = batches.steps_per_epoch();
                let micro_batches: Vec<_> = (0..steps).flat_map(|step| batches.step(epoch * steps + step)).collect();
                prop_assert!(micro_batches.iter().all(|rows| !rows.is_empty()));
                let tokens = |rows: &Vec<usize>| rows.iter().map(|&row| lengths[row]).sum::<usize>();
                prop_assert!(micro_batches.iter().all(|rows| tokens(rows) <= 32 * batch as usize));
                let mut rows: Vec<usize> = micro_batches.into_iter().flatten().collect();
                rows.sort_unstable();
                prop_assert_eq!(rows, (0..lengths.len()).collect::<Vec<_>>());
            }
        }

        #[test]
        fn evaluation_sees_every_row_once_in_order(lengths in prop::collection::vec(1usize..32, 1..60)) {
            let groups = in_order(&examples(&lengths), 64);
            prop_assert!(groups.iter().all(|rows| rows.iter().map(|&row| lengths[row]).sum::<usize>() <= 64));
            prop_assert_eq!(groups.concat(), (0..lengths.len()).collect::<Vec<_>>());
        }
    }
}
