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
    Environment, Error, ErrorKind, Value, filters,
    value::{Kwargs, ValueKind},
};

use super::{
    methods::{self, is_lower, is_upper},
    python::{self, Dumps},
    syntax::TRUE,
    values::{TUPLE, of_tuples, tuple, wrong},
};

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
        write!(text, "{}", time.format(format))
            .map_err(|_| wrong(format!("strftime_now: {format:?} is no format of a date")))?;
        Ok(text)
    }
}

/// An environment without templates.
pub(super) fn environment(calendar: &Calendar) -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    environment.set_unknown_method_callback(methods::method);
    environment.set_formatter(|out, _, value| Ok(out.write_str(&python::str(value))?));
    environment.add_function("raise_exception", raise_exception);
    let calendar = calendar.clone();
    environment.add_function("strftime_now", move |format: &str| calendar.format(format));
    environment.add_filter("tojson", to_json);
    environment.add_filter("string", |value: Value| python::str(&value));
    environment.add_filter("length", length);
    environment.add_filter("count", length);
    environment.add_filter("title", |value: &Value| methods::title_filter(value));
    environment.add_filter("trim", |value: &Value, characters: Option<&str>| methods::trim(value, characters));
    environment.add_filter("round", |value: &Value, precision: Option<i64>| methods::round(value, precision));
    environment.add_filter("items", |value: &Value| of_tuples(filters::items(value)));
    environment.add_filter("dictsort", |value: &Value, options: Kwargs| of_tuples(filters::dictsort(value, options)));
    environment.add_test("lower", |value: &Value| value.as_str().is_some_and(is_lower));
    environment.add_test("upper", |value: &Value| value.as_str().is_some_and(is_upper));
    // Python's look for attributes, which dictionaries' items are not, and break lines.
    ["attr", "pprint"].into_iter().for_each(|name| environment.remove_filter(name));
    environment.add_function(TUPLE, tuple);
    environment.add_global(TRUE, true);
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
    Err(wrong(message))
}

/// In Python's Jinja, what is not there has no items.
fn length(value: Value) -> Result<usize, Error> {
    let unknown = || wrong(format!("cannot calculate length of {}", value.kind()));
    if value.is_undefined() { Ok(0) } else { value.len().ok_or_else(unknown) }
}

fn to_json(value: Value, indent: Option<Value>, options: Kwargs) -> Result<String, Error> {
    if indent.is_some() {
        return Err(wrong("tojson: name its options, as in tojson(indent=4)"));
    }
    Ok(Dumps::new(&options)?.json(&value))
}

/// A template's failure, for the user: the template's own words where it raised.
pub(super) fn explain(error: &Error) -> String {
    match error.detail() {
        Some(detail) if error.kind() == ErrorKind::InvalidOperation => detail.to_owned(),
        _ => error.to_string(),
    }
}
