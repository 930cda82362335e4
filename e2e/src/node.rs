//! The one node: containerd with the pod network, the kubelet and kube-proxy.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::json;

use crate::command::{run, succeeds};
use crate::control_plane::kubectl;
use crate::daemon::Daemon;
use crate::images::{self, PAUSE};
use crate::site::Site;

const READY: Duration = Duration::from_secs(90);

/// Starts containerd and gives it the image that every pod needs.
pub(crate) fn start_containerd(site: &Site) -> Result<()> {
    write_pod_network(site)?;
    let config = site.write_config("containerd.toml", &containerd_config(site))?;
    let containerd = Daemon::new(site, "containerd", [format!("--config={}", config.display())])
        // The shim and runc are looked up here.
        .env("PATH", format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", site.tools.bin().display()));
    containerd.start(site)?;
    containerd.wait(site, READY, || succeeds(ctr(site).arg("version")))?;
    images::load(site, &images::pause(&site.tools)?)
}

/// Starts the kubelet and kube-proxy; the API server must be ready.
pub(crate) fn start(site: &Site) -> Result<()> {
    site.cgroup.create()?;
    let config = site.write_config("kubelet.json", &kubelet_config(site)?)?;
    let kubelet_root = site.run("kubelet");
    let arguments = [
        format!("--config={}", config.display()),
        format!("--kubeconfig={}", site.pki("kubelet.kubeconfig").display()),
        format!("--root-dir={}", kubelet_root.display()),
        format!("--cert-dir={}", kubelet_root.join("pki").display()),
        format!("--hostname-override={}", site.node()),
        format!("--node-ip={}", site.network.node_ip()),
    ];
    Daemon::new(site, "kubelet", arguments).start(site)?;

    let config = site.write_config("kube-proxy.json", &kube_proxy_config(site))?;
    Daemon::new(site, "kube-proxy", [format!("--config={}", config.display())]).start(site)?;
    Ok(())
}

/// Waits until the node takes pods.
pub(crate) fn wait_ready(site: &Site) -> Result<()> {
    let kubelet = Daemon::new(site, "kubelet", []);
    let condition = "jsonpath={.status.conditions[?(@.type==\"Ready\")].status}";
    kubelet.wait(site, READY, || {
        run(kubectl(site).args(["get", "node", &site.node(), "--output", condition])).is_ok_and(|ready| ready == "True")
    })
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
fn containerd_config(site: &Site) -> String {
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

fn kubelet_config(site: &Site) -> Result<String> {
    let resolver = site.write_config("resolv.conf", &format!("nameserver {}\n", site.network.node_ip()))?;
    let config = json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {
            "anonymous": {"enabled": false},
            "webhook": {"enabled": true},
            "x509": {"clientCAFile": site.pki("ca.crt")},
        },
        "authorization": {"mode": "Webhook"},
        "containerRuntimeEndpoint": format!("unix://{}", site.containerd_socket().display()),
        "clusterDNS": [site.network.node_ip()],
        "clusterDomain": "cluster.local",
        "resolvConf": resolver,
        // Groups of its own: the kubelet of a second cluster would clear away the pods of this one.
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": site.cgroup.path(),
        "enforceNodeAllocatable": [],
        "failCgroupV1": false,
        "failSwapOn": false,
        "oomScoreAdj": 0,
        "makeIPTablesUtilChains": false,
        "podLogsDir": site.run("pods"),
        "volumePluginDir": site.run("volume-plugins"),
        // The disk is the developer's, who may well keep it nearly full.
        "evictionHard": {"nodefs.available": "0%", "nodefs.inodesFree": "0%", "imagefs.available": "0%"},
        "imageGCHighThresholdPercent": 100,
    });
    Ok(format!("{config:#}"))
}

fn kube_proxy_config(site: &Site) -> String {
    let config = json!({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "clientConnection": {"kubeconfig": site.pki("kube-proxy.kubeconfig")},
        "clusterCIDR": site.network.pod_cidr(),
        "hostnameOverride": site.node(),
        "mode": "nftables",
        // The limits of connection tracking belong to the host.
        "conntrack": {"maxPerCore": 0, "min": 0},
    });
    format!("{config:#}")
}
