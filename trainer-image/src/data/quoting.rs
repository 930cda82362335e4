//! Quotes of CSV. A field in quotes ends with its quote (RFC 4180); the reader would take what follows as part of it and
//! drop the quotes, so that `"Yes" he said` became `Yes he said`.

use std::{cell::RefCell, collections::VecDeque, rc::Rc};

/// Lines on which a field goes on after its closing quote, in order.
pub(super) type BadLines = Rc<RefCell<VecDeque<u64>>>;

/// Follows a file byte by byte.
pub(super) struct Quoting {
    delimiter: u8,
    state: State,
    line: u64,
    bad: BadLines,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    FieldStart,
    Plain,
    Quoted,
    /// After a quote inside quotes: the end of the field, or half of a quote.
    AfterQuote,
}

impl Quoting {
    /// At the beginning of a file; writes to `bad`.
    pub fn new(delimiter: u8, bad: BadLines) -> Self {
        Self { delimiter, state: State::FieldStart, line: 1, bad }
    }

    /// Reads on.
    pub fn read(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.state = match (self.state, byte) {
                // A byte-order mark.
                (State::FieldStart, 0xef | 0xbb | 0xbf) if self.line == 1 => State::FieldStart,
                (State::FieldStart | State::AfterQuote, b'"') => State::Quoted,
                (State::Quoted, b'"') => State::AfterQuote,
                (State::Quoted, _) => State::Quoted,
                (_, b'\n') => State::FieldStart,
                (_, byte) if byte == self.delimiter => State::FieldStart,
                (State::AfterQuote, b'\r') => State::AfterQuote,
                (State::AfterQuote, _) => {
                    self.bad.borrow_mut().push_back(self.line);
                    State::Plain
                }
                _ => State::Plain,
            };
            self.line += u64::from(byte == b'\n');
        }
    }
}

/// Whether one of these lines is bad. Lines before them are forgotten.
pub(super) fn has_bad(bad: &BadLines, lines: std::ops::Range<u64>) -> bool {
    let mut bad = bad.borrow_mut();
    let mut found = false;
    while let Some(line) = bad.pop_front_if(|line| *line < lines.end) {
        found |= line >= lines.start;
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_that_goes_on_after_its_quote_is_found_by_its_line() {
        let bad = BadLines::default();
        let text = "\u{feff}\"a\",b\r\n\"x\"\"y\",\"1\n2\"\r\n\"Yes\" he said,c\nno \"quote\",d\n\"\",\"e\" \n";
        let mut quoting = Quoting::new(b',', Rc::clone(&bad));
        text.as_bytes().chunks(3).for_each(|chunk| quoting.read(chunk));
        assert_eq!(bad.borrow().iter().copied().collect::<Vec<_>>(), [4, 6]);
        assert!(!has_bad(&bad, 2..4) && has_bad(&bad, 4..5) && !has_bad(&bad, 5..6) && has_bad(&bad, 6..7));
    }
}
