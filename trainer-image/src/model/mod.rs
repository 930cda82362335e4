//! The base model's folder: which of its files are used, their digest, and whether they fit together. A GGUF file becomes
//! such a folder first.

mod files;
mod gguf;
mod outline;
mod source;
mod tensors;
#[cfg(test)]
mod tests;

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
};

use tunesmith_crds::{Uri, adapter_version::ArtifactFile, run::ModelShape};
use tunesmith_engine::{Error as EngineError, FiniteScan, ModelConfig, weights};

use self::{
    files::{ADAPTER, INDEX, OPTIONAL, REQUIRED, WEIGHTS, hint, is_copied, is_gguf, is_listed, shards},
    outline::{Compare, OUTPUT},
    source::Source,
    tensors::{Tensor, header, not_finite, shape, unplaced, used},
};
pub(crate) use self::{
    files::{check_whole, copied_in},
    tensors::read_header,
};
use crate::{
    digest,
    store::{StoreError, Stores},
};

/// What of the weights stays on this machine once their bytes were seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// All: they are to be computed with.
    Whole,
    /// Their headers, and the few tensors that are looked into: they were to be checked. Weights that lie on a disk already stay as they are.
    Headers,
}

/// A base model on this machine.
pub struct ModelFolder {
    /// Where its files are.
    pub folder: PathBuf,
    /// Digest (`sha256:…`) of the files that are used.
    pub digest: String,
    /// Its dimensions.
    pub config: ModelConfig,
    /// The same for the planner, with the number of stored parameters.
    pub shape: ModelShape,
    /// What of the files is not used, a sentence each.
    pub warnings: Vec<String>,
}

/// Why a model folder can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The store failed, or a file is gone.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Nothing is there.
    #[error(
        "no files under {uri} (base model): check baseModel.uri, which names a folder or a .gguf file, and that the model \
         was uploaded; a folder must hold config.json, model.safetensors, tokenizer.json and tokenizer_config.json"
    )]
    Empty {
        /// Where the model should be.
        uri: Uri,
    },
    /// A file is missing.
    #[error("{uri} (base model) has no {what}")]
    MissingFile {
        /// Where the model is.
        uri: Uri,
        /// What is missing, and what to do about it.
        what: String,
    },
    /// A file holds what can't be used.
    #[error("{uri}: {problem}")]
    Unusable {
        /// Which file.
        uri: Uri,
        /// What is wrong with it.
        problem: String,
    },
}

impl ModelFolder {
    /// Brings a model to this machine (into `work`, unless it is on a disk already) and checks it. `uri` is a Hugging
    /// Face folder or a GGUF file.
    ///
    /// # Errors
    /// A file is missing or damaged, or the model is not supported.
    pub fn fetch(uri: &Uri, stores: &Stores, work: &Path) -> Result<Self, ModelError> {
        Self::bring(uri, stores, work, Keep::Whole)
    }

    /// The same, of which so much stays.
    ///
    /// # Errors
    /// A file is missing or damaged, or the model is not supported.
    pub fn bring(uri: &Uri, stores: &Stores, work: &Path, keep: Keep) -> Result<Self, ModelError> {
        match is_gguf(uri.file_name()) {
            true => gguf::bring(uri, stores, work, keep),
            false => Self::fetch_folder(&Source::open(uri, stores, work, keep)?, keep),
        }
    }

    fn fetch_folder(source: &Source, keep: Keep) -> Result<Self, ModelError> {
        let (present, folder) = (source.files(), source.folder());
        if present.is_empty() {
            return Err(ModelError::Empty { uri: source.uri().clone() });
        }
        let missing = |file| {
            let what = format!("{file}{}", hint(file, present));
            ModelError::MissingFile { uri: source.uri().clone(), what }
        };
        if let Some(file) = REQUIRED.into_iter().find(|file| !present.contains(*file)) {
            return Err(missing(file));
        }
        let weights =
            [WEIGHTS, INDEX].into_iter().find(|name| present.contains(*name)).ok_or_else(|| missing(WEIGHTS))?;
        if present.contains(ADAPTER) {
            let problem = "lies beside a whole model: transformers would load the model that it names, with this adapter. \
                           Remove it, or put the adapter into its base model with `tunesmith-trainer merge` and name the \
                           result";
            return Err(ModelError::Unusable { uri: source.uri().join(ADAPTER), problem: problem.into() });
        }
        let is_folder = |name: &str| present.iter().any(|file| file.starts_with(&format!("{name}/")));
        if let Some(name) = OPTIONAL.into_iter().find(|name| !present.contains(*name) && is_folder(name)) {
            let problem = "is a folder there, where a file is meant: put the model's own file there".into();
            return Err(ModelError::Unusable { uri: source.uri().join(name), problem });
        }
        let mut files = Vec::new();
        for name in REQUIRED.into_iter().chain(OPTIONAL.into_iter().filter(|name| present.contains(*name))) {
            files.push(fetch_whole(source, name, &mut io::sink())?);
        }
        let unusable = |file: &str, problem: String| ModelError::Unusable { uri: source.uri().join(file), problem };
        // Before the weights, which may be large.
        let config = ModelConfig::load(folder).map_err(|error| unusable("config.json", problem_of(error)))?;
        let names = match weights {
            INDEX => {
                files.push(fetch_whole(source, INDEX, &mut io::sink())?);
                shards(&folder.join(INDEX), present).map_err(|problem| unusable(INDEX, problem))?
            }
            _ => vec![WEIGHTS.to_owned()],
        };
        for name in present.iter().filter(|name| is_copied(name) && !OPTIONAL.contains(&name.as_str())) {
            source.fetch(name, &mut io::sink())?;
        }
        // An output layer beside the embedding may be used although the configuration ties them.
        let compare = match (config.tie_word_embeddings, weights) {
            (true, INDEX) if is_listed(&folder.join(INDEX), OUTPUT) => Compare::Each,
            (true, WEIGHTS) => Compare::WithOutput,
            _ => Compare::No,
        };
        let (tensors, not_finite_of) = fetch_weights(source, &names, (keep, compare), &mut files)?;
        let config = match config.tie_word_embeddings && tensors.contains_key(OUTPUT) {
            true => ModelConfig::of_folder(folder).map_err(|error| unusable("config.json", problem_of(error)))?,
            false => config,
        };
        for (file, names) in &not_finite_of {
            let used = used(names, &config, &tensors);
            if !used.is_empty() {
                return Err(unusable(file, not_finite(&used)));
            }
        }
        weights::check(folder, &config).map_err(|error| unusable(weights, problem_of(error)))?;
        let (digest, shape) = (digest::of_files(&files), shape(&config, &tensors));
        let warnings = unplaced(&config, &tensors).into_iter().collect();
        Ok(Self { digest, shape, folder: folder.to_owned(), config, warnings })
    }
}

/// Brings a file here that must hold something.
fn fetch_whole(source: &Source, name: &str, also: &mut dyn io::Write) -> Result<ArtifactFile, ModelError> {
    checked(source, name, source.fetch(name, also)?)
}

/// A file that came here, if it holds something.
fn checked(source: &Source, name: &str, file: ArtifactFile) -> Result<ArtifactFile, ModelError> {
    let unusable = |problem| ModelError::Unusable { uri: source.uri().join(name), problem };
    check_whole(&source.folder().join(name)).map_err(unusable)?;
    Ok(file)
}

/// Names of tensors that are not finite, by the file that holds them.
type NotFinite<'a> = Vec<(&'a String, Vec<String>)>;

/// Brings the files `names` of weights here, adds them to `files`, and tells their tensors; and for each file those
/// that are not finite, which shows as the bytes go by.
fn fetch_weights<'a>(
    source: &Source,
    names: &'a [String],
    (keep, compare): (Keep, Compare),
    files: &mut Vec<ArtifactFile>,
) -> Result<(BTreeMap<String, Tensor>, NotFinite<'a>), ModelError> {
    let unusable = |file: &str, problem: String| ModelError::Unusable { uri: source.uri().join(file), problem };
    let (mut tensors, mut not_finite_of) = (BTreeMap::new(), Vec::new());
    for name in names {
        let mut scan = FiniteScan::default();
        let file = match keep {
            Keep::Whole => source.fetch(name, &mut scan)?,
            Keep::Headers => source.fetch_header(name, compare, &mut scan)?,
        };
        files.push(checked(source, name, file)?);
        let found = header(&source.folder().join(name)).map_err(|problem| unusable(name, problem))?;
        tensors.extend(found);
        not_finite_of.push((name, scan.into_names()));
    }
    Ok((tensors, not_finite_of))
}

/// What the engine says, without the path of a file on this machine.
fn problem_of(error: EngineError) -> String {
    match error {
        EngineError::Config { message, .. } => message,
        EngineError::Weights { path, message } => match path.file_name() {
            // A shard; the folder's own name says nothing, and the index is named as it is.
            Some(name) if path.is_file() && name != INDEX => format!("{}: {message}", name.display()),
            _ => message,
        },
        EngineError::Io { source, .. } => format!("can't be read: {source}"),
        other => other.to_string(),
    }
}
