//! Rows to tokens, and which of them are trained.

use std::ops::Range;

use tunesmith_crds::fine_tune_job::Overflow;
use tunesmith_engine::IGNORE;

use super::{
    Example,
    conversation::{Conversation, Message},
    formats::{Alpaca, Row},
    notes::Notes,
    template::Rendered,
    vocabulary::{Placed, Vocabulary},
};

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
    /// Tokens of a text, of which those are trained that stand for any byte of the spans: as transformers has it, a token
    /// that begins before a span belongs to it.
    fn of_spans((ids, places): Placed, spans: &[Range<usize>], notes: &mut Notes) -> Self {
        let mut trained = vec![false; ids.len()];
        let mut reaches_over = false;
        for span in spans {
            let overlaps = |place: &Range<usize>| place.start < span.end && span.start < place.end;
            let Some(first) = places.iter().position(overlaps) else { continue };
            let last = places.iter().rposition(overlaps).unwrap_or(first);
            trained[first..=last].fill(true);
            reaches_over |= places[first].start < span.start;
        }
        if reaches_over {
            notes.add("the first token of an answer holds the end of what stands before it as well, and is trained");
        }
        Self { ids, trained }
    }

    fn all(ids: Vec<u32>) -> Self {
        Self { trained: vec![true; ids.len()], ids }
    }

    fn push(&mut self, id: u32) {
        self.ids.push(id);
        self.trained.push(true);
    }
}

impl Encoder {
    /// Encodes a row; none comes of one that is too long and dropped. `notes` counts what of it was not used as it stands.
    ///
    /// # Errors
    /// The template refuses the row, or it leaves nothing to train on; the message names the field.
    pub fn encode(&self, row: &Row, notes: &mut Notes) -> Result<Option<Example>, String> {
        let tokens = match row {
            Row::Conversation(conversation) => self.conversation(conversation, notes)?,
            Row::PromptCompletion { prompt, completion } => self.completion(prompt, completion, notes)?,
            Row::Alpaca(task) => match &self.vocabulary.template {
                Some(_) => self.conversation(&alpaca_turns(task), notes)?,
                None => self.completion(&alpaca_prompt(task)?, &task.output, notes)?,
            },
            Row::Text(text) => self.ended(Tokens::all(self.vocabulary.text(text)?)),
        };
        self.example(tokens)
    }

    /// A text after another. They are tokenized together, as the model reads them; the prompt alone, as the model is
    /// asked, tells where the completion begins.
    fn completion(&self, prompt: &str, completion: &str, notes: &mut Notes) -> Result<Tokens, String> {
        let text = format!("{prompt}{completion}");
        let placed = self.vocabulary.placed_text(&text)?;
        if !self.assistant_only {
            return Ok(self.ended(Tokens::all(placed.0)));
        }
        let asked = self.vocabulary.text(prompt)?;
        if placed.0.starts_with(&asked) {
            let trained = (0..placed.0.len()).map(|i| i >= asked.len()).collect();
            return Ok(self.ended(Tokens { ids: placed.0, trained }));
        }
        notes.add(
            "the prompt's tokens are other ones once the completion follows: the first trained token begins in the prompt \
             (end the prompt before a space, not behind it)",
        );
        let span = prompt.len()..text.len();
        Ok(self.ended(Tokens::of_spans(placed, std::slice::from_ref(&span), &mut Notes::default())))
    }

    /// The same tokens with the end token behind them, if it is not there.
    fn ended(&self, mut tokens: Tokens) -> Tokens {
        if tokens.ids.last() != Some(&self.vocabulary.eos()) {
            tokens.push(self.vocabulary.eos());
        }
        tokens
    }

    fn conversation(&self, conversation: &Conversation, notes: &mut Notes) -> Result<Tokens, String> {
        let template = self.vocabulary.template.as_ref().ok_or(
            "the base model has no chat template; use an instruct model, give dataset.chatTemplate, or use rows of prompt and \
             completion, or text",
        )?;
        let Some(last) = conversation.turns.last() else { return Err("no turn, nothing to train on".into()) };
        if !self.assistant_only {
            let (text, excluded) = template.whole_conversation(conversation, notes)?;
            let placed = self.vocabulary.rendered(&text)?;
            let left_out = Tokens::of_spans(placed, &excluded, &mut Notes::default());
            let trained = left_out.trained.iter().map(|excluded| !excluded).collect();
            let mut tokens = Tokens { ids: left_out.ids, trained };
            if last.is_trained() && !self.has_end(&text, last) {
                tokens.push(self.vocabulary.eos());
            }
            return Ok(tokens);
        }
        let is_learned = |(i, turn): (usize, &Message)| i >= conversation.given && turn.is_trained();
        if !conversation.turns.iter().enumerate().any(is_learned) {
            if conversation.turns[conversation.given..].iter().any(Message::is_excluded) {
                return Err(
                    "the row excludes each of the assistant's turns (weight: 0, train: false, …): nothing to train \
                            on"
                    .into(),
                );
            }
            let field = if conversation.given == 0 { "messages[].role" } else { "completion[].role" };
            return Err(format!("no assistant turn, nothing to train on ({field})"));
        }
        let Rendered { text, spans } = template.conversation(conversation, notes)?;
        let learned = conversation.turns.iter().enumerate().filter(|turn| is_learned(*turn));
        let contents: Vec<&str> = learned.map(|(_, turn)| turn.content().trim()).collect();
        // A template that marks what is learned may mark several parts of a turn.
        let said = |i: usize| if contents.len() == spans.len() { &contents[i..=i] } else { &contents[..] };
        let spans: Vec<_> =
            spans.iter().enumerate().map(|(i, span)| self.until_end(&text, span.clone(), said(i))).collect();
        let is_ended = spans.last().is_some_and(|span| self.ends_with_end(&text[span.clone()]));
        let mut tokens = Tokens::of_spans(self.vocabulary.rendered(&text)?, &spans, notes);
        // After a turn that is not learned there is nothing to end.
        if last.is_trained() && !is_ended {
            tokens.push(self.vocabulary.eos());
        }
        Ok(tokens)
    }

    /// A turn up to its end token: the line break that templates put after it is never asked for. A template that ends
    /// `{% generation %}` before the end token leaves it outside, and the model would never learn to stop. An end token in
    /// the turn's content is a part of the answer.
    fn until_end(&self, text: &str, span: Range<usize>, contents: &[&str]) -> Range<usize> {
        let ends = || self.vocabulary.ends.iter().map(|(_, end)| end.as_str());
        let said = text[span.clone()].trim_end();
        let (mut rest, mut first_end) = (said, None);
        while let Some(end) = ends().find(|end| rest.ends_with(end)) {
            if contents.iter().any(|content| content.ends_with(end) && rest.ends_with(content)) {
                break;
            }
            first_end = Some(span.start + rest.len());
            rest = rest[..rest.len() - end.len()].trim_end();
        }
        let behind = || ends().find(|end| text[span.end..].starts_with(end)).map(|end| span.end + end.len());
        span.start..first_end.or_else(behind).unwrap_or(span.end)
    }

    fn ends_with_end(&self, text: &str) -> bool {
        self.vocabulary.ends.iter().any(|(_, end)| text.ends_with(end.as_str()))
    }

    /// Whether the text has an end token behind the content of its last turn.
    fn has_end(&self, text: &str, last: &Message) -> bool {
        let (text, content) = (text.trim_end(), last.content().trim());
        self.ends_with_end(text) && (content.is_empty() || !text.ends_with(content))
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
fn alpaca_prompt(Alpaca { system, history, instruction, input, .. }: &Alpaca) -> Result<String, String> {
    if !system.is_empty() || !history.is_empty() {
        let field = if history.is_empty() { "system" } else { "history" };
        return Err(format!(
            "{field} needs a chat template, which the base model has not: use an instruct model, or give dataset.chatTemplate"
        ));
    }
    Ok(match input.as_str() {
        "" => format!(
            "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n\
             ### Instruction:\n{instruction}\n\n### Response:\n"
        ),
        input => format!(
            "Below is an instruction that describes a task, paired with an input that provides further context. Write a \
             response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n\
             ### Response:\n"
        ),
    })
}
