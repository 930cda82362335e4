//! The settings of the Hugging Face Hub's own clients.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use super::{
    super::{Environment, Role},
    Family, Setting,
    check::{check_credential, check_network, check_url, is_true},
    of_role,
};

pub(super) const FAMILY: Family = Family { name: "HF_", secret: &["HF_TOKEN"], ..Family::PLAIN };
/// How long the Hub may say nothing.
const TIMEOUT_SECONDS: u64 = 30;

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
    pub(in super::super) fn of_role(environment: &Environment, role: Role) -> Result<Self, String> {
        check_network(environment)?;
        let settings = of_role(environment, role, &FAMILY);
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
            timeout: Duration::from_secs(timeout.unwrap_or(TIMEOUT_SECONDS)),
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

    #[test]
    fn settings_of_the_hub_are_checked_and_named() {
        let of_role =
            |variables: &[(&str, &str)]| HubSettings::of_role(&super::super::environment(variables), Role::Dataset);
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
}
