//! CoreDNS: a process on the node's address, which every pod is given as its name server.
//!
//! It knows the cluster's own names. There is no way out of the cluster's network, so there is nothing else to know.

use std::time::Duration;

use anyhow::Result;
use serde_json::json;

use crate::command::run;
use crate::control_plane::kubectl;
use crate::daemon::Daemon;
use crate::http::answers_ok;
use crate::site::Site;

const READY: Duration = Duration::from_secs(60);
const READY_PORT: u16 = 8181;

/// Starts CoreDNS; the API server must be ready.
pub(crate) fn start(site: &Site) -> Result<()> {
    let permissions = site.write_config("coredns-rbac.json", &permissions())?;
    run(kubectl(site).args(["apply", "--server-side", "--filename"]).arg(permissions))?;
    let corefile = site.write_config("Corefile", &corefile(site))?;
    Daemon::new(site, "coredns", [format!("-conf={}", corefile.display())]).start(site)?;
    Ok(())
}

/// Waits until CoreDNS has read the cluster's services.
pub(crate) fn wait_ready(site: &Site) -> Result<()> {
    let address = (site.network.node_ip(), READY_PORT).into();
    Daemon::new(site, "coredns", []).wait(site, READY, || answers_ok(address, "/ready"))
}

fn corefile(site: &Site) -> String {
    format!(
        "cluster.local:53 in-addr.arpa:53 {{
    bind {ip}
    errors
    ready {ip}:{READY_PORT}
    kubernetes cluster.local in-addr.arpa {{
        kubeconfig {kubeconfig}
        pods insecure
        ttl 5
    }}
}}
.:53 {{
    bind {ip}
    template ANY ANY {{
        rcode NXDOMAIN
    }}
}}
",
        ip = site.network.node_ip(),
        kubeconfig = site.pki("coredns.kubeconfig").display(),
    )
}

fn permissions() -> String {
    let role = json!({
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRole",
        "metadata": {"name": "system:coredns"},
        "rules": [
            {"apiGroups": [""], "resources": ["services", "namespaces", "pods"], "verbs": ["list", "watch"]},
            {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["list", "watch"]},
        ],
    });
    let binding = json!({
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRoleBinding",
        "metadata": {"name": "system:coredns"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "system:coredns"},
        "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": "system:coredns"}],
    });
    json!({"apiVersion": "v1", "kind": "List", "items": [role, binding]}).to_string()
}
