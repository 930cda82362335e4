//! A repository of the Hugging Face Hub: its files at one commit, in the cache that all its clients share (hf-hub names
//! its folders). The transfer is our own, as hf-hub's waits for ever on a server that stands still.

pub mod dataset;
#[cfg(test)]
mod tests;
mod transfer;

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf, absolute},
};

use hf_hub::{Cache, Repo, RepoType, api::RepoInfo};
use tunesmith_crds::{Uri, adapter_version::ArtifactFile};

use self::transfer::{Failure, Transfer};
use crate::{
    digest::{self, Hashing},
    store::{HubSettings, Role, StoreError, Stores},
};

/// A repository at one commit.
pub struct Repository {
    uri: Uri,
    role: Role,
    stores: Stores,
    transfer: Transfer,
    /// The address of its files, without their names.
    files_url: String,
    /// Every file of the commit.
    files: BTreeSet<String>,
    /// Where downloaded files lie, under their names.
    folder: PathBuf,
    /// Whether the cache is this process's own.
    is_own: bool,
    /// Where their bytes lie, under the digests that the Hub gives them.
    blobs: PathBuf,
}

impl Repository {
    /// Asks the Hub for the commit that the URI's revision names now. Files will go into the cache that `HF_HOME` names,
    /// or under `work`.
    ///
    /// # Errors
    /// The settings can't be used, the Hub refuses or does not answer, or `uri` is none of the Hub.
    pub fn open(uri: &Uri, role: Role, stores: &Stores, work: &Path) -> Result<Self, StoreError> {
        let (repo, revision, kind) = match uri {
            Uri::Hub { repo, revision, .. } => (repo.as_str(), revision.as_deref(), RepoType::Model),
            Uri::HubDataset { repo, revision, .. } => (&**repo, revision.as_deref(), RepoType::Dataset),
            _ => {
                let problem = "it is no repository of the Hub".into();
                return Err(StoreError::Settings { role, uri: uri.clone(), problem });
            }
        };
        let HubSettings { endpoint, token, cache, timeout } = stores.hub_settings(role, uri)?;
        let is_own = cache.is_none();
        let cache = absolute(cache.unwrap_or_else(|| work.join("hub")));
        let cache = Cache::new(cache.map_err(|source| StoreError::Disk { path: work.to_owned(), source })?);
        let transfer = Transfer::new(token, timeout);
        let at = |revision: String| Repo::with_revision(repo.to_owned(), kind, revision);
        let named = at(revision.map_or_else(|| "main".to_owned(), |revision| revision.replace("%2F", "/")));
        let info: RepoInfo = transfer
            .json(&format!("{endpoint}/api/{}", named.api_url()))
            .map_err(|failure| explain(role, uri, stores, failure))?;
        if !info.sha.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            let answer = format!("the Hub names a commit {:?}", info.sha);
            return Err(StoreError::Unavailable { role, uri: uri.clone(), answer });
        }
        // All files of this commit, whatever is pushed meanwhile.
        let pinned = at(info.sha.clone());
        tracing::info!(%uri, commit = info.sha, "found on the Hub");
        if let Err(error) = cache.repo(named).create_ref(&info.sha) {
            // It is for other clients, and a shared cache may be read-only.
            tracing::debug!(%error, "the branch is not noted in the cache");
        }
        let in_cache = cache.repo(pinned.clone());
        Ok(Self {
            files_url: format!("{endpoint}/{}/resolve/{}", pinned.url(), pinned.url_revision()),
            folder: in_cache.pointer_path(&info.sha),
            is_own,
            blobs: in_cache.blob_path(""),
            files: info.siblings.into_iter().map(|file| file.rfilename).filter(|name| stays_inside(name)).collect(),
            uri: uri.clone(),
            role,
            stores: stores.clone(),
            transfer,
        })
    }

    /// The URI that it was opened by.
    pub fn uri(&self) -> &Uri {
        &self.uri
    }

    /// The names of all its files.
    pub fn files(&self) -> &BTreeSet<String> {
        &self.files
    }

    /// Where fetched files are.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Whether the cache is this process's own: no other client reads it.
    pub fn is_own(&self) -> bool {
        self.is_own
    }

    /// Reads a file into `to`, past the cache, and tells its digest.
    ///
    /// # Errors
    /// It is missing, the Hub fails, other bytes come than it promises, or `to` fails.
    pub fn stream(&self, name: &str, to: &mut dyn Write) -> Result<ArtifactFile, StoreError> {
        let uri = self.uri.with_path(name);
        if !stays_inside(name) {
            return Err(StoreError::Missing { role: self.role, uri });
        }
        let url = self.url(name);
        let mut hashing = Hashing::new(to);
        let etag = self.transfer.etag(&url).and_then(|etag| self.transfer.stream(&url, &mut hashing).map(|()| etag));
        let etag = etag.map_err(|failure| explain(self.role, &uri, &self.stores, failure))?;
        let file = hashing.file(name);
        self.check_promised(&uri, &file, Some(&etag))?;
        tracing::info!(%uri, bytes = file.size, "read");
        Ok(file)
    }

    /// Checks a digest against the Hub's, which names that of a large file.
    fn check_promised(&self, uri: &Uri, file: &ArtifactFile, etag: Option<&str>) -> Result<(), StoreError> {
        if etag.filter(|etag| is_sha256(etag)).is_none_or(|promised| promised == file.sha256) {
            return Ok(());
        }
        let answer = format!("{} bytes came, and their SHA-256 is not the one that the Hub names", file.size);
        Err(StoreError::Unavailable { role: self.role, uri: uri.clone(), answer })
    }

    fn url(&self, name: &str) -> String {
        format!("{}/{}", self.files_url, transfer::url_path(name))
    }

    /// Brings a file here, unless it is in the cache, and tells its digest.
    ///
    /// # Errors
    /// It is missing, or the Hub or the disk fails.
    pub fn fetch(&self, name: &str) -> Result<ArtifactFile, StoreError> {
        let (uri, path) = (self.uri.with_path(name), self.folder.join(name));
        if !stays_inside(name) {
            return Err(StoreError::Missing { role: self.role, uri });
        }
        let disk = |source| StoreError::Disk { path: path.clone(), source };
        if !path.exists() {
            self.download(name, &path).map_err(|failure| match failure {
                Failure::Disk(source) => disk(source),
                failure => explain(self.role, &uri, &self.stores, failure),
            })?;
        }
        let file = digest::file_on_disk(&path, name).map_err(disk)?;
        // The cache keeps a large file under the digest that the Hub gave for it.
        let blob = fs::canonicalize(&path).map_err(disk)?;
        if let Err(error) = self.check_promised(&uri, &file, blob.file_name().and_then(|name| name.to_str())) {
            // The next attempt shall not find it.
            fs::remove_file(&blob).and_then(|()| fs::remove_file(&path)).map_err(disk)?;
            return Err(error);
        }
        tracing::info!(%uri, bytes = file.size, "here");
        Ok(file)
    }

    fn download(&self, name: &str, path: &Path) -> Result<(), Failure> {
        let url = self.url(name);
        let etag = self.transfer.etag(&url)?;
        let blob = self.blobs.join(&etag);
        fs::create_dir_all(&self.blobs)?;
        if !blob.exists() {
            let lock = File::create(self.blobs.join(format!("{etag}.lock")))?;
            transfer::lock(&lock)?;
            let partial = self.blobs.join(format!("{etag}.part"));
            self.transfer.download(&url, &partial)?;
            fs::rename(&partial, &blob)?;
        }
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        // From snapshots/<commit>/<name> to blobs/<digest>.
        let up = "../".repeat(2 + name.matches('/').count());
        match std::os::unix::fs::symlink(format!("{up}blobs/{etag}"), path) {
            // A link whose blob was deleted.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.exists() => Ok(()),
            linked => Ok(linked?),
        }
    }
}

fn stays_inside(name: &str) -> bool {
    name.split('/').all(|part| !part.is_empty() && part != "." && part != "..")
}

fn is_sha256(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

fn explain(role: Role, uri: &Uri, stores: &Stores, failure: Failure) -> StoreError {
    let (what, field) = match role {
        Role::Model => ("model", "baseModel.uri"),
        _ => ("data set", "dataset.train.uri or dataset.eval.uri"),
    };
    let uri = uri.clone();
    let problem = match failure {
        Failure::Status(401 | 403) => format!(
            "the Hub has no such {what}, or it is private or gated: check the name; else accept its terms there, and \
             put a token that may read it as HF_TOKEN into the Secret that {} names",
            role.secret_field()
        ),
        Failure::Status(404) => format!("the Hub has no such repository, revision or file: check {field}"),
        Failure::Status(status) => format!("the Hub answers with status {status}: check {field} and HF_ENDPOINT"),
        Failure::Disk(source) => return StoreError::Disk { path: uri.file_name().into(), source },
        Failure::Transient(answer) => {
            return StoreError::Unavailable { role, uri, answer: stores.redact(&answer) };
        }
    };
    StoreError::Unreadable { role, uri, problem }
}
