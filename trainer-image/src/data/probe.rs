//! Probe rows: questions, and what their right answers hold.

use std::collections::HashSet;

use serde_json::{Map, Value};
use tunesmith_crds::fine_tune_job::OnBadRow;

use super::{
    DataError, DataFile, RowOptions,
    columns::{BadRow, Columns, RawRow, Wanted},
    container::Container,
    formats::{Row, unused},
    notes::Notes,
    rows::{Next, Reader},
};

/// A question with what a right answer holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// Number of the line that it came from.
    pub row: u64,
    /// Its name, which no other question of the file has.
    pub id: String,
    /// What the user asks.
    pub question: String,
    /// What a right answer holds: every one of these, ignoring case.
    pub must_contain: Vec<String>,
}

impl Question {
    /// What of `must_contain` the answer lacks; nothing if it is right.
    pub fn missing_in(&self, answer: &str) -> Vec<&str> {
        let answer = answer.to_lowercase();
        self.must_contain.iter().map(String::as_str).filter(|text| !answer.contains(&text.to_lowercase())).collect()
    }
}

/// Columns of a question.
const COLUMNS: [&str; 3] = ["id", "question", "must_contain"];

/// Reads the questions of a file.
///
/// # Errors
/// A row can't be used; the message names file, row and field.
pub fn load(file: &DataFile) -> Result<Vec<Question>, DataError> {
    let bad = |row, problem| DataError::Row { file: file.name.clone(), row, problem };
    let unreadable = |problem| DataError::Unreadable { file: file.name.clone(), problem };
    let wanted = Wanted::from(COLUMNS.map(str::to_owned));
    let mut container = Container::open(file, &wanted).map_err(unreadable)?;
    let (mut questions, mut ids, mut notes) = (Vec::new(), HashSet::new(), Notes::default());
    while let Some(raw) = container.next_row().map_err(|BadRow { row, problem, .. }| bad(row, problem))? {
        let RawRow { number: row, columns, unreadable, unread } = raw;
        if let Some(problem) = unreadable.into_values().next() {
            return Err(bad(row, problem));
        }
        let question = parse(row, &columns).and_then(|question| match ids.insert(question.id.clone()) {
            true => Ok(question),
            false => Err(format!("id \"{}\" is another row's too; give each question its own", question.id)),
        });
        questions.push(question.map_err(|problem| bad(row, problem))?);
        let others = columns.keys().filter(|name| !wanted.contains(*name));
        others.chain(unread.iter()).for_each(|name| notes.add(unused(name)));
    }
    notes.lines().iter().for_each(|note| tracing::warn!(file = %file.name, "{note}"));
    match questions.is_empty() {
        true => Err(DataError::Empty { file: file.name.clone() }),
        false => Ok(questions),
    }
}

fn parse(row: u64, columns: &Columns) -> Result<Question, String> {
    Ok(Question {
        row,
        id: text(columns.get("id"), "id")?,
        question: text(columns.get("question"), "question")?,
        must_contain: must_contain(columns)?,
    })
}

fn must_contain(columns: &Map<String, Value>) -> Result<Vec<String>, String> {
    let parsed = match columns.get("must_contain") {
        // CSV has no lists, but their JSON text.
        Some(Value::String(text)) if text.trim_start().starts_with('[') => serde_json::from_str(text).ok(),
        _ => None,
    };
    match parsed.as_ref().or(columns.get("must_contain")) {
        // Every answer would be right.
        Some(Value::Array(texts)) if texts.is_empty() => {
            Err("must_contain is empty; list what a right answer holds".into())
        }
        Some(Value::Array(texts)) => {
            texts.iter().enumerate().map(|(i, value)| text(Some(value), &format!("must_contain[{i}]"))).collect()
        }
        Some(_) => Err("must_contain is not a list of strings".into()),
        None => Err("must_contain is missing; a probe row has id, question and must_contain".into()),
    }
}

fn text(value: Option<&Value>, name: &str) -> Result<String, String> {
    match value {
        Some(Value::String(text)) if !text.trim().is_empty() => Ok(text.clone()),
        Some(Value::String(_)) => Err(format!("{name} is empty")),
        Some(_) => Err(format!("{name} is not a string")),
        None => Err(format!("{name} is missing; a probe row has id, question and must_contain")),
    }
}

/// The system turn that every conversation of some files of training rows begins with, if there is one.
///
/// # Errors
/// A row can't be used, and may not be skipped.
pub fn constant_system(files: &[DataFile], options: &RowOptions) -> Result<Option<String>, DataError> {
    let mut constant = None;
    let mut notes = Notes::default();
    for file in files {
        let mut reader = Reader::open(file, options)?;
        while let Some(next) = reader.next_row(&mut notes)? {
            let row = match next {
                Next::Row(_, row) => row,
                Next::Bad(..) if options.on_bad_row == OnBadRow::Skip => continue,
                Next::Bad(row, problem) => return Err(DataError::Row { file: file.name.clone(), row, problem }),
            };
            let Row::Conversation(conversation) = row else { return Ok(None) };
            let first = conversation.turns.first().filter(|message| message.role() == "system");
            match (first.map(|message| message.content()), &constant) {
                (Some(system), None) => constant = Some(system.to_owned()),
                (Some(system), Some(constant)) if system == constant => {}
                _ => return Ok(None),
            }
        }
    }
    Ok(constant)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_file<T>(content: &str, test: impl FnOnce(&DataFile) -> T) -> T {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("probe.jsonl");
        std::fs::write(&path, content).unwrap();
        test(&DataFile::new(&path))
    }

    const GOOD: &str = r#"{"id": "price", "fact_id": "p", "question": "How much?", "must_contain": ["$13", "Month"]}"#;

    #[test]
    fn an_answer_is_right_if_it_holds_every_string_in_any_case() {
        let questions = with_file(&format!("\u{feff}\n{GOOD}\n"), load).unwrap();
        let [question] = &questions[..] else { panic!("{questions:?}") };
        assert_eq!((question.row, question.id.as_str(), question.question.as_str()), (2, "price", "How much?"));
        assert!(question.missing_in("It is $13 a MONTH.").is_empty());
        assert_eq!(question.missing_in("It is $12 a month."), ["$13"]);
        assert_eq!(question.missing_in(""), ["$13", "Month"]);
    }

    #[test]
    fn a_bad_row_is_named_with_file_row_and_field() {
        for (bad, expected) in [
            (r#"{"question": "a", "must_contain": ["b"]}"#, "id is missing"),
            (r#"{"id": 7, "question": "a", "must_contain": ["b"]}"#, "id is not a string"),
            (r#"{"id": "a", "question": " ", "must_contain": ["b"]}"#, "question is empty"),
            (r#"{"id": "a", "question": "a"}"#, "must_contain is missing"),
            (r#"{"id": "a", "question": "a", "must_contain": "b"}"#, "must_contain is not a list"),
            (r#"{"id": "a", "question": "a", "must_contain": []}"#, "must_contain is empty"),
            (r#"{"id": "a", "question": "a", "must_contain": ["b", ""]}"#, "must_contain[1] is empty"),
            (GOOD, "id \"price\" is another row's too"),
            ("{", "not valid JSON"),
            ("[1]", "not a JSON object"),
        ] {
            let error = with_file(&format!("{GOOD}\n{bad}\n"), load).unwrap_err().to_string();
            assert!(error.starts_with("probe.jsonl row 2: ") && error.contains(expected), "{error}");
        }
        let error = with_file("\n", load).unwrap_err().to_string();
        assert!(error.contains("probe.jsonl has no rows"), "{error}");
    }

    #[test]
    fn questions_may_be_csv_with_their_lists_as_json_text() {
        let csv = "id,question,must_contain,topic\nprice,How much?,\"[\"\"$13\"\", \"\"month\"\"]\",money\n";
        let questions = with_file(csv, load).unwrap();
        assert_eq!(
            (questions[0].row, questions[0].must_contain.as_slice()),
            (2, &["$13".to_owned(), "month".into()][..])
        );
    }

    #[test]
    fn the_system_turn_is_taken_from_the_training_rows_only_if_all_begin_with_it() {
        let row = |system: &str| {
            let turn = if system.is_empty() {
                String::new()
            } else {
                format!(r#"{{"role": "system", "content": "{system}"}}, "#)
            };
            format!("{{\"messages\": [{turn}{{\"role\": \"user\", \"content\": \"hi\"}}]}}\n")
        };
        let of = |rows: &[&str]| {
            let rows: String = rows.iter().map(|system| row(system)).collect();
            with_file(&rows, |file| constant_system(std::slice::from_ref(file), &RowOptions::default())).unwrap()
        };
        assert_eq!(of(&["be kind", "be kind"]).as_deref(), Some("be kind"));
        assert_eq!(of(&["be kind", "be brief"]), None);
        assert_eq!(of(&["be kind", ""]), None);
        assert_eq!(of(&["", "be kind"]), None);
        let of_two = |first: &str, second: &str| {
            with_file(&row(first), |first| {
                with_file(&row(second), |second| {
                    constant_system(&[first.clone(), second.clone()], &RowOptions::default())
                })
            })
            .unwrap()
        };
        assert_eq!(of_two("be kind", "be kind").as_deref(), Some("be kind"));
        assert_eq!(of_two("be kind", "be brief"), None, "another file's rows count as well");
        assert_eq!(
            with_file("{\"text\": \"a\"}\n", |file| constant_system(
                std::slice::from_ref(file),
                &RowOptions::default()
            ))
            .unwrap(),
            None
        );
    }
}
