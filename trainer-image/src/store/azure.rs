//! Clients of Azure Blob Storage from environment variables: `AZURE_…`, with a role's prefix before them or without.

use object_store::azure::{AzureConfigKey, MicrosoftAzure, MicrosoftAzureBuilder};

use super::{
    Environment, Role, client,
    listing::KeepKeys,
    settings::{
        Settings,
        azure::{Access, FAMILY, check},
        check_network, of_role,
    },
};

/// A client for a container.
pub(super) fn connect(environment: &Environment, role: Role, container: &str) -> Result<MicrosoftAzure, String> {
    let settings = of_role(environment, role, &FAMILY);
    check_network(environment)?;
    let access = check(&settings)?;
    client::warn_of_unknown::<AzureConfigKey>(&settings, &FAMILY, role);
    build(&settings, &access, container).map_err(|error| name_the_culprit(&settings, container).unwrap_or(error))
}

fn build(settings: &Settings, access: &Access, container: &str) -> Result<MicrosoftAzure, String> {
    let options = client::options(settings, &FAMILY)?;
    let options = if access.is_http() { options.with_allow_http(true) } else { options };
    let mut builder = MicrosoftAzureBuilder::new().with_client_options(options).with_http_connector(KeepKeys::Azure);
    for (key, setting) in client::known(settings) {
        // The client's own emulator takes its address from the process alone, and ends the process over some.
        if key != AzureConfigKey::UseEmulator {
            builder = builder.with_config(key, &setting.value);
        }
    }
    if let Some(endpoint) = &access.endpoint {
        builder = builder.with_endpoint(endpoint.clone());
    }
    if let Some(key) = access.key {
        builder = builder.with_access_key(key);
    }
    // Whatever the environment says, the container comes from the URI.
    builder.with_account(&access.account).with_container_name(container).build().map_err(|error| error.to_string())
}

fn name_the_culprit(settings: &Settings, container: &str) -> Option<String> {
    let sound = || MicrosoftAzureBuilder::new().with_account("account").with_container_name(container);
    let alone = |key, value: &str| {
        let builder = match key {
            AzureConfigKey::ContainerName | AzureConfigKey::CredentialType => return None,
            AzureConfigKey::SasKey => sound(),
            _ => sound().with_access_key("aw=="),
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
        for (name, value) in [
            ("AZURE_STORAGE_ACCOUNT_NAME", "My-Team"),
            ("AZURE_STORAGE_ACCOUNT_KEY", "s3cr3t!"),
            ("AZURE_STORAGE_KEY", "s3cr3t!"),
            ("AZURE_STORAGE_SAS_TOKEN", "s3cr3t"),
            ("AZURE_STORAGE_SAS_TOKEN", "sv=1&sig=%ff&s3cr3t=x"),
            ("AZURE_STORAGE_SAS_TOKEN", "sv=1&sig=x&s3cr3t"),
            ("AZURE_STORAGE_ENDPOINT", "host:10000"),
            ("AZURE_STORAGE_ENCRYPTION_KEY", "s3cr3t="),
            ("AZURE_DISABLE_TAGGING", "maybe"),
            ("AZURE_SKIP_SIGNATURE", "maybe"),
            ("AZURE_TIMEOUT", "soon"),
            ("AZURE_CONNECT_TIMEOUT", "10 parsecs"),
            ("AZURE_ALLOW_HTTP", "sure"),
            ("AZURE_PROXY_URL", "x y"),
            ("AZURE_CA_BUNDLE", "/absent.pem"),
        ] {
            let variable = format!("TUNESMITH_OUTPUT_{name}");
            let mut variables = vec![(variable.as_str(), value)];
            if name != "AZURE_STORAGE_ACCOUNT_NAME" {
                variables.push(("TUNESMITH_OUTPUT_AZURE_STORAGE_ACCOUNT_NAME", "team"));
            }
            if !["_KEY", "SAS_TOKEN", "SIGNATURE"].iter().any(|end| name.ends_with(end)) || name.contains("ENCRYPTION")
            {
                variables.push(("TUNESMITH_OUTPUT_AZURE_STORAGE_ACCOUNT_KEY", "aw=="));
            }
            let error = connect(&environment(&variables), Role::Output, "adapters").map(drop).unwrap_err();
            assert!(error.contains(&variable) && !error.contains("s3cr3t"), "{name} {value:?}: {error}");
        }
    }

    #[test]
    fn an_emulator_is_all_that_a_test_has_to_name() {
        let variables = environment(&[("AZURE_STORAGE_USE_EMULATOR", "true"), ("AZURE_CONTAINER_NAME", "other")]);
        let client = connect(&variables, Role::Output, "adapters").unwrap();
        assert!(client.to_string().contains("adapters"), "{client}");
    }
}
