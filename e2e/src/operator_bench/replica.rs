//! The operator's processes: started as the chart says, with a token of the chart's ServiceAccount each, and measured from
//! outside.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::authentication::v1::TokenRequest;
use k8s_openapi::api::core::v1::{ConfigMap, ServiceAccount};
use kube::Client;
use kube::api::{Api, PostParams};
use rustix::process::Signal;
use serde_json::{Value, json};
use tokio::time::sleep;

use super::NAMESPACE;
use crate::cluster::client_of;
use crate::daemon;
use crate::paths::write_secret;
use crate::site::Site;

/// The operator's name in the chart.
const DEPLOYMENT: &str = "tunesmith-operator";
const PATIENCE: Duration = Duration::from_secs(120);
const POLL: Duration = Duration::from_millis(20);
/// What the kernel counts CPU time in.
const TICKS_PER_SECOND: f64 = 100.0;

/// Starts replicas.
pub(crate) struct Launcher {
    site: Site,
    client: Client,
    program: PathBuf,
    service_account: String,
    environment: Vec<(String, String)>,
    classes: PathBuf,
    started: u16,
}

impl Launcher {
    /// Reads what the chart would start.
    pub(crate) async fn new(site: Site, client: Client, program: PathBuf) -> Result<Self> {
        ensure!(program.exists(), "{} is missing: build it, or name another one", program.display());
        let deployments = Api::<Deployment>::namespaced(client.clone(), NAMESPACE);
        let deployment = deployments.get(DEPLOYMENT).await.context("the chart's Deployment")?;
        let pod = deployment.spec.template.spec.context("the Deployment has pods")?;
        let container = pod.containers.into_iter().next().context("the pod has a container")?;
        // What comes from the pod's fields follows from the replica.
        let environment = container.env.into_iter().flatten();
        let environment = environment.filter_map(|variable| Some((variable.name, variable.value?))).collect();
        let service_account = pod.service_account_name.context("the pod has a ServiceAccount")?;
        let config_maps = Api::<ConfigMap>::namespaced(client.clone(), NAMESPACE);
        let classes = config_maps.get(&format!("{DEPLOYMENT}-gpu-classes")).await.context("the chart's GpuClasses")?;
        let text = classes.data.and_then(|mut data| data.remove("gpu-classes.yaml")).context("a file of GpuClasses")?;
        let classes = site.config("gpu-classes.yaml");
        fs::write(&classes, text).with_context(|| format!("cannot write {}", classes.display()))?;
        Ok(Self { site, client, program, service_account, environment, classes, started: 0 })
    }

    /// A client with the operator's rights.
    pub(crate) async fn client(&self) -> Result<Client> {
        let kubeconfig = self.site.config("operator.kubeconfig");
        write_secret(&kubeconfig, &self.kubeconfig(&self.token().await?)?)?;
        client_of(&kubeconfig).await
    }

    /// Starts a replica that competes for the lease.
    pub(crate) async fn start(&mut self) -> Result<Replica> {
        let token = self.token().await?;
        self.spawn(&self.kubeconfig(&token)?, credential_id(&token)?, Some(NAMESPACE))
    }

    /// Starts the only replica, without a lease, whose API server listens on this port of the node, without TLS.
    pub(crate) async fn start_alone(&mut self, port: u16) -> Result<Replica> {
        let server = format!("http://{}:{port}", self.site.network.node_ip());
        let config = kubeconfig(&json!({"server": server}), &json!({}));
        self.spawn(&config, String::new(), None)
    }

    fn spawn(&mut self, config: &str, credential: String, lease_namespace: Option<&str>) -> Result<Replica> {
        self.started += 1;
        let name = format!("operator-{}", self.started);
        let kubeconfig = self.site.config(&format!("{name}.kubeconfig"));
        write_secret(&kubeconfig, config)?;
        let address = SocketAddr::new(self.site.network.node_ip().into(), 18_080 + self.started);
        let log = File::create(self.site.log(&format!("{name}.log")))?;
        let begun = Instant::now();
        let child = self
            .site
            .network
            .enter(&self.program)
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .env("KUBECONFIG", &kubeconfig)
            .env("GPU_CLASSES", &self.classes)
            .envs(lease_namespace.map(|namespace| ("POD_NAMESPACE", namespace)))
            .env("POD_NAME", &name)
            .env("LISTEN_ADDRESS", address.to_string())
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("cannot start {}", self.program.display()))?;
        Ok(Replica { name, child, address, credential, begun })
    }

    async fn token(&self) -> Result<String> {
        let accounts = Api::<ServiceAccount>::namespaced(self.client.clone(), NAMESPACE);
        let request: TokenRequest =
            serde_json::from_value(json!({"metadata": {}, "spec": {"audiences": [], "expirationSeconds": 7200}}))?;
        let answer = accounts.create_token_request(&self.service_account, &PostParams::default(), &request).await?;
        answer.status.and_then(|status| status.token).context("the token was not issued")
    }

    fn kubeconfig(&self, token: &str) -> Result<String> {
        let authority = fs::read(self.site.pki("ca.crt"))?;
        let cluster =
            json!({"server": self.site.api_server(), "certificate-authority-data": STANDARD.encode(authority)});
        Ok(kubeconfig(&cluster, &json!({"token": token})))
    }
}

fn kubeconfig(cluster: &Value, user: &Value) -> String {
    let config = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "bench",
        "clusters": [{"name": "bench", "cluster": cluster}],
        "users": [{"name": "operator", "user": user}],
        "contexts": [{"name": "bench", "context": {"cluster": "bench", "user": "operator"}}],
    });
    config.to_string()
}

/// The id by which the audit log names a token.
fn credential_id(token: &str) -> Result<String> {
    let claims = token.split('.').nth(1).context("the token is no JWT")?;
    let claims: serde_json::Value = serde_json::from_slice(&URL_SAFE_NO_PAD.decode(claims)?)?;
    Ok(format!("JTI={}", claims["jti"].as_str().context("the token has no id")?))
}

/// A running operator. It is killed when this is dropped.
pub(crate) struct Replica {
    pub(crate) name: String,
    pub(crate) credential: String,
    pub(crate) begun: Instant,
    child: Child,
    address: SocketAddr,
}

/// Memory in MiB.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Memory {
    pub(crate) now: f64,
    pub(crate) peak: f64,
}

impl Replica {
    pub(crate) fn memory(&self) -> Result<Memory> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let field = |name: &str| -> Result<f64> {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).with_context(|| format!("no {name}"))?;
            Ok(line.trim().trim_end_matches(" kB").parse::<f64>()? / 1024.0)
        };
        Ok(Memory { now: field("VmRSS:")?, peak: field("VmHWM:")? })
    }

    /// Seconds of CPU time since it began.
    pub(crate) fn cpu_seconds(&self) -> Result<f64> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.child.id()))?;
        // "pid (name) state …": user and system time are the 14th and 15th field.
        let (_, rest) = stat.rsplit_once(") ").context("an odd /proc/…/stat")?;
        let ticks: f64 = rest.split(' ').skip(11).take(2).filter_map(|field| field.parse::<f64>().ok()).sum();
        Ok(ticks / TICKS_PER_SECOND)
    }

    /// The reconciles that it has counted, by controller.
    pub(crate) fn reconciles(&self) -> Result<BTreeMap<String, u64>> {
        let mut counts = BTreeMap::new();
        for line in self.get("/metrics")?.lines() {
            let Some(rest) = line.strip_prefix("tunesmith_reconciles_total{controller=\"") else { continue };
            let (Some((controller, _)), Some((_, count))) = (rest.split_once('"'), rest.rsplit_once(' ')) else {
                continue;
            };
            *counts.entry(controller.to_owned()).or_default() += count.parse::<f64>()? as u64;
        }
        Ok(counts)
    }

    pub(crate) fn is_ready(&self) -> bool {
        self.get("/readyz").is_ok()
    }

    /// Waits until it serves, or has ended.
    pub(crate) async fn until_ready(&mut self) -> Result<()> {
        while !self.is_ready() {
            if let Some(status) = self.child.try_wait()? {
                bail!("{} has ended: {status}", self.name);
            }
            ensure!(self.begun.elapsed() < PATIENCE, "{} is not ready in time", self.name);
            sleep(POLL).await;
        }
        Ok(())
    }

    pub(crate) fn signal(&self, signal: Signal) {
        daemon::signal(self.child.id().cast_signed(), signal);
    }

    /// Waits until it has ended; kills it if that takes too long.
    pub(crate) async fn ended(&mut self) -> Result<()> {
        let start = Instant::now();
        while self.child.try_wait()?.is_none() {
            ensure!(start.elapsed() < PATIENCE, "{} does not end", self.name);
            sleep(POLL).await;
        }
        Ok(())
    }

    pub(crate) async fn terminate(mut self) -> Result<()> {
        self.signal(Signal::TERM);
        self.ended().await
    }

    fn get(&self, path: &str) -> Result<String> {
        let mut stream = TcpStream::connect_timeout(&self.address, Duration::from_secs(2))?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        write!(stream, "GET {path} HTTP/1.0\r\nHost: {}\r\n\r\n", self.address)?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (head, body) = answer.split_once("\r\n\r\n").context("no HTTP answer")?;
        ensure!(head.split(' ').nth(1) == Some("200"), "{path}: {}", head.lines().next().unwrap_or_default());
        Ok(body.to_owned())
    }
}

impl Drop for Replica {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
