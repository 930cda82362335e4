//! Arrow IPC, as streams (`save_to_disk` of datasets) and as files (Feather), which are a stream between two marks.
//! Message by message: <https://arrow.apache.org/docs/format/Columnar.html#serialization-and-interprocess-communication-ipc>

use std::{
    collections::VecDeque,
    fs::File,
    io::{BufReader, Read, Seek, SeekFrom},
};

use arrow::{
    array::RecordBatch,
    buffer::Buffer,
    ipc::{Message, MessageHeader, reader::StreamDecoder, root_as_message},
};

use super::table::{Batches, guarded};

/// First and last bytes of a file.
const FILE_MAGIC: &[u8] = b"ARROW1";
/// Bytes in which a file's mark is padded, once or more.
const PADDING: u64 = 8;
/// Stands before every message.
const CONTINUATION: [u8; 4] = [0xff; 4];
/// Bytes that a buffer may claim to decompress to.
const MAX_BUFFER_BYTES: i64 = 1 << 31;

/// Whether a file that begins like this is one.
pub(super) fn is(head: &[u8]) -> bool {
    head.starts_with(FILE_MAGIC) || (head.len() >= 8 && head.starts_with(&CONTINUATION))
}

/// Reads a stream.
pub(super) struct Stream {
    reader: BufReader<File>,
    decoder: StreamDecoder,
    ready: VecDeque<RecordBatch>,
    has_ended: bool,
}

const CUT: &str = "it ends without the mark that ends an Arrow stream: is the file whole? upload it again";

impl Stream {
    /// Opens a file or a stream.
    ///
    /// # Errors
    /// It is not whole.
    pub fn open(mut file: File) -> Result<Self, String> {
        let io = |error: std::io::Error| error.to_string();
        let mut start = [0; FILE_MAGIC.len()];
        file.read_exact(&mut start).map_err(io)?;
        if start == FILE_MAGIC {
            let mut end = [0; FILE_MAGIC.len()];
            file.seek(SeekFrom::End(-(FILE_MAGIC.len() as i64))).map_err(io)?;
            file.read_exact(&mut end).map_err(io)?;
            if end != FILE_MAGIC {
                return Err("it is not a whole Arrow file; upload it again".into());
            }
            skip_padding(&mut file).map_err(io)?;
        } else {
            file.rewind().map_err(io)?;
        }
        Ok(Self {
            reader: BufReader::with_capacity(1 << 16, file),
            decoder: StreamDecoder::new(),
            ready: VecDeque::new(),
            has_ended: false,
        })
    }

    /// Exactly so many bytes, without room for more than there are.
    fn take(&mut self, bytes: u64) -> Result<Vec<u8>, String> {
        let mut taken = Vec::new();
        let read = (&mut self.reader).take(bytes).read_to_end(&mut taken).map_err(|error| error.to_string())?;
        match read as u64 == bytes {
            true => Ok(taken),
            false => Err(CUT.into()),
        }
    }

    /// Hands the next message to the decoder.
    fn next_message(&mut self) -> Result<(), String> {
        let damaged = |problem: &str| format!("it is a damaged Arrow file ({problem}); upload it again");
        let prefix = self.take(8)?;
        let Some((mark, length)) = prefix.split_first_chunk::<4>() else { return Err(CUT.into()) };
        if *mark != CONTINUATION {
            return Err(damaged("no message where one should be"));
        }
        let length = length.first_chunk::<4>().map_or(0, |length| u32::from_le_bytes(*length));
        let metadata = self.take(length.into())?;
        let mut parts = vec![prefix];
        if length == 0 {
            self.has_ended = true;
        } else {
            let message = root_as_message(&metadata).map_err(|error| damaged(&error.to_string()))?;
            let body = u64::try_from(message.bodyLength()).map_err(|_| damaged("a negative length"))?;
            let body = self.take(body)?;
            if !is_compressed_soundly(&message, &body) {
                return Err(damaged("a compressed buffer without its length"));
            }
            parts.extend([metadata, body]);
        }
        for part in parts {
            let mut part = Buffer::from_vec(part);
            while !part.is_empty() {
                let batch = self.decoder.decode(&mut part).map_err(|error| damaged(&error.to_string()))?;
                self.ready.extend(batch);
            }
        }
        Ok(())
    }
}

/// Goes to the stream of a file, behind its mark and the zeros after it.
fn skip_padding(file: &mut File) -> std::io::Result<()> {
    let mut start = PADDING;
    file.seek(SeekFrom::Start(start))?;
    let mut word = [0; PADDING as usize];
    while file.read_exact(&mut word).is_ok() && word == [0; PADDING as usize] {
        start += PADDING;
    }
    file.seek(SeekFrom::Start(start)).map(|_| ())
}

/// Whether every compressed buffer says how long it is, within reason: the decoder would make room for any length.
fn is_compressed_soundly(message: &Message<'_>, body: &[u8]) -> bool {
    let batch = match message.header_type() {
        MessageHeader::RecordBatch => message.header_as_record_batch(),
        MessageHeader::DictionaryBatch => message.header_as_dictionary_batch().and_then(|dictionary| dictionary.data()),
        _ => None,
    };
    let Some(batch) = batch.filter(|batch| batch.compression().is_some()) else { return true };
    let is_sound = |offset: i64, length: i64| -> bool {
        let start = usize::try_from(offset).ok().and_then(|start| body.get(start..));
        let Some(bytes) = start.and_then(|rest| rest.get(..usize::try_from(length).ok()?)) else { return false };
        let claimed = bytes.first_chunk::<8>().map(|bytes| i64::from_le_bytes(*bytes));
        bytes.is_empty() || claimed.is_some_and(|claimed| claimed <= MAX_BUFFER_BYTES)
    };
    batch.buffers().is_none_or(|buffers| buffers.iter().all(|buffer| is_sound(buffer.offset(), buffer.length())))
}

impl Batches for Stream {
    fn next_batch(&mut self) -> Result<Option<RecordBatch>, String> {
        while self.ready.is_empty() && !self.has_ended {
            guarded(|| self.next_message())?;
        }
        Ok(self.ready.pop_front())
    }
}
