//! Best-fit decreasing: fills sequences of a given length with whole rows.

use std::collections::BTreeMap;

/// Groups of rows whose lengths add up to at most `capacity`. Longest rows first, each into the fullest sequence that
/// still has room; at most 11/9 of the fewest possible sequences, plus one (Johnson, 1973).
///
/// Every length must be at most `capacity`.
pub fn best_fit_decreasing(lengths: &[u32], capacity: u32) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    order.sort_by_key(|&row| std::cmp::Reverse(lengths[row]));
    let mut sequences: Vec<Vec<usize>> = Vec::new();
    // Sequences by the room that they have left.
    let mut by_room: BTreeMap<u32, Vec<usize>> = BTreeMap::new();
    for row in order {
        let length = lengths[row];
        let fullest = by_room.range_mut(length..).next().and_then(|(&room, sequences)| Some((room, sequences.pop()?)));
        let (room, sequence) = fullest.unwrap_or_else(|| {
            sequences.push(Vec::new());
            (capacity, sequences.len() - 1)
        });
        if by_room.get(&room).is_some_and(Vec::is_empty) {
            by_room.remove(&room);
        }
        sequences[sequence].push(row);
        by_room.entry(room - length).or_default().push(sequence);
    }
    sequences
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn rows_fill_the_gaps_that_fit_best() {
        assert_eq!(best_fit_decreasing(&[5, 7, 3, 5], 10), [vec![1, 2], vec![0, 3]]);
        assert!(best_fit_decreasing(&[], 10).is_empty());
    }

    proptest! {
        #[test]
        fn every_row_is_packed_once_and_no_sequence_is_too_long(lengths in prop::collection::vec(1u32..64, 0..200)) {
            let sequences = best_fit_decreasing(&lengths, 64);
            let mut rows: Vec<usize> = sequences.iter().flatten().copied().collect();
            rows.sort_unstable();
            prop_assert_eq!(rows, (0..lengths.len()).collect::<Vec<_>>());
            let filled: Vec<u32> = sequences.iter().map(|s| s.iter().map(|&row| lengths[row]).sum()).collect();
            prop_assert!(filled.iter().all(|&tokens| (1..=64).contains(&tokens)));
            // Two sequences that are both at most half full would have been one.
            prop_assert!(filled.iter().filter(|&&tokens| tokens <= 32).count() <= 1);
        }
    }
}
