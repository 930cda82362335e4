//! Formats of rows: which columns each has, and what of them is asked and answered.

mod calls;
mod preferences;
mod turns;

use serde_json::{Map, Value};
pub(super) use tunesmith_crds::fine_tune_job::COLUMNS;
use tunesmith_crds::fine_tune_job::DataFormat;

use self::turns::{list, turns, with_system};
use super::{container::Columns, conversation::Conversation, notes::Notes};

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
fn is_given(value: &Value) -> bool {
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

/// A prompt and its completion, both texts or both turns. A system text goes before the prompt, with a blank line
/// between, as texts have no turns.
fn prompt_completion(columns: &mut Columns, notes: &mut Notes) -> Result<Row, String> {
    let is_list = |name| columns.get(name).is_some_and(|value| value.is_array() || value.is_object());
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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn row(columns: Value) -> Result<Row, String> {
        let columns = columns.as_object().unwrap().clone();
        parse(detect(&columns, &[])?, columns, &mut Notes::default())
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
            assert_eq!(detect(&columns, &[]), Ok(format));
            parse(format, columns, &mut Notes::default()).unwrap();
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

    /// A row, and what of it is not used.
    fn noted(columns: Value) -> (Row, Vec<String>) {
        let columns = columns.as_object().unwrap().clone();
        let mut notes = Notes::default();
        let row = parse(detect(&columns, &[]).unwrap(), columns, &mut notes).unwrap();
        (row, notes.lines())
    }

    #[test]
    fn a_system_text_is_carried_out_whatever_the_format() {
        let chat = turns(&[("system", "s"), ("user", "hi"), ("assistant", "yes")]);
        let (user, assistant) =
            (json!({"role": "user", "content": "hi"}), json!({"role": "assistant", "content": "yes"}));
        let messages = row(json!({"system": "s", "messages": [user, assistant]})).unwrap();
        assert_eq!(said(&messages), chat);
        let split = row(json!({"system": "s", "prompt": [user], "completion": [assistant]})).unwrap();
        assert_eq!(said(&split), chat);
        assert!(matches!(split, Row::Conversation(Conversation { given: 2, .. })));
        let texts = row(json!({"system": "s", "prompt": "a", "completion": "b"}));
        assert_eq!(texts, Ok(Row::PromptCompletion { prompt: "s\n\na".into(), completion: "b".into() }));
        let alpaca = row(json!({"system": "s", "instruction": "Add.", "output": "4"}));
        assert_eq!(alpaca, Ok(Row::Alpaca(Alpaca { system: "s".into(), ..task("Add.", "4") })));
        let system = json!({"role": "system", "content": "other"});
        let error = row(json!({"system": "s", "messages": [system, user, assistant]})).unwrap_err();
        assert_eq!(error, "system and messages[0] are two system turns; keep one");
        let twice = row(json!({"system": "other", "messages": [system, user, assistant]})).unwrap();
        assert_eq!(said(&twice).len(), 3);
    }

    #[test]
    fn alpaca_may_have_a_history_and_dollys_words() {
        let history = json!([["a", "b"], ["c", "d"]]);
        let pairs = [("a", "b"), ("c", "d")].map(|(asked, answered)| (asked.to_owned(), answered.to_owned()));
        for history in [history.clone(), Value::from(history.to_string())] {
            let columns = json!({"instruction": "Add.", "output": "4", "history": history});
            let expected = Alpaca { history: pairs.to_vec(), ..task("Add.", "4") };
            assert_eq!(noted(columns), (Row::Alpaca(expected), vec![]));
        }
        for none in [json!([]), Value::Null, json!("[]"), json!("")] {
            let columns = json!({"instruction": "Add.", "output": "4", "history": none});
            assert_eq!(row(columns), Ok(Row::Alpaca(task("Add.", "4"))));
        }
        let dolly = json!({"instruction": "Add.", "context": "2, 2", "response": "4", "category": "sums"});
        let expected = Alpaca { input: "2, 2".into(), ..task("Add.", "4") };
        assert_eq!(noted(dolly), (Row::Alpaca(expected), vec!["column \"category\" is not used (1 row)".to_owned()]));
        for (columns, expected) in [
            (json!({"instruction": "a", "output": "b", "response": "c"}), "output and response are both there"),
            (
                json!({"instruction": "a", "input": "b", "context": "c", "output": "d"}),
                "input and context are both there",
            ),
            (json!({"instruction": "a", "output": "b", "history": [["a"]]}), "history[0] is not a pair of strings"),
            (json!({"instruction": "a", "output": "b", "history": [["a", ""]]}), "history[0] has an empty answer"),
            (json!({"instruction": "a", "output": " \n"}), "output is empty"),
            (
                json!({"instruction": "a", "output": "b", "tools": [{"name": "f"}]}),
                "tools: functions are for rows of turns",
            ),
        ] {
            let error = row(columns).unwrap_err();
            assert!(error.contains(expected), "expected `{expected}`, got `{error}`");
        }
    }

    #[test]
    fn tools_and_variables_go_to_the_template() {
        let turns = json!([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]);
        let tool = json!({"type": "function", "function": {"name": "f"}});
        let prompt_and_completion = json!({
            "prompt": [turns[0]], "completion": [turns[1]], "tools": [tool],
            "chat_template_kwargs": {"enable_thinking": false, "other": null},
        });
        let share_gpt = json!({
            "conversations": turns, "tools": json!([tool]).to_string(),
            "chat_template_kwargs": "{\"enable_thinking\": false}",
        });
        for columns in [prompt_and_completion, share_gpt] {
            let (Row::Conversation(conversation), notes) = noted(columns) else { panic!() };
            assert_eq!(conversation.tools, [tool.clone()]);
            assert_eq!(Value::Object(conversation.variables), json!({"enable_thinking": false}));
            assert!(notes.is_empty(), "{notes:?}");
        }
        for (columns, expected) in [
            (
                json!({"messages": turns, "chat_template_kwargs": {"tools": []}}),
                "chat_template_kwargs.tools can't be set",
            ),
            (json!({"messages": turns, "chat_template_kwargs": 4}), "chat_template_kwargs is not an object"),
            (json!({"prompt": "a", "completion": "b", "tools": [tool]}), "tools: functions are for rows of turns"),
        ] {
            let error = row(columns).unwrap_err();
            assert!(error.contains(expected), "expected `{expected}`, got `{error}`");
        }
    }

    #[test]
    fn columns_that_the_format_does_not_know_are_noted() {
        let turns = json!([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]);
        let columns = json!({"messages": turns, "prompt": "hi", "source": "web", "none": null, "tags": []});
        let (_, notes) = noted(columns);
        assert_eq!(notes, ["column \"prompt\" is not used (1 row)", "column \"source\" is not used (1 row)"]);
        let (_, notes) = noted(json!({"text": "a", "x".repeat(100): 1}));
        assert_eq!(notes, [format!("column \"{}…\" is not used (1 row)", "x".repeat(60))]);
    }

    #[test]
    fn data_of_other_kinds_is_named_where_no_format_fits() {
        for (columns, expected) in [
            (json!({"prompt": "a"}), "prompts alone (for reinforcement learning) are not supported"),
            (json!({"prompt": "a", "completions": ["b"]}), "several completions of a prompt"),
            (
                json!({"question": "a", "answer": "b"}),
                "dataset.columns, such as {prompt: question, completion: answer}",
            ),
        ] {
            let error = row(columns).unwrap_err();
            assert!(error.contains(expected), "expected `{expected}`, got `{error}`");
        }
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
            (json!({"messages": [{"role": "user", "content": "a"}], "tools": [4]}), "tools[0] is not an object"),
            (json!({"conversations": [{"from": "human"}]}), "conversations[0].value is missing; each turn needs from"),
            (
                json!({"conversations": [{"from": "function_call", "value": ""}]}),
                "conversations[0].value is not a list of calls",
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
