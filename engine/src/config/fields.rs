//! Fields of a JSON object, with errors that name them.

use serde_json::{Map, Value};

/// Sizes above this are refused, so that no product of two of them overflows or allocates the machine away.
const MAX_SIZE: u64 = 1 << 24;

/// The fields of an object.
#[derive(Clone, Copy)]
pub(super) struct Fields<'a>(pub(super) &'a Map<String, Value>);

impl<'a> Fields<'a> {
    /// The field's value; absent and `null` are the same.
    pub(super) fn get(&self, name: &str) -> Option<&'a Value> {
        self.0.get(name).filter(|value| !value.is_null())
    }

    /// Whether the field is absent, rather than `null`.
    pub(super) fn is_absent(&self, name: &str) -> bool {
        !self.0.contains_key(name)
    }

    pub(super) fn size(&self, name: &str) -> Result<usize, String> {
        self.optional_size(name)?.ok_or_else(|| format!("{name} is missing"))
    }

    pub(super) fn optional_size(&self, name: &str) -> Result<Option<usize>, String> {
        self.get(name)
            .map(|value| match value.as_u64() {
                Some(n @ 1..=MAX_SIZE) => Ok(n as usize),
                _ => Err(format!("{name} is {value}; expected a whole number from 1 to {MAX_SIZE}")),
            })
            .transpose()
    }

    pub(super) fn optional_number(&self, name: &str) -> Result<Option<f64>, String> {
        self.get(name)
            .map(|value| value.as_f64().ok_or_else(|| format!("{name} is {value}; expected a number")))
            .transpose()
    }

    /// A number above 0, or nothing.
    pub(super) fn optional_positive(&self, name: &str) -> Result<Option<f64>, String> {
        match self.optional_number(name)? {
            Some(number) if !(number.is_finite() && number > 0.0) => {
                Err(format!("{name} is {number}; it must be above 0"))
            }
            number => Ok(number),
        }
    }

    pub(super) fn positive(&self, name: &str) -> Result<f64, String> {
        self.optional_positive(name)?.ok_or_else(|| format!("{name} is missing"))
    }

    pub(super) fn optional_flag(&self, name: &str) -> Result<Option<bool>, String> {
        self.get(name)
            .map(|value| value.as_bool().ok_or_else(|| format!("{name} is {value}; expected true or false")))
            .transpose()
    }

    pub(super) fn flag(&self, name: &str) -> Result<bool, String> {
        Ok(self.optional_flag(name)?.unwrap_or(false))
    }

    pub(super) fn optional_text(&self, name: &str) -> Result<Option<&'a str>, String> {
        self.get(name)
            .map(|value| value.as_str().ok_or_else(|| format!("{name} is {value}; expected a string")))
            .transpose()
    }

    /// The object, or nothing.
    pub(super) fn optional_object(&self, name: &str) -> Result<Option<Fields<'a>>, String> {
        self.get(name)
            .map(|value| value.as_object().map(Fields).ok_or_else(|| format!("{name} is {value}; expected an object")))
            .transpose()
    }
}
