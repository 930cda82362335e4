//! CSV and TSV (RFC 4180), with a header of column names. A row's number is that of the line on which it begins.

use std::{
    cell::Cell,
    io::{self, Chain, Cursor, Read},
    rc::Rc,
};

use super::{
    columns::{BadRow, Columns, Wanted},
    lines::MAX_ROW_BYTES,
    quoting::{BadLines, Quoting, has_bad},
};
use csv::{ByteRecord, ReaderBuilder, Terminator};

/// Stands after the last row. Read as a row of its own, it shows that every quote was closed.
const END: &str = "\u{fdd0}";

/// Delimiters of columns; the first that fits is taken.
const DELIMITERS: [u8; 3] = [b',', b'\t', b';'];

/// The delimiter of a file that begins like this; None if it is no table.
pub(super) fn delimiter(head: &[u8], name: &str, wanted: &Wanted) -> Option<u8> {
    let known = |delimiter: u8| -> usize {
        let Some(header) = record_of(head, delimiter) else { return 0 };
        header
            .iter()
            .filter(|column| std::str::from_utf8(column).is_ok_and(|name| wanted.contains(name.trim())))
            .count()
    };
    let best = DELIMITERS
        .into_iter()
        .rev()
        .max_by_key(|&delimiter| known(delimiter))
        .filter(|&delimiter| known(delimiter) > 0);
    let name = name.to_ascii_lowercase();
    let name = name.strip_suffix(".gz").or_else(|| name.strip_suffix(".zst")).unwrap_or(&name);
    best.or_else(|| name.ends_with(".csv").then_some(b',')).or_else(|| name.ends_with(".tsv").then_some(b'\t'))
}

fn record_of(head: &[u8], delimiter: u8) -> Option<ByteRecord> {
    let mut header = ByteRecord::new();
    let mut reader = ReaderBuilder::new().has_headers(false).delimiter(delimiter).from_reader(head);
    reader.read_byte_record(&mut header).ok()?.then_some(header)
}

/// Reads a table.
pub(super) struct Delimited {
    reader: csv::Reader<Limited>,
    header: Vec<String>,
    left: Rc<Cell<u64>>,
    bad_quotes: BadLines,
    record: ByteRecord,
    has_ended: bool,
}

impl Delimited {
    /// The table that `reader` gives.
    ///
    /// # Errors
    /// Its header can't be read, or names a column twice.
    pub fn new(reader: impl Read + 'static, delimiter: u8) -> Result<Self, String> {
        let left = Rc::new(Cell::new(MAX_ROW_BYTES));
        let end = Cursor::new(format!("\n{END}\n").into_bytes());
        let bad_quotes = BadLines::default();
        let reader = Limited {
            inner: (Box::new(reader) as Box<dyn Read>).chain(end),
            left: Rc::clone(&left),
            quoting: Quoting::new(delimiter, Rc::clone(&bad_quotes)),
        };
        // A carriage return before the line break is taken off below: the reader would not count the line at it.
        let lines = Terminator::Any(b'\n');
        let mut reader = ReaderBuilder::new().delimiter(delimiter).terminator(lines).from_reader(reader);
        let names = reader.headers().map_err(|error| problem(&error))?;
        let header: Vec<String> =
            names.iter().map(|name| name.trim_start_matches('\u{feff}').trim().to_owned()).collect();
        if header.iter().any(|name| name.contains(END)) {
            return Err("a quote in its header is never closed".into());
        }
        if has_bad(&bad_quotes, 1..reader.position().line()) {
            return Err(format!("its header: {AFTER_QUOTE}"));
        }
        let twice = header.iter().enumerate().find(|(i, name)| !name.is_empty() && header[..*i].contains(name));
        match twice {
            Some((_, name)) => Err(format!("its header names the column {name:?} twice")),
            None => Ok(Self { reader, header, left, bad_quotes, record: ByteRecord::new(), has_ended: false }),
        }
    }

    /// The next row's number and columns; an empty field is none.
    ///
    /// # Errors
    /// It has more or fewer fields than the header, or is not UTF-8.
    pub fn next_row(&mut self) -> Result<Option<(u64, Columns)>, BadRow> {
        if self.has_ended {
            return Ok(None);
        }
        loop {
            self.left.set(MAX_ROW_BYTES);
            let read = self.reader.read_byte_record(&mut self.record);
            match read {
                Ok(false) => return Ok(None),
                Err(error) if matches!(error.kind(), csv::ErrorKind::Io(_)) => {
                    return Err(BadRow::fatal(self.first_line(0), problem(&error)));
                }
                _ if self.record.len() == 1 && self.record.get(0) == Some(b"\r") => {}
                _ if self.record.len() == 1 && self.record.get(0) == Some(END.as_bytes()) => {
                    self.has_ended = true;
                    return Ok(None);
                }
                _ if self
                    .record
                    .iter()
                    .next_back()
                    .is_some_and(|field| field.trim_ascii_end().ends_with(END.as_bytes())) =>
                {
                    let problem = "a quote is never closed, so that the rest of the file is one field";
                    return Err(BadRow::fatal(self.first_line(0), problem));
                }
                _ if has_bad(&self.bad_quotes, self.first_line(1)..self.reader.position().line()) => {
                    return Err(BadRow::alone(self.first_line(1), AFTER_QUOTE));
                }
                Err(error) => return Err(BadRow::alone(self.first_line(1), problem(&error))),
                Ok(true) => return self.columns(self.first_line(1)).map(Some),
            }
        }
    }

    /// The columns of the row that was read last, which begins on this line.
    fn columns(&self, line: u64) -> Result<(u64, Columns), BadRow> {
        let last = self.header.len().saturating_sub(1);
        let mut columns = Columns::new();
        for (i, (name, field)) in self.header.iter().zip(&self.record).enumerate() {
            let field = if i == last { field.strip_suffix(b"\r").unwrap_or(field) } else { field };
            let text = std::str::from_utf8(field)
                .map_err(|_| BadRow::alone(line, format!("{name} is not UTF-8; save the file as UTF-8")))?;
            if !text.is_empty() {
                columns.insert(name.clone(), text.into());
            }
        }
        Ok((line, columns))
    }

    /// The line on which the row that was read last begins: it ends with so many line breaks, and may hold others.
    fn first_line(&self, ends_with: u64) -> u64 {
        let breaks: usize = self.record.iter().map(|field| field.iter().filter(|&&byte| byte == b'\n').count()).sum();
        self.reader.position().line().saturating_sub(ends_with + breaks as u64)
    }
}

const AFTER_QUOTE: &str =
    "a field goes on after its closing quote; put all of it in quotes, and write its own quotes twice";

fn problem(error: &csv::Error) -> String {
    match error.kind() {
        csv::ErrorKind::UnequalLengths { expected_len, len, .. } => {
            format!("has {len} fields, and the header {expected_len}; is a text with commas or quotes not quoted?")
        }
        csv::ErrorKind::Utf8 { .. } => "its header is not UTF-8; save the file as UTF-8".into(),
        csv::ErrorKind::Io(error) => format!("can't be read: {error}; is the file whole? upload it again"),
        _ => error.to_string(),
    }
}

/// Gives no more than the longest row allows, as a quote that is never closed would read the whole file into memory.
struct Limited {
    inner: Chain<Box<dyn Read>, Cursor<Vec<u8>>>,
    left: Rc<Cell<u64>>,
    quoting: Quoting,
}

impl Read for Limited {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.quoting.read(buffer.get(..read).unwrap_or_default());
        match self.left.get().checked_sub(read as u64) {
            Some(left) => self.left.set(left),
            None => {
                let limit = MAX_ROW_BYTES >> 20;
                return Err(io::Error::other(format!("a row is longer than {limit} MiB: is a quote never closed?")));
            }
        }
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted() -> Wanted {
        ["text", "prompt", "completion"].map(str::to_owned).into()
    }

    fn read(content: &[u8]) -> Result<Vec<(u64, Columns)>, BadRow> {
        let delimiter = delimiter(content, "rows", &wanted()).unwrap();
        let mut rows =
            Delimited::new(Cursor::new(content.to_vec()), delimiter).map_err(|problem| BadRow::fatal(0, problem))?;
        std::iter::from_fn(|| rows.next_row().transpose()).collect()
    }

    fn row(number: u64, prompt: &str, completion: &str) -> (u64, Columns) {
        let columns = [("prompt", prompt), ("completion", completion)].map(|(name, text)| (name.into(), text.into()));
        (number, Columns::from_iter(columns))
    }

    #[test]
    fn rows_are_numbered_by_the_line_on_which_they_begin() {
        let content = "\u{feff}prompt,completion\r\na,\"b\n\"\"c\"\"\"\n\nd, e\n\"f,\",g";
        let rows = read(content.as_bytes()).unwrap();
        assert_eq!(rows, [row(2, "a", "b\n\"c\""), row(5, "d", " e"), row(6, "f,", "g")]);
        let rows = read(content.replace("\r\n", "\n").replace('\n', "\r\n").as_bytes()).unwrap();
        assert_eq!(rows, [row(2, "a", "b\r\n\"c\""), row(5, "d", " e"), row(6, "f,", "g")]);
        for delimiter in ["\t", ";"] {
            let rows = read(format!("prompt{delimiter}completion\na, x{delimiter}b\n").as_bytes()).unwrap();
            assert_eq!(rows, [row(2, "a, x", "b")]);
        }
    }

    #[test]
    fn an_empty_field_is_no_column() {
        let rows = read(b"prompt,completion,id\na,,7\n").unwrap();
        assert_eq!(rows[0].1.keys().collect::<Vec<_>>(), ["prompt", "id"]);
        assert!(read(b"text\n").unwrap().is_empty());
        assert_eq!(read(b"text\n\n\nabc").unwrap()[0].0, 4);
    }

    #[test]
    fn what_is_wrong_with_a_row_is_named_with_its_line() {
        for (content, line, problem, is_fatal) in [
            (&b"prompt,completion\na,b\nc,d,e\nf,g\n"[..], 3, "has 3 fields, and the header 2", false),
            (b"prompt,completion\na\n", 2, "has 1 fields, and the header 2", false),
            (b"prompt,completion\na,b\n\"c,d\ne,f\n", 3, "a quote is never closed", true),
            (b"prompt,completion\na,b\nc,\"d\n", 3, "a quote is never closed", true),
            (b"prompt,completion\na,b\n\"Yes\" he said,c\n", 3, "a field goes on after its closing quote", false),
            (b"prompt,completion\na,\xff\n", 2, "completion is not UTF-8", false),
            (b"text,text\na,b\n", 0, "names the column \"text\" twice", true),
        ] {
            let error = read(content).unwrap_err();
            assert_eq!((error.row, error.is_fatal), (line, is_fatal), "{error:?}");
            assert!(error.problem.contains(problem), "{error:?}");
        }
    }

    #[test]
    fn a_quote_that_is_never_closed_is_not_read_into_memory() {
        let mut huge = b"text\n\"".to_vec();
        huge.resize((MAX_ROW_BYTES + (1 << 20)) as usize, b'a');
        assert!(read(&huge).unwrap_err().problem.contains("longer than 32 MiB"));
    }

    #[test]
    fn a_table_is_told_by_its_header_or_its_name() {
        assert_eq!(delimiter(b"id,text\n1,a", "x", &wanted()), Some(b','));
        assert_eq!(delimiter(b"id\ttext, and more\ttext", "x", &wanted()), Some(b'\t'));
        assert_eq!(delimiter(b"question,answer\na,b", "x.CSV.gz", &wanted()), Some(b','));
        assert_eq!(delimiter(b"question\tanswer\na\tb", "x.tsv", &wanted()), Some(b'\t'));
        assert_eq!(delimiter(b"Once upon a time, there was a text", "x.txt", &wanted()), None);
    }
}
