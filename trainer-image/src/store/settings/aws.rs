//! The settings of S3's clients: `AWS_…`.

use object_store::aws::AmazonS3ConfigKey;
use tunesmith_crds::names::ROLE_ARN;

use super::{
    Family, Setting, Settings,
    check::{check_credential, check_file, check_option, check_url, is_on},
};

/// What clients of S3 read.
pub(in super::super) const FAMILY: Family = Family {
    name: "AWS_",
    together: &[&["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"]],
    replaces: &[
        (TOKEN_FILE, &[ROLE_ARN]),
        // The pod's one token may assume several roles, a job's roleArn among them.
        (ROLE_ARN, &["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"]),
    ],
    secret: &[
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "AWS_TOKEN",
        "AWS_SSE_CUSTOMER_KEY_BASE64",
        "AWS_CONTAINER_AUTHORIZATION_TOKEN",
    ],
    decisive: &[
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_ENDPOINT",
        "AWS_ENDPOINT_URL",
        "AWS_ENDPOINT_URL_S3",
        "AWS_WEB_IDENTITY_TOKEN_FILE",
        "AWS_SKIP_SIGNATURE",
        "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
        "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    ],
    urls: &[
        "AWS_ENDPOINT",
        "AWS_ENDPOINT_URL",
        "AWS_ENDPOINT_URL_S3",
        "AWS_ENDPOINT_URL_STS",
        "AWS_METADATA_ENDPOINT",
        "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    ],
    ours: &[METADATA_DISABLED],
    ..Family::PLAIN
};
/// Where the tools of AWS find keys that this program does not look for.
pub(super) const PROFILE: [&str; 3] = ["AWS_PROFILE", "AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"];
const TOKEN_FILE: &str = "AWS_WEB_IDENTITY_TOKEN_FILE";
const REGIONS: [&str; 2] = ["AWS_REGION", "AWS_DEFAULT_REGION"];
const FILES: [&str; 2] = [TOKEN_FILE, "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"];
/// `false` lets the cloud's metadata service say who asks.
const METADATA_DISABLED: &str = "AWS_EC2_METADATA_DISABLED";
/// Details of an encryption, which is named by another variable.
const ENCRYPTION: [&str; 3] = ["AWS_SSE_KMS_KEY_ID", "AWS_SSE_BUCKET_KEY_ENABLED", "AWS_SSE_CUSTOMER_KEY_BASE64"];

/// Checks what a client of S3 would stumble over, or ignore.
pub(in super::super) fn check(settings: &Settings) -> Result<(), String> {
    for (name, setting) in settings {
        check_one(name, setting).map_err(|problem| format!("{} {problem}", setting.variable))?;
    }
    if !settings.contains_key("AWS_SERVER_SIDE_ENCRYPTION")
        && let Some(Setting { variable, .. }) = ENCRYPTION.iter().find_map(|name| settings.get(*name))
    {
        return Err(format!("{variable} is set, but AWS_SERVER_SIDE_ENCRYPTION is not"));
    }
    check_identity(settings)
}

fn check_one(name: &str, Setting { value, .. }: &Setting) -> Result<(), String> {
    if FAMILY.urls.contains(&name) {
        return check_url(value).map(drop);
    }
    if REGIONS.contains(&name) && !value.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._".contains(&byte)) {
        return Err(format!(
            "is {value:?}, which is no region: a region has letters, digits and '-', such as eu-central-1"
        ));
    }
    if FAMILY.secret.contains(&name) {
        return check_credential(value);
    }
    if FILES.contains(&name) {
        return check_file(value);
    }
    let is_known = name == "AWS_CA_BUNDLE" || name.to_ascii_lowercase().parse::<AmazonS3ConfigKey>().is_ok();
    if is_known { check_option(&name[FAMILY.name.len()..], value) } else { Ok(()) }
}

/// A role that was named for this use of a store, in `variable`, is assumed with the token of a file, beside no other identity.
fn check_role(settings: &Settings, variable: &str) -> Result<(), String> {
    let set = |name: &str| settings.get(name).map(|setting| setting.variable.as_str());
    let others = ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"].into_iter().find_map(set);
    let unsigned = set("AWS_SKIP_SIGNATURE").filter(|_| is_on(settings, "AWS_SKIP_SIGNATURE"));
    if let Some(other) = others.or(unsigned) {
        return Err(format!(
            "{variable} names the role that asks (roleArn), and {other} says that another asks: remove one"
        ));
    }
    let container =
        ["AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI"].into_iter().find_map(set);
    match (set(TOKEN_FILE), container) {
        (Some(_), _) => Ok(()),
        (None, Some(container)) => Err(format!(
            "{variable} names a role (roleArn), but the pod has another role's credentials, by {container} (EKS Pod Identity): \
             assuming a role with those of another is not supported. Give the ServiceAccount its role by the annotation \
             eks.amazonaws.com/role-arn (IAM roles for service accounts), or leave out roleArn"
        )),
        (None, None) => Err(format!(
            "{variable} is set, but {TOKEN_FILE} is not: there is no token to assume the role with; on EKS a pod has one if its \
             ServiceAccount has the annotation eks.amazonaws.com/role-arn"
        )),
    }
}

/// Who asks is one of: keys, a role with a token's file, or the machine.
fn check_identity(settings: &Settings) -> Result<(), String> {
    let variable = |name: &str| settings.get(name).map(|setting| setting.variable.as_str());
    if let Some(role) = variable(ROLE_ARN).filter(|variable| *variable != ROLE_ARN) {
        return check_role(settings, role);
    }
    if is_on(settings, "AWS_SKIP_SIGNATURE") {
        return Ok(());
    }
    match (variable("AWS_ACCESS_KEY_ID"), variable("AWS_SECRET_ACCESS_KEY")) {
        (Some(_), Some(_)) => return Ok(()),
        (Some(set), None) => return Err(format!("{set} is set, but AWS_SECRET_ACCESS_KEY is not")),
        (None, Some(set)) => return Err(format!("{set} is set, but AWS_ACCESS_KEY_ID is not")),
        (None, None) => {}
    }
    if let Some(set) = variable("AWS_SESSION_TOKEN") {
        return Err(format!("{set} is set, but AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY are not"));
    }
    match (variable(TOKEN_FILE), variable(ROLE_ARN)) {
        (Some(_), Some(_)) => return Ok(()),
        (Some(set), None) => return Err(format!("{set} is set, but {ROLE_ARN} is not")),
        (None, Some(set)) => return Err(format!("{set} is set, but {TOKEN_FILE} is not")),
        (None, None) => {}
    }
    if variable("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI").is_some() {
        return Ok(());
    }
    let [full, token] = ["AWS_CONTAINER_CREDENTIALS_FULL_URI", "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"].map(variable);
    match (full, token) {
        (Some(_), Some(_)) => return Ok(()),
        (Some(set), None) => return Err(format!("{set} is set, but AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE is not")),
        _ => {}
    }
    if let Some(set) = PROFILE.into_iter().find_map(variable) {
        return Err(format!("{set} is not read here: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"));
    }
    // The client would ask the cloud's metadata service, and be what the node is. Nobody means that by leaving something out.
    let is_asked = settings.get(METADATA_DISABLED).is_some_and(|setting| setting.value.eq_ignore_ascii_case("false"));
    match is_asked || variable("AWS_METADATA_ENDPOINT").is_some() {
        true => Ok(()),
        false => Err(format!(
            "nothing says who asks: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_SKIP_SIGNATURE=true for a bucket \
             that is open to all, or {METADATA_DISABLED}=false to be what the node is"
        )),
    }
}
