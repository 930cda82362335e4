//! Rows that can't be used: the first ones by name, and how many there are.

use std::fmt;

/// Bad rows that are named.
const NAMED: usize = 10;
/// Bytes of a report that a bad row takes, so that all that are named fit into its 4,096.
const LINE_BYTES: usize = 330;

/// A bad row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bad {
    /// Name of its file.
    pub file: String,
    /// Its number.
    pub row: u64,
    /// What is wrong with which field, and what to do.
    pub problem: String,
}

impl fmt::Display for Bad {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { file, row, problem } = self;
        write!(f, "{file} row {row}: {problem}")
    }
}

/// The first bad rows, and their number.
#[derive(Debug, Default)]
pub struct BadRows {
    named: Vec<Bad>,
    count: u64,
}

impl BadRows {
    /// Counts a bad row.
    pub(super) fn add(&mut self, bad: Bad) {
        self.count += 1;
        if self.named.len() < NAMED {
            tracing::warn!(file = %bad.file, row = bad.row, problem = %bad.problem, "bad row");
            self.named.push(bad);
        }
    }
}

impl fmt::Display for BadRows {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lines: Vec<String> = self.named.iter().map(|bad| shorten(&bad.to_string(), LINE_BYTES)).collect();
        f.write_str(&lines.join("\n"))?;
        match self.count - self.named.len() as u64 {
            0 => Ok(()),
            more => write!(f, "\nand {more} more"),
        }
    }
}

impl BadRows {
    /// How many there are.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// The first one, if there is any.
    pub(super) fn into_first(self) -> Option<Bad> {
        self.named.into_iter().next()
    }
}

/// The beginning of a text that takes at most so many bytes as JSON.
pub(super) fn shorten(text: &str, bytes: usize) -> String {
    let escaped = |c: char| match c {
        '"' | '\\' | '\n' | '\r' | '\t' => 2,
        c if c.is_control() => 6,
        c => c.len_utf8(),
    };
    let mut room = bytes.saturating_sub('…'.len_utf8());
    let fits = text.char_indices().find(|(_, c)| match room.checked_sub(escaped(*c)) {
        Some(left) => {
            room = left;
            false
        }
        None => true,
    });
    match fits {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use tunesmith_crds::{
        fine_tune_job::OnBadRow,
        run::{MAX_REPORT_BYTES, Outcome, RunReport},
    };

    use super::*;

    fn bad_rows(count: u64, problem: &str) -> BadRows {
        let mut rows = BadRows::default();
        (1..=count).for_each(|row| rows.add(Bad { file: "a.jsonl".into(), row, problem: problem.into() }));
        rows
    }

    #[test]
    fn ten_bad_rows_are_named_and_all_are_counted() {
        let error = bad_rows(12, "text is empty").skipped(OnBadRow::Error, true).unwrap_err().to_string();
        assert!(error.starts_with("12 rows can't be used"), "{error}");
        assert!(error.contains("\na.jsonl row 1: text is empty\n") && error.contains("row 10:"), "{error}");
        assert!(!error.contains("row 11") && error.ends_with("and 2 more"), "{error}");
        let one = bad_rows(1, "text is empty").skipped(OnBadRow::Error, true).unwrap_err();
        assert_eq!(one.to_string(), "a.jsonl row 1: text is empty");
    }

    #[test]
    fn a_report_holds_ten_bad_rows_whatever_they_hold() {
        for problem in ["\u{1}".repeat(4000), "é\"☕".repeat(4000)] {
            let message = bad_rows(5000, &problem).skipped(OnBadRow::Error, true);
            let message = message.unwrap_err().to_string();
            let report = RunReport::new(Outcome::Failed { message: message.clone() });
            let text = report.to_termination_message();
            assert!(text.len() <= MAX_REPORT_BYTES, "{}", text.len());
            assert_eq!(RunReport::from_termination_message(&text).unwrap(), report);
        }
    }

    #[test]
    fn bad_rows_are_skipped_only_if_the_user_says_so_and_others_are_left() {
        assert_eq!(bad_rows(3, "").skipped(OnBadRow::Skip, true).unwrap(), 3);
        assert_eq!(bad_rows(0, "").skipped(OnBadRow::Error, false).unwrap(), 0);
        let error = bad_rows(3, "text is empty").skipped(OnBadRow::Skip, false).unwrap_err().to_string();
        assert!(error.starts_with("all 3 rows are bad") && error.contains("a.jsonl row 3: text is empty"), "{error}");
    }
}
