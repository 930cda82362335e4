//! Custom resources written where the API server keeps them, as it would: ten thousand of them in a minute. The API server
//! itself takes half an hour of two cores to check and merge as many.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::thread;

use anyhow::{Context, Result, bail, ensure};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use kube::api::ApiResource;
use serde_json::{Value, json};

use crate::network::Network;

/// Where etcd listens.
const PORT: u16 = 2379;
const CONNECTIONS: usize = 8;
/// Objects that are kept until they are written together.
const PENDING: usize = 2048;

/// etcd, by its JSON gateway.
pub(crate) struct Etcd {
    network: Network,
    pending: Vec<String>,
}

impl Etcd {
    pub(crate) fn of(network: &Network) -> Self {
        Self { network: network.clone(), pending: Vec::new() }
    }

    /// Writes a custom resource, sooner or later.
    pub(crate) fn put(&mut self, resource: &ApiResource, object: &Value) -> Result<()> {
        let text = |name: &str| object["metadata"][name].as_str().context("an object has a name");
        let (group, plural) = (&resource.group, &resource.plural);
        let key = format!("/registry/{group}/{plural}/{}/{}", text("namespace")?, text("name")?);
        let put = json!({"key": STANDARD.encode(key), "value": STANDARD.encode(format!("{object}\n"))});
        self.pending.push(put.to_string());
        if self.pending.len() < PENDING { Ok(()) } else { self.flush() }
    }

    /// Writes what is pending: each object by itself. Those of one transaction would have one revision, and watches that begin
    /// in the midst of it would miss some.
    pub(crate) fn flush(&mut self) -> Result<()> {
        let pending = std::mem::take(&mut self.pending);
        let network = &self.network;
        let write = |puts: &[String]| -> Result<()> {
            let mut stream = BufReader::new(network.connect(PORT)?);
            puts.iter().try_for_each(|put| write_one(&mut stream, put))
        };
        thread::scope(|scope| {
            let share = pending.len().div_ceil(CONNECTIONS).max(1);
            let writers: Vec<_> = pending.chunks(share).map(|puts| scope.spawn(move || write(puts))).collect();
            writers.into_iter().try_for_each(|writer| writer.join().unwrap_or_else(|_| bail!("a writer panicked")))
        })
    }
}

fn write_one(stream: &mut BufReader<TcpStream>, put: &str) -> Result<()> {
    let head = "POST /v3/kv/put HTTP/1.1\r\nHost: etcd\r\nContent-Type: application/json";
    let request = format!("{head}\r\nContent-Length: {}\r\n\r\n{put}", put.len());
    stream.get_mut().write_all(request.as_bytes())?;
    let (mut status, mut line, mut length) = (String::new(), String::new(), None);
    stream.read_line(&mut status)?;
    while stream.read_line(&mut line)? > 0 && !line.trim().is_empty() {
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = Some(value.trim().parse()?);
        }
        line.clear();
    }
    let mut answer = vec![0; length.context("etcd tells no length")?];
    stream.read_exact(&mut answer)?;
    ensure!(status.contains(" 200 "), "etcd refuses: {status} {}", String::from_utf8_lossy(&answer));
    Ok(())
}
