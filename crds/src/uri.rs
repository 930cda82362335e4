//! Where models, data and adapters live: a URI is parsed once, then carried as a type.

use std::{borrow::Cow, fmt, str::FromStr};

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

/// The shape that the CRD demands of every URI field; [`Uri::from_str`] accepts exactly these strings, less those of
/// [`DOTS`].
pub const PATTERN: &str = concat!(
    r"^(s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[^\s?#]*)?",
    r"|hf://[A-Za-z0-9_][A-Za-z0-9_.-]*/[A-Za-z0-9_][A-Za-z0-9_.-]*(@[A-Za-z0-9_.%-]+)?(/[^\s?#]*)?",
    r"|pvc://[a-z0-9]([-a-z0-9.]*[a-z0-9])?(/[^\s?#]*)?",
    r"|file:///?[^\s?#]+)$"
);

/// What leads out of a repository or a volume.
pub const DOTS: &str = r"^(hf|pvc)://[^/]+(/.*)?/\.\.?(/.*)?$";

/// A file or a folder of an object store, of a volume or of the Hugging Face Hub.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Uri {
    /// `s3://bucket/key`; the key is empty or has no leading and no trailing slash.
    S3 {
        /// Bucket name.
        bucket: String,
        /// Key of an object, or the prefix of a folder.
        key: String,
    },
    /// `hf://owner/name`, `hf://owner/name@revision`, `hf://owner/name/file.gguf`: a model repository of the Hugging Face
    /// Hub, in the words of its own clients.
    Hub {
        /// `owner/name`.
        repo: String,
        /// A branch, tag or commit; `%2F` stands for a slash in it. Without one, the default branch.
        revision: Option<String>,
        /// A file of the repository; empty for all of it.
        path: String,
    },
    /// `pvc://claim/path`: in the volume of a PersistentVolumeClaim of the job's namespace.
    Claim {
        /// Name of the claim.
        claim: String,
        /// The path in its volume; empty for all of it.
        path: String,
    },
    /// `file://path`: absolute (`file:///data`) or relative to the working directory (`file://data`).
    File {
        /// The path, without a trailing slash.
        path: String,
    },
}

/// Why a string is not a [`Uri`].
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "`{0}` is not a URI that Tunesmith knows: use s3://bucket/key, hf://owner/name, pvc://claim/path or file:///path"
)]
pub struct UriError(String);

impl Uri {
    /// The object or folder `name` inside this one.
    pub fn join(&self, name: &str) -> Self {
        match self {
            Self::S3 { bucket, key } => Self::S3 { bucket: bucket.clone(), key: below(key, name) },
            Self::Hub { repo, revision, path } => {
                Self::Hub { repo: repo.clone(), revision: revision.clone(), path: below(path, name) }
            }
            Self::Claim { claim, path } => Self::Claim { claim: claim.clone(), path: below(path, name) },
            Self::File { path } => Self::File { path: format!("{path}/{name}") },
        }
    }

    /// What Hugging Face's tools find the model by: a repository's own name, else the URI; and the repository's revision.
    pub fn model_name(&self) -> (String, Option<&str>) {
        match self {
            Self::Hub { repo, revision, path } if path.is_empty() => (repo.clone(), revision.as_deref()),
            _ => (self.to_string(), None),
        }
    }

    /// The PersistentVolumeClaim that it lies in.
    pub fn claim(&self) -> Option<&str> {
        match self {
            Self::Claim { claim, .. } => Some(claim),
            _ => None,
        }
    }

    /// The path in a bucket, repository, volume or file system.
    fn path(&self) -> &str {
        let (Self::S3 { key: path, .. } | Self::Hub { path, .. } | Self::Claim { path, .. } | Self::File { path }) =
            self;
        path
    }

    /// The same with another path, which is not empty for a file.
    fn with_path(&self, path: &str) -> Self {
        let mut uri = self.clone();
        let (Self::S3 { key: at, .. }
        | Self::Hub { path: at, .. }
        | Self::Claim { path: at, .. }
        | Self::File { path: at }) = &mut uri;
        *at = path.into();
        uri
    }

    /// For a URI with `*`: the folder above the first part that has one, and the pattern of what is meant below it.
    pub fn split_pattern(&self) -> Option<(Self, &str)> {
        let path = self.path();
        let (folder, pattern) = match path[..path.find('*')?].rsplit_once('/') {
            Some((folder, _)) => (folder, &path[folder.len() + 1..]),
            None => ("", path),
        };
        let folder = match self {
            Self::File { path } if folder.is_empty() => {
                if path.starts_with('/') {
                    "/"
                } else {
                    "."
                }
            }
            _ => folder,
        };
        Some((self.with_path(folder), pattern))
    }

    /// The last part of the path: an object's own name.
    pub fn file_name(&self) -> &str {
        self.path().rsplit('/').next().unwrap_or_default()
    }
}

fn below(folder: &str, name: &str) -> String {
    if folder.is_empty() { name.into() } else { format!("{folder}/{name}") }
}

impl FromStr for Uri {
    type Err = UriError;

    fn from_str(text: &str) -> Result<Self, UriError> {
        let refuse = || UriError(text.to_owned());
        if text.chars().any(|c| c.is_whitespace() || c == '?' || c == '#') {
            return Err(refuse());
        }
        if let Some(rest) = text.strip_prefix("s3://") {
            let (bucket, key) = rest.split_once('/').unwrap_or((rest, ""));
            let alnum = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
            let sound = (3..=63).contains(&bucket.len())
                && bucket.chars().all(|c| alnum(c) || c == '.' || c == '-')
                && bucket.starts_with(alnum)
                && bucket.ends_with(alnum);
            return match sound {
                true => Ok(Self::S3 { bucket: bucket.into(), key: key.trim_matches('/').into() }),
                false => Err(refuse()),
            };
        }
        if let Some(rest) = text.strip_prefix("hf://") {
            return hub(rest).ok_or_else(refuse);
        }
        if let Some(rest) = text.strip_prefix("pvc://") {
            return claim(rest).ok_or_else(refuse);
        }
        match text.strip_prefix("file://") {
            Some(path) if path.chars().any(|c| c != '/') => Ok(Self::File { path: path.trim_end_matches('/').into() }),
            _ => Err(refuse()),
        }
    }
}

/// `owner/name[@revision][/path]`.
fn hub(text: &str) -> Option<Uri> {
    let word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let sound = |name: &str| name.starts_with(word) && name.chars().all(|c| word(c) || c == '.' || c == '-');
    let (owner, rest) = text.split_once('/')?;
    let (name, path) = rest.split_once('/').unwrap_or((rest, ""));
    let (name, revision) = name.split_once('@').map_or((name, None), |(name, revision)| (name, Some(revision)));
    let revision_is_sound =
        |revision: &str| !revision.is_empty() && revision.chars().all(|c| word(c) || c == '.' || c == '-' || c == '%');
    let is_sound = sound(owner) && sound(name) && revision.is_none_or(revision_is_sound) && stays_inside(path);
    is_sound.then(|| Uri::Hub {
        repo: format!("{owner}/{name}"),
        revision: revision.map(str::to_owned),
        path: path.trim_matches('/').into(),
    })
}

/// `claim[/path]`.
fn claim(text: &str) -> Option<Uri> {
    let (claim, path) = text.split_once('/').unwrap_or((text, ""));
    let alnum = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    let is_sound = claim.starts_with(alnum)
        && claim.ends_with(alnum)
        && claim.chars().all(|c| alnum(c) || c == '.' || c == '-')
        && stays_inside(path);
    is_sound.then(|| Uri::Claim { claim: claim.into(), path: path.trim_matches('/').into() })
}

fn stays_inside(path: &str) -> bool {
    path.split('/').all(|part| part != "." && part != "..")
}

impl fmt::Display for Uri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::S3 { bucket, .. } => write!(f, "s3://{bucket}")?,
            Self::Hub { repo, revision: None, .. } => write!(f, "hf://{repo}")?,
            Self::Hub { repo, revision: Some(revision), .. } => write!(f, "hf://{repo}@{revision}")?,
            Self::Claim { claim, .. } => write!(f, "pvc://{claim}")?,
            Self::File { .. } => f.write_str("file://")?,
        }
        let separator = if self.path().is_empty() || matches!(self, Self::File { .. }) { "" } else { "/" };
        write!(f, "{separator}{}", self.path())
    }
}

impl TryFrom<String> for Uri {
    type Error = UriError;

    fn try_from(text: String) -> Result<Self, UriError> {
        text.parse()
    }
}

impl From<Uri> for String {
    fn from(uri: Uri) -> Self {
        uri.to_string()
    }
}

impl JsonSchema for Uri {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "Uri".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "string",
            "maxLength": 1024,
            "x-kubernetes-validations": [{
                "rule": format!("self.matches(r'{PATTERN}') && !self.matches(r'{DOTS}')"),
                "message": "must be s3://bucket/key, hf://owner/name, pvc://claim/path or file:///path",
            }],
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn slashes_at_the_end_do_not_matter() {
        let uri: Uri = "s3://models/llama-2-7b/".parse().unwrap();
        assert_eq!(uri.to_string(), "s3://models/llama-2-7b");
        assert_eq!(uri.join("config.json").to_string(), "s3://models/llama-2-7b/config.json");
        assert_eq!("s3://models".parse::<Uri>().unwrap().join("a").to_string(), "s3://models/a");
        assert_eq!("file:///data/m/".parse::<Uri>().unwrap().file_name(), "m");
    }

    #[test]
    fn repositories_and_volumes_have_their_parts() {
        let hub = |repo: &str, revision: Option<&str>, path: &str| Uri::Hub {
            repo: repo.into(),
            revision: revision.map(Into::into),
            path: path.into(),
        };
        let claim = |claim: &str, path: &str| Uri::Claim { claim: claim.into(), path: path.into() };
        for (text, uri) in [
            ("hf://HuggingFaceTB/SmolLM2-135M-Instruct", hub("HuggingFaceTB/SmolLM2-135M-Instruct", None, "")),
            ("hf://a/b@v1.0", hub("a/b", Some("v1.0"), "")),
            ("hf://a/b@refs%2Fpr%2F1/m.gguf", hub("a/b", Some("refs%2Fpr%2F1"), "m.gguf")),
            ("pvc://models/llama/8b", claim("models", "llama/8b")),
            ("pvc://models", claim("models", "")),
        ] {
            assert_eq!(text.parse::<Uri>().unwrap(), uri);
            assert_eq!(uri.to_string(), text);
            assert_eq!(uri.join("config.json").file_name(), "config.json");
        }
        let name = |text: &str| text.parse::<Uri>().unwrap().model_name().0;
        assert_eq!((name("hf://a/b@v1.0"), name("pvc://models")), ("a/b".into(), "pvc://models".into()));
        assert_eq!("pvc://models/".parse::<Uri>().unwrap().join("m").to_string(), "pvc://models/m");
    }

    #[test]
    fn the_schema_and_the_parser_agree() {
        let matches = |pattern: &str, text: &str| regex::Regex::new(pattern).unwrap().is_match(text);
        for text in [
            "s3://models/llama",
            "s3://a",
            "hf://a/b",
            "hf://a/b@main/c.gguf",
            "hf://a",
            "hf://a/b@",
            "hf://a/b/..",
            "hf://a/b/./c",
            "hf://a/..b",
            "hf://a/b/..c",
            "hf://-a/b",
            "pvc://c",
            "pvc://c/",
            "pvc://c/..",
            "pvc://c/a/../b",
            "pvc://-c",
            "pvc://c-/x",
            "pvc://c/.hidden",
            "file://x",
            "file:///x/../y",
            "file://",
            "ftp://x/y",
        ] {
            let accepted = matches(PATTERN, text) && !matches(DOTS, text);
            assert_eq!(accepted, text.parse::<Uri>().is_ok(), "{text}");
        }
    }

    #[test]
    fn a_pattern_is_split_from_the_folder_above_it() {
        for (uri, folder, pattern) in [
            ("s3://datasets/support/part-*.jsonl", "s3://datasets/support", "part-*.jsonl"),
            ("s3://datasets/*/train-*.parquet", "s3://datasets", "*/train-*.parquet"),
            ("s3://datasets/v*/train.jsonl", "s3://datasets", "v*/train.jsonl"),
            ("file:///data/*.jsonl", "file:///data", "*.jsonl"),
            ("file:///*.jsonl", "file:///", "*.jsonl"),
            ("file://*.jsonl", "file://.", "*.jsonl"),
        ] {
            let uri: Uri = uri.parse().unwrap();
            let (found, rest) = uri.split_pattern().unwrap();
            assert_eq!((found.to_string().as_str(), rest), (folder, pattern));
        }
        assert_eq!("s3://datasets/train.jsonl".parse::<Uri>().unwrap().split_pattern(), None);
    }

    #[test]
    fn what_is_no_uri_is_refused_with_advice() {
        for text in [
            "",
            "models/llama",
            "s3:/models",
            "s3://",
            "s3://UPPER/x",
            "s3://a",
            "http://h/x",
            "file://",
            "s3://models/a b",
            "hf://gpt2",
            "hf://owner/name@",
            "hf://owner/name/../other",
            "hf:///name",
            "pvc://Claim/m",
            "pvc://claim/../../etc",
            "pvc://",
        ] {
            let error = text.parse::<Uri>().unwrap_err();
            assert!(error.to_string().contains("s3://bucket/key"), "{text}: {error}");
        }
    }

    proptest! {
        #[test]
        fn display_and_parse_are_inverse(bucket in "[a-z0-9][a-z0-9-]{1,20}[a-z0-9]", key in "([a-zA-Z0-9._-]{1,8}(/[a-zA-Z0-9._-]{1,8}){0,3})?") {
            let uri = Uri::S3 { bucket, key };
            prop_assert_eq!(uri.to_string().parse::<Uri>().unwrap(), uri);
        }
    }
}
