//! What went wrong in a store, in words that name the object and what to change, and never a credential.

use std::{
    error::Error,
    io::{self, ErrorKind},
    path::PathBuf,
};

use tunesmith_crds::{Cloud, Uri, names::exit_code};

use super::{
    Role,
    settings::{Family, redact},
};

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
        "access to {uri} ({role}) was refused: {answer}; check {} of the Secret that {} names, and what it may do",
        credentials(uri),
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
                // The service that makes tokens does not know who asks.
                (Some(400), answer) if is_of_token(other) => Self::Refused { role, uri, answer },
                (_, answer) if FINAL_CODES.iter().any(|code| answer.starts_with(code)) => {
                    let problem = format!("{answer}; check {} and the URI", place_settings(&uri));
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

/// What stores say however often they are asked: S3, S3 and Google Cloud Storage, Azure.
const FINAL_CODES: [&str; 13] = [
    "AuthorizationHeaderMalformed",
    "PermanentRedirect",
    "KeyTooLong",
    "InvalidObjectState",
    "InvalidBucketName",
    "RetentionPolicyNotMet",
    "ObjectUnderActiveHold",
    "InvalidResourceName",
    "InvalidUri",
    "OutOfRangeInput",
    "BlobArchived",
    "BlobImmutableDueToPolicy",
    "PublicAccessNotPermitted",
];

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
        Uri::Bucket { cloud, .. } => {
            let (family, field, prefix) = (Family::of(*cloud).name, role.secret_field(), role.env_prefix());
            format!(
                "; correct the {family}… keys of the Secret that {field} names, or the environment ({prefix}{family}…, \
                 {family}…)"
            )
        }
        _ => String::new(),
    }
}

/// The settings that say who asks.
fn credentials(uri: &Uri) -> &'static str {
    match uri {
        Uri::Bucket { cloud: Cloud::Google, .. } => "GOOGLE_SERVICE_ACCOUNT_KEY",
        Uri::Bucket { cloud: Cloud::Azure, .. } => {
            "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN"
        }
        _ => "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    }
}

/// The settings that say where the store is.
fn place_settings(uri: &Uri) -> &'static str {
    match uri {
        Uri::Bucket { cloud: Cloud::S3, .. } => "AWS_ENDPOINT_URL, AWS_REGION",
        Uri::Bucket { cloud: Cloud::Google, .. } => "GOOGLE_BASE_URL",
        Uri::Bucket { cloud: Cloud::Azure, .. } => "AZURE_STORAGE_ACCOUNT_NAME, AZURE_STORAGE_ENDPOINT",
        Uri::Hub { .. } | Uri::HubDataset { .. } => "HF_ENDPOINT",
        Uri::Claim { .. } | Uri::File { .. } => "the disk",
    }
}

fn network_settings(uri: &Uri) -> String {
    let place = place_settings(uri);
    let is_near = matches!(uri, Uri::Claim { .. } | Uri::File { .. });
    if is_near { place.to_owned() } else { format!("{place} and the network") }
}

/// Whether it was a token that could not be had.
fn is_of_token(error: &object_store::Error) -> bool {
    causes(error).iter().any(|cause| cause.contains("token request"))
}

/// The HTTP status of a refused listing, which object_store has in its words alone.
fn status(error: &object_store::Error) -> Option<u16> {
    causes(error).iter().find_map(|cause| cause.split_once("status code: ")?.1.get(..3)?.parse().ok())
}

fn causes(error: &object_store::Error) -> Vec<String> {
    let causes = std::iter::successors(Some(error as &(dyn Error + 'static)), |&error| error.source());
    causes.map(ToString::to_string).collect()
}

/// The store's own code and message where there are some, else the innermost causes; without credentials.
fn answer(error: &object_store::Error, secrets: &[String]) -> String {
    let causes = causes(error);
    let whole = causes.join(": ");
    let element = |name: &str| {
        let (_, rest) = whole.split_once(&format!("<{name}>"))?;
        // Azure's messages go on with the request's number and time.
        rest.split_once("</")?.0.lines().next().map(|line| line.trim_end().to_owned())
    };
    let answer = match (element("Code"), element("Message")) {
        (Some(code), Some(message)) => match element("Details") {
            Some(details) => format!("{code}: {message} {details}"),
            None => format!("{code}: {message}"),
        },
        (Some(code), None) => code,
        _ if oauth_answer(&whole).is_some() => oauth_answer(&whole).unwrap_or_default(),
        // Each layer's text usually repeats the next one's.
        _ => causes.iter().skip(causes.len().saturating_sub(2)).cloned().collect::<Vec<_>>().join(": "),
    };
    redact(&answer, secrets)
}

/// What a service that makes tokens says.
fn oauth_answer(whole: &str) -> Option<String> {
    let json = &whole[whole.find("{\"")?..];
    let json: serde_json::Value = serde_json::Deserializer::from_str(json).into_iter().next()?.ok()?;
    let description = json["error_description"].as_str().and_then(|text| text.lines().next());
    match (json["error"].as_str()?, description) {
        (code, Some(description)) => Some(format!("{code}: {description}")),
        (code, None) => Some(code.to_owned()),
    }
}

/// Whether the same try would end the same way: the path or its permissions have to change first.
pub(crate) fn is_final(error: &io::Error) -> bool {
    /// Too many symbolic links.
    const ELOOP: i32 = 40;
    matches!(
        error.kind(),
        ErrorKind::NotFound
            | ErrorKind::AlreadyExists
            | ErrorKind::PermissionDenied
            | ErrorKind::IsADirectory
            | ErrorKind::NotADirectory
            | ErrorKind::InvalidFilename
            | ErrorKind::InvalidInput
            | ErrorKind::ReadOnlyFilesystem
    ) || error.raw_os_error() == Some(ELOOP)
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
        use std::io::Error;
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
    fn each_kind_of_store_is_told_by_its_own_settings() {
        let denied = "<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>Access denied.</Message>\
            <Details>tuner@p.iam lacks storage.objects.get</Details></Error>";
        let failed = "\u{feff}<?xml version=\"1.0\"?><Error><Code>AuthenticationFailed</Code><Message>Make sure the value is \
            formed correctly.\nRequestId:1\nTime:2</Message></Error>";
        for (uri, body, words) in [
            (
                "gs://models/m",
                denied,
                "AccessDenied: Access denied. tuner@p.iam lacks storage.objects.get; check GOOGLE_",
            ),
            (
                "az://models/m",
                failed,
                "AuthenticationFailed: Make sure the value is formed correctly.; check AZURE_STORAGE_",
            ),
        ] {
            let error = object_store::Error::PermissionDenied { path: "m".into(), source: Box::new(Answer(body)) };
            let error = StoreError::new(Role::Output, &uri.parse().unwrap(), &error, &[]);
            assert_eq!(error.exit_code(), exit_code::BAD_INPUT);
            assert!(error.to_string().contains(words) && error.to_string().contains("output.secretRef"), "{error}");
            let error = object_store::Error::Generic { store: "", source: Box::new(Answer("connection refused")) };
            let error = StoreError::new(Role::Output, &uri.parse().unwrap(), &error, &[]);
            assert!(error.to_string().ends_with("and the network") && !error.to_string().contains("AWS_"), "{error}");
        }
    }

    #[test]
    fn a_refused_token_is_final_and_a_failing_service_is_not() {
        let token = |status: &'static str| {
            let error = object_store::Error::Generic { store: "GCS", source: Box::new(Answer(status)) };
            StoreError::new(Role::Output, &"az://models/m".parse().unwrap(), &error, &[])
        };
        let refused = "Error performing token request: Server returned non-2xx status code: 400 Bad Request: \
            {\"error\":\"invalid_client\",\"error_description\":\"AADSTS7000215: no such secret.\\r\\nTrace ID: 1\"}";
        let error = token(refused);
        assert!(
            matches!(&error, StoreError::Refused { answer, .. } if answer == "invalid_client: AADSTS7000215: no such secret."),
            "{error}"
        );
        let failing = "Error performing token request: Server returned non-2xx status code: 503 Service Unavailable: ";
        assert_eq!(token(failing).exit_code(), exit_code::STORAGE);
    }

    #[test]
    fn a_failing_store_is_worth_another_try() {
        let error = object_store::Error::Generic { store: "S3", source: Box::new(Answer("connection refused")) };
        let error = StoreError::new(Role::Output, &uri(), &error, &[]);
        assert_eq!(error.exit_code(), exit_code::STORAGE);
        assert!(error.to_string().contains("connection refused"), "{error}");
    }
}
