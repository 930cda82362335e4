//! A base model that is a GGUF file: it becomes a Hugging Face folder first, with its weights or without them.

use std::{
    fs,
    path::{Path, PathBuf},
};

use tunesmith_crds::Uri;

use super::{
    Keep, ModelError, ModelFolder,
    files::{SPLIT, WEIGHTS, check_whole, is_part_of_gguf},
    outline::GgufOutline,
    source::{Fetched, Source, fetch_file, read_file},
    tensors::not_finite,
};
use crate::{
    convert::{ConvertError, convert, convert_outline},
    digest,
    store::{StoreError, Stores},
};

/// The name by which the file goes into the model's digest.
const NAME: &str = "model.gguf";

/// Brings a GGUF file's folder to this machine and checks it.
pub(super) fn bring(uri: &Uri, stores: &Stores, work: &Path, keep: Keep) -> Result<ModelFolder, ModelError> {
    if is_part_of_gguf(uri.file_name()) {
        return Err(unusable(uri, format!("it is {SPLIT}")));
    }
    let as_uri = |folder: &Path| Uri::File { path: folder.display().to_string() };
    let named = |error| of_file(uri, error);
    match keep {
        Keep::Whole => {
            let (folder, digest) = whole(uri, stores, work)?;
            let source = Source::open(&as_uri(&folder), stores, work, keep)?;
            Ok(ModelFolder { digest, ..ModelFolder::fetch_folder(&source, keep).map_err(named)? })
        }
        Keep::Headers => {
            let (folder, digest, broken) = headers(uri, stores, work)?;
            let source = Source::open_outline(&as_uri(&folder), stores, work)?;
            let model = ModelFolder::fetch_folder(&source, keep).map_err(named)?;
            match broken.is_empty() {
                true => Ok(ModelFolder { digest, ..model }),
                false => {
                    Err(named(unusable(&source.uri().join(WEIGHTS), not_finite(&broken.iter().collect::<Vec<_>>()))))
                }
            }
        }
    }
}

/// Converts the file into a folder under `work`, where it may be already, and tells the file's digest.
fn whole(uri: &Uri, stores: &Stores, work: &Path) -> Result<(PathBuf, String), ModelError> {
    let Fetched { path, file, is_copy } = fetch_file(uri, stores, work, NAME)?;
    check_whole(&path).map_err(|problem| unusable(uri, problem))?;
    let digest = digest::of_files(&[file]);
    let folder = folder_of(work, &digest);
    if !folder.exists() {
        convert(&path, &folder).map_err(|error| refused(uri, error))?;
        tracing::info!(%uri, "converted from GGUF");
    }
    if is_copy {
        // Weights are not kept twice.
        remove(&path)?;
    }
    Ok((folder, digest))
}

/// Reads the file, and makes the same folder with the weights' headers alone. Tells the file's digest, and the names of weights
/// that are not finite.
fn headers(uri: &Uri, stores: &Stores, work: &Path) -> Result<(PathBuf, String, Vec<String>), ModelError> {
    let kept = work.join("headers");
    let path = kept.join(NAME);
    let disk = |source| StoreError::Disk { path: path.clone(), source };
    fs::create_dir_all(&kept).map_err(disk)?;
    let mut outline = GgufOutline::create(&path).map_err(disk)?;
    let file = read_file(uri, stores, work, NAME, &mut outline)?;
    let broken = outline.finish().map_err(disk)?;
    check_whole(&path).map_err(|problem| unusable(uri, problem))?;
    let digest = digest::of_files(&[file]);
    let folder = folder_of(&kept, &digest);
    if folder.exists() {
        fs::remove_dir_all(&folder).map_err(|source| StoreError::Disk { path: folder.clone(), source })?;
    }
    let broken = convert_outline(&path, &folder, &broken).map_err(|error| refused(uri, error))?;
    tracing::info!(%uri, "its header is converted from GGUF");
    remove(&path)?;
    Ok((folder, digest, broken))
}

fn folder_of(work: &Path, digest: &str) -> PathBuf {
    work.join(format!("gguf-{}", &digest["sha256:".len()..][..16]))
}

fn remove(path: &Path) -> Result<(), StoreError> {
    fs::remove_file(path).map_err(|source| StoreError::Disk { path: path.to_owned(), source })
}

fn unusable(uri: &Uri, problem: String) -> ModelError {
    ModelError::Unusable { uri: uri.clone(), problem }
}

fn refused(uri: &Uri, error: ConvertError) -> ModelError {
    match error {
        ConvertError::Io { path, source } => ModelError::Store(StoreError::Disk { path, source }),
        other => unusable(uri, other.to_string()),
    }
}

/// An error of the folder that was made of a file, as one of that file.
fn of_file(uri: &Uri, error: ModelError) -> ModelError {
    match error {
        ModelError::Unusable { uri: made, problem } => {
            unusable(uri, format!("{}, as it is converted: {problem}", made.file_name()))
        }
        error => error,
    }
}
