//! Servers of object stores on this machine's loopback, each in a folder of its own; they end with the test.

use std::{
    fs,
    io::{Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    process::{Child, Command, Stdio},
    sync::{Mutex, Once, PoisonError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use base64::{Engine, prelude::BASE64_STANDARD};
use serde_json::json;
use sha2::{Digest, Sha256};
use tempfile::TempDir;
use tunesmith_crds::Cloud;
use tunesmith_e2e::{Toolchain, run_with_input};

/// The buckets that a server has.
pub const BUCKETS: [&str; 3] = ["models", "datasets", "adapters"];
/// A bucket that Google's server opens to all.
const OPEN: &str = "open";
/// Far longer than any start takes.
const PATIENCE: Duration = Duration::from_secs(120);
/// What SeaweedFS adds to a port for its gRPC.
const GRPC_OFFSET: u16 = 10_000;
/// Azurite's own account, and its key, which Microsoft publishes.
const AZURITE: (&str, &str) =
    ("devstoreaccount1", "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==");

/// Environment variables, or the keys of a Secret.
pub type Variables = Vec<(&'static str, String)>;

/// A server that answers.
pub struct Server {
    /// Its kind.
    pub cloud: Cloud,
    /// What a job's Secret says of it.
    pub variables: Variables,
    /// Other ways to say who asks, each with a bucket that is then readable.
    pub identities: Vec<(Variables, &'static str)>,
    /// Identities that it refuses, each with words of the message and what no message may show.
    pub refused: Vec<(Variables, &'static str, String)>,
    child: Child,
    _folder: TempDir,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Server {
    /// SeaweedFS.
    pub fn s3() -> Result<Self> {
        let (tools, folder) = (installed()?, tempfile::tempdir()?);
        let [master, volume, filer, port] = free_ports()?;
        let (id, secret) = ("tester", "an-access-key-of-the-tests");
        let identities = json!({"identities": [{
            "name": id, "credentials": [{"accessKey": id, "secretKey": secret}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }]});
        fs::write(folder.path().join("s3.json"), identities.to_string())?;
        let mut command = Command::new(tools.program("weed"));
        command.arg("server").arg(format!("-dir={}", folder.path().display()));
        command.args([
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            "-s3",
            "-s3.autoCreateBucket=false",
            "-s3.port.iceberg=0",
        ]);
        command.args([
            "-s3.port.lance=0",
            "-master.telemetry=false",
            "-master.volumeSizeLimitMB=64",
            "-volume.max=100",
        ]);
        command.arg(format!("-master.port={master}")).arg(format!("-volume.port={volume}"));
        command.arg(format!("-filer.port={filer}")).arg(format!("-s3.port={port}"));
        command.arg(format!("-s3.port.grpc={}", port + GRPC_OFFSET));
        command.arg(format!("-filer.localSocket={}", folder.path().join("filer.sock").display()));
        command.arg(format!("-s3.localSocket={}", folder.path().join("s3.sock").display()));
        command.arg(format!("-s3.config={}", folder.path().join("s3.json").display()));
        let child = start(command, &folder, port)?;
        let with_secret = |secret: &str| -> Variables {
            vec![
                ("AWS_ENDPOINT_URL", format!("http://127.0.0.1:{port}")),
                ("AWS_ACCESS_KEY_ID", id.into()),
                ("AWS_SECRET_ACCESS_KEY", secret.into()),
                ("AWS_REGION", "us-east-1".into()),
            ]
        };
        let server = Self {
            cloud: Cloud::S3,
            variables: with_secret(secret),
            identities: Vec::new(),
            refused: vec![(with_secret("another-key"), "AWS_SECRET_ACCESS_KEY of the Secret", "another-key".into())],
            child,
            _folder: folder,
        };
        let mut shell = || {
            let mut command = Command::new(tools.program("weed"));
            command.arg("shell").arg(format!("-master=127.0.0.1:{master}")).arg(format!("-filer=127.0.0.1:{filer}"));
            let lines: String = BUCKETS.iter().map(|bucket| format!("s3.bucket.create -name {bucket}\n")).collect();
            run_with_input(command.current_dir(server._folder.path()), &lines)?;
            let listed = run_with_input(&mut command, "s3.bucket.list\n")?;
            ensure!(BUCKETS.iter().all(|bucket| listed.contains(bucket)), "no buckets yet: {listed}");
            Ok(())
        };
        until(&mut shell)?;
        Ok(server)
    }

    /// fake-gcs-server, with accounts that sign their tokens.
    pub fn google() -> Result<Self> {
        let (tools, folder) = (installed()?, tempfile::tempdir()?);
        let [port, ..] = free_ports()?;
        let mut command = Command::new(tools.program("fake-gcs"));
        command.arg("-listen").arg(format!("127.0.0.1:{port}")).arg("-keys").arg(folder.path());
        command.arg("-buckets").arg([&BUCKETS[..], &[OPEN]].concat().join(","));
        let child = start(command, &folder, port)?;
        let key = |account: &str| -> Result<serde_json::Value> {
            Ok(serde_json::from_slice(&fs::read(folder.path().join(format!("{account}.json")))?)?)
        };
        let (owner, stranger) = (key("owner")?, key("stranger")?);
        let forged = json!({"client_email": "owner", "private_key_id": "1", "private_key": stranger["private_key"]});
        let url = || ("GOOGLE_BASE_URL", format!("http://127.0.0.1:{port}"));
        let with_key = |key: &serde_json::Value| vec![url(), ("GOOGLE_SERVICE_ACCOUNT_KEY", key.to_string())];
        let file = |name| (name, folder.path().join("owner.json").display().to_string());
        let shown = |key: &serde_json::Value| key["private_key"].as_str().unwrap_or_default()[60..90].to_owned();
        Ok(Self {
            cloud: Cloud::Google,
            variables: with_key(&owner),
            identities: vec![
                (vec![url(), file("GOOGLE_APPLICATION_CREDENTIALS")], BUCKETS[0]),
                (vec![url(), file("GOOGLE_SERVICE_ACCOUNT")], BUCKETS[0]),
                (vec![url(), ("GOOGLE_SKIP_SIGNATURE", "true".into())], OPEN),
                (vec![("STORAGE_EMULATOR_HOST", format!("127.0.0.1:{port}"))], OPEN),
            ],
            refused: vec![
                (with_key(&stranger), "stranger does not have access to", shown(&stranger)),
                (with_key(&forged), "Authentication required", shown(&stranger)),
                (
                    vec![url(), ("GOOGLE_SKIP_SIGNATURE", "true".into())],
                    "GOOGLE_SERVICE_ACCOUNT_KEY of the Secret",
                    "-".repeat(5),
                ),
            ],
            child,
            _folder: folder,
        })
    }

    /// Azurite.
    pub fn azure() -> Result<Self> {
        let (tools, folder) = (installed()?, tempfile::tempdir()?);
        let [port, ..] = free_ports()?;
        let azurite = tools.bin().join("azurite");
        let mut command = Command::new(azurite.join("node"));
        command.arg(azurite.join("node_modules/azurite/dist/src/blob/main.js")).args(["--blobHost", "127.0.0.1"]);
        // Its own check lags behind the versions that clients ask for.
        command.args(["--silent", "--disableTelemetry", "--inMemoryPersistence", "--skipApiVersionCheck"]);
        command.arg("--blobPort").arg(port.to_string());
        let child = start(command, &folder, port)?;
        let (account, key) = AZURITE;
        let sas = account_sas(account, &BASE64_STANDARD.decode(key)?);
        for container in BUCKETS {
            let target = format!("/{account}/{container}?restype=container&{sas}");
            until(&mut || {
                let status = put(port, &target)?;
                ensure!(status == 201, "Azurite made no container: {status}");
                Ok(())
            })?;
        }
        let store = || -> Variables {
            let endpoint = format!("http://127.0.0.1:{port}/{account}");
            vec![("AZURE_STORAGE_ACCOUNT_NAME", account.into()), ("AZURE_STORAGE_ENDPOINT", endpoint)]
        };
        let with = |name, value: &str| [store(), vec![(name, value.to_owned())]].concat();
        let forged = sas.replace("sig=", "sig=AAAA");
        Ok(Self {
            cloud: Cloud::Azure,
            variables: with("AZURE_STORAGE_ACCOUNT_KEY", key),
            identities: vec![
                (with("AZURE_STORAGE_SAS_TOKEN", &sas), BUCKETS[0]),
                (
                    vec![
                        ("AZURE_STORAGE_USE_EMULATOR", "true".into()),
                        ("AZURITE_BLOB_STORAGE_URL", format!("http://127.0.0.1:{port}")),
                    ],
                    BUCKETS[0],
                ),
            ],
            refused: vec![
                (
                    with("AZURE_STORAGE_ACCOUNT_KEY", "c2VjcmV0LWtleQ=="),
                    "AZURE_STORAGE_ACCOUNT_KEY or",
                    "c2VjcmV0LWtleQ==".into(),
                ),
                (with("AZURE_STORAGE_SAS_TOKEN", &forged), "AZURE_STORAGE_SAS_TOKEN of the Secret", "AAAA".into()),
            ],
            child,
            _folder: folder,
        })
    }

    /// The scheme of its URIs.
    pub fn scheme(&self) -> &'static str {
        self.cloud.scheme()
    }
}

/// The toolchain, with the servers in it.
fn installed() -> Result<Toolchain> {
    static ONCE: Once = Once::new();
    let tools = Toolchain::new()?;
    let mut installed = Ok(());
    ONCE.call_once(|| installed = tools.install_stores());
    installed.map(|()| tools)
}

/// Starts a server and waits until it listens. Its output is in its folder.
fn start(mut command: Command, folder: &TempDir, port: u16) -> Result<Child> {
    let log = fs::File::create(folder.path().join("log"))?;
    command.current_dir(folder.path()).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    let mut child = command.spawn().with_context(|| format!("cannot start {command:?}"))?;
    let listens = until(&mut || {
        if let Some(status) = child.try_wait()? {
            bail!("{command:?} ended ({status})");
        }
        TcpStream::connect(SocketAddr::from((Ipv4Addr::LOCALHOST, port)))?;
        Ok(())
    });
    if let Err(error) = listens {
        let _ = child.kill();
        return Err(error.context(fs::read_to_string(folder.path().join("log")).unwrap_or_default()));
    }
    Ok(child)
}

fn until(work: &mut dyn FnMut() -> Result<()>) -> Result<()> {
    let begun = Instant::now();
    loop {
        match work() {
            Err(error) if begun.elapsed() > PATIENCE => return Err(error),
            Err(_) => thread::sleep(Duration::from_millis(200)),
            Ok(()) => return Ok(()),
        }
    }
}

/// Four ports on which nobody listens, nor on those that SeaweedFS adds to them; others each time.
fn free_ports() -> Result<[u16; 4]> {
    static TAKEN: Mutex<u16> = Mutex::new(0);
    let is_free = |port: u16| TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok();
    let mut taken = TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
    let start = (20_000 + u16::try_from(std::process::id() % 2_000)? * 4).max(*taken + 1);
    let mut free = (start..32_000).filter(|port| is_free(*port) && is_free(*port + GRPC_OFFSET));
    let mut found = [0; 4];
    for port in &mut found {
        *port = free.next().context("no free port")?;
    }
    *taken = found[3];
    Ok(found)
}

/// Sends a PUT without a body, and tells the answer's status.
fn put(port: u16, target: &str) -> Result<u16> {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
    write!(
        stream,
        "PUT {target} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    answer.split(' ').nth(1).and_then(|status| status.parse().ok()).with_context(|| format!("no HTTP: {answer}"))
}

/// A shared access signature for all of an account's blobs.
/// <https://learn.microsoft.com/rest/api/storageservices/create-account-sas>
fn account_sas(account: &str, key: &[u8]) -> String {
    let (version, permissions, expiry) = ("2021-08-06", "rwdlac", "2099-01-01T00:00:00Z");
    let text = format!("{account}\n{permissions}\nb\nsco\n\n{expiry}\n\n\n{version}\n\n");
    let signature = BASE64_STANDARD.encode(hmac(key, text.as_bytes()));
    let signature = signature.replace('+', "%2B").replace('/', "%2F").replace('=', "%3D");
    format!("sv={version}&ss=b&srt=sco&sp={permissions}&se={}&sig={signature}", expiry.replace(':', "%3A"))
}

/// HMAC-SHA256 (RFC 2104) with a key of at most a block.
fn hmac(key: &[u8], text: &[u8]) -> Vec<u8> {
    let pad = |byte: u8| {
        let mut block = [byte; 64];
        block.iter_mut().zip(key).for_each(|(block, key)| *block ^= key);
        block
    };
    let inner = Sha256::new().chain_update(pad(0x36)).chain_update(text).finalize();
    Sha256::new().chain_update(pad(0x5c)).chain_update(inner).finalize().to_vec()
}
