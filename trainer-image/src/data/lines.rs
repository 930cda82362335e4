//! JSON Lines. A row's number is its line's, so that an editor finds it.

use std::io::{BufRead, BufReader, Read};

use serde_json::Value;

use super::container::{BadRow, Columns};

/// Longest line that is read, in bytes. A longer one is a file of another format.
const MAX_LINE_BYTES: u64 = 32 << 20;

/// Reads one JSON object a line; blank lines are skipped.
pub(super) struct Lines {
    reader: BufReader<Box<dyn Read>>,
    row: u64,
}

impl Lines {
    /// Lines of what `reader` gives.
    pub fn new(reader: impl Read + 'static) -> Self {
        Self { reader: BufReader::with_capacity(1 << 16, Box::new(reader)), row: 0 }
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
            let bad = |problem| BadRow { row: self.row, problem };
            let read = (&mut self.reader).take(MAX_LINE_BYTES + 1).read_until(b'\n', &mut line);
            match read {
                Ok(0) => return Ok(None),
                Ok(_) => {}
                Err(error) => return Err(bad(format!("can't be read: {error}; is the file whole? upload it again"))),
            }
            if let Some(columns) = parse(&line).map_err(bad)? {
                return Ok(Some((self.row, columns)));
            }
        }
    }
}

/// The object on a line; none on a blank one.
fn parse(line: &[u8]) -> Result<Option<Columns>, String> {
    if line.len() as u64 > MAX_LINE_BYTES {
        return Err(format!("longer than {} MiB; is this JSON Lines, one row a line?", MAX_LINE_BYTES >> 20));
    }
    let text = std::str::from_utf8(line)
        .map_err(|error| format!("not UTF-8 at byte {}; save the file as UTF-8", error.valid_up_to() + 1))?;
    let text = text.trim_start_matches('\u{feff}').trim();
    if text.is_empty() {
        return Ok(None);
    }
    if text.starts_with('[') {
        return Err("not a JSON object but a list; write one row a line, e.g. with jq -c '.[]'".into());
    }
    match serde_json::from_str(text) {
        Ok(Value::Object(columns)) => Ok(Some(columns)),
        Ok(_) => Err("not a JSON object".into()),
        Err(error) => Err(format!("not valid JSON: {error}")),
    }
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
        huge.resize((MAX_LINE_BYTES + 10) as usize, b'a');
        let error = read(&huge).unwrap_err();
        assert!(error.row == 1 && error.problem.contains("longer than 32 MiB"), "{error:?}");
    }

    #[test]
    fn a_list_of_rows_is_told_how_to_become_lines() {
        let error = read(b"[\n  {\"text\": \"a\"}\n]").unwrap_err();
        assert!(error.row == 1 && error.problem.contains("jq -c '.[]'"), "{error:?}");
    }
}
