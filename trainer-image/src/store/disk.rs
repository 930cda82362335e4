//! Reading and listing on this machine's disks, where `object_store` would hide some names and explain few errors.

use std::{
    fs,
    io::{self, ErrorKind},
    path::{Path, PathBuf},
};

use tunesmith_crds::adapter_version::ArtifactFile;
use walkdir::WalkDir;

use super::{Location, Role, StoreError, is_final};
use crate::digest;

impl Location {
    /// The error of a file or folder of this machine that was to be read.
    pub fn unreadable(&self, error: &io::Error) -> StoreError {
        let (role, uri) = (self.role, self.uri.clone());
        match error.kind() {
            ErrorKind::NotFound => StoreError::Missing { role, uri },
            ErrorKind::IsADirectory => StoreError::Folder { role, uri },
            _ if is_final(error) => StoreError::Unreadable { role, uri, problem: error.to_string() },
            _ => StoreError::Unavailable { role, uri, answer: error.to_string() },
        }
    }

    /// The digest of a file that is on this machine at `path`, under `name`.
    ///
    /// # Errors
    /// It is missing, is no file, or can't be read.
    pub fn digest_on_disk(&self, path: &Path, name: &str) -> Result<ArtifactFile, StoreError> {
        let metadata = fs::metadata(path).map_err(|error| self.unreadable(&error))?;
        if metadata.is_dir() {
            return Err(StoreError::Folder { role: self.role, uri: self.uri.clone() });
        }
        if !metadata.is_file() {
            // It is read more than once.
            let problem = "it is a pipe or a device, not a file: write it to a file first".into();
            return Err(StoreError::Unreadable { role: self.role, uri: self.uri.clone(), problem });
        }
        digest::file_on_disk(path, name).map_err(|error| self.unreadable(&error))
    }

    /// The files of a folder of this machine by their paths in it, down to `depth` parts.
    pub(super) fn list_disk(&self, folder: &Path, depth: usize) -> Result<Vec<String>, StoreError> {
        let mut names = Vec::new();
        let walk = WalkDir::new(folder).min_depth(1).max_depth(depth).follow_links(true);
        for entry in walk {
            let (path, is_dir) = match entry {
                Ok(entry) => (entry.path().to_owned(), entry.file_type().is_dir()),
                // A link back to where we come from has nothing new.
                Err(error) if error.loop_ancestor().is_some() => continue,
                Err(error) => match self.listing_failed(folder, &error)? {
                    Some(path) => (path, false),
                    None => continue,
                },
            };
            let relative = path.strip_prefix(folder).unwrap_or(&path);
            match relative.to_str() {
                Some(name) if !is_dir && !self.is_upload(name) => names.push(name.to_owned()),
                Some(_) => {}
                None => tracing::warn!(path = %path.display(), "left out: its name is not UTF-8"),
            }
        }
        names.sort();
        Ok(names)
    }

    /// A file that is listed though it can't be looked at; none for a folder that is not there, or may be left out.
    fn listing_failed(&self, folder: &Path, error: &walkdir::Error) -> Result<Option<PathBuf>, StoreError> {
        let unknown = io::Error::other(error.to_string());
        let cause = error.io_error().unwrap_or(&unknown);
        match error.path().filter(|path| *path != folder) {
            // A link to nothing: reading it says so.
            Some(path) if cause.kind() == ErrorKind::NotFound => Ok(Some(path.to_owned())),
            Some(path) if cause.kind() == ErrorKind::PermissionDenied => {
                tracing::warn!(path = %path.display(), "left out: this process may not read the folder");
                Ok(None)
            }
            _ if cause.kind() == ErrorKind::NotFound => Ok(None),
            _ if cause.kind() == ErrorKind::NotADirectory => Ok(None),
            _ => Err(self.unreadable(cause)),
        }
    }

    /// Half an upload of the local store, which `object_store` names `file#1`.
    fn is_upload(&self, name: &str) -> bool {
        let is_number = |number: &str| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
        self.role == Role::Output && name.rsplit_once('#').is_some_and(|(_, number)| is_number(number))
    }
}
