//! A file of weights of which the header alone is kept, and a hole in place of the rest: whoever reads headers finds the whole
//! file, and it takes no room. A preflight has no other use for weights, whose bytes it has seen going by.

use std::{
    fs::File,
    io::{self, Seek, SeekFrom, Write},
    path::Path,
};

/// The bytes before a safetensors header, which tell how long it is.
const LENGTH_BYTES: u64 = 8;

/// Keeps the header of what is written to it, and counts the rest.
pub(super) struct Outline {
    file: File,
    length: Vec<u8>,
    position: u64,
}

impl Outline {
    /// An outline at this path, in place of what is there.
    pub(super) fn create(path: &Path) -> io::Result<Self> {
        Ok(Self { file: File::create(path)?, length: Vec::new(), position: 0 })
    }

    /// The file has ended: it gets its length.
    pub(super) fn finish(self) -> io::Result<()> {
        self.file.set_len(self.position)
    }

    /// Where the data begin, as far as is known.
    fn data(&self) -> u64 {
        let length: Option<[u8; 8]> = self.length.as_slice().try_into().ok();
        length.map_or(LENGTH_BYTES, |length| LENGTH_BYTES.saturating_add(u64::from_le_bytes(length)))
    }
}

impl Write for Outline {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let kept = usize::try_from(self.data().saturating_sub(self.position)).unwrap_or(usize::MAX).min(bytes.len());
        // Nothing is written beyond the header, so that there is the file's end.
        if kept > 0 {
            self.file.write_all(&bytes[..kept])?;
            let missing = usize::try_from(LENGTH_BYTES).unwrap_or(0) - self.length.len();
            self.length.extend_from_slice(&bytes[..kept.min(missing)]);
            self.position += kept as u64;
            return Ok(kept);
        }
        self.position += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// Makes a hole of a file's data, in place.
pub(super) fn hollow(path: &Path) -> io::Result<()> {
    let mut file = File::options().read(true).write(true).open(path)?;
    let bytes = file.seek(SeekFrom::End(0))?;
    file.seek(SeekFrom::Start(0))?;
    let mut length = [0; 8];
    io::Read::read_exact(&mut file, &mut length)?;
    file.set_len(LENGTH_BYTES.saturating_add(u64::from_le_bytes(length)).min(bytes))?;
    file.set_len(bytes)
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
            let mut outline = Outline::create(&path).unwrap();
            whole.chunks(piece).for_each(|bytes| outline.write_all(bytes).unwrap());
            outline.finish().unwrap();
            check(&path, &whole);
        }
    }

    #[test]
    fn a_file_is_made_hollow_in_place_and_one_that_is_cut_short_keeps_its_length() {
        let (folder, whole) = (tempfile::tempdir().unwrap(), weights());
        let path = folder.path().join("whole");
        fs::write(&path, &whole).unwrap();
        hollow(&path).unwrap();
        check(&path, &whole);
        fs::write(&path, &whole[..50]).unwrap();
        hollow(&path).unwrap();
        assert_eq!(fs::read(&path).unwrap(), &whole[..50]);
    }
}
