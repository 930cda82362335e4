//! The settings of Azure Blob Storage's clients: `AZURE_…`.

use object_store::azure::AzureConfigKey;

use super::{
    Family, Setting, Settings,
    check::{check_credential, check_file, check_option, check_switch, check_url, is_on, only_one},
};

const ACCOUNT: &str = "AZURE_STORAGE_ACCOUNT_NAME";
const KEY: &str = "AZURE_STORAGE_ACCOUNT_KEY";
const SAS: &str = "AZURE_STORAGE_SAS_TOKEN";
const TOKEN: &str = "AZURE_STORAGE_TOKEN";
const CLIENT: &str = "AZURE_CLIENT_ID";
const TENANT: &str = "AZURE_TENANT_ID";
const CLIENT_SECRET: &str = "AZURE_CLIENT_SECRET";
/// A token of the pod's ServiceAccount, where the cluster gives it one.
const TOKEN_FILE: &str = "AZURE_FEDERATED_TOKEN_FILE";
/// `managed_identity` lets the metadata service say who asks.
const CREDENTIAL_TYPE: &str = "AZURE_CREDENTIAL_TYPE";
const MANAGED_IDENTITY: &str = "managed_identity";
const MSI_ENDPOINT: &str = "AZURE_MSI_ENDPOINT";
const CLI: &str = "AZURE_USE_AZURE_CLI";
const SKIP_SIGNATURE: &str = "AZURE_SKIP_SIGNATURE";
const ENDPOINT: &str = "AZURE_STORAGE_ENDPOINT";
const AUTHORITY: &str = "AZURE_AUTHORITY_HOST";
/// Asks Azurite as the account and with the key that it is delivered with.
const EMULATOR: &str = "AZURE_STORAGE_USE_EMULATOR";
/// Where Azurite is, as its own tools name it.
const EMULATOR_URL: &str = "AZURITE_BLOB_STORAGE_URL";
/// Read by Azure's own tools alone.
const CONNECTION: &str = "AZURE_STORAGE_CONNECTION_STRING";
const ENCRYPTION_KEY: &str = "AZURE_STORAGE_ENCRYPTION_KEY";

/// What clients of Azure Blob Storage read.
pub(in super::super) const FAMILY: Family = Family {
    name: "AZURE_",
    foreign: EMULATOR_URL,
    aliases: &[
        // Those of Azure's command line, then those of object_store.
        ("AZURE_STORAGE_ACCOUNT", ACCOUNT),
        ("AZURE_STORAGE_KEY", KEY),
        ("AZURE_STORAGE_ACCESS_KEY", KEY),
        ("AZURE_STORAGE_MASTER_KEY", KEY),
        ("AZURE_STORAGE_SAS_KEY", SAS),
        ("AZURE_STORAGE_CLIENT_ID", CLIENT),
        ("AZURE_STORAGE_CLIENT_SECRET", CLIENT_SECRET),
        ("AZURE_STORAGE_TENANT_ID", TENANT),
        ("AZURE_STORAGE_AUTHORITY_ID", TENANT),
        ("AZURE_AUTHORITY_ID", TENANT),
        ("AZURE_STORAGE_AUTHORITY_HOST", AUTHORITY),
        ("AZURE_ENDPOINT", ENDPOINT),
        ("AZURE_IDENTITY_ENDPOINT", MSI_ENDPOINT),
    ],
    together: &[
        &[
            KEY,
            SAS,
            TOKEN,
            CLIENT,
            TENANT,
            CLIENT_SECRET,
            TOKEN_FILE,
            CREDENTIAL_TYPE,
            MSI_ENDPOINT,
            CLI,
            SKIP_SIGNATURE,
            EMULATOR,
        ],
        &[ACCOUNT, ENDPOINT],
    ],
    secret: &[KEY, SAS, TOKEN, CLIENT_SECRET, CONNECTION, ENCRYPTION_KEY],
    decisive: &[ACCOUNT, KEY, SAS, TOKEN, ENDPOINT, EMULATOR],
    urls: &[ENDPOINT, AUTHORITY, MSI_ENDPOINT, EMULATOR_URL],
    ours: &[EMULATOR, EMULATOR_URL, CONNECTION],
    ..Family::PLAIN
};

/// The account and the key that Azurite is delivered with, which Microsoft publishes.
const EMULATOR_ACCOUNT: &str = "devstoreaccount1";
const EMULATOR_KEY: &str = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==";

/// Whose store it is, and where.
#[derive(Debug, PartialEq, Eq)]
pub(in super::super) struct Access {
    /// The storage account.
    pub(in super::super) account: String,
    /// The server, where it is not Azure's.
    pub(in super::super) endpoint: Option<String>,
    /// The key, where it is an emulator's.
    pub(in super::super) key: Option<&'static str>,
}

impl Access {
    /// Whether the server is asked without TLS.
    pub(in super::super) fn is_http(&self) -> bool {
        self.endpoint.as_ref().is_some_and(|url| url.to_ascii_lowercase().starts_with("http:"))
    }
}

/// Checks what a client would stumble over, or ignore.
pub(in super::super) fn check(settings: &Settings) -> Result<Access, String> {
    for (name, setting) in settings {
        check_one(name, setting).map_err(|problem| format!("{} {problem}", setting.variable))?;
    }
    let value = |name: &str| settings.get(name).map(|setting| setting.value.clone());
    let endpoint = value(ENDPOINT).map(|url| url.trim_end_matches('/').to_owned());
    let is_asked = identity(settings)?;
    if is_on(settings, EMULATOR) {
        let account = value(ACCOUNT).unwrap_or_else(|| EMULATOR_ACCOUNT.into());
        let server = value(EMULATOR_URL).unwrap_or_else(|| "http://127.0.0.1:10000".into());
        let endpoint = Some(format!("{}/{account}", server.trim_end_matches('/')));
        return Ok(Access { account, endpoint, key: (!is_asked).then_some(EMULATOR_KEY) });
    }
    let Some(account) = value(ACCOUNT) else {
        return Err(format!("{ACCOUNT} is not set: it names the storage account that the container lies in"));
    };
    if is_asked {
        return Ok(Access { account, endpoint, key: None });
    }
    if let Some(set) = settings.get(CONNECTION) {
        return Err(format!("{} is not read here: set {ACCOUNT} and {KEY}", set.variable));
    }
    // The client would ask the metadata service, and be what the node is. Nobody means that by leaving something out.
    Err(format!(
        "nothing says who asks: set {KEY} or {SAS}; {CLIENT}, {TENANT} and {CLIENT_SECRET} or {TOKEN_FILE}; \
         {SKIP_SIGNATURE}=true for a container that is open to all; or {CREDENTIAL_TYPE}={MANAGED_IDENTITY} to be what the \
         node is"
    ))
}

/// Whether something says who asks.
fn identity(settings: &Settings) -> Result<bool, String> {
    let says_who = |name: &str| ![CLI, SKIP_SIGNATURE].contains(&name) || is_on(settings, name);
    let identities = [KEY, SAS, TOKEN, CLIENT_SECRET, TOKEN_FILE, CREDENTIAL_TYPE, CLI, SKIP_SIGNATURE].into_iter();
    let identities: Vec<&Setting> =
        identities.filter(|name| says_who(name)).filter_map(|name| settings.get(name)).collect();
    let variable = |name: &str| settings.get(name).map(|setting| setting.variable.as_str());
    let missing = |set: &str, name: &str| Err(format!("{set} is set, but {name} is not"));
    let Some(chosen) = only_one(&identities)? else {
        return match (variable(CLIENT), variable(MSI_ENDPOINT)) {
            // Whoever names the metadata service means it.
            (_, Some(_)) => Ok(true),
            (Some(set), None) => missing(set, &format!("{CLIENT_SECRET} or {TOKEN_FILE}")),
            (None, None) => Ok(false),
        };
    };
    let is_of_a_client = [CLIENT_SECRET, TOKEN_FILE].iter().any(|name| settings.get(*name) == Some(chosen));
    match [CLIENT, TENANT].into_iter().find(|name| is_of_a_client && variable(name).is_none()) {
        Some(name) => missing(&chosen.variable, name),
        None => Ok(true),
    }
}

fn check_one(name: &str, Setting { value, .. }: &Setting) -> Result<(), String> {
    match name {
        ENDPOINT | AUTHORITY | MSI_ENDPOINT | EMULATOR_URL => check_url(value).map(drop),
        ACCOUNT
            if !(3..=24).contains(&value.len())
                || !value.bytes().all(|c| c.is_ascii_digit() || c.is_ascii_lowercase()) =>
        {
            Err(format!("is {value:?}, which is no storage account: one has 3 to 24 lower-case letters and digits"))
        }
        CLIENT | TENANT if !value.bytes().all(|c| c.is_ascii_alphanumeric() || b"-.".contains(&c)) => {
            Err(format!("is {value:?}: it has letters, digits, '-' and '.'"))
        }
        SAS => check_credential(value).and_then(|()| check_sas(value)),
        // It holds more than one header.
        CONNECTION => Ok(()),
        _ if FAMILY.secret.contains(&name) => check_credential(value),
        TOKEN_FILE => check_file(value),
        CREDENTIAL_TYPE if value != MANAGED_IDENTITY => {
            Err(format!("is {value:?}: only {MANAGED_IDENTITY} has to be named; others follow from their settings"))
        }
        CLI | SKIP_SIGNATURE | EMULATOR => check_switch(value),
        _ if name == FAMILY.ca_bundle() || name.to_ascii_lowercase().parse::<AzureConfigKey>().is_ok() => {
            check_option(&name[FAMILY.name.len()..], value)
        }
        _ => Ok(()),
    }
}

/// A query such as `sv=…&sp=…&sig=…`.
fn check_sas(value: &str) -> Result<(), String> {
    let has = |name: &str| value.trim_start_matches('?').split('&').any(|pair| pair.starts_with(name));
    match has("sv=") && has("sig=") {
        true => Ok(()),
        false => Err("holds no sv=… and sig=…: it must be a shared access signature as Azure shows it".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{super::Role, environment, of_role},
        *,
    };

    fn check_with(variables: &[(&str, &str)]) -> Result<Access, String> {
        check(&of_role(&environment(variables), Role::Model, &FAMILY))
    }

    #[test]
    fn the_nodes_own_identity_is_used_only_if_that_is_said() {
        for silent in [&[][..], &[(SKIP_SIGNATURE, "false")], &[(ENDPOINT, "https://h")], &[(TENANT, "t")]] {
            let error = check_with(&[silent, &[(ACCOUNT, "team")]].concat()).unwrap_err();
            assert!(error.contains(KEY) && error.contains("AZURE_CREDENTIAL_TYPE=managed_identity"), "{error}");
        }
        for said in [
            &[(CREDENTIAL_TYPE, MANAGED_IDENTITY)][..],
            &[(CREDENTIAL_TYPE, MANAGED_IDENTITY), (CLIENT, "i")],
            &[(MSI_ENDPOINT, "http://127.0.0.1:42356/msi/token")],
            &[(SKIP_SIGNATURE, "true")],
            &[(CLI, "true")],
        ] {
            check_with(&[said, &[(ACCOUNT, "team")]].concat()).unwrap();
        }
    }

    #[test]
    fn half_an_identity_and_two_of_them_are_refused() {
        let token = tempfile::NamedTempFile::new().unwrap();
        let token = token.path().to_str().unwrap();
        for (variables, problem) in [
            (&[(KEY, "aw==")][..], "AZURE_STORAGE_ACCOUNT_NAME is not set"),
            (&[(ACCOUNT, "team"), (CLIENT, "i")], "AZURE_CLIENT_SECRET or AZURE_FEDERATED_TOKEN_FILE is not"),
            (&[(ACCOUNT, "team"), (CLIENT_SECRET, "s"), (CLIENT, "i")], "AZURE_TENANT_ID is not"),
            (&[(ACCOUNT, "team"), (TOKEN_FILE, token), (TENANT, "i")], "AZURE_CLIENT_ID is not"),
            (&[(ACCOUNT, "team"), (KEY, "aw=="), (SAS, "sv=1&sig=s")], "leave one of them"),
            (&[(ACCOUNT, "team"), (CONNECTION, "AccountKey=k")], "AZURE_STORAGE_CONNECTION_STRING is not read here"),
        ] {
            let error = check_with(variables).unwrap_err();
            assert!(error.contains(problem), "{error}");
        }
        check_with(&[(ACCOUNT, "team"), (TOKEN_FILE, token), (TENANT, "t"), (CLIENT, "i")]).unwrap();
        // The pod's ServiceAccount has an identity, but the Secret names another.
        let (own, account) = (format!("TUNESMITH_MODEL_{KEY}"), format!("TUNESMITH_MODEL_{ACCOUNT}"));
        check_with(&[(&own, "aw=="), (&account, "team"), (TOKEN_FILE, token), (TENANT, "t"), (CLIENT, "i")]).unwrap();
    }

    #[test]
    fn an_emulator_needs_no_further_setting_and_takes_any() {
        let access = check_with(&[(EMULATOR, "true")]).unwrap();
        assert_eq!((access.account.as_str(), access.key), ("devstoreaccount1", Some(EMULATOR_KEY)));
        assert_eq!(access.endpoint.unwrap(), "http://127.0.0.1:10000/devstoreaccount1");
        let others = [(EMULATOR_URL, "http://h:1/"), ("AZURE_STORAGE_ACCOUNT", "team"), ("AZURE_STORAGE_KEY", "aw==")];
        let access = check_with(&[&[(EMULATOR, "true")][..], &others].concat()).unwrap();
        assert_eq!(access, Access { account: "team".into(), endpoint: Some("http://h:1/team".into()), key: None });
    }

    #[test]
    fn each_value_that_can_not_be_used_is_named_and_not_shown() {
        for (name, value, problem) in [
            (ACCOUNT, "My-Team", "no storage account"),
            (ACCOUNT, "team.blob.core.windows.net", "no storage account"),
            (SAS, "s3cr3t", "holds no sv=… and sig=…"),
            (SAS, "sv=1&sig=s3cr3t x", "at position 16"),
            (KEY, "s3cr3t\nx", "at position 7"),
            (CLIENT_SECRET, "s3cr3t x", "at position 7"),
            (CLIENT, "a/b", "letters, digits"),
            (TENANT, "a b", "letters, digits"),
            (TOKEN_FILE, "/absent", "can't be read"),
            (CREDENTIAL_TYPE, "imds", "only managed_identity"),
            (ENDPOINT, "host:9000", "no scheme"),
            (AUTHORITY, "login.microsoftonline.com", "no scheme"),
            (EMULATOR, "maybe", "true or false"),
            (EMULATOR_URL, "localhost:10000", "no scheme"),
        ] {
            let error = check_with(&[(name, value)]).unwrap_err();
            assert!(error.starts_with(name) && error.contains(problem) && !error.contains("s3cr3t"), "{error}");
        }
    }
}
