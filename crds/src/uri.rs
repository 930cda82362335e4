//! Where models, data and adapters live: a URI is parsed once, then carried as a type.

#[cfg(test)]
mod tests;

use std::{borrow::Cow, fmt, str::FromStr};

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

/// A path without the slashes around it: any characters, a space only inside, no other white space and nothing that
/// controls a terminal. `?`, `#`, `%` and `+` stand for themselves, as in the names of objects and files.
macro_rules! path {
    () => {
        r"[^\p{Z}\p{Cc}/](([^\p{Z}\p{Cc}]| )*[^\p{Z}\p{Cc}/])?"
    };
}

/// A path that may be left out.
macro_rules! optional_path {
    () => {
        concat!("(/+(", path!(), "/*)?)?")
    };
}

/// A repository of the Hub, and what may follow its name.
macro_rules! repository {
    () => {
        concat!("[A-Za-z0-9_][A-Za-z0-9_.-]*/[A-Za-z0-9_][A-Za-z0-9_.-]*(@[A-Za-z0-9_.%-]+)?", optional_path!())
    };
}

/// The shape that the CRD demands of a URI, unless it begins as [`DATASETS`] do. A regular expression of RE2, where `\s`
/// is ASCII's white space alone.
const PATTERN: &str = concat!(
    "^((s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]|gs://[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]|az://[a-z0-9][a-z0-9-]{1,61}[a-z0-9]",
    "|pvc://[a-z0-9]([-a-z0-9.]*[a-z0-9])?)",
    optional_path!(),
    "|hf://",
    repository!(),
    "|file:///*",
    path!(),
    "/*)$"
);

/// The beginning of a data set on the Hub.
const DATASETS: &str = "hf://datasets/";

/// The shape that the CRD demands of a data set on the Hub.
const DATASET_PATTERN: &str = concat!("^hf://datasets/", repository!(), "$");

/// Parts of a path that lead out of a bucket, a repository or a volume.
const DOTS: &str = r"^(s3|gs|az|hf|pvc)://[^/]+(/.*)?/\.\.?(/.*)?$";

/// The message of the CEL rule.
const MESSAGE: &str =
    "must be s3://bucket/key, gs://bucket/key, az://container/key, hf://owner/name, pvc://claim/path or file:///path";

/// The CEL rule of every URI field; [`Uri::from_str`] accepts exactly these strings.
fn rule() -> String {
    format!(
        "(self.startsWith('{DATASETS}') ? self.matches(r'{DATASET_PATTERN}') : self.matches(r'{PATTERN}')) && \
         !self.matches(r'{DOTS}')"
    )
}

/// A kind of object store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Cloud {
    /// Amazon S3, and every store that speaks its protocol.
    S3,
    /// Google Cloud Storage.
    Google,
    /// Azure Blob Storage.
    Azure,
}

impl Cloud {
    /// Every kind.
    pub const ALL: [Self; 3] = [Self::S3, Self::Google, Self::Azure];

    /// The scheme of its URIs, as its own tools and fsspec write it.
    pub fn scheme(self) -> &'static str {
        match self {
            Self::S3 => "s3",
            Self::Google => "gs",
            Self::Azure => "az",
        }
    }

    /// The most characters of a bucket's name, and those that it may have besides lower-case letters and digits.
    fn bucket_names(self) -> (usize, &'static [char]) {
        match self {
            Self::S3 => (63, &['.', '-']),
            Self::Google => (222, &['.', '_', '-']),
            Self::Azure => (63, &['-']),
        }
    }
}

/// A file or a folder of an object store, of a volume or of the Hugging Face Hub.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Uri {
    /// `s3://bucket/key`, `gs://bucket/key` or `az://container/key`; the key is empty or has no leading and no trailing
    /// slash.
    Bucket {
        /// The kind of the store.
        cloud: Cloud,
        /// Name of the bucket, which Azure calls a container.
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
    /// `hf://datasets/owner/name`, with `@revision` and `/path` as above: a data set of the Hugging Face Hub.
    HubDataset {
        /// `owner/name`.
        repo: Box<str>,
        /// A branch, tag or commit; `%2F` stands for a slash in it. Without one, the default branch.
        revision: Option<Box<str>>,
        /// A file of the repository, or a pattern; empty for its training rows.
        path: Box<str>,
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
    "`{text}` is not a URI that Tunesmith knows{reason}: use s3://bucket/key, gs://bucket/key, \
     az://container/key, hf://owner/name, hf://datasets/owner/name, pvc://claim/path or file:///path"
)]
pub struct UriError {
    text: String,
    /// Empty where its shape alone is wrong.
    reason: String,
}

impl Uri {
    /// The object or folder `name` inside this one.
    pub fn join(&self, name: &str) -> Self {
        match self {
            Self::Bucket { cloud, bucket, key } => {
                Self::Bucket { cloud: *cloud, bucket: bucket.clone(), key: below(key, name) }
            }
            Self::Hub { repo, revision, path } => {
                Self::Hub { repo: repo.clone(), revision: revision.clone(), path: below(path, name) }
            }
            Self::HubDataset { repo, revision, path } => {
                Self::HubDataset { repo: repo.clone(), revision: revision.clone(), path: below(path, name).into() }
            }
            Self::Claim { claim, path } => Self::Claim { claim: claim.clone(), path: below(path, name) },
            Self::File { path } => Self::File { path: format!("{path}/{name}") },
        }
    }

    /// The name by which Hugging Face's tools find the model: a repository's own name, else the URI; and the repository's revision.
    pub fn model_name(&self) -> (String, Option<&str>) {
        match self {
            Self::Hub { repo, revision, path } if path.is_empty() => (repo.clone(), revision.as_deref()),
            _ => (self.to_string(), None),
        }
    }

    /// The kind of object store that it lies in.
    pub fn cloud(&self) -> Option<Cloud> {
        match self {
            Self::Bucket { cloud, .. } => Some(*cloud),
            _ => None,
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
    pub fn path(&self) -> &str {
        match self {
            Self::Bucket { key: path, .. }
            | Self::Hub { path, .. }
            | Self::Claim { path, .. }
            | Self::File { path } => path,
            Self::HubDataset { path, .. } => path,
        }
    }

    /// The same with another path, which is not empty for a file.
    #[must_use]
    pub fn with_path(&self, path: &str) -> Self {
        let mut uri = self.clone();
        match &mut uri {
            Self::Bucket { key: at, .. }
            | Self::Hub { path: at, .. }
            | Self::Claim { path: at, .. }
            | Self::File { path: at } => *at = path.into(),
            Self::HubDataset { path: at, .. } => *at = path.into(),
        }
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
        let refuse = |reason: String| UriError { text: text.to_owned(), reason };
        if let Some(c) = text.chars().find(|&c| c.is_control() || (c.is_whitespace() && c != ' ')) {
            return Err(refuse(format!(", it holds U+{:04X}", u32::from(c))));
        }
        let uri = match text.split_once("://") {
            Some(("hf", rest)) => match text.strip_prefix(DATASETS) {
                Some(rest) => hub(rest).map(|(repo, revision, path)| Self::HubDataset {
                    repo: repo.into(),
                    revision: revision.map(Into::into),
                    path: path.into(),
                }),
                None => hub(rest).map(|(repo, revision, path)| Self::Hub { repo, revision, path }),
            },
            Some(("pvc", rest)) => claim(rest),
            Some(("file", rest)) => file(rest),
            Some((scheme, rest)) => {
                Cloud::ALL.into_iter().find(|cloud| cloud.scheme() == scheme).and_then(|cloud| object(cloud, rest))
            }
            None => None,
        };
        uri.ok_or_else(|| refuse(if text.ends_with(' ') { ", it ends in a space".into() } else { String::new() }))
    }
}

/// A path without the slashes around it, if it begins and ends with something that can be seen.
fn path(text: &str) -> Option<String> {
    let path = text.trim_matches('/');
    (!path.starts_with(' ') && !path.ends_with(' ')).then(|| path.to_owned())
}

/// The same, if it does not lead out of where it is.
fn inner_path(text: &str) -> Option<String> {
    path(text).filter(|path| path.split('/').all(|part| part != "." && part != ".."))
}

/// `bucket[/key]`, the same for every kind of store.
fn object(cloud: Cloud, text: &str) -> Option<Uri> {
    let (bucket, key) = text.split_once('/').unwrap_or((text, ""));
    let alnum = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    let (longest, others) = cloud.bucket_names();
    let is_sound = (3..=longest).contains(&bucket.len())
        && bucket.chars().all(|c| alnum(c) || others.contains(&c))
        && bucket.starts_with(alnum)
        && bucket.ends_with(alnum);
    let key = inner_path(key)?;
    is_sound.then(|| Uri::Bucket { cloud, bucket: bucket.into(), key })
}

/// `owner/name[@revision][/path]`.
fn hub(text: &str) -> Option<(String, Option<String>, String)> {
    let word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let sound = |name: &str| name.starts_with(word) && name.chars().all(|c| word(c) || c == '.' || c == '-');
    let (owner, rest) = text.split_once('/')?;
    let (name, path) = rest.split_once('/').unwrap_or((rest, ""));
    let (name, revision) = name.split_once('@').map_or((name, None), |(name, revision)| (name, Some(revision)));
    let revision_is_sound =
        |revision: &str| !revision.is_empty() && revision.chars().all(|c| word(c) || c == '.' || c == '-' || c == '%');
    let is_sound = sound(owner) && sound(name) && revision.is_none_or(revision_is_sound);
    let path = inner_path(path)?;
    is_sound.then(|| (format!("{owner}/{name}"), revision.map(str::to_owned), path))
}

/// `claim[/path]`.
fn claim(text: &str) -> Option<Uri> {
    let (claim, path) = text.split_once('/').unwrap_or((text, ""));
    let alnum = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    let is_sound =
        claim.starts_with(alnum) && claim.ends_with(alnum) && claim.chars().all(|c| alnum(c) || c == '.' || c == '-');
    let path = inner_path(path)?;
    is_sound.then(|| Uri::Claim { claim: claim.into(), path })
}

/// A path of a file system. Slashes before it are one.
fn file(text: &str) -> Option<Uri> {
    let path = path(text).filter(|path| !path.is_empty())?;
    Some(Uri::File { path: if text.starts_with('/') { format!("/{path}") } else { path } })
}

impl fmt::Display for Uri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bucket { cloud, bucket, .. } => write!(f, "{}://{bucket}", cloud.scheme())?,
            Self::Hub { repo, revision: None, .. } => write!(f, "hf://{repo}")?,
            Self::Hub { repo, revision: Some(revision), .. } => write!(f, "hf://{repo}@{revision}")?,
            Self::HubDataset { repo, revision: None, .. } => write!(f, "{DATASETS}{repo}")?,
            Self::HubDataset { repo, revision: Some(revision), .. } => write!(f, "{DATASETS}{repo}@{revision}")?,
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
                "rule": rule(),
                "message": MESSAGE,
            }],
        })
    }
}
