//! Where one cluster keeps its things, and how its daemons are run there.

use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};

use crate::cgroup::Cgroup;
use crate::network::Network;
use crate::paths::cache;
use crate::toolchain::Toolchain;

/// The longest path that a Unix socket can have.
const SOCKET_PATH_LIMIT: usize = 107;

/// The place of one cluster: its name, folders, network, cgroup and programs.
#[derive(Clone, Debug)]
pub(crate) struct Site {
    pub(crate) name: String,
    pub(crate) folder: PathBuf,
    pub(crate) network: Network,
    pub(crate) cgroup: Cgroup,
    pub(crate) tools: Toolchain,
}

impl Site {
    pub(crate) fn new(name: &str, subnet: u8) -> Result<Self> {
        let is_label = name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
            && name.starts_with(|first: char| first.is_ascii_lowercase())
            && !name.ends_with('-');
        ensure!(is_label && name.len() <= 40, "{name:?} is no name for a cluster: use a-z, 0-9 and -");
        let site = Self {
            name: name.to_owned(),
            folder: cache()?.join("clusters").join(name),
            network: Network::new(name, subnet)?,
            cgroup: Cgroup::new(name),
            tools: Toolchain::new()?,
        };
        ensure!(
            site.containerd_socket().as_os_str().len() + ".ttrpc".len() <= SOCKET_PATH_LIMIT,
            "{} is too long a path for sockets: set XDG_CACHE_HOME to a shorter one",
            site.folder.display()
        );
        Ok(site)
    }

    /// Remembers which subnet the cluster has taken.
    pub(crate) fn subnet_file(&self) -> PathBuf {
        self.folder.join("subnet")
    }

    /// What lives as long as the processes do: pid files, sockets, mounts. Gone after a reboot or `down`.
    pub(crate) fn run(&self, name: &str) -> PathBuf {
        self.folder.join("run").join(name)
    }

    /// What outlives the processes: etcd's data, S3's objects, images.
    pub(crate) fn data(&self, name: &str) -> PathBuf {
        self.folder.join("data").join(name)
    }

    /// Certificates and kubeconfigs.
    pub(crate) fn pki(&self, name: &str) -> PathBuf {
        self.folder.join("pki").join(name)
    }

    /// Configuration files.
    pub(crate) fn config(&self, name: &str) -> PathBuf {
        self.folder.join("config").join(name)
    }

    /// The daemons' logs.
    pub(crate) fn log(&self, name: &str) -> PathBuf {
        self.folder.join("log").join(name)
    }

    /// The one node's name.
    pub(crate) fn node(&self) -> String {
        format!("{}-node", self.name)
    }

    /// Where clients reach the API server.
    pub(crate) fn api_server(&self) -> String {
        format!("https://{}:6443", self.network.node_ip())
    }

    /// Where the kubelet and ctr reach containerd.
    pub(crate) fn containerd_socket(&self) -> PathBuf {
        self.run("containerd.sock")
    }

    /// Makes the folders that daemons expect. None but the owner looks in.
    pub(crate) fn create_folders(&self) -> Result<()> {
        for folder in ["run", "data", "config", "log"] {
            let folder = self.folder.join(folder);
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&folder)
                .with_context(|| format!("cannot create {}", folder.display()))?;
        }
        fs::write(self.subnet_file(), self.network.subnet().to_string())?;
        Ok(())
    }

    /// Writes a configuration file and returns its path. One that says the same already is not touched: kube-proxy ends
    /// when its own is written.
    pub(crate) fn write_config(&self, name: &str, content: &str) -> Result<PathBuf> {
        let path = self.config(name);
        if fs::read_to_string(&path).is_ok_and(|present| present == content) {
            return Ok(path);
        }
        fs::write(&path, content).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(path)
    }
}
