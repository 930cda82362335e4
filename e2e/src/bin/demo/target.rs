//! What the demo runs on: a cluster with an S3 store, and the images of operator and trainer.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use tunesmith_e2e::{Cluster, Images, S3, Step, Toolchain, client_of, programs_folder, repository, run};

const NAMESPACE: &str = "tunesmith-system";

/// A cluster and what is needed to use it.
pub(crate) struct Target {
    kubeconfig: PathBuf,
    kubectl: PathBuf,
    helm: PathBuf,
    operator_image: String,
    trainer_image: String,
    /// The store, by the same address from here and from pods.
    pub(crate) s3: S3,
}

impl Target {
    /// A cluster on this machine: installs what it is made of, builds the images, brings it up.
    pub(crate) fn local(name: &str, subnet: u8) -> Result<Self> {
        let toolchain = Toolchain::new()?;
        toolchain.install()?;
        let images = Images::build()?;
        let cluster = Cluster::new(name, subnet)?;
        cluster.up()?;
        let step = Step::start("images in the cluster");
        cluster.load(&[&images.operator, &images.trainer])?;
        step.done();
        Ok(Self {
            kubeconfig: cluster.kubeconfig(),
            kubectl: toolchain.program("kubectl"),
            helm: toolchain.program("helm"),
            operator_image: images.operator.reference,
            trainer_image: images.trainer.reference,
            s3: cluster.s3()?,
        })
    }

    /// A cluster that the user has, with images that it can pull and a store that it can reach.
    pub(crate) fn existing(kubeconfig: PathBuf) -> Result<Self> {
        let image = |name: &str, variable: &str| std::env::var(variable).with_context(|| how_to_push(name, variable));
        Ok(Self {
            kubeconfig,
            kubectl: "kubectl".into(),
            helm: "helm".into(),
            operator_image: image("operator", "TUNESMITH_OPERATOR_IMAGE")?,
            trainer_image: image("trainer", "TUNESMITH_TRAINER_IMAGE")?,
            s3: S3::from_env().context(
                "the demo needs an S3 store with the buckets models, datasets and adapters, that this machine and the \
                 cluster's pods reach by the same AWS_ENDPOINT_URL",
            )?,
        })
    }

    /// kubectl, speaking to the cluster.
    pub(crate) fn kubectl(&self) -> Command {
        self.command(&self.kubectl)
    }

    /// A client of the API server.
    pub(crate) async fn client(&self) -> Result<kube::Client> {
        client_of(&self.kubeconfig).await
    }

    /// The trainer on this machine, with the keys to the store.
    pub(crate) fn trainer(&self) -> Command {
        let mut command = Command::new(programs_folder().join("tunesmith-trainer"));
        command.envs(self.s3.env());
        command
    }

    /// Installs Tunesmith, or brings it to the images at hand.
    pub(crate) fn install_chart(&self) -> Result<()> {
        let step = Step::start("tunesmith, by its chart");
        run(self
            .command(&self.helm)
            .args(["upgrade", "--install", "tunesmith"])
            .arg(repository().join("charts/tunesmith"))
            .args(["--namespace", NAMESPACE, "--create-namespace", "--wait", "--timeout", "3m"])
            .args(["--set", &format!("operator.image={}", self.operator_image)])
            .args(["--set", &format!("trainer.image={}", self.trainer_image)]))
        .with_context(|| format!("`kubectl --namespace {NAMESPACE} get pods,events` shows more"))?;
        step.done();
        Ok(())
    }

    fn command(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command.env("KUBECONFIG", &self.kubeconfig);
        command
    }
}

fn how_to_push(name: &str, variable: &str) -> String {
    let folder = if name == "trainer" { "trainer-image" } else { name };
    format!(
        "{variable} is not set. Build the image and push it where your cluster pulls from:\n  \
         cargo build --release -p tunesmith-{name}\n  \
         docker build -f {folder}/Containerfile -t REGISTRY/tunesmith-{name}:dev . && docker push REGISTRY/tunesmith-{name}:dev\n  \
         export {variable}=REGISTRY/tunesmith-{name}:dev\n"
    )
}
