//! The local cluster as a whole: up, down, and what others need to use it.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::Node;
use kube::api::{Api, Patch, PatchParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use serde_json::json;

use crate::control_plane::ExtraFlags;
use crate::images::{self, Image, Images};
use crate::paths::cache;
use crate::s3::{self, S3};
use crate::site::Site;
use crate::steps::Step;
use crate::toolchain::require_root;
use crate::{containerd, control_plane, daemon, dns, node, pki, teardown};

/// The name of the cluster that is meant where none is given.
pub const DEFAULT_NAME: &str = "tunesmith";

/// A client of the cluster that a kubeconfig names.
pub async fn client_of(kubeconfig: &Path) -> Result<kube::Client> {
    // kube and object_store bring a TLS provider each, and rustls takes neither by itself. Fails where one is chosen.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let kubeconfig = Kubeconfig::read_from(kubeconfig)?;
    let config = kube::Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
    Ok(kube::Client::try_from(config)?)
}

/// A real Kubernetes cluster of one node on this machine, with an S3 server beside it.
#[derive(Clone, Debug)]
pub struct Cluster {
    site: Site,
}

impl Cluster {
    /// The cluster `name` in the `subnet`th /19 of 198.18.0.0/15, up or not. One that is up keeps the subnet it has.
    pub fn new(name: &str, subnet: u8) -> Result<Self> {
        let site = Site::new(name, subnet)?;
        match fs::read_to_string(site.subnet_file()) {
            Ok(recorded) => {
                Ok(Self { site: Site::new(name, recorded.parse().context("the subnet file is damaged")?)? })
            }
            Err(_) => Ok(Self { site }),
        }
    }

    /// Brings the cluster up, and heals what has ended since. On a cluster that runs it does nothing.
    pub fn up(&self) -> Result<()> {
        let site = &self.site;
        let step = Step::start(format!("cluster {}", site.name));
        require_root()?;
        site.tools.require_installed()?;
        let _lock = self.lock()?;
        if !site.network.is_up() {
            // After a reboot, or a crash: whatever is left belongs to a network that is no more.
            teardown::end_processes(site)?;
            teardown::remove_traces(site)?;
            site.network.create()?;
        }
        site.create_folders()?;
        pki::create(site)?;

        s3::start(site)?;
        containerd::start(site)?;
        images::load(site, &images::pause(&site.tools)?)?;
        control_plane::start(site)?;
        node::start(site)?;
        dns::start(site)?;

        node::wait_ready(site)?;
        dns::wait_ready(site)?;
        s3::wait_ready(site)?;
        step.done();
        Ok(())
    }

    /// Brings up an API server with etcd and the controller manager, anew, and nothing else: no node, no scheduler, no S3.
    /// `extra` may write files that its flags name.
    pub(crate) fn up_without_nodes(&self, extra: impl FnOnce(&Site) -> Result<ExtraFlags>) -> Result<()> {
        let site = &self.site;
        let step = Step::start(format!("cluster {}, without nodes", site.name));
        require_root()?;
        site.tools.require_installed()?;
        let _lock = self.lock()?;
        self.remove_all()?;
        site.network.create()?;
        site.create_folders()?;
        pki::create(site)?;
        let extra = extra(site)?;
        control_plane::start_without_scheduler(site, extra)?;
        step.done();
        Ok(())
    }

    /// Removes all that the cluster is made of, its data too, and nothing else.
    pub fn down(&self) -> Result<()> {
        let site = &self.site;
        let step = Step::start(format!("cluster {}, down", site.name));
        require_root()?;
        let _lock = self.lock()?;
        if !site.folder.exists() {
            step.skipped("it is not up");
            return Ok(());
        }
        self.remove_all()?;
        step.done();
        Ok(())
    }

    fn remove_all(&self) -> Result<()> {
        let site = &self.site;
        teardown::end_processes(site)?;
        teardown::remove_traces(site)?;
        if site.folder.exists() {
            fs::remove_dir_all(&site.folder).with_context(|| format!("cannot remove {}", site.folder.display()))?;
        }
        Ok(())
    }

    /// Where its things lie.
    pub(crate) fn site(&self) -> &Site {
        &self.site
    }

    /// The daemons that were started, each with its pid while it runs.
    pub fn status(&self) -> Vec<(String, Option<i32>)> {
        daemon::recorded(&self.site)
    }

    /// The administrator's kubeconfig.
    pub fn kubeconfig(&self) -> PathBuf {
        self.site.pki("admin.kubeconfig")
    }

    /// A client with the administrator's rights.
    pub async fn client(&self) -> Result<kube::Client> {
        client_of(&self.kubeconfig()).await.with_context(|| format!("is the cluster {} up?", self.site.name))
    }

    /// kubectl, speaking to this cluster.
    pub fn kubectl(&self) -> Command {
        control_plane::kubectl(&self.site)
    }

    /// helm, speaking to this cluster.
    pub fn helm(&self) -> Command {
        let mut command = Command::new(self.site.tools.program("helm"));
        command.env("KUBECONFIG", self.kubeconfig());
        command
    }

    /// The S3 server, from the host as from pods.
    pub fn s3(&self) -> Result<S3> {
        S3::of(&self.site)
    }

    /// Gives images to the node, which pulls none.
    pub fn load(&self, images: &[&Image]) -> Result<()> {
        images.iter().try_for_each(|image| images::load(&self.site, image))
    }

    /// The node's name.
    pub fn node(&self) -> String {
        self.site.node()
    }

    /// Makes the node offer `count` of a resource, such as `nvidia.com/gpu`, that it does not have.
    ///
    /// Pods that ask for it are scheduled and counted against quota; they find no device.
    pub async fn set_node_capacity(&self, resource: &str, count: u32) -> Result<()> {
        let offer = json!({resource: count.to_string()});
        let patch = json!({"status": {"capacity": offer, "allocatable": offer}});
        Api::<Node>::all(self.client().await?)
            .patch_status(&self.node(), &PatchParams::default(), &Patch::Merge(patch))
            .await
            .with_context(|| format!("cannot give the node {resource}"))?;
        Ok(())
    }

    /// The environment in which kubectl, helm, S3 clients and tests find this cluster.
    pub fn environment(&self) -> Result<Vec<(String, String)>> {
        let mut variables = vec![("KUBECONFIG".to_owned(), self.kubeconfig().display().to_string())];
        variables.extend(self.s3()?.env().map(|(name, value)| (name.to_owned(), value.to_owned())));
        if let Some(images) = Images::last_built()? {
            variables.push(("TUNESMITH_OPERATOR_IMAGE".into(), images.operator.reference));
            variables.push(("TUNESMITH_TRAINER_IMAGE".into(), images.trainer.reference));
        }
        Ok(variables)
    }

    /// Keeps two processes from bringing the same cluster up or down at once. The empty file stays.
    fn lock(&self) -> Result<File> {
        let folder = cache()?.join("clusters");
        fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
        let lock = File::create(folder.join(format!("{}.lock", self.site.name)))?;
        lock.lock().context("cannot wait for another process that uses this cluster")?;
        Ok(lock)
    }
}
