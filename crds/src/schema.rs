//! Parts that several schemas share.

/// A JSON object whose fields the API server leaves as they are: what is recorded in it stays valid, whatever rules a later
/// release has for new objects.
pub(crate) fn any_object(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
    schemars::json_schema!({"type": "object", "x-kubernetes-preserve-unknown-fields": true})
}

/// Tells serde to leave out a count of 0.
pub(crate) fn is_zero(count: &u64) -> bool {
    *count == 0
}

/// That a field is the name of an object.
pub(crate) fn is_name() -> serde_json::Value {
    const PART: &str = "[a-z0-9]([-a-z0-9]*[a-z0-9])?";
    rule(
        &format!(r"self.matches(r'^{PART}(\.{PART})*$')"),
        "must be the name of an object: lower-case letters, digits, '-' and '.'",
    )
}

/// The longest ARN of a role: its path has 512 characters at most, its name 64.
pub(crate) const MAX_ROLE_ARN: u64 = 640;

/// That a field is the ARN of an IAM role.
pub(crate) fn is_role_arn() -> serde_json::Value {
    rule(
        r"self.matches(r'^arn:[a-z0-9-]+:iam::[0-9]{12}:role/([!-~]+/)?[A-Za-z0-9_+=,.@-]{1,64}$')",
        "must be the ARN of an IAM role, such as arn:aws:iam::123456789012:role/tuner",
    )
}

/// A quantity of a size that all who read it can calculate with.
pub(crate) const QUANTITY: &str = r"^[0-9]{1,12}(\.[0-9]{1,6})?([KMGTPE]i|[mkMGTPE]|[eE]([0-9]|1[0-2]))?$";

/// That a field is a positive quantity, such as `example`.
pub(crate) fn is_quantity(example: &str) -> serde_json::Value {
    rule(
        "isQuantity(self) && quantity(self).isGreaterThan(quantity('0'))",
        &format!("must be a quantity such as {example}, above 0"),
    )
}

/// A CEL rule on a field. (`#[x_kube]` on a field would need a type without container-level defaults.)
pub(crate) fn rule(rule: &str, message: &str) -> serde_json::Value {
    serde_json::json!([{"rule": rule, "message": message}])
}

/// Defaults of fields, for serde.
pub(crate) mod defaults {
    pub(crate) fn yes() -> bool {
        true
    }

    pub(crate) fn backoff_limit() -> i32 {
        3
    }

    pub(crate) fn run_history_limit() -> u32 {
        10
    }
}
