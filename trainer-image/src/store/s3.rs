//! S3 clients from environment variables: `AWS_…`, with a role's prefix before them or without.

use std::time::Duration;

use object_store::{
    ClientOptions,
    aws::{AmazonS3, AmazonS3Builder, AmazonS3ConfigKey},
};

use super::{Environment, Role};

/// Variables that only make sense together: all of them come with the prefix, or none.
const IDENTITY: [&str; 3] = ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"];

/// A client for a bucket.
pub(super) fn connect(environment: &Environment, role: Role, bucket: &str) -> Result<AmazonS3, String> {
    let settings = settings(environment, role);
    let allow_http = settings.iter().any(|(name, value)| name.contains("ENDPOINT") && value.starts_with("http://"));
    let options = ClientOptions::new()
        .with_allow_http(allow_http)
        .with_connect_timeout(Duration::from_secs(10))
        // A big object may take long; one that stands still may not.
        .with_timeout_disabled()
        .with_read_timeout(Duration::from_secs(60));
    let mut builder =
        AmazonS3Builder::new().with_bucket_name(bucket).with_region("us-east-1").with_client_options(options);
    for (name, value) in settings {
        if let Ok(key) = name.to_ascii_lowercase().parse::<AmazonS3ConfigKey>()
            && key != AmazonS3ConfigKey::Bucket
        {
            builder = builder.with_config(key, value);
        }
    }
    builder.build().map_err(|error| error.to_string())
}

/// Whether the environment names an S3 store for any role.
pub(super) fn is_configured(environment: &Environment) -> bool {
    let decisive = ["AWS_ACCESS_KEY_ID", "AWS_ENDPOINT_URL", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_SKIP_SIGNATURE"];
    environment.keys().any(|name| decisive.iter().any(|decisive| name.ends_with(decisive)))
}

/// Values that no message may show.
pub(super) fn secrets(environment: &Environment) -> Vec<String> {
    let secret = |(name, value): (&String, &String)| {
        let value = value.trim();
        let is_secret =
            IDENTITY.iter().chain(&["HF_TOKEN"]).any(|identity| name.ends_with(identity)) && !value.is_empty();
        is_secret.then(|| value.to_owned())
    };
    environment.iter().filter_map(secret).collect()
}

/// The `AWS_…` variables of a role. Values are trimmed: Secrets made from files end in a newline.
fn settings(environment: &Environment, role: Role) -> Environment {
    let own: Environment = environment
        .iter()
        .filter_map(|(name, value)| Some((name.strip_prefix(role.env_prefix())?, value.trim())))
        .filter(|(name, value)| name.starts_with("AWS_") && !value.is_empty())
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect();
    let own_identity = IDENTITY.iter().any(|name| own.contains_key(*name));
    let mut settings: Environment = environment
        .iter()
        .filter(|(name, value)| name.starts_with("AWS_") && !value.trim().is_empty())
        .filter(|(name, _)| !(own_identity && IDENTITY.contains(&name.as_str())))
        .map(|(name, value)| (name.clone(), value.trim().to_owned()))
        .collect();
    settings.extend(own);
    settings
}

#[cfg(test)]
mod tests {
    use super::*;

    fn environment(variables: &[(&str, &str)]) -> Environment {
        variables.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect()
    }

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
        let model = settings(&environment, Role::Model);
        assert_eq!(model["AWS_ACCESS_KEY_ID"], "model");
        assert_eq!(model["AWS_REGION"], "eu-central-1");
        assert!(!model.contains_key("AWS_SESSION_TOKEN"), "another key's token would be refused");
        assert_eq!(settings(&environment, Role::Output)["AWS_ACCESS_KEY_ID"], "plain");
    }

    #[test]
    fn an_http_endpoint_needs_no_further_setting() {
        let environment = environment(&[
            ("TUNESMITH_OUTPUT_AWS_ENDPOINT_URL", "http://127.0.0.1:8333"),
            ("TUNESMITH_OUTPUT_AWS_ACCESS_KEY_ID", "k"),
            ("TUNESMITH_OUTPUT_AWS_SECRET_ACCESS_KEY", "s"),
        ]);
        assert!(is_configured(&environment));
        connect(&environment, Role::Output, "adapters").unwrap();
        assert_eq!(secrets(&environment), ["k", "s"]);
    }

    #[test]
    fn an_empty_environment_names_no_store() {
        assert!(!is_configured(&environment(&[("HOME", "/root"), ("AWS_REGION", "eu-central-1")])));
    }
}
