//! What a data file is, by its first bytes: lines or a list of JSON, plain or compressed, CSV, Parquet or Arrow. Names may
//! lie.

use std::{
    fs::File,
    io::{self, BufReader, Cursor, Read, Seek},
    path::{Path, PathBuf},
};

use flate2::read::MultiGzDecoder;

use super::{
    arrow_stream::{self, Stream},
    columns::{BadRow, Columns, RawRow, Wanted},
    delimited::{self, Delimited},
    json_list::JsonList,
    kinds::{HEAD_BYTES, refused},
    lines::Lines,
    parquet,
    table::Table,
};

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

/// An open data file.
pub(super) enum Container {
    /// JSON Lines.
    Lines(Lines),
    /// A JSON list of objects.
    List(JsonList),
    /// CSV or TSV.
    Delimited(Box<Delimited>),
    /// Parquet or Arrow.
    Table(Table),
}

impl Container {
    /// Opens a file.
    ///
    /// # Errors
    /// It can't be read, or is of another kind.
    pub fn open(file: &DataFile, wanted: &Wanted) -> Result<Self, String> {
        let mut source = File::open(&file.path).map_err(|error| error.to_string())?;
        let (head, failure) = head_of(&mut source);
        if let Some(error) = failure {
            return Err(error.to_string());
        }
        source.rewind().map_err(|error| error.to_string())?;
        if let Some(refusal) = refused(&head) {
            return Err(refusal);
        }
        let is = |magic: &[u8]| head.starts_with(magic);
        if is(parquet::MAGIC) {
            return parquet::open(source, wanted).map(Self::Table);
        }
        if arrow_stream::is(&head) {
            return Ok(Self::Table(Table::new(Stream::open(source)?, wanted)));
        }
        if is(b"\x1f\x8b") {
            return Self::decompressed(MultiGzDecoder::new(BufReader::new(source)), file, wanted);
        }
        if is(b"\x28\xb5\x2f\xfd") {
            let decoder = zstd::Decoder::new(source).map_err(|error| error.to_string())?;
            return Self::decompressed(decoder, file, wanted);
        }
        Self::text(source, &head, file, wanted)
    }

    fn decompressed(mut reader: impl Read + 'static, file: &DataFile, wanted: &Wanted) -> Result<Self, String> {
        let (head, failure) = head_of(&mut reader);
        let is_table = head.starts_with(parquet::MAGIC) || arrow_stream::is(&head);
        let refusal = is_table.then(|| "it is a compressed Parquet or Arrow file; decompress it".to_owned());
        match refusal.or_else(|| refused(&head)) {
            Some(refusal) => Err(refusal),
            None => {
                let rest: Box<dyn Read> = match failure {
                    Some(error) => Box::new(Broken(error)),
                    None => Box::new(reader),
                };
                Self::text(Cursor::new(head.clone()).chain(rest), &head, file, wanted)
            }
        }
    }

    /// Rows as text: of `reader`, which begins with `head`.
    fn text(reader: impl Read + 'static, head: &[u8], file: &DataFile, wanted: &Wanted) -> Result<Self, String> {
        let start = head.strip_prefix(b"\xef\xbb\xbf").unwrap_or(head).trim_ascii_start();
        Ok(match start.first() {
            Some(b'[') => Self::List(JsonList::new(reader)),
            Some(b'{') | None => Self::Lines(Lines::new(reader)),
            Some(_) => match delimited::delimiter(start, &file.name, wanted) {
                Some(delimiter) => Self::Delimited(Box::new(Delimited::new(reader, delimiter)?)),
                None => Self::Lines(Lines::new(reader)),
            },
        })
    }

    /// The next row.
    ///
    /// # Errors
    /// It can't be read.
    pub fn next_row(&mut self) -> Result<Option<RawRow>, BadRow> {
        let of_text =
            |row: Option<(u64, Columns)>| row.map(|(number, columns)| RawRow { number, columns, ..RawRow::default() });
        match self {
            Self::Lines(lines) => lines.next_row().map(of_text),
            Self::List(list) => list.next_row().map(of_text),
            Self::Delimited(rows) => rows.next_row().map(of_text),
            Self::Table(table) => table.next_row(),
        }
    }
}

/// The beginning of a file, and why there is no more of it if it breaks off.
fn head_of(reader: &mut impl Read) -> (Vec<u8>, Option<io::Error>) {
    let mut head = Vec::new();
    let failure = reader.take(HEAD_BYTES).read_to_end(&mut head).err();
    (head, failure)
}

/// The place where a file breaks off.
struct Broken(io::Error);

impl Read for Broken {
    fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
        Err(io::Error::new(self.0.kind(), self.0.to_string()))
    }
}
