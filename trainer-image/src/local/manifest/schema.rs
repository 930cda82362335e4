//! What the API server checks by a CRD's schema: types, bounds, words of a list, patterns, missing and unknown fields.
//! All problems at once, each with the path of its field.

use regex::Regex;
use serde_json::{Map, Value};
use tunesmith_crds::Uri;

/// How much of a wrong value a message shows.
const SHOWN: usize = 60;

/// The problems of a value that stands at `path`. What is null and has a default is removed, as the API server does.
pub(super) fn check(path: &str, value: &mut Value, schema: &Value, problems: &mut Vec<String>) {
    if let Some(expected) = schema["type"].as_str().filter(|expected| !is_of_type(value, expected)) {
        if !(value.is_null() && schema["nullable"] == true) {
            problems.push(format!(
                "{path} is {}; expected {}",
                describe(value),
                describe_type(expected, value, schema)
            ));
        }
        return;
    }
    if !is_one_of(value, schema) {
        problems.push(format!("{path} is {}; it must be one of {}", describe(value), words(schema)));
        return;
    }
    match value {
        Value::Number(number) => {
            at_most(path, "", number.as_f64().unwrap_or_default(), ["minimum", "maximum"], schema, problems);
        }
        Value::String(text) => check_text(path, text, schema, problems),
        Value::Array(items) => {
            at_most(path, "'s length", items.len() as f64, ["minItems", "maxItems"], schema, problems);
            for (i, item) in items.iter_mut().enumerate() {
                check(&format!("{path}[{i}]"), item, &schema["items"], problems);
            }
        }
        Value::Object(fields) => check_fields(path, fields, schema, problems),
        Value::Null | Value::Bool(_) => {}
    }
}

fn at_most(path: &str, what: &str, found: f64, [low, high]: [&str; 2], schema: &Value, problems: &mut Vec<String>) {
    let (low, high) = (schema[low].as_f64(), schema[high].as_f64());
    if low.is_some_and(|low| found < low) || high.is_some_and(|high| found > high) {
        let bounds = match (low, high) {
            (Some(low), Some(high)) => format!("lie between {low} and {high}"),
            (Some(low), None) => format!("be at least {low}"),
            (_, high) => format!("be at most {}", high.unwrap_or_default()),
        };
        problems.push(format!("{path}{what} is {found}; it must {bounds}"));
    }
}

fn check_text(path: &str, text: &str, schema: &Value, problems: &mut Vec<String>) {
    at_most(path, "'s length", text.chars().count() as f64, ["minLength", "maxLength"], schema, problems);
    if let Some(pattern) = schema["pattern"].as_str()
        && Regex::new(pattern).is_ok_and(|regex| !regex.is_match(text))
    {
        problems.push(format!("{path} is {}; it must match {pattern}", shortened(text)));
    }
    if schema["format"] == "date" && text.parse::<chrono::NaiveDate>().is_err() {
        problems.push(format!("{path} is {}; there is no such day", shortened(text)));
    }
    let rule = schema["x-kubernetes-validations"][0]["message"].as_str();
    if rule.is_some_and(|message| message.starts_with("must be s3://"))
        && let Err(error) = text.parse::<Uri>()
    {
        problems.push(format!("{path}: {error}"));
    }
}

fn check_fields(path: &str, fields: &mut Map<String, Value>, schema: &Value, problems: &mut Vec<String>) {
    let properties = &schema["properties"];
    at_most(path, "'s length", fields.len() as f64, ["minProperties", "maxProperties"], schema, problems);
    fields.retain(|name, field| !(field.is_null() && has_default(&properties[name])));
    for name in schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str) {
        if !fields.contains_key(name) {
            problems.push(format!("{path}.{name} is missing"));
        }
    }
    for (name, field) in fields {
        let known = &properties[name];
        match if known.is_null() { &schema["additionalProperties"] } else { known } {
            Value::Null => problems.push(unknown(path, name, properties)),
            schema => check(&format!("{path}.{name}"), field, schema, problems),
        }
    }
}

fn has_default(schema: &Value) -> bool {
    !schema["default"].is_null() && schema["nullable"] != true
}

/// A field that is not there, and the one that may be meant.
fn unknown(path: &str, name: &str, properties: &Value) -> String {
    let plain = |name: &str| name.chars().filter(char::is_ascii_alphanumeric).collect::<String>().to_ascii_lowercase();
    let known = properties.as_object().into_iter().flatten().map(|(known, _)| known);
    match known.into_iter().find(|known| plain(known) == plain(name)) {
        Some(meant) => format!("{path} has no field `{name}`; it is spelled `{meant}`"),
        None => format!("{path} has no field `{name}`"),
    }
}

fn is_of_type(value: &Value, expected: &str) -> bool {
    match expected {
        "string" => value.is_string(),
        "boolean" => value.is_boolean(),
        "integer" => value.is_i64() || value.is_u64(),
        "number" => value.is_number(),
        "array" => value.is_array(),
        "object" => value.is_object(),
        _ => true,
    }
}

fn is_one_of(value: &Value, schema: &Value) -> bool {
    schema["enum"].as_array().is_none_or(|words| words.contains(value))
}

fn words(schema: &Value) -> String {
    let words = schema["enum"].as_array().into_iter().flatten();
    words.filter_map(Value::as_str).collect::<Vec<_>>().join(", ")
}

/// A value and what YAML took it for.
fn describe(value: &Value) -> String {
    match value {
        Value::Null => "null".into(),
        Value::Bool(value) => format!("{value} (a boolean)"),
        Value::Number(number) => format!("{number} (a number)"),
        Value::String(text) => format!("{} (a string)", shortened(text)),
        Value::Array(items) => format!("a list of {}", items.len()),
        Value::Object(fields) => {
            let names: Vec<&str> = fields.keys().map(String::as_str).take(3).collect();
            format!("an object ({}{})", names.join(", "), if fields.len() > names.len() { ", …" } else { "" })
        }
    }
}

fn shortened(text: &str) -> String {
    let start: String = text.chars().take(SHOWN).collect();
    format!("{start:?}{}", if start.len() < text.len() { "…" } else { "" })
}

fn describe_type(expected: &str, found: &Value, schema: &Value) -> String {
    let word = if schema["enum"].is_array() { format!("one of {}", words(schema)) } else { "a string".into() };
    match (expected, found) {
        // YAML reads no and on as booleans, and 1.0 as a number.
        ("string", Value::Bool(_) | Value::Number(_)) => format!("{word}: write it in quotes"),
        ("string", _) => word,
        ("boolean", _) => "true or false".into(),
        ("integer", Value::String(_)) => "an integer: write it without quotes".into(),
        ("integer", _) => "an integer".into(),
        ("number", Value::String(_)) => "a number: write it without quotes".into(),
        ("number", _) => "a number".into(),
        ("array", _) => "a list".into(),
        (_, Value::Null) => "an object: write {} or leave the field out".into(),
        _ => "an object".into(),
    }
}
