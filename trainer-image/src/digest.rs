//! Digests of groups of files: what `sha256sum FILE… | sha256sum` prints, so that anyone can check one.

use std::{
    fs::File,
    io::{self, Read, Write},
    path::Path,
};

use sha2::{Digest, Sha256};
use tunesmith_crds::adapter_version::ArtifactFile;

/// Digest (`sha256:…`) of files by name and content, whatever order they come in.
pub fn of_files(files: &[ArtifactFile]) -> String {
    let mut lines: Vec<String> = files.iter().map(|file| format!("{}  {}\n", file.sha256, file.path)).collect();
    lines.sort_by(|a, b| a[64..].cmp(&b[64..]));
    of_bytes(lines.concat().as_bytes())
}

/// Digest (`sha256:…`) of bytes.
pub fn of_bytes(bytes: &[u8]) -> String {
    format!("sha256:{:x}", Sha256::digest(bytes))
}

/// Name, digest and size of some bytes.
pub fn file_of_bytes(path: &str, bytes: &[u8]) -> ArtifactFile {
    ArtifactFile { path: path.to_owned(), sha256: format!("{:x}", Sha256::digest(bytes)), size: bytes.len() as u64 }
}

/// Name, digest and size of a file on disk.
///
/// # Errors
/// It can't be read.
pub fn file_on_disk(path: &Path, name: &str) -> io::Result<ArtifactFile> {
    file_through(path, name, &mut io::sink())
}

/// The same, and the file's bytes go into `also`: a large file is read once for both.
///
/// # Errors
/// It can't be read.
pub fn file_through(path: &Path, name: &str, also: &mut dyn Write) -> io::Result<ArtifactFile> {
    let mut hashing = Hashing::new(also);
    read_through(path, |bytes| hashing.write_all(bytes))?;
    Ok(hashing.file(name))
}

/// Passes bytes on, and computes their digest.
pub struct Hashing<'a> {
    to: &'a mut dyn Write,
    hash: Sha256,
    size: u64,
}

impl<'a> Hashing<'a> {
    /// Bytes go into `to`.
    pub fn new(to: &'a mut dyn Write) -> Self {
        Self { to, hash: Sha256::new(), size: 0 }
    }

    /// Digest and size of the bytes so far, as a file of this name.
    pub fn file(self, name: &str) -> ArtifactFile {
        ArtifactFile { path: name.to_owned(), sha256: format!("{:x}", self.hash.finalize()), size: self.size }
    }
}

impl Write for Hashing<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.to.write_all(bytes)?;
        self.hash.update(bytes);
        self.size += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

/// Reads a file piece by piece.
///
/// # Errors
/// It can't be read, or `take` fails.
pub fn read_through(path: &Path, mut take: impl FnMut(&[u8]) -> io::Result<()>) -> io::Result<()> {
    const PIECE: usize = 1 << 18;
    let (mut file, mut buffer) = (File::open(path)?, vec![0; PIECE]);
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(bytes) => take(&buffer[..bytes])?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_order_of_files_does_not_matter_and_their_names_do() {
        let (a, b) = (file_of_bytes("a", b"1"), file_of_bytes("b", b"2"));
        let digest = of_files(&[a.clone(), b.clone()]);
        assert_eq!(digest, of_files(&[b.clone(), a.clone()]));
        assert_eq!(digest.len(), "sha256:".len() + 64);
        assert_ne!(digest, of_files(&[a, ArtifactFile { path: "c".into(), ..b }]));
    }
}
