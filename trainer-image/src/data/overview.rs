//! What preflight shows of the data: how many rows and tokens there are, how long rows are, and what of the first one is
//! trained.

use std::{ffi::OsStr, fmt::Write, io::IsTerminal};

use tunesmith_engine::IGNORE;

use super::{DataError, Example, Rows, notes::Notes, vocabulary::Vocabulary};

/// Rows and tokens of the training or the evaluation data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Rows that are used.
    pub rows: u64,
    /// Their tokens.
    pub tokens: u64,
    /// Tokens that the loss is taken over.
    pub trained_tokens: u64,
    /// Rows that have lost their end.
    pub truncated_rows: u64,
    /// Rows that are too long and were left out.
    pub dropped_rows: u64,
    /// Rows that can't be used and were left out.
    pub skipped_rows: u64,
}

impl Totals {
    fn of(rows: &Rows) -> Result<Self, DataError> {
        let mut totals = Self { dropped_rows: rows.dropped(), skipped_rows: rows.skipped(), ..Self::default() };
        for entry in rows.entries() {
            let entry = entry?;
            totals.rows += 1;
            totals.tokens += u64::from(entry.length);
            totals.trained_tokens += u64::from(entry.trained);
            totals.truncated_rows += u64::from(entry.truncated);
        }
        Ok(totals)
    }
}

/// A run of tokens that are all trained, or all not.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Piece {
    text: String,
    trained: bool,
}

/// The data at a glance.
pub struct Overview {
    /// Rows to train on.
    pub train: Totals,
    /// Rows to evaluate on.
    pub eval: Totals,
    /// What of both was not used as it stands.
    pub notes: Notes,
    histogram: Histogram,
    first: Vec<Piece>,
    first_name: String,
}

impl Overview {
    /// Counts rows and tokens, and reads the first training row back as text.
    ///
    /// # Errors
    /// The disk that the rows are on fails.
    pub fn new(train: &Rows, eval: &Rows, vocabulary: &Vocabulary) -> Result<Self, DataError> {
        let mut notes = train.notes().clone();
        notes.extend(eval.notes().clone());
        vocabulary.warnings().into_iter().for_each(|warning| notes.remark(warning));
        Ok(Self {
            notes,
            train: Totals::of(train)?,
            eval: Totals::of(eval)?,
            histogram: Histogram::new(train.lengths()),
            first: pieces(&train.example(0)?, vocabulary),
            first_name: train.describe(&[0])?,
        })
    }

    /// Writes the totals to the log.
    pub fn log(&self) {
        for (data, totals) in [("train", self.train), ("eval", self.eval)] {
            let Totals { rows, tokens, trained_tokens, truncated_rows, dropped_rows, skipped_rows } = totals;
            tracing::info!(
                data,
                rows,
                tokens,
                trained_tokens,
                truncated_rows,
                dropped_rows,
                skipped_rows,
                "encoded all rows"
            );
        }
        self.notes.lines().iter().for_each(|note| tracing::warn!("{note}"));
    }

    /// A page for people.
    pub fn page(&self, marking: Marking) -> String {
        let [rows, tokens, trained, truncated, dropped, skipped] =
            ["rows", "tokens", "trained", "truncated", "dropped", "skipped"];
        let mut page =
            format!("{:8}{rows:>12}{tokens:>14}{trained:>14}{truncated:>12}{dropped:>12}{skipped:>12}\n", "");
        for (name, totals) in [("train", self.train), ("eval", self.eval)] {
            let Totals { rows, tokens, trained_tokens, truncated_rows, dropped_rows, skipped_rows } = totals;
            // Writing to a string can't fail.
            let _ = writeln!(
                page,
                "{name:8}{rows:>12}{tokens:>14}{trained_tokens:>14}{truncated_rows:>12}{dropped_rows:>12}{skipped_rows:>12}"
            );
        }
        if !self.notes.is_empty() {
            let _ = write!(page, "\nnot used as it stands\n");
            self.notes.lines().iter().for_each(|note| page.push_str(&format!("  {}\n", shorten(note))));
        }
        let _ = write!(page, "\ntokens of a training row\n{}", self.histogram.bars());
        let _ = write!(page, "\n{}, {}:\n{}", self.first_name, marking.legend(), marking.mark(&self.first));
        page
    }
}

/// Text of an example's tokens. Decoded from the beginning each time, as tokens apart may read differently.
fn pieces(example: &Example, vocabulary: &Vocabulary) -> Vec<Piece> {
    let Example { tokens, targets, .. } = example;
    let is_trained = |i: usize| i > 0 && targets[i - 1] != IGNORE;
    let ends = (1..=tokens.len()).filter(|&end| end == tokens.len() || is_trained(end) != is_trained(end - 1));
    let mut pieces = Vec::new();
    let (mut start, mut before) = (0, String::new());
    for end in ends {
        let whole = vocabulary.decode_with_specials(&tokens[..end]).unwrap_or_default();
        let text = match whole.strip_prefix(&before) {
            Some(text) => text.to_owned(),
            // A character that the mask cuts in two.
            None => vocabulary.decode_with_specials(&tokens[start..end]).unwrap_or_default(),
        };
        pieces.push(Piece { text, trained: is_trained(start) });
        (start, before) = (end, whole);
    }
    pieces
}

/// How trained tokens are told from the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Marking {
    /// Green, and the others dim.
    Colours,
    /// Between ⟦ and ⟧.
    Brackets,
}

/// Characters of a piece that are shown at its beginning and at its end.
const SHOWN: (usize, usize) = (400, 200);

impl Marking {
    /// What suits standard output: colours in a terminal, unless `NO_COLOR` is set (<https://no-color.org>).
    pub fn of_standard_output() -> Self {
        Self::new(std::io::stdout().is_terminal(), std::env::var_os("NO_COLOR").as_deref())
    }

    fn new(is_terminal: bool, no_color: Option<&OsStr>) -> Self {
        match is_terminal && no_color.is_none_or(OsStr::is_empty) {
            true => Self::Colours,
            false => Self::Brackets,
        }
    }

    fn legend(self) -> &'static str {
        match self {
            Self::Colours => "what is trained in \x1b[32mgreen\x1b[0m",
            Self::Brackets => "what is trained between ⟦ and ⟧",
        }
    }

    fn mark(self, pieces: &[Piece]) -> String {
        let mark = |piece: &Piece| {
            let text = shorten(&piece.text);
            match (self, piece.trained) {
                (Self::Colours, true) => format!("\x1b[32m{text}\x1b[0m"),
                (Self::Colours, false) => format!("\x1b[2m{text}\x1b[0m"),
                (Self::Brackets, true) => format!("⟦{text}⟧"),
                (Self::Brackets, false) => text,
            }
        };
        pieces.iter().map(mark).collect()
    }
}

/// A text without its middle where it is long, and without what would steer a terminal.
fn shorten(text: &str) -> String {
    let characters: Vec<char> = text.chars().collect();
    let (beginning, end) = SHOWN;
    let clean = |characters: &[char]| -> String {
        let clean = |&c: &char| if c.is_control() && c != '\n' && c != '\t' { char::REPLACEMENT_CHARACTER } else { c };
        characters.iter().map(clean).collect()
    };
    match characters.len().checked_sub(beginning + end) {
        None | Some(0) => clean(&characters),
        Some(left_out) => format!(
            "{}[… {left_out} characters …]{}",
            clean(&characters[..beginning]),
            clean(&characters[beginning + left_out..])
        ),
    }
}

/// How many rows have how many tokens.
struct Histogram {
    /// Tokens that a bar spans: the first one from 1 to this.
    width: u32,
    /// Rows of each bar.
    rows: Vec<u64>,
}

/// Bars of a histogram at most.
const BARS: u32 = 8;
/// Characters of the longest bar.
const BAR_WIDTH: u64 = 40;

impl Histogram {
    fn new(lengths: &[u32]) -> Self {
        let longest = lengths.iter().copied().max().unwrap_or(0).max(1);
        let width = longest.div_ceil(BARS).next_power_of_two();
        let mut rows = vec![0; longest.div_ceil(width) as usize];
        for length in lengths {
            rows[(length.saturating_sub(1) / width) as usize] += 1;
        }
        Self { width, rows }
    }

    fn bars(&self) -> String {
        let most = self.rows.iter().copied().max().unwrap_or(0).max(1);
        let bar = |(i, &rows): (usize, &u64)| {
            let last = (i as u64 + 1) * u64::from(self.width);
            let first = last + 1 - u64::from(self.width);
            // A bar that is not empty shows.
            let bar = "█".repeat((rows * BAR_WIDTH).div_ceil(most) as usize);
            format!("{first:>8} – {last:<8}{bar} {rows}\n")
        };
        self.rows.iter().enumerate().map(bar).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces() -> [Piece; 2] {
        [("asked ", false), ("answered", true)].map(|(text, trained)| Piece { text: text.into(), trained })
    }

    #[test]
    fn colours_are_for_terminals_that_want_them() {
        assert_eq!(Marking::new(true, None), Marking::Colours);
        assert_eq!(Marking::new(true, Some(OsStr::new(""))), Marking::Colours);
        assert_eq!(Marking::new(true, Some(OsStr::new("1"))), Marking::Brackets);
        assert_eq!(Marking::new(false, None), Marking::Brackets);
        assert_eq!(Marking::Colours.mark(&pieces()), "\x1b[2masked \x1b[0m\x1b[32manswered\x1b[0m");
        assert_eq!(Marking::Brackets.mark(&pieces()), "asked ⟦answered⟧");
    }

    #[test]
    fn a_long_text_loses_its_middle_and_no_text_steers_the_terminal() {
        let text = format!("{}{}", "a".repeat(1000), "z".repeat(200));
        let short = shorten(&text);
        assert!(short.starts_with("aaa") && short.ends_with("zzz"), "{short}");
        assert!(short.contains("[… 600 characters …]"), "{short}");
        assert_eq!(shorten("a\x1b[2Jb\n"), "a\u{fffd}[2Jb\n");
    }

    #[test]
    fn bars_are_as_long_as_there_are_rows() {
        let lengths: Vec<u32> = [vec![3; 80], vec![100; 20], vec![1000]].concat();
        let bars = Histogram::new(&lengths).bars();
        let lines: Vec<&str> = bars.lines().collect();
        assert_eq!(lines.len(), 8);
        let blocks = |line: &str| line.matches('█').count();
        assert_eq!(lines[0].trim(), format!("1 – 128     {} 100", "█".repeat(40)));
        assert_eq!((blocks(lines[1]), blocks(lines[7])), (0, 1));
        assert!(lines[7].contains("897 – 1024"), "{bars}");
        assert_eq!(Histogram::new(&[1]).rows, [1]);
    }
}
