//! S3 clients from environment variables: `AWS_…`, with a role's prefix before them or without.

use object_store::{
    aws::{AmazonS3, AmazonS3Builder, AmazonS3ConfigKey},
    client::HttpConnector,
};

use super::{
    Environment, Role, client,
    listing::KeepKeys,
    settings::{
        Settings,
        aws::{FAMILY, check},
        check_network, of_role,
    },
};

/// A client for a bucket.
pub(super) fn connect(environment: &Environment, role: Role, bucket: &str) -> Result<AmazonS3, String> {
    let settings = of_role(environment, role, &FAMILY);
    check_network(environment)?;
    check(&settings)?;
    client::warn_of_unknown::<AmazonS3ConfigKey>(&settings, &FAMILY, role);
    build(&settings, bucket, KeepKeys::S3).map_err(|error| name_the_culprit(&settings, bucket).unwrap_or(error))
}

fn build(settings: &Settings, bucket: &str, connector: impl HttpConnector) -> Result<AmazonS3, String> {
    let mut builder = AmazonS3Builder::new()
        .with_region("us-east-1")
        .with_client_options(client::options(settings, &FAMILY)?)
        .with_http_connector(connector);
    for (key, setting) in client::known(settings) {
        builder = builder.with_config(key, &setting.value);
    }
    // Whatever the environment says, the bucket comes from the URI.
    builder.with_bucket_name(bucket).build().map_err(|error| error.to_string())
}

fn name_the_culprit(settings: &Settings, bucket: &str) -> Option<String> {
    let sound = || AmazonS3Builder::new().with_bucket_name(bucket).with_access_key_id("k").with_secret_access_key("s");
    if let Err(error) = sound().build() {
        return Some(format!("no client works here: {error}; check SSL_CERT_FILE and SSL_CERT_DIR"));
    }
    let alone = |key, value: &str| {
        // Encryption needs several settings at once.
        let is_alone = !matches!(key, AmazonS3ConfigKey::Encryption(_) | AmazonS3ConfigKey::Bucket);
        is_alone.then(|| sound().with_config(key, value).build().err()).flatten().map(|error| error.to_string())
    };
    client::culprits(settings, alone).or_else(|| {
        let encryption = settings.get("AWS_SERVER_SIDE_ENCRYPTION")?;
        let error = build(settings, bucket, KeepKeys::S3).err()?;
        Some(format!("{} and the AWS_SSE_… settings can't be used: {error}", encryption.variable))
    })
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use async_trait::async_trait;
    use object_store::{
        ClientOptions, ObjectStoreExt,
        client::{HttpClient, HttpError, HttpRequest, HttpResponse, HttpService},
    };

    use super::*;

    const ROLE: &str = "arn:aws:iam::123456789012:role/team/models";

    /// The role's variables, and the pod's own as EKS sets them.
    const OF_POD: [(&str, &str); 3] = [
        ("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/pod"),
        ("AWS_REGION", "eu-central-1"),
        ("TUNESMITH_MODEL_AWS_ROLE_ARN", ROLE),
    ];

    /// Stands in for AWS: STS knows everybody, a bucket everything. (The client asks STS by TLS alone.)
    #[derive(Clone, Debug, Default)]
    struct Aws(Arc<Mutex<Vec<(String, String)>>>);

    impl HttpConnector for Aws {
        fn connect(&self, _: &ClientOptions) -> object_store::Result<HttpClient> {
            Ok(HttpClient::new(self.clone()))
        }
    }

    #[async_trait]
    impl HttpService for Aws {
        async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
            let signed = request.headers().get("authorization").map(|value| value.to_str().unwrap().to_owned());
            self.0.lock().unwrap().push((request.uri().to_string(), signed.unwrap_or_default()));
            let body = match request.uri().host() {
                Some(host) if host.starts_with("sts.") => {
                    "<AssumeRoleWithWebIdentityResponse><AssumeRoleWithWebIdentityResult><Credentials>\
                     <AccessKeyId>OFROLE</AccessKeyId><SecretAccessKey>s</SecretAccessKey><SessionToken>t</SessionToken>\
                     <Expiration>2126-01-01T00:00:00Z</Expiration></Credentials></AssumeRoleWithWebIdentityResult>\
                     </AssumeRoleWithWebIdentityResponse>"
                }
                _ => "weights",
            };
            let mut response = HttpResponse::new(body.to_owned().into());
            let headers = response.headers_mut();
            headers.insert("content-length", body.len().into());
            headers.insert("last-modified", "Fri, 27 Nov 2026 00:00:00 GMT".parse().unwrap());
            headers.insert("etag", "\"e\"".parse().unwrap());
            Ok(response)
        }
    }

    fn environment(variables: &[&[(&str, &str)]]) -> Environment {
        variables.concat().iter().map(|(name, value)| ((*name).into(), (*value).into())).collect()
    }

    #[test]
    fn a_role_of_its_own_is_assumed_with_the_pods_token() {
        let token = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(&token, "pod.jwt").unwrap();
        let file = ("AWS_WEB_IDENTITY_TOKEN_FILE", token.path().to_str().unwrap());
        // Keys without the prefix are not those of this role.
        let keys = [("AWS_ACCESS_KEY_ID", "k"), ("AWS_SECRET_ACCESS_KEY", "s"), ("AWS_SESSION_TOKEN", "t")];
        for keys in [&[][..], &keys] {
            let environment = environment(&[&OF_POD, &[file], keys]);
            for (role, assumed) in [(Role::Model, Some("team%2Fmodels")), (Role::Output, Some("pod"))] {
                let (settings, aws) = (of_role(&environment, role, &FAMILY), Aws::default());
                check(&settings).unwrap();
                let store = build(&settings, "models", aws.clone()).unwrap();
                let runtime = tokio::runtime::Runtime::new().unwrap();
                let read = runtime.block_on(async { store.get(&"m/config.json".into()).await?.bytes().await });
                assert_eq!(read.unwrap(), "weights");
                let asked = aws.0.lock().unwrap().clone();
                let assumed = assumed.filter(|_| keys.is_empty() || role == Role::Model);
                let is_sts = |(uri, _): &&(String, String)| uri.starts_with("https://sts.eu-central-1.amazonaws.com");
                let sts: Vec<_> = asked.iter().filter(is_sts).map(|(uri, _)| uri).collect();
                assert_eq!(sts.len(), usize::from(assumed.is_some()), "{asked:?}");
                if let Some(assumed) = assumed {
                    let parts = ["Action=AssumeRoleWithWebIdentity", "WebIdentityToken=pod.jwt", assumed];
                    assert!(parts.iter().all(|part| sts[0].contains(part)), "{sts:?}");
                    assert!(asked.last().unwrap().1.contains("Credential=OFROLE/"), "{asked:?}");
                }
            }
        }
    }

    #[test]
    fn a_role_that_nobody_can_assume_is_refused_with_what_to_do() {
        let token = tempfile::NamedTempFile::new().unwrap();
        let file = [("AWS_WEB_IDENTITY_TOKEN_FILE", token.path().to_str().unwrap())];
        let pod_identity = [
            ("AWS_CONTAINER_CREDENTIALS_FULL_URI", "http://169.254.170.23/v1/credentials"),
            ("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", file[0].1),
        ];
        let keys = [("TUNESMITH_MODEL_AWS_ACCESS_KEY_ID", "k"), ("TUNESMITH_MODEL_AWS_SECRET_ACCESS_KEY", "s")];
        let refused = |variables: &[&[(&str, &str)]], parts: &[&str]| {
            let error = connect(&environment(variables), Role::Model, "models").unwrap_err();
            assert!(error.contains("TUNESMITH_MODEL_AWS_ROLE_ARN"), "{error}");
            assert!(parts.iter().all(|part| error.contains(part)), "{error}");
        };
        refused(&[&OF_POD], &["AWS_WEB_IDENTITY_TOKEN_FILE is not", "eks.amazonaws.com/role-arn"]);
        refused(&[&OF_POD, &pod_identity], &["EKS Pod Identity", "AWS_CONTAINER_CREDENTIALS_FULL_URI", "roleArn"]);
        refused(&[&OF_POD, &file, &keys], &["TUNESMITH_MODEL_AWS_ACCESS_KEY_ID", "remove one"]);
        refused(
            &[&OF_POD, &file, &[("TUNESMITH_MODEL_AWS_SKIP_SIGNATURE", "true")]],
            &["SKIP_SIGNATURE", "remove one"],
        );
        connect(&environment(&[&OF_POD, &pod_identity, &file]), Role::Model, "models").unwrap();
        // A use without a role of its own has the pod's.
        connect(&environment(&[&pod_identity, &OF_POD[1..]]), Role::Output, "adapters").unwrap();
    }

    /// An environment in which everything is sound.
    const SOUND: [(&str, &str); 3] = [
        ("TUNESMITH_OUTPUT_AWS_ENDPOINT_URL", "http://127.0.0.1:8333"),
        ("TUNESMITH_OUTPUT_AWS_ACCESS_KEY_ID", "k3y"),
        ("TUNESMITH_OUTPUT_AWS_SECRET_ACCESS_KEY", "s3cr3t"),
    ];

    fn connect_with(variables: &[(&str, &str)]) -> Result<(), String> {
        let all = SOUND.iter().chain(variables).map(|(name, value)| ((*name).into(), (*value).into()));
        connect(&all.collect(), Role::Output, "adapters").map(drop)
    }

    #[test]
    fn the_nodes_own_identity_is_used_only_if_that_is_said() {
        let connect = |variables: &[(&str, &str)]| {
            let endpoint = ("TUNESMITH_OUTPUT_AWS_ENDPOINT_URL", "http://127.0.0.1:8333");
            let all =
                [endpoint].iter().chain(variables).map(|(name, value)| ((*name).into(), (*value).into())).collect();
            super::connect(&all, Role::Output, "adapters").map(drop)
        };
        for silent in [&[][..], &[("AWS_EC2_METADATA_DISABLED", "true")], &[("AWS_SKIP_SIGNATURE", "false")]] {
            let error = connect(silent).unwrap_err();
            assert!(error.contains("AWS_EC2_METADATA_DISABLED=false"), "{error}");
        }
        connect(&[("AWS_EC2_METADATA_DISABLED", "False")]).unwrap();
        connect(&[("AWS_SKIP_SIGNATURE", "true")]).unwrap();
    }

    #[test]
    fn an_http_endpoint_needs_no_further_setting() {
        connect_with(&[]).unwrap();
        connect_with(&[("TUNESMITH_OUTPUT_AWS_ENDPOINT_URL", "HTTP://127.0.0.1:8333")]).unwrap();
    }

    #[test]
    fn each_setting_that_can_not_be_used_is_named_and_no_secret_is_shown() {
        for (name, value) in [
            ("AWS_ENDPOINT_URL", "host:9000"),
            ("AWS_ENDPOINT_URL", "http://"),
            ("AWS_ENDPOINT_URL_S3", "s3.example.com"),
            ("AWS_ENDPOINT", "//host"),
            ("AWS_ENDPOINT_URL_STS", "sts"),
            ("AWS_METADATA_ENDPOINT", "169.254.169.254"),
            ("AWS_REGION", "eu central 1"),
            ("AWS_REGION", "eu-central-1\nx"),
            ("AWS_DEFAULT_REGION", "münchen"),
            ("AWS_ACCESS_KEY_ID", "k3y\nother"),
            ("AWS_ACCESS_KEY_ID", "k3y other"),
            ("AWS_SECRET_ACCESS_KEY", "s3crét"),
            ("AWS_SESSION_TOKEN", "t0ken\u{fffd}"),
            ("AWS_SKIP_SIGNATURE", "maybe"),
            ("AWS_VIRTUAL_HOSTED_STYLE_REQUEST", "path"),
            ("AWS_UNSIGNED_PAYLOAD", "2"),
            ("AWS_ALLOW_HTTP", "sure"),
            ("AWS_TIMEOUT", "soon"),
            ("AWS_READ_TIMEOUT", "0s"),
            ("AWS_CONNECT_TIMEOUT", "10 parsecs"),
            ("AWS_READ_TIMEOUT", "-1s"),
            ("AWS_POOL_MAX_IDLE_PER_HOST", "many"),
            ("AWS_CHECKSUM_ALGORITHM", "md4"),
            ("AWS_CONDITIONAL_PUT", "sometimes"),
            ("AWS_USER_AGENT", "a\nb"),
            ("AWS_DEFAULT_CONTENT_TYPE", "té"),
            ("AWS_PROXY_URL", "http://"),
            ("AWS_PROXY_URL", "x y"),
            ("AWS_PROXY_CA_CERTIFICATE", "junk"),
            ("AWS_SERVER_SIDE_ENCRYPTION", "sse-c"),
            ("AWS_SERVER_SIDE_ENCRYPTION", "rot13"),
            ("AWS_SSE_CUSTOMER_KEY_BASE64", "k3y="),
            ("AWS_CA_BUNDLE", "/absent.pem"),
            ("AWS_WEB_IDENTITY_TOKEN_FILE", "/absent/token"),
        ] {
            let variable = format!("TUNESMITH_OUTPUT_{name}");
            let error = connect_with(&[(&variable, value)]).unwrap_err();
            assert!(error.contains(&variable), "{name} {value:?}: {error}");
            assert!(["k3y", "s3cr", "t0ken"].iter().all(|secret| !error.contains(secret)), "{error}");
        }
    }

    #[test]
    fn half_an_identity_is_refused_rather_than_replaced_by_the_machines_own() {
        let connect = |variables: &[(&str, &str)]| {
            let all = variables.iter().map(|(name, value)| ((*name).into(), (*value).into()));
            super::connect(&all.collect(), Role::Dataset, "data").map(drop)
        };
        let token = tempfile::NamedTempFile::new().unwrap();
        let token = token.path().to_str().unwrap();
        for (variables, missing) in [
            (&[("AWS_ACCESS_KEY_ID", "k")][..], "AWS_SECRET_ACCESS_KEY is not"),
            (&[("AWS_SECRET_ACCESS_KEY", "s")], "AWS_ACCESS_KEY_ID is not"),
            (&[("AWS_SESSION_TOKEN", "t")], "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY are not"),
            (&[("AWS_WEB_IDENTITY_TOKEN_FILE", token)], "AWS_ROLE_ARN is not"),
            (&[("AWS_ROLE_ARN", "arn:aws:iam::1:role/r")], "AWS_WEB_IDENTITY_TOKEN_FILE is not"),
            (&[("AWS_CONTAINER_CREDENTIALS_FULL_URI", "http://169.254.170.23/v1")], "TOKEN_FILE is not"),
            (&[("AWS_PROFILE", "work"), ("AWS_ENDPOINT_URL", "http://h")], "AWS_PROFILE is not read here"),
        ] {
            let error = connect(variables).unwrap_err();
            assert!(error.contains(missing) && error.contains(variables[0].0), "{error}");
        }
        connect(&[("AWS_WEB_IDENTITY_TOKEN_FILE", token), ("AWS_ROLE_ARN", "arn:aws:iam::1:role/r")]).unwrap();
        // What other tools want is none of ours.
        let keys = [("AWS_ACCESS_KEY_ID", "k"), ("AWS_SECRET_ACCESS_KEY", "s")];
        for (name, value) in [("AWS_PROFILE", "work"), ("AWS_PAGER", ""), ("AWS_DEFAULT_OUTPUT", "json")] {
            connect(&[&keys[..], &[(name, value)]].concat()).unwrap();
        }
    }
}
