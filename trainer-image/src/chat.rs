//! `chat`: a conversation with a model, turn by turn.

use std::io::{BufRead, Write};

use tunesmith_engine::{Model, Sampling};

use crate::{data::conversation::Message, error::Error, generate::Voice};

/// Starts another conversation.
const NEW: &str = "/new";
/// Ends the program, as the end of the input does.
const QUIT: &str = "/quit";

/// Both sides of a conversation.
pub struct Chat<'a> {
    /// Who answers.
    pub model: &'a Model,
    /// The means to ask it.
    pub voice: &'a Voice,
    /// What the system turn says.
    pub system: Option<&'a str>,
    /// How answers are written.
    pub sampling: Sampling,
    /// Tokens of an answer at most.
    pub max_new_tokens: usize,
    /// Whether a person reads along: shows a prompt, and what can be typed.
    pub terminal: bool,
}

impl Chat<'_> {
    /// Answers every line of `input` on `output`, each answer as it is written. The model reads all turns so far.
    ///
    /// # Errors
    /// Input or output fails, or the model does. A turn that the model can't read is answered with what is wrong.
    pub fn run(&self, input: impl BufRead, output: &mut impl Write) -> Result<(), Error> {
        let pipe = |source| Error::Pipe { source };
        if self.terminal {
            writeln!(output, "{NEW} starts another conversation, {QUIT} ends.").map_err(pipe)?;
        }
        let mut turns = self.beginning();
        self.invite(output).map_err(pipe)?;
        for line in input.lines() {
            let line = line.map_err(pipe)?;
            match line.trim() {
                "" => {}
                QUIT => break,
                NEW => turns = self.beginning(),
                words => {
                    turns.push(Message::new("user", words));
                    match self.answer(&turns, output) {
                        Ok(answer) => turns.push(Message::new("assistant", &answer)),
                        Err(error @ Error::Pipe { .. }) => return Err(error),
                        Err(error) => {
                            turns.pop();
                            writeln!(output, "error: {error}\n({NEW} starts another conversation.)").map_err(pipe)?;
                        }
                    }
                }
            }
            self.invite(output).map_err(pipe)?;
        }
        Ok(())
    }

    fn beginning(&self) -> Vec<Message> {
        self.system.map(|system| Message::new("system", system)).into_iter().collect()
    }

    fn invite(&self, output: &mut impl Write) -> std::io::Result<()> {
        if self.terminal {
            write!(output, "> ")?;
        }
        output.flush()
    }

    /// Writes the answer to the last turn, and returns it.
    fn answer(&self, turns: &[Message], output: &mut impl Write) -> Result<String, Error> {
        let prompt = self.voice.conversation(turns).map_err(Error::Input)?;
        let mut shown = String::new();
        let mut failed = None;
        let answer = self.voice.answer(self.model, &prompt, self.sampling, self.max_new_tokens, |tokens| {
            // The bytes of a character may come in several tokens.
            let text = self.voice.decode(tokens).unwrap_or_default();
            if let Some(new) = text.strip_prefix(&shown).filter(|new| !new.ends_with(char::REPLACEMENT_CHARACTER)) {
                failed = write!(output, "{new}").and_then(|()| output.flush()).err();
                shown = text;
            }
            failed.is_none()
        })?;
        let answer = match (answer, failed) {
            (_, Some(source)) => return Err(Error::Pipe { source }),
            (answer, None) => answer.unwrap_or_default(),
        };
        let rest = answer.strip_prefix(&shown).unwrap_or(&answer);
        writeln!(output, "{rest}").map_err(|source| Error::Pipe { source })?;
        Ok(answer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{generate::Writer, store::Stores, tiny_model};

    fn conversation(lines: &str) -> Vec<String> {
        let folder = tempfile::tempdir().unwrap();
        tiny_model::write(folder.path()).unwrap();
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let stores = Stores::from_environment(runtime.handle().clone());
        let writer = Writer::load(&folder.path().to_string_lossy(), None, &stores, folder.path()).unwrap();
        let (model, voice) = writer.into_parts();
        let chat = Chat {
            model: &model,
            voice: &voice,
            system: None,
            sampling: Sampling::default(),
            max_new_tokens: 8,
            terminal: false,
        };
        let mut output = Vec::new();
        chat.run(lines.as_bytes(), &mut output).unwrap();
        String::from_utf8(output).unwrap().lines().map(str::to_owned).collect()
    }

    #[test]
    fn every_line_gets_an_answer_that_knows_the_turns_before() {
        let first = conversation("What is 2 and 2?\n");
        assert_eq!(first.len(), 1, "{first:?}");
        let [again, anew] =
            ["What is 2 and 2?\n\nWhat is 2 and 2?\n", "What is 2 and 2?\n/new\nWhat is 2 and 2?\n"].map(conversation);
        assert_eq!((again.len(), &again[0]), (2, &first[0]));
        assert_ne!(again[1], first[0], "the second turn reads the first");
        assert_eq!(anew, [first[0].clone(), first[0].clone()]);
        assert_eq!(conversation("/quit\nWhat is 2 and 2?\n").len(), 0);
    }

    #[test]
    fn a_turn_that_is_too_long_is_answered_with_what_is_wrong() {
        let lines = conversation(&format!("{}\nWhat is 2 and 2?\n", "long ".repeat(1000)));
        assert!(lines[0].contains("longest row"), "{lines:?}");
        assert_eq!(lines.last(), conversation("What is 2 and 2?\n").last());
    }
}
