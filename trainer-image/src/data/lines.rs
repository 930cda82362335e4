//! JSON Lines. A row's number is its line's, so that an editor finds it.

use std::io::{BufRead, BufReader, Read};

use serde_json::Value;

use super::{
    columns::{BadRow, Columns},
    json,
};

/// Longest row that is read, in bytes. A longer one is a file of another format.
pub(super) const MAX_ROW_BYTES: u64 = 32 << 20;

/// Reads one JSON object a line; blank lines are skipped.
pub(super) struct Lines {
    reader: BufReader<Box<dyn Read>>,
    row: u64,
    /// Whether a line that is not blank was read.
    has_begun: bool,
}

impl Lines {
    /// Lines of what `reader` gives.
    pub fn new(reader: impl Read + 'static) -> Self {
        Self { reader: BufReader::with_capacity(1 << 16, Box::new(reader)), row: 0, has_begun: false }
    }

    /// The next row's number and columns.
    ///
    /// # Errors
    /// The line is too long, not UTF-8 or no JSON object.
    pub fn next_row(&mut self) -> Result<Option<(u64, Columns)>, BadRow> {
        let mut line = Vec::new();
        loop {
            line.clear();
            self.row += 1;
            let row = self.row;
            let read = (&mut self.reader).take(MAX_ROW_BYTES + 1).read_until(b'\n', &mut line);
            match read {
                Ok(0) => return Ok(None),
                Ok(_) if line.len() as u64 > MAX_ROW_BYTES => {
                    let limit = MAX_ROW_BYTES >> 20;
                    return Err(BadRow::fatal(
                        row,
                        format!("longer than {limit} MiB; is this JSON Lines, one row a line?"),
                    ));
                }
                Ok(_) => {}
                Err(error) => {
                    return Err(BadRow::fatal(
                        row,
                        format!("can't be read: {error}; is the file whole? upload it again"),
                    ));
                }
            }
            let text = text(&line).map_err(|problem| BadRow::alone(row, problem))?;
            if !text.is_empty() {
                let is_first = !std::mem::replace(&mut self.has_begun, true);
                return parse(row, text, is_first).map(|columns| Some((row, columns)));
            }
        }
    }
}

/// A line's text, without white space around it.
fn text(line: &[u8]) -> Result<&str, String> {
    let text = std::str::from_utf8(line)
        .map_err(|error| format!("not UTF-8 at byte {}; save the file as UTF-8", error.valid_up_to() + 1))?;
    Ok(text.trim_start_matches('\u{feff}').trim())
}

/// The object on a line.
fn parse(row: u64, text: &str, is_first: bool) -> Result<Columns, BadRow> {
    if !text.starts_with('{') {
        return Err(BadRow::alone(row, not_an_object()));
    }
    match json::parse(text.as_bytes()) {
        Ok(Value::Object(columns)) => Ok(columns),
        Ok(_) => Err(BadRow::alone(row, not_an_object())),
        Err(error) if is_first && error.is_eof() && text.ends_with(['{', '[', ',']) => Err(BadRow::fatal(
            row,
            "a JSON object over several lines (pretty-printed): write one row a line, e.g. with jq -c ., or all rows as one \
             list [{…}, {…}]",
        )),
        Err(error) => Err(BadRow::alone(row, format!("not valid JSON: {error}"))),
    }
}

/// Says how rows are written.
pub(super) fn not_an_object() -> &'static str {
    "not a JSON object {…}: rows are objects, one a line or all in one list; CSV begins with a line of column names"
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(content: &[u8]) -> Result<Vec<(u64, Columns)>, BadRow> {
        let mut lines = Lines::new(std::io::Cursor::new(content.to_vec()));
        std::iter::from_fn(|| lines.next_row().transpose()).collect()
    }

    #[test]
    fn rows_are_numbered_by_line() {
        let rows = read(b"\xef\xbb\xbf{\"text\": \"a\"}\r\n\n{\"text\": \"b\"}").unwrap();
        assert_eq!(
            rows.iter().map(|(row, columns)| (*row, &columns["text"])).collect::<Vec<_>>(),
            [(1, &Value::from("a")), (3, &Value::from("b"))]
        );
    }

    #[test]
    fn a_line_that_never_ends_is_not_read_into_memory() {
        let mut huge = b"{\"text\": \"".to_vec();
        huge.resize((MAX_ROW_BYTES + 10) as usize, b'a');
        let error = read(&huge).unwrap_err();
        assert!(error.row == 1 && error.problem.contains("longer than 32 MiB") && error.is_fatal, "{error:?}");
    }

    #[test]
    fn an_object_over_several_lines_is_told_how_to_become_lines() {
        for content in [
            &b"{\n  \"text\": \"a\"\n}"[..],
            b"\n{\"messages\": [\n{}]}",
            b"{\"prompt\": \"a\",\n\"completion\": \"b\"}",
        ] {
            let error = read(content).unwrap_err();
            assert!(error.problem.contains("pretty-printed") && error.is_fatal, "{error:?}");
        }
    }

    #[test]
    fn a_line_that_is_no_object_is_one_bad_row() {
        for line in [&b"[1]"[..], b"{\"text\": ", b"text", b"\"a\"", b"\xff"] {
            let content = [b"{\"text\": \"a\"}\n", line].concat();
            let error = read(&content).unwrap_err();
            assert!(error.row == 2 && !error.is_fatal, "{error:?}");
        }
    }
}
