//! Rows to tokens, and which of them are trained.

use std::{ops::Range, path::Path};

use serde_json::Value;
use tokenizers::Tokenizer;
use tunesmith_engine::IGNORE;

use super::{
    ChatTemplate, Example,
    chat::special_token,
    rows::{Message, Row},
};

/// A model's tokenizer and chat template, as its folder describes them.
pub struct Vocabulary {
    tokenizer: Tokenizer,
    template: Option<ChatTemplate>,
    eos: u32,
    eos_text: String,
}

/// Why a model folder's tokenizer can't be used: a message that names file and field.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct VocabularyError(String);

impl Vocabulary {
    /// Reads `tokenizer.json`, `tokenizer_config.json` and the chat template of a model folder.
    ///
    /// # Errors
    /// A file is missing or damaged, or there is no end-of-sequence token.
    pub fn load(folder: &Path) -> Result<Self, VocabularyError> {
        let tokenizer = Tokenizer::from_file(folder.join("tokenizer.json"))
            .map_err(|error| VocabularyError(format!("tokenizer.json can't be read: {error}")))?;
        let config: Value = std::fs::read(folder.join("tokenizer_config.json"))
            .map_err(|error| error.to_string())
            .and_then(|text| serde_json::from_slice(&text).map_err(|error| error.to_string()))
            .map_err(|error| VocabularyError(format!("tokenizer_config.json can't be read: {error}")))?;
        let template = ChatTemplate::load(folder, &config).map_err(VocabularyError)?;
        let Value::String(eos_text) = special_token(&config, "eos_token") else {
            let message = "tokenizer_config.json has no eos_token: a model trained without one would never stop";
            return Err(VocabularyError(message.into()));
        };
        let eos = tokenizer.token_to_id(&eos_text).ok_or_else(|| {
            VocabularyError(format!("eos_token {eos_text:?} of tokenizer_config.json is not in tokenizer.json"))
        })?;
        Ok(Self { tokenizer, template, eos, eos_text })
    }

    /// The token that ends a text.
    pub fn eos(&self) -> u32 {
        self.eos
    }

    /// Tokens in all, added ones too.
    pub fn size(&self) -> usize {
        self.tokenizer.get_vocab_size(true)
    }

    /// Tokens that make the model answer `user`: by the chat template, or as plain text where the model has none.
    ///
    /// # Errors
    /// The template refuses the conversation.
    pub fn prompt(&self, system: Option<&str>, user: &str) -> Result<Vec<u32>, String> {
        let Some(template) = &self.template else { return self.text(user) };
        let system = system.map(|content| Message::new("system", content));
        let messages: Vec<Message> = system.into_iter().chain([Message::new("user", user)]).collect();
        self.rendered(&template.prompt(&messages)?).map(|(tokens, _)| tokens)
    }

    /// Tokens of a plain text, with what the tokenizer puts before texts, but no end token.
    ///
    /// # Errors
    /// The tokenizer fails.
    pub fn text(&self, text: &str) -> Result<Vec<u32>, String> {
        let encoding = self.tokenizer.encode(text, true).map_err(tokenizer_failed)?;
        let mut tokens = encoding.get_ids().to_vec();
        while tokens.last() == Some(&self.eos) {
            tokens.pop();
        }
        // A text that begins with the token that the tokenizer puts there as well.
        if tokens.len() > 1 && tokens[0] == tokens[1] && encoding.get_special_tokens_mask()[0] == 1 {
            tokens.remove(0);
        }
        Ok(tokens)
    }

    /// The text of tokens, without special ones.
    ///
    /// # Errors
    /// The tokenizer fails.
    pub fn decode(&self, tokens: &[u32]) -> Result<String, String> {
        self.tokenizer.decode(tokens, true).map_err(tokenizer_failed)
    }

    /// Tokens of a rendered template, which holds its special tokens already, and the bytes that each stands for.
    fn rendered(&self, text: &str) -> Result<(Vec<u32>, Vec<Range<usize>>), String> {
        let encoding = self.tokenizer.encode(text, false).map_err(tokenizer_failed)?;
        let offsets = encoding.get_offsets().iter().map(|&(start, end)| start..end).collect();
        Ok((encoding.get_ids().to_vec(), offsets))
    }
}

fn tokenizer_failed(error: tokenizers::Error) -> String {
    format!("the tokenizer fails: {error}")
}

/// Turns rows into examples.
pub struct Encoder {
    /// The model's tokenizer and template.
    pub vocabulary: Vocabulary,
    /// Tokens of a row that are kept.
    pub max_length: usize,
    /// Train on what the assistant says (or the completion) alone.
    pub assistant_only: bool,
}

/// Tokens, and whether each is to be predicted.
#[derive(Default)]
struct Tokens {
    ids: Vec<u32>,
    trained: Vec<bool>,
}

impl Tokens {
    fn extend(&mut self, ids: &[u32], trained: bool) {
        self.ids.extend(ids);
        self.trained.resize(self.ids.len(), trained);
    }
}

impl Encoder {
    /// Encodes row number `number`.
    ///
    /// # Errors
    /// The template refuses the row, or it leaves nothing to train on; the message names the field.
    pub fn encode(&self, number: u64, row: &Row) -> Result<Example, String> {
        let vocabulary = &self.vocabulary;
        let mut tokens = Tokens::default();
        match row {
            Row::Messages(messages) => self.messages(messages, &mut tokens)?,
            Row::PromptCompletion { prompt, completion } => {
                // Apart, as the prompt will stand alone when the model is asked.
                tokens.extend(&vocabulary.text(prompt)?, !self.assistant_only);
                tokens.extend(&vocabulary.rendered(completion)?.0, true);
            }
            Row::Text(text) => tokens.extend(&vocabulary.text(text)?, true),
        }
        let ends = matches!(row, Row::Messages(messages) if messages.last().is_some_and(|m| m.role() != "assistant"));
        if !ends && !self.last_turn_has_eos(&tokens) {
            tokens.extend(&[vocabulary.eos], true);
        }
        self.example(number, tokens)
    }

    fn messages(&self, messages: &[Message], tokens: &mut Tokens) -> Result<(), String> {
        let template = self.vocabulary.template.as_ref().ok_or(
            "the base model has no chat template; use an instruct model, or rows of prompt and completion, or text",
        )?;
        if !self.assistant_only {
            let (ids, _) = self.vocabulary.rendered(&template.text(messages)?)?;
            tokens.extend(&ids, true);
            return Ok(());
        }
        if !messages.iter().any(|message| message.role() == "assistant") {
            return Err("no assistant turn, nothing to train on (messages[].role)".into());
        }
        let rendered = template.conversation(messages)?;
        let spans: Vec<_> = rendered.assistant.into_iter().map(|span| self.until_eos(&rendered.text, span)).collect();
        let (ids, offsets) = self.vocabulary.rendered(&rendered.text)?;
        for (&id, offset) in ids.iter().zip(offsets) {
            let trained = spans.iter().any(|span| span.contains(&offset.start));
            tokens.extend(&[id], trained);
        }
        Ok(())
    }

    /// A turn up to its end token: the line break that templates put after it is never asked for.
    fn until_eos(&self, text: &str, span: Range<usize>) -> Range<usize> {
        match text[span.clone()].rfind(&self.vocabulary.eos_text) {
            Some(at) => span.start..span.start + at + self.vocabulary.eos_text.len(),
            None => span,
        }
    }

    /// Whether the last trained run of tokens ends with the end token.
    fn last_turn_has_eos(&self, tokens: &Tokens) -> bool {
        let pairs = tokens.ids.iter().zip(&tokens.trained).rev();
        // When every token is trained, the white space after the end token is too.
        let trained: Vec<u32> = pairs.filter(|(_, trained)| **trained).map(|(&id, _)| id).take(2).collect();
        trained.contains(&self.vocabulary.eos)
    }

    fn example(&self, row: u64, Tokens { mut ids, mut trained }: Tokens) -> Result<Example, String> {
        let truncated = ids.len() > self.max_length;
        ids.truncate(self.max_length);
        trained.truncate(self.max_length);
        let predicted = ids.iter().zip(&trained).skip(1).map(|(&id, &trained)| if trained { id } else { IGNORE });
        let targets: Vec<u32> = predicted.chain([IGNORE]).take(ids.len()).collect();
        let example = Example { row, tokens: ids, targets, truncated };
        match (example.trained_tokens(), truncated) {
            (0, true) => Err(format!(
                "nothing to train on in its first {} tokens; raise training.maxLength, or shorten what comes before \
                 the answer",
                self.max_length
            )),
            (0, false) => Err("nothing to train on: the answer is empty".into()),
            _ => Ok(example),
        }
    }
}
