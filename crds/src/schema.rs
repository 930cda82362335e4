//! What several schemas share.

/// A JSON object whose fields the API server leaves as they are: what is recorded in it stays valid, whatever rules a later
/// release has for new objects.
pub(crate) fn any_object(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
    schemars::json_schema!({"type": "object", "x-kubernetes-preserve-unknown-fields": true})
}

/// What a count that is seldom there says to serde.
pub(crate) fn is_zero(count: &u64) -> bool {
    *count == 0
}

/// A CEL rule on a field. (`#[x_kube]` on a field would need a type without container-level defaults.)
pub(crate) fn rule(rule: &str, message: &str) -> serde_json::Value {
    serde_json::json!([{"rule": rule, "message": message}])
}
