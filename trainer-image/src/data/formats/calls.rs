//! Functions that the assistant may call, and its calls: as transformers' templates take them, from all the shapes in
//! which data has them.

use serde_json::{Map, Value};

use super::{Columns, is_given, take};
use crate::data::json;

/// Definitions of a row's functions: `tools`, or OpenAI's older `functions`.
///
/// # Errors
/// They are no list of objects, or there are both.
pub(super) fn tools(columns: &mut Columns) -> Result<Vec<Value>, String> {
    let tools = definitions(take(columns, "tools"), "tools")?;
    let functions = definitions(take(columns, "functions"), "functions")?;
    match (tools.is_empty(), functions.is_empty()) {
        (false, false) => Err("tools and functions are both there; use tools".into()),
        (true, _) => Ok(functions),
        (false, true) => Ok(tools),
    }
}

/// A list of definitions, or its JSON text; nothing, null and an empty text are none.
fn definitions(value: Option<Value>, name: &str) -> Result<Vec<Value>, String> {
    let value = match value {
        Some(Value::String(text)) if text.trim().is_empty() => return Ok(Vec::new()),
        Some(Value::String(text)) => parsed(&text, name)?,
        Some(value) => value,
        None => return Ok(Vec::new()),
    };
    match value {
        Value::Null => Ok(Vec::new()),
        Value::Array(items) => {
            items.into_iter().enumerate().map(|(i, item)| definition(item, &format!("{name}[{i}]"))).collect()
        }
        _ => Err(format!("{name} is not a list of function definitions")),
    }
}

/// A definition, in the wrapping that templates know: `{"type": "function", "function": {"name", …}}`.
fn definition(item: Value, path: &str) -> Result<Value, String> {
    let item = match item {
        Value::String(text) => parsed(&text, path)?,
        item => item,
    };
    match item {
        Value::Object(fields) if !fields.contains_key("function") && fields.contains_key("name") => {
            let function: Map<String, Value> = fields.into_iter().filter(|(name, _)| name != "type").collect();
            let wrapping = [("type".to_owned(), "function".into()), ("function".to_owned(), function.into())];
            Ok(Value::Object(Map::from_iter(wrapping)))
        }
        Value::Object(fields) => Ok(Value::Object(fields)),
        _ => Err(format!("{path} is not an object that defines a function")),
    }
}

/// A turn's calls: a list of `{"type": "function", "function": {"name", "arguments"}}`, whose arguments are objects, as
/// templates write them with `tojson`. Takes JSON text in their place, calls without the wrapping, and one call alone.
///
/// # Errors
/// A call has no name, or its arguments are no object.
pub(super) fn calls(value: Value, path: &str) -> Result<Value, String> {
    let value = match value {
        Value::String(text) => parsed(&text, path)?,
        value => value,
    };
    match value {
        Value::Array(items) => {
            items.into_iter().enumerate().map(|(i, item)| call(item, &format!("{path}[{i}]"))).collect()
        }
        Value::Object(_) => Ok(Value::Array(vec![call(value, path)?])),
        _ => Err(format!("{path} is not a list of calls")),
    }
}

fn call(item: Value, path: &str) -> Result<Value, String> {
    let Value::Object(mut fields) = item else { return Err(format!("{path} is not an object")) };
    fields.retain(|_, value| !value.is_null());
    if !fields.contains_key("function") && fields.contains_key("name") {
        fields = wrapped(fields);
        return with_function(fields, path, path);
    }
    with_function(fields, path, &format!("{path}.function"))
}

/// A call without the wrapping, in it.
fn wrapped(mut fields: Map<String, Value>) -> Map<String, Value> {
    let names = ["name", "arguments"].into_iter();
    let function: Map<String, Value> =
        names.filter_map(|name| Some((name.into(), fields.shift_remove(name)?))).collect();
    fields.shift_remove("type");
    let mut wrapped = Map::from_iter([("type".to_owned(), "function".into()), ("function".into(), function.into())]);
    wrapped.extend(fields);
    wrapped
}

/// A call whose function, which errors call `path_of_function`, is as templates take it.
fn with_function(mut fields: Map<String, Value>, path: &str, path_of_function: &str) -> Result<Value, String> {
    match fields.get_mut("function") {
        Some(Value::Object(function)) => *function = bare(std::mem::take(function), path_of_function)?,
        Some(_) => return Err(format!("{path}.function is not an object")),
        None => return Err(format!("{path} has neither function nor name")),
    }
    Ok(Value::Object(fields))
}

/// Name and arguments of a call.
fn bare(mut function: Map<String, Value>, path: &str) -> Result<Map<String, Value>, String> {
    function.retain(|_, value| !value.is_null());
    if !function.get("name").is_some_and(Value::is_string) {
        return Err(format!("{path}.name is missing or not a string"));
    }
    let arguments = match function.get("arguments") {
        None => Value::Object(Map::new()),
        Some(Value::String(text)) if text.trim().is_empty() => Value::Object(Map::new()),
        Some(Value::String(text)) => parsed(text, &format!("{path}.arguments"))?,
        Some(value) => value.clone(),
    };
    if !arguments.is_object() {
        return Err(format!("{path}.arguments is not an object (nor the JSON text of one)"));
    }
    if let Some(number) = beyond_64_bits(&arguments) {
        return Err(format!(
            "{path}.arguments holds a number beyond 64 bits, which would become {number}: write it as a text"
        ));
    }
    function.insert("arguments".into(), arguments);
    Ok(function)
}

/// A whole number that was too large to be read digit by digit.
fn beyond_64_bits(value: &Value) -> Option<f64> {
    match value {
        Value::Number(number) if number.is_f64() => {
            number.as_f64().filter(|number| number.fract() == 0.0 && number.abs() >= 2f64.powi(63))
        }
        Value::Array(items) => items.iter().find_map(beyond_64_bits),
        Value::Object(fields) => fields.values().find_map(beyond_64_bits),
        _ => None,
    }
}

/// A value that is written as JSON text.
pub(super) fn parsed(text: &str, path: &str) -> Result<Value, String> {
    json::parse(text.as_bytes()).map_err(|error| format!("{path} is a text that is not valid JSON: {error}"))
}

/// Turns OpenAI's older `function_call` into `tool_calls`.
///
/// # Errors
/// There are both, or the call has no name.
pub(super) fn take_legacy_call(fields: &mut Map<String, Value>, path: &str) -> Result<(), String> {
    let Some(legacy) = fields.shift_remove("function_call").filter(is_given) else { return Ok(()) };
    if fields.get("tool_calls").is_some_and(is_given) {
        return Err(format!("{path} has function_call and tool_calls; use tool_calls"));
    }
    fields.insert("tool_calls".into(), calls(legacy, &format!("{path}.function_call"))?);
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn tools_of(columns: Value) -> Result<Vec<Value>, String> {
        tools(&mut columns.as_object().unwrap().clone())
    }

    #[test]
    fn tools_are_a_list_or_the_json_text_of_one() {
        let tool = json!({"type": "function", "function": {"name": "f", "parameters": {"b": 1, "a": 2}}});
        let bare = &tool["function"];
        for columns in [
            json!({"tools": [tool]}),
            json!({"tools": json!([tool]).to_string()}),
            json!({"tools": [tool.to_string()]}),
            json!({"tools": json!([bare]).to_string()}),
            json!({"functions": [bare]}),
            json!({"functions": [bare], "tools": []}),
        ] {
            assert_eq!(tools_of(columns.clone()), Ok(vec![tool.clone()]), "{columns}");
        }
        for none in
            [json!({}), json!({"tools": null}), json!({"tools": "[]"}), json!({"tools": ""}), json!({"tools": "null"})]
        {
            assert_eq!(tools_of(none), Ok(Vec::new()));
        }
    }

    #[test]
    fn what_defines_no_function_is_refused() {
        for (columns, expected) in [
            (json!({"tools": "search"}), "tools is a text that is not valid JSON"),
            (json!({"tools": 4}), "tools is not a list of function definitions"),
            (json!({"tools": [4]}), "tools[0] is not an object"),
            (json!({"tools": [{"name": "f"}], "functions": [{"name": "f"}]}), "tools and functions are both there"),
        ] {
            let error = tools_of(columns).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn arguments_become_objects_in_the_order_of_their_keys() {
        let expected =
            json!([{"id": "1", "type": "function", "function": {"name": "f", "arguments": {"b": null, "a": 1}}}]);
        let text = r#"{"b": null, "a": 1}"#;
        let as_text =
            json!([{"id": "1", "type": "function", "index": null, "function": {"name": "f", "arguments": text}}]);
        for value in [expected.clone(), as_text.clone(), Value::from(as_text.to_string())] {
            assert_eq!(calls(value, "c").unwrap().to_string(), expected.to_string());
        }
        let flat = calls(json!({"name": "f", "arguments": text}), "c").unwrap();
        assert_eq!(flat, json!([{"type": "function", "function": expected[0]["function"]}]));
        let none = calls(json!([{"name": "f"}, {"name": "f", "arguments": ""}]), "c").unwrap();
        assert!(none.as_array().unwrap().iter().all(|call| call["function"]["arguments"] == json!({})));
    }

    #[test]
    fn a_call_that_can_not_be_written_is_refused() {
        for (value, expected) in [
            (json!("f()"), "c is a text that is not valid JSON"),
            (json!([1]), "c[0] is not an object"),
            (json!([{"id": "1"}]), "c[0] has neither function nor name"),
            (json!([{"function": {"arguments": {}}}]), "c[0].function.name is missing"),
            (
                json!([{"function": {"name": "f", "arguments": "{"}}]),
                "c[0].function.arguments is a text that is not valid",
            ),
            (json!([{"function": {"name": "f", "arguments": "[1]"}}]), "c[0].function.arguments is not an object"),
            (
                json!([{"name": "f", "arguments": "{\"ids\": [18446744073709551615, 123456789012345678901234]}"}]),
                "c[0].arguments holds a number beyond 64 bits",
            ),
        ] {
            let error = calls(value, "c").unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
    }
}
