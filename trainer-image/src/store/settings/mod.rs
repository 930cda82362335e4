//! The settings of a store from environment variables, parsed before a client sees them: some libraries end the process
//! over a value that they can't use.

pub(super) mod aws;
pub(super) mod azure;
mod check;
pub(super) mod google;
mod hub;

use std::collections::BTreeMap;

pub(super) use check::check_network;
pub use hub::HubSettings;
use percent_encoding::percent_decode_str;
use tunesmith_crds::Cloud;

use super::{Environment, Role};

/// The variables of one kind of client.
pub(super) struct Family {
    /// What their names begin with.
    pub(super) name: &'static str,
    /// A variable of the family whose name begins otherwise.
    foreign: &'static str,
    /// Further names of a variable, each before the one that is meant.
    aliases: &'static [(&'static str, &'static str)],
    /// Variables that only make sense together: all of them come with a role's prefix, or none.
    together: &'static [&'static [&'static str]],
    /// A variable that replaces others if it comes with a role's prefix and they without.
    replaces: &'static [(&'static str, &'static [&'static str])],
    /// What no message may show.
    secret: &'static [&'static str],
    /// Any of these names a store.
    decisive: &'static [&'static str],
    /// Addresses of servers.
    pub(super) urls: &'static [&'static str],
    /// What this program reads and its HTTP client does not know.
    pub(super) ours: &'static [&'static str],
}

impl Family {
    const PLAIN: Self = Self {
        name: "",
        foreign: "",
        aliases: &[],
        together: &[],
        replaces: &[],
        secret: &[],
        decisive: &[],
        urls: &[],
        ours: &[],
    };

    /// The variables of a kind of store.
    pub(super) fn of(cloud: Cloud) -> &'static Self {
        match cloud {
            Cloud::S3 => &aws::FAMILY,
            Cloud::Google => &google::FAMILY,
            Cloud::Azure => &azure::FAMILY,
        }
    }

    /// The name that is meant by a variable's name without a role's prefix; none if it is of another family.
    fn canonical<'a>(&self, name: &'a str) -> Option<&'a str> {
        let is_ours = name.starts_with(self.name) || name == self.foreign;
        let alias = self.aliases.iter().find(|(alias, _)| *alias == name);
        is_ours.then(|| alias.map_or(name, |(_, meant)| meant))
    }

    /// The name of the file of certificates to trust besides the system's.
    pub(super) fn ca_bundle(&self) -> String {
        format!("{}CA_BUNDLE", self.name)
    }
}

/// A setting and the variable that it comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Setting {
    pub(super) value: String,
    pub(super) variable: String,
}

/// Settings by their names without a role's prefix.
pub(super) type Settings = BTreeMap<String, Setting>;

/// Whether the environment names a store of a kind for any role.
pub(super) fn is_configured(environment: &Environment, cloud: Cloud) -> bool {
    let family = Family::of(cloud);
    let names = |name: &str| family.canonical(plain(name)).is_some_and(|name| family.decisive.contains(&name));
    environment.iter().any(|(name, value)| names(name) && !value.trim().is_empty())
}

/// The variable that sends AWS's own tools to a file of keys, if there is one.
pub(super) fn profile(environment: &Environment) -> Option<&str> {
    aws::PROFILE.into_iter().find(|name| environment.get(*name).is_some_and(|value| !value.trim().is_empty()))
}

/// Values that no message may show.
pub(super) fn secrets(environment: &Environment) -> Vec<String> {
    let families = [&aws::FAMILY, &google::FAMILY, &azure::FAMILY, &hub::FAMILY];
    let is_secret = |name: &str| {
        families.iter().any(|family| family.canonical(plain(name)).is_some_and(|name| family.secret.contains(&name)))
    };
    let secret = |(name, value): (&String, &String)| {
        let value = value.trim();
        (is_secret(name) && !value.is_empty()).then(|| secret_parts(value))
    };
    // A proxy's password, or one that is written into an endpoint.
    let password = |value: &String| {
        let (_, rest) = value.split_once("://")?;
        let (userinfo, _) = rest.rsplit_once('@')?;
        let password = userinfo.split_once(':').map_or(userinfo, |(_, password)| password);
        (!password.is_empty()).then(|| password.to_owned())
    };
    environment.iter().filter_map(secret).flatten().chain(environment.values().filter_map(password)).collect()
}

/// A secret, and what of it may be shown alone: the signature of a query, the keys of a JSON object.
fn secret_parts(value: &str) -> Vec<String> {
    let signatures = value.trim_start_matches('?').split('&').filter_map(|pair| pair.strip_prefix("sig="));
    let decoded = signatures.clone().map(|signature| percent_decode_str(signature).decode_utf8_lossy().into_owned());
    let json: serde_json::Map<String, serde_json::Value> = serde_json::from_str(value).unwrap_or_default();
    let is_secret = |name: &str| ["private_key", "client_secret", "refresh_token"].contains(&name);
    let fields = json.iter().filter(|(name, _)| is_secret(name)).filter_map(|(_, field)| field.as_str());
    let parts = fields.chain(signatures).map(str::to_owned).chain(decoded);
    [value.to_owned()].into_iter().chain(parts.filter(|part| !part.is_empty())).collect()
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
    Role::ALL.iter().find_map(|role| name.strip_prefix(role.env_prefix())).unwrap_or(name)
}

/// The variables of a role; those without its prefix are the fallback. Values are trimmed: Secrets made from files end in a
/// newline.
pub(super) fn of_role(environment: &Environment, role: Role, family: &Family) -> Settings {
    let named = |prefix: &str| -> Settings {
        let set = environment.iter().filter_map(|(variable, value)| {
            let (name, value) = (family.canonical(variable.strip_prefix(prefix)?)?, value.trim());
            let setting = || Setting { value: value.to_owned(), variable: variable.clone() };
            (!value.is_empty()).then(|| (name.to_owned(), setting()))
        });
        set.collect()
    };
    let own = named(role.env_prefix());
    let mut settings = named("");
    for together in family.together {
        if together.iter().any(|name| own.contains_key(*name)) {
            settings.retain(|name, _| !together.contains(&name.as_str()));
        }
    }
    for (_, replaced) in family.replaces.iter().filter(|(name, _)| own.contains_key(*name)) {
        settings.retain(|name, _| !replaced.contains(&name.as_str()));
    }
    settings.extend(own);
    settings
}

/// An environment of a test.
#[cfg(test)]
pub(super) fn environment(variables: &[(&str, &str)]) -> Environment {
    variables.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

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
        let model = of_role(&environment, Role::Model, &aws::FAMILY);
        assert_eq!(model["AWS_ACCESS_KEY_ID"].value, "model");
        assert_eq!(model["AWS_REGION"].value, "eu-central-1");
        assert!(!model.contains_key("AWS_SESSION_TOKEN"), "another key's token would be refused");
        assert_eq!(of_role(&environment, Role::Output, &aws::FAMILY)["AWS_ACCESS_KEY_ID"].value, "plain");
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
            assert_eq!(is_configured(&environment(&[(name, value)]), Cloud::S3), names, "{name}");
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
}
