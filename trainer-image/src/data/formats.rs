//! Formats of rows: which columns each has, and what of them is asked and answered.

mod calls;
mod preferences;
#[cfg(test)]
mod tests;
mod turns;

use serde_json::{Map, Value};
pub(super) use tunesmith_crds::fine_tune_job::COLUMNS;
use tunesmith_crds::fine_tune_job::DataFormat;

use self::turns::{list, turns, with_system};
use super::{columns::Columns, conversation::Conversation, notes::Notes};

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

/// Refuses a row that is no example to imitate, but data of another kind; `is_mapped` tells the columns that
/// dataset.columns names.
///
/// # Errors
/// It is; the message says of which kind.
pub(super) fn refuse_other_kinds(columns: &Columns, is_mapped: impl Fn(&str) -> bool) -> Result<(), String> {
    preferences::refuse(columns, is_mapped)
}

/// The format that has these columns; `unread` are others of the same row.
///
/// # Errors
/// None has.
pub(super) fn detect(columns: &Columns, unread: &[String]) -> Result<DataFormat, String> {
    let has = |name| columns.get(name).is_some_and(|value| !value.is_null());
    if has("messages") {
        Ok(DataFormat::Messages)
    } else if has("conversations") {
        Ok(DataFormat::ShareGPT)
    } else if has("prompt") && has("completion") {
        Ok(DataFormat::PromptCompletion)
    } else if has("instruction") && (has("output") || has("response")) {
        // Before text, in which Alpaca's own data set repeats the other columns.
        Ok(DataFormat::Alpaca)
    } else if has("text") {
        Ok(DataFormat::Text)
    } else {
        let names = columns.keys().chain(unread);
        let found: Vec<String> = names.take(SHOWN_COLUMNS).map(|name| shorten(name)).collect();
        let more = if columns.len() + unread.len() > SHOWN_COLUMNS { ", …" } else { "" };
        let kind = preferences::other_kind(columns).unwrap_or_default();
        Err(format!(
            "its columns are [{}{more}]; supported: messages; conversations; prompt and completion; instruction, input and \
             output; text; other names go into dataset.columns, such as {{prompt: question, completion: answer}}{kind}",
            found.join(", ")
        ))
    }
}

/// Columns of a row that an error shows.
const SHOWN_COLUMNS: usize = 12;
/// Characters of a column's name that are shown.
const SHOWN_NAME: usize = 60;

/// A column's name as a message shows it.
pub(super) fn shorten(name: &str) -> String {
    match name.char_indices().nth(SHOWN_NAME) {
        Some((end, _)) => format!("{}…", &name[..end]),
        None => name.to_owned(),
    }
}

/// Columns that tell data of other kinds.
pub(super) fn other_columns() -> impl Iterator<Item = &'static str> {
    preferences::columns()
}

/// Whether a column has something to say in this format.
pub(super) fn uses(format: DataFormat, name: &str) -> bool {
    let used: &[&str] = match format {
        DataFormat::Messages => &["messages", "system", "tools", "functions", "chat_template_kwargs"],
        DataFormat::ShareGPT => &["conversations", "system", "tools", "functions", "chat_template_kwargs"],
        DataFormat::PromptCompletion => {
            &["prompt", "completion", "system", "tools", "functions", "chat_template_kwargs"]
        }
        DataFormat::Alpaca => {
            &["instruction", "input", "context", "output", "response", "system", "history", "tools", "functions"]
        }
        DataFormat::Text | DataFormat::Auto => &["text"],
    };
    used.contains(&name)
}

/// A row of a format. `notes` counts its columns that the format does not know.
///
/// # Errors
/// A column is missing or of another shape; the message names it.
pub(super) fn parse(format: DataFormat, mut columns: Columns, notes: &mut Notes) -> Result<Row, String> {
    let row = match format {
        DataFormat::Messages => conversation(&mut columns, "messages", notes),
        DataFormat::ShareGPT => conversation(&mut columns, "conversations", notes),
        DataFormat::PromptCompletion => prompt_completion(&mut columns, notes),
        DataFormat::Alpaca => alpaca(&mut columns).map(Row::Alpaca),
        DataFormat::Text | DataFormat::Auto => text(&mut columns, "text").map(Row::Text),
    }?;
    for (name, _) in columns.iter().filter(|(_, value)| is_given(value)) {
        notes.add(unused(name));
    }
    Ok(row)
}

/// Says that a column is not used.
pub(super) fn unused(column: &str) -> String {
    format!("column {:?} is not used", shorten(column))
}

/// Takes a column out of a row, as it is used.
fn take(columns: &mut Columns, name: &str) -> Option<Value> {
    columns.shift_remove(name)
}

/// Whether there is something in a field. Tables have every field in every row, null or empty.
pub(super) fn is_given(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Array(items) => !items.is_empty(),
        Value::Object(fields) => !fields.is_empty(),
        Value::String(text) => !text.is_empty(),
        Value::Bool(_) | Value::Number(_) => true,
    }
}

/// A text that must be there.
fn text(columns: &mut Columns, name: &str) -> Result<String, String> {
    match optional_text(columns, name)? {
        Some(text) if !text.is_empty() => Ok(text),
        Some(_) => Err(format!("{name} is empty")),
        None => Err(format!("{name} is missing")),
    }
}

/// A text that is to be learned: white space alone teaches nothing.
fn answer(columns: &mut Columns, name: &str) -> Result<String, String> {
    let text = text(columns, name)?;
    match text.trim().is_empty() {
        true => Err(format!("{name} is empty")),
        false => Ok(text),
    }
}

/// A text that may be left out or null.
fn optional_text(columns: &mut Columns, name: &str) -> Result<Option<String>, String> {
    match take(columns, name) {
        Some(Value::String(text)) => Ok(Some(text)),
        Some(Value::Null) | None => Ok(None),
        Some(_) => Err(format!("{name} is not a string")),
    }
}

/// Whichever of two columns is there: the format's own, or the one that other data calls it.
fn either(columns: &mut Columns, name: &'static str, other: &'static str) -> Result<&'static str, String> {
    let given = |name| columns.get(name).is_some_and(is_given);
    match (given(name), given(other)) {
        (true, true) => Err(format!("{name} and {other} are both there; remove one")),
        (false, true) => Ok(other),
        (_, false) => Ok(name),
    }
}

/// Turns with the system, tools and variables beside them.
fn conversation(columns: &mut Columns, name: &str, notes: &mut Notes) -> Result<Row, String> {
    let system = optional_text(columns, "system")?;
    let turns = with_system(system, turns(columns, name, false, notes)?)?;
    let tools = calls::tools(columns)?;
    Ok(Row::Conversation(Conversation { turns, given: 0, tools, variables: variables(columns)? }))
}

/// Variables of a template that its environment sets.
const RESERVED: [&str; 4] = ["messages", "tools", "add_generation_prompt", "continue_final_message"];

/// What the row gives to the chat template besides its turns.
fn variables(columns: &mut Columns) -> Result<Map<String, Value>, String> {
    let name = "chat_template_kwargs";
    let mut variables = match take(columns, name) {
        Some(Value::String(text)) if !text.trim().is_empty() => match calls::parsed(&text, name)? {
            Value::Object(variables) => variables,
            _ => return Err(format!("{name} is not an object")),
        },
        Some(Value::Object(variables)) => variables,
        Some(Value::Null | Value::String(_)) | None => return Ok(Map::new()),
        Some(_) => return Err(format!("{name} is not an object")),
    };
    variables.retain(|_, value| !value.is_null());
    match variables.keys().find(|variable| RESERVED.contains(&variable.as_str())) {
        Some(variable) => Err(format!("{name}.{variable} can't be set: it follows from the row's other columns")),
        None => Ok(variables),
    }
}

/// Refuses columns that only conversations have.
fn refuse_for_texts(columns: &mut Columns) -> Result<(), String> {
    if !calls::tools(columns)?.is_empty() {
        return Err("tools: functions are for rows of turns (messages, conversations)".into());
    }
    match variables(columns)?.is_empty() {
        true => Ok(()),
        false => Err("chat_template_kwargs: variables of a template are for rows of turns".into()),
    }
}

/// Whether a prompt or completion is turns. CSV has them as JSON text, which is told by the role of its first turn.
fn is_turns(value: &Value) -> bool {
    let has_role = |turn: &Value| turn.get("role").is_some() || turn.get("from").is_some();
    match value {
        Value::Array(_) | Value::Object(_) => true,
        Value::String(text) if text.trim_start().starts_with('[') => {
            let turns = serde_json::from_str::<Vec<Value>>(text);
            turns.is_ok_and(|turns| turns.first().is_some_and(has_role))
        }
        _ => false,
    }
}

/// A prompt and its completion, both texts or both turns. A system text goes before the prompt, with a blank line
/// between, as texts have no turns.
fn prompt_completion(columns: &mut Columns, notes: &mut Notes) -> Result<Row, String> {
    let is_list = |name| columns.get(name).is_some_and(is_turns);
    match (is_list("prompt"), is_list("completion")) {
        (true, true) => {
            let system = optional_text(columns, "system")?;
            let mut turns_in_all = with_system(system, turns(columns, "prompt", true, notes)?)?;
            let given = turns_in_all.len();
            turns_in_all.extend(turns(columns, "completion", false, notes)?);
            let tools = calls::tools(columns)?;
            Ok(Row::Conversation(Conversation { turns: turns_in_all, given, tools, variables: variables(columns)? }))
        }
        (false, false) => {
            refuse_for_texts(columns)?;
            let system = optional_text(columns, "system")?.filter(|system| !system.is_empty());
            let prompt = text(columns, "prompt")?;
            let prompt = system.map_or_else(|| prompt.clone(), |system| format!("{system}\n\n{prompt}"));
            Ok(Row::PromptCompletion { prompt, completion: answer(columns, "completion")? })
        }
        _ => Err("prompt and completion must both be strings, or both be lists of messages".into()),
    }
}

/// A task in Alpaca's words, or in Dolly's (`context`, `response`).
fn alpaca(columns: &mut Columns) -> Result<Alpaca, String> {
    refuse_for_texts(columns)?;
    let input = either(columns, "input", "context")?;
    let output = either(columns, "output", "response")?;
    Ok(Alpaca {
        system: optional_text(columns, "system")?.unwrap_or_default(),
        history: history(columns)?,
        instruction: text(columns, "instruction")?,
        input: optional_text(columns, input)?.unwrap_or_default(),
        output: answer(columns, output)?,
    })
}

/// Earlier tasks and their solutions: `[["task", "solution"], …]`, or its JSON text.
fn history(columns: &mut Columns) -> Result<Vec<(String, String)>, String> {
    let is_text = |value: &Value| value.as_str().is_some_and(|text| ["", "[]", "null"].contains(&text.trim()));
    if columns.get("history").is_none_or(|value| !is_given(value) || is_text(value)) {
        take(columns, "history");
        return Ok(Vec::new());
    }
    let pair = |(i, pair): (usize, Value)| match pair.as_array().map(Vec::as_slice) {
        Some([Value::String(asked), Value::String(answered)]) if answered.trim().is_empty() => {
            Err(format!("history[{i}] has an empty answer to {:?}, and would be trained", shorten(asked)))
        }
        Some([Value::String(asked), Value::String(answered)]) => Ok((asked.clone(), answered.clone())),
        _ => Err(format!("history[{i}] is not a pair of strings, a task and its solution")),
    };
    list(columns, "history")?.into_iter().enumerate().map(pair).collect()
}
