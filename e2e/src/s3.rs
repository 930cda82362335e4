//! The S3 server (SeaweedFS), its buckets and its one user.

use std::fs::{self, File};
use std::io::Read;
use std::time::Duration;

use anyhow::{Context, Result};
use object_store::aws::AmazonS3Builder;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::command::run_with_input;
use crate::daemon::Daemon;
use crate::http::answers_ok;
use crate::paths::write_secret;
use crate::site::Site;

/// The buckets that every cluster has.
pub const BUCKETS: [&str; 3] = ["models", "datasets", "adapters"];

/// A restart reads its store anew, which takes up to 20 s on two idle cores.
const READY: Duration = Duration::from_secs(120);
const PORT: u16 = 8333;
/// The first ports of the server's parts, which listen on the namespace's loopback; see [`InnerPorts`].
const MASTER_PORT: u16 = 9400;
const VOLUME_PORT: u16 = 9420;
const FILER_PORT: u16 = 9440;
const GATEWAY_PORT: u16 = 9460;
/// What SeaweedFS adds to a port for its gRPC.
const GRPC_OFFSET: u16 = 10_000;
const DEFAULT_REGION: &str = "us-east-1";

/// How to reach an S3 store: the same values for the host and for pods.
#[derive(Clone, Deserialize, Serialize)]
pub struct S3 {
    /// `http://198.18.0.2:8333`.
    pub endpoint: String,
    /// The user's name.
    pub access_key_id: String,
    /// The user's password.
    pub secret_access_key: String,
    /// `us-east-1`, unless the store cares.
    pub region: String,
}

impl S3 {
    /// The store that the environment names, for a cluster that is not ours.
    pub fn from_env() -> Result<Self> {
        let variable = |name: &str| std::env::var(name).with_context(|| format!("set {name} to that of your S3 store"));
        Ok(Self {
            endpoint: variable("AWS_ENDPOINT_URL")?,
            access_key_id: variable("AWS_ACCESS_KEY_ID")?,
            secret_access_key: variable("AWS_SECRET_ACCESS_KEY")?,
            region: std::env::var("AWS_REGION").unwrap_or_else(|_| DEFAULT_REGION.into()),
        })
    }

    /// The environment variables that AWS clients read; also the keys of the Secret that a job names.
    pub fn env(&self) -> [(&'static str, &str); 5] {
        [
            ("AWS_ENDPOINT_URL", &self.endpoint),
            ("AWS_ACCESS_KEY_ID", &self.access_key_id),
            ("AWS_SECRET_ACCESS_KEY", &self.secret_access_key),
            ("AWS_REGION", &self.region),
            ("AWS_ALLOW_HTTP", "true"),
        ]
    }

    /// A client of one bucket.
    pub fn bucket(&self, name: &str) -> Result<object_store::aws::AmazonS3> {
        AmazonS3Builder::new()
            .with_endpoint(&self.endpoint)
            .with_access_key_id(&self.access_key_id)
            .with_secret_access_key(&self.secret_access_key)
            .with_region(&self.region)
            .with_allow_http(true)
            .with_bucket_name(name)
            .build()
            .with_context(|| format!("cannot make a client of the bucket {name}"))
    }

    /// Reads what [`start`] wrote.
    pub(crate) fn of(site: &Site) -> Result<Self> {
        let file = site.pki("s3-client.json");
        let content = fs::read_to_string(&file)
            .with_context(|| format!("{} is missing: is the cluster {} up?", file.display(), site.name))?;
        serde_json::from_str(&content).with_context(|| format!("{} is damaged", file.display()))
    }
}

/// The ports of the server's parts, other ones in each cluster.
///
/// Network namespaces alone do not keep two servers apart: the parts of one find each other by Unix sockets in /tmp that
/// are named after their gRPC ports. With equal ports, one cluster's objects would end up in the store of another.
struct InnerPorts {
    master: u16,
    volume: u16,
    filer: u16,
    gateway: u16,
}

impl InnerPorts {
    fn of(site: &Site) -> Self {
        let subnet = u16::from(site.network.subnet());
        Self {
            master: MASTER_PORT + subnet,
            volume: VOLUME_PORT + subnet,
            filer: FILER_PORT + subnet,
            gateway: GATEWAY_PORT + subnet,
        }
    }
}

/// Removes the sockets that a killed server leaves in /tmp.
pub(crate) fn remove_sockets(site: &Site) {
    let InnerPorts { master, volume, filer, gateway } = InnerPorts::of(site);
    for (part, port) in [("master", master), ("volume", volume), ("filer", filer), ("s3", gateway)] {
        // A server that was never started, or ended by itself, leaves none.
        let _ = fs::remove_file(format!("/tmp/seaweedfs-{part}-grpc-{}.sock", port + GRPC_OFFSET));
    }
}

/// Starts the S3 server. It takes its time: [`wait_ready`] comes last.
pub(crate) fn start(site: &Site) -> Result<()> {
    let identities = site.pki("s3-server.json");
    if !site.pki("s3-client.json").exists() {
        let user = S3 {
            endpoint: format!("http://{}:{PORT}", site.network.node_ip()),
            access_key_id: random_hex(10)?,
            secret_access_key: random_hex(20)?,
            region: DEFAULT_REGION.into(),
        };
        write_secret(&identities, &server_identities(&user))?;
        write_secret(&site.pki("s3-client.json"), &serde_json::to_string(&user)?)?;
    }
    let data = site.data("s3");
    fs::create_dir_all(&data).with_context(|| format!("cannot create {}", data.display()))?;
    let ports = InnerPorts::of(site);
    let arguments = [
        "server".into(),
        format!("-dir={}", data.display()),
        // Only S3 itself asks for keys, so only S3 is open to pods.
        "-ip=127.0.0.1".into(),
        "-ip.bind=127.0.0.1".into(),
        format!("-master.port={}", ports.master),
        format!("-volume.port={}", ports.volume),
        format!("-filer.port={}", ports.filer),
        format!("-filer.localSocket={}", site.run("filer.sock").display()),
        "-s3".into(),
        format!("-s3.ip.bind={}", site.network.node_ip()),
        format!("-s3.port={PORT}"),
        format!("-s3.port.grpc={}", ports.gateway + GRPC_OFFSET),
        format!("-s3.localSocket={}", site.run("s3.sock").display()),
        format!("-s3.config={}", identities.display()),
        "-s3.autoCreateBucket=false".into(),
        "-s3.port.iceberg=0".into(),
        "-s3.port.lance=0".into(),
        "-master.telemetry=false".into(),
        "-master.volumeSizeLimitMB=64".into(),
        "-volume.max=500".into(),
    ];
    Daemon::new(site, "weed", arguments).start(site)?;
    Ok(())
}

/// Waits until the server answers, and makes the buckets.
pub(crate) fn wait_ready(site: &Site) -> Result<()> {
    let address = (site.network.node_ip(), PORT).into();
    let weed = Daemon::new(site, "weed", []);
    weed.wait(site, READY, || answers_ok(address, "/healthz"))?;
    weed.wait(site, READY, || make_buckets(site).is_ok())
}

/// Makes the buckets that are missing, through the server's own shell: object_store has no call for it.
fn make_buckets(site: &Site) -> Result<()> {
    let ports = InnerPorts::of(site);
    let shell = || {
        let mut command = site.network.enter(site.tools.program("weed"));
        command.arg("shell").arg(format!("-master=127.0.0.1:{}", ports.master));
        command.arg(format!("-filer=127.0.0.1:{}", ports.filer)).current_dir(&site.folder);
        command
    };
    let listed = run_with_input(&mut shell(), "s3.bucket.list\n")?;
    let exists = |bucket: &str| listed.lines().any(|line| line.split_whitespace().next() == Some(bucket));
    let missing: String = BUCKETS
        .iter()
        .filter(|bucket| !exists(bucket))
        .map(|bucket| format!("s3.bucket.create -name {bucket}\n"))
        .collect();
    if !missing.is_empty() {
        run_with_input(&mut shell(), &missing)?;
    }
    Ok(())
}

fn server_identities(user: &S3) -> String {
    json!({"identities": [{
        "name": "tunesmith",
        "credentials": [{"accessKey": user.access_key_id, "secretKey": user.secret_access_key}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }]})
    .to_string()
}

fn random_hex(bytes: usize) -> Result<String> {
    let mut random = vec![0; bytes];
    File::open("/dev/urandom").and_then(|mut source| source.read_exact(&mut random)).context("no randomness")?;
    Ok(random.iter().map(|byte| format!("{byte:02x}")).collect())
}
