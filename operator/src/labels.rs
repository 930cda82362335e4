//! Labels of everything that the operator makes.

use std::collections::BTreeMap;

use tunesmith_crds::names;

use crate::workload::Stage;

/// Who manages an object.
pub const MANAGED_BY: &str = "app.kubernetes.io/managed-by";
/// The operator, as manager of objects and of fields, and as reporter of events.
pub const OPERATOR: &str = "tunesmith-operator";

/// Labels of a trainer Job and its pods; `instance` is the object that it works for.
pub fn trainer(instance: &str, stage: Stage) -> BTreeMap<String, String> {
    [
        ("app.kubernetes.io/name", "tunesmith-trainer"),
        ("app.kubernetes.io/instance", instance),
        ("app.kubernetes.io/component", stage.name()),
        ("app.kubernetes.io/part-of", "tunesmith"),
        (MANAGED_BY, OPERATOR),
        (names::STAGE_LABEL, stage.name()),
    ]
    .into_iter()
    .map(|(key, value)| (key.to_owned(), value.to_owned()))
    .collect()
}
