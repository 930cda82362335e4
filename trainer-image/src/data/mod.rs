//! From data files to micro-batches: containers, formats, the chat template, tokens and masks, packing, and the order of
//! training.

pub mod batches;
mod container;
pub mod conversation;
pub mod encode;
pub mod formats;
mod lines;
pub mod notes;
pub mod overview;
pub mod packing;
mod parquet;
pub mod probe;
pub mod rows;
pub mod shuffle;
pub mod template;
#[cfg(test)]
mod tests;
mod token_file;
pub mod vocabulary;

use std::{path::Path, sync::Arc};

use tunesmith_crds::fine_tune_job::DataFormat;
use tunesmith_engine::IGNORE;

use self::token_file::{Entry, TokenFile, Writer};
pub use self::{
    encode::Encoder,
    overview::Overview,
    rows::{DataError, DataFile},
    template::ChatTemplate,
    vocabulary::Vocabulary,
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
}

impl Rows {
    /// Reads and encodes every row of some files; what is encoded is kept in the folder `work`.
    ///
    /// # Errors
    /// A row can't be used; the message names file, row and field. Or the folder can't be written.
    pub fn load(files: &[DataFile], format: DataFormat, encoder: &Encoder, work: &Path) -> Result<Self, DataError> {
        let names: Arc<[String]> = files.iter().map(|file| file.name.clone()).collect();
        let mut writer = Writer::create(work)?;
        let (mut dropped, mut notes) = (0, notes::Notes::default());
        for (file, number) in files.iter().zip(0..) {
            let mut reader = rows::Reader::open(file, format)?;
            while let Some((row, content)) = reader.next_row()? {
                match encoder.encode(&content, &mut notes).map_err(|problem| reader.error(row, problem))? {
                    Some(example) => writer.push(number, row, &example)?,
                    None => dropped += 1,
                }
            }
            tracing::info!(file = %file.name, rows = writer.len(), dropped, "encoded");
        }
        let (file, lengths) = writer.finish()?;
        match (lengths.is_empty(), dropped) {
            (true, 0) => Err(DataError::Empty { file: name_of_all(&names) }),
            (true, rows) => {
                Err(DataError::AllDropped { file: name_of_all(&names), rows, max_length: encoder.max_length })
            }
            (false, _) => Ok(Self { file: Arc::new(file), picked: None, lengths, names, dropped }),
        }
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
        let pick = |rows: Vec<u32>, dropped: u64| Self {
            file: Arc::clone(&self.file),
            lengths: rows.iter().map(|&row| self.lengths[row as usize]).collect(),
            picked: Some(rows),
            names: Arc::clone(&self.names),
            dropped,
        };
        Ok((pick(train, self.dropped), pick(eval, 0)))
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
