//! Parquet files, of which only the columns that are wanted are read.

use std::{
    fs::File,
    io::{BufReader, Read, Seek, SeekFrom},
};

use ::parquet::{
    arrow::{
        ProjectionMask,
        arrow_reader::{ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder},
    },
    errors::{ParquetError, Result as ParquetResult},
    file::reader::{ChunkReader, Length},
};
use arrow::array::RecordBatch;
use bytes::Bytes;

use super::{
    columns::Wanted,
    table::{Batches, Table, guarded},
};

/// First bytes of a Parquet file.
pub(super) const MAGIC: &[u8] = b"PAR1";

/// Rows that are decoded at once.
const BATCH_ROWS: usize = 64;

/// Opens a file.
///
/// # Errors
/// It is not whole.
pub(super) fn open(file: File, wanted: &Wanted) -> Result<Table, String> {
    let damaged = |error: ParquetError| format!("not a whole Parquet file: {error}; upload it again");
    guarded(|| {
        let length = file.metadata().map_err(|error| error.to_string())?.len();
        let builder = ParquetRecordBatchReaderBuilder::try_new(Whole { file, length }).map_err(damaged)?;
        let names: Vec<&String> = builder.schema().fields().iter().map(|field| field.name()).collect();
        let (read, unread): (Vec<_>, Vec<_>) =
            names.into_iter().enumerate().partition(|(_, name)| wanted.contains(*name));
        let unread = unread.into_iter().map(|(_, name)| name.clone()).collect();
        let mask = ProjectionMask::roots(builder.parquet_schema(), read.into_iter().map(|(i, _)| i));
        let reader = builder.with_projection(mask).with_batch_size(BATCH_ROWS).build().map_err(damaged)?;
        Ok(Table::new(reader, wanted).without(unread))
    })
}

impl Batches for ParquetRecordBatchReader {
    fn next_batch(&mut self) -> Result<Option<RecordBatch>, String> {
        self.next().transpose().map_err(|error| {
            format!("can't be read: {error}; upload the file again, written with snappy, zstd, gzip or lz4")
        })
    }
}

/// A file whose parts are read only where they lie in it, whatever lengths it claims.
struct Whole {
    file: File,
    length: u64,
}

impl Whole {
    fn seek(&self, start: u64) -> ParquetResult<File> {
        let mut file = self.file.try_clone()?;
        file.seek(SeekFrom::Start(start))?;
        Ok(file)
    }
}

impl Length for Whole {
    fn len(&self) -> u64 {
        self.length
    }
}

impl ChunkReader for Whole {
    type T = BufReader<File>;

    fn get_read(&self, start: u64) -> ParquetResult<Self::T> {
        self.seek(start).map(BufReader::new)
    }

    fn get_bytes(&self, start: u64, length: usize) -> ParquetResult<Bytes> {
        let end = start.checked_add(length as u64).filter(|&end| end <= self.length);
        let past = || ParquetError::EOF(format!("{length} bytes at {start} end after the file does"));
        end.ok_or_else(past)?;
        let mut bytes = Vec::with_capacity(length);
        self.seek(start)?.take(length as u64).read_to_end(&mut bytes)?;
        match bytes.len() == length {
            true => Ok(bytes.into()),
            false => Err(past()),
        }
    }
}
