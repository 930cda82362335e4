//! Reading, writing and listing at one place of a store.

use std::{
    fmt,
    fs::{self, File},
    io::{self, BufWriter, Write},
    ops::Range,
    path::{Path as FilePath, PathBuf},
    sync::Arc,
};

use bytes::Bytes;
use futures::TryStreamExt;
use object_store::{
    Error as ObjectError, ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload, WriteMultipart,
    buffered::BufWriter as ObjectWriter,
    path::{Path, PathPart},
};
use sha2::{Digest, Sha256};
use tokio::{io::AsyncWriteExt, runtime::Handle};
use tunesmith_crds::{Uri, adapter_version::ArtifactFile};

use super::{
    Role, StoreError,
    listing::{decoded_key, path_of_key},
};

/// Objects above this go up in parts.
const MULTIPART_BYTES: usize = 16 << 20;
/// Size of a part.
const PART_BYTES: usize = 8 << 20;
/// Parts that are under way at once.
const CONCURRENT_PARTS: usize = 4;

/// An object that is being written, and the digest of what has been.
struct Upload<'a> {
    runtime: &'a Handle,
    to: ObjectWriter,
    hash: Sha256,
    size: u64,
}

impl Write for Upload<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.runtime.block_on(self.to.write_all(bytes))?;
        self.hash.update(bytes);
        self.size += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// An object or a folder in a store.
#[derive(Clone)]
pub struct Location {
    pub(super) runtime: Handle,
    pub(super) store: Arc<dyn ObjectStore>,
    pub(super) path: Path,
    pub(super) uri: Uri,
    pub(super) role: Role,
    pub(super) on_disk: Option<PathBuf>,
    /// Never to be shown in a message.
    pub(super) secrets: Arc<[String]>,
}

impl fmt::Debug for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.uri, self.role)
    }
}

/// What came of writing an object that must not be there yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Created {
    /// It is written.
    New,
    /// There is one already; it is untouched. (Perhaps our own: a retried request may have succeeded before.)
    Exists,
}

impl Location {
    /// The object or folder `name` inside this one; `name` may have several parts.
    pub fn join(&self, name: &str) -> Self {
        let parts = name.split('/').filter(|part| !part.is_empty());
        // A part that is no file's name is encoded. No name of ours has one.
        let part = |path: Path, part| match PathPart::parse(part) {
            Ok(part) => path.join(part),
            Err(_) => path.join(part),
        };
        let path = parts.clone().fold(self.path.clone(), part);
        let on_disk = self.on_disk.as_ref().map(|folder| parts.fold(folder.clone(), |path, part| path.join(part)));
        Self { path, on_disk, uri: self.uri.join(name), ..self.clone() }
    }

    /// The object of a listing, by its name exactly as it is.
    ///
    /// # Errors
    /// No client can ask for that name.
    pub(super) fn object(&self, name: &str) -> Result<Self, StoreError> {
        let uri = self.uri.join(name);
        let on_disk = self.on_disk.as_ref().map(|folder| folder.join(name));
        let path = match &on_disk {
            // It is read by its path on the disk.
            Some(_) => self.join(name).path,
            None => {
                let key = if self.path.is_root() { name.to_owned() } else { format!("{}/{name}", self.path.as_ref()) };
                path_of_key(&key).map_err(|problem| StoreError::Unreadable {
                    role: self.role,
                    uri: uri.clone(),
                    problem,
                })?
            }
        };
        Ok(Self { path, on_disk, uri, ..self.clone() })
    }

    /// Where this is, as the user knows it.
    pub fn uri(&self) -> &Uri {
        &self.uri
    }

    /// Where this is on this machine's disks, if it is.
    pub fn on_disk(&self) -> Option<&FilePath> {
        self.on_disk.as_deref()
    }

    /// A whole object.
    ///
    /// # Errors
    /// It is missing, or the store fails.
    pub fn read(&self) -> Result<Bytes, StoreError> {
        self.run(async { self.store.get(&self.path).await?.bytes().await })
    }

    /// A whole object, or none if it is missing.
    ///
    /// # Errors
    /// The store fails.
    pub fn read_if_exists(&self) -> Result<Option<Bytes>, StoreError> {
        match self.read() {
            Err(StoreError::Missing { .. }) => Ok(None),
            read => read.map(Some),
        }
    }

    /// Copies an object to a file, and tells its digest. The file appears when it is whole.
    ///
    /// # Errors
    /// The object is missing, or the store or the disk fails.
    pub fn download(&self, to: &FilePath) -> Result<ArtifactFile, StoreError> {
        let disk = |source| StoreError::Disk { path: to.to_owned(), source };
        if self.path.is_root() {
            return Err(StoreError::Folder { role: self.role, uri: self.uri.clone() });
        }
        if let Some(folder) = to.parent() {
            fs::create_dir_all(folder).map_err(disk)?;
        }
        let partial = to.with_added_extension("partial");
        let mut file = BufWriter::new(File::create(&partial).map_err(disk)?);
        let digest = self.read_into(&mut file)?;
        file.flush().map_err(disk)?;
        fs::rename(&partial, to).map_err(disk)?;
        Ok(digest)
    }

    /// The same error, unless the missing object is a folder.
    fn or_folder(&self, error: StoreError) -> StoreError {
        let is_folder = || self.run(self.store.list(Some(&self.path)).try_next()).is_ok_and(|first| first.is_some());
        match error {
            StoreError::Missing { role, uri } if is_folder() => StoreError::Folder { role, uri },
            error => error,
        }
    }

    /// Reads an object for its digest alone.
    ///
    /// # Errors
    /// It is missing, or the store fails.
    pub fn digest(&self) -> Result<ArtifactFile, StoreError> {
        self.stream(&mut io::sink())
    }

    /// Reads an object into `to`, and tells its digest.
    ///
    /// # Errors
    /// The object is missing, or the store or the disk fails.
    pub fn read_into(&self, to: &mut (impl Write + ?Sized)) -> Result<ArtifactFile, StoreError> {
        self.stream(to).map_err(|error| self.or_folder(error))
    }

    fn stream(&self, to: &mut (impl Write + ?Sized)) -> Result<ArtifactFile, StoreError> {
        let mut hash = Sha256::new();
        let mut size = 0;
        let mut stream = self.run(async { Ok(self.store.get(&self.path).await?.into_stream()) })?;
        while let Some(chunk) = self.run(stream.try_next())? {
            hash.update(&chunk);
            size += chunk.len() as u64;
            to.write_all(&chunk).map_err(|source| StoreError::Disk { path: self.local_name(), source })?;
        }
        Ok(ArtifactFile { path: self.uri.file_name().to_owned(), sha256: format!("{:x}", hash.finalize()), size })
    }

    fn local_name(&self) -> PathBuf {
        PathBuf::from(self.uri.file_name())
    }

    /// Every object in this folder and below, by its path in the folder, sorted.
    ///
    /// # Errors
    /// The store fails.
    pub fn list(&self) -> Result<Vec<String>, StoreError> {
        self.list_to_depth(usize::MAX)
    }

    /// The same; but a disk is read only down to so many parts of the path.
    pub(super) fn list_to_depth(&self, depth: usize) -> Result<Vec<String>, StoreError> {
        match &self.on_disk {
            Some(folder) => self.list_disk(folder, depth),
            None => self.list_bucket(),
        }
    }

    fn list_bucket(&self) -> Result<Vec<String>, StoreError> {
        let objects: Vec<_> = self.run(self.store.list(Some(&self.path)).try_collect())?;
        let folder = if self.path.is_root() { String::new() } else { format!("{}/", self.path.as_ref()) };
        // An empty object whose key ends in a slash is how S3's consoles keep a folder.
        let is_marker = |key: &str, size: u64| size == 0 && key.ends_with('/');
        let keys = objects.iter().map(|object| (decoded_key(&object.location), object.size));
        let objects = keys.filter(|(key, size)| !is_marker(key, *size));
        let mut names: Vec<String> =
            objects.filter_map(|(key, _)| Some(key.strip_prefix(&folder)?.to_owned())).collect();
        names.sort();
        Ok(names)
    }

    /// Writes an object, in place of any other.
    ///
    /// # Errors
    /// The store fails.
    pub fn write(&self, bytes: impl Into<Bytes>) -> Result<(), StoreError> {
        let bytes = bytes.into();
        self.run(async {
            if bytes.len() <= MULTIPART_BYTES {
                self.store.put(&self.path, bytes.into()).await?;
                return Ok(());
            }
            let upload = self.store.put_multipart(&self.path).await?;
            let mut upload = WriteMultipart::new_with_chunk_size(upload, PART_BYTES);
            for start in (0..bytes.len()).step_by(PART_BYTES) {
                upload.wait_for_capacity(CONCURRENT_PARTS).await?;
                upload.put(bytes.slice(start..bytes.len().min(start + PART_BYTES)));
            }
            upload.finish().await?;
            Ok(())
        })
    }

    /// Writes an object as it comes into being, in place of any other, and tells its digest. It appears when it is whole.
    ///
    /// # Errors
    /// The store or `write` fails.
    pub fn stream_in(&self, write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<ArtifactFile, StoreError> {
        let to = ObjectWriter::with_capacity(self.store.clone(), self.path.clone(), PART_BYTES);
        let to = to.with_max_concurrency(CONCURRENT_PARTS);
        let mut upload = Upload { runtime: &self.runtime, to, hash: Sha256::new(), size: 0 };
        let written = write(&mut upload);
        let ended = match &written {
            Ok(()) => self.runtime.block_on(upload.to.shutdown()),
            // What is left over of it is invisible, and of no use.
            Err(_) => self.runtime.block_on(upload.to.abort()).map_err(io::Error::other),
        };
        written.and(ended).map_err(|error| match error.downcast::<ObjectError>() {
            Ok(error) => StoreError::new(self.role, &self.uri, &error, &self.secrets),
            Err(source) => StoreError::Disk { path: self.local_name(), source },
        })?;
        let sha256 = format!("{:x}", upload.hash.finalize());
        Ok(ArtifactFile { path: self.uri.file_name().to_owned(), sha256, size: upload.size })
    }

    /// The size of an object, in bytes; nothing of it is read.
    ///
    /// # Errors
    /// It is missing, or the store fails.
    pub fn size(&self) -> Result<u64, StoreError> {
        Ok(self.run(self.store.head(&self.path))?.size)
    }

    /// A part of an object, which has so many bytes.
    ///
    /// # Errors
    /// It is missing or shorter, or the store fails.
    pub fn read_range(&self, range: Range<u64>) -> Result<Bytes, StoreError> {
        self.run(self.store.get_range(&self.path, range))
    }

    /// Writes an object unless there is one.
    ///
    /// # Errors
    /// The store fails.
    pub fn create(&self, bytes: impl Into<Bytes>) -> Result<Created, StoreError> {
        let options = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
        let payload = PutPayload::from(bytes.into());
        self.run(async {
            match self.store.put_opts(&self.path, payload, options).await {
                Ok(_) => Ok(Created::New),
                Err(ObjectError::AlreadyExists { .. } | ObjectError::Precondition { .. }) => Ok(Created::Exists),
                Err(error) => Err(error),
            }
        })
    }

    /// Deletes an object; a missing one is fine.
    ///
    /// # Errors
    /// The store fails.
    pub fn delete(&self) -> Result<(), StoreError> {
        match self.run(self.store.delete(&self.path)) {
            Err(StoreError::Missing { .. }) => Ok(()),
            deleted => deleted,
        }
    }

    fn run<T>(&self, work: impl Future<Output = object_store::Result<T>>) -> Result<T, StoreError> {
        self.runtime.block_on(work).map_err(|error| StoreError::new(self.role, &self.uri, &error, &self.secrets))
    }
}
