//! What a data file is, by its first bytes: lines of JSON, plain or compressed, or Parquet. Names may lie.

use std::{
    fs::File,
    io::{BufReader, Read, Seek},
    path::Path,
};

use flate2::read::MultiGzDecoder;
use serde_json::{Map, Value};

use super::{lines::Lines, parquet::Table};

/// A row before anyone looked at what it holds: its columns.
pub(super) type Columns = Map<String, Value>;

/// A row that can't be read.
#[derive(Debug)]
pub(super) struct BadRow {
    /// Its number, from 1: of its line, or of the row in a table.
    pub row: u64,
    /// What is wrong with it.
    pub problem: String,
}

/// An open data file.
pub(super) enum Container {
    /// JSON Lines.
    Lines(Lines),
    /// Parquet.
    Table(Table),
}

/// Kinds of files that hold rows elsewhere, by their first bytes.
const REFUSED: [(&[u8], &str); 5] = [
    (b"PK\x03\x04", "a zip archive"),
    (b"BZh", "a bzip2 file"),
    (b"\xfd7zXZ", "an xz file"),
    (b"ARROW1", "an Arrow file"),
    (b"PARE", "an encrypted Parquet file"),
];

impl Container {
    /// Opens a file.
    ///
    /// # Errors
    /// It can't be read, or is of another kind.
    pub fn open(path: &Path) -> Result<Self, String> {
        let io = |error: std::io::Error| error.to_string();
        let mut file = File::open(path).map_err(io)?;
        let mut start = Vec::new();
        (&mut file).take(8).read_to_end(&mut start).map_err(io)?;
        file.rewind().map_err(io)?;
        if let Some((_, kind)) = REFUSED.iter().find(|(magic, _)| start.starts_with(magic)) {
            return Err(format!("it is {kind}; use JSON Lines (plain, gzip or zstd) or Parquet"));
        }
        let is = |magic: &[u8]| start.starts_with(magic);
        if is(b"PAR1") {
            return Table::open(file).map(Self::Table);
        }
        Ok(Self::Lines(if is(b"\x1f\x8b") {
            Lines::new(MultiGzDecoder::new(BufReader::new(file)))
        } else if is(b"\x28\xb5\x2f\xfd") {
            Lines::new(zstd::Decoder::new(file).map_err(io)?)
        } else {
            Lines::new(file)
        }))
    }

    /// The next row's number and columns.
    ///
    /// # Errors
    /// It can't be read.
    pub fn next_row(&mut self) -> Result<Option<(u64, Columns)>, BadRow> {
        match self {
            Self::Lines(lines) => lines.next_row(),
            Self::Table(table) => table.next_row(),
        }
    }
}
