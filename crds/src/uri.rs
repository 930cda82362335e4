//! Where models, data and adapters live: a URI is parsed once, then carried as a type.

use std::{borrow::Cow, fmt, str::FromStr};

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

/// The shape that the CRD demands of every URI field; [`Uri::from_str`] accepts exactly these strings.
pub const PATTERN: &str = r"^(s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[^\s?#]*)?|file:///?[^\s?#]+)$";

/// An object or a folder in an object store.
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
    /// `file://path`: absolute (`file:///data`) or relative to the working directory (`file://data`).
    File {
        /// The path, without a trailing slash.
        path: String,
    },
}

/// Why a string is not a [`Uri`].
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("`{0}` is not a URI that Tunesmith knows: use s3://bucket/key or file:///path")]
pub struct UriError(String);

impl Uri {
    /// The object or folder `name` inside this one.
    pub fn join(&self, name: &str) -> Self {
        match self {
            Self::S3 { bucket, key } if key.is_empty() => Self::S3 { bucket: bucket.clone(), key: name.into() },
            Self::S3 { bucket, key } => Self::S3 { bucket: bucket.clone(), key: format!("{key}/{name}") },
            Self::File { path } => Self::File { path: format!("{path}/{name}") },
        }
    }

    /// For a URI with `*`: the folder above the first part that has one, and the pattern of what is meant below it.
    pub fn split_pattern(&self) -> Option<(Self, &str)> {
        let (Self::S3 { key: path, .. } | Self::File { path }) = self;
        let (folder, pattern) = match path[..path.find('*')?].rsplit_once('/') {
            Some((folder, _)) => (folder, &path[folder.len() + 1..]),
            None => ("", path.as_str()),
        };
        let folder = match self {
            Self::S3 { bucket, .. } => Self::S3 { bucket: bucket.clone(), key: folder.into() },
            Self::File { path } if folder.is_empty() => {
                Self::File { path: if path.starts_with('/') { "/" } else { "." }.into() }
            }
            Self::File { .. } => Self::File { path: folder.into() },
        };
        Some((folder, pattern))
    }

    /// The last part of the path: an object's own name.
    pub fn file_name(&self) -> &str {
        let (Self::S3 { key: path, .. } | Self::File { path }) = self;
        path.rsplit('/').next().unwrap_or(path)
    }
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
        match text.strip_prefix("file://") {
            Some(path) if path.chars().any(|c| c != '/') => Ok(Self::File { path: path.trim_end_matches('/').into() }),
            _ => Err(refuse()),
        }
    }
}

impl fmt::Display for Uri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::S3 { bucket, key } if key.is_empty() => write!(f, "s3://{bucket}"),
            Self::S3 { bucket, key } => write!(f, "s3://{bucket}/{key}"),
            Self::File { path } => write!(f, "file://{path}"),
        }
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
                "rule": format!("self.matches(r'{PATTERN}')"),
                "message": "must be s3://bucket/key or file:///path",
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
