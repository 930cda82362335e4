//! `e2e/cluster`: the local Kubernetes cluster from the command line.

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};
use tunesmith_e2e::{Cluster, DEFAULT_NAME, Images, Toolchain, run};

/// A real Kubernetes cluster of one node, with an S3 server, inside a network namespace of this machine.
#[derive(Parser)]
#[command(name = "cluster")]
struct Arguments {
    #[command(subcommand)]
    action: Action,
    /// Which cluster; several can run side by side.
    #[arg(long, global = true, default_value = DEFAULT_NAME)]
    name: String,
    /// Which /19 of 198.18.0.0/15 a new cluster takes: 0 to 15, another one for each cluster.
    #[arg(long, global = true, default_value_t = 0)]
    subnet: u8,
}

#[derive(Subcommand)]
enum Action {
    /// Install the programs it is made of: about 15 minutes on 2 cores the first time.
    Install,
    /// Bring it up, or heal it.
    Up,
    /// Remove all that it started, its data too, and nothing else.
    Down,
    /// Show what runs.
    Status,
    /// Put operator and trainer, as built in this profile, into images, and these into the cluster.
    Images,
    /// Print the variables with which other programs find it: `eval "$(e2e/cluster env)"`. They hold its S3 keys.
    Env,
}

fn main() -> ExitCode {
    match act(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn act(arguments: &Arguments) -> Result<()> {
    let cluster = Cluster::new(&arguments.name, arguments.subnet)?;
    match arguments.action {
        Action::Install => Toolchain::new()?.install(),
        Action::Up => cluster.up(),
        Action::Down => cluster.down(),
        Action::Status => print_status(&cluster),
        Action::Images => {
            let images = Images::build()?;
            cluster.load(&[&images.operator, &images.trainer])?;
            println!("{}\n{}", images.operator.reference, images.trainer.reference);
            Ok(())
        }
        Action::Env => {
            for (name, value) in cluster.environment()? {
                println!("export {name}='{value}'");
            }
            Ok(())
        }
    }
}

fn print_status(cluster: &Cluster) -> Result<()> {
    let daemons = cluster.status();
    if daemons.is_empty() {
        println!("not up");
        return Ok(());
    }
    for (name, pid) in &daemons {
        match pid {
            Some(pid) => println!("{name:24} pid {pid}"),
            None => println!("{name:24} has ended: `e2e/cluster up` starts it again"),
        }
    }
    let objects = run(cluster.kubectl().args(["get", "nodes,pods", "--all-namespaces", "--output=wide"]));
    println!("\n{}", objects.unwrap_or_else(|_| "the API server does not answer".into()).trim_end());
    Ok(())
}
