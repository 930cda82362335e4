//! The one node: the kubelet and kube-proxy, over containerd.

use std::time::Duration;

use anyhow::Result;
use serde_json::json;

use crate::command::run;
use crate::control_plane::kubectl;
use crate::daemon::Daemon;
use crate::site::Site;

const READY: Duration = Duration::from_secs(90);

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
