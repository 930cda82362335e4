//! A cluster whose nodes, kubelets and trainers are played, for tests of the operator alone.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use kube::Client;

use super::population::{namespace, submit};
use super::replica::{Launcher, Replica};
use super::{Bench, NAMESPACE, Options};
use crate::command::run;

/// Far more than a job takes whose pods are played.
const PATIENCE: Duration = Duration::from_secs(120);

/// The cluster. It goes when this is dropped.
pub struct Stage {
    bench: Bench,
    operator: Option<Replica>,
}

impl Stage {
    /// The ServiceAccount that the chart gives the operator.
    pub const OPERATOR: &str = "system:serviceaccount:tunesmith-system:tunesmith-operator";

    /// Brings it up under this name, in the `subnet`th /19 of 198.18.0.0/15, with the chart and its default values. The operator
    /// does not run yet.
    ///
    /// # Errors
    /// If the cluster can't be brought up.
    pub async fn up(name: &str, subnet: u8, operator: PathBuf, chart: PathBuf) -> Result<Self> {
        let options = Options { operator, chart, finished: 0, active: 0, nodes: 2, idle: Duration::ZERO, keep: false };
        Ok(Self { bench: Bench::empty(name, subnet, options).await?, operator: None })
    }

    /// Upgrades the chart's release to these values.
    ///
    /// # Errors
    /// If Helm refuses them.
    pub async fn upgrade(&mut self, values: &[&str]) -> Result<()> {
        let Bench { cluster, options, launcher, client, .. } = &mut self.bench;
        run(cluster
            .helm()
            .args(["upgrade", "tunesmith"])
            .arg(&options.chart)
            .args(["--namespace", NAMESPACE])
            .args(values.iter().flat_map(|value| ["--set", value])))?;
        *launcher = Launcher::new(cluster.site().clone(), client.clone(), options.operator.clone()).await?;
        Ok(())
    }

    /// Starts the operator as the chart says.
    ///
    /// # Errors
    /// If it is not ready in time.
    pub async fn start_operator(&mut self) -> Result<()> {
        let operator = self.operator.insert(self.bench.launcher.start().await?);
        operator.until_ready().await
    }

    /// What the operator has logged so far.
    ///
    /// # Errors
    /// If it was not started.
    pub fn log(&self) -> Result<String> {
        let operator = self.operator.as_ref().context("the operator was not started")?;
        Ok(fs::read_to_string(self.bench.cluster.site().log(&format!("{}.log", operator.name)))?)
    }

    /// A namespace for jobs.
    pub fn namespace(number: u32) -> String {
        namespace(number)
    }

    /// Creates a FineTuneJob whose training would take six seconds.
    ///
    /// # Errors
    /// If the API server refuses it.
    pub async fn submit(&self, namespace: &str, name: &str) -> Result<()> {
        submit(&self.bench.client, namespace, name).await
    }

    /// Waits until a job is in this phase.
    ///
    /// # Errors
    /// If it isn't in time.
    pub async fn until_phase(&self, namespace: &str, name: &str, phase: &str) -> Result<()> {
        self.bench.jobs.until_phase(&[(namespace.to_owned(), name.to_owned())], phase, PATIENCE).await
    }

    /// A client with the administrator's rights.
    pub fn client(&self) -> Client {
        self.bench.client.clone()
    }

    /// kubectl with the administrator's rights.
    pub fn kubectl(&self) -> Command {
        self.bench.cluster.kubectl()
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        self.operator = None;
        if let Err(error) = self.bench.cluster.down() {
            eprintln!("  {error:#}");
        }
    }
}
