//! What a run reads: the base model and the data, brought here, checked and encoded.

use std::path::{Path, PathBuf};

use tunesmith_crds::{
    RunSpec, Uri,
    adapter_version::{ArtifactFile, DatasetRecord},
};

use crate::{
    data::{
        self, DataError, Encoder, Example,
        batches::{Batches, hold_out},
        encode::Vocabulary,
    },
    digest,
    error::Error,
    exam::{Exam, Settings},
    generate::Voice,
    model::ModelFolder,
    store::{Location, Role, StoreError, Stores},
};

/// A run's inputs.
pub struct Inputs {
    /// The base model.
    pub model: ModelFolder,
    /// Rows to train on.
    pub train: Vec<Example>,
    /// Rows to evaluate on.
    pub eval: Vec<Example>,
    /// The data, for the record. Its digest covers both kinds of rows.
    pub dataset: DatasetRecord,
    /// The order of training.
    pub batches: Batches,
    /// The questions of the recall gate, if there is one.
    pub exam: Option<Exam>,
}

impl Inputs {
    /// Fetches and checks everything; what has to be downloaded goes under `work`.
    ///
    /// # Errors
    /// Model or data is missing or can't be used.
    pub fn load(spec: &RunSpec, stores: &Stores, work: &Path) -> Result<Self, Error> {
        let model = ModelFolder::fetch(&stores.open(Role::Model, &spec.base_model)?, &work.join("model"))?;
        if let Some(pin) = spec.base_digest_pin.as_ref().filter(|pin| **pin != model.digest) {
            let (uri, found) = (&spec.base_model, &model.digest);
            return Err(Error::Input(format!(
                "baseModel.digest is {pin}, but {uri} has digest {found}: another model lies there now; \
                 correct the digest or the URI"
            )));
        }
        let vocabulary = Vocabulary::load(&model.folder)
            .map_err(|error| Error::Input(format!("{} (base model): {error}", spec.base_model)))?;
        let dataset = &spec.dataset;
        let encoder = Encoder {
            vocabulary,
            max_length: spec.training.max_length as usize,
            assistant_only: dataset.assistant_only_loss,
        };
        let (path, train_file) = fetch(stores, &dataset.train.uri, &work.join("data/train"), "train")?;
        let rows = data::load(&path, dataset.format, &encoder)?;
        let mut files = vec![train_file];
        let (train, eval) = match (&dataset.eval, dataset.eval_fraction) {
            (Some(eval), _) => {
                let (path, eval_file) = fetch(stores, &eval.uri, &work.join("data/eval"), "eval")?;
                files.push(eval_file);
                (rows, data::load(&path, dataset.format, &encoder)?)
            }
            (None, fraction) => {
                let file = data::rows::file_name(&path);
                let error = DataError::NothingToHoldOut { file, rows: rows.len() };
                hold_out(rows, fraction.unwrap_or(0.0), spec.training.seed).ok_or(error)?
            }
        };
        check_lengths(&model, train.iter().chain(&eval))?;
        let voice = Voice::new(&model.folder, encoder.vocabulary);
        let exam = load_exam(spec, stores, work, &path, (&model, voice))?;
        let tokens = train.iter().map(|example| example.tokens.len() as u64).sum();
        Ok(Self {
            batches: Batches::new(&train, &spec.training),
            dataset: DatasetRecord { digest: digest::of_files(&files), rows: train.len() as u64, tokens },
            model,
            train,
            eval,
            exam,
        })
    }
}

/// The probe, asked as its gate says; `train` is the file of training rows.
fn load_exam(
    spec: &RunSpec,
    stores: &Stores,
    work: &Path,
    train: &Path,
    (model, voice): (&ModelFolder, Voice),
) -> Result<Option<Exam>, Error> {
    let Some(probe) = spec.evaluation.probe() else { return Ok(None) };
    let (path, file) = fetch(stores, &probe.uri, &work.join("data/probe"), "probe")?;
    let system = match &probe.system {
        Some(system) => Some(system.clone()),
        None => data::probe::constant_system(train, spec.dataset.format)?,
    };
    let context = model.config.max_position_embeddings;
    let settings = Settings { system: system.as_deref(), max_new_tokens: probe.max_new_tokens, context };
    Ok(Some(Exam::load(&path, &file, voice, settings)?))
}

/// Brings a data file here; its digest goes by what the file is for, so that renaming it changes nothing.
pub(crate) fn fetch(stores: &Stores, uri: &Uri, work: &Path, purpose: &str) -> Result<(PathBuf, ArtifactFile), Error> {
    let object: Location = stores.open(Role::Dataset, uri)?;
    let (path, file) = match object.on_disk() {
        Some(path) if !path.exists() => {
            return Err(StoreError::Missing { role: Role::Dataset, uri: uri.clone() }.into());
        }
        Some(path) => {
            let file = digest::file_on_disk(path, purpose);
            (path.to_owned(), file.map_err(|source| StoreError::Disk { path: path.to_owned(), source })?)
        }
        None => {
            let path = work.join(uri.file_name());
            let file = object.download(&path)?;
            (path, file)
        }
    };
    Ok((path, ArtifactFile { path: purpose.to_owned(), ..file }))
}

fn check_lengths<'a>(model: &ModelFolder, examples: impl Iterator<Item = &'a Example>) -> Result<(), Error> {
    let (context, vocabulary) = (model.config.max_position_embeddings, model.config.vocab_size);
    for example in examples {
        if example.tokens.len() > context {
            return Err(Error::Spec(format!(
                "a row has {} tokens, but the model reads at most {context} (max_position_embeddings): \
                 set training.maxLength to {context} or less",
                example.tokens.len()
            )));
        }
        if let Some(token) = example.tokens.iter().find(|&&token| token as usize >= vocabulary) {
            return Err(Error::Input(format!(
                "the tokenizer gives token {token}, but the model knows {vocabulary} (vocab_size): \
                 tokenizer.json belongs to another model"
            )));
        }
    }
    Ok(())
}
