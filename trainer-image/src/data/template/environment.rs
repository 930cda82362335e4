//! Jinja as transformers sets it up: Python's methods, JSON and words for values, `{% generation %}`, and a fixed date.

use std::{
    fmt::Write,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use chrono::{NaiveDate, NaiveTime};
use minijinja::{
    Environment, Error, ErrorKind, Value,
    value::{Kwargs, ValueKind},
};

use super::python::{self, Dumps};

/// Stand for `{% generation %}` and `{% endgeneration %}` in rendered text: code points that Unicode reserves for
/// uses like this one, so that no text holds them.
pub(super) const SENTINELS: [char; 2] = ['\u{fdd0}', '\u{fdd1}'];

/// The date that a template writes, and whether it was asked for it.
#[derive(Clone)]
pub(super) struct Calendar {
    pub(super) date: NaiveDate,
    is_used: Arc<AtomicBool>,
}

impl Calendar {
    pub(super) fn new(date: NaiveDate) -> Self {
        Self { date, is_used: Arc::default() }
    }

    pub(super) fn is_used(&self) -> bool {
        self.is_used.load(Ordering::Relaxed)
    }

    /// The date at midnight, as `strftime` writes it.
    fn format(&self, format: &str) -> Result<String, Error> {
        self.is_used.store(true, Ordering::Relaxed);
        let mut text = String::new();
        let time = self.date.and_time(NaiveTime::MIN);
        write!(text, "{}", time.format(format)).map_err(|_| {
            Error::new(ErrorKind::InvalidOperation, format!("strftime_now: {format:?} is no format of a date"))
        })?;
        Ok(text)
    }
}

/// An environment without templates.
pub(super) fn environment(calendar: &Calendar) -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    environment.set_unknown_method_callback(python::method);
    environment.set_formatter(|out, _, value| Ok(out.write_str(&python::str(value))?));
    environment.add_function("raise_exception", raise_exception);
    let calendar = calendar.clone();
    environment.add_function("strftime_now", move |format: &str| calendar.format(format));
    environment.add_filter("tojson", to_json);
    environment.add_filter("string", |value: Value| python::str(&value));
    environment.add_filter("length", length);
    environment.add_filter("count", length);
    // In Python, texts can be iterated over too, and are sequences.
    let is_text = |value: &Value| value.kind() == ValueKind::String;
    environment
        .add_test("iterable", move |value: Value| is_text(&value) || (!value.is_none() && value.try_iter().is_ok()));
    environment.add_test("sequence", move |value: Value| {
        is_text(&value) || matches!(value.kind(), ValueKind::Seq | ValueKind::Map)
    });
    environment
}

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message))
}

/// In Python's Jinja, what is not there has no items.
fn length(value: Value) -> Result<usize, Error> {
    let unknown = || Error::new(ErrorKind::InvalidOperation, format!("cannot calculate length of {}", value.kind()));
    if value.is_undefined() { Ok(0) } else { value.len().ok_or_else(unknown) }
}

fn to_json(value: Value, indent: Option<Value>, options: Kwargs) -> Result<String, Error> {
    if indent.is_some() {
        let message = "tojson: name its options, as in tojson(indent=4)";
        return Err(Error::new(ErrorKind::InvalidOperation, message));
    }
    Ok(Dumps::new(&options)?.json(&value))
}

/// The text of a template as Jinja reads it: with plain line breaks, and with sentinels around the content of
/// `{% generation %}` blocks, which only transformers knows. The tags keep their dashes and stay block tags, so white
/// space is trimmed as before.
pub(super) fn prepare(source: &str) -> String {
    let source = source.replace("\r\n", "\n").replace('\r', "\n");
    let mut out = String::with_capacity(source.len());
    let mut rest = source.as_str();
    while let Some(start) = rest.find("{%") {
        // What stands in a comment is no tag.
        let comment = rest[..start].find("{#");
        if let Some(end) = comment.and_then(|start| Some(start + rest[start..].find("#}")? + 2)) {
            out.push_str(&rest[..end]);
            rest = &rest[end..];
            continue;
        }
        let Some(end) = rest[start..].find("%}").map(|end| start + end + 2) else { break };
        let inner = rest.get(start + 2..end - 2).unwrap_or_default();
        let dash = |is_there: bool| if is_there { "-" } else { "" };
        let (open, close) = (dash(inner.starts_with('-')), dash(inner.ends_with('-')));
        out.push_str(&rest[..start]);
        match inner.trim_matches('-').trim() {
            "generation" => out.push_str(&format!("{{%{open} if true %}}{}{{% endif {close}%}}", SENTINELS[0])),
            "endgeneration" => out.push_str(&format!("{{%{open} if true %}}{}{{% endif {close}%}}", SENTINELS[1])),
            _ => out.push_str(&rest[start..end]),
        }
        rest = &rest[end..];
    }
    out.push_str(rest);
    out
}

/// A template's failure, for the user: the template's own words where it raised.
pub(super) fn explain(error: &Error) -> String {
    match error.detail() {
        Some(detail) if error.kind() == ErrorKind::InvalidOperation => detail.to_owned(),
        _ => error.to_string(),
    }
}
