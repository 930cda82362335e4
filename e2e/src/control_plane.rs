//! etcd, the API server, the controller manager and the scheduler.

use std::process::Command;
use std::time::Duration;

use anyhow::Result;

use crate::command::succeeds;
use crate::daemon::Daemon;
use crate::site::Site;

const READY: Duration = Duration::from_secs(90);

/// Flags beyond those that every cluster has.
#[derive(Clone, Debug, Default)]
pub(crate) struct ExtraFlags {
    pub(crate) api_server: Vec<String>,
    pub(crate) controller_manager: Vec<String>,
}

/// Starts the control plane and waits until the API server answers.
pub(crate) fn start(site: &Site) -> Result<()> {
    start_without_scheduler(site, ExtraFlags::default())?;
    scheduler(site).start(site)?;
    Ok(())
}

/// [`start`] for a cluster whose pods somebody else gives to nodes.
pub(crate) fn start_without_scheduler(site: &Site, extra: ExtraFlags) -> Result<()> {
    etcd(site).start(site)?;
    let api_server = api_server(site, extra.api_server);
    api_server.start(site)?;
    api_server.wait(site, READY, || succeeds(kubectl(site).args(["get", "--raw=/readyz"])))?;
    controller_manager(site, extra.controller_manager).start(site)?;
    Ok(())
}

/// kubectl as the cluster's administrator.
pub(crate) fn kubectl(site: &Site) -> Command {
    let mut command = Command::new(site.tools.program("kubectl"));
    command.env("KUBECONFIG", site.pki("admin.kubeconfig"));
    command
}

fn etcd(site: &Site) -> Daemon {
    let data = site.data("etcd");
    let arguments = [
        format!("--data-dir={}", data.display()),
        // Only the namespace's own loopback: the API server is its one client.
        "--listen-client-urls=http://127.0.0.1:2379".into(),
        "--advertise-client-urls=http://127.0.0.1:2379".into(),
        "--listen-peer-urls=http://127.0.0.1:2380".into(),
        "--initial-advertise-peer-urls=http://127.0.0.1:2380".into(),
        "--initial-cluster=default=http://127.0.0.1:2380".into(),
        "--log-level=warn".into(),
    ];
    Daemon::new(site, "etcd", arguments)
}

fn api_server(site: &Site, extra: Vec<String>) -> Daemon {
    let pki = |name: &str| site.pki(name).display().to_string();
    let arguments = [
        format!("--advertise-address={}", site.network.node_ip()),
        "--etcd-servers=http://127.0.0.1:2379".into(),
        format!("--service-cluster-ip-range={}", site.network.service_cidr()),
        "--authorization-mode=Node,RBAC".into(),
        "--enable-admission-plugins=NodeRestriction".into(),
        format!("--client-ca-file={}", pki("ca.crt")),
        format!("--tls-cert-file={}", pki("apiserver.crt")),
        format!("--tls-private-key-file={}", pki("apiserver.key")),
        format!("--kubelet-client-certificate={}", pki("kubelet-client.crt")),
        format!("--kubelet-client-key={}", pki("kubelet-client.key")),
        // Nothing resolves the node's name, which logs and exec would otherwise ask for.
        "--kubelet-preferred-address-types=InternalIP".into(),
        "--service-account-issuer=https://kubernetes.default.svc.cluster.local".into(),
        format!("--service-account-key-file={}", pki("service-accounts.pub")),
        format!("--service-account-signing-key-file={}", pki("service-accounts.key")),
    ];
    Daemon::new(site, "kube-apiserver", arguments.into_iter().chain(extra))
}

fn controller_manager(site: &Site, extra: Vec<String>) -> Daemon {
    let pki = |name: &str| site.pki(name).display().to_string();
    let arguments = [
        format!("--kubeconfig={}", pki("kube-controller-manager.kubeconfig")),
        format!("--root-ca-file={}", pki("ca.crt")),
        format!("--service-account-private-key-file={}", pki("service-accounts.key")),
        "--use-service-account-credentials=true".into(),
        "--bind-address=127.0.0.1".into(),
        "--leader-elect=false".into(),
    ];
    Daemon::new(site, "kube-controller-manager", arguments.into_iter().chain(extra))
}

fn scheduler(site: &Site) -> Daemon {
    let arguments = [
        format!("--kubeconfig={}", site.pki("kube-scheduler.kubeconfig").display()),
        "--bind-address=127.0.0.1".into(),
        "--leader-elect=false".into(),
    ];
    Daemon::new(site, "kube-scheduler", arguments)
}
