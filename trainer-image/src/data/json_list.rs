//! A JSON list of rows, read one by one: such files may be larger than memory. A row's number is its place in the list.

use std::io::{BufRead, BufReader, Read};

use serde_json::Value;

use super::{
    columns::{BadRow, Columns},
    json,
    lines::{MAX_ROW_BYTES, not_an_object},
};

/// Reads the objects of a list.
pub(super) struct JsonList {
    reader: BufReader<Box<dyn Read>>,
    row: u64,
    has_ended: bool,
}

impl JsonList {
    /// The list that `reader` gives.
    pub fn new(reader: impl Read + 'static) -> Self {
        Self { reader: BufReader::with_capacity(1 << 16, Box::new(reader)), row: 0, has_ended: false }
    }

    /// The next row's number and columns.
    ///
    /// # Errors
    /// It is no object, or the list is no list.
    pub fn next_row(&mut self) -> Result<Option<(u64, Columns)>, BadRow> {
        if self.has_ended {
            return Ok(None);
        }
        self.row += 1;
        let row = self.row;
        let element = self.element().map_err(|problem| BadRow::fatal(row, problem))?;
        let Some(element) = element else { return Ok(None) };
        match json::parse(&element) {
            Ok(Value::Object(columns)) => Ok(Some((row, columns))),
            Ok(_) => Err(BadRow::alone(row, not_an_object())),
            Err(error) if error.is_data() => Err(BadRow::alone(row, format!("not valid JSON: {error}"))),
            // A string without its end hides the rows after it, so nothing after an error can be trusted.
            Err(error) => Err(BadRow::fatal(row, format!("not valid JSON: {error}"))),
        }
    }

    /// The text of the next element; None at the end of the list.
    fn element(&mut self) -> Result<Option<Vec<u8>>, String> {
        let before = self.skip_space()?;
        let opens = self.row == 1;
        match (before, opens) {
            (Some(b'['), true) | (Some(b','), false) => self.advance(),
            (Some(b']'), false) => {
                self.advance();
                return self.end();
            }
            (Some(_), _) => return Err("no comma before it: is this one list of rows?".into()),
            (None, _) => return Err(CUT.into()),
        }
        match self.skip_space()? {
            Some(b']') if opens => {
                self.advance();
                self.end()
            }
            Some(b']') => Err("not valid JSON: the list ends with a comma".into()),
            Some(_) => self.value().map(Some),
            None => Err(CUT.into()),
        }
    }

    /// A value's text, up to the comma or bracket that ends it.
    fn value(&mut self) -> Result<Vec<u8>, String> {
        let mut value = Vec::new();
        let (mut depth, mut in_string, mut escaped) = (0_u64, false, false);
        loop {
            let buffer = self.reader.fill_buf().map_err(unreadable)?;
            if buffer.is_empty() {
                return Err(CUT.into());
            }
            let mut end = None;
            for (i, &byte) in buffer.iter().enumerate() {
                match byte {
                    _ if escaped => escaped = false,
                    b'\\' if in_string => escaped = true,
                    b'"' => in_string = !in_string,
                    _ if in_string => {}
                    b',' | b']' if depth == 0 => {
                        end = Some(i);
                        break;
                    }
                    b'{' | b'[' => depth += 1,
                    b'}' | b']' => depth = depth.saturating_sub(1),
                    _ => {}
                }
            }
            let taken = end.unwrap_or(buffer.len());
            value.extend_from_slice(&buffer[..taken]);
            self.reader.consume(taken);
            if value.len() as u64 > MAX_ROW_BYTES {
                return Err(format!("longer than {} MiB; is a bracket or quote never closed?", MAX_ROW_BYTES >> 20));
            }
            if end.is_some() {
                return Ok(value);
            }
        }
    }

    /// After the list there is nothing.
    fn end(&mut self) -> Result<Option<Vec<u8>>, String> {
        self.has_ended = true;
        match self.skip_space()? {
            None => Ok(None),
            Some(_) => Err("there is more after the end of the list; write one list, or one object a line".into()),
        }
    }

    /// The next byte that is no white space, which stays.
    fn skip_space(&mut self) -> Result<Option<u8>, String> {
        loop {
            let buffer = self.reader.fill_buf().map_err(unreadable)?;
            let length = buffer.len();
            // A byte-order mark begins the file or is an error of the row after it.
            let is_space = |byte: &u8| byte.is_ascii_whitespace() || (self.row == 1 && b"\xef\xbb\xbf".contains(byte));
            let found = buffer.iter().position(|byte| !is_space(byte));
            match found {
                Some(at) => {
                    let byte = buffer.get(at).copied();
                    self.reader.consume(at);
                    return Ok(byte);
                }
                None if length == 0 => return Ok(None),
                None => self.reader.consume(length),
            }
        }
    }

    fn advance(&mut self) {
        self.reader.consume(1);
    }
}

const CUT: &str = "the list does not end: is the file whole? upload it again";

fn unreadable(error: std::io::Error) -> String {
    format!("can't be read: {error}; is the file whole? upload it again")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(content: &[u8]) -> Result<Vec<(u64, Columns)>, BadRow> {
        let mut list = JsonList::new(std::io::Cursor::new(content.to_vec()));
        std::iter::from_fn(|| list.next_row().transpose()).collect()
    }

    #[test]
    fn rows_are_numbered_by_their_place_however_they_are_written() {
        let compact = br#"[{"text":"a, ]\"}"},{"text":"b"}]"#;
        let pretty = b"\xef\xbb\xbf\n[\n  {\n    \"text\": \"a, ]\\\"}\"\n  },\r\n  {\"text\": \"b\"}\n]\n";
        for content in [&compact[..], pretty] {
            let rows = read(content).unwrap();
            let texts: Vec<_> = rows.iter().map(|(row, columns)| (*row, columns["text"].as_str().unwrap())).collect();
            assert_eq!(texts, [(1, "a, ]\"}"), (2, "b")]);
        }
        assert!(read(b" [ ] ").unwrap().is_empty());
    }

    #[test]
    fn a_list_that_is_not_whole_names_the_row_where_it_ends() {
        for (content, row, problem) in [
            (&br#"[{"text": "a"}, {"text": "b""#[..], 2, "the list does not end"),
            (br#"[{"text": "a"}"#, 1, "the list does not end"),
            (b"[", 1, "the list does not end"),
            (br#"[{"text": "a"}, ]"#, 2, "ends with a comma"),
            (br#"[{"text": "a"} {"text": "b"}]"#, 1, "not valid JSON"),
            (br#"[{"text": "a"}]["#, 2, "more after the end"),
            (br#"[{"text" "a"}]"#, 1, "not valid JSON"),
        ] {
            let error = read(content).unwrap_err();
            assert!(error.row == row && error.problem.contains(problem) && error.is_fatal, "{error:?}");
        }
        let error = read(b"[{\"text\": \"a\"}, 4, {}]").unwrap_err();
        assert!(error.row == 2 && !error.is_fatal && error.problem.starts_with("not a JSON object"), "{error:?}");
    }

    #[test]
    fn a_row_that_never_ends_is_not_read_into_memory() {
        let mut huge = b"[{\"text\": \"".to_vec();
        huge.resize((MAX_ROW_BYTES + (1 << 17)) as usize, b'a');
        assert!(read(&huge).unwrap_err().problem.contains("longer than 32 MiB"));
    }
}
