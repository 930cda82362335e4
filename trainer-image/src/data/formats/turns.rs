//! Turns of a conversation, in OpenAI's words (`role`, `content`) or ShareGPT's (`from`, `value`).

use serde_json::{Map, Value};

use super::{
    Columns,
    calls::{calls, parsed, take_legacy_call},
    is_given,
    preferences::MEDIA,
    take,
};
use crate::data::{conversation::Message, notes::Notes};

/// Names of the roles: those that chat templates know, and what other data calls them. Upper and lower case are the same.
const ROLES: [(&str, &str); 16] = [
    ("system", "system"),
    ("user", "user"),
    ("assistant", "assistant"),
    ("tool", "tool"),
    ("developer", "system"),
    ("human", "user"),
    ("gpt", "assistant"),
    ("chatgpt", "assistant"),
    ("bing", "assistant"),
    ("bard", "assistant"),
    ("model", "assistant"),
    ("function_call", FUNCTION_CALL),
    ("function", "tool"),
    ("function_response", "tool"),
    ("observation", "tool"),
    ("ipython", "tool"),
];

/// A speaker whose value is a call of a function, as LLaMA-Factory writes it.
const FUNCTION_CALL: &str = "function_call";

/// Fields that say whether a turn is trained.
const TRAINED: [&str; 6] = ["train", "training", "trainable", "train_on_turn", "loss", "loss_mask"];
/// Fields that say whether a turn is not trained.
const MASKED: [&str; 2] = ["masked", "mask"];
/// Fields that weigh a turn.
const WEIGHTS: [&str; 2] = ["weight", "loss_scale"];
/// Fields with a meaning that is not carried out.
const REFUSED: [(&str, &str); 5] = [
    ("train_detail", "parts of a turn can't be masked; split the turn, or use prompt and completion"),
    ("refusal", "write the refusal as the turn's content"),
    ("audio", "only text is trained"),
    ("images", "only text is trained"),
    ("videos", "only text is trained"),
];

/// A column of turns; `given` if nothing of them is to be learned.
///
/// # Errors
/// It is no list of turns; the message names the turn and its field.
pub(super) fn turns(columns: &mut Columns, name: &str, given: bool, notes: &mut Notes) -> Result<Vec<Message>, String> {
    let turns = list(columns, name)?.into_iter().enumerate();
    turns.map(|(i, turn)| message(&format!("{name}[{i}]"), turn, given, notes)).collect()
}

/// A list, its JSON text, or the struct of lists that tables make of a list of structs.
pub(super) fn list(columns: &mut Columns, name: &str) -> Result<Vec<Value>, String> {
    let value = match take(columns, name) {
        Some(Value::String(text)) if matches!(text.trim_start().chars().next(), Some('[' | '{')) => {
            parsed(&text, name)?
        }
        Some(Value::Null) | None => return Err(format!("{name} is missing")),
        Some(value) => value,
    };
    let items = match value {
        Value::Array(items) => items,
        Value::Object(lists) => transpose(lists, name)?,
        _ => return Err(format!("{name} is not a list")),
    };
    match items.is_empty() {
        true => Err(format!("{name} is empty")),
        false => Ok(items),
    }
}

/// `{"role": ["user", …], "content": ["Hi", …]}` as a list of turns.
fn transpose(lists: Map<String, Value>, name: &str) -> Result<Vec<Value>, String> {
    let mut turns: Vec<Map<String, Value>> = Vec::new();
    for (number, (field, values)) in lists.into_iter().filter(|(_, values)| !values.is_null()).enumerate() {
        let Value::Array(values) = values else { return Err(format!("{name} is not a list")) };
        if number == 0 {
            turns.resize(values.len(), Map::new());
        }
        if values.len() != turns.len() {
            return Err(format!("{name}.{field} has {} values, and its other fields {}", values.len(), turns.len()));
        }
        for (turn, value) in turns.iter_mut().zip(values) {
            turn.insert(field.clone(), value);
        }
    }
    Ok(turns.into_iter().map(Value::Object).collect())
}

/// A turn. Its unknown fields stay, as the template may use them.
///
/// Content that is null beside calls stays null, which is what transformers hands to a template: DeepSeek's, for one,
/// tells calls by it. All other null fields go, as tables have every field in every turn.
fn message(path: &str, turn: Value, given: bool, notes: &mut Notes) -> Result<Message, String> {
    let Value::Object(fields) = turn else { return Err(format!("{path} is not an object")) };
    let words = if fields.contains_key("role") { ["role", "content"] } else { words_of(path) };
    let mut fields: Map<String, Value> = fields
        .into_iter()
        .filter(|(name, value)| !value.is_null() || name == words[1])
        .map(|(name, value)| match (name.as_str(), words) {
            ("from", ["from", _]) => ("role".to_owned(), value),
            ("value", ["from", _]) => ("content".to_owned(), value),
            _ => (name, value),
        })
        .collect();
    let role = role(&fields, path, words)?;
    if role == FUNCTION_CALL {
        let call = fields.shift_remove("content").filter(is_given).unwrap_or_default();
        fields.insert("content".into(), Value::Null);
        fields.insert("tool_calls".into(), calls(call, &format!("{path}.{}", words[1]))?);
    }
    let role = if role == FUNCTION_CALL { "assistant" } else { role };
    fields.insert("role".into(), role.into());
    take_calls(&mut fields, path, role)?;
    for (name, advice) in REFUSED {
        if fields.get(name).is_some_and(is_given) {
            return Err(format!("{path}.{name} is not supported: {advice}"));
        }
        fields.shift_remove(name);
    }
    if fields.get("annotations").is_some_and(|value| !is_given(value)) {
        fields.shift_remove("annotations");
    }
    content(&mut fields, path, words, notes)?;
    let trained = take_trained(&mut fields, path)?;
    check_trained(&fields, path, (role, words[1]), given, trained.as_ref())?;
    Ok(Message::from_fields(path, fields, trained.map(|(_, trained)| trained)))
}

/// The words of a column, for turns that are in neither.
fn words_of(path: &str) -> [&'static str; 2] {
    match path.starts_with("conversations") {
        true => ["from", "value"],
        false => ["role", "content"],
    }
}

fn role(fields: &Map<String, Value>, path: &str, [word, content]: [&str; 2]) -> Result<&'static str, String> {
    let name = match fields.get("role") {
        Some(Value::String(name)) => name,
        Some(_) => return Err(format!("{path}.{word} is not a string")),
        None => return Err(format!("{path}.{word} is missing; each turn needs {word} and {content}")),
    };
    let known = ROLES.iter().find(|(known, _)| known.eq_ignore_ascii_case(name.trim()));
    known.map(|(_, role)| *role).ok_or_else(|| {
        let names = ROLES.map(|(name, _)| name).join(", ");
        format!("{path}.{word} is {name:?}; supported: {names}")
    })
}

/// Brings a turn's calls into the shape of templates. An empty list is none: templates would write its brackets.
fn take_calls(fields: &mut Map<String, Value>, path: &str, role: &str) -> Result<(), String> {
    take_legacy_call(fields, path)?;
    let Some(value) = fields.get_mut("tool_calls") else { return Ok(()) };
    if let Value::String(text) = value {
        *value = match text.trim() {
            "" => Value::Null,
            text => parsed(text, &format!("{path}.tool_calls"))?,
        };
    }
    if !is_given(value) {
        fields.shift_remove("tool_calls");
        return Ok(());
    }
    if role != "assistant" {
        return Err(format!("{path}.tool_calls: only the assistant calls functions, and this turn is of role {role}"));
    }
    *value = calls(std::mem::take(value), &format!("{path}.tool_calls"))?;
    Ok(())
}

/// Makes the content one text, or null beside calls.
fn content(fields: &mut Map<String, Value>, path: &str, words: [&str; 2], notes: &mut Notes) -> Result<(), String> {
    let has_calls = fields.contains_key("tool_calls");
    let word = words[1];
    let text = match fields.get_mut("content") {
        Some(Value::String(_)) => return Ok(()),
        Some(Value::Null) | None if has_calls => return Ok(()),
        Some(Value::Null) => return Err(format!("{path}.{word} is null")),
        None => {
            return Err(format!("{path}.{word} is missing; each turn needs {} and {word}", words[0]));
        }
        Some(Value::Array(parts)) => joined(parts, &format!("{path}.{word}"), notes)?,
        Some(_) => return Err(format!("{path}.{word} is not a string")),
    };
    fields.insert("content".into(), text.into());
    Ok(())
}

/// The text of content in parts, one after the other without anything between, as templates write them.
fn joined(parts: &[Value], path: &str, notes: &mut Notes) -> Result<String, String> {
    let mut text = String::new();
    for (i, part) in parts.iter().enumerate() {
        let path = format!("{path}[{i}]");
        let fields = match part {
            Value::String(part) => {
                text.push_str(part);
                continue;
            }
            Value::Object(fields) => fields,
            _ => return Err(format!("{path} is neither a text nor an object with type and text")),
        };
        let kind = fields.get("type").and_then(Value::as_str).unwrap_or("text");
        if !["text", "input_text", "output_text"].contains(&kind) {
            return Err(format!("{path} is of type {kind:?}; only text is trained"));
        }
        if let Some(medium) = MEDIA.into_iter().find(|medium| fields.get(*medium).is_some_and(is_given)) {
            return Err(format!("{path}.{medium}: only text is trained"));
        }
        let Some(Value::String(part)) = fields.get("text") else {
            return Err(format!("{path}.text is missing or not a string"));
        };
        text.push_str(part);
        for (name, _) in
            fields.iter().filter(|(name, value)| !["type", "text"].contains(&name.as_str()) && is_given(value))
        {
            notes.add(format!("field {name:?} of parts of content is not used"));
        }
    }
    Ok(text)
}

/// Takes the fields that say whether a turn is to be learned; the name of one of them, and its word.
fn take_trained(fields: &mut Map<String, Value>, path: &str) -> Result<Option<(&'static str, bool)>, String> {
    let mut found: Option<(&str, bool)> = None;
    let names = TRAINED.iter().chain(&MASKED).chain(&WEIGHTS);
    for &name in names {
        let Some(value) = fields.shift_remove(name) else { continue };
        let flag = match &value {
            Value::Bool(flag) if !WEIGHTS.contains(&name) => *flag,
            // 1 of a mask means trained to some, and masked to others.
            Value::Number(number) if !MASKED.contains(&name) && number.as_f64() == Some(0.0) => false,
            Value::Number(number) if !MASKED.contains(&name) && number.as_f64() == Some(1.0) => true,
            _ => {
                let supported = if WEIGHTS.contains(&name) { "0 and 1" } else { "true and false" };
                return Err(format!("{path}.{name} is {value}; supported: {supported}"));
            }
        };
        let trained = flag != MASKED.contains(&name);
        match found {
            Some((other, before)) if before != trained => {
                return Err(format!("{path}.{other} and {path}.{name} say different things of whether it is trained"));
            }
            _ => found = Some((name, trained)),
        }
    }
    Ok(found)
}

/// Refuses a turn that is to be learned and can't be, or that has nothing to be learned.
fn check_trained(
    fields: &Map<String, Value>,
    path: &str,
    (role, content): (&str, &str),
    given: bool,
    says: Option<&(&str, bool)>,
) -> Result<(), String> {
    match says {
        Some((name, true)) if role != "assistant" => {
            return Err(format!(
                "{path}.{name} asks to train a turn of role {role}; only the assistant's turns are trained"
            ));
        }
        Some((name, true)) if given => {
            return Err(format!("{path}.{name} asks to train a turn of the prompt; only the completion is trained"));
        }
        _ => {}
    }
    let trained = role == "assistant" && !given && says.is_none_or(|(_, trained)| *trained);
    let is_empty = fields.get("content").and_then(Value::as_str).unwrap_or_default().trim().is_empty();
    match trained && is_empty && !fields.contains_key("tool_calls") {
        true => Err(format!("{path}.{content} is empty, and would be trained; remove the turn, or give it weight 0")),
        false => Ok(()),
    }
}

/// Puts a row's own system turn first.
///
/// # Errors
/// The turns have another one.
pub(super) fn with_system(system: Option<String>, mut turns: Vec<Message>) -> Result<Vec<Message>, String> {
    let Some(system) = system.filter(|system| !system.is_empty()) else { return Ok(turns) };
    match turns.first().filter(|first| first.role() == "system") {
        Some(first) if first.content() == system => {}
        Some(first) => return Err(format!("system and {} are two system turns; keep one", first.path())),
        None => {
            let fields = [("role", "system"), ("content", &system)];
            let fields = fields.into_iter().map(|(name, value)| (name.to_owned(), Value::from(value))).collect();
            turns.insert(0, Message::from_fields("system", fields, None));
        }
    }
    Ok(turns)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(turn: Value) -> Result<Message, String> {
        message("messages[0]", turn, false, &mut Notes::default())
    }

    fn said(turns: Value) -> Vec<(String, String)> {
        let mut columns = Columns::from_iter([("messages".to_owned(), turns)]);
        let turns = super::turns(&mut columns, "messages", false, &mut Notes::default()).unwrap();
        turns.iter().map(|turn| (turn.role().to_owned(), turn.content().to_owned())).collect()
    }

    #[test]
    fn a_turn_says_itself_whether_it_is_trained() {
        for (field, value, trained) in [
            ("weight", json!(0), false),
            ("weight", json!(0.0), false),
            ("weight", json!(1), true),
            ("train", json!(false), false),
            ("training", json!(false), false),
            ("train_on_turn", json!(true), true),
            ("masked", json!(true), false),
            ("mask", json!(false), true),
            ("loss", json!(false), false),
            ("weight", Value::Null, true),
        ] {
            for words in [["role", "content"], ["from", "value"]] {
                let path = if words[0] == "from" { "conversations[0]" } else { "messages[0]" };
                let turn = json!({words[0]: "assistant", words[1]: "a", field: value});
                let turn = message(path, turn, false, &mut Notes::default()).unwrap();
                assert_eq!(turn.is_trained(), trained, "{field}: {value}");
                assert!(!turn.fields().contains_key(field), "no template needs {field}");
            }
        }
    }

    #[test]
    fn a_weight_that_can_not_be_carried_out_is_refused() {
        for (turn, expected) in [
            (
                json!({"role": "assistant", "content": "a", "weight": 0.5}),
                "messages[0].weight is 0.5; supported: 0 and 1",
            ),
            (
                json!({"role": "assistant", "content": "a", "mask": 1}),
                "messages[0].mask is 1; supported: true and false",
            ),
            (json!({"role": "assistant", "content": "a", "train": "no"}), "messages[0].train is \"no\""),
            (json!({"role": "assistant", "content": "a", "weight": 0, "train": true}), "say different things"),
            (json!({"role": "user", "content": "a", "weight": 1}), "weight asks to train a turn of role user"),
            (json!({"role": "user", "content": "a", "masked": false}), "masked asks to train a turn of role user"),
            (json!({"role": "assistant", "content": "a", "train_detail": [{}]}), "train_detail is not supported"),
            (json!({"role": "assistant", "content": "a", "refusal": "no"}), "refusal is not supported: write"),
        ] {
            let error = read(turn).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
        let prompt = json!({"role": "assistant", "content": "a", "weight": 1});
        let error = message("prompt[1]", prompt, true, &mut Notes::default()).unwrap_err();
        assert!(error.contains("prompt[1].weight asks to train a turn of the prompt"), "{error}");
    }

    #[test]
    fn an_assistant_that_says_nothing_is_refused_where_it_would_be_trained() {
        for content in ["", " \n"] {
            let turn = json!({"role": "assistant", "content": content});
            let error = read(turn.clone()).unwrap_err();
            assert!(error.starts_with("messages[0].content is empty, and would be trained"), "{error}");
            message("prompt[0]", turn, true, &mut Notes::default()).unwrap();
            read(json!({"role": "assistant", "content": content, "weight": 0})).unwrap();
            read(json!({"role": "user", "content": content})).unwrap();
        }
        let error = read(json!({"role": "assistant", "content": null})).unwrap_err();
        assert_eq!(error, "messages[0].content is null");
    }

    #[test]
    fn a_turn_of_calls_needs_no_content() {
        let calls = json!([{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{\"a\": 1}"}}]);
        let dump = json!({
            "role": "assistant", "content": null, "refusal": null, "audio": null, "annotations": [],
            "function_call": null, "tool_calls": calls,
        });
        let turn = read(dump).unwrap();
        let names: Vec<&String> = turn.fields().keys().collect();
        assert_eq!(names, ["role", "content", "tool_calls"]);
        assert_eq!(turn.fields()["content"], Value::Null);
        assert_eq!(turn.fields()["tool_calls"][0]["function"]["arguments"], json!({"a": 1}));
        let legacy =
            read(json!({"role": "assistant", "function_call": {"name": "f", "arguments": "{\"a\": 1}"}})).unwrap();
        assert_eq!(legacy.fields()["tool_calls"][0]["function"], turn.fields()["tool_calls"][0]["function"]);
        let speaker = json!({"from": "function_call", "value": "{\"name\": \"f\", \"arguments\": {\"a\": 1}}"});
        let speaker = message("conversations[1]", speaker, false, &mut Notes::default()).unwrap();
        assert_eq!(
            (speaker.role(), speaker.fields()),
            ("assistant", &{
                let mut fields = legacy.fields().clone();
                fields.insert("content".into(), Value::Null);
                fields
            })
        );
        let error = read(json!({"role": "user", "content": "a", "tool_calls": calls})).unwrap_err();
        assert!(error.contains("only the assistant calls functions"), "{error}");
    }

    #[test]
    fn no_calls_are_no_field() {
        for none in [json!([]), Value::Null, json!(""), json!("[]")] {
            let turn = read(json!({"role": "assistant", "content": "a", "tool_calls": none})).unwrap();
            assert!(!turn.fields().contains_key("tool_calls"));
        }
    }

    #[test]
    fn content_in_parts_is_one_text() {
        let parts =
            json!([{"type": "text", "text": "a"}, {"type": "text", "text": " b", "cache_control": {"a": 1}}, "c"]);
        let mut notes = Notes::default();
        let turn = message("messages[0]", json!({"role": "user", "content": parts}), false, &mut notes).unwrap();
        assert_eq!(turn.content(), "a bc");
        assert_eq!(notes.lines(), ["field \"cache_control\" of parts of content is not used (1 row)"]);
        let image = json!([{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x"}}]);
        let error = read(json!({"role": "user", "content": image})).unwrap_err();
        assert_eq!(error, "messages[0].content[1] is of type \"image_url\"; only text is trained");
        let beside = |image: Value| json!({"role": "user", "content": [{"type": "text", "text": "a", "image": image}]});
        assert_eq!(read(beside("x.png".into())).unwrap_err(), "messages[0].content[0].image: only text is trained");
        assert_eq!(read(beside(Value::Null)).unwrap().content(), "a");
    }

    #[test]
    fn turns_may_be_json_text_or_a_struct_of_lists() {
        let expected = [("user", "a"), ("assistant", "b")].map(|(role, content)| (role.to_owned(), content.to_owned()));
        let list = json!([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]);
        for turns in [
            list.clone(),
            Value::from(list.to_string()),
            json!({"role": ["user", "assistant"], "content": ["a", "b"], "name": null}),
            json!([{"role": "Human", "content": "a"}, {"role": "model", "content": "b"}]),
            json!([{"from": "human", "value": "a", "role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]),
        ] {
            assert_eq!(said(turns), expected);
        }
        let mut ragged =
            Columns::from_iter([("messages".to_owned(), json!({"role": ["user"], "content": ["a", "b"]}))]);
        let error = super::list(&mut ragged, "messages").unwrap_err();
        assert_eq!(error, "messages.content has 2 values, and its other fields 1");
    }

    #[test]
    fn a_developer_is_the_system_and_unknown_fields_stay() {
        let turn = read(json!({"role": "developer", "name": "x", "content": "a", "id": null})).unwrap();
        assert_eq!(turn.role(), "system");
        assert_eq!(turn.fields().keys().collect::<Vec<_>>(), ["role", "name", "content"]);
    }
}
