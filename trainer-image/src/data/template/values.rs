//! Python's sequences that are no lists: they are written in another way.

use std::sync::Arc;

use minijinja::{
    Error, ErrorKind, Value,
    value::{Enumerator, Object, ObjectRepr, Rest},
};

/// The name by which templates make a tuple, once they are prepared.
pub(super) const TUPLE: &str = "__tuple__";

/// A tuple, or a view of a dictionary.
#[derive(Debug)]
pub(super) struct Sequence {
    /// What stands around the items as `repr` writes them.
    pub(super) around: [&'static str; 2],
    pub(super) items: Vec<Value>,
}

impl Object for Sequence {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Seq
    }

    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        self.items.get(key.as_usize()?).cloned()
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        Enumerator::Seq(self.items.len())
    }
}

/// A tuple of these items.
pub(super) fn tuple(items: Rest<Value>) -> Value {
    // A tuple of one item ends in a comma.
    let end = if items.len() == 1 { ",)" } else { ")" };
    Value::from_object(Sequence { around: ["(", end], items: items.0 })
}

/// The same pairs as tuples.
fn tuples(pairs: &Value) -> Result<Vec<Value>, Error> {
    pairs.try_iter()?.map(|pair| Ok(tuple(Rest(pair.try_iter()?.collect())))).collect()
}

/// What a dictionary's method `items`, `keys` or `values` has given, as Python writes it.
pub(super) fn view(method: &str, items: &Value) -> Result<Value, Error> {
    let (begin, items) = match method {
        "items" => ("dict_items([", tuples(items)?),
        "keys" => ("dict_keys([", items.try_iter()?.collect()),
        _ => ("dict_values([", items.try_iter()?.collect()),
    };
    Ok(Value::from_object(Sequence { around: [begin, "])"], items }))
}

/// A filter that gives pairs gives tuples.
pub(super) fn of_tuples(pairs: Result<Value, Error>) -> Result<Value, Error> {
    Ok(Value::from(tuples(&pairs?)?))
}

/// The error of a template that asks for what can't be done.
pub(super) fn wrong(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message.into())
}

/// Most spaces that a template may write at once, to indent JSON or to fill a field of `format`.
pub(super) const MAX_WIDTH: usize = 1000;

pub(super) fn is_wide(value: &Value) -> bool {
    value.as_usize().is_some_and(|width| width > MAX_WIDTH)
}

pub(super) fn too_wide(what: &str) -> Error {
    wrong(format!("{what}: a width above {MAX_WIDTH}"))
}
