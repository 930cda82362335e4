//! Rows of one data file after the other, whatever its container and format, and what can be wrong with them.

use std::path::{Path, PathBuf};

use tunesmith_crds::{fine_tune_job::DataFormat, names::exit_code};

use super::{
    container::{BadRow, Container},
    formats::{Row, detect, parse},
};

/// Why data can't be used.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// A file can't be opened.
    #[error("{file}: {problem}")]
    Unreadable {
        /// Name of the file.
        file: String,
        /// Why.
        problem: String,
    },
    /// There is no row.
    #[error("{file} has no rows: it must hold one JSON object a line, or be a Parquet file with rows")]
    Empty {
        /// Name of the file.
        file: String,
    },
    /// A row can't be used.
    #[error("{file} row {row}: {problem}")]
    Row {
        /// Name of the file.
        file: String,
        /// Number of the line (of the row in Parquet), from 1.
        row: u64,
        /// What is wrong with which field, and what to do.
        problem: String,
    },
    /// Overflow Drop leaves nothing.
    #[error(
        "{file}: all {rows} rows are longer than training.maxLength ({max_length}) and dropped; raise it, or set \
         training.overflow to Truncate"
    )]
    AllDropped {
        /// Name of the file.
        file: String,
        /// Its rows.
        rows: u64,
        /// Tokens of a row at most.
        max_length: usize,
    },
    /// Too few rows to hold some out.
    #[error("{file} has {rows} row: evalFraction needs at least 2, or give eval.uri")]
    NothingToHoldOut {
        /// Name of the file.
        file: String,
        /// Its rows.
        rows: usize,
    },
    /// Encoded rows can't be kept.
    #[error(
        "{}: {source}; encoded rows are kept in this folder, about 4 bytes a token: it must be writable and have room \
         (--work-dir)",
        folder.display()
    )]
    Disk {
        /// The work folder.
        folder: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

impl DataError {
    /// One of [`exit_code`]: another try helps only against a failing disk.
    pub fn exit_code(&self) -> i32 {
        match self {
            Self::Disk { .. } => exit_code::STORAGE,
            _ => exit_code::BAD_INPUT,
        }
    }
}

/// A file of rows on this machine.
#[derive(Clone, Debug)]
pub struct DataFile {
    /// Where it is.
    pub path: PathBuf,
    /// What messages call it.
    pub name: String,
}

impl DataFile {
    /// A file that is called as on disk.
    pub fn new(path: &Path) -> Self {
        let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
        Self { path: path.to_owned(), name }
    }
}

/// Reads the rows of a file one after the other.
pub struct Reader<'a> {
    file: &'a DataFile,
    container: Container,
    format: DataFormat,
}

impl<'a> Reader<'a> {
    /// Opens a file.
    ///
    /// # Errors
    /// It can't be read.
    pub fn open(file: &'a DataFile, format: DataFormat) -> Result<Self, DataError> {
        let unreadable = |problem| DataError::Unreadable { file: file.name.clone(), problem };
        Ok(Self { file, container: Container::open(&file.path).map_err(unreadable)?, format })
    }

    /// The next row and its number.
    ///
    /// # Errors
    /// It is no row of the format.
    pub fn next_row(&mut self) -> Result<Option<(u64, Row)>, DataError> {
        let next = self.container.next_row();
        let next = next.map_err(|BadRow { row, problem }| self.error(row, problem))?;
        let Some((number, columns)) = next else { return Ok(None) };
        if self.format == DataFormat::Auto {
            self.format = detect(&columns).map_err(|problem| self.error(number, problem))?;
        }
        let row = parse(self.format, &columns).map_err(|problem| self.error(number, problem))?;
        Ok(Some((number, row)))
    }

    /// An error about a row of this file.
    pub fn error(&self, row: u64, problem: String) -> DataError {
        DataError::Row { file: self.file.name.clone(), row, problem }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use ::parquet::basic::Compression;
    use flate2::write::GzEncoder;

    use super::{super::parquet::tests as tables, *};

    fn read_file(path: &Path) -> Result<Vec<(u64, Row)>, String> {
        let file = DataFile::new(path);
        let mut reader = Reader::open(&file, DataFormat::Auto).map_err(|error| error.to_string())?;
        let mut rows = Vec::new();
        while let Some(row) = reader.next_row().map_err(|error| error.to_string())? {
            rows.push(row);
        }
        Ok(rows)
    }

    fn read(name: &str, content: &[u8]) -> Result<Vec<(u64, Row)>, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, content).unwrap();
        read_file(&path)
    }

    fn gzip(content: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), flate2::Compression::default());
        encoder.write_all(content).unwrap();
        encoder.finish().unwrap()
    }

    const TWO_ROWS: &[u8] = b"{\"text\": \"a\"}\n{\"text\": \"b\"}\n";

    #[test]
    fn a_bad_row_is_named_with_file_row_and_field() {
        let good = br#"{"messages": [{"role": "user", "content": "hi"}]}"#;
        for (bad, expected) in [
            (&br#"{"messages": [{"role": "user"}]}"#[..], "messages[0].content is missing"),
            (br#"{"text": "a"}"#, "messages is missing"),
            (br#"{"messages": ["#, "not valid JSON"),
            (b"[1]", "not a JSON object"),
            (b"{\"text\": \"\xff\"}", "not UTF-8 at byte 11"),
        ] {
            let error = read("train.jsonl", &[good, &b"\n"[..], bad].concat()).unwrap_err();
            assert!(error.starts_with("train.jsonl row 2: ") && error.contains(expected), "{error}");
        }
    }

    #[test]
    fn compressed_lines_are_told_by_their_first_bytes_whatever_the_name() {
        let expected = read("train.jsonl", TWO_ROWS).unwrap();
        assert_eq!(expected.len(), 2);
        // Concatenated parts, as `cat a.gz b.gz` makes them.
        let (first, second) = TWO_ROWS.split_at(14);
        for name in ["train.jsonl.gz", "train.jsonl"] {
            assert_eq!(read(name, &gzip(TWO_ROWS)).unwrap(), expected);
            assert_eq!(read(name, &[gzip(first), gzip(second)].concat()).unwrap(), expected);
            assert_eq!(read(name, &zstd::encode_all(TWO_ROWS, 3).unwrap()).unwrap(), expected);
        }
        assert_eq!(read("train.jsonl.gz", TWO_ROWS).unwrap(), expected, "plain, but for its name");
    }

    #[test]
    fn a_compressed_file_that_was_cut_short_names_the_row_where_it_ends() {
        let rows: String = (0_u64..2000).map(|i| format!("{{\"text\": \"row {i} {}\"}}\n", i * i * i)).collect();
        for whole in [gzip(rows.as_bytes()), zstd::encode_all(rows.as_bytes(), 3).unwrap()] {
            let error = read("train.jsonl.gz", &whole[..whole.len() / 2]).unwrap_err();
            assert!(error.starts_with("train.jsonl.gz row ") && error.contains("is the file whole?"), "{error}");
        }
    }

    #[test]
    fn a_bad_row_of_a_table_is_named_with_file_row_and_field() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("train.parquet");
        let roles = (&["user", "bot"][..], &[4, 4][..], &[0, 0][..]);
        let contents = (&["a", "b"][..], &[4, 4][..], &[0, 0][..]);
        tables::write(&path, tables::MESSAGES, Compression::SNAPPY, &[roles, contents]);
        let error = read_file(&path).unwrap_err();
        assert!(error.starts_with("train.parquet row 2: messages[0].role is \"bot\""), "{error}");
        let schema = "message schema { required binary question (STRING); }";
        tables::write(&path, schema, Compression::SNAPPY, &[(&["a"][..], &[][..], &[][..])]);
        let error = read_file(&path).unwrap_err();
        assert!(error.starts_with("train.parquet row 1: its columns are [question]"), "{error}");
    }

    #[test]
    fn a_file_of_another_kind_is_named() {
        let error = read("train.jsonl", b"PK\x03\x04rest").unwrap_err();
        assert!(error.starts_with("train.jsonl: it is a zip archive; use JSON Lines"), "{error}");
        assert!(read("train.parquet", b"PAR1").unwrap_err().starts_with("train.parquet: not a whole Parquet file"));
    }
}
