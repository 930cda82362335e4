//! Rows of a JSON Lines file. A row's number is its line's, so that an editor finds it.

use std::{
    fs::File,
    io::{BufRead, BufReader, Read},
    path::{Path, PathBuf},
};

use serde_json::{Map, Value};
use tunesmith_crds::fine_tune_job::DataFormat;

/// Longest line that is read, in bytes. A longer one is a file of another format.
const MAX_LINE_BYTES: u64 = 32 << 20;

/// A row, in the shape of its format.
#[derive(Clone, Debug, PartialEq)]
pub enum Row {
    /// A conversation.
    Messages(Vec<Message>),
    /// A text to go on from, and how it goes on.
    PromptCompletion {
        /// Given.
        prompt: String,
        /// To be learned.
        completion: String,
    },
    /// A text.
    Text(String),
}

/// One turn of a conversation, with all its fields: a chat template may use any of them.
#[derive(Clone, Debug, PartialEq)]
pub struct Message(Map<String, Value>);

impl Message {
    /// A turn with nothing but a role and a content.
    pub fn new(role: &str, content: &str) -> Self {
        let fields = [("role", role), ("content", content)];
        Self(fields.into_iter().map(|(name, value)| (name.to_owned(), Value::from(value))).collect())
    }

    /// Who speaks.
    pub fn role(&self) -> &str {
        self.0.get("role").and_then(Value::as_str).unwrap_or_default()
    }

    /// What is said.
    pub fn content(&self) -> &str {
        self.0.get("content").and_then(Value::as_str).unwrap_or_default()
    }

    /// All fields.
    pub fn fields(&self) -> &Map<String, Value> {
        &self.0
    }
}

/// Why a data file can't be used.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// The file can't be read.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// There is no row.
    #[error("{file} has no rows: it must hold one JSON object a line")]
    Empty {
        /// Name of the file.
        file: String,
    },
    /// A row can't be used.
    #[error("{file} row {row}: {problem}")]
    Row {
        /// Name of the file.
        file: String,
        /// Number of the line, from 1.
        row: u64,
        /// What is wrong with which field, and what to do.
        problem: String,
    },
    /// Too few rows to hold some out.
    #[error("{file} has {rows} row: evalFraction needs at least 2, or give eval.uri")]
    NothingToHoldOut {
        /// Name of the file.
        file: String,
        /// Its rows.
        rows: usize,
    },
}

/// Reads the rows of a file one after the other.
pub struct Reader {
    path: PathBuf,
    lines: BufReader<File>,
    format: DataFormat,
    row: u64,
}

impl Reader {
    /// Opens a file.
    ///
    /// # Errors
    /// It can't be read.
    pub fn open(path: &Path, format: DataFormat) -> Result<Self, DataError> {
        let file = File::open(path).map_err(|source| DataError::Io { path: path.to_owned(), source })?;
        Ok(Self { path: path.to_owned(), lines: BufReader::new(file), format, row: 0 })
    }

    /// The next row and its number; blank lines are skipped.
    ///
    /// # Errors
    /// The line is no row of the format.
    pub fn next_row(&mut self) -> Result<Option<(u64, Row)>, DataError> {
        let mut line = Vec::new();
        loop {
            line.clear();
            self.row += 1;
            let mut limited = (&mut self.lines).take(MAX_LINE_BYTES + 1);
            let read = limited.read_until(b'\n', &mut line);
            if read.map_err(|source| DataError::Io { path: self.path.clone(), source })? == 0 {
                return Ok(None);
            }
            if line.len() as u64 > MAX_LINE_BYTES {
                let problem = format!("longer than {} MiB; is this JSON Lines, one row a line?", MAX_LINE_BYTES >> 20);
                return Err(self.error(self.row, problem));
            }
            let text = std::str::from_utf8(&line).map_err(|error| {
                let problem = format!("not UTF-8 at byte {}; save the file as UTF-8", error.valid_up_to() + 1);
                self.error(self.row, problem)
            })?;
            let text = text.trim_start_matches('\u{feff}').trim();
            if !text.is_empty() {
                let row = self.parse(text).map_err(|problem| self.error(self.row, problem))?;
                return Ok(Some((self.row, row)));
            }
        }
    }

    /// An error about a row of this file.
    pub fn error(&self, row: u64, problem: String) -> DataError {
        DataError::Row { file: self.file_name(), row, problem }
    }

    /// The error of a file without rows.
    pub fn empty(&self) -> DataError {
        DataError::Empty { file: self.file_name() }
    }

    fn file_name(&self) -> String {
        file_name(&self.path)
    }

    fn parse(&mut self, text: &str) -> Result<Row, String> {
        let value: Value = serde_json::from_str(text).map_err(|error| format!("not valid JSON: {error}"))?;
        let Value::Object(columns) = value else { return Err("not a JSON object".into()) };
        if self.format == DataFormat::Auto {
            self.format = detect(&columns)?;
        }
        match self.format {
            DataFormat::Messages => messages(&columns).map(Row::Messages),
            DataFormat::PromptCompletion => Ok(Row::PromptCompletion {
                prompt: text_column(&columns, "prompt")?,
                completion: text_column(&columns, "completion")?,
            }),
            DataFormat::Text | DataFormat::Auto => text_column(&columns, "text").map(Row::Text),
        }
    }
}

/// A path's last part, as messages name it.
pub(crate) fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}

fn detect(columns: &Map<String, Value>) -> Result<DataFormat, String> {
    let has = |name| columns.contains_key(name);
    if has("messages") {
        Ok(DataFormat::Messages)
    } else if has("prompt") && has("completion") {
        Ok(DataFormat::PromptCompletion)
    } else if has("text") {
        Ok(DataFormat::Text)
    } else {
        let found: Vec<&str> = columns.keys().map(String::as_str).collect();
        Err(format!("its columns are [{}]; supported: messages; prompt and completion; text", found.join(", ")))
    }
}

fn text_column(columns: &Map<String, Value>, name: &str) -> Result<String, String> {
    match columns.get(name) {
        Some(Value::String(text)) if !text.is_empty() => Ok(text.clone()),
        Some(Value::String(_)) => Err(format!("{name} is empty")),
        Some(_) => Err(format!("{name} is not a string")),
        None => Err(format!("{name} is missing")),
    }
}

/// Roles that chat templates know.
const ROLES: [&str; 4] = ["system", "user", "assistant", "tool"];

fn messages(columns: &Map<String, Value>) -> Result<Vec<Message>, String> {
    if columns.get("tools").is_some_and(|tools| !tools.is_null()) {
        return Err("tools: tool definitions are not supported yet".into());
    }
    let messages = match columns.get("messages") {
        Some(Value::Array(messages)) if messages.is_empty() => return Err("messages is empty".into()),
        Some(Value::Array(messages)) => messages,
        Some(_) => return Err("messages is not a list".into()),
        None => return Err("messages is missing".into()),
    };
    messages.iter().enumerate().map(|(i, message)| self::message(i, message)).collect()
}

fn message(i: usize, message: &Value) -> Result<Message, String> {
    let Value::Object(fields) = message else { return Err(format!("messages[{i}] is not an object")) };
    for name in ["role", "content"] {
        match fields.get(name) {
            Some(Value::String(_)) => {}
            Some(_) => return Err(format!("messages[{i}].{name} is not a string")),
            None => return Err(format!("messages[{i}].{name} is missing; each turn needs role and content")),
        }
    }
    let message = Message(fields.clone());
    if !ROLES.contains(&message.role()) {
        return Err(format!("messages[{i}].role is \"{}\"; supported: {}", message.role(), ROLES.join(", ")));
    }
    if fields.get("tool_calls").is_some_and(|calls| !calls.is_null()) {
        return Err(format!("messages[{i}].tool_calls is not supported yet"));
    }
    Ok(message)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(content: &[u8]) -> Result<Vec<(u64, Row)>, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("train.jsonl");
        std::fs::write(&path, content).unwrap();
        let mut reader = Reader::open(&path, DataFormat::Auto).unwrap();
        let mut rows = Vec::new();
        while let Some(row) = reader.next_row().map_err(|error| error.to_string())? {
            rows.push(row);
        }
        Ok(rows)
    }

    #[test]
    fn rows_are_numbered_by_line() {
        let rows = read(b"\xef\xbb\xbf{\"text\": \"a\"}\r\n\n{\"text\": \"b\"}").unwrap();
        assert_eq!(rows, [(1, Row::Text("a".into())), (3, Row::Text("b".into()))]);
    }

    #[test]
    fn a_bad_row_is_named_with_file_row_and_field() {
        let good = br#"{"messages": [{"role": "user", "content": "hi"}]}"#;
        for (bad, expected) in [
            (
                &br#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant"}]}"#[..],
                "messages[1].content is missing",
            ),
            (br#"{"messages": [{"role": "bot", "content": "a"}]}"#, "messages[0].role is \"bot\"; supported: system"),
            (br#"{"messages": "hello"}"#, "messages is not a list"),
            (br#"{"messages": []}"#, "messages is empty"),
            (br#"{"text": "a"}"#, "messages is missing"),
            (br#"{"messages": ["#, "not valid JSON"),
            (b"[1]", "not a JSON object"),
            (b"{\"text\": \"\xff\"}", "not UTF-8 at byte 11"),
        ] {
            let error = read(&[good, &b"\n"[..], bad].concat()).unwrap_err();
            assert!(error.starts_with("train.jsonl row 2: ") && error.contains(expected), "{error}");
        }
    }

    #[test]
    fn columns_that_are_none_of_ours_are_listed() {
        let error = read(br#"{"question": "a", "answer": "b"}"#).unwrap_err();
        assert!(error.contains("[answer, question]"), "{error}");
    }

    #[test]
    fn a_line_that_never_ends_is_not_read_into_memory() {
        let mut huge = b"{\"text\": \"".to_vec();
        huge.resize((MAX_LINE_BYTES + 10) as usize, b'a');
        let error = read(&huge).unwrap_err();
        assert!(error.contains("row 1: longer than 32 MiB"), "{error}");
    }
}
