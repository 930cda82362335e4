//! The settings of a store from environment variables, parsed before a client sees them: some libraries end the process
//! over a value that they can't use.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use object_store::aws::AmazonS3ConfigKey;
use url::Url;

use super::{Environment, Role};

/// Variables that only make sense together: all of them come with the prefix, or none.
const IDENTITY: [&str; 3] = ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"];
/// The same for a role that is assumed with a token from a file.
const WEB_IDENTITY: [&str; 2] = ["AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_ROLE_ARN"];
/// What no message may show.
const SECRET: [&str; 7] = [
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_TOKEN",
    "AWS_SSE_CUSTOMER_KEY_BASE64",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN",
    "HF_TOKEN",
];
/// Any of these names a store.
const DECISIVE: [&str; 9] = [
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_ENDPOINT",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_SKIP_SIGNATURE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
];
/// Where the tools of AWS find keys that this program does not look for.
const PROFILE: [&str; 3] = ["AWS_PROFILE", "AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"];
const URLS: [&str; 6] = [
    "AWS_ENDPOINT",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_ENDPOINT_URL_STS",
    "AWS_METADATA_ENDPOINT",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
];
const REGIONS: [&str; 2] = ["AWS_REGION", "AWS_DEFAULT_REGION"];
const FILES: [&str; 3] = ["AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", CA_BUNDLE];
/// `false` lets the cloud's metadata service say who asks.
pub(super) const METADATA_DISABLED: &str = "AWS_EC2_METADATA_DISABLED";
/// A file of certificates to trust besides the system's.
pub(super) const CA_BUNDLE: &str = "AWS_CA_BUNDLE";
/// What begins a certificate in PEM.
const PEM_BEGINS: &str = "-----BEGIN ";
/// Details of an encryption, which is named by another variable.
const ENCRYPTION: [&str; 3] = ["AWS_SSE_KMS_KEY_ID", "AWS_SSE_BUCKET_KEY_ENABLED", "AWS_SSE_CUSTOMER_KEY_BASE64"];
/// PEM, which has several lines.
const MULTILINE: &str = "AWS_PROXY_CA_CERTIFICATE";
/// How long the Hub may say nothing.
const HUB_TIMEOUT_SECONDS: u64 = 30;
/// Proxies that are no HTTP servers.
const SOCKS: [&str; 5] = ["socks", "socks4", "socks4a", "socks5", "socks5h"];
/// What every HTTP client of this process obeys.
const PROXIES: [&str; 6] = ["HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"];

/// A setting and the variable that it comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Setting {
    pub(super) value: String,
    pub(super) variable: String,
}

/// Settings by their names without a role's prefix.
pub(super) type Settings = BTreeMap<String, Setting>;

/// Whether the environment names an S3 store for any role.
pub(super) fn is_configured(environment: &Environment) -> bool {
    environment.iter().any(|(name, value)| DECISIVE.contains(&plain(name)) && !value.trim().is_empty())
}

/// The variable that sends AWS's own tools to a file of keys, if there is one.
pub(super) fn profile(environment: &Environment) -> Option<&str> {
    PROFILE.into_iter().find(|name| environment.get(*name).is_some_and(|value| !value.trim().is_empty()))
}

/// Values that no message may show.
pub(super) fn secrets(environment: &Environment) -> Vec<String> {
    let secret = |(name, value): (&String, &String)| {
        let value = value.trim();
        (SECRET.contains(&plain(name)) && !value.is_empty()).then(|| value.to_owned())
    };
    // A proxy's password, or one that is written into an endpoint.
    let password = |value: &String| {
        let (_, rest) = value.split_once("://")?;
        let (userinfo, _) = rest.rsplit_once('@')?;
        let password = userinfo.split_once(':').map_or(userinfo, |(_, password)| password);
        (!password.is_empty()).then(|| password.to_owned())
    };
    environment.iter().filter_map(secret).chain(environment.values().filter_map(password)).collect()
}

/// Text without secrets. A short one, such as `e`, is only taken out where it is a whole word.
pub(super) fn redact(text: &str, secrets: &[String]) -> String {
    let mut secrets: Vec<&String> = secrets.iter().collect();
    // One secret may be the beginning of another.
    secrets.sort_by_key(|secret| std::cmp::Reverse(secret.len()));
    secrets.into_iter().fold(text.to_owned(), |text, secret| without(&text, secret))
}

fn without(text: &str, secret: &str) -> String {
    const SHORT: usize = 8;
    let mut shown = String::new();
    let mut end = 0;
    for (start, _) in text.match_indices(secret) {
        let behind = &text[start + secret.len()..];
        let is_word = !text[..start].ends_with(char::is_alphanumeric) && !behind.starts_with(char::is_alphanumeric);
        if is_word || secret.len() >= SHORT {
            shown.push_str(&text[end..start]);
            shown.push_str("[redacted]");
            end = start + secret.len();
        }
    }
    shown + &text[end..]
}

/// A variable's name without a role's prefix.
fn plain(name: &str) -> &str {
    let roles = [Role::Model, Role::Dataset, Role::Output];
    roles.iter().find_map(|role| name.strip_prefix(role.env_prefix())).unwrap_or(name)
}

/// The variables of a role that begin with `family`, such as `AWS_`; those without its prefix are the fallback. Values
/// are trimmed: Secrets made from files end in a newline.
pub(super) fn of_role(environment: &Environment, role: Role, family: &str) -> Settings {
    let named = |prefix: &str| -> Settings {
        let set = environment.iter().filter_map(|(variable, value)| {
            let (name, value) = (variable.strip_prefix(prefix)?, value.trim());
            let setting = || Setting { value: value.to_owned(), variable: variable.clone() };
            (name.starts_with(family) && !value.is_empty()).then(|| (name.to_owned(), setting()))
        });
        set.collect()
    };
    let own = named(role.env_prefix());
    let mut settings = named("");
    for identity in [&IDENTITY[..], &WEB_IDENTITY] {
        if identity.iter().any(|name| own.contains_key(*name)) {
            settings.retain(|name, _| !identity.contains(&name.as_str()));
        }
    }
    settings.extend(own);
    settings
}

/// Checks what a client of S3 would stumble over, or ignore.
pub(super) fn check_aws(settings: &Settings) -> Result<(), String> {
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
    if URLS.contains(&name) {
        return check_url(value).map(drop);
    }
    if REGIONS.contains(&name) && !value.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._".contains(&byte)) {
        return Err(format!(
            "is {value:?}, which is no region: a region has letters, digits and '-', such as eu-central-1"
        ));
    }
    let is_zero = || value.bytes().all(|byte| byte == b'0' || byte.is_ascii_alphabetic()) && value.starts_with('0');
    if name.ends_with("TIMEOUT") && is_zero() {
        return Err(format!("is {value:?}, at which every request ends at once; write a time above 0, such as 60s"));
    }
    if name == "AWS_PROXY_URL" {
        return check_proxy(value);
    }
    if name == MULTILINE && !value.contains(PEM_BEGINS) {
        return Err("holds no PEM certificate".into());
    }
    if SECRET.contains(&name) {
        return check_credential(value);
    }
    if FILES.contains(&name) {
        return fs::File::open(value)
            .map(drop)
            .map_err(|error| format!("names {value:?}, which can't be read: {error}"));
    }
    let is_known = name.to_ascii_lowercase().parse::<AmazonS3ConfigKey>().is_ok();
    if is_known && name != MULTILINE && !value.bytes().all(|byte| byte == b' ' || byte.is_ascii_graphic()) {
        return Err("holds characters that no HTTP header can hold".into());
    }
    Ok(())
}

/// A value that goes into a header; it is not shown.
pub(super) fn check_credential(value: &str) -> Result<(), String> {
    match value.chars().position(|c| !c.is_ascii_graphic()) {
        Some(at) => Err(format!(
            "holds a space, a line break or another character that no credential has, at position {}",
            at + 1
        )),
        None => Ok(()),
    }
}

/// A URL of a server, in the form that all HTTP clients here understand.
pub(super) fn check_url(value: &str) -> Result<Url, String> {
    // A password in it is not shown.
    let shown = value.rsplit_once('@').map_or_else(|| format!("{value:?}"), |(_, host)| format!("\"…@{host}\""));
    let Some((scheme, rest)) = value.split_once("://") else {
        return Err(format!("is {shown}, which has no scheme: write http://host:port or https://host"));
    };
    if !["http", "https"].contains(&scheme.to_ascii_lowercase().as_str()) {
        return Err(format!("is {shown}: its scheme must be http or https"));
    }
    if rest.trim_matches('/').is_empty() {
        return Err(format!("is {shown}, which names no host"));
    }
    let wrong = |error: String| format!("is {shown}, which is no URL: {error}");
    let url = Url::parse(value).map_err(|error| wrong(error.to_string()))?;
    let strict: axum::http::Uri = value.parse().map_err(|error| wrong(format!("{error}")))?;
    if strict.host().is_none_or(str::is_empty) || url.host_str().is_none_or(str::is_empty) {
        return Err(format!("is {shown}, which names no host"));
    }
    if url.query().is_some() || url.fragment().is_some() {
        return Err(format!("is {shown}: leave out what follows the '?' or '#'"));
    }
    Ok(url)
}

/// Who asks is one of: keys, a role with a token's file, or the machine.
fn check_identity(settings: &Settings) -> Result<(), String> {
    let variable = |name: &str| settings.get(name).map(|setting| setting.variable.as_str());
    let is_on = |name: &str| settings.get(name).is_some_and(|setting| is_true(&setting.value));
    if is_on("AWS_SKIP_SIGNATURE") {
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
    match (variable("AWS_WEB_IDENTITY_TOKEN_FILE"), variable("AWS_ROLE_ARN")) {
        (Some(_), Some(_)) => return Ok(()),
        (Some(set), None) => return Err(format!("{set} is set, but AWS_ROLE_ARN is not")),
        (None, Some(set)) => return Err(format!("{set} is set, but AWS_WEB_IDENTITY_TOKEN_FILE is not")),
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

fn is_true(value: &str) -> bool {
    ["1", "true", "on", "yes", "y"].contains(&value.to_ascii_lowercase().as_str())
}

/// Checks the proxies, which the HTTP clients would leave out where they can't be used, and the file of the certificates
/// that they trust.
pub(super) fn check_network(environment: &Environment) -> Result<(), String> {
    let set = |name: &'static str| Some((name, environment.get(name)?.trim())).filter(|(_, value)| !value.is_empty());
    for (name, value) in PROXIES.into_iter().filter_map(set) {
        check_proxy(value).map_err(|problem| format!("{name} {problem}"))?;
    }
    if let Some((name, file)) = set("SSL_CERT_FILE") {
        let pem = fs::read(file).map_err(|error| format!("{name} names {file:?}, which can't be read: {error}"))?;
        if !String::from_utf8_lossy(&pem).contains(PEM_BEGINS) {
            return Err(format!("{name} names {file:?}, which holds no PEM certificate"));
        }
    }
    Ok(())
}

fn check_proxy(value: &str) -> Result<(), String> {
    let with_scheme = if value.contains("://") { value.to_owned() } else { format!("http://{value}") };
    match with_scheme.split_once("://") {
        Some((scheme, rest)) if SOCKS.contains(&scheme.to_ascii_lowercase().as_str()) => {
            tracing::warn!("a SOCKS proxy is used for hf:// alone, not for S3");
            check_url(&format!("http://{rest}")).map(drop)
        }
        _ => check_url(&with_scheme).map(drop),
    }
}

/// How to reach the Hugging Face Hub.
pub struct HubSettings {
    /// Its address, without a slash at the end.
    pub endpoint: String,
    /// Who asks, if anybody in particular.
    pub token: Option<String>,
    /// Where downloads are kept for other programs too.
    pub cache: Option<PathBuf>,
    /// How long a connection may bring nothing.
    pub timeout: Duration,
}

impl HubSettings {
    pub(super) fn of_role(environment: &Environment, role: Role) -> Result<Self, String> {
        check_network(environment)?;
        let settings = of_role(environment, role, "HF_");
        let named = |name: &str, check: fn(&str) -> Result<(), String>| match settings.get(name) {
            Some(Setting { value, variable }) => {
                check(value).map_err(|problem| format!("{variable} {problem}")).map(|()| Some(value.as_str()))
            }
            None => Ok(None),
        };
        let endpoint = named("HF_ENDPOINT", |value| check_url(value).map(drop))?.unwrap_or("https://huggingface.co");
        if let Some(Setting { variable, .. }) = settings.get("HF_HUB_OFFLINE").filter(|setting| is_true(&setting.value))
        {
            return Err(format!("{variable} is on: unset it, or name a folder in place of hf://"));
        }
        let seconds = |value: &str| match value.parse::<u32>() {
            Ok(1..) => Ok(()),
            _ => Err(format!("is {value:?}: it must be a whole number of seconds, at least 1")),
        };
        let timeout = named("HF_HUB_DOWNLOAD_TIMEOUT", seconds)?.and_then(|value| value.parse().ok());
        let home = settings.get("HF_HOME").map(|setting| PathBuf::from(&setting.value));
        let cache = settings.get("HF_HUB_CACHE").map(|setting| PathBuf::from(&setting.value));
        let token = match named("HF_TOKEN", check_credential)? {
            Some(token) => Some(token.to_owned()),
            None => home.as_deref().map(token_of_home).transpose()?.flatten(),
        };
        Ok(Self {
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            token,
            cache: cache.or(home.map(|home| home.join("hub"))),
            timeout: Duration::from_secs(timeout.unwrap_or(HUB_TIMEOUT_SECONDS)),
        })
    }
}

/// The token that `hf auth login` left.
fn token_of_home(home: &Path) -> Result<Option<String>, String> {
    let file = home.join("token");
    // None is there, or it is another user's.
    let Ok(token) = fs::read_to_string(&file) else { return Ok(None) };
    match token.trim() {
        "" => Ok(None),
        token => {
            check_credential(token).map_err(|problem| format!("HF_HOME: {} {problem}", file.display()))?;
            Ok(Some(token.to_owned()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn environment(variables: &[(&str, &str)]) -> Environment {
        variables.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect()
    }

    #[test]
    fn a_role_takes_its_own_variables_and_falls_back_to_the_plain_ones() {
        let environment = environment(&[
            ("TUNESMITH_MODEL_AWS_ACCESS_KEY_ID", "model\n"),
            ("TUNESMITH_MODEL_AWS_SECRET_ACCESS_KEY", "m"),
            ("AWS_ACCESS_KEY_ID", "plain"),
            ("AWS_SECRET_ACCESS_KEY", "p"),
            ("AWS_SESSION_TOKEN", "t"),
            ("AWS_REGION", "eu-central-1"),
        ]);
        let model = of_role(&environment, Role::Model, "AWS_");
        assert_eq!(model["AWS_ACCESS_KEY_ID"].value, "model");
        assert_eq!(model["AWS_REGION"].value, "eu-central-1");
        assert!(!model.contains_key("AWS_SESSION_TOKEN"), "another key's token would be refused");
        assert_eq!(of_role(&environment, Role::Output, "AWS_")["AWS_ACCESS_KEY_ID"].value, "plain");
    }

    #[test]
    fn an_environment_names_a_store_by_keys_or_an_endpoint_that_are_not_empty() {
        for (name, value, names) in [
            ("AWS_REGION", "eu-central-1", false),
            ("AWS_PROFILE", "work", false),
            ("AWS_ENDPOINT_URL", " ", false),
            ("MY_AWS_ENDPOINT_URL", "http://h", false),
            ("AWS_ENDPOINT_URL_S3", "http://h", true),
            ("TUNESMITH_OUTPUT_AWS_ENDPOINT_URL", "http://h", true),
            ("AWS_SECRET_ACCESS_KEY", "s", true),
        ] {
            assert_eq!(is_configured(&environment(&[(name, value)])), names, "{name}");
        }
    }

    #[test]
    fn passwords_of_proxies_are_secrets_too() {
        let environment = environment(&[
            ("HTTPS_PROXY", "http://me:pa55@proxy:3128"),
            ("TUNESMITH_DATASET_HF_TOKEN", "hf_x\n"),
            ("AWS_REGION", "eu-central-1"),
        ]);
        assert_eq!(secrets(&environment), ["hf_x", "pa55"]);
    }

    #[test]
    fn a_url_needs_a_scheme_a_host_and_nothing_after_its_path() {
        for sound in ["http://127.0.0.1:9000", "https://s3.example.com/", "http://[::1]:9000", "HTTPS://h/base"] {
            check_url(sound).unwrap();
        }
        for (value, problem) in [
            ("host:9000", "no scheme"),
            ("127.0.0.1:9000", "no scheme"),
            ("localhost", "no scheme"),
            ("http:/host", "no scheme"),
            ("s3://bucket", "must be http or https"),
            ("ftp://host", "must be http or https"),
            ("http://", "no host"),
            ("https:///", "no host"),
            ("http://:9000", "no URL"),
            ("http://host:99999", "no URL"),
            ("http://host:port", "no URL"),
            ("http://a b", "no URL"),
            ("http://hóst", "no URL"),
            ("http://host\nx", "no URL"),
            ("http://host?x=1", "follows the '?'"),
            ("http://host/#x", "follows the '?'"),
        ] {
            let error = check_url(value).unwrap_err();
            assert!(error.contains(problem), "{value}: {error}");
        }
        assert!(!check_url("http://me:pa55@host:port").unwrap_err().contains("pa55"));
    }

    #[test]
    fn settings_of_the_hub_are_checked_and_named() {
        let of_role = |variables: &[(&str, &str)]| HubSettings::of_role(&environment(variables), Role::Dataset);
        for (name, value, problem) in [
            ("HF_ENDPOINT", "hub.example.com", "no scheme"),
            ("TUNESMITH_DATASET_HF_ENDPOINT", "http://", "no host"),
            ("HF_TOKEN", "hf_s3cr3t\nx", "at position 10"),
            ("TUNESMITH_DATASET_HF_TOKEN", "hf_s3cr3t ö", "at position 10"),
            ("HF_HUB_DOWNLOAD_TIMEOUT", "soon", "whole number of seconds"),
            ("HF_HUB_DOWNLOAD_TIMEOUT", "0", "whole number of seconds"),
            ("HF_HUB_OFFLINE", "1", "is on"),
            ("HTTPS_PROXY", "http://", "no host"),
        ] {
            let error = of_role(&[(name, value)]).err().unwrap();
            assert!(error.starts_with(name) && error.contains(problem) && !error.contains("s3cr3t"), "{error}");
        }
        let hub = of_role(&[("HF_TOKEN", "all\n"), ("TUNESMITH_DATASET_HF_TOKEN", "mine"), ("HF_HOME", "/h")]).unwrap();
        assert_eq!((hub.endpoint.as_str(), hub.token.as_deref()), ("https://huggingface.co", Some("mine")));
        assert_eq!(hub.cache.unwrap(), PathBuf::from("/h/hub"));
        assert_eq!(of_role(&[("TUNESMITH_MODEL_HF_TOKEN", "other's")]).unwrap().token, None);
    }

    #[test]
    fn a_proxy_without_a_scheme_is_one_and_another_is_named() {
        for sound in ["proxy:3128", "http://me:pa55@proxy:3128", "socks5h://127.0.0.1:1080"] {
            check_network(&environment(&[("HTTPS_PROXY", sound)])).unwrap();
        }
        for broken in ["http://", "proxy:port", "http://a b", "gopher://x", "socks9://x", "socks5://x:99999"] {
            let error = check_network(&environment(&[("https_proxy", broken)])).unwrap_err();
            assert!(error.starts_with("https_proxy is "), "{error}");
        }
        let error = check_network(&environment(&[("SSL_CERT_FILE", "/etc/passwd")])).unwrap_err();
        assert!(error.contains("SSL_CERT_FILE") && error.contains("no PEM certificate"), "{error}");
        let error = check_network(&environment(&[("SSL_CERT_FILE", "/absent.pem")])).unwrap_err();
        assert!(error.contains("SSL_CERT_FILE names \"/absent.pem\""), "{error}");
    }
}
