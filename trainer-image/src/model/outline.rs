//! A file of weights of which the header is kept, and a hole in place of the rest: whoever reads headers finds the whole
//! file, and it takes no room. A preflight has no other use for weights, whose bytes it has seen going by; but for small
//! tensors, which say how others are stored, and for an output layer, which may differ from the embedding.

use std::{
    collections::VecDeque,
    fs::File,
    io::{self, Write},
    ops::Range,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use safetensors::tensor::{Metadata, TensorInfo};

use super::tensors::MAX_HEADER_BYTES;
use crate::convert::{ConvertError, Gguf, GgufScan};

/// The bytes before a safetensors header, which tell how long it is.
const LENGTH_BYTES: u64 = 8;
/// A tensor of so many bytes is kept, as the tables of a weight in 4 bits are no larger.
const SMALL_BYTES: u64 = 1024;
/// The output layer and the embedding, which a configuration may tie.
pub(super) const OUTPUT: &str = "lm_head.weight";
const EMBEDDING: &str = "model.embed_tokens.weight";
/// A GGUF file is first read when so many bytes are there, and then whenever they have doubled.
const FIRST_BYTES: u64 = 1 << 20;
/// No header of a GGUF file is so long: it is mostly the tokenizer.
const MAX_GGUF_HEADER_BYTES: u64 = 1 << 30;

/// What is known of a file by its beginning.
enum Known {
    /// Nothing until so many bytes are there.
    Nothing(u64),
    /// What to keep of the bytes that follow, by their beginnings.
    Kept(VecDeque<Range<u64>>),
}

impl Known {
    fn kept(ranges: impl IntoIterator<Item = Range<u64>>) -> Self {
        let mut ranges: Vec<_> = ranges.into_iter().collect();
        ranges.sort_by_key(|range| range.start);
        Self::Kept(ranges.into())
    }
}

/// Keeps the header of what is written to it, and counts the rest.
struct Outline {
    path: PathBuf,
    file: File,
    position: u64,
    known: Known,
}

impl Outline {
    /// An outline at this path, in place of what is there; its header is looked at when so many bytes are there.
    fn create(path: &Path, first: u64) -> io::Result<Self> {
        let file = File::options().read(true).write(true).create(true).truncate(true).open(path)?;
        Ok(Self { path: path.to_owned(), file, position: 0, known: Known::Nothing(first) })
    }

    /// Takes bytes, but none beyond those after which the header is to be looked at; tells how many.
    fn take(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let start = self.position;
        let taken = match &mut self.known {
            Known::Nothing(until) => {
                let taken = usize::try_from(*until - start).unwrap_or(usize::MAX).min(bytes.len());
                self.file.write_all_at(&bytes[..taken], start)?;
                taken
            }
            Known::Kept(ranges) => {
                let end = start + bytes.len() as u64;
                while ranges.front().is_some_and(|range| range.end <= start) {
                    ranges.pop_front();
                }
                for range in ranges.iter().take_while(|range| range.start < end) {
                    let (from, to) = (range.start.max(start), range.end.min(end));
                    if from < to {
                        let own = &bytes[(from - start) as usize..(to - start) as usize];
                        self.file.write_all_at(own, from)?;
                    }
                }
                bytes.len()
            }
        };
        self.position += taken as u64;
        Ok(taken)
    }

    /// Whether the header is to be looked at now.
    fn is_due(&self) -> bool {
        matches!(self.known, Known::Nothing(until) if until == self.position)
    }

    /// The file has ended: it gets its length.
    fn finish(self) -> io::Result<()> {
        self.file.set_len(self.position)
    }
}

/// Whether the embedding and the output layer are kept, to be compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Compare {
    /// They are not.
    No,
    /// Of a file that holds the output layer.
    WithOutput,
    /// Of each file.
    Each,
}

/// Keeps the header of a safetensors file, and small tensors.
pub(super) struct SafetensorsOutline {
    outline: Outline,
    compare: Compare,
}

impl SafetensorsOutline {
    /// An outline at this path, in place of what is there.
    pub(super) fn create(path: &Path, compare: Compare) -> io::Result<Self> {
        Ok(Self { outline: Outline::create(path, LENGTH_BYTES)?, compare })
    }

    /// The file has ended: it gets its length.
    pub(super) fn finish(self) -> io::Result<()> {
        self.outline.finish()
    }

    fn read_header(&mut self) -> io::Result<()> {
        let outline = &mut self.outline;
        let mut length = [0; LENGTH_BYTES as usize];
        outline.file.read_exact_at(&mut length, 0)?;
        let length = u64::from_le_bytes(length);
        let data = LENGTH_BYTES.saturating_add(length);
        outline.known = match (length > MAX_HEADER_BYTES, data == outline.position) {
            // No such file; reading it says so.
            (true, _) => Known::kept([]),
            (false, false) => Known::Nothing(data),
            (false, true) => {
                let mut header = vec![0; usize::try_from(length).unwrap_or(0)];
                outline.file.read_exact_at(&mut header, LENGTH_BYTES)?;
                Known::kept(kept_tensors(&header, data, self.compare))
            }
        };
        Ok(())
    }
}

/// Where the tensors are that are kept of a file with this header and data that begin there.
fn kept_tensors(header: &[u8], data: u64, compare: Compare) -> Vec<Range<u64>> {
    let Ok(metadata) = serde_json::from_slice::<Metadata>(header) else { return Vec::new() };
    let tensors = metadata.tensors();
    let compares = match compare {
        Compare::No => false,
        Compare::WithOutput => tensors.contains_key(OUTPUT),
        Compare::Each => true,
    };
    let place = |info: &TensorInfo| {
        let (start, end) = info.data_offsets;
        data.saturating_add(start as u64)..data.saturating_add(end as u64)
    };
    let is_kept = |name: &str, place: &Range<u64>| {
        place.end.saturating_sub(place.start) <= SMALL_BYTES || (compares && [OUTPUT, EMBEDDING].contains(&name))
    };
    let places = tensors.iter().map(|(name, info)| (name, place(info)));
    places.filter(|(name, place)| is_kept(name, place)).map(|(_, place)| place).collect()
}

impl Write for SafetensorsOutline {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let taken = self.outline.take(bytes)?;
        while self.outline.is_due() {
            self.read_header()?;
        }
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Keeps the header of a GGUF file, with the few tensors that belong to the configuration, and looks at its weights as they
/// go by.
pub(super) struct GgufOutline {
    outline: Outline,
    /// Once the header is whole.
    scan: Option<GgufScan>,
}

impl GgufOutline {
    /// An outline at this path, in place of what is there.
    pub(super) fn create(path: &Path) -> io::Result<Self> {
        Ok(Self { outline: Outline::create(path, FIRST_BYTES)?, scan: None })
    }

    /// The file has ended: it gets its length. Names the tensors that are not finite.
    pub(super) fn finish(mut self) -> io::Result<Vec<String>> {
        if self.scan.is_none() {
            self.read_header()?;
        }
        let names = self.scan.take().map_or_else(Vec::new, GgufScan::into_names);
        self.outline.finish().map(|()| names)
    }

    /// Looks whether the header is whole. A file that can't be used goes by; reading it later says why.
    fn read_header(&mut self) -> io::Result<()> {
        let gguf = match Gguf::open(&self.outline.path) {
            Ok(gguf) => gguf,
            Err(ConvertError::Io { source, .. }) => return Err(source),
            Err(ConvertError::Damaged { .. }) if self.outline.position < MAX_GGUF_HEADER_BYTES => {
                self.outline.known = Known::Nothing(self.outline.position.saturating_mul(2));
                return Ok(());
            }
            Err(_) => {
                self.outline.known = Known::kept([]);
                return Ok(());
            }
        };
        let mut scan = GgufScan::new(&gguf);
        let mut seen = vec![0; usize::try_from(FIRST_BYTES).unwrap_or(usize::MAX)];
        let mut at = 0;
        while at < self.outline.position {
            let bytes = (seen.len() as u64).min(self.outline.position - at) as usize;
            self.outline.file.read_exact_at(&mut seen[..bytes], at)?;
            scan.write_all(&seen[..bytes])?;
            at += bytes as u64;
        }
        self.outline.known = Known::kept(gguf.configuring_tensors());
        self.scan = Some(scan);
        Ok(())
    }
}

impl Write for GgufOutline {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let taken = self.outline.take(bytes)?;
        if let Some(scan) = &mut self.scan {
            scan.write_all(&bytes[..taken])?;
        }
        if self.outline.is_due() {
            self.read_header()?;
        }
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::MetadataExt};

    use super::*;

    fn weights() -> Vec<u8> {
        let header = format!("{{\"a\": \"{}\"}}", "x".repeat(100));
        [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &vec![7; 1 << 20]].concat()
    }

    fn check(path: &Path, whole: &[u8]) {
        let outline = fs::read(path).unwrap();
        assert_eq!(outline.len(), whole.len());
        let data = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
        assert_eq!(outline[..data], whole[..data]);
        assert!(outline[data..].iter().all(|byte| *byte == 0));
        assert!(fs::metadata(path).unwrap().blocks() * 512 < 1 << 17, "the hole takes no room");
    }

    #[test]
    fn the_header_is_kept_however_the_bytes_come() {
        let (folder, whole) = (tempfile::tempdir().unwrap(), weights());
        for piece in [1, 7, 8, 9, 100, 1 << 20] {
            let path = folder.path().join("outline");
            let mut outline = SafetensorsOutline::create(&path, Compare::No).unwrap();
            whole.chunks(piece).for_each(|bytes| outline.write_all(bytes).unwrap());
            outline.finish().unwrap();
            check(&path, &whole);
        }
    }

    #[test]
    fn a_file_that_is_cut_short_keeps_what_came_and_its_length() {
        let (folder, whole) = (tempfile::tempdir().unwrap(), weights());
        let path = folder.path().join("outline");
        for length in [0, 5, 8, 50] {
            let mut outline = SafetensorsOutline::create(&path, Compare::No).unwrap();
            outline.write_all(&whole[..length]).unwrap();
            outline.finish().unwrap();
            assert_eq!(fs::read(&path).unwrap(), &whole[..length]);
        }
    }
}
