//! The words of a turn that must reach the text that a template writes: nothing of a row may vanish unseen.

use std::ops::Range;

use serde_json::Value;

use super::python::escaped;
use crate::data::conversation::Message;

/// Names that a turn's reasoning goes by. transformers gives it to templates under each of them.
pub(super) const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// A part of what a turn says.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Words {
    /// Which part: `messages[2].content`.
    pub path: String,
    text: String,
    /// It precedes an answer, and many templates leave it out of earlier turns.
    pub is_reasoning: bool,
}

/// What a turn says, in the order in which templates write it.
pub(super) fn words(turn: &Message) -> Vec<Words> {
    let fields = turn.fields();
    let mut all = Vec::new();
    let mut add = |field: &str, text: &str, is_reasoning: bool| {
        if !text.trim().is_empty() {
            all.push(Words { path: format!("{}.{field}", turn.path()), text: text.trim().to_owned(), is_reasoning });
        }
    };
    if turn.role() == "assistant"
        && let Some((field, Value::String(reasoning))) = REASONING.iter().find_map(|name| fields.get_key_value(*name))
    {
        add(field, reasoning, true);
    }
    match turn.content().rsplit_once("</think>").filter(|_| turn.role() == "assistant") {
        None => add("content", turn.content(), false),
        Some((reasoning, answer)) => {
            let (before, inside) = reasoning.split_once("<think>").unwrap_or(("", reasoning));
            add("content", before, false);
            add("content", inside, true);
            add("content", answer, false);
        }
    }
    for (i, call) in fields.get("tool_calls").and_then(Value::as_array).into_iter().flatten().enumerate() {
        let function = call.get("function").unwrap_or(call);
        let path = format!("tool_calls[{i}].function");
        if let Some(name) = function.get("name").and_then(Value::as_str) {
            add(&format!("{path}.name"), name, false);
        }
        leaves(function.get("arguments").unwrap_or(&Value::Null), &mut |leaf| {
            add(&format!("{path}.arguments"), leaf, false);
        });
    }
    all
}

/// Keys, texts and whole numbers of a value; other values have several spellings.
fn leaves(value: &Value, add: &mut impl FnMut(&str)) {
    match value {
        Value::String(text) => add(text),
        Value::Number(number) if !number.is_f64() => add(&number.to_string()),
        Value::Array(items) => items.iter().for_each(|item| leaves(item, add)),
        Value::Object(fields) => {
            for (name, value) in fields {
                add(name);
                leaves(value, add);
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

impl Words {
    /// Where in this part of a text they are first: as they stand, or as JSON has them.
    pub(super) fn find(&self, text: &str, part: Range<usize>) -> Option<Range<usize>> {
        let searched = text.get(part.clone())?;
        spellings(&self.text).find_map(|spelling| {
            let start = part.start + searched.find(&spelling)?;
            Some(start..start + spelling.len())
        })
    }

    /// The same, where no other words stand that were found.
    pub(super) fn find_apart(&self, text: &str, part: Range<usize>, used: &[Range<usize>]) -> Option<Range<usize>> {
        let mut start = part.start;
        loop {
            let found = self.find(text, start..part.end)?;
            match used.iter().find(|used| used.start < found.end && found.start < used.end) {
                Some(used) => start = used.end,
                None => return Some(found),
            }
        }
    }
}

/// A text as it stands, and as JSON has it.
fn spellings(text: &str) -> impl Iterator<Item = String> {
    let json = [false, true].into_iter().map(|ensure_ascii| escaped(text, ensure_ascii));
    std::iter::once(text.to_owned()).chain(json)
}

/// Whether what is said is anywhere in a text: as it stands, or as JSON has it.
pub(super) fn stands_in(said: &str, text: &str) -> bool {
    spellings(said.trim()).any(|spelling| text.contains(&spelling))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn turn(fields: Value) -> Message {
        Message::from_fields("messages[1]", fields.as_object().unwrap().clone(), None)
    }

    fn said(turn: &Message) -> Vec<(String, String, bool)> {
        words(turn).into_iter().map(|words| (words.path, words.text, words.is_reasoning)).collect()
    }

    #[test]
    fn a_turn_says_its_reasoning_its_content_and_its_calls() {
        let calls =
            json!([{"id": "x", "function": {"name": "f", "arguments": {"city": "Oslo", "days": [3, 0.5, true]}}}]);
        let turn = turn(json!({"role": "assistant", "thinking": "hm", "content": " yes\n", "tool_calls": calls}));
        let expected = [
            ("messages[1].thinking", "hm", true),
            ("messages[1].content", "yes", false),
            ("messages[1].tool_calls[0].function.name", "f", false),
            ("messages[1].tool_calls[0].function.arguments", "city", false),
            ("messages[1].tool_calls[0].function.arguments", "Oslo", false),
            ("messages[1].tool_calls[0].function.arguments", "days", false),
            ("messages[1].tool_calls[0].function.arguments", "3", false),
        ];
        let expected = expected.map(|(path, text, reasoning)| (path.to_owned(), text.to_owned(), reasoning));
        assert_eq!(said(&turn), expected);
    }

    #[test]
    fn thoughts_inside_a_content_are_reasoning_in_an_assistants_turn_alone() {
        let thoughtful = "<think>\nhm\n</think>\n\nyes";
        let texts = |role: &str| -> Vec<_> {
            said(&turn(json!({"role": role, "content": thoughtful})))
                .into_iter()
                .map(|(_, text, is)| (text, is))
                .collect()
        };
        assert_eq!(texts("assistant"), [("hm".to_owned(), true), ("yes".to_owned(), false)]);
        assert_eq!(texts("user"), [(thoughtful.to_owned(), false)]);
    }

    #[test]
    fn words_are_found_as_they_stand_or_as_json_has_them() {
        let find = |said: &str, text: &str| {
            words(&turn(json!({"role": "tool", "content": said})))[0]
                .find(text, 0..text.len())
                .map(|at| text[at].to_owned())
        };
        assert_eq!(find(" a\"b\n", "x a\"b"), Some("a\"b".to_owned()));
        assert_eq!(find("{\"é\": 1}", r#"x "{\"é\": 1}""#), Some(r#"{\"é\": 1}"#.to_owned()));
        assert_eq!(find("{\"é\": 1}", r#"x "{\"\u00e9\": 1}""#), Some(r#"{\"\u00e9\": 1}"#.to_owned()));
        assert_eq!(find("a", "b"), None);
    }
}
