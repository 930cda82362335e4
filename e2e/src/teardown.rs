//! Ending a cluster: its processes, and what they leave behind on the machine.

use std::cmp::Reverse;
use std::collections::BTreeSet;
use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::mount::{UnmountFlags, unmount};
use rustix::process::Signal;
use serde::Deserialize;

use crate::containerd::pod_network_name;
use crate::daemon;
use crate::s3;
use crate::site::Site;

const PATIENCE: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(50);

/// Folders that the kubelet, containerd and CNI make where they want them; removed when nothing is left inside.
const SHARED_FOLDERS: [&str; 7] = [
    "/run/containerd/s",
    "/run/containerd",
    "/var/lib/cni/results",
    "/var/lib/cni",
    "/var/lib/kubelet/device-plugins",
    "/var/lib/kubelet",
    "/var/log/containers",
];

/// Kills every process of the cluster: daemons and shims by their network namespace, pods by their cgroup.
///
/// There is nothing that a gentler signal would save: the data is thrown away, or survives a kill by design.
pub(crate) fn end_processes(site: &Site) -> Result<()> {
    let start = Instant::now();
    // One that is ending belongs to no namespace any more, and is not found again; but its files may still be open.
    let mut killed = BTreeSet::new();
    loop {
        let mut found: BTreeSet<i32> = site.cgroup.processes()?;
        found.extend(site.network.processes()?);
        found.extend(daemon::recorded(site).into_iter().filter_map(|(_, pid)| pid));
        for pid in &found {
            daemon::signal(*pid, Signal::KILL);
        }
        killed.extend(found);
        killed.retain(|pid| daemon::is_alive(*pid));
        if killed.is_empty() {
            return Ok(());
        }
        ensure!(start.elapsed() < PATIENCE, "these processes do not end, even when killed: {killed:?}");
        sleep(POLL);
    }
}

/// Removes what the processes left: mounts, network, cgroups, the run folder, and files in folders of the machine that
/// no option moves elsewhere.
pub(crate) fn remove_traces(site: &Site) -> Result<()> {
    remove_shim_sockets(site);
    remove_device_plugin_socket();
    s3::remove_sockets(site);
    remove_cni_results(&pod_network_name(site));
    remove_log_links(site);
    for folder in SHARED_FOLDERS {
        // Fails, as it should, while another has something in it.
        let _ = fs::remove_dir(folder);
    }
    unmount_below(&site.folder)?;
    site.network.remove()?;
    site.cgroup.remove()?;
    let run = site.folder.join("run");
    if run.exists() {
        fs::remove_dir_all(&run).with_context(|| format!("cannot remove {}", run.display()))?;
    }
    Ok(())
}

fn unmount_below(folder: &Path) -> Result<()> {
    let start = Instant::now();
    loop {
        let mounts = fs::read_to_string("/proc/self/mountinfo").context("cannot read the list of mounts")?;
        let mut targets: Vec<PathBuf> =
            mounts.lines().filter_map(mount_point).filter(|target| target.starts_with(folder)).collect();
        if targets.is_empty() {
            return Ok(());
        }
        // The innermost first. One may hide another, and one whose user has only just ended is busy for a moment.
        targets.sort_by_key(|target| Reverse(target.components().count()));
        for target in targets {
            if let Err(error) = unmount(&target, UnmountFlags::empty()) {
                ensure!(start.elapsed() < PATIENCE, "cannot unmount {}: {error}", target.display());
            }
        }
        sleep(POLL);
    }
}

/// The mount point of a line of mountinfo, whose fifth field writes a space as \040.
fn mount_point(line: &str) -> Option<PathBuf> {
    Some(line.split(' ').nth(4)?.replace("\\040", " ").into())
}

/// A shim keeps its socket in /run/containerd/s, whatever containerd's own folders are.
fn remove_shim_sockets(site: &Site) {
    #[derive(Deserialize)]
    struct Bootstrap {
        address: String,
    }
    let tasks = site.run("containerd").join("io.containerd.runtime.v2.task/k8s.io");
    for task in fs::read_dir(tasks).into_iter().flatten().flatten() {
        let bootstrap = fs::read_to_string(task.path().join("bootstrap.json")).unwrap_or_default();
        if let Ok(Bootstrap { address }) = serde_json::from_str(&bootstrap) {
            // Containers of one pod share a shim, so it may be gone already.
            let _ = fs::remove_file(address.trim_start_matches("unix://"));
        }
    }
}

/// The kubelet waits for device plugins at this socket, whatever its own folder is; another cluster's may be listening.
fn remove_device_plugin_socket() {
    let socket = "/var/lib/kubelet/device-plugins/kubelet.sock";
    if UnixStream::connect(socket).is_err() {
        let _ = fs::remove_file(socket);
    }
}

/// CNI remembers in a folder of the machine what it did for each pod: on the pod network, and for its loopback.
fn remove_cni_results(network: &str) {
    let folder = Path::new("/var/lib/cni/results");
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let file = entry.file_name().to_string_lossy().into_owned();
        let pod = file.strip_prefix(network).and_then(|rest| rest.strip_prefix('-')?.strip_suffix("-eth0"));
        if let Some(pod) = pod {
            let _ = fs::remove_file(folder.join(format!("cni-loopback-{pod}-lo")));
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// The kubelet links every container's log into a folder of the machine.
fn remove_log_links(site: &Site) {
    for entry in fs::read_dir("/var/log/containers").into_iter().flatten().flatten() {
        if fs::read_link(entry.path()).is_ok_and(|target| target.starts_with(&site.folder)) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_point_with_a_space_is_read() {
        let line = r"36 35 98:0 / /root/a\040b/run rw,noatime - ext3 /dev/root rw";
        assert_eq!(mount_point(line).as_deref(), Some(Path::new("/root/a b/run")));
    }
}
