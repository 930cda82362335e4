//! Where a base model's files come from: a place in a store, or a repository of the Hugging Face Hub.

use std::{
    collections::BTreeSet,
    fs,
    io::{self, ErrorKind, Write},
    path::{Path, PathBuf},
};

use tunesmith_crds::{Uri, adapter_version::ArtifactFile};

use super::{
    INDEX, Keep, ModelError, OPTIONAL, WEIGHTS, copied_in,
    outline::{Compare, SafetensorsOutline},
};
use crate::{
    digest,
    hub::Repository,
    store::{Location, Role, StoreError, Stores},
};

/// A folder of files that are fetched one by one.
pub(super) enum Source {
    /// In a store.
    Place(Box<Place>),
    /// On the Hub.
    Hub(Box<Repository>),
}

/// A folder in a store.
pub(super) struct Place {
    location: Location,
    /// Where its files are on this machine, or go.
    folder: PathBuf,
    files: BTreeSet<String>,
    /// It was made here, and its weights have holes.
    is_outline: bool,
}

impl Source {
    /// Opens a model's folder. What has to be downloaded will go under `work`.
    pub(super) fn open(uri: &Uri, stores: &Stores, work: &Path, keep: Keep) -> Result<Self, ModelError> {
        if let Uri::Hub { path, .. } = uri {
            if !path.is_empty() {
                let problem = "name the whole repository, hf://owner/name, or one of its .gguf files".into();
                return Err(ModelError::Unusable { uri: uri.clone(), problem });
            }
            return Ok(Self::Hub(Box::new(open_repository(uri, stores, work, keep)?)));
        }
        let location = stores.open(Role::Model, uri)?;
        if location.on_disk().is_some_and(Path::is_file) {
            let problem = "is a file: name the folder that holds the model, or a file that ends in .gguf".into();
            return Err(ModelError::Unusable { uri: uri.clone(), problem });
        }
        let files = location.list()?.into_iter().collect();
        let folder = match location.on_disk() {
            Some(folder) => folder.to_owned(),
            None => download_folder(&location, work, &files)?,
        };
        Ok(Self::Place(Box::new(Place { location, folder, files, is_outline: false })))
    }

    /// Opens a folder that was made here from a file of another format, and that has the weights' headers only.
    pub(super) fn open_outline(uri: &Uri, stores: &Stores, work: &Path) -> Result<Self, ModelError> {
        let mut source = Self::open(uri, stores, work, Keep::Headers)?;
        if let Self::Place(place) = &mut source {
            place.is_outline = true;
        }
        Ok(source)
    }

    pub(super) fn uri(&self) -> &Uri {
        match self {
            Self::Place(place) => place.location.uri(),
            Self::Hub(repository) => repository.uri(),
        }
    }

    /// The names of all its files.
    pub(super) fn files(&self) -> &BTreeSet<String> {
        match self {
            Self::Place(place) => &place.files,
            Self::Hub(repository) => repository.files(),
        }
    }

    /// Where fetched files are.
    pub(super) fn folder(&self) -> &Path {
        match self {
            Self::Place(place) => &place.folder,
            Self::Hub(repository) => repository.folder(),
        }
    }

    /// Brings one file here, where it may be already, and tells its digest. Its bytes go into `also`, too.
    pub(super) fn fetch(&self, name: &str, also: &mut dyn Write) -> Result<ArtifactFile, ModelError> {
        match self {
            Self::Place(place) => place.fetch(name, also),
            Self::Hub(repository) => {
                let file = repository.fetch(name)?;
                copy(&repository.folder().join(name), also)?;
                Ok(file)
            }
        }
    }

    /// The same for a file of weights, of which an outline stays here. One that lies on a disk, or in a cache that
    /// other clients share, is left as it is.
    pub(super) fn fetch_header(
        &self,
        name: &str,
        compare: Compare,
        also: &mut dyn Write,
    ) -> Result<ArtifactFile, ModelError> {
        match self {
            Self::Place(place) => place.fetch_header(name, compare, also),
            Self::Hub(repository) if repository.is_own() => {
                outline(&repository.folder().join(name), compare, also, |to| repository.stream(name, to))
            }
            Self::Hub(_) => self.fetch(name, also),
        }
    }
}

/// Opens a repository whose files, as far as they are kept, go under `work`. Where headers are kept, they are apart from whole
/// files, so that nobody takes them for such.
fn open_repository(uri: &Uri, stores: &Stores, work: &Path, keep: Keep) -> Result<Repository, StoreError> {
    let work = match keep {
        Keep::Whole => work.to_owned(),
        Keep::Headers => work.join("headers"),
    };
    Repository::open(uri, Role::Model, stores, &work)
}

/// Keeps the outline of a safetensors file that `read` writes; its bytes go into `also`, too.
fn outline(
    path: &Path,
    compare: Compare,
    also: &mut dyn Write,
    read: impl FnOnce(&mut dyn Write) -> Result<ArtifactFile, StoreError>,
) -> Result<ArtifactFile, ModelError> {
    let disk = |source| StoreError::Disk { path: path.to_owned(), source };
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).map_err(disk)?;
    }
    let mut outline = SafetensorsOutline::create(path, compare).map_err(disk)?;
    let file = read(&mut Both(&mut outline, also))?;
    outline.finish().map_err(disk)?;
    Ok(file)
}

impl Place {
    fn fetch(&self, name: &str, also: &mut dyn Write) -> Result<ArtifactFile, ModelError> {
        let (path, object) = (self.folder.join(name), self.location.join(name));
        if object.on_disk().is_some() {
            let unreadable = |error| unreadable(&object, &error);
            return check_is_file(&path).and_then(|()| digest::file_through(&path, name, also)).map_err(unreadable);
        }
        let file = object.download(&path)?;
        copy(&path, also)?;
        tracing::info!(uri = %object.uri(), bytes = file.size, "downloaded");
        Ok(file)
    }

    fn fetch_header(&self, name: &str, compare: Compare, also: &mut dyn Write) -> Result<ArtifactFile, ModelError> {
        let (path, object) = (self.folder.join(name), self.location.join(name));
        if self.is_outline {
            // The file that it was made from has been looked at, and its digest counts.
            return Ok(digest::file_of_bytes(name, &[]));
        }
        if object.on_disk().is_some() {
            return self.fetch(name, also);
        }
        let file = outline(&path, compare, also, |to| object.read_into(to))?;
        tracing::info!(uri = %object.uri(), bytes = file.size, "read");
        Ok(file)
    }
}

/// Writes to both.
struct Both<'a>(&'a mut dyn Write, &'a mut dyn Write);

impl Write for Both<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write_all(bytes)?;
        self.1.write_all(bytes)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()?;
        self.1.flush()
    }
}

/// The error of a file of the model on this machine. Another try helps only if the disk itself failed.
fn unreadable(object: &Location, error: &io::Error) -> ModelError {
    let problem = match error.kind() {
        ErrorKind::NotFound => "is missing, or a link that leads nowhere: copy the whole folder of the model there",
        ErrorKind::IsADirectory => "is a folder, where a file is meant: copy the model's own file there",
        ErrorKind::InvalidInput => "is a pipe or a device, where a file is meant: copy the model's own file there",
        ErrorKind::PermissionDenied => {
            "may not be read: make it readable for user or group 65532, with `chmod -R o+rX` on its folder"
        }
        _ => return object.unreadable(error).into(),
    };
    ModelError::Unusable { uri: object.uri().clone(), problem: problem.into() }
}

fn check_is_file(path: &Path) -> io::Result<()> {
    let metadata = fs::metadata(path)?;
    match (metadata.is_dir(), metadata.is_file()) {
        (true, _) => Err(ErrorKind::IsADirectory.into()),
        (false, true) => Ok(()),
        (false, false) => Err(ErrorKind::InvalidInput.into()),
    }
}

/// Reads a file that has come here from elsewhere.
fn copy(path: &Path, to: &mut dyn Write) -> Result<(), StoreError> {
    let disk = |source| StoreError::Disk { path: path.to_owned(), source };
    digest::read_through(path, |bytes| to.write_all(bytes)).map_err(disk)
}

/// A file on this machine.
pub(super) struct Fetched {
    pub(super) path: PathBuf,
    pub(super) file: ArtifactFile,
    /// It was brought here, and nobody else needs it.
    pub(super) is_copy: bool,
}

/// Brings a model that is one file here, under `work` unless it is on a disk already. Its digest goes by `name`.
pub(super) fn fetch_file(uri: &Uri, stores: &Stores, work: &Path, name: &str) -> Result<Fetched, ModelError> {
    if let Uri::Hub { path, .. } = uri {
        let repository = open_repository(uri, stores, work, Keep::Whole)?;
        let file = repository.fetch(path)?;
        let path = repository.folder().join(path);
        return Ok(Fetched { path, file: ArtifactFile { path: name.into(), ..file }, is_copy: false });
    }
    let location = stores.open(Role::Model, uri)?;
    if let Some(path) = location.on_disk() {
        let file = check_is_file(path).and_then(|()| digest::file_on_disk(path, name));
        let file = file.map_err(|error| unreadable(&location, &error))?;
        return Ok(Fetched { path: path.to_owned(), file, is_copy: false });
    }
    let path = work.join(name);
    let file = ArtifactFile { path: name.into(), ..location.download(&path)? };
    Ok(Fetched { path, file, is_copy: true })
}

/// Reads a model that is one file into `to`, and keeps no more of it than a cache that other clients share. Its digest goes
/// by `name`.
pub(super) fn read_file(
    uri: &Uri,
    stores: &Stores,
    work: &Path,
    name: &str,
    to: &mut dyn Write,
) -> Result<ArtifactFile, ModelError> {
    let file = if let Uri::Hub { path, .. } = uri {
        let repository = open_repository(uri, stores, work, Keep::Headers)?;
        match repository.is_own() {
            true => repository.stream(path, to)?,
            false => {
                let file = repository.fetch(path)?;
                copy(&repository.folder().join(path), to)?;
                file
            }
        }
    } else {
        let location = stores.open(Role::Model, uri)?;
        match location.on_disk() {
            Some(path) => {
                let file = check_is_file(path).and_then(|()| digest::file_through(path, name, to));
                file.map_err(|error| unreadable(&location, &error))?
            }
            None => location.read_into(to)?,
        }
    };
    Ok(ArtifactFile { path: name.into(), ..file })
}

/// A folder of this model's own under `work`, without files of an earlier download that the model no longer has: the
/// engine would take them for its weights.
fn download_folder(location: &Location, work: &Path, present: &BTreeSet<String>) -> Result<PathBuf, StoreError> {
    let digest = digest::of_bytes(location.uri().to_string().as_bytes());
    let folder = work.join(&digest["sha256:".len()..][..16]);
    let known = [WEIGHTS, INDEX].into_iter().chain(OPTIONAL).map(str::to_owned).chain(copied_in(&folder));
    for name in known.filter(|name| !present.contains(name)) {
        let path = folder.join(name);
        if path.exists() {
            fs::remove_file(&path).map_err(|source| StoreError::Disk { path, source })?;
        }
    }
    Ok(folder)
}
