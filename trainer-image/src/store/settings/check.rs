//! What a value must be, whichever client reads it.

use std::fs;

use url::Url;

use super::{Environment, Setting, Settings};

/// What begins a certificate in PEM.
const PEM_BEGINS: &str = "-----BEGIN ";
/// Proxies that are no HTTP servers.
const SOCKS: [&str; 5] = ["socks", "socks4", "socks4a", "socks5", "socks5h"];
/// What every HTTP client of this process obeys.
const PROXIES: [&str; 6] = ["HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"];

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

/// A file that is read later, and may be another by then.
pub(super) fn check_file(value: &str) -> Result<(), String> {
    fs::File::open(value).map(drop).map_err(|error| format!("names {value:?}, which can't be read: {error}"))
}

/// An option of the HTTP client, by its name without that of its family. Others are checked for what no header can hold.
pub(super) fn check_option(option: &str, value: &str) -> Result<(), String> {
    let is_zero = || value.bytes().all(|byte| byte == b'0' || byte.is_ascii_alphabetic()) && value.starts_with('0');
    match option {
        "PROXY_URL" => check_proxy(value),
        // PEM has several lines.
        "PROXY_CA_CERTIFICATE" if value.contains(PEM_BEGINS) => Ok(()),
        "PROXY_CA_CERTIFICATE" => Err("holds no PEM certificate".into()),
        "CA_BUNDLE" => check_file(value),
        _ if option.ends_with("TIMEOUT") && is_zero() => {
            Err(format!("is {value:?}, at which every request ends at once; write a time above 0, such as 60s"))
        }
        _ if !value.bytes().all(|byte| byte == b' ' || byte.is_ascii_graphic()) => {
            Err("holds characters that no HTTP header can hold".into())
        }
        _ => Ok(()),
    }
}

/// The one setting that says who asks; none if there is none.
pub(super) fn only_one<'a>(identities: &[&'a Setting]) -> Result<Option<&'a Setting>, String> {
    match identities {
        [] => Ok(None),
        [one] => Ok(Some(one)),
        [one, other, ..] => {
            Err(format!("{} and {} both say who asks: leave one of them", one.variable, other.variable))
        }
    }
}

/// Whether a setting is there and on.
pub(super) fn is_on(settings: &Settings, name: &str) -> bool {
    settings.get(name).is_some_and(|setting| is_true(&setting.value))
}

pub(super) fn is_true(value: &str) -> bool {
    ["1", "true", "on", "yes", "y"].contains(&value.to_ascii_lowercase().as_str())
}

/// A word that is neither on nor off.
pub(super) fn check_switch(value: &str) -> Result<(), String> {
    let is_off = ["0", "false", "off", "no", "n"].contains(&value.to_ascii_lowercase().as_str());
    if is_off || is_true(value) { Ok(()) } else { Err(format!("is {value:?}: write true or false")) }
}

/// Checks the proxies, which the HTTP clients would leave out where they can't be used, and the file of the certificates
/// that they trust.
pub(in super::super) fn check_network(environment: &Environment) -> Result<(), String> {
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
            tracing::warn!("a SOCKS proxy is used for hf:// alone, not for the other stores");
            check_url(&format!("http://{rest}")).map(drop)
        }
        _ => check_url(&with_scheme).map(drop),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn a_proxy_without_a_scheme_is_one_and_another_is_named() {
        for sound in ["proxy:3128", "http://me:pa55@proxy:3128", "socks5h://127.0.0.1:1080"] {
            check_network(&super::super::environment(&[("HTTPS_PROXY", sound)])).unwrap();
        }
        for broken in ["http://", "proxy:port", "http://a b", "gopher://x", "socks9://x", "socks5://x:99999"] {
            let error = check_network(&super::super::environment(&[("https_proxy", broken)])).unwrap_err();
            assert!(error.starts_with("https_proxy is "), "{error}");
        }
        let error = check_network(&super::super::environment(&[("SSL_CERT_FILE", "/etc/passwd")])).unwrap_err();
        assert!(error.contains("SSL_CERT_FILE") && error.contains("no PEM certificate"), "{error}");
        let error = check_network(&super::super::environment(&[("SSL_CERT_FILE", "/absent.pem")])).unwrap_err();
        assert!(error.contains("SSL_CERT_FILE names \"/absent.pem\""), "{error}");
    }
}
