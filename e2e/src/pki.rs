//! The cluster's certificates and kubeconfigs, made once, from keys that never leave it.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose,
};
use serde_json::json;

use crate::paths::write_secret;
use crate::site::Site;

/// Who gets a kubeconfig: its file, the user (common name) and the group (organization).
const CLIENTS: [(&str, &str, &str); 5] = [
    ("admin", "tunesmith-admin", "system:masters"),
    ("kube-controller-manager", "system:kube-controller-manager", ""),
    ("kube-scheduler", "system:kube-scheduler", ""),
    ("kube-proxy", "system:kube-proxy", ""),
    ("coredns", "system:coredns", ""),
];

/// Makes all keys, certificates and kubeconfigs of a cluster, unless they exist.
pub(crate) fn create(site: &Site) -> Result<()> {
    if site.pki("complete").exists() {
        return Ok(());
    }
    let folder = site.folder.join("pki");
    fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    let authority = Authority::new()?;
    write_secret(&site.pki("ca.crt"), &authority.0.pem())?;

    let network = &site.network;
    let names = [
        "kubernetes",
        "kubernetes.default",
        "kubernetes.default.svc",
        "kubernetes.default.svc.cluster.local",
        "localhost",
        "127.0.0.1",
        &network.node_ip().to_string(),
        &network.api_service_ip().to_string(),
    ]
    .map(str::to_owned);
    let server = authority.issue("kube-apiserver", "", names.to_vec())?;
    server.write(&folder, "apiserver")?;
    authority.issue("kube-apiserver-kubelet-client", "system:masters", Vec::new())?.write(&folder, "kubelet-client")?;
    let service_accounts = KeyPair::generate()?;
    write_secret(&site.pki("service-accounts.key"), &service_accounts.serialize_pem())?;
    write_secret(&site.pki("service-accounts.pub"), &service_accounts.public_key_pem())?;

    let node = format!("system:node:{}", site.node());
    for (file, user, group) in CLIENTS.into_iter().chain([("kubelet", node.as_str(), "system:nodes")]) {
        let identity = authority.issue(user, group, Vec::new())?;
        write_secret(&site.pki(&format!("{file}.kubeconfig")), &kubeconfig(site, &authority, &identity, user))?;
    }
    fs::write(site.pki("complete"), "")?;
    Ok(())
}

struct Authority(CertifiedIssuer<'static, KeyPair>);

struct Identity {
    certificate: String,
    key: String,
}

impl Authority {
    fn new() -> Result<Self> {
        let mut parameters = CertificateParams::default();
        parameters.distinguished_name.push(DnType::CommonName, "tunesmith-cluster");
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        parameters.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        Ok(Self(CertifiedIssuer::self_signed(parameters, KeyPair::generate()?)?))
    }

    /// A certificate for a user and group, valid for `names` where it serves.
    fn issue(&self, user: &str, group: &str, names: Vec<String>) -> Result<Identity> {
        let key = KeyPair::generate()?;
        let mut parameters = CertificateParams::new(names)?;
        parameters.distinguished_name.push(DnType::CommonName, user);
        if !group.is_empty() {
            parameters.distinguished_name.push(DnType::OrganizationName, group);
        }
        parameters.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        parameters.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        let certificate = parameters.signed_by(&key, &self.0)?;
        Ok(Identity { certificate: certificate.pem(), key: key.serialize_pem() })
    }
}

impl Identity {
    fn write(&self, folder: &Path, name: &str) -> Result<()> {
        write_secret(&folder.join(format!("{name}.crt")), &self.certificate)?;
        write_secret(&folder.join(format!("{name}.key")), &self.key)
    }
}

fn kubeconfig(site: &Site, authority: &Authority, identity: &Identity, user: &str) -> String {
    let config = json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": site.name, "cluster": {
            "server": site.api_server(),
            "certificate-authority-data": BASE64.encode(authority.0.pem()),
        }}],
        "users": [{"name": user, "user": {
            "client-certificate-data": BASE64.encode(&identity.certificate),
            "client-key-data": BASE64.encode(&identity.key),
        }}],
        "contexts": [{"name": site.name, "context": {"cluster": site.name, "user": user}}],
        "current-context": site.name,
    });
    format!("{config:#}\n")
}
