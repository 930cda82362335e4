//! containerd with the pod network, and `ctr`, which speaks to it.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::json;

use crate::command::succeeds;
use crate::daemon::Daemon;
use crate::site::Site;

/// The image that holds each pod's namespaces.
pub const PAUSE: &str = "localhost/tunesmith-pause:1";

const READY: Duration = Duration::from_secs(90);

/// Starts containerd, which has no image yet.
pub(crate) fn start(site: &Site) -> Result<()> {
    write_pod_network(site)?;
    let config = site.write_config("containerd.toml", &config(site))?;
    let containerd = Daemon::new(site, "containerd", [format!("--config={}", config.display())])
        // The shim and runc are looked up here.
        .env("PATH", format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", site.tools.bin().display()));
    containerd.start(site)?;
    containerd.wait(site, READY, || succeeds(ctr(site).arg("version")))
}

/// ctr, speaking to this cluster's containerd about the kubelet's images and containers.
pub(crate) fn ctr(site: &Site) -> Command {
    let mut command = Command::new(site.tools.program("ctr"));
    command.arg("--address").arg(site.containerd_socket()).args(["--namespace", "k8s.io"]);
    command
}

/// The name under which CNI caches what it did for this cluster's pods in /var/lib/cni.
pub(crate) fn pod_network_name(site: &Site) -> String {
    format!("tunesmith-{}", site.name)
}

fn cni_folder(site: &Site) -> PathBuf {
    site.config("cni")
}

fn write_pod_network(site: &Site) -> Result<()> {
    let network = json!({
        "cniVersion": "1.0.0",
        "name": pod_network_name(site),
        "plugins": [{
            "type": "bridge",
            "bridge": "pods",
            "isGateway": true,
            "hairpinMode": true,
            "ipam": {
                "type": "host-local",
                "ranges": [[{"subnet": site.network.pod_cidr()}]],
                "routes": [{"dst": "0.0.0.0/0"}],
                "dataDir": site.run("cni"),
            },
        }],
    });
    fs::create_dir_all(cni_folder(site)).context("cannot create the folder of the pod network")?;
    site.write_config("cni/pods.conflist", &format!("{network:#}"))?;
    Ok(())
}

/// Everything that containerd and its children would put into shared folders of the host goes into the cluster's own.
fn config(site: &Site) -> String {
    format!(
        r#"version = 3
root = "{root}"
state = "{state}"

[grpc]
address = "{socket}"

[plugins.'io.containerd.cri.v1.images']
snapshotter = "overlayfs"
[plugins.'io.containerd.cri.v1.images'.pinned_images]
sandbox = "{PAUSE}"

[plugins.'io.containerd.cri.v1.runtime']
restrict_oom_score_adj = true
netns_mounts_under_state_dir = true
[plugins.'io.containerd.cri.v1.runtime'.cni]
bin_dirs = ["{bin}"]
conf_dir = "{cni}"
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
BinaryName = "{runc}"
Root = "{runc_root}"
"#,
        root = site.data("containerd").display(),
        state = site.run("containerd").display(),
        socket = site.containerd_socket().display(),
        bin = site.tools.bin().display(),
        cni = cni_folder(site).display(),
        runc = site.tools.program("runc").display(),
        runc_root = site.run("runc").display(),
    )
}
