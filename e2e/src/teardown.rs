//! Ending a cluster: its processes, and what they leave behind on the machine.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::mount::{UnmountFlags, unmount};
use rustix::process::Signal;
use serde::Deserialize;

use crate::daemon;
use crate::node::pod_network_name;
use crate::site::Site;

const PATIENCE: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(50);

/// Kills every process of the cluster: daemons and shims by their network namespace, pods by their cgroup.
///
/// There is nothing that a gentler signal would save: the data is thrown away, or survives a kill by design.
pub(crate) fn end_processes(site: &Site) -> Result<()> {
    let start = Instant::now();
    loop {
        let mut alive: BTreeSet<i32> = site.cgroup.processes()?;
        alive.extend(site.network.processes()?);
        alive.extend(daemon::recorded(site).into_iter().filter_map(|(_, pid)| pid));
        alive.retain(|pid| daemon::is_alive(*pid));
        if alive.is_empty() {
            return Ok(());
        }
        ensure!(start.elapsed() < PATIENCE, "these processes do not end, even when killed: {alive:?}");
        for pid in alive {
            daemon::signal(pid, Signal::KILL);
        }
        sleep(POLL);
    }
}

/// Removes what the processes left: mounts, sockets, links, network, cgroups, and the run folder.
pub(crate) fn remove_traces(site: &Site) -> Result<()> {
    unmount_below(&site.folder)?;
    remove_shim_sockets(site);
    remove_matching(Path::new("/var/lib/cni/results"), |entry| {
        entry.file_name().to_string_lossy().starts_with(&format!("{}-", pod_network_name(site)))
    });
    // The kubelet links every container's log into this folder.
    remove_matching(Path::new("/var/log/containers"), |entry| {
        fs::read_link(entry.path()).is_ok_and(|target| target.starts_with(&site.folder))
    });
    site.network.remove()?;
    site.cgroup.remove()?;
    let run = site.folder.join("run");
    if run.exists() {
        fs::remove_dir_all(&run).with_context(|| format!("cannot remove {}", run.display()))?;
    }
    Ok(())
}

fn unmount_below(folder: &Path) -> Result<()> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").context("cannot read the list of mounts")?;
    // The last mount is the innermost.
    for target in mounts.lines().rev().filter_map(mount_point).filter(|target| Path::new(target).starts_with(folder)) {
        unmount(target.as_str(), UnmountFlags::empty()).with_context(|| format!("cannot unmount {target}"))?;
    }
    Ok(())
}

/// The mount point of a line of mountinfo, whose fifth field writes a space as \040.
fn mount_point(line: &str) -> Option<String> {
    Some(line.split(' ').nth(4)?.replace("\\040", " "))
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

fn remove_matching(folder: &Path, matches: impl Fn(&fs::DirEntry) -> bool) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten().filter(|entry| matches(entry)) {
        let _ = fs::remove_file(entry.path());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_point_with_a_space_is_read() {
        let line = r"36 35 98:0 / /root/a\040b/run rw,noatime - ext3 /dev/root rw";
        assert_eq!(mount_point(line).as_deref(), Some("/root/a b/run"));
    }
}
