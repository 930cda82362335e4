//! Values as Python writes them: `json.dumps` and `str`, which chat templates rely on.

use std::{fmt::Write, sync::LazyLock};

use minijinja::{
    Value,
    value::{Kwargs, ValueKind},
};
use regex::Regex;

use super::values::{Sequence, is_wide, too_wide};

/// What `repr` does not write as it stands, but for the space.
static UNPRINTABLE: LazyLock<Regex> = LazyLock::new(|| Regex::new(r"[\p{C}\p{Z}]").expect("a sound pattern"));

/// Options of `json.dumps`, with transformers' defaults.
pub(super) struct Dumps {
    ensure_ascii: bool,
    /// What a level is indented by; None for all on one line.
    indent: Option<String>,
    /// Between items, and between key and value.
    separators: (String, String),
    sort_keys: bool,
}

impl Default for Dumps {
    fn default() -> Self {
        Self { ensure_ascii: false, indent: None, separators: (", ".into(), ": ".into()), sort_keys: false }
    }
}

impl Dumps {
    /// Options as a template gives them to the filter `tojson`.
    ///
    /// # Errors
    /// One is unknown or of another type.
    pub(super) fn new(options: &Kwargs) -> Result<Self, minijinja::Error> {
        let mut dumps = Self::default();
        if let Some(ensure_ascii) = options.get("ensure_ascii")? {
            dumps.ensure_ascii = ensure_ascii;
        }
        if let Some(sort_keys) = options.get("sort_keys")? {
            dumps.sort_keys = sort_keys;
        }
        let indent: Option<Value> = options.get("indent")?;
        if indent.as_ref().is_some_and(is_wide) {
            return Err(too_wide("tojson"));
        }
        dumps.indent = indent.filter(|indent| !indent.is_none()).map(|indent| match indent.as_str() {
            Some(text) => text.to_owned(),
            None => " ".repeat(indent.as_usize().unwrap_or_default()),
        });
        if dumps.indent.is_some() {
            dumps.separators.0 = ",".into();
        }
        let separators: Option<Value> = options.get("separators")?;
        if let Some(separators) = separators.filter(|separators| !separators.is_none()) {
            let mut parts = separators.try_iter()?.map(|part| part.as_str().map(str::to_owned));
            let (Some(Some(items)), Some(Some(keys)), None) = (parts.next(), parts.next(), parts.next()) else {
                let message = "tojson: separators must be two strings";
                return Err(minijinja::Error::new(minijinja::ErrorKind::InvalidOperation, message));
            };
            dumps.separators = (items, keys);
        }
        options.assert_all_used()?;
        Ok(dumps)
    }

    /// The value as JSON.
    pub(super) fn json(&self, value: &Value) -> String {
        let mut out = String::new();
        self.write(&mut out, value, 0);
        out
    }

    fn write(&self, out: &mut String, value: &Value, level: usize) {
        match value.kind() {
            ValueKind::Undefined | ValueKind::None => out.push_str("null"),
            ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => out.push_str(&number(value)),
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter().map(Iterator::collect).unwrap_or_default();
                if self.sort_keys {
                    keys.sort_by_key(key);
                }
                let write = |out: &mut String, name: &Value| {
                    self.string(out, &key(name));
                    out.push_str(&self.separators.1);
                    self.write(out, &value.get_item(name).unwrap_or_default(), level + 1);
                };
                self.items(out, ('{', '}'), keys.iter(), level, write);
            }
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter().map(Iterator::collect).unwrap_or_default();
                self.items(out, ('[', ']'), items.iter(), level, |out, item| self.write(out, item, level + 1));
            }
            _ => self.string(out, &value.to_string()),
        }
    }

    fn items<'a>(
        &self,
        out: &mut String,
        (open, close): (char, char),
        items: impl ExactSizeIterator<Item = &'a Value>,
        level: usize,
        write: impl Fn(&mut String, &Value),
    ) {
        let break_line = |out: &mut String, level: usize| {
            if let Some(indent) = &self.indent {
                out.push('\n');
                out.push_str(&indent.repeat(level));
            }
        };
        out.push(open);
        let is_empty = items.len() == 0;
        for (i, item) in items.enumerate() {
            if i > 0 {
                out.push_str(&self.separators.0);
            }
            break_line(out, level + 1);
            write(out, item);
        }
        if !is_empty {
            break_line(out, level);
        }
        out.push(close);
    }

    fn string(&self, out: &mut String, text: &str) {
        out.push('"');
        for c in text.chars() {
            match c {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\u{8}' => out.push_str("\\b"),
                '\u{c}' => out.push_str("\\f"),
                c if c < ' ' || (self.ensure_ascii && !c.is_ascii()) || (self.ensure_ascii && c == '\u{7f}') => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        // Writing to a string can't fail.
                        let _ = write!(out, "\\u{unit:04x}");
                    }
                }
                c => out.push(c),
            }
        }
        out.push('"');
    }
}

/// A text inside a JSON string, with all of Unicode or in ASCII alone.
pub(super) fn escaped(text: &str, ensure_ascii: bool) -> String {
    let mut out = String::new();
    Dumps { ensure_ascii, ..Dumps::default() }.string(&mut out, text);
    out[1..out.len() - 1].to_owned()
}

/// A map's key, as a string.
fn key(key: &Value) -> String {
    match key.kind() {
        ValueKind::None | ValueKind::Undefined => "null".into(),
        ValueKind::Bool => if key.is_true() { "true" } else { "false" }.into(),
        ValueKind::Number => number(key),
        _ => key.to_string(),
    }
}

/// A number as Python's `repr` has it: the shortest that reads back the same, with an exponent from 1e16 and below 1e-4.
fn number(value: &Value) -> String {
    if value.is_integer() {
        return value.to_string();
    }
    let Ok(float) = f64::try_from(value.clone()) else { return value.to_string() };
    if float.is_nan() {
        return "NaN".into();
    }
    if float.is_infinite() {
        return if float > 0.0 { "Infinity" } else { "-Infinity" }.into();
    }
    let size = float.abs();
    if size != 0.0 && !(1e-4..1e16).contains(&size) {
        let text = format!("{float:e}");
        let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
        let (sign, exponent) = exponent.strip_prefix('-').map_or(('+', exponent), |exponent| ('-', exponent));
        return format!("{digits}e{sign}{exponent:0>2}");
    }
    // The shortest, with a fraction always.
    format!("{float:?}")
}

/// The value as `str` writes it.
pub(super) fn str(value: &Value) -> String {
    match value.kind() {
        ValueKind::Undefined => String::new(),
        ValueKind::String => value.to_string(),
        _ => {
            let mut out = String::new();
            repr(&mut out, value);
            out
        }
    }
}

fn repr(out: &mut String, value: &Value) {
    let list = |out: &mut String, items: &mut dyn Iterator<Item = Value>, write: &dyn Fn(&mut String, &Value)| {
        for (i, item) in items.enumerate() {
            if i > 0 {
                out.push_str(", ");
            }
            write(out, &item);
        }
    };
    match value.kind() {
        ValueKind::Undefined => out.push_str("Undefined"),
        ValueKind::None => out.push_str("None"),
        ValueKind::Bool => out.push_str(if value.is_true() { "True" } else { "False" }),
        ValueKind::Number => out.push_str(&match number(value).as_str() {
            "NaN" => "nan".to_owned(),
            "Infinity" => "inf".to_owned(),
            "-Infinity" => "-inf".to_owned(),
            number => number.to_owned(),
        }),
        ValueKind::String => quote(out, &value.to_string()),
        ValueKind::Map => {
            out.push('{');
            if let Ok(mut keys) = value.try_iter() {
                list(out, &mut keys, &|out, key| {
                    repr(out, key);
                    out.push_str(": ");
                    repr(out, &value.get_item(key).unwrap_or_default());
                });
            }
            out.push('}');
        }
        ValueKind::Seq | ValueKind::Iterable => {
            let [begin, end] = value.downcast_object_ref::<Sequence>().map_or(["[", "]"], |sequence| sequence.around);
            out.push_str(begin);
            if let Ok(mut items) = value.try_iter() {
                list(out, &mut items, &repr);
            }
            out.push_str(end);
        }
        _ => out.push_str(&value.to_string()),
    }
}

/// A string as `repr` has it: in single quotes, unless it holds some and no double ones.
fn quote(out: &mut String, text: &str) {
    let mark = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(mark);
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c == mark => {
                out.push('\\');
                out.push(c);
            }
            c if c != ' ' && UNPRINTABLE.is_match(c.encode_utf8(&mut [0; 4])) => {
                let _ = match u32::from(c) {
                    code @ ..0x100 => write!(out, "\\x{code:02x}"),
                    code @ ..0x1_0000 => write!(out, "\\u{code:04x}"),
                    code => write!(out, "\\U{code:08x}"),
                };
            }
            c => out.push(c),
        }
    }
    out.push(mark);
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn value(json: serde_json::Value) -> Value {
        Value::from_serialize(json)
    }

    #[test]
    fn json_is_that_of_pythons_dumps() {
        let nested =
            value(json!({"b": [1, 2.0, 1e-5, 1e16, true, null], "a": {"é\"\u{1}": "<&>'\u{1f600}"}, "c": [], "d": {}}));
        assert_eq!(
            Dumps::default().json(&nested),
            "{\"b\": [1, 2.0, 1e-05, 1e+16, true, null], \"a\": {\"é\\\"\\u0001\": \"<&>'\u{1f600}\"}, \"c\": [], \"d\": {}}"
        );
        let with = |options: &[(&str, Value)]| {
            let options: Kwargs = options.iter().map(|(name, value)| (*name, value.clone())).collect();
            Dumps::new(&options).unwrap().json(&nested)
        };
        let sorted = with(&[
            ("sort_keys", true.into()),
            ("ensure_ascii", true.into()),
            ("separators", value(json!([",", ":"]))),
        ]);
        assert_eq!(
            sorted,
            r#"{"a":{"\u00e9\"\u0001":"<&>'\ud83d\ude00"},"b":[1,2.0,1e-05,1e+16,true,null],"c":[],"d":{}}"#
        );
        let small = value(json!({"a": [1, {}], "b": []}));
        let options: Kwargs = [("indent", Value::from(2))].into_iter().collect();
        assert_eq!(Dumps::new(&options).unwrap().json(&small), "{\n  \"a\": [\n    1,\n    {}\n  ],\n  \"b\": []\n}");
    }

    #[test]
    fn an_option_that_dumps_does_not_have_is_refused() {
        let options: Kwargs = [("intent", Value::from(2))].into_iter().collect();
        assert!(Dumps::new(&options).is_err());
    }

    #[test]
    fn json_can_not_be_indented_by_more_spaces_than_there_is_memory() {
        let options: Kwargs = [("indent", Value::from(99_999_999_999_u64))].into_iter().collect();
        assert!(Dumps::new(&options).is_err());
    }

    #[test]
    fn values_are_written_as_str_writes_them() {
        let nested = value(json!({"a": [true, null, 1.5, "it's", "a\n\"b\""], "b": 3}));
        assert_eq!(str(&nested), "{'a': [True, None, 1.5, \"it's\", 'a\\n\"b\"'], 'b': 3}");
        assert_eq!(str(&Value::from("as it is")), "as it is");
        assert_eq!(str(&Value::UNDEFINED), "");
        assert_eq!(
            [1e22, 123456789.123, 0.0001, -0.0].map(|x| str(&Value::from(x))),
            ["1e+22", "123456789.123", "0.0001", "-0.0"]
        );
    }
}
