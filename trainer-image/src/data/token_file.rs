//! Encoded rows on disk, so that a data set may be larger than memory: 4 bytes a token and a bit for its mask, read back
//! row by row. The operating system keeps in memory what there is room for.
//!
//! The files have no name: they are gone when the process ends, however it ends, and two runs never meet in one.

use std::{
    fs::{self, File},
    io::{self, BufWriter, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use tunesmith_engine::IGNORE;

use super::{DataError, Example};

/// Where a row is, and what is worth knowing of it without reading it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    /// Its first byte among the rows.
    offset: u64,
    /// Its number in its file.
    pub number: u64,
    /// Its file.
    pub file: u32,
    /// Its tokens.
    pub length: u32,
    /// Those of them that are trained.
    pub trained: u32,
    /// Whether it has lost its end.
    pub truncated: bool,
}

/// Bytes of an entry.
const ENTRY: usize = 32;
/// Entries that are read at once.
const ENTRIES: usize = 1024;

impl Entry {
    fn to_bytes(self) -> [u8; ENTRY] {
        let mut bytes = [0; ENTRY];
        bytes[..8].copy_from_slice(&self.offset.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.number.to_le_bytes());
        let numbers = [self.file, self.length, self.trained, u32::from(self.truncated)];
        for (bytes, number) in bytes[16..].chunks_exact_mut(4).zip(numbers) {
            bytes.copy_from_slice(&number.to_le_bytes());
        }
        bytes
    }

    fn from_bytes(bytes: &[u8]) -> Self {
        let number = |at: usize| u32_at(bytes, at);
        let long = |at: usize| u64::from(number(at)) | (u64::from(number(at + 4)) << 32);
        Self {
            offset: long(0),
            number: long(8),
            file: number(16),
            length: number(20),
            trained: number(24),
            truncated: number(28) != 0,
        }
    }

    /// Bytes of its tokens and of its mask.
    fn sizes(&self) -> (usize, usize) {
        let length = self.length as usize;
        (4 * length, length.div_ceil(8))
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// Takes rows one after the other.
pub(super) struct Writer {
    folder: PathBuf,
    rows: BufWriter<File>,
    entries: BufWriter<File>,
    offset: u64,
    lengths: Vec<u32>,
    largest_token: u32,
}

impl Writer {
    /// Rows in nameless files in `folder`, which is made if it is not there.
    ///
    /// # Errors
    /// The folder can't be written.
    pub fn create(folder: &Path) -> Result<Self, DataError> {
        let file = || {
            fs::create_dir_all(folder)?;
            tempfile::tempfile_in(folder)
        };
        let file = || file().map(BufWriter::new).map_err(|source| disk(folder, source));
        let (rows, entries) = (file()?, file()?);
        Ok(Self { folder: folder.to_owned(), rows, entries, offset: 0, lengths: Vec::new(), largest_token: 0 })
    }

    /// Adds a row: number `number` of file `file`.
    ///
    /// # Errors
    /// The disk is full.
    pub fn push(&mut self, file: u32, number: u64, example: &Example) -> Result<(), DataError> {
        let entry = Entry {
            offset: self.offset,
            number,
            file,
            length: example.tokens.len() as u32,
            trained: example.trained_tokens() as u32,
            truncated: example.truncated,
        };
        let (tokens, mask) = entry.sizes();
        let mut bytes = Vec::with_capacity(tokens + mask);
        bytes.extend(example.tokens.iter().flat_map(|token| token.to_le_bytes()));
        let bits =
            |targets: &[u32]| targets.iter().rev().fold(0, |bits, &target| (bits << 1) | u8::from(target != IGNORE));
        bytes.extend(example.targets.chunks(8).map(bits));
        let written = self.rows.write_all(&bytes).and_then(|()| self.entries.write_all(&entry.to_bytes()));
        written.map_err(|source| disk(&self.folder, source))?;
        self.offset += bytes.len() as u64;
        self.lengths.push(entry.length);
        self.largest_token = example.tokens.iter().copied().fold(self.largest_token, u32::max);
        Ok(())
    }

    /// Rows so far.
    pub fn len(&self) -> usize {
        self.lengths.len()
    }

    /// The rows, to be read, with their lengths in tokens.
    ///
    /// # Errors
    /// The disk is full.
    pub fn finish(self) -> Result<(TokenFile, Vec<u32>), DataError> {
        let Self { folder, rows, entries, offset: _, lengths, largest_token } = self;
        let file = |buffer: BufWriter<File>| buffer.into_inner().map_err(|error| disk(&folder, error.into_error()));
        let (rows, entries) = (file(rows)?, file(entries)?);
        Ok((TokenFile { rows, entries, count: lengths.len(), largest_token, folder }, lengths))
    }
}

/// Rows on disk.
pub(super) struct TokenFile {
    folder: PathBuf,
    rows: File,
    entries: File,
    count: usize,
    /// The largest token of all rows.
    pub largest_token: u32,
}

impl TokenFile {
    /// What is known of row `index`.
    ///
    /// # Errors
    /// The disk fails.
    pub fn entry(&self, index: usize) -> Result<Entry, DataError> {
        let mut bytes = [0; ENTRY];
        self.read(&self.entries, &mut bytes, (index * ENTRY) as u64)?;
        Ok(Entry::from_bytes(&bytes))
    }

    /// What is known of every row, in order.
    pub fn entries(&self) -> impl Iterator<Item = Result<Entry, DataError>> {
        let chunk = move |first: usize| {
            let mut bytes = vec![0; ENTRY * ENTRIES.min(self.count - first)];
            let read = self.read(&self.entries, &mut bytes, (first * ENTRY) as u64);
            let (entries, error): (Vec<Result<Entry, DataError>>, _) = match read {
                Ok(()) => (bytes.chunks_exact(ENTRY).map(Entry::from_bytes).map(Ok).collect(), None),
                Err(error) => (Vec::new(), Some(Err(error))),
            };
            entries.into_iter().chain(error)
        };
        (0..self.count).step_by(ENTRIES).flat_map(chunk)
    }

    /// Row `index`, as it was written.
    ///
    /// # Errors
    /// The disk fails.
    pub fn example(&self, index: usize) -> Result<Example, DataError> {
        let entry = self.entry(index)?;
        let (tokens, mask) = entry.sizes();
        let mut bytes = vec![0; tokens + mask];
        self.read(&self.rows, &mut bytes, entry.offset)?;
        let (tokens, mask) = bytes.split_at(tokens);
        let tokens: Vec<u32> = tokens.chunks_exact(4).map(|bytes| u32_at(bytes, 0)).collect();
        let is_trained = |i: usize| (mask[i / 8] >> (i % 8)) & 1 == 1;
        let next = tokens.iter().skip(1).chain([&IGNORE]).enumerate();
        let targets = next.take(tokens.len()).map(|(i, &next)| if is_trained(i) { next } else { IGNORE }).collect();
        Ok(Example { tokens, targets, truncated: entry.truncated })
    }

    fn read(&self, file: &File, bytes: &mut [u8], offset: u64) -> Result<(), DataError> {
        file.read_exact_at(bytes, offset).map_err(|source| disk(&self.folder, source))
    }
}

fn disk(folder: &Path, source: io::Error) -> DataError {
    DataError::Disk { folder: folder.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tunesmith_crds::names::exit_code;

    use super::*;

    fn example(tokens: Vec<(u32, bool)>, truncated: bool) -> Example {
        let next = tokens.iter().skip(1).map(|&(token, _)| token).chain([IGNORE]);
        let targets = next.zip(&tokens).map(|(next, &(_, trained))| if trained { next } else { IGNORE }).collect();
        Example { tokens: tokens.into_iter().map(|(token, _)| token).collect(), targets, truncated }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn rows_come_back_as_they_were(
            rows in prop::collection::vec((prop::collection::vec((0u32..200_000, any::<bool>()), 0..40), any::<bool>()), 1..1100),
        ) {
            let rows: Vec<Example> = rows.into_iter().map(|(tokens, truncated)| example(tokens, truncated)).collect();
            let folder = tempfile::tempdir().unwrap();
            let mut writer = Writer::create(&folder.path().join("made")).unwrap();
            for (i, row) in rows.iter().enumerate() {
                writer.push(i as u32 % 3, i as u64 + (1 << 33), row).unwrap();
            }
            let (file, lengths) = writer.finish().unwrap();
            let entries: Vec<Entry> = file.entries().map(Result::unwrap).collect();
            prop_assert_eq!(entries.len(), rows.len());
            for (i, row) in rows.iter().enumerate() {
                prop_assert_eq!(&file.example(i).unwrap(), row);
                let entry = file.entry(i).unwrap();
                prop_assert_eq!(entry, entries[i]);
                prop_assert_eq!((entry.file, entry.number), (i as u32 % 3, i as u64 + (1 << 33)));
                prop_assert_eq!(entry.trained as usize, row.trained_tokens());
                prop_assert_eq!(lengths[i] as usize, row.tokens.len());
            }
            let largest = rows.iter().flat_map(|row| &row.tokens).max().copied().unwrap_or(0);
            prop_assert_eq!(file.largest_token, largest);
        }
    }

    #[test]
    fn the_files_have_no_name() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = Writer::create(folder.path()).unwrap();
        writer.push(0, 1, &example(vec![(1, true), (2, true)], false)).unwrap();
        let (file, _) = writer.finish().unwrap();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        assert_eq!(file.example(0).unwrap().tokens, [1, 2]);
    }

    #[test]
    fn a_work_folder_that_is_a_file_is_named_and_not_tried_again() {
        let folder = tempfile::tempdir().unwrap();
        let taken = folder.path().join("work");
        fs::write(&taken, "a file").unwrap();
        let error = Writer::create(&taken).err().unwrap();
        assert_eq!(error.exit_code(), exit_code::BAD_INPUT);
        let text = error.to_string();
        assert!(text.starts_with(&taken.display().to_string()) && text.contains("must be writable"), "{text}");
    }
}
