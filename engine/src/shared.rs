//! Rows that begin alike, such as chats with one system prompt, need that beginning once in a micro-batch: no token sees
//! what comes after it, so it is the same in each of them. Its gradient is the sum of theirs.

use std::ops::Range;

use crate::backend::Row;
use crate::batch::{IGNORE, MicroBatch};

/// Shorter beginnings cost as much as they save.
const MIN_SHARED: usize = 16;

/// A micro-batch as it is computed.
pub(crate) struct Packed {
    pub(crate) tokens: Vec<u32>,
    /// The tokens that are predicted: where, and which.
    pub(crate) trained: Vec<u32>,
    pub(crate) targets: Vec<u32>,
    pub(crate) rows: Vec<Row>,
}

/// A row of a micro-batch.
#[derive(Clone, Copy)]
struct Source<'a> {
    tokens: &'a [u32],
    targets: &'a [u32],
}

impl<'a> Source<'a> {
    /// What can be shared of it: the tokens before the first that is trained, and not the whole row.
    fn prompt(&self) -> &'a [u32] {
        let untrained = self.targets.iter().take_while(|&&target| target == IGNORE).count();
        &self.tokens[..untrained.min(self.tokens.len() - 1)]
    }

    fn from(self, at: usize) -> Self {
        Source { tokens: &self.tokens[at..], targets: &self.targets[at..] }
    }
}

impl Packed {
    /// The rows one after the other.
    pub(crate) fn whole(batch: &MicroBatch) -> Self {
        let mut packed = Self::with_capacity(batch);
        sources(batch).into_iter().for_each(|row| packed.push(row, None));
        packed
    }

    /// The rows with what they share in front of them.
    pub(crate) fn sharing(batch: &MicroBatch) -> Self {
        let mut rows = sources(batch);
        rows.sort_by_key(Source::prompt);
        let mut packed = Self::with_capacity(batch);
        for (group, shared) in groups(&rows) {
            let members = &rows[group];
            let prefix = (shared > 0).then(|| {
                let [tokens, targets] = [members[0].tokens, members[0].targets].map(|x| &x[..shared]);
                packed.push(Source { tokens, targets }, None);
                packed.rows.len() - 1
            });
            members.iter().for_each(|row| packed.push(row.from(shared), prefix));
        }
        packed
    }

    fn with_capacity(batch: &MicroBatch) -> Self {
        let tokens = Vec::with_capacity(batch.tokens.len());
        Packed { tokens, trained: Vec::new(), targets: Vec::new(), rows: Vec::new() }
    }

    fn push(&mut self, row: Source<'_>, prefix: Option<usize>) {
        let targets = row.targets.iter().copied().enumerate().filter(|&(_, target)| target != IGNORE);
        for (i, target) in targets {
            self.trained.push((self.tokens.len() + i) as u32);
            self.targets.push(target);
        }
        self.tokens.extend_from_slice(row.tokens);
        self.rows.push(Row { len: row.tokens.len(), prefix });
    }
}

fn sources(batch: &MicroBatch) -> Vec<Source<'_>> {
    let mut rest = Source { tokens: &batch.tokens, targets: &batch.targets };
    let row = |&len: &usize| {
        let row = Source { tokens: &rest.tokens[..len], targets: &rest.targets[..len] };
        rest = rest.from(len);
        row
    };
    batch.row_lengths.iter().map(row).collect()
}

/// Parts these sorted rows into groups, each with as many tokens as its rows share, so that the most tokens are saved.
fn groups(rows: &[Source<'_>]) -> Vec<(Range<usize>, usize)> {
    let alike = |a: &[u32], b: &[u32]| a.iter().zip(b).take_while(|(a, b)| a == b).count();
    let neighbours: Vec<usize> = rows.windows(2).map(|pair| alike(pair[0].prompt(), pair[1].prompt())).collect();
    // Of the first rows, by their number: what is saved at best, and with which last group.
    let mut best = vec![(0, 0..0, 0)];
    for end in 1..=rows.len() {
        let (mut saved, mut group, mut shared) = (best[end - 1].0, end - 1..end, 0);
        let mut common = usize::MAX;
        for start in (0..end - 1).rev() {
            common = common.min(neighbours[start]);
            if common < MIN_SHARED {
                break;
            }
            let with = best[start].0 + common * (end - start - 1);
            if with > saved {
                (saved, group, shared) = (with, start..end, common);
            }
        }
        best.push((saved, group, shared));
    }
    let mut groups = Vec::new();
    let mut end = rows.len();
    while end > 0 {
        let (_, group, shared) = best[end].clone();
        end = group.start;
        groups.push((group, shared));
    }
    groups.reverse();
    groups
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rows of a prompt, which is not trained, and an answer.
    fn batch(rows: &[(&[u32], &[u32])]) -> MicroBatch {
        let mut batch = MicroBatch::default();
        for (prompt, answer) in rows {
            let tokens = [*prompt, *answer].concat();
            let target = |i: usize| match tokens.get(i + 1) {
                Some(&next) if i + 1 >= prompt.len() => next,
                _ => IGNORE,
            };
            batch.targets.extend((0..tokens.len()).map(target));
            batch.row_lengths.push(tokens.len());
            batch.tokens.extend(tokens);
        }
        batch
    }

    fn count(from: u32, len: u32) -> Vec<u32> {
        (from..from + len).collect()
    }

    /// A row's tokens, and what is predicted at which of them.
    type Plain = (Vec<u32>, Vec<(usize, u32)>);

    /// Each row, whoever shares its tokens.
    fn unpacked(packed: &Packed) -> Vec<Plain> {
        let starts: Vec<usize> =
            packed.rows.iter().scan(0, |next, row| Some(std::mem::replace(next, *next + row.len))).collect();
        let prefixes: Vec<usize> = packed.rows.iter().filter_map(|row| row.prefix).collect();
        let tokens = |row: usize| &packed.tokens[starts[row]..starts[row] + packed.rows[row].len];
        let rows = packed.rows.iter().enumerate().filter(|(i, _)| !prefixes.contains(i));
        let mut rows: Vec<_> = rows
            .map(|(i, row)| {
                let prefix = row.prefix.map(tokens).unwrap_or_default();
                let trained = packed.trained.iter().zip(&packed.targets);
                let own = trained.filter_map(|(&at, &target)| {
                    let at = (at as usize).checked_sub(starts[i]).filter(|&at| at < row.len)?;
                    Some((at + prefix.len(), target))
                });
                ([prefix, tokens(i)].concat(), own.collect())
            })
            .collect();
        rows.sort();
        rows
    }

    #[test]
    fn a_system_prompt_is_there_once() {
        let system = count(100, 30);
        let [a, b] = [[system.clone(), count(1, 9)].concat(), [system.clone(), count(11, 5)].concat()];
        let batch = batch(&[(&a, &[1, 2]), (&count(500, 20), &[3]), (&b, &[4])]);
        let packed = Packed::sharing(&batch);
        let row = |len, prefix| Row { len, prefix };
        assert_eq!(packed.rows, [row(30, None), row(11, Some(0)), row(6, Some(0)), row(21, None)]);
        assert_eq!(unpacked(&packed), unpacked(&Packed::whole(&batch)));
    }

    #[test]
    fn what_is_trained_is_not_shared_nor_is_a_whole_row() {
        let system = count(100, 30);
        let trained = batch(&[(&[1], &system), (&[1], &system)]);
        assert_eq!(Packed::sharing(&trained).rows, [Row::new(31), Row::new(31)]);
        let same = batch(&[(&system, &[]), (&system, &[])]);
        assert_eq!(Packed::sharing(&same).rows.iter().map(|row| row.len).collect::<Vec<_>>(), [29, 1, 1]);
    }

    #[test]
    fn rows_are_grouped_so_that_the_most_tokens_are_saved() {
        let grouped = |lengths: &[u32]| {
            let prompts: Vec<Vec<u32>> = lengths.iter().map(|&len| count(100, len)).collect();
            let rows: Vec<_> = prompts.iter().map(|prompt| (prompt.as_slice(), &[7u32][..])).collect();
            Packed::sharing(&batch(&rows)).rows.iter().map(|row| (row.len, row.prefix)).collect::<Vec<_>>()
        };
        let three = [(59, None), (2, Some(1)), (2, Some(1)), (2, Some(1))];
        assert_eq!(grouped(&[60, 60, 20, 60]), [&[(21, None)], &three[..]].concat());
        assert_eq!(grouped(&[60, 20, 20, 20])[0], (19, None), "all four");
        assert_eq!(grouped(&[10, 10]), [(11, None), (11, None)], "too few to be worth it");
    }

    proptest::proptest! {
        #[test]
        fn no_token_and_no_target_is_lost(
            rows in proptest::collection::vec((0u32..3, 0u32..40, proptest::collection::vec(0u32..9, 1..9)), 1..9)
        ) {
            let prompts: Vec<Vec<u32>> = rows.iter().map(|(kind, len, _)| count(100 * kind, *len)).collect();
            let rows: Vec<_> = prompts.iter().zip(&rows).map(|(p, (_, _, a))| (p.as_slice(), a.as_slice())).collect();
            let batch = batch(&rows);
            let (packed, whole) = (Packed::sharing(&batch), Packed::whole(&batch));
            proptest::prop_assert_eq!(unpacked(&packed), unpacked(&whole));
            proptest::prop_assert!(packed.tokens.len() <= whole.tokens.len());
        }
    }
}
