//! Clients of Google Cloud Storage from environment variables: `GOOGLE_…`, with a role's prefix before them or without.

use std::sync::Arc;

use object_store::{
    StaticCredentialProvider,
    gcp::{GcpCredential, GoogleCloudStorage, GoogleCloudStorageBuilder, GoogleConfigKey},
};

use super::{
    Environment, Role, client,
    listing::KeepKeys,
    settings::{
        Settings, check_network,
        google::{Access, FAMILY, check},
        of_role,
    },
};

/// A client for a bucket.
pub(super) fn connect(environment: &Environment, role: Role, bucket: &str) -> Result<GoogleCloudStorage, String> {
    let settings = of_role(environment, role, &FAMILY);
    check_network(environment)?;
    let access = check(&settings)?;
    client::warn_of_unknown::<GoogleConfigKey>(&settings, &FAMILY, role);
    build(&settings, &access, bucket).map_err(|error| name_the_culprit(&settings, bucket).unwrap_or(error))
}

fn build(settings: &Settings, access: &Access, bucket: &str) -> Result<GoogleCloudStorage, String> {
    let mut builder = GoogleCloudStorageBuilder::new()
        .with_client_options(client::options(settings, &FAMILY)?)
        .with_http_connector(KeepKeys::S3);
    for (key, setting) in client::known(settings) {
        let is_credential = matches!(
            key,
            GoogleConfigKey::ServiceAccount
                | GoogleConfigKey::ServiceAccountKey
                | GoogleConfigKey::ApplicationCredentials
                | GoogleConfigKey::BearerToken
        );
        if !(is_credential && access.is_anonymous) {
            builder = builder.with_config(key, &setting.value);
        }
    }
    if access.is_anonymous {
        builder = anonymous(builder);
    }
    if let Some(url) = &access.base_url {
        builder = builder.with_base_url(url);
    }
    // Whatever the environment says, the bucket comes from the URI.
    builder.with_bucket_name(bucket).build().map_err(|error| error.to_string())
}

/// The client's writing calls ask for a credential even where they are not to be signed: without one of ours, that would be
/// the metadata service's.
fn anonymous(builder: GoogleCloudStorageBuilder) -> GoogleCloudStorageBuilder {
    let nobody = StaticCredentialProvider::new(GcpCredential { bearer: String::new() });
    builder.with_credentials(Arc::new(nobody)).with_skip_signature(true)
}

fn name_the_culprit(settings: &Settings, bucket: &str) -> Option<String> {
    let sound = || GoogleCloudStorageBuilder::new().with_bucket_name(bucket);
    let alone = |key, value: &str| {
        let builder = match key {
            GoogleConfigKey::Bucket => return None,
            GoogleConfigKey::ServiceAccount
            | GoogleConfigKey::ServiceAccountKey
            | GoogleConfigKey::ApplicationCredentials => sound(),
            _ => anonymous(sound()),
        };
        builder.with_config(key, value).build().err().map(|error| error.to_string())
    };
    client::culprits(settings, alone)
}

#[cfg(test)]
mod tests {
    use super::{super::settings::environment, *};

    #[test]
    fn each_setting_that_can_not_be_used_is_named_and_no_secret_is_shown() {
        let key = r#"{"private_key": "s3cr3t", "private_key_id": "i", "client_email": "e"}"#;
        for (name, value) in [
            ("GOOGLE_SERVICE_ACCOUNT_KEY", key),
            ("GOOGLE_SERVICE_ACCOUNT_KEY", "s3cr3t"),
            ("GOOGLE_BASE_URL", "storage.example.com"),
            ("GOOGLE_BEARER_TOKEN", "s3cr3t x"),
            ("GOOGLE_SKIP_SIGNATURE", "maybe"),
            ("GOOGLE_USE_METADATA_SERVER", "maybe"),
            ("GOOGLE_TIMEOUT", "soon"),
            ("GOOGLE_READ_TIMEOUT", "0s"),
            ("GOOGLE_ALLOW_HTTP", "sure"),
            ("GOOGLE_PROXY_URL", "http://"),
            ("GOOGLE_PROXY_CA_CERTIFICATE", "junk"),
            ("GOOGLE_CA_BUNDLE", "/absent.pem"),
            ("STORAGE_EMULATOR_HOST", "a b"),
        ] {
            let variable = format!("TUNESMITH_OUTPUT_{name}");
            let mut variables = vec![(variable.as_str(), value)];
            if !["KEY", "TOKEN", "SIGNATURE"].iter().any(|end| name.ends_with(end)) {
                variables.push(("TUNESMITH_OUTPUT_GOOGLE_SKIP_SIGNATURE", "true"));
            }
            let error = connect(&environment(&variables), Role::Output, "adapters").map(drop).unwrap_err();
            assert!(error.contains(&variable) && !error.contains("s3cr3t"), "{name} {value:?}: {error}");
        }
    }

    #[test]
    fn an_emulator_is_all_that_a_test_has_to_name() {
        let variables = environment(&[("STORAGE_EMULATOR_HOST", "127.0.0.1:4443"), ("GOOGLE_BUCKET", "other")]);
        let client = connect(&variables, Role::Output, "adapters").unwrap();
        assert!(client.to_string().contains("adapters"), "{client}");
    }
}
