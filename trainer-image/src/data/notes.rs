//! What of the data was not used as it stands, and how often: the user must hear of it.

use std::collections::BTreeMap;

/// Sentences about rows, each with the number of rows that it is true of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Notes(BTreeMap<String, u64>);

impl Notes {
    /// Counts a row that this sentence is true of.
    pub fn add(&mut self, sentence: impl Into<String>) {
        *self.0.entry(sentence.into()).or_default() += 1;
    }

    /// Counts all that `other` has counted.
    pub fn extend(&mut self, other: Self) {
        for (sentence, rows) in other.0 {
            *self.0.entry(sentence).or_default() += rows;
        }
    }

    /// A line for each sentence, with its count: `column "source" is not used (12 rows)`.
    pub fn lines(&self) -> Vec<String> {
        let line = |(sentence, rows): (&String, &u64)| match rows {
            1 => format!("{sentence} (1 row)"),
            rows => format!("{sentence} ({rows} rows)"),
        };
        self.0.iter().map(line).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_sentence_is_told_once_with_its_count() {
        let mut notes = Notes::default();
        ["a", "b", "a"].into_iter().for_each(|sentence| notes.add(sentence));
        assert_eq!(notes.lines(), ["a (2 rows)", "b (1 row)"]);
        notes.extend(notes.clone());
        assert_eq!(notes.lines(), ["a (4 rows)", "b (2 rows)"]);
    }
}
