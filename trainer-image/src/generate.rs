//! `generate`: lets a model answer, with or without an adapter.

use std::path::{Path, PathBuf};

use serde_json::Value;
use tunesmith_crds::Uri;
use tunesmith_engine::{Generator, Model, Sampling};

use crate::{
    data::encode::Vocabulary,
    error::Error,
    model::ModelFolder,
    store::{Role, Stores},
};

/// What the engine reads of an adapter.
const ADAPTER_FILES: [&str; 2] = ["adapter_config.json", "adapter_model.safetensors"];

/// A model that answers.
pub struct Writer {
    model: Model,
    vocabulary: Vocabulary,
    stop: Vec<u32>,
}

impl Writer {
    /// Loads a model, and an adapter over it, from URIs or folders; what has to be downloaded goes under `work`.
    ///
    /// # Errors
    /// A file is missing, or model and adapter don't fit.
    pub fn load(model: &str, adapter: Option<&str>, stores: &Stores, work: &Path) -> Result<Self, Error> {
        let folder = ModelFolder::fetch(&stores.open(Role::Model, &uri(model)?)?, &work.join("model"))?.folder;
        let vocabulary = Vocabulary::load(&folder).map_err(|error| Error::Input(format!("{model}: {error}")))?;
        let stop = stop_tokens(&folder, &vocabulary);
        let mut model = Model::load(&folder)?;
        if let Some(adapter) = adapter {
            model.load_adapter(&fetch_adapter(&uri(adapter)?, stores, &work.join("adapter"))?)?;
        }
        Ok(Self { model, vocabulary, stop })
    }

    /// The answer to a user's message; greedy unless `sampling` says otherwise.
    ///
    /// # Errors
    /// The prompt is longer than the model reads, or the chat template refuses it.
    pub fn answer(
        &self,
        system: Option<&str>,
        prompt: &str,
        sampling: Sampling,
        max_new_tokens: usize,
    ) -> Result<String, Error> {
        let prompt = self.vocabulary.prompt(system, prompt).map_err(Error::Input)?;
        let mut generator = Generator::new(&self.model, &prompt, sampling, &self.stop)?;
        let mut tokens = Vec::new();
        while tokens.len() < max_new_tokens
            && let Some(token) = generator.next_token()?
        {
            tokens.push(token);
        }
        self.vocabulary.decode(&tokens).map_err(Error::Input)
    }
}

/// A URI, or a folder of this machine as one.
fn uri(text: &str) -> Result<Uri, Error> {
    match text.contains("://") {
        true => text.parse(),
        false => Uri::try_from(format!("file://{text}")),
    }
    .map_err(|error| Error::Spec(error.to_string()))
}

fn fetch_adapter(uri: &Uri, stores: &Stores, work: &Path) -> Result<PathBuf, Error> {
    let location = stores.open(Role::Output, uri)?;
    if let Some(folder) = location.on_disk() {
        return Ok(folder.to_owned());
    }
    for name in ADAPTER_FILES {
        location.join(name).download(&work.join(name))?;
    }
    Ok(work.to_owned())
}

/// The end tokens of `generation_config.json`, one or several, and the tokenizer's.
fn stop_tokens(folder: &Path, vocabulary: &Vocabulary) -> Vec<u32> {
    let config = std::fs::read(folder.join("generation_config.json")).ok();
    let config: Value = config.and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default();
    let ids = match &config["eos_token_id"] {
        Value::Array(ids) => ids.clone(),
        id => vec![id.clone()],
    };
    let ids = ids.iter().filter_map(|id| u32::try_from(id.as_u64()?).ok());
    ids.chain([vocabulary.eos()]).collect()
}
