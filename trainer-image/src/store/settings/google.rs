//! The settings of Google Cloud Storage's clients: `GOOGLE_…` and `STORAGE_EMULATOR_HOST`.

use std::fs;

use object_store::gcp::GoogleConfigKey;
use serde_json::{Map, Value};

use super::{
    Family, Setting, Settings,
    check::{check_credential, check_option, check_switch, check_url, is_on, only_one},
};

/// A test's server, as Google's own clients name it: nobody in particular asks there.
const EMULATOR: &str = "STORAGE_EMULATOR_HOST";
const BASE_URL: &str = "GOOGLE_BASE_URL";
const KEY: &str = "GOOGLE_SERVICE_ACCOUNT_KEY";
/// A file of a service account's key.
const KEY_FILE: &str = "GOOGLE_SERVICE_ACCOUNT";
/// A file of credentials of any kind.
const CREDENTIALS: &str = "GOOGLE_APPLICATION_CREDENTIALS";
const TOKEN: &str = "GOOGLE_BEARER_TOKEN";
const SKIP_SIGNATURE: &str = "GOOGLE_SKIP_SIGNATURE";
/// Lets the metadata service say who asks: on GKE the pod's ServiceAccount, elsewhere the node.
const METADATA: &str = "GOOGLE_USE_METADATA_SERVER";

/// What clients of Google Cloud Storage read.
pub(in super::super) const FAMILY: Family = Family {
    name: "GOOGLE_",
    foreign: EMULATOR,
    aliases: &[("GOOGLE_SERVICE_ACCOUNT_PATH", KEY_FILE)],
    together: &[&[KEY, KEY_FILE, CREDENTIALS, TOKEN, SKIP_SIGNATURE, METADATA], &[EMULATOR, BASE_URL]],
    secret: &[KEY, TOKEN],
    decisive: &[KEY, KEY_FILE, CREDENTIALS, TOKEN, SKIP_SIGNATURE, METADATA, EMULATOR, BASE_URL],
    urls: &[EMULATOR, BASE_URL],
    ours: &[METADATA, EMULATOR],
    ..Family::PLAIN
};

/// Who asks, and where.
#[derive(Debug, PartialEq, Eq)]
pub(in super::super) struct Access {
    /// Whether requests carry nobody's name.
    pub(in super::super) is_anonymous: bool,
    /// The server, where it is not Google's.
    pub(in super::super) base_url: Option<String>,
}

/// Checks what a client would stumble over, or ignore.
pub(in super::super) fn check(settings: &Settings) -> Result<Access, String> {
    for (name, setting) in settings {
        check_one(name, setting).map_err(|problem| format!("{} {problem}", setting.variable))?;
    }
    if let Some(emulator) = settings.get(EMULATOR) {
        return Ok(Access { is_anonymous: true, base_url: Some(with_scheme(&emulator.value)) });
    }
    let base_url = settings.get(BASE_URL).map(|url| url.value.trim_end_matches('/').to_owned());
    let is_switch = |name: &str| [SKIP_SIGNATURE, METADATA].contains(&name);
    let says_who = |name: &str| !is_switch(name) || is_on(settings, name);
    let identities = [KEY, KEY_FILE, CREDENTIALS, TOKEN, SKIP_SIGNATURE, METADATA].into_iter();
    let identities: Vec<&Setting> =
        identities.filter(|name| says_who(name)).filter_map(|name| settings.get(name)).collect();
    match only_one(&identities)? {
        Some(_) => Ok(Access { is_anonymous: is_on(settings, SKIP_SIGNATURE), base_url }),
        // The client would ask the metadata service, and be what the node is. Nobody means that by leaving something out.
        None => Err(format!(
            "nothing says who asks: set {KEY} to the JSON key of a service account, or {CREDENTIALS} to a file of \
             credentials; or {SKIP_SIGNATURE}=true for a bucket that is open to all, or {METADATA}=true to be what the \
             metadata server says, on GKE the pod's ServiceAccount, elsewhere the node"
        )),
    }
}

fn check_one(name: &str, Setting { value, .. }: &Setting) -> Result<(), String> {
    match name {
        EMULATOR => check_url(&with_scheme(value)).map(drop),
        BASE_URL => check_url(value).map(drop),
        TOKEN => check_credential(value),
        KEY => check_key(value, &["service_account"]),
        KEY_FILE => check_key_file(value, &["service_account"]),
        CREDENTIALS => check_key_file(value, &["service_account", "authorized_user"]),
        SKIP_SIGNATURE | METADATA => check_switch(value),
        _ if name == FAMILY.ca_bundle() || name.to_ascii_lowercase().parse::<GoogleConfigKey>().is_ok() => {
            check_option(&name[FAMILY.name.len()..], value)
        }
        _ => Ok(()),
    }
}

/// Google's own clients take `host:port` too.
fn with_scheme(emulator: &str) -> String {
    let url = if emulator.contains("://") { emulator.to_owned() } else { format!("http://{emulator}") };
    url.trim_end_matches('/').to_owned()
}

fn check_key_file(path: &str, types: &[&str]) -> Result<(), String> {
    let json = fs::read_to_string(path).map_err(|error| format!("names {path:?}, which can't be read: {error}"))?;
    check_key(&json, types).map_err(|problem| format!("names {path:?}, which {problem}"))
}

/// Credentials in JSON, of which no message shows anything.
fn check_key(json: &str, types: &[&str]) -> Result<(), String> {
    let fields: Map<String, Value> = serde_json::from_str(json).map_err(|error| {
        format!(
            "holds no JSON object (line {}, column {}): it must be a key as Google Cloud's console downloads it",
            error.line(),
            error.column()
        )
    })?;
    let found = fields.get("type").and_then(Value::as_str).unwrap_or("service_account");
    if !types.contains(&found) {
        let shown = if found.chars().all(|c| c.is_ascii_lowercase() || c == '_') { found } else { "another" };
        return Err(format!(
            "holds credentials of the type {shown}; only {} is read here: make a key of a service account, or on GKE set \
             {METADATA}=true",
            types.join(" or ")
        ));
    }
    let needed: &[&str] = match found {
        "authorized_user" => &["client_id", "client_secret", "refresh_token"],
        _ => &["private_key", "private_key_id", "client_email"],
    };
    match needed.iter().find(|name| !fields.get(**name).is_some_and(Value::is_string)) {
        Some(name) => {
            Err(format!("holds no text named {name}: it must be a key as Google Cloud's console downloads it"))
        }
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{super::Role, environment, of_role},
        *,
    };

    const SOUND: &str =
        r#"{"type": "service_account", "private_key": "p", "private_key_id": "i", "client_email": "e"}"#;

    fn check_with(variables: &[(&str, &str)]) -> Result<Access, String> {
        check(&of_role(&environment(variables), Role::Model, &FAMILY))
    }

    #[test]
    fn the_metadata_server_is_asked_only_if_that_is_said() {
        for silent in [&[][..], &[(METADATA, "false")], &[(SKIP_SIGNATURE, "false")], &[(BASE_URL, "https://h")]] {
            let error = check_with(silent).unwrap_err();
            assert!(error.contains(KEY) && error.contains("GOOGLE_USE_METADATA_SERVER=true"), "{error}");
        }
        assert!(!check_with(&[(METADATA, "true")]).unwrap().is_anonymous);
        assert!(check_with(&[(SKIP_SIGNATURE, "true")]).unwrap().is_anonymous);
    }

    #[test]
    fn two_identities_are_refused_but_a_roles_own_goes_before_the_environments() {
        let error = check_with(&[(KEY, SOUND), (METADATA, "true")]).unwrap_err();
        assert!(error.contains(KEY) && error.contains(METADATA) && error.contains("leave one"), "{error}");
        let own = format!("TUNESMITH_MODEL_{KEY}");
        let settings = of_role(&environment(&[(&own, SOUND), (CREDENTIALS, "/absent")]), Role::Model, &FAMILY);
        check(&settings).unwrap();
        assert!(!settings.contains_key(CREDENTIALS));
    }

    #[test]
    fn nobody_asks_an_emulator_and_its_address_needs_no_scheme() {
        for (value, url) in [("127.0.0.1:4443", "http://127.0.0.1:4443"), ("https://h:1/", "https://h:1")] {
            // A key is for Google, not for a test's server.
            let access = check_with(&[(EMULATOR, value), (KEY, SOUND)]).unwrap();
            assert_eq!(access, Access { is_anonymous: true, base_url: Some(url.into()) });
        }
        let error = check_with(&[(EMULATOR, "ftp://h")]).unwrap_err();
        assert!(error.starts_with(EMULATOR) && error.contains("http or https"), "{error}");
    }

    #[test]
    fn a_key_that_is_none_is_named_and_not_shown() {
        for (value, problem) in [
            ("s3cr3t", "holds no JSON object (line 1, column 1)"),
            (r#""s3cr3t""#, "holds no JSON object"),
            (r#"{"private_key": "s3cr3t""#, "holds no JSON object"),
            (r#"{"private_key": "s3cr3t", "private_key_id": "i"}"#, "holds no text named client_email"),
            (r#"{"private_key": ["s3cr3t"]}"#, "holds no text named private_key"),
            (r#"{"type": "external_account", "x": "s3cr3t"}"#, "of the type external_account"),
            (r#"{"type": "authorized_user", "refresh_token": "s3cr3t"}"#, "of the type authorized_user"),
            (r#"{"type": "s3cr3t"}"#, "of the type another"),
        ] {
            let error = check_with(&[("TUNESMITH_MODEL_GOOGLE_SERVICE_ACCOUNT_KEY", value)]).unwrap_err();
            assert!(error.starts_with("TUNESMITH_MODEL_GOOGLE_SERVICE_ACCOUNT_KEY "), "{error}");
            assert!(error.contains(problem) && !error.contains("s3cr3t"), "{error}");
        }
    }

    #[test]
    fn a_file_of_credentials_may_be_a_persons() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let path = file.path().to_str().unwrap();
        fs::write(path, r#"{"type": "authorized_user", "client_id": "i", "client_secret": "s", "refresh_token": "t"}"#)
            .unwrap();
        check_with(&[(CREDENTIALS, path)]).unwrap();
        for name in [KEY_FILE, "GOOGLE_SERVICE_ACCOUNT_PATH"] {
            let error = check_with(&[(name, path)]).unwrap_err();
            assert!(error.starts_with(name) && error.contains(path) && error.contains("authorized_user"), "{error}");
        }
        let error = check_with(&[(CREDENTIALS, "/absent.json")]).unwrap_err();
        assert!(error.contains("names \"/absent.json\", which can't be read"), "{error}");
    }
}
