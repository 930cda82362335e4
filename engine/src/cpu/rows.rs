//! The rows of a micro-batch: where each lies, what it goes on after, and the angles of its tokens.

use super::rope::Angles;
use crate::backend::Row;
use crate::config::Rope;

/// Rows of a micro-batch and their rotary angles.
pub struct Rows {
    pub(super) starts: Vec<usize>,
    pub(super) lengths: Vec<usize>,
    pub(super) prefixes: Vec<Option<usize>>,
    /// Per row: those of which it is the prefix.
    pub(super) followers: Vec<Vec<usize>>,
    /// Per row: its length together with its prefix, and the sum of these of the rows before it.
    pub(super) key_lengths: Vec<usize>,
    pub(super) key_starts: Vec<usize>,
    /// Per token: its row.
    pub(super) row_of: Vec<usize>,
    /// Of each rotary embedding.
    pub(super) angles: Vec<Angles>,
}

impl Rows {
    pub(super) fn new(rows: &[Row], offset: usize, ropes: &[Rope]) -> Self {
        let lengths: Vec<usize> = rows.iter().map(|row| row.len).collect();
        let prefixes: Vec<Option<usize>> = rows.iter().map(|row| row.prefix).collect();
        let past = |row: usize| prefixes[row].map_or(0, |prefix| lengths[prefix]);
        let key_lengths: Vec<usize> = (0..rows.len()).map(|row| past(row) + lengths[row]).collect();
        let mut followers = vec![Vec::new(); rows.len()];
        for (row, prefix) in rows.iter().enumerate().filter_map(|(i, row)| Some((i, row.prefix?))) {
            followers[prefix].push(row);
        }
        let row_of: Vec<usize> = lengths.iter().enumerate().flat_map(|(row, &len)| vec![row; len]).collect();
        let angles = |rope: &Rope| {
            let frequencies: Vec<Vec<f32>> = key_lengths.iter().map(|len| rope.frequencies(offset + len)).collect();
            let tokens = (0..rows.len()).flat_map(|row| (past(row)..key_lengths[row]).map(move |at| (row, at)));
            Angles::new(tokens.map(|(row, at)| (offset + at, frequencies[row].as_slice())), rope.attention_factor)
        };
        let angles = ropes.iter().map(angles).collect();
        let (starts, key_starts) = (starts(&lengths), starts(&key_lengths));
        Rows { starts, lengths, prefixes, followers, key_lengths, key_starts, row_of, angles }
    }

    /// Pairs of a token and one that it sees, without regard to windows.
    pub(super) fn pairs(&self) -> usize {
        let rows = self.lengths.iter().zip(&self.key_lengths);
        rows.map(|(len, keys)| len * (keys - len) + len * (len + 1) / 2).sum()
    }

    /// Tokens whose keys the rows see, all rows together.
    pub(super) fn keys(&self) -> usize {
        self.key_lengths.iter().sum()
    }
}

/// Where each of these lengths starts, one after the other.
fn starts(lengths: &[usize]) -> Vec<usize> {
    let start = |next: &mut usize, len: &usize| Some(std::mem::replace(next, *next + len));
    lengths.iter().scan(0, start).collect()
}
