//! Rows to tokens, and which of them are trained.

use std::{ops::Range, path::Path};

use serde_json::Value;
use tokenizers::Tokenizer;
use tunesmith_crds::fine_tune_job::Overflow;
use tunesmith_engine::IGNORE;

use super::{
    ChatTemplate, Example,
    chat::special_token,
    conversation::{Conversation, Message},
    formats::{Alpaca, Row},
    notes::Notes,
};

/// A model's tokenizer and chat template, as its folder describes them.
pub struct Vocabulary {
    tokenizer: Tokenizer,
    template: Option<ChatTemplate>,
    eos: u32,
    eos_text: String,
}

/// Why text can't be turned into tokens: a message that names file and field.
#[derive(Debug, thiserror::Error)]
pub enum VocabularyError {
    /// The model folder's tokenizer can't be used.
    #[error("{0}")]
    Folder(String),
    /// The job's own chat template can't be used.
    #[error("dataset.chatTemplate: {0}")]
    Template(String),
}

impl Vocabulary {
    /// Reads `tokenizer.json`, `tokenizer_config.json` and the chat template of a model folder, or takes another template
    /// in its place.
    ///
    /// # Errors
    /// A file is missing or damaged, or there is no end-of-sequence token, or the template is no Jinja.
    pub fn load(folder: &Path, template: Option<&str>) -> Result<Self, VocabularyError> {
        use VocabularyError::{Folder, Template};
        let tokenizer = Tokenizer::from_file(folder.join("tokenizer.json"))
            .map_err(|error| Folder(format!("tokenizer.json can't be read: {error}")))?;
        let config: Value = std::fs::read(folder.join("tokenizer_config.json"))
            .map_err(|error| error.to_string())
            .and_then(|text| serde_json::from_slice(&text).map_err(|error| error.to_string()))
            .map_err(|error| Folder(format!("tokenizer_config.json can't be read: {error}")))?;
        let template = match template {
            Some(template) => Some(ChatTemplate::new(template, &config).map_err(Template)?),
            None => ChatTemplate::load(folder, &config).map_err(Folder)?,
        };
        let Value::String(eos_text) = special_token(&config, "eos_token") else {
            let message = "tokenizer_config.json has no eos_token: a model trained without one would never stop";
            return Err(Folder(message.into()));
        };
        let eos = tokenizer.token_to_id(&eos_text).ok_or_else(|| {
            Folder(format!("eos_token {eos_text:?} of tokenizer_config.json is not in tokenizer.json"))
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
        if self.template.is_none() {
            return self.text(user);
        }
        let system = system.map(|content| Message::new("system", content));
        let turns: Vec<Message> = system.into_iter().chain([Message::new("user", user)]).collect();
        self.conversation(&turns)
    }

    /// Tokens that make the model say the next turn.
    ///
    /// # Errors
    /// There is no template, or it refuses the conversation.
    pub fn conversation(&self, turns: &[Message]) -> Result<Vec<u32>, String> {
        let template = self.template.as_ref().ok_or("the model has no chat template: it can't hold a conversation")?;
        self.rendered(&template.prompt(turns)?).map(|(tokens, _)| tokens)
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

    /// The text of tokens, with special ones.
    ///
    /// # Errors
    /// The tokenizer fails.
    pub fn decode_with_specials(&self, tokens: &[u32]) -> Result<String, String> {
        self.tokenizer.decode(tokens, false).map_err(tokenizer_failed)
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
    /// Tokens of a row at most.
    pub max_length: usize,
    /// What becomes of longer rows.
    pub overflow: Overflow,
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
    /// Encodes a row; none comes of one that is too long and dropped. `notes` counts what of it was not used as it stands.
    ///
    /// # Errors
    /// The template refuses the row, or it leaves nothing to train on; the message names the field.
    pub fn encode(&self, row: &Row, notes: &mut Notes) -> Result<Option<Example>, String> {
        let _ = notes;
        let mut tokens = Tokens::default();
        match row {
            Row::Conversation(conversation) => self.conversation(conversation, &mut tokens)?,
            Row::PromptCompletion { prompt, completion } => self.completion(prompt, completion, &mut tokens)?,
            Row::Alpaca(task) => match &self.vocabulary.template {
                Some(_) => self.conversation(&alpaca_turns(task), &mut tokens)?,
                None => self.completion(&alpaca_prompt(&task.instruction, &task.input), &task.output, &mut tokens)?,
            },
            Row::Text(text) => tokens.extend(&self.vocabulary.text(text)?, true),
        }
        let last = match row {
            Row::Conversation(conversation) => conversation.turns.last(),
            _ => None,
        };
        // After a turn that is not the assistant's there is nothing to end.
        if last.is_none_or(|last| last.role() == "assistant") && !self.last_turn_has_eos(&tokens) {
            tokens.extend(&[self.vocabulary.eos], true);
        }
        self.example(tokens)
    }

    /// A text after another. Apart, as the prompt will stand alone when the model is asked.
    fn completion(&self, prompt: &str, completion: &str, tokens: &mut Tokens) -> Result<(), String> {
        tokens.extend(&self.vocabulary.text(prompt)?, !self.assistant_only);
        tokens.extend(&self.vocabulary.rendered(completion)?.0, true);
        Ok(())
    }

    /// A conversation, of which the first `given` turns are not trained.
    fn conversation(&self, conversation: &Conversation, tokens: &mut Tokens) -> Result<(), String> {
        let (messages, given) = (&conversation.turns, conversation.given);
        let template = self.vocabulary.template.as_ref().ok_or(
            "the base model has no chat template; use an instruct model, give dataset.chatTemplate, or use rows of prompt and \
             completion, or text",
        )?;
        if !self.assistant_only {
            let (ids, _) = self.vocabulary.rendered(&template.text(messages)?)?;
            tokens.extend(&ids, true);
            return Ok(());
        }
        if !messages[given..].iter().any(|message| message.role() == "assistant") {
            let field = if given == 0 { "messages[].role" } else { "completion[].role" };
            return Err(format!("no assistant turn, nothing to train on ({field})"));
        }
        let rendered = template.conversation(messages, given)?;
        let spans: Vec<_> = rendered.assistant.into_iter().map(|span| self.until_eos(&rendered.text, span)).collect();
        let (ids, offsets) = self.vocabulary.rendered(&rendered.text)?;
        for (&id, offset) in ids.iter().zip(offsets) {
            let trained = spans.iter().any(|span| span.contains(&offset.start));
            tokens.extend(&[id], trained);
        }
        Ok(())
    }

    /// A turn up to its end token: the line break that templates put after it is never asked for. A template that ends
    /// `{% generation %}` before the end token leaves it outside, and the model would never learn to stop.
    fn until_eos(&self, text: &str, span: Range<usize>) -> Range<usize> {
        match text[span.clone()].rfind(&self.vocabulary.eos_text) {
            Some(at) => span.start..span.start + at + self.vocabulary.eos_text.len(),
            None if text[span.end..].starts_with(&self.vocabulary.eos_text) => {
                span.start..span.end + self.vocabulary.eos_text.len()
            }
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

    fn example(&self, Tokens { mut ids, mut trained }: Tokens) -> Result<Option<Example>, String> {
        let truncated = ids.len() > self.max_length;
        match self.overflow {
            Overflow::Drop if truncated => return Ok(None),
            Overflow::Error if truncated => {
                return Err(format!(
                    "has {} tokens, training.maxLength is {}; raise it, shorten the row, or set training.overflow to \
                     Truncate or Drop",
                    ids.len(),
                    self.max_length
                ));
            }
            Overflow::Truncate | Overflow::Drop | Overflow::Error => {}
        }
        ids.truncate(self.max_length);
        trained.truncate(self.max_length);
        let predicted = ids.iter().zip(&trained).skip(1).map(|(&id, &trained)| if trained { id } else { IGNORE });
        let targets: Vec<u32> = predicted.chain([IGNORE]).take(ids.len()).collect();
        let example = Example { tokens: ids, targets, truncated };
        match (example.trained_tokens(), truncated) {
            (0, true) => Err(format!(
                "nothing to train on in its first {} tokens; raise training.maxLength, or shorten what comes before \
                 the answer",
                self.max_length
            )),
            (0, false) => Err("nothing to train on: the answer is empty".into()),
            _ => Ok(Some(example)),
        }
    }
}

/// A task as a conversation.
fn alpaca_turns(Alpaca { system, history, instruction, input, output }: &Alpaca) -> Conversation {
    let user = match input.as_str() {
        "" => instruction.to_owned(),
        input => format!("{instruction}\n\n{input}"),
    };
    let mut turns = Vec::new();
    if !system.is_empty() {
        turns.push(Message::new("system", system));
    }
    for (asked, answered) in history.iter().chain([&(user, output.clone())]) {
        turns.extend([Message::new("user", asked), Message::new("assistant", answered)]);
    }
    Conversation { turns, ..Conversation::default() }
}

/// A task in the words of Stanford Alpaca (Taori et al., 2023), as the `text` column of its data set has them.
fn alpaca_prompt(instruction: &str, input: &str) -> String {
    match input {
        "" => format!(
            "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n\
             ### Instruction:\n{instruction}\n\n### Response:\n"
        ),
        input => format!(
            "Below is an instruction that describes a task, paired with an input that provides further context. Write a \
             response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n\
             ### Response:\n"
        ),
    }
}
