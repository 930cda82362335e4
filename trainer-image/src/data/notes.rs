//! What of the data was not used as it stands, and how often: the user must hear of it.

use std::collections::BTreeMap;

use super::bad_rows::shorten;

/// Sentences that are told apart. Names of columns come from the data, which may have any number of them.
const SENTENCES: usize = 256;
/// Counts all others.
const OTHERS: &str = "other columns and fields are not used";

/// Lines of a summary.
const SUMMARY_LINES: usize = 8;
/// Bytes of its line in a report.
const SUMMARY_BYTES: usize = 200;

/// Sentences about rows, each with the number of rows that it is true of, and about the settings that all rows share.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Notes(BTreeMap<String, u64>);

impl Notes {
    /// Counts a row that this sentence is true of.
    pub fn add(&mut self, sentence: impl Into<String>) {
        self.count(sentence.into(), 1);
    }

    /// Keeps a sentence that is about no row in particular.
    pub fn remark(&mut self, sentence: impl Into<String>) {
        self.count(sentence.into(), 0);
    }

    /// Counts all that `other` has counted.
    pub fn extend(&mut self, other: Self) {
        other.0.into_iter().for_each(|(sentence, rows)| self.count(sentence, rows));
    }

    fn count(&mut self, sentence: String, rows: u64) {
        let is_new = !self.0.contains_key(&sentence);
        let sentence = if is_new && self.0.len() >= SENTENCES { OTHERS.to_owned() } else { sentence };
        let counted = self.0.entry(sentence).or_default();
        *counted = counted.saturating_add(rows);
    }

    /// Whether nothing was counted.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// A line for each sentence, with its count: `column "source" is not used (12 rows)`.
    pub fn lines(&self) -> Vec<String> {
        let line = |(sentence, rows): (&String, &u64)| match rows {
            0 => sentence.clone(),
            1 => format!("{sentence} (1 row)"),
            rows => format!("{sentence} ({rows} rows)"),
        };
        self.0.iter().map(line).collect()
    }

    /// The first lines, short enough for a report.
    pub fn summary(&self) -> Vec<String> {
        let lines = self.lines();
        let more = lines.len().saturating_sub(SUMMARY_LINES);
        let mut summary: Vec<String> =
            lines.iter().take(SUMMARY_LINES).map(|line| shorten(line, SUMMARY_BYTES)).collect();
        if more > 0 {
            summary.push(format!("and {more} more"));
        }
        summary
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
        notes.remark("c");
        assert_eq!(notes.lines()[2], "c");
    }

    #[test]
    fn any_number_of_sentences_takes_bounded_room() {
        let mut notes = Notes::default();
        (0..2 * SENTENCES).for_each(|i| notes.add(format!("column {i:06} {}", "é".repeat(500))));
        assert_eq!(notes.lines().len(), SENTENCES + 1);
        assert_eq!(notes.lines().last().map(String::as_str), Some("other columns and fields are not used (256 rows)"));
        let summary = notes.summary();
        assert_eq!((summary.len(), summary[8].as_str()), (9, "and 249 more"));
        assert!(summary.iter().all(|line| line.len() <= SUMMARY_BYTES));
    }
}
