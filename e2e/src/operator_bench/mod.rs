//! `make bench-operator`: the operator's own binary, against a real API server, etcd and Job controller, with ten thousand
//! FineTuneJobs. Nodes, kubelets and trainers are played ([`kubelet`], [`trainer`]).
//!
//! The operator is measured from outside: memory and CPU time by /proc, requests by the API server's audit log, statuses by
//! a watch like a user's. [`figures`] has every figure with its aim; [`phases`] are what is done, in this order.

mod audit;
mod etcd;
mod figures;
mod kills;
mod kubelet;
mod phases;
mod population;
mod proxy;
mod replica;
mod reports;
mod stage;
mod trainer;
mod watch;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use k8s_openapi::jiff::Timestamp;
use kube::Client;
use serde_json::{Value, json};

use self::audit::Audit;
pub use self::figures::Figures;
pub use self::kills::{Killed, Write, killed_behind_each_write};
use self::kubelet::Kubelets;
use self::population::Originals;
use self::replica::Launcher;
pub use self::stage::Stage;
use self::trainer::Trainers;
use self::watch::Jobs;
use crate::cluster::Cluster;
use crate::command::run;
use crate::control_plane::ExtraFlags;
use crate::site::Site;
use crate::steps::Step;

/// Runs beside the demo's cluster and that of the tests.
const NAME: &str = "tunesmith-bench";
const SUBNET: u8 = 2;
/// Namespace of the operator.
const NAMESPACE: &str = "tunesmith-system";
/// Without the controllers that would miss the kubelets. The others find a thousand new Jobs quickly.
const CONTROLLER_MANAGER: [&str; 4] = [
    "--controllers=job-controller,garbage-collector-controller,namespace-controller,serviceaccount-controller",
    "--kube-api-qps=2000",
    "--kube-api-burst=4000",
    "--concurrent-job-syncs=16",
];

/// What is measured.
#[derive(Clone, Debug)]
pub struct Options {
    /// The operator's program.
    pub operator: PathBuf,
    /// The chart that goes with it.
    pub chart: PathBuf,
    /// FineTuneJobs that have ended.
    pub finished: u32,
    /// FineTuneJobs that train, at most 4,000.
    pub active: u32,
    /// Nodes.
    pub nodes: u32,
    /// How long an idle operator is watched.
    pub idle: Duration,
    /// Leaves the cluster up.
    pub keep: bool,
}

/// The cluster, and all that plays on it.
struct Bench {
    options: Options,
    cluster: Cluster,
    client: Client,
    launcher: Launcher,
    audit: Audit,
    kubelets: Arc<Kubelets>,
    trainers: Trainers,
    jobs: Jobs,
    figures: Figures,
}

/// Measures everything, and writes the figures to `target`.
///
/// # Errors
/// If the cluster can't be brought up or filled. A phase that fails is a note among the figures.
pub async fn measure(options: Options, target: &Path) -> Result<Figures> {
    let mut bench = Bench::set_up(options).await?;
    if let Err(error) = bench.phases().await {
        bench.figures.note(format!("the rest was not measured: {error:#}"));
    }
    bench.figures.write(target, bench.circumstances())?;
    if !bench.options.keep {
        bench.cluster.down()?;
    }
    Ok(bench.figures)
}

impl Bench {
    async fn set_up(options: Options) -> Result<Self> {
        let mut bench = Self::empty(NAME, SUBNET, options).await?;
        let originals = bench.originals().await?;
        bench.fill(&originals).await?;
        Ok(bench)
    }

    /// A cluster of this name and subnet, with nodes, and no jobs.
    async fn empty(name: &str, subnet: u8, options: Options) -> Result<Self> {
        let cluster = Cluster::new(name, subnet)?;
        cluster.up_without_nodes(flags)?;
        let site = cluster.site().clone();
        site.network.take_pod_addresses()?;
        let client = cluster.client().await?;

        let step = Step::start("the chart");
        // Its Deployment gets no pods: nothing here makes ReplicaSets.
        run(cluster.helm().args(["upgrade", "--install", "tunesmith"]).arg(&options.chart).args([
            "--namespace",
            NAMESPACE,
            "--create-namespace",
        ]))?;
        step.done();

        let step = Step::start(format!("{} nodes", options.nodes));
        let nodes = population::ground(&client, options.nodes).await?;
        step.done();
        let trainers = Trainers::start(&site.network)?;
        let kubelets = Kubelets::start(client.clone(), site.network.clone(), trainers.clone(), nodes);
        Ok(Self {
            launcher: Launcher::new(site.clone(), client.clone(), options.operator.clone()).await?,
            audit: Audit::new(&site),
            jobs: Jobs::start(client.clone()),
            kubelets,
            trainers,
            figures: Figures::default(),
            options,
            cluster,
            client,
        })
    }

    async fn phases(&mut self) -> Result<()> {
        let replica = self.first_start().await?;
        let replica = self.restart(replica).await?;
        // What follows stands alone: one that fails leaves the others.
        if let Err(error) = self.idle(&replica).await {
            self.figures.note(format!("idle: {error:#}"));
        }
        if let Err(error) = self.changes(Some("change_p50"), "change_p99").await {
            self.figures.note(format!("changes: {error:#}"));
        }
        if let Err(error) = self.training(&replica).await {
            self.figures.note(format!("training: {error:#}"));
        }
        if let Err(error) = self.lives().await {
            self.figures.note(format!("lives: {error:#}"));
        }
        let replica = self.fail_over(replica, phases::End::Term).await?;
        let replica = self.fail_over(replica, phases::End::Kill).await?;
        self.doubles()?;
        self.remember_peak(&replica)?;
        replica.terminate().await
    }

    async fn originals(&mut self) -> Result<Originals> {
        let step = Step::start("two jobs to copy, one ended and one training");
        let mut replica = self.launcher.start().await?;
        replica.until_ready().await?;
        let originals = population::originals(&self.client, &self.jobs).await?;
        replica.terminate().await?;
        step.done();
        Ok(originals)
    }

    async fn fill(&mut self, originals: &Originals) -> Result<()> {
        let Options { finished, active, .. } = self.options;
        let step = Step::start(format!("{} FineTuneJobs, {active} of them training", finished + active));
        population::fill(&self.client, &self.cluster.site().network, originals, finished, active).await?;
        let wanted = active as usize;
        let late = Duration::from_secs(300);
        let start = std::time::Instant::now();
        // One more is the training of the job that has ended.
        while self.kubelets.trainings() < wanted + 1 {
            anyhow::ensure!(start.elapsed() < late, "{} of {wanted} pods train", self.kubelets.trainings());
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        step.done();
        Ok(())
    }

    fn circumstances(&self) -> Value {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let cpu = read("/proc/cpuinfo");
        let model = cpu.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
        json!({
            "time": Timestamp::now().to_string(),
            "cpu": model.map(|(_, model)| model),
            "cores": std::thread::available_parallelism().map(usize::from).unwrap_or_default(),
            "finished": self.options.finished,
            "active": self.options.active,
            "nodes": self.options.nodes,
            "loadAverage": read("/proc/loadavg").trim(),
            "idleSeconds": self.options.idle.as_secs(),
        })
    }
}

fn flags(site: &Site) -> Result<ExtraFlags> {
    let audit = Audit::flags(site).context("the audit policy")?;
    Ok(ExtraFlags { controller_manager: CONTROLLER_MANAGER.map(str::to_owned).into(), ..audit })
}
