//! `evaluate`: the recall of a model, with or without an adapter, for people.

use std::{ops::ControlFlow::Continue, path::Path};

use serde::Serialize;
use serde_json::json;
use tunesmith_crds::evaluation::Probe;

use crate::{
    error::Error,
    exam::{Answer, Exam, Score, Settings},
    generate::{Writer, uri},
    inputs::fetch_probe,
    progress::Progress,
    stop::Stop,
    store::Stores,
};

/// What to ask whom.
#[derive(clap::Args)]
pub struct Args {
    /// The model: a folder, or a URI
    #[arg(long)]
    model: String,
    /// A LoRA adapter over it: a folder, or a URI
    #[arg(long)]
    adapter: Option<String>,
    /// The questions, a file or a URI: JSON Lines of {"id", "question", "must_contain": [...]}
    #[arg(long)]
    probe: String,
    /// What the system turn says: give the training rows', as the recall gate does by itself
    #[arg(long)]
    system: Option<String>,
    /// Tokens of an answer at most
    #[arg(long, default_value_t = Probe::default_max_new_tokens())]
    max_new_tokens: u32,
    /// Show every answer, and what a wrong one lacks
    #[arg(long)]
    answers: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Asks the questions; what comes back is to be printed.
///
/// # Errors
/// Model, adapter or probe can't be used.
pub fn evaluate(args: &Args, stores: &Stores, work: &Path) -> Result<String, Error> {
    let (probe, digest) = fetch_probe(stores, &uri(&args.probe)?, work)?;
    let (model, voice) = Writer::load(&args.model, args.adapter.as_deref(), stores, work)?.into_parts();
    let settings = Settings {
        system: args.system.as_deref(),
        max_new_tokens: args.max_new_tokens,
        context: model.config().max_position_embeddings,
    };
    let exam = Exam::load(&probe, &digest, voice, settings)?;
    let mut answers = Vec::new();
    let progress = Progress::new();
    let score = exam.sit(&model, &progress, &Stop::default(), |answer| answers.push(Graded::of(answer)));
    progress.finish();
    let Continue(Score { right, questions }) = score? else {
        return Err(Error::Internal("an exam that nobody stopped has no end".into()));
    };
    let recall = Score { right, questions }.recall();
    let answers = if args.answers { answers } else { Vec::new() };
    let report = Report { recall, right, questions, probe_digest: exam.digest, answers };
    Ok(if args.json { format!("{:#}", json!(report)) } else { report.in_words() })
}

/// What came out.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Report {
    recall: f64,
    right: usize,
    questions: usize,
    probe_digest: String,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    answers: Vec<Graded>,
}

/// One answer.
#[derive(Serialize)]
struct Graded {
    id: String,
    question: String,
    answer: String,
    right: bool,
    missing: Vec<String>,
}

impl Graded {
    fn of(answer: &Answer<'_>) -> Self {
        let Answer { question, text, missing } = answer;
        Self {
            id: question.id.clone(),
            question: question.question.clone(),
            answer: text.trim().to_owned(),
            right: missing.is_empty(),
            missing: missing.iter().map(|text| (*text).to_owned()).collect(),
        }
    }

    fn in_words(&self) -> String {
        let Self { id, question, answer, right, missing } = self;
        let verdict = if *right { "right" } else { "wrong" };
        let missing: String = missing.iter().map(|text| format!("  lacks {text:?}\n")).collect();
        format!("{verdict}  {id}\n  {question}\n  {answer}\n{missing}")
    }
}

impl Report {
    fn in_words(&self) -> String {
        let Self { recall, right, questions, .. } = self;
        let answers: String = self.answers.iter().map(Graded::in_words).collect();
        format!("{answers}recall {recall:.4} ({right} of {questions} questions)")
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use serde_json::Value;

    use super::*;
    use crate::tiny_model;

    #[derive(Parser)]
    struct CommandLine {
        #[command(flatten)]
        args: Args,
    }

    fn evaluated(extra: &[&str]) -> String {
        let folder = tempfile::tempdir().unwrap();
        let (model, probe) = (folder.path().join("model"), folder.path().join("probe.jsonl"));
        tiny_model::write(&model).unwrap();
        let row = json!({"id": "price", "question": "How much?", "must_contain": ["no model says this"]});
        std::fs::write(&probe, row.to_string()).unwrap();
        let (model, probe) = (model.to_string_lossy(), probe.to_string_lossy());
        let words = ["evaluate", "--model", &model, "--probe", &probe, "--max-new-tokens", "4"];
        let args = CommandLine::parse_from(words.iter().chain(extra)).args;
        let runtime = tokio::runtime::Runtime::new().unwrap();
        evaluate(&args, &Stores::from_environment(runtime.handle().clone()), folder.path()).unwrap()
    }

    #[test]
    fn recall_is_printed_in_words_and_as_json_with_or_without_the_answers() {
        assert_eq!(evaluated(&[]), "recall 0.0000 (0 of 1 questions)");
        let shown = evaluated(&["--answers"]);
        assert!(shown.starts_with("wrong  price\n  How much?\n") && shown.contains("lacks \"no model"), "{shown}");
        let report: Value = serde_json::from_str(&evaluated(&["--json", "--answers"])).unwrap();
        assert_eq!((&report["recall"], &report["questions"]), (&json!(0.0), &json!(1)));
        assert_eq!(report["answers"][0]["missing"], json!(["no model says this"]));
        assert!(report["probeDigest"].as_str().unwrap().starts_with("sha256:"));
    }
}
