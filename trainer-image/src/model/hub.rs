//! A model repository of the Hugging Face Hub, read through hf-hub: its files at one commit.

#[cfg(test)]
mod tests;

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use hf_hub::{
    Cache, Repo, RepoType,
    api::sync::{ApiBuilder, ApiError, ApiRepo},
};
use tunesmith_crds::{Uri, adapter_version::ArtifactFile};

use super::ModelError;
use crate::{
    digest,
    store::{Role, StoreError, Stores},
};

/// How often a download that broke off is taken up again.
const RETRIES: usize = 5;

/// A repository at one commit.
pub(super) struct Repository {
    uri: Uri,
    stores: Stores,
    api: ApiRepo,
    /// Every file of the commit.
    files: BTreeSet<String>,
    /// Where downloaded files lie, under their names.
    folder: PathBuf,
}

impl Repository {
    /// Asks the Hub for the commit that the URI's revision names now. Files will go into the cache that `HF_HOME` names,
    /// or under `work`.
    pub(super) fn open(
        uri: &Uri,
        repo: &str,
        revision: Option<&str>,
        stores: &Stores,
        work: &Path,
    ) -> Result<Self, ModelError> {
        let cache = match stores.hub_setting("HF_HOME") {
            Some(home) => Path::new(&home).join("hub"),
            None => work.join("hub"),
        };
        let cache = Cache::new(cache);
        let mut builder = ApiBuilder::from_cache(cache.clone())
            .with_progress(false)
            .with_retries(RETRIES)
            .with_user_agent("tunesmith", env!("CARGO_PKG_VERSION"));
        if let Some(endpoint) = stores.hub_setting("HF_ENDPOINT") {
            builder = builder.with_endpoint(endpoint.trim_end_matches('/').to_owned());
        }
        if let Some(token) = stores.hub_setting("HF_TOKEN") {
            builder = builder.with_token(Some(token));
        }
        let at = |revision: String| Repo::with_revision(repo.to_owned(), RepoType::Model, revision);
        let failed = |error| explain(uri, stores, error);
        let api = builder.build().map_err(failed)?;
        let named = revision.map_or_else(|| "main".to_owned(), |revision| revision.replace("%2F", "/"));
        let info = api.repo(at(named)).info().map_err(failed)?;
        // All files of this commit, whatever is pushed meanwhile.
        let pinned = at(info.sha.clone());
        tracing::info!(%uri, commit = info.sha, "found on the Hub");
        Ok(Self {
            uri: uri.clone(),
            stores: stores.clone(),
            folder: cache.repo(pinned.clone()).pointer_path(&info.sha),
            api: api.repo(pinned),
            files: info.siblings.into_iter().map(|file| file.rfilename).collect(),
        })
    }

    pub(super) fn uri(&self) -> &Uri {
        &self.uri
    }

    pub(super) fn files(&self) -> &BTreeSet<String> {
        &self.files
    }

    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    fn uri_of(&self, name: &str) -> Uri {
        let mut uri = self.uri.clone();
        if let Uri::Hub { path, .. } = &mut uri {
            *path = name.to_owned();
        }
        uri
    }

    /// Brings a file here, unless it is in the cache, and tells its digest.
    pub(super) fn fetch(&self, name: &str) -> Result<ArtifactFile, ModelError> {
        let path = self.folder.join(name);
        // Not ApiRepo::get: that knows only what hf-hub itself has brought here under this commit's name.
        if !path.exists() {
            self.api.download(name).map_err(|error| explain(&self.uri_of(name), &self.stores, error))?;
        }
        let disk = |source| StoreError::Disk { path: path.clone(), source };
        let file = digest::file_on_disk(&path, name).map_err(disk)?;
        // The cache keeps a large file under the digest that the Hub gave for it.
        let blob = fs::canonicalize(&path).map_err(disk)?;
        let promised = blob.file_name().and_then(|name| name.to_str()).filter(|name| is_sha256(name));
        if promised.is_some_and(|promised| promised != file.sha256) {
            // The next attempt shall not find it.
            fs::remove_file(&blob).and_then(|()| fs::remove_file(&path)).map_err(disk)?;
            let answer = format!("{} bytes came, and their SHA-256 is not the one that the Hub names", file.size);
            return Err(StoreError::Unavailable { role: Role::Model, uri: self.uri_of(name), answer }.into());
        }
        tracing::info!(uri = %self.uri_of(name), bytes = file.size, "here");
        Ok(file)
    }
}

fn is_sha256(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

fn explain(uri: &Uri, stores: &Stores, error: ApiError) -> ModelError {
    let status = match &error {
        ApiError::RequestError(error) => match **error {
            ureq::Error::StatusCode(status) => Some(status),
            _ => None,
        },
        _ => None,
    };
    let problem = match status {
        Some(401 | 403) => {
            "the Hub has no such model, or it is private or gated: check the name; else accept the model's terms there, and \
             put a token that may read it as HF_TOKEN into the Secret that baseModel.secretRef names"
        }
        Some(404) => "the Hub has no such repository, revision or file: check baseModel.uri",
        _ => {
            let answer = stores.redact(&error.to_string());
            return StoreError::Unavailable { role: Role::Model, uri: uri.clone(), answer }.into();
        }
    };
    ModelError::Unusable { uri: uri.clone(), problem: problem.into() }
}
