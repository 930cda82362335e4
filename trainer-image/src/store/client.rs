//! What the HTTP clients of all object stores have in common.

use std::{fs, time::Duration};

use object_store::{Certificate, ClientOptions};

use super::{
    Role,
    settings::{Family, Setting, Settings},
};

/// Options with the timeouts and certificates of every store.
pub(super) fn options(settings: &Settings, family: &Family) -> Result<ClientOptions, String> {
    let mut urls = family.urls.iter().filter_map(|name| settings.get(*name));
    let mut options = ClientOptions::new()
        .with_allow_http(urls.any(|url| is_http(&url.value)))
        .with_connect_timeout(Duration::from_secs(10))
        // A big object may take long; one that stands still may not.
        .with_timeout_disabled()
        .with_read_timeout(Duration::from_secs(60));
    if let Some(file) = settings.get(&family.ca_bundle()) {
        for certificate in certificates(&file.value).map_err(|problem| format!("{} {problem}", file.variable))? {
            options = options.with_root_certificate(certificate);
        }
    }
    Ok(options)
}

/// Whether a server is asked without TLS; an emulator's address may have no scheme.
fn is_http(url: &str) -> bool {
    url.split_once("://").is_none_or(|(scheme, _)| scheme.eq_ignore_ascii_case("http"))
}

/// The PEM certificates of a file.
fn certificates(file: &str) -> Result<Vec<Certificate>, String> {
    let pem = fs::read(file).map_err(|error| format!("names {file:?}, which can't be read: {error}"))?;
    let found = Certificate::from_pem_bundle(&pem).map_err(|error| format!("names {file:?}: {error}"))?;
    match found.is_empty() {
        true => Err(format!("names {file:?}, which holds no PEM certificate")),
        false => Ok(found),
    }
}

/// The settings that a client reads by itself, each under its key.
pub(super) fn known<K: std::str::FromStr>(settings: &Settings) -> impl Iterator<Item = (K, &Setting)> {
    settings.iter().filter_map(|(name, setting)| Some((name.to_ascii_lowercase().parse().ok()?, setting)))
}

/// A client's own words name no variable, so each setting is tried alone beside sound ones. None if each alone is fine.
pub(super) fn culprits<K>(settings: &Settings, try_alone: impl Fn(K, &str) -> Option<String>) -> Option<String>
where
    K: std::str::FromStr,
{
    let problems = known(settings).filter_map(|(key, setting)| {
        let error = try_alone(key, &setting.value)?;
        let is_time = setting.variable.ends_with("TIMEOUT") || setting.variable.ends_with("INTERVAL");
        let unit = if is_time { "; write a number with its unit, such as 60s" } else { "" };
        Some(format!("{} can't be used: {error}{unit}", setting.variable))
    });
    let problems: Vec<String> = problems.collect();
    (!problems.is_empty()).then(|| problems.join("; "))
}

/// A Secret is made for this program, so what of it does nothing may be a slip of the pen.
pub(super) fn warn_of_unknown<K: std::str::FromStr>(settings: &Settings, family: &Family, role: Role) {
    for (name, setting) in settings {
        let is_known = *name == family.ca_bundle()
            || family.ours.contains(&name.as_str())
            || name.to_ascii_lowercase().parse::<K>().is_ok();
        if !is_known && setting.variable.starts_with(role.env_prefix()) {
            tracing::warn!(variable = setting.variable, "no such setting: it is ignored");
        }
    }
}
