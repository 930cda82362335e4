//! Why data can't be used, in words that name the file and the row.

use std::path::PathBuf;

use tunesmith_crds::{fine_tune_job::OnBadRow, names::exit_code};

use super::bad_rows::{Bad, BadRows};
use crate::store::is_final;

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
    #[error(
        "{file} has no rows: it must hold JSON objects (one a line, or all in one list), or be a CSV, Parquet or Arrow file with \
         rows"
    )]
    Empty {
        /// Name of the file.
        file: String,
    },
    /// A row can't be used.
    #[error("{file} row {row}: {problem}")]
    Row {
        /// Name of the file.
        file: String,
        /// Number of the line (of the row in a table or a list), from 1.
        row: u64,
        /// What is wrong with which field, and what to do.
        problem: String,
    },
    /// Several rows can't be used.
    #[error("{count} rows can't be used (dataset.onBadRow: Skip would leave them out):\n{0}", count = .0.count())]
    Rows(BadRows),
    /// No row can be used.
    #[error("all {count} rows are bad, so that dataset.onBadRow: Skip leaves none:\n{0}", count = .0.count())]
    AllSkipped(BadRows),
    /// dataset.columns names a column that is not there.
    #[error("dataset.columns: no row of {file} has a column {column:?} ({name}: {column}); correct the name")]
    NoColumn {
        /// Name of the file.
        file: String,
        /// What the format calls the column.
        name: String,
        /// What the file should call it.
        column: String,
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
            Self::Disk { source, .. } if !is_final(source) => exit_code::STORAGE,
            _ => exit_code::BAD_INPUT,
        }
    }
}

impl BadRows {
    /// How many rows are left out, if they may be.
    ///
    /// # Errors
    /// They may not, or no other row is left.
    pub(super) fn skipped(self, on_bad_row: OnBadRow, has_others: bool) -> Result<u64, DataError> {
        match (self.count(), on_bad_row) {
            (0, _) => Ok(0),
            (count, OnBadRow::Skip) if has_others => Ok(count),
            (_, OnBadRow::Skip) => Err(DataError::AllSkipped(self)),
            (1, OnBadRow::Error) => match self.into_first() {
                Some(Bad { file, row, problem }) => Err(DataError::Row { file, row, problem }),
                None => Ok(0),
            },
            (_, OnBadRow::Error) => Err(DataError::Rows(self)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_work_folder_that_can_not_be_one_is_no_failing_disk() {
        use std::io::{Error, ErrorKind};
        let disk = |kind: ErrorKind| DataError::Disk { folder: "/work".into(), source: Error::from(kind) }.exit_code();
        for kind in [
            ErrorKind::NotFound,
            ErrorKind::NotADirectory,
            ErrorKind::PermissionDenied,
            ErrorKind::AlreadyExists,
            ErrorKind::InvalidFilename,
        ] {
            assert_eq!(disk(kind), exit_code::BAD_INPUT, "{kind:?}");
        }
        assert_eq!(disk(ErrorKind::StorageFull), exit_code::STORAGE);
    }
}
