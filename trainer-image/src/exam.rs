//! Recall: asks a model the questions of a probe, and counts the right answers.

use std::ops::ControlFlow::{self, Break, Continue};

use serde_json::json;
use tunesmith_crds::adapter_version::ArtifactFile;
use tunesmith_engine::{Model, Sampling};

use crate::{
    data::{
        DataError, DataFile,
        probe::{self, Question},
    },
    digest,
    error::Error,
    generate::Voice,
    progress::Progress,
    stop::Stop,
};

/// Questions between two lines that say how far an exam is.
const TELL_EVERY: usize = 10;

/// The questions of a probe, ready to be asked.
pub struct Exam {
    /// Each with the tokens that ask it.
    questions: Vec<(Question, Vec<u32>)>,
    voice: Voice,
    max_new_tokens: usize,
    /// Digest (`sha256:…`) of all that an answer depends on besides the model: the questions and the settings.
    pub digest: String,
}

/// How questions are asked.
#[derive(Clone, Copy, Debug)]
pub struct Settings<'a> {
    /// What the system turn says.
    pub system: Option<&'a str>,
    /// Tokens of an answer at most.
    pub max_new_tokens: u32,
    /// Tokens of the model's longest row.
    pub context: usize,
}

/// An answer, graded.
pub struct Answer<'a> {
    /// What was asked.
    pub question: &'a Question,
    /// What the model said.
    pub text: String,
    /// What a right answer would hold besides; nothing if this one is right.
    pub missing: Vec<&'a str>,
}

/// What came out of an exam.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Score {
    /// Right answers.
    pub right: usize,
    /// Questions in all.
    pub questions: usize,
}

impl Score {
    /// The share of right answers, with six decimals.
    pub fn recall(self) -> f64 {
        (self.right as f64 / self.questions.max(1) as f64 * 1e6).round() / 1e6
    }
}

impl Exam {
    /// Reads the questions of a file with this digest, and encodes them.
    ///
    /// # Errors
    /// A row can't be used, or its question is too long for the model; the message names file, row and field.
    pub fn load(
        probe: &DataFile,
        digest: &ArtifactFile,
        voice: Voice,
        settings: Settings<'_>,
    ) -> Result<Self, DataError> {
        let Settings { system, max_new_tokens, context } = settings;
        let bad = |row, problem| DataError::Row { file: probe.name.clone(), row, problem };
        let encode = |question: Question| {
            let prompt = voice.prompt(system, &question.question).map_err(|problem| bad(question.row, problem))?;
            match prompt.len() < context {
                true => Ok((question, prompt)),
                false => Err(bad(
                    question.row,
                    format!(
                        "question and system turn have {} tokens, and the model reads fewer than {context} \
                         (max_position_embeddings); shorten the question",
                        prompt.len()
                    ),
                )),
            }
        };
        let questions = probe::load(probe)?.into_iter().map(encode).collect::<Result<_, _>>()?;
        let asked = json!({"maxNewTokens": max_new_tokens, "system": system}).to_string();
        let digest = digest::of_files(&[digest.clone(), digest::file_of_bytes("settings", asked.as_bytes())]);
        Ok(Self { questions, voice, max_new_tokens: max_new_tokens as usize, digest })
    }

    /// Asks every question, each alone and answered greedily; `see` gets the answers. Breaks off when asked to stop.
    ///
    /// # Errors
    /// The model fails.
    pub fn sit(
        &self,
        model: &Model,
        progress: &Progress,
        stop: &Stop,
        mut see: impl FnMut(&Answer<'_>),
    ) -> Result<ControlFlow<(), Score>, Error> {
        let mut score = Score::default();
        for (question, prompt) in &self.questions {
            let go_on = |_: &[u32]| !stop.is_requested();
            let answer = self.voice.answer(model, prompt, Sampling::default(), self.max_new_tokens, go_on)?;
            let Some(text) = answer else { return Ok(Break(())) };
            let missing = question.missing_in(&text);
            score.right += usize::from(missing.is_empty());
            score.questions += 1;
            see(&Answer { question, text, missing });
            if score.questions.is_multiple_of(TELL_EVERY) {
                progress.message(&format!("evaluating: {} of {} questions", score.questions, self.questions.len()));
            }
        }
        Ok(Continue(score))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::{generate::Writer, store::Stores, tiny_model};

    /// A tiny model that answers nonsense, always the same.
    struct Desk {
        folder: tempfile::TempDir,
        _runtime: tokio::runtime::Runtime,
        writer: Writer,
    }

    impl Desk {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let model = folder.path().join("model");
            tiny_model::write(&model).unwrap();
            let runtime = tokio::runtime::Runtime::new().unwrap();
            let stores = Stores::from_environment(runtime.handle().clone());
            let writer = Writer::load(&model.to_string_lossy(), None, &stores, folder.path()).unwrap();
            Self { folder, _runtime: runtime, writer }
        }

        fn answer(&self, question: &str) -> String {
            self.writer.answer(None, question, Sampling::default(), 8).unwrap()
        }

        fn exam(&self, rows: &str, settings: Settings<'_>) -> Result<Exam, DataError> {
            let path = self.folder.path().join("probe.jsonl");
            fs::write(&path, rows).unwrap();
            let file = digest::file_on_disk(&path, "probe").unwrap();
            Exam::load(&DataFile::new(&path), &file, Voice::load(&self.folder.path().join("model")).unwrap(), settings)
        }
    }

    fn row(id: &str, question: &str, must_contain: &str) -> String {
        format!("{}\n", json!({"id": id, "question": question, "must_contain": [must_contain]}))
    }

    const SETTINGS: Settings<'static> = Settings { system: None, max_new_tokens: 8, context: 2048 };

    #[test]
    fn recall_is_the_share_of_questions_whose_answer_holds_what_it_must() {
        let desk = Desk::new();
        let said: String = desk.answer("who?").trim().to_uppercase();
        assert!(!said.is_empty(), "the tiny model says something");
        let rows = [row("a", "who?", &said), row("b", "who?", "never said"), row("c", "why?", "never said")].concat();
        let exam = desk.exam(&rows, SETTINGS).unwrap();
        let mut seen = Vec::new();
        let see = |answer: &Answer<'_>| seen.push((answer.question.id.clone(), answer.missing.is_empty()));
        let Continue(score) = exam.sit(desk.writer.model(), &Progress::new(), &Stop::default(), see).unwrap() else {
            panic!("nobody asked to stop")
        };
        assert_eq!((score, score.recall()), (Score { right: 1, questions: 3 }, 0.333333));
        assert_eq!(seen, [("a".into(), true), ("b".into(), false), ("c".into(), false)]);
    }

    #[test]
    fn a_request_to_stop_is_heard_between_two_tokens() {
        let desk = Desk::new();
        let exam = desk.exam(&row("a", "who?", "x"), SETTINGS).unwrap();
        let sit = |stop: Stop| exam.sit(desk.writer.model(), &Progress::new(), &stop, |_| ()).unwrap();
        assert_eq!(sit(Stop::after(1)), Break(()));
        assert!(sit(Stop::default()).is_continue());
    }

    #[test]
    fn the_digest_covers_questions_and_settings() {
        let desk = Desk::new();
        let digest = |rows: &str, settings| desk.exam(rows, settings).unwrap().digest;
        let rows = row("a", "who?", "x");
        let digests = [
            digest(&rows, SETTINGS),
            digest(&row("a", "who?", "y"), SETTINGS),
            digest(&rows, Settings { system: Some("be kind"), ..SETTINGS }),
            digest(&rows, Settings { max_new_tokens: 9, ..SETTINGS }),
        ];
        assert_eq!(digest(&rows, Settings { context: 1024, ..SETTINGS }), digests[0]);
        assert!(digests.iter().enumerate().all(|(i, digest)| !digests[..i].contains(digest)), "{digests:?}");
    }

    #[test]
    fn a_question_that_the_model_cannot_read_is_named_by_its_row() {
        let desk = Desk::new();
        let settings = Settings { context: 16, ..SETTINGS };
        let error = desk.exam(&row("a", "a long question", "x"), settings).err().unwrap().to_string();
        assert!(error.starts_with("probe.jsonl row 1: question") && error.contains("shorten"), "{error}");
    }
}
