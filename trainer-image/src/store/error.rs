//! What went wrong in a store, in words that name the object and what to change, and never a credential.

use std::{error::Error, path::PathBuf};

use tunesmith_crds::{Uri, names::exit_code};

use super::{Role, disk::is_final, settings::redact};

/// Why an object was not read or written.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The environment's settings or the URI can't be used.
    #[error("{role} {uri}: {problem}{}", settings_advice(*role, uri))]
    Settings {
        /// What it was opened for.
        role: Role,
        /// What was opened.
        uri: Uri,
        /// What is wrong with it.
        problem: String,
    },
    /// No such object, folder or bucket.
    #[error("no such object {uri} ({role}): check the URI, and that it was uploaded")]
    Missing {
        /// What it was opened for.
        role: Role,
        /// What is missing.
        uri: Uri,
    },
    /// A folder where a file is meant.
    #[error(
        "{uri} ({role}) is a folder, not a file: name one of its files, or all of them by a pattern such as {uri}/*"
    )]
    Folder {
        /// What it was opened for.
        role: Role,
        /// The folder.
        uri: Uri,
    },
    /// It is there, and can't be used.
    #[error("{uri} ({role}) can't be used: {problem}")]
    Unreadable {
        /// What it was opened for.
        role: Role,
        /// What is there.
        uri: Uri,
        /// Why, and what to do.
        problem: String,
    },
    /// A pattern means nothing.
    #[error(
        "no object matches {uri} ({role}): {found}; `*` stands for any characters of one part of the path, `**` for any \
         folders, and all other characters for themselves; check the pattern, and that the files were uploaded"
    )]
    NoMatch {
        /// What it was opened for.
        role: Role,
        /// The pattern.
        uri: Uri,
        /// What is there instead.
        found: String,
    },
    /// The store does not accept the credentials, or they are not allowed to do this.
    #[error(
        "access to {uri} ({role}) was refused: {answer}; check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY of the \
         Secret that {} names, and what this key may do",
        role.secret_field()
    )]
    Refused {
        /// What it was opened for.
        role: Role,
        /// What was asked for.
        uri: Uri,
        /// What the store answered.
        answer: String,
    },
    /// The store can't be reached, or fails.
    #[error("the store of {uri} ({role}) failed: {answer}; check {}", network_settings(uri))]
    Unavailable {
        /// What it was opened for.
        role: Role,
        /// What was asked for.
        uri: Uri,
        /// What happened.
        answer: String,
    },
    /// A file on this machine can't be read or written.
    #[error("{}: {source}{}", path.display(), disk_advice(source))]
    Disk {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

impl StoreError {
    pub(super) fn new(role: Role, uri: &Uri, error: &object_store::Error, secrets: &[String]) -> Self {
        use object_store::Error as E;
        let uri = uri.clone();
        match error {
            E::NotFound { .. } => Self::Missing { role, uri },
            E::PermissionDenied { .. } | E::Unauthenticated { .. } => {
                Self::Refused { role, uri, answer: answer(error, secrets) }
            }
            other => match (status(other), answer(other, secrets)) {
                (Some(401 | 403), answer) => Self::Refused { role, uri, answer },
                (Some(404), _) => Self::Missing { role, uri },
                (_, answer) if FINAL_CODES.iter().any(|code| answer.starts_with(code)) => {
                    let problem = format!("{answer}; check AWS_REGION, AWS_ENDPOINT_URL and the URI");
                    Self::Unreadable { role, uri, problem }
                }
                (_, answer) => match on_disk(other).filter(|error| is_final(error)) {
                    Some(error) => Self::Unreadable { role, uri, problem: error.to_string() },
                    None => Self::Unavailable { role, uri, answer },
                },
            },
        }
    }

    /// One of [`tunesmith_crds::names::exit_code`]: another try helps only against a failing store or disk.
    pub fn exit_code(&self) -> i32 {
        match self {
            Self::Settings { .. } => exit_code::BAD_SPEC,
            Self::Missing { .. } | Self::Folder { .. } | Self::Unreadable { .. } => exit_code::BAD_INPUT,
            Self::NoMatch { .. } | Self::Refused { .. } => exit_code::BAD_INPUT,
            Self::Disk { source, .. } if is_final(source) => exit_code::BAD_INPUT,
            Self::Unavailable { .. } | Self::Disk { .. } => exit_code::STORAGE,
        }
    }
}

/// What S3 says, however often it is asked.
const FINAL_CODES: [&str; 5] =
    ["AuthorizationHeaderMalformed", "PermanentRedirect", "InvalidBucketName", "KeyTooLong", "InvalidObjectState"];

/// The error of this machine's disks that lies under another one.
fn on_disk(error: &object_store::Error) -> Option<&std::io::Error> {
    let object_store::Error::Generic { store: "LocalFileSystem", source } = error else { return None };
    let first: &(dyn Error + 'static) = &**source;
    std::iter::successors(Some(first), |&error| error.source()).find_map(|error| error.downcast_ref())
}

fn disk_advice(error: &std::io::Error) -> &'static str {
    use std::io::ErrorKind as K;
    match error.kind() {
        K::StorageFull | K::QuotaExceeded | K::FileTooLarge => "; make room for it",
        K::PermissionDenied => "; this process needs the permission",
        _ => "",
    }
}

fn settings_advice(role: Role, uri: &Uri) -> String {
    match uri {
        Uri::S3 { .. } => format!(
            "; correct the AWS_… keys of the Secret that {} names, or the environment ({}AWS_…, AWS_…)",
            role.secret_field(),
            role.env_prefix()
        ),
        _ => String::new(),
    }
}

fn network_settings(uri: &Uri) -> &'static str {
    match uri {
        Uri::S3 { .. } => "AWS_ENDPOINT_URL, AWS_REGION and the network",
        Uri::Hub { .. } | Uri::HubDataset { .. } => "HF_ENDPOINT and the network",
        Uri::Claim { .. } | Uri::File { .. } => "the disk",
    }
}

/// The HTTP status of a refused listing, which object_store has in its words alone.
fn status(error: &object_store::Error) -> Option<u16> {
    causes(error).iter().find_map(|cause| cause.split_once("status code: ")?.1.get(..3)?.parse().ok())
}

fn causes(error: &object_store::Error) -> Vec<String> {
    let causes = std::iter::successors(Some(error as &(dyn Error + 'static)), |&error| error.source());
    causes.map(ToString::to_string).collect()
}

/// S3's own code and message where there are some, else the innermost causes; without credentials.
fn answer(error: &object_store::Error, secrets: &[String]) -> String {
    let causes = causes(error);
    let whole = causes.join(": ");
    let element = |name: &str| {
        let (_, rest) = whole.split_once(&format!("<{name}>"))?;
        Some(rest.split_once("</")?.0)
    };
    let answer = match (element("Code"), element("Message")) {
        (Some(code), Some(message)) => format!("{code}: {message}"),
        (Some(code), None) => code.to_owned(),
        // Each layer's text usually repeats the next one's.
        _ => causes.iter().skip(causes.len().saturating_sub(2)).cloned().collect::<Vec<_>>().join(": "),
    };
    redact(&answer, secrets)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{0}")]
    struct Answer(&'static str);

    fn uri() -> Uri {
        "s3://models/m/config.json".parse().unwrap()
    }

    #[test]
    fn a_wrong_key_is_final_and_names_the_secret_but_no_credential() {
        let body = "<Error><Code>InvalidAccessKeyId</Code><Message>The key AKIAKEY does not exist.</Message>\
            <AWSAccessKeyId>AKIAKEY</AWSAccessKeyId></Error>";
        let error = object_store::Error::PermissionDenied { path: "m".into(), source: Box::new(Answer(body)) };
        let error = StoreError::new(Role::Model, &uri(), &error, &["AKIAKEY".into()]);
        assert_eq!(error.exit_code(), exit_code::BAD_INPUT);
        let text = error.to_string();
        assert!(text.contains("InvalidAccessKeyId: The key [redacted] does not exist."), "{text}");
        assert!(text.contains("baseModel.secretRef") && text.contains("s3://models/m/config.json"), "{text}");
        assert!(!text.contains("AKIAKEY"), "{text}");
    }

    #[test]
    fn a_short_secret_garbles_no_words_and_is_shown_nowhere() {
        let answer = |words: &'static str, secrets: &[&str]| {
            let secrets: Vec<String> = secrets.iter().map(|secret| (*secret).to_owned()).collect();
            answer(&object_store::Error::Generic { store: "S3", source: Box::new(Answer(words)) }, &secrets)
        };
        for (words, secrets, expected) in [
            ("tcp connect error", &["e", "on", "tc"][..], "tcp connect error"),
            ("user pa55:pa55 (pa55) is spa55y", &["pa55"], "user [redacted]:[redacted] ([redacted]) is spa55y"),
            ("key=AKIAIOSFODNN7x", &["AKIAIOSFODNN7"], "key=[redacted]x"),
            ("0123456789", &["01234567", "0123456789"], "[redacted]"),
            ("é is a key of éé", &["é"], "[redacted] is a key of éé"),
        ] {
            let shown = answer(words, secrets);
            assert!(shown.ends_with(expected), "{shown}");
        }
    }

    #[test]
    fn a_refused_listing_is_told_from_a_failing_store() {
        let listing = |status: &'static str| {
            let error = object_store::Error::Generic { store: "S3", source: Box::new(Answer(status)) };
            StoreError::new(Role::Model, &uri(), &error, &[])
        };
        let refused = "Server returned non-2xx status code: 403 Forbidden: <Error><Code>AccessDenied</Code></Error>";
        assert!(matches!(listing(refused), StoreError::Refused { answer, .. } if answer == "AccessDenied"));
        let no_bucket = "Server returned non-2xx status code: 404 Not Found: ";
        assert!(matches!(listing(no_bucket), StoreError::Missing { .. }));
    }

    #[test]
    fn a_disk_error_is_final_if_the_path_has_to_change_and_tried_again_if_the_disk_has() {
        use std::io::{Error, ErrorKind};
        let disk = |kind: ErrorKind| StoreError::Disk { path: "/data/x".into(), source: Error::from(kind) };
        for kind in [
            ErrorKind::NotFound,
            ErrorKind::PermissionDenied,
            ErrorKind::IsADirectory,
            ErrorKind::NotADirectory,
            ErrorKind::InvalidFilename,
            ErrorKind::ReadOnlyFilesystem,
        ] {
            assert_eq!(disk(kind).exit_code(), exit_code::BAD_INPUT, "{kind:?}");
            assert!(!disk(kind).to_string().contains("room"), "{}", disk(kind));
        }
        for kind in [ErrorKind::StorageFull, ErrorKind::QuotaExceeded, ErrorKind::TimedOut, ErrorKind::Other] {
            assert_eq!(disk(kind).exit_code(), exit_code::STORAGE, "{kind:?}");
        }
        assert!(disk(ErrorKind::StorageFull).to_string().contains("make room"));
    }

    #[test]
    fn a_wrong_region_is_final() {
        let body = "<Error><Code>AuthorizationHeaderMalformed</Code><Message>expecting 'eu-west-1'</Message></Error>";
        let error = object_store::Error::Generic { store: "S3", source: Box::new(Answer(body)) };
        let error = StoreError::new(Role::Model, &uri(), &error, &[]);
        assert_eq!(error.exit_code(), exit_code::BAD_INPUT);
        assert!(error.to_string().contains("AWS_REGION") && error.to_string().contains("eu-west-1"), "{error}");
    }

    #[test]
    fn a_failing_store_is_worth_another_try() {
        let error = object_store::Error::Generic { store: "S3", source: Box::new(Answer("connection refused")) };
        let error = StoreError::new(Role::Output, &uri(), &error, &[]);
        assert_eq!(error.exit_code(), exit_code::STORAGE);
        assert!(error.to_string().contains("connection refused"), "{error}");
    }
}
