//! From data files to micro-batches: containers, formats, the chat template, tokens and masks, packing, and the order of
//! training.

mod arrow_stream;
pub mod bad_rows;
pub mod batches;
mod cells;
mod columns;
mod container;
pub mod conversation;
mod delimited;
pub mod encode;
mod error;
pub mod formats;
mod json;
mod json_list;
mod kinds;
mod lines;
pub mod notes;
pub mod overview;
pub mod packing;
mod parquet;
pub mod probe;
mod quoting;
pub mod rows;
pub mod shuffle;
mod table;
pub mod template;
#[cfg(test)]
mod tests;
mod token_file;
pub mod vocabulary;

use std::{collections::BTreeSet, path::Path, sync::Arc};

use tunesmith_engine::IGNORE;

#[cfg(test)]
pub(crate) use self::table::tests as tables;
use self::{
    bad_rows::{Bad, BadRows},
    notes::Notes,
    rows::{Next, Reader},
    token_file::{Entry, TokenFile, Writer},
};
pub use self::{
    container::DataFile, encode::Encoder, error::DataError, overview::Overview, rows::RowOptions,
    template::ChatTemplate, vocabulary::Vocabulary,
};

/// One row as the model sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Example {
    /// Its tokens, at most maxLength.
    pub tokens: Vec<u32>,
    /// The token to predict at each position, or [`IGNORE`].
    pub targets: Vec<u32>,
    /// Whether it was longer than maxLength.
    pub truncated: bool,
}

impl Example {
    /// Tokens that the loss is taken over.
    pub fn trained_tokens(&self) -> usize {
        self.targets.iter().filter(|&&target| target != IGNORE).count()
    }
}

/// Encoded rows. They are on disk; only their lengths are in memory.
pub struct Rows {
    file: Arc<TokenFile>,
    /// Which rows of the file these are, in its order; None for all of them.
    picked: Option<Vec<u32>>,
    lengths: Vec<u32>,
    names: Arc<[String]>,
    dropped: u64,
    skipped: u64,
    notes: Notes,
}

impl Rows {
    /// Reads and encodes every row of some files; what is encoded is kept in the folder `work`.
    ///
    /// # Errors
    /// A row can't be used; the message names file, row and field. Or the folder can't be written.
    pub fn load(files: &[DataFile], options: &RowOptions, encoder: &Encoder, work: &Path) -> Result<Self, DataError> {
        let names: Arc<[String]> = files.iter().map(|file| file.name.clone()).collect();
        let mut writer = Writer::create(work)?;
        let (mut dropped, mut bad, mut notes) = (0, BadRows::default(), Notes::default());
        let mut found = BTreeSet::new();
        for (file, number) in files.iter().zip(0..) {
            let mut reader = Reader::open(file, options)?;
            while let Some(next) = reader.next_row(&mut notes)? {
                let mut of_row = Notes::default();
                let (row, encoded) = match next {
                    Next::Row(row, content) => (row, encoder.encode(&content, &mut of_row)),
                    Next::Bad(row, problem) => (row, Err(problem)),
                };
                if encoded.is_ok() {
                    notes.extend(of_row);
                }
                match encoded {
                    Ok(Some(example)) => writer.push(number, row, &example)?,
                    Ok(None) => dropped += 1,
                    Err(problem) => bad.add(Bad { file: file.name.clone(), row, problem }),
                }
            }
            found.extend(reader.found().iter().cloned());
            tracing::info!(file = %file.name, rows = writer.len(), dropped, skipped = bad.count(), "encoded");
        }
        let (file, lengths) = writer.finish()?;
        if lengths.is_empty() && dropped == 0 && bad.count() == 0 {
            return Err(DataError::Empty { file: name_of_all(&names) });
        }
        if let Some((name, column)) = options.columns.iter().find(|(name, _)| !found.contains(*name)) {
            return Err(DataError::NoColumn { file: name_of_all(&names), name: name.clone(), column: column.clone() });
        }
        let skipped = bad.skipped(options.on_bad_row, !lengths.is_empty() || dropped > 0)?;
        if lengths.is_empty() {
            let (file, max_length) = (name_of_all(&names), encoder.max_length);
            return Err(DataError::AllDropped { file, rows: dropped, max_length });
        }
        Ok(Self { file: Arc::new(file), picked: None, lengths, names, dropped, skipped, notes })
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.lengths.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.lengths.is_empty()
    }

    /// Tokens of each row.
    pub fn lengths(&self) -> &[u32] {
        &self.lengths
    }

    /// Rows that were longer than maxLength and are not among these.
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    /// Rows that can't be used and are not among these.
    pub fn skipped(&self) -> u64 {
        self.skipped
    }

    /// What of the rows was not used as it stands.
    pub fn notes(&self) -> &Notes {
        &self.notes
    }

    /// The largest token of the files that these rows are from.
    pub fn largest_token(&self) -> u32 {
        self.file.largest_token
    }

    /// Row `index`.
    ///
    /// # Errors
    /// The disk fails.
    pub fn example(&self, index: usize) -> Result<Example, DataError> {
        self.file.example(self.index_in_file(index))
    }

    /// Rows by file and number, as a message names them: `rows 3, 7 of train.jsonl`.
    ///
    /// # Errors
    /// The disk fails.
    pub fn describe(&self, rows: &[usize]) -> Result<String, DataError> {
        let mut of_files: Vec<(u32, Vec<String>)> = Vec::new();
        for &row in rows {
            let Entry { file, number, .. } = self.file.entry(self.index_in_file(row))?;
            match of_files.iter_mut().find(|(other, _)| *other == file) {
                Some((_, numbers)) => numbers.push(number.to_string()),
                None => of_files.push((file, vec![number.to_string()])),
            }
        }
        let of_file = |(file, numbers): &(u32, Vec<String>)| {
            let plural = if numbers.len() == 1 { "" } else { "s" };
            format!("row{plural} {} of {}", numbers.join(", "), self.names[*file as usize])
        };
        Ok(of_files.iter().map(of_file).collect::<Vec<_>>().join(" and "))
    }

    /// Splits these rows into those to train on and a `fraction` to evaluate on, chosen by `seed`.
    ///
    /// # Errors
    /// No row is left for either.
    pub fn hold_out(self, fraction: f64, seed: u64) -> Result<(Self, Self), DataError> {
        let split = batches::hold_out(self.len(), fraction, seed);
        let too_few = || DataError::NothingToHoldOut { file: name_of_all(&self.names), rows: self.len() };
        let (train, eval) = split.ok_or_else(too_few)?;
        let pick = |rows: Vec<u32>, (dropped, skipped): (u64, u64), notes: &Notes| Self {
            file: Arc::clone(&self.file),
            lengths: rows.iter().map(|&row| self.lengths[row as usize]).collect(),
            picked: Some(rows),
            names: Arc::clone(&self.names),
            dropped,
            skipped,
            notes: notes.clone(),
        };
        Ok((pick(train, (self.dropped, self.skipped), &self.notes), pick(eval, (0, 0), &Notes::default())))
    }

    fn index_in_file(&self, index: usize) -> usize {
        self.picked.as_ref().map_or(index, |picked| picked[index] as usize)
    }

    /// What is known of each row, in order.
    fn entries(&self) -> impl Iterator<Item = Result<Entry, DataError>> {
        let mut picked = self.picked.as_ref().map(|picked| picked.iter().peekable());
        let entries = self.file.entries().zip(0_u32..);
        entries.filter_map(move |(entry, index)| match &mut picked {
            None => Some(entry),
            Some(picked) => picked.next_if_eq(&&index).map(|_| entry),
        })
    }
}

/// Files as a message names them together.
fn name_of_all(names: &[String]) -> String {
    match names {
        [] => "the data".into(),
        [name] => name.clone(),
        [first, rest @ ..] => format!("{first} and {} more", rest.len()),
    }
}
