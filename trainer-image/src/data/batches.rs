//! The order of training: which rows each optimizer step sees. It follows from the step's number and the seed alone,
//! so a resumed run needs no other memory of where it was.

use std::{cell::RefCell, ops::Range};

use tunesmith_crds::fine_tune_job::Training;
use tunesmith_engine::MicroBatch;

use super::{DataError, Rows, packing::best_fit_decreasing, shuffle::permutation};

/// Rows that each step trains on.
pub struct Batches {
    /// Rows of each packed sequence; without packing, each row is a sequence of its own.
    packed: Option<Vec<Vec<usize>>>,
    /// What is shuffled.
    sequences: usize,
    /// The order of an epoch, the last one that was asked for.
    order: RefCell<Option<(u64, Vec<u32>)>>,
    sequences_per_micro_batch: usize,
    sequences_per_step: usize,
    seed: u64,
    total_steps: u64,
}

impl Batches {
    /// The order of training on rows of these lengths in tokens; there is at least one.
    pub fn new(lengths: &[u32], training: &Training) -> Self {
        let packed = training.packing.then(|| best_fit_decreasing(lengths, training.max_length));
        let micro_batch = training.per_device_train_batch_size as usize;
        let mut batches = Self {
            sequences: packed.as_ref().map_or(lengths.len(), Vec::len),
            packed,
            order: RefCell::default(),
            sequences_per_micro_batch: micro_batch,
            sequences_per_step: usize::try_from(training.global_batch()).unwrap_or(usize::MAX),
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
        let first = index as usize * self.sequences_per_step;
        let last = self.sequences.min(first.saturating_add(self.sequences_per_step));
        let sequences: Vec<usize> = self.order(epoch, first..last);
        let micro_batches = sequences.chunks(self.sequences_per_micro_batch);
        micro_batches.map(|sequences| sequences.iter().flat_map(|&sequence| self.rows(sequence)).collect()).collect()
    }

    /// Part of an epoch's order. Shuffling all of it takes a while with many rows, and an epoch has many steps.
    fn order(&self, epoch: u64, part: Range<usize>) -> Vec<usize> {
        let mut known = self.order.borrow_mut();
        let order = match known.take() {
            Some((of, order)) if of == epoch => order,
            _ => permutation(self.sequences, self.seed, epoch),
        };
        let sequences = order[part].iter().map(|&sequence| sequence as usize).collect();
        *known = Some((epoch, order));
        sequences
    }

    /// The rows of a sequence.
    fn rows(&self, sequence: usize) -> Vec<usize> {
        self.packed.as_ref().map_or_else(|| vec![sequence], |packed| packed[sequence].clone())
    }

    fn steps_per_epoch(&self) -> u64 {
        self.sequences.div_ceil(self.sequences_per_step) as u64
    }
}

/// Rows one after the other, as the engine takes them.
///
/// # Errors
/// The disk that they are on fails.
pub fn micro_batch(rows: &Rows, picked: impl IntoIterator<Item = usize>) -> Result<MicroBatch, DataError> {
    let mut batch = MicroBatch::default();
    for row in picked {
        let example = rows.example(row)?;
        batch.row_lengths.push(example.tokens.len());
        batch.tokens.extend(example.tokens);
        batch.targets.extend(example.targets);
    }
    Ok(batch)
}

/// All rows in order, in groups of at most `tokens` tokens (or one row).
pub fn in_order(lengths: &[u32], tokens: usize) -> Vec<Range<usize>> {
    let mut groups: Vec<Range<usize>> = Vec::new();
    let mut filled = 0;
    for (row, &length) in lengths.iter().enumerate() {
        filled += length as usize;
        match groups.last_mut() {
            Some(group) if filled <= tokens => group.end = row + 1,
            _ => {
                filled = length as usize;
                groups.push(row..row + 1);
            }
        }
    }
    groups
}

/// Splits rows into those to train on and a `fraction` to evaluate on (rounded up), chosen by `seed`; both keep the
/// file's order. None if no row is left for either.
pub fn hold_out(rows: usize, fraction: f64, seed: u64) -> Option<(Vec<u32>, Vec<u32>)> {
    let held = (rows as f64 * fraction).ceil() as usize;
    if held == 0 || held >= rows {
        return None;
    }
    let order = permutation(rows, seed, u64::MAX);
    let (eval, train) = order.split_at(held);
    let sorted = |rows: &[u32]| {
        let mut rows = rows.to_vec();
        rows.sort_unstable();
        rows
    };
    Some((sorted(train), sorted(eval)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

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
        let steps = |training: Training| Batches::new(&[1; 10], &training).total_steps();
        assert_eq!(steps(training(2, 2, false)), 9, "ten rows make two whole steps and a small one, three times");
        assert_eq!(steps(Training { num_train_epochs: 0.5, ..training(2, 1, false) }), 3);
        assert_eq!(steps(Training { max_steps: Some(7), ..training(2, 1, false) }), 7);
        assert_eq!(steps(Training { num_train_epochs: 0.01, ..training(2, 1, false) }), 1);
    }

    #[test]
    fn a_step_takes_the_global_batch_in_parts_of_what_a_device_takes_at_once() {
        let training = Training { global_batch_size: Some(8), ..training(3, 1, false) };
        let batches = Batches::new(&[1; 20], &training);
        let sizes = |step| batches.step(step).iter().map(Vec::len).collect::<Vec<_>>();
        assert_eq!((sizes(0), sizes(1), sizes(2)), (vec![3, 3, 2], vec![3, 3, 2], vec![3, 1]));
        let divided = Training { global_batch_size: Some(8), per_device_train_batch_size: 2, ..training };
        assert_eq!(Batches::new(&[1; 20], &divided).step(1).concat(), batches.step(1).concat(), "the same rows");
    }

    #[test]
    fn a_step_follows_from_its_number_alone_whatever_was_asked_before() {
        let fresh = |step| Batches::new(&[1; 10], &training(2, 1, false)).step(step);
        let asked = Batches::new(&[1; 10], &training(2, 1, false));
        for step in [0, 7, 3, 12, 0] {
            assert_eq!(asked.step(step), fresh(step), "step {step}");
        }
        assert_ne!(fresh(0), fresh(5), "each epoch has an order of its own");
    }

    #[test]
    fn rows_are_held_out_without_loss() {
        let (train, eval) = hold_out(10, 0.25, 7).unwrap();
        assert_eq!((train.len(), eval.len()), (7, 3));
        assert!(train.is_sorted() && eval.is_sorted(), "both keep the file's order");
        let mut rows = [train, eval].concat();
        rows.sort_unstable();
        assert_eq!(rows, (0..10).collect::<Vec<_>>());
        assert!(hold_out(1, 0.5, 7).is_none());
    }

    proptest! {
        #[test]
        fn an_epoch_sees_every_row_once(
            lengths in prop::collection::vec(1u32..32, 1..60), batch in 1u32..4, accumulation in 1u32..4, packing: bool,
        ) {
            let batches = Batches::new(&lengths, &training(batch, accumulation, packing));
            for epoch in 0..2 {
                let steps = batches.steps_per_epoch();
                let micro_batches: Vec<_> = (0..steps).flat_map(|step| batches.step(epoch * steps + step)).collect();
                prop_assert!(micro_batches.iter().all(|rows| !rows.is_empty()));
                let tokens = |rows: &Vec<usize>| rows.iter().map(|&row| lengths[row]).sum::<u32>();
                prop_assert!(micro_batches.iter().all(|rows| tokens(rows) <= 32 * batch));
                let mut rows: Vec<usize> = micro_batches.into_iter().flatten().collect();
                rows.sort_unstable();
                prop_assert_eq!(rows, (0..lengths.len()).collect::<Vec<_>>());
            }
        }

        #[test]
        fn evaluation_sees_every_row_once_in_order(lengths in prop::collection::vec(1u32..32, 1..60)) {
            let groups = in_order(&lengths, 64);
            prop_assert!(groups.iter().all(|rows| lengths[rows.clone()].iter().sum::<u32>() <= 64));
            prop_assert_eq!(groups.into_iter().flatten().collect::<Vec<_>>(), (0..lengths.len()).collect::<Vec<_>>());
        }
    }
}
