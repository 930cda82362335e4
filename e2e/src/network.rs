//! The cluster's network: one namespace that everything lives in, joined to the host by a veth pair.
//!
//! ```text
//! host  198.18.0.1 ──veth── 198.18.0.2  cluster namespace
//!                                        ├ services 198.18.8.0/24  (kube-proxy)
//!                                        └ bridge   198.18.16.0/24 (pods)
//! ```
//! 198.18.0.0/15 is reserved for benchmarks (RFC 2544), so no real network is hidden; each cluster takes one /19 of it.

use std::fs;
use std::io;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use anyhow::{Context, Result, bail, ensure};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::command::{run, succeeds};

/// How many /19 there are in 198.18.0.0/15.
const SUBNETS: u8 = 16;

/// The addresses and the namespace of one cluster.
#[derive(Clone, Debug)]
pub(crate) struct Network {
    namespace: String,
    subnet: u8,
}

impl Network {
    /// The network of the cluster `name` in the `subnet`th /19 of 198.18.0.0/15.
    pub(crate) fn new(name: &str, subnet: u8) -> Result<Self> {
        ensure!(subnet < SUBNETS, "there is no subnet {subnet}: choose 0 to {}", SUBNETS - 1);
        Ok(Self { namespace: name.to_owned(), subnet })
    }

    /// Which /19 of 198.18.0.0/15 it is.
    pub(crate) fn subnet(&self) -> u8 {
        self.subnet
    }

    fn address(&self, offset: u32) -> Ipv4Addr {
        let base = u32::from(Ipv4Addr::new(198, 18, 0, 0)) + (u32::from(self.subnet) << 13);
        Ipv4Addr::from(base + offset)
    }

    /// The host's end of the veth pair.
    pub(crate) fn host_ip(&self) -> Ipv4Addr {
        self.address(1)
    }

    /// The cluster's end: the address of the node, the API server, CoreDNS and S3, from the host and from pods.
    pub(crate) fn node_ip(&self) -> Ipv4Addr {
        self.address(2)
    }

    /// The addresses of services.
    pub(crate) fn service_cidr(&self) -> String {
        format!("{}/24", self.address(8 << 8))
    }

    /// The address of the service `kubernetes`.
    pub(crate) fn api_service_ip(&self) -> Ipv4Addr {
        self.address((8 << 8) + 1)
    }

    /// The addresses of pods.
    pub(crate) fn pod_cidr(&self) -> String {
        format!("{}/24", self.address(16 << 8))
    }

    /// The addresses of pods that have no network of their own, of [`Network::take_pod_addresses`].
    pub(crate) fn pod_address(&self, number: u16) -> Ipv4Addr {
        self.address((16 << 8) + u32::from(number % 4096))
    }

    /// Makes the namespace itself answer at all 4,096 addresses from that of the pods on: for pods that are only played.
    pub(crate) fn take_pod_addresses(&self) -> Result<()> {
        let range = format!("{}/20", self.pod_address(0));
        run(ip().args(["-netns", &self.namespace, "route", "replace", "local", &range, "dev", "lo"])).map(drop)
    }

    /// All the addresses that the host must route into the cluster.
    fn range(&self) -> String {
        format!("{}/19", self.address(0))
    }

    /// The namespace's file.
    pub(crate) fn namespace_file(&self) -> PathBuf {
        Path::new("/run/netns").join(&self.namespace)
    }

    /// The host's link; named after the subnet, so that two clusters cannot take the same one.
    fn host_link(&self) -> String {
        format!("tunesmith{}", self.subnet)
    }

    /// Whether namespace and veth pair are there and joined.
    pub(crate) fn is_up(&self) -> bool {
        succeeds(ip().args(["-netns", &self.namespace, "link", "show", "eth0"]))
            && succeeds(ip().args(["link", "show", &self.host_link()]))
    }

    /// Makes the namespace and joins it to the host.
    pub(crate) fn create(&self) -> Result<()> {
        let link = self.host_link();
        if succeeds(ip().args(["link", "show", &link])) {
            bail!("subnet {} is taken by another cluster: choose another one with --subnet", self.subnet);
        }
        let namespace = self.namespace.as_str();
        run(ip().args(["netns", "add", namespace]))?;
        run(ip().args(["link", "add", &link, "type", "veth", "peer", "name", "eth0", "netns", namespace]))?;
        run(ip().args(["address", "add", &format!("{}/30", self.host_ip()), "dev", &link]))?;
        run(ip().args(["link", "set", &link, "up"]))?;
        run(ip().args(["-netns", namespace, "address", "add", &format!("{}/30", self.node_ip()), "dev", "eth0"]))?;
        run(ip().args(["-netns", namespace, "link", "set", "lo", "up"]))?;
        run(ip().args(["-netns", namespace, "link", "set", "eth0", "up"]))?;
        let host_ip = self.host_ip().to_string();
        run(ip().args(["-netns", namespace, "route", "add", "default", "via", &host_ip]))?;
        run(ip().args(["route", "replace", &self.range(), "via", &self.node_ip().to_string(), "dev", &link]))?;
        run(self.enter("sysctl").args(["-qw", "net.ipv4.ip_forward=1"]))?;
        Ok(())
    }

    /// Removes the veth pair and the namespace, or what is left of them.
    pub(crate) fn remove(&self) -> Result<()> {
        let _may_be_gone = succeeds(ip().args(["-netns", &self.namespace, "link", "delete", "eth0"]));
        if self.namespace_file().exists() {
            run(ip().args(["netns", "delete", &self.namespace]))?;
        }
        Ok(())
    }

    /// A command that runs `program` inside the namespace.
    ///
    /// Not by `ip netns exec`: that remounts /sys, and the kubelet finds no cgroups.
    pub(crate) fn enter(&self, program: impl AsRef<Path>) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.namespace_file().display())).arg("--").arg(program.as_ref());
        command
    }

    /// Listens inside the namespace, from a process that is outside.
    pub(crate) fn listen(&self, port: u16) -> Result<TcpListener> {
        let listening = self.inside(move || TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)));
        listening.with_context(|| format!("cannot listen on port {port} of the cluster"))
    }

    /// Connects to a port of the namespace's own loopback, from a process that is outside.
    pub(crate) fn connect(&self, port: u16) -> Result<TcpStream> {
        let connected = self.inside(move || TcpStream::connect((Ipv4Addr::LOCALHOST, port)));
        connected.with_context(|| format!("cannot connect to port {port} of the cluster"))
    }

    /// Makes a socket inside the namespace. It stays there; the thread that went there ends.
    fn inside<S: Send + 'static>(&self, make: impl FnOnce() -> io::Result<S> + Send + 'static) -> Result<S> {
        let namespace = fs::File::open(self.namespace_file()).context("the cluster's network is not there")?;
        let made = thread::spawn(move || {
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
            make()
        });
        Ok(made.join().unwrap_or_else(|_| Err(io::Error::other("the thread panicked")))?)
    }

    /// The processes in the namespace. Those in pods have namespaces of their own and are not among them.
    pub(crate) fn processes(&self) -> Result<Vec<i32>> {
        let Ok(namespace) = fs::metadata(self.namespace_file()) else { return Ok(Vec::new()) };
        let inside = |pid: &i32| {
            fs::metadata(format!("/proc/{pid}/ns/net"))
                .is_ok_and(|own| (own.dev(), own.ino()) == (namespace.dev(), namespace.ino()))
        };
        let entries = fs::read_dir("/proc").context("cannot read /proc")?;
        Ok(entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).filter(inside).collect())
    }

    /// Whether a process is in the namespace.
    pub(crate) fn holds(&self, pid: i32) -> bool {
        let namespace = fs::metadata(self.namespace_file());
        let own = fs::metadata(format!("/proc/{pid}/ns/net"));
        matches!((namespace, own), (Ok(a), Ok(b)) if (a.dev(), a.ino()) == (b.dev(), b.ino()))
    }
}

fn ip() -> Command {
    Command::new("ip")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subnets_do_not_overlap_and_stay_inside_the_benchmark_range() {
        let first = Network::new("a", 0).unwrap();
        assert_eq!(first.node_ip().to_string(), "198.18.0.2");
        assert_eq!(first.service_cidr(), "198.18.8.0/24");
        assert_eq!(first.pod_cidr(), "198.18.16.0/24");
        let last = Network::new("b", 15).unwrap();
        assert_eq!(last.range(), "198.19.224.0/19");
        assert_eq!(last.pod_cidr(), "198.19.240.0/24");
        assert!(Network::new("c", 16).is_err());
    }
}
