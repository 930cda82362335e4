//! From trained weights to a published version: its files first, `manifest.json` last. Whoever sees the manifest sees
//! everything.

mod card;
mod claim;
mod curve;
#[cfg(test)]
pub(crate) mod fixtures;
mod full;
mod manifest;
mod peft;
mod tensorboard;
mod trainer_state;

use std::{collections::BTreeMap, fs, io, path::Path};

use tunesmith_crds::{
    Method, Uri,
    adapter_version::ArtifactFile,
    names::exit_code,
    run::{RunSpec, TrainReport, TrainTask},
};
use tunesmith_engine::LazyTensor;

pub(crate) use self::full::{ModelFiles, files as full_model};
pub use self::{claim::Claim, manifest::Manifest};
use crate::{
    digest,
    history::History,
    layout::{CHAT_TEMPLATE, MANIFEST, TOOL_TEMPLATE},
    method::lora_of,
    model::copied_in,
    store::{Created, Location, StoreError},
    tensors::TensorFile,
};

/// Files of the base model's that tell how to turn text into tokens. They come with the adapter, where it has them, as
/// PEFT's users expect.
const TOKENIZER_FILES: [&str; 6] = [
    "added_tokens.json",
    CHAT_TEMPLATE,
    TOOL_TEMPLATE,
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
];
/// What comes with a whole model, besides what other programs read of its tokenizer.
const BASE_FILES: [&str; 6] = [
    "added_tokens.json",
    CHAT_TEMPLATE,
    "generation_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
];

/// Why a result was not published.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The version is another run's.
    #[error(
        "version conflict: {uri} belongs to {owner}; nothing was overwritten, and another try takes the next number"
    )]
    Taken {
        /// Folder of the version.
        uri: Box<Uri>,
        /// The other run.
        owner: String,
    },
    /// The manifest that is there can't be read.
    #[error("{uri} is no manifest of this release: {problem}; move it away, or use another output.adapterName")]
    Manifest {
        /// The manifest.
        uri: Uri,
        /// What is wrong with it.
        problem: String,
    },
    /// The base model's configuration can't be read any more.
    #[error("config.json of the base model: {0}")]
    Config(String),
    /// The adapter would do nothing.
    #[error(
        "every lora_B is zero after training: the adapter would change nothing, so it is not published. \
         Was the learning rate 0 in every step? Set training.warmupSteps to 0, or train for more steps"
    )]
    ZeroAdapter,
    /// What was read back differs from what was written.
    #[error("{uri} was read back with other content than was written: the store lost or mixed up a write")]
    ReadBack {
        /// The file.
        uri: Uri,
    },
}

impl PublishError {
    /// One of [`exit_code`].
    pub fn exit_code(&self) -> i32 {
        match self {
            Self::Store(error) => error.exit_code(),
            Self::Taken { .. } => exit_code::VERSION_TAKEN,
            Self::Manifest { .. } => exit_code::BAD_SPEC,
            Self::ZeroAdapter | Self::Config(_) => exit_code::BAD_INPUT,
            Self::ReadBack { .. } => exit_code::STORAGE,
        }
    }
}

/// What was trained.
pub struct Trained<'a> {
    /// The job.
    pub spec: &'a RunSpec,
    /// The version to publish.
    pub task: &'a TrainTask,
    /// How it was trained.
    pub method: &'a Method,
    /// What was trained, under the names of the published files.
    pub weights: Vec<LazyTensor<'a>>,
    /// What was measured.
    pub history: &'a History,
    /// The data and the metrics, for the record.
    pub manifest: Manifest,
    /// Passes over the data.
    pub epochs: f64,
    /// Optimizer steps that the run would make without early stopping.
    pub total_steps: u64,
    /// Folder of the base model.
    pub model: &'a Path,
}

/// What is published in a version's folder, if it is this run's.
///
/// # Errors
/// It is another run's, or the store fails.
pub fn published(folder: &Location, input_digest: &str) -> Result<Option<TrainReport>, PublishError> {
    let object = folder.join(MANIFEST);
    let Some(bytes) = object.read_if_exists()? else { return Ok(None) };
    let manifest =
        Manifest::parse(&bytes).map_err(|problem| PublishError::Manifest { uri: object.uri().clone(), problem })?;
    match manifest.source.input_digest == input_digest {
        true => Ok(Some(manifest.report(folder.uri(), &bytes))),
        false => Err(PublishError::Taken {
            uri: Box::new(folder.uri().clone()),
            owner: format!("run {} of {}, with other inputs", manifest.source.run, manifest.source.job),
        }),
    }
}

/// Writes the version's files to its folder, then the manifest, and reads all of it back.
///
/// # Errors
/// An adapter is zero, the version is another run's, or the store fails. Without a manifest nothing is published.
pub fn publish(folder: &Location, trained: Trained<'_>) -> Result<TrainReport, PublishError> {
    if lora_of(trained.method).is_some() && peft::is_zero(&trained.weights) {
        return Err(PublishError::ZeroAdapter);
    }
    Claim::of(trained.spec, trained.task).lay(folder)?;
    // Whoever had published before this claim has none: it was taken away.
    if let Some(report) = published(folder, &trained.task.input_digest)? {
        return Ok(report);
    }
    let ModelFiles { shards, others } = files(&trained)?;
    let mut described = Vec::new();
    for shard in shards {
        described.push(folder.join(&shard.name).stream_in(|to| shard.write(to))?);
    }
    for (name, bytes) in others {
        described.push(digest::file_of_bytes(&name, &bytes));
        folder.join(&name).write(bytes)?;
    }
    described.sort_by(|a, b| a.path.cmp(&b.path));
    let mut manifest = trained.manifest;
    manifest.files = described;
    seal(folder, manifest, &trained.task.input_digest)
}

/// Reads the files of a manifest back, and writes it: from then on the version is there.
pub(crate) fn seal(folder: &Location, manifest: Manifest, input_digest: &str) -> Result<TrainReport, PublishError> {
    read_back(folder, &manifest.files)?;
    let bytes = manifest.to_json();
    if folder.join(MANIFEST).create(bytes.clone())? == Created::New {
        return Ok(manifest.report(folder.uri(), &bytes));
    }
    // Ours, if an answer was lost on the way, or another attempt's: then what counts is what its manifest says.
    let report = published(folder, input_digest)?;
    report.ok_or_else(|| PublishError::ReadBack { uri: folder.join(MANIFEST).uri().clone() })
}

/// Every file but the manifest.
fn files<'a>(trained: &'a Trained<'_>) -> Result<ModelFiles<'a>, PublishError> {
    let ModelFiles { shards, others: mut files } = match lora_of(trained.method) {
        Some(lora) => {
            let config = peft::config(lora, &trained.weights, &trained.spec.base_model).into_bytes();
            let (name, tensors) = ("adapter_model.safetensors".into(), trained.weights.iter().collect());
            ModelFiles {
                shards: vec![TensorFile { name, tensors, bf16: false }],
                others: [("adapter_config.json".into(), config)].into(),
            }
        }
        None => {
            let config = base_file(trained.model, "config.json")?.unwrap_or_default();
            full::files(&trained.weights, &config, trained.spec.training.computes_in_bf16())
                .map_err(PublishError::Config)?
        }
    };
    files.extend([
        ("README.md".into(), card::render(trained).into_bytes()),
        ("loss_curve.svg".into(), curve::render(trained.history).into_bytes()),
        (tensorboard::FILE.into(), tensorboard::render(trained.history)),
        ("trainer_state.json".into(), trainer_state::render(trained).into_bytes()),
    ]);
    match lora_of(trained.method) {
        None => files.extend(base_files(trained.model)?),
        Some(_) => {
            for name in TOKENIZER_FILES {
                files.extend(base_file(trained.model, name)?.map(|bytes| (name.to_owned(), bytes)));
            }
        }
    }
    // What it was trained with is what it must be asked with.
    if let Some(template) = trained.spec.dataset.chat_template.clone() {
        put_template(&mut files, template);
    }
    Ok(ModelFiles { shards, others: files })
}

/// Puts a chat template in the place of the base model's. One that is not the base model's own goes for tools too.
pub(crate) fn put_template(files: &mut BTreeMap<String, Vec<u8>>, template: String) {
    let template = template.into_bytes();
    if files.get(CHAT_TEMPLATE) != Some(&template) {
        files.remove(TOOL_TEMPLATE);
    }
    files.insert(CHAT_TEMPLATE.to_owned(), template);
}

/// The files of a base model's folder that come with a whole model made from it, by name and content.
pub(crate) fn base_files(folder: &Path) -> Result<BTreeMap<String, Vec<u8>>, StoreError> {
    let names = BASE_FILES.into_iter().map(str::to_owned).chain(copied_in(folder));
    let files = names.map(|name| Ok(base_file(folder, &name)?.map(|bytes| (name, bytes))));
    files.filter_map(Result::transpose).collect()
}

/// A file of the base model's folder, if it has it.
fn base_file(folder: &Path, name: &str) -> Result<Option<Vec<u8>>, StoreError> {
    let path = folder.join(name);
    match fs::read(&path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(StoreError::Disk { path, source }),
    }
}

fn read_back(folder: &Location, files: &[ArtifactFile]) -> Result<(), PublishError> {
    for file in files {
        let object = folder.join(&file.path);
        let found = object.digest()?;
        if (found.sha256, found.size) != (file.sha256.clone(), file.size) {
            return Err(PublishError::ReadBack { uri: object.uri().clone() });
        }
    }
    Ok(())
}
