//! `generate`: lets a model answer, with or without an adapter.

use std::path::{Path, PathBuf};

use tunesmith_crds::Uri;
use tunesmith_engine::{Generator, Model, Sampling};

use crate::{
    adapter::{chat_template, fetch_adapter},
    data::{
        conversation::Message,
        vocabulary::{Vocabulary, VocabularyError},
    },
    error::Error,
    model::ModelFolder,
    store::Stores,
};

/// What lets a model be asked in words: its tokenizer and chat template, and the tokens at which it stops.
pub struct Voice {
    vocabulary: Vocabulary,
    stop: Vec<u32>,
}

impl Voice {
    /// Reads them from the model's folder.
    ///
    /// # Errors
    /// The tokenizer is missing or damaged.
    pub fn load(folder: &Path) -> Result<Self, VocabularyError> {
        Ok(Self::new(Vocabulary::load(folder, None)?))
    }

    /// The same, if the vocabulary is loaded already.
    pub fn new(vocabulary: Vocabulary) -> Self {
        Self { stop: vocabulary.stops(), vocabulary }
    }

    /// Tokens that make the model answer `user`.
    ///
    /// # Errors
    /// The chat template refuses it.
    pub fn prompt(&self, system: Option<&str>, user: &str) -> Result<Vec<u32>, String> {
        self.vocabulary.prompt(system, user)
    }

    /// Tokens that make the model say the next turn of a conversation.
    ///
    /// # Errors
    /// There is no chat template, or it refuses the conversation.
    pub fn conversation(&self, turns: &[Message]) -> Result<Vec<u32>, String> {
        self.vocabulary.conversation(turns)
    }

    /// The text of tokens.
    ///
    /// # Errors
    /// The tokenizer fails.
    pub fn decode(&self, tokens: &[u32]) -> Result<String, String> {
        self.vocabulary.decode(tokens)
    }

    /// The answer to a prompt; None once `go_on` says no, which sees what there is of it before each token.
    ///
    /// # Errors
    /// The prompt is longer than the model reads.
    pub fn answer(
        &self,
        model: &Model,
        prompt: &[u32],
        sampling: Sampling,
        max_new_tokens: usize,
        mut go_on: impl FnMut(&[u32]) -> bool,
    ) -> Result<Option<String>, Error> {
        let mut generator = Generator::new(model, prompt, sampling, &self.stop)?;
        let mut tokens = Vec::new();
        while tokens.len() < max_new_tokens {
            if !go_on(&tokens) {
                return Ok(None);
            }
            match generator.next_token()? {
                Some(token) => tokens.push(token),
                None => break,
            }
        }
        self.vocabulary.decode(&tokens).map(Some).map_err(Error::Input)
    }
}

/// A model that answers.
pub struct Writer {
    model: Model,
    voice: Voice,
}

impl Writer {
    /// Loads a model, and an adapter over it, from URIs or folders; what has to be downloaded goes under `work`.
    ///
    /// # Errors
    /// A file is missing, or model and adapter don't fit.
    pub fn load(model: &str, adapter: Option<&str>, stores: &Stores, work: &Path) -> Result<Self, Error> {
        let folder = ModelFolder::fetch(&uri(model)?, stores, &work.join("model"))?.folder;
        let adapter =
            adapter.map(|adapter| fetch_adapter(&uri(adapter)?, stores, &work.join("adapter"))).transpose()?;
        let template = adapter.as_deref().map(chat_template).transpose()?.flatten();
        let vocabulary = Vocabulary::load(&folder, template.as_deref());
        let vocabulary = vocabulary.map_err(|error| Error::Input(format!("{model}: {error}")))?;
        let voice = Voice::new(vocabulary);
        let mut model = Model::load(&folder)?;
        adapter.iter().try_for_each(|adapter| model.load_adapter(adapter))?;
        Ok(Self { model, voice })
    }

    /// The model, with its adapter if it has one.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// The means to ask it, apart from the model.
    pub fn into_parts(self) -> (Model, Voice) {
        (self.model, self.voice)
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
        let prompt = self.voice.prompt(system, prompt).map_err(Error::Input)?;
        let answer = self.voice.answer(&self.model, &prompt, sampling, max_new_tokens, |_| true)?;
        Ok(answer.unwrap_or_default())
    }
}

/// A URI, or a folder of this machine as one.
pub(crate) fn uri(text: &str) -> Result<Uri, Error> {
    match text.contains("://") {
        true => text.parse(),
        false => Uri::try_from(format!("file://{}", without_dots(Path::new(text)).display())),
    }
    .map_err(|error| Error::Spec(error.to_string()))
}

/// The path without `..`, which stores don't know. The last part keeps its name, even if it is a link: the name tells what
/// the file is. What is not there stays as it is, for the error.
fn without_dots(path: &Path) -> PathBuf {
    let resolved = match (path.parent(), path.file_name()) {
        (Some(parent), Some(name)) => Path::new(".").join(parent).canonicalize().map(|folder| folder.join(name)),
        _ => path.canonicalize(),
    };
    resolved.unwrap_or_else(|_| path.to_owned())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_path_may_go_up_and_a_link_keeps_its_name() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().canonicalize().unwrap();
        fs::create_dir(folder.join("a")).unwrap();
        fs::write(folder.join("blob"), "").unwrap();
        std::os::unix::fs::symlink(folder.join("blob"), folder.join("model.gguf")).unwrap();
        assert_eq!(without_dots(&folder.join("a/../model.gguf")), folder.join("model.gguf"));
        assert_eq!(without_dots(&folder.join("a/..")), folder);
        assert_eq!(without_dots(Path::new("no/../where")), Path::new("no/../where"));
    }
}
