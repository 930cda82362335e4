//! Formats of rows: which columns each has, and what of them is asked and answered.

use serde_json::{Map, Value};
use tunesmith_crds::fine_tune_job::DataFormat;

use super::{
    container::Columns,
    conversation::{Conversation, Message},
};

/// Every column that a format knows.
pub(super) const COLUMNS: [&str; 10] =
    ["messages", "tools", "conversations", "system", "prompt", "completion", "instruction", "input", "output", "text"];

/// A row, in the shape of its format.
#[derive(Clone, Debug, PartialEq)]
pub enum Row {
    /// A conversation, in which the assistant's turns are to be learned.
    Conversation(Conversation),
    /// A text to go on from, and how it goes on.
    PromptCompletion {
        /// Given.
        prompt: String,
        /// To be learned.
        completion: String,
    },
    /// A task, and its solution.
    Alpaca(Alpaca),
    /// A text.
    Text(String),
}

/// A task, and its solution.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Alpaca {
    /// The system turn before it; may be empty.
    pub system: String,
    /// Earlier tasks and their solutions, which are to be learned too.
    pub history: Vec<(String, String)>,
    /// What to do.
    pub instruction: String,
    /// With what; may be empty.
    pub input: String,
    /// To be learned.
    pub output: String,
}

/// The format that has these columns.
///
/// # Errors
/// None has.
pub(super) fn detect(columns: &Columns) -> Result<DataFormat, String> {
    let has = |name| columns.get(name).is_some_and(|value| !value.is_null());
    if has("messages") {
        Ok(DataFormat::Messages)
    } else if has("conversations") {
        Ok(DataFormat::ShareGPT)
    } else if has("prompt") && has("completion") {
        Ok(DataFormat::PromptCompletion)
    } else if has("instruction") && has("output") {
        // Before text, in which Alpaca's own data set repeats the other columns.
        Ok(DataFormat::Alpaca)
    } else if has("text") {
        Ok(DataFormat::Text)
    } else {
        let found: Vec<&str> = columns.keys().map(String::as_str).collect();
        Err(format!(
            "its columns are [{}]; supported: messages; conversations; prompt and completion; instruction, input and \
             output; text",
            found.join(", ")
        ))
    }
}

/// A row of a format.
///
/// # Errors
/// A column is missing or of another shape; the message names it.
pub(super) fn parse(format: DataFormat, columns: &Columns) -> Result<Row, String> {
    match format {
        DataFormat::Messages => {
            refuse_tools(columns)?;
            messages(columns, "messages").map(conversation)
        }
        DataFormat::ShareGPT => {
            refuse_tools(columns)?;
            share_gpt(columns).map(conversation)
        }
        DataFormat::PromptCompletion => prompt_completion(columns),
        DataFormat::Alpaca => Ok(Row::Alpaca(Alpaca {
            instruction: text(columns, "instruction")?,
            input: optional_text(columns, "input")?.unwrap_or_default(),
            output: text(columns, "output")?,
            ..Alpaca::default()
        })),
        DataFormat::Text | DataFormat::Auto => text(columns, "text").map(Row::Text),
    }
}

fn conversation(turns: Vec<Message>) -> Row {
    Row::Conversation(Conversation { turns, ..Conversation::default() })
}

fn text(columns: &Columns, name: &str) -> Result<String, String> {
    match optional_text(columns, name)? {
        Some(text) if !text.is_empty() => Ok(text),
        Some(_) => Err(format!("{name} is empty")),
        None => Err(format!("{name} is missing")),
    }
}

/// A column that may be left out or null.
fn optional_text(columns: &Columns, name: &str) -> Result<Option<String>, String> {
    match columns.get(name) {
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(Value::Null) | None => Ok(None),
        Some(_) => Err(format!("{name} is not a string")),
    }
}

/// A column of turns.
fn list<'a>(columns: &'a Columns, name: &str) -> Result<&'a [Value], String> {
    match columns.get(name) {
        Some(Value::Array(turns)) if turns.is_empty() => Err(format!("{name} is empty")),
        Some(Value::Array(turns)) => Ok(turns),
        Some(Value::Null) | None => Err(format!("{name} is missing")),
        Some(_) => Err(format!("{name} is not a list")),
    }
}

/// A turn's field that must be a string.
fn field<'a>(turn: &'a Map<String, Value>, path: &str, name: &str, needs: &str) -> Result<&'a str, String> {
    match turn.get(name) {
        Some(Value::String(text)) => Ok(text),
        Some(_) => Err(format!("{path}.{name} is not a string")),
        None => Err(format!("{path}.{name} is missing; each turn needs {needs}")),
    }
}

/// Roles that chat templates know.
const ROLES: [&str; 4] = ["system", "user", "assistant", "tool"];

fn messages(columns: &Columns, name: &str) -> Result<Vec<Message>, String> {
    let turns = list(columns, name)?.iter().enumerate();
    turns.map(|(i, turn)| message(&format!("{name}[{i}]"), turn)).collect()
}

fn message(path: &str, turn: &Value) -> Result<Message, String> {
    let Value::Object(fields) = turn else { return Err(format!("{path} is not an object")) };
    let role = field(fields, path, "role", "role and content")?;
    field(fields, path, "content", "role and content")?;
    if !ROLES.contains(&role) {
        return Err(format!("{path}.role is \"{role}\"; supported: {}", ROLES.join(", ")));
    }
    if is_given(fields, "tool_calls") {
        return Err(format!("{path}.tool_calls is not supported yet"));
    }
    Ok(Message::from_fields(path, fields.clone(), None))
}

fn refuse_tools(columns: &Columns) -> Result<(), String> {
    match is_given(columns, "tools") {
        true => Err("tools: tool definitions are not supported yet".into()),
        false => Ok(()),
    }
}

/// Whether there is something in a field. Tables have every field in every row, null or empty.
fn is_given(fields: &Map<String, Value>, name: &str) -> bool {
    match fields.get(name) {
        None | Some(Value::Null) => false,
        Some(Value::Array(items)) => !items.is_empty(),
        Some(_) => true,
    }
}

/// ShareGPT's names of the roles.
const SPEAKERS: [(&str, &str); 11] = [
    ("human", "user"),
    ("user", "user"),
    ("gpt", "assistant"),
    ("assistant", "assistant"),
    ("chatgpt", "assistant"),
    ("bing", "assistant"),
    ("bard", "assistant"),
    ("model", "assistant"),
    ("system", "system"),
    ("tool", "tool"),
    ("observation", "tool"),
];

/// `from` and `value`; some files have `role` and `content` under the same column, and a system turn beside it.
fn share_gpt(columns: &Columns) -> Result<Vec<Message>, String> {
    let system = optional_text(columns, "system")?.filter(|system| !system.is_empty());
    let mut messages: Vec<Message> = system.iter().map(|system| Message::new("system", system)).collect();
    for (i, turn) in list(columns, "conversations")?.iter().enumerate() {
        let path = format!("conversations[{i}]");
        let Value::Object(fields) = turn else { return Err(format!("{path} is not an object")) };
        if !fields.contains_key("from") && fields.contains_key("role") {
            messages.push(message(&path, turn)?);
            continue;
        }
        let from = field(fields, &path, "from", "from and value")?;
        let value = field(fields, &path, "value", "from and value")?;
        let Some((_, role)) = SPEAKERS.iter().find(|(speaker, _)| *speaker == from) else {
            let names = SPEAKERS.map(|(speaker, _)| speaker);
            return Err(format!("{path}.from is \"{from}\"; supported: {}", names.join(", ")));
        };
        messages.push(Message::new(role, value));
    }
    Ok(messages)
}

fn prompt_completion(columns: &Columns) -> Result<Row, String> {
    let is_list = |name| columns.get(name).is_some_and(Value::is_array);
    match (is_list("prompt"), is_list("completion")) {
        (true, true) => {
            refuse_tools(columns)?;
            let (mut turns, completion) = (messages(columns, "prompt")?, messages(columns, "completion")?);
            let given = turns.len();
            turns.extend(completion);
            Ok(Row::Conversation(Conversation { turns, given, ..Conversation::default() }))
        }
        (false, false) => {
            Ok(Row::PromptCompletion { prompt: text(columns, "prompt")?, completion: text(columns, "completion")? })
        }
        _ => Err("prompt and completion must both be strings, or both be lists of messages".into()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn row(columns: Value) -> Result<Row, String> {
        let columns = columns.as_object().unwrap();
        parse(detect(columns)?, columns)
    }

    fn turns(turns: &[(&str, &str)]) -> Vec<(String, String)> {
        turns.iter().map(|(role, content)| ((*role).to_owned(), (*content).to_owned())).collect()
    }

    /// Roles and contents of a conversation's turns.
    fn said(row: &Row) -> Vec<(String, String)> {
        let Row::Conversation(conversation) = row else { panic!("{row:?}") };
        conversation.turns.iter().map(|turn| (turn.role().to_owned(), turn.content().to_owned())).collect()
    }

    fn task(instruction: &str, output: &str) -> Alpaca {
        Alpaca { instruction: instruction.into(), output: output.into(), ..Alpaca::default() }
    }

    #[test]
    fn each_format_is_told_from_its_columns() {
        let chat = turns(&[("user", "hi"), ("assistant", "yes")]);
        let messages = json!([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]);
        assert_eq!(said(&row(json!({"messages": messages})).unwrap()), chat);
        let conversations = json!([{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]);
        assert_eq!(said(&row(json!({"conversations": conversations, "id": 7})).unwrap()), chat);
        let (prompt, completion) = ("2 + 2 =".to_owned(), " 4".to_owned());
        let expected = Row::PromptCompletion { prompt: prompt.clone(), completion: completion.clone() };
        assert_eq!(row(json!({"prompt": prompt, "completion": completion})), Ok(expected));
        let split = row(json!({"prompt": [messages[0]], "completion": [messages[1]]})).unwrap();
        assert_eq!(said(&split), chat);
        assert!(matches!(split, Row::Conversation(Conversation { given: 1, .. })));
        let alpaca = Row::Alpaca(Alpaca { input: "2, 2".into(), ..task("Add.", "4") });
        let columns = json!({"instruction": "Add.", "input": "2, 2", "output": "4", "text": "Below is an instruction"});
        assert_eq!(row(columns), Ok(alpaca));
        assert_eq!(row(json!({"text": "abc"})), Ok(Row::Text("abc".into())));
    }

    #[test]
    fn alpaca_may_go_without_input() {
        for columns in [
            json!({"instruction": "Sing.", "output": "la"}),
            json!({"instruction": "Sing.", "input": null, "output": "la"}),
            json!({"instruction": "Sing.", "input": "", "output": "la"}),
        ] {
            let expected = Row::Alpaca(task("Sing.", "la"));
            assert_eq!(row(columns), Ok(expected));
        }
    }

    #[test]
    fn the_rows_of_the_documentation_are_of_the_formats_that_it_names() {
        let page = include_str!("../../../docs/data.md");
        let rows = page.lines().filter_map(|line| line.strip_prefix("| `")?.split_once("` | `{"));
        let mut formats = Vec::new();
        for (format, rest) in rows {
            let columns: Columns = serde_json::from_str(&format!("{{{}", rest.split('`').next().unwrap())).unwrap();
            let format: DataFormat = serde_json::from_value(json!(format)).unwrap();
            assert_eq!(detect(&columns), Ok(format));
            parse(format, &columns).unwrap();
            formats.push(format);
        }
        assert_eq!(formats.len(), 6, "{formats:?}");
    }

    #[test]
    fn columns_that_a_table_has_but_a_row_leaves_empty_are_none() {
        let messages = json!([{"role": "user", "content": "hi", "tool_calls": []}]);
        let columns = json!({"messages": messages, "tools": [], "prompt": null, "completion": null});
        assert!(matches!(row(columns), Ok(Row::Conversation(_))));
        assert_eq!(row(json!({"messages": null, "text": "abc"})), Ok(Row::Text("abc".into())));
    }

    #[test]
    fn share_gpt_has_many_names_for_its_speakers() {
        let conversations = json!([
            {"from": "user", "value": "a"}, {"from": "chatgpt", "value": "b"},
            {"role": "user", "content": "c"}, {"from": "model", "value": "d"},
        ]);
        let expected = turns(&[("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]);
        assert_eq!(said(&row(json!({"system": "s", "conversations": conversations})).unwrap()), expected);
    }

    #[test]
    fn what_is_wrong_with_a_row_is_named_by_its_field() {
        for (columns, expected) in [
            (
                json!({"messages": [{"role": "user", "content": "a"}, {"role": "assistant"}]}),
                "messages[1].content is missing",
            ),
            (json!({"messages": [{"role": "bot", "content": "a"}]}), "messages[0].role is \"bot\"; supported: system"),
            (json!({"messages": [{"role": "user", "content": 4}]}), "messages[0].content is not a string"),
            (json!({"messages": "hello"}), "messages is not a list"),
            (json!({"messages": []}), "messages is empty"),
            (json!({"messages": [{"role": "user", "content": "a"}], "tools": [{}]}), "tools: tool definitions"),
            (json!({"conversations": [{"from": "human"}]}), "conversations[0].value is missing; each turn needs from"),
            (
                json!({"conversations": [{"from": "function_call", "value": ""}]}),
                "conversations[0].from is \"function_call\"",
            ),
            (json!({"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}), "must both be strings"),
            (json!({"prompt": "a", "completion": ""}), "completion is empty"),
            (json!({"instruction": "a", "input": ["b"], "output": "c"}), "input is not a string"),
            (json!({"question": "a", "answer": "b"}), "[question, answer]; supported: messages; conversations;"),
        ] {
            let error = row(columns).unwrap_err();
            assert!(error.contains(expected), "expected `{expected}`, got `{error}`");
        }
    }
}
