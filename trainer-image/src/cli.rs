//! The command line: subcommands, and how an error becomes a message and an exit code.

use std::{
    io::{IsTerminal, Write},
    net::{Ipv4Addr, SocketAddr},
    num::NonZero,
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::{Args, Parser, Subcommand, ValueEnum};
use tokio::runtime::{Builder, Runtime};
use tracing_subscriber::EnvFilter;
use tunesmith_crds::{
    RunSpec,
    names::{REPORT_PATH, RUN_SPEC_PATH, TRAINER_PORT, WORK_DIR, exit_code},
    run::{Outcome, VerifySpec},
};
use tunesmith_engine::{Sampling, cpu::profile};

use crate::{
    adapter::fetch_adapter,
    chat::Chat,
    convert::{convert, gguf_lora},
    copy::copy,
    error::Error,
    evaluate::{self, evaluate},
    generate::{Writer, uri},
    local,
    merge::merge,
    model::{Keep, ModelFolder},
    pod::{caught, read_spec, report_to},
    preflight::preflight,
    progress::{Progress, serve},
    stop::Stop,
    store::{Role, Stores},
    train::{Context, train},
    verify::{inspect, verify},
};

#[derive(Parser)]
#[command(name = "tunesmith-trainer", version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Read the FineTuneJob in a manifest, train it here and publish the result
    Run {
        /// The manifest, as kubectl apply takes it
        manifest: PathBuf,
        /// Say at the end where the time went, operation by operation
        #[arg(long)]
        profile: bool,
        #[command(flatten)]
        local: Local,
    },
    /// Check the FineTuneJob in a manifest with its model and data, and show what would be trained
    Check {
        /// The manifest, as kubectl apply takes it
        manifest: PathBuf,
        #[command(flatten)]
        local: Local,
    },
    /// Let a model answer, with or without an adapter
    Generate {
        /// The model: a folder, or a URI
        #[arg(long)]
        model: String,
        /// A LoRA adapter over it: a folder, or a URI
        #[arg(long)]
        adapter: Option<String>,
        /// What the user says; give it several times for several answers
        #[arg(long, required = true)]
        prompt: Vec<String>,
        /// What the system turn says
        #[arg(long)]
        system: Option<String>,
        /// Tokens of an answer at most
        #[arg(long, default_value_t = 120)]
        max_new_tokens: usize,
        #[command(flatten)]
        sampling: SamplingArgs,
        #[command(flatten)]
        local: Local,
    },
    /// Talk with a model, with or without an adapter: a line of input is a turn
    Chat {
        /// The model: a folder, or a URI
        #[arg(long)]
        model: String,
        /// A LoRA adapter over it: a folder, or a URI
        #[arg(long)]
        adapter: Option<String>,
        /// What the system turn says
        #[arg(long)]
        system: Option<String>,
        /// Tokens of an answer at most
        #[arg(long, default_value_t = 250)]
        max_new_tokens: usize,
        #[command(flatten)]
        sampling: SamplingArgs,
        #[command(flatten)]
        local: Local,
    },
    /// Ask a model the questions of a probe, with or without an adapter, and print its recall
    Evaluate {
        #[command(flatten)]
        exam: evaluate::Args,
        #[command(flatten)]
        local: Local,
    },
    /// Put a LoRA adapter into its base model, as a Hugging Face folder that needs no PEFT
    Merge {
        /// The base model: a folder, or a URI
        #[arg(long)]
        model: String,
        /// The adapter: a folder, or a URI
        #[arg(long)]
        adapter: String,
        /// The folder to make
        #[arg(long)]
        out: PathBuf,
        /// Round the weights to bfloat16: half the size
        #[arg(long)]
        bf16: bool,
        #[command(flatten)]
        local: Local,
    },
    /// Write a LoRA adapter in another program's format
    Export {
        /// The format
        #[arg(long)]
        format: ExportFormat,
        /// The base model: a folder, or a URI
        #[arg(long)]
        model: String,
        /// The adapter: a folder, or a URI
        #[arg(long)]
        adapter: String,
        /// The file to make
        #[arg(long)]
        out: PathBuf,
        #[command(flatten)]
        local: Local,
    },
    /// Turn a GGUF file into a Hugging Face model folder
    Convert {
        /// The GGUF file; docs/models.md says what may be in it
        model: PathBuf,
        /// The folder to make
        #[arg(long)]
        out: PathBuf,
    },
    /// In a pod: check model, data and output folder
    Preflight {
        #[command(flatten)]
        pod: Pod,
    },
    /// In a pod: train, checkpoint and publish
    Train {
        #[command(flatten)]
        pod: Pod,
        /// Where /progress, /metrics and /healthz answer
        #[arg(long, default_value_t = SocketAddr::from((Ipv4Addr::UNSPECIFIED, TRAINER_PORT)))]
        listen: SocketAddr,
    },
    /// In a pod: publish a version of the same inputs that lies somewhere else
    Copy {
        #[command(flatten)]
        pod: Pod,
    },
    /// In a pod: compare a version's files with its manifest
    Verify {
        #[command(flatten)]
        pod: Pod,
    },
    /// In a pod: look up the files of many versions
    Inspect {
        #[command(flatten)]
        pod: Pod,
    },
}

/// What `export` writes.
#[derive(Clone, Copy, ValueEnum)]
enum ExportFormat {
    /// A GGUF file for llama.cpp's --lora
    GgufLora,
}

/// Where a pod finds its spec and leaves its report.
#[derive(Args)]
struct Pod {
    /// What to do: a RunSpec, VerifySpec or InspectSpec in JSON
    #[arg(long, default_value = RUN_SPEC_PATH)]
    run_spec: PathBuf,
    /// Where the RunReport goes
    #[arg(long, default_value = REPORT_PATH)]
    report: PathBuf,
    /// Folder for downloads
    #[arg(long, default_value = WORK_DIR)]
    work_dir: PathBuf,
}

/// Where a process outside a cluster keeps things.
#[derive(Args)]
struct Local {
    /// Stands in for object stores that the environment does not name: s3://, gs:// or az://bucket/key is <STORE>/bucket/key
    #[arg(long, default_value = "tunesmith-store")]
    store: PathBuf,
    /// Folder for downloads
    #[arg(long, default_value_os_t = std::env::temp_dir().join("tunesmith-trainer"))]
    work_dir: PathBuf,
}

/// How the next token is chosen.
#[derive(Args)]
struct SamplingArgs {
    /// Above 1 makes tokens that were said less likely; small models loop without
    #[arg(long, default_value_t = 1.15, value_parser = above_0)]
    repetition_penalty: f64,
    /// 0 takes the likeliest token
    #[arg(long, default_value_t = 0.0, value_parser = from_0)]
    temperature: f64,
    /// Draw from the smallest set of tokens whose probability reaches this
    #[arg(long, default_value_t = 1.0, value_parser = share)]
    top_p: f64,
    /// Seed of the draws
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

fn from_0(text: &str) -> Result<f64, String> {
    number(text, "a number from 0", |number| number >= 0.0)
}

fn above_0(text: &str) -> Result<f64, String> {
    number(text, "a number above 0", |number| number > 0.0)
}

fn share(text: &str) -> Result<f64, String> {
    number(text, "a number above 0 and up to 1", |number| number > 0.0 && number <= 1.0)
}

fn number(text: &str, expected: &str, is_sound: impl Fn(f64) -> bool) -> Result<f64, String> {
    let number = text.parse().ok().filter(|number: &f64| number.is_finite() && is_sound(*number));
    number.ok_or_else(|| format!("expected {expected}"))
}

impl From<SamplingArgs> for Sampling {
    fn from(SamplingArgs { repetition_penalty, temperature, top_p, seed }: SamplingArgs) -> Self {
        Sampling { repetition_penalty, temperature, top_p, seed }
    }
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    let Cli { command } = Cli::parse();
    let code = match start_logs().map_err(Error::Spec).and_then(|()| start_threads()) {
        Ok(runtime) => {
            let code = run(command, &runtime);
            runtime.shutdown_background();
            code
        }
        Err(error) => refuse(&command, error),
    };
    ExitCode::from(u8::try_from(code).unwrap_or(u8::MAX))
}

/// JSON lines on standard error; in a terminal, warnings alone, as bars and notes say the rest. Tells why `RUST_LOG` can't
/// be used.
fn start_logs() -> Result<(), String> {
    let terminal = std::io::stderr().is_terminal();
    let default = if terminal { "warn" } else { "info" };
    let wanted = std::env::var_os(EnvFilter::DEFAULT_ENV).unwrap_or_default().to_string_lossy().into_owned();
    let (filter, problem) = match wanted.trim() {
        "" => (EnvFilter::new(default), None),
        wanted => match EnvFilter::builder().parse(wanted) {
            Ok(filter) => (filter, None),
            Err(error) => {
                (EnvFilter::new(default), Some(format!("RUST_LOG is {wanted:?}: {error}; use info or debug")))
            }
        },
    };
    let logs = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match terminal {
        true => logs.init(),
        false => logs.json().flatten_event(true).init(),
    }
    problem.map_or(Ok(()), Err)
}

/// The threads that wait for stores. Those that compute start when they are needed, as many as RAYON_NUM_THREADS says.
fn start_threads() -> Result<Runtime, Error> {
    let variable = |name| threads(name, &std::env::var_os(name).unwrap_or_default().to_string_lossy());
    variable("RAYON_NUM_THREADS")?;
    let waiting = variable("TOKIO_WORKER_THREADS")?.filter(|&number| number > 0);
    let waiting = waiting.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, NonZero::get));
    let runtime = Builder::new_multi_thread().enable_all().worker_threads(waiting).build();
    runtime.map_err(|error| Error::Internal(format!("no threads: {error}")))
}

/// A number of threads from a variable; 0 leaves it to this program. The libraries that read such variables end the
/// process over some values, and pass over others.
fn threads(name: &str, value: &str) -> Result<Option<usize>, Error> {
    const MOST: usize = 1024;
    match (value.trim(), value.trim().parse()) {
        ("", _) => Ok(None),
        (_, Ok(number @ ..=MOST)) => Ok(Some(number)),
        _ => Err(Error::Spec(format!("{name} is {value:?}: it must be a whole number of threads, at most {MOST}"))),
    }
}

/// Ends a command whose environment can't be used.
fn refuse(command: &Command, error: Error) -> i32 {
    match command {
        Command::Preflight { pod }
        | Command::Train { pod, .. }
        | Command::Copy { pod }
        | Command::Verify { pod }
        | Command::Inspect { pod } => report_to(&pod.report, || Err(error)),
        _ => exit(Err(error)),
    }
}

/// A line on standard output, whose reader may be gone.
fn say(line: impl std::fmt::Display) -> Result<(), Error> {
    writeln!(std::io::stdout(), "{line}").map_err(|source| Error::Pipe { source })
}

/// Runs a command. A panic ends it as an error does.
fn run(command: Command, runtime: &Runtime) -> i32 {
    exit(caught(|| Ok(dispatch(command, runtime))))
}

fn dispatch(command: Command, runtime: &Runtime) -> i32 {
    let stores = Stores::from_environment(runtime.handle().clone());
    match command {
        Command::Preflight { pod } => preflight_pod(&pod, &stores, runtime),
        Command::Train { pod, listen } => train_pod(&pod, listen, &stores, runtime),
        Command::Copy { pod } => copy_pod(&pod, &stores, runtime),
        Command::Verify { pod } => verify_pod(&pod, &stores, runtime),
        Command::Inspect { pod } => inspect_pod(&pod, &stores, runtime),
        Command::Run { manifest, profile, local } => {
            if profile {
                profile::start();
            }
            let code = exit(run_here(&manifest, &local, &stores, runtime));
            if profile {
                // It is an extra.
                let _ = say(profile_table());
            }
            code
        }
        Command::Evaluate { exam, local } => {
            let stores = stores.or_local(&local.store);
            exit(evaluate(&exam, &stores, &local.work_dir).and_then(say).map(|()| 0))
        }
        Command::Check { manifest, local } => exit(check_here(&manifest, &local, &stores, runtime)),
        Command::Merge { model, adapter, out, bf16, local } => {
            let stores = stores.or_local(&local.store);
            exit(merge(&model, &adapter, &out, bf16, &stores, &local.work_dir).and_then(|warning| {
                warning.into_iter().for_each(|warning| eprintln!("warning: {warning}"));
                say(out.display()).map(|()| 0)
            }))
        }
        Command::Chat { model, adapter, system, max_new_tokens, sampling, local } => {
            let stores = stores.or_local(&local.store);
            exit(Writer::load(&model, adapter.as_deref(), &stores, &local.work_dir).and_then(|writer| {
                let (model, voice) = writer.into_parts();
                let (system, sampling) = (system.as_deref(), sampling.into());
                let terminal = std::io::stdin().is_terminal() && std::io::stdout().is_terminal();
                let chat = Chat { model: &model, voice: &voice, system, sampling, max_new_tokens, terminal };
                chat.run(std::io::stdin().lock(), &mut std::io::stdout().lock()).map(|()| 0)
            }))
        }
        Command::Export { format: ExportFormat::GgufLora, model, adapter, out, local } => {
            let stores = stores.or_local(&local.store);
            exit(export(&model, &adapter, &out, &stores, &local.work_dir).and_then(|()| say(out.display())).map(|()| 0))
        }
        Command::Convert { model, out } => {
            exit(convert(&model, &out).map_err(Error::from).and_then(|()| say(out.display())).map(|()| 0))
        }
        Command::Generate { model, adapter, prompt, system, max_new_tokens, sampling, local } => {
            let stores = stores.or_local(&local.store);
            let sampling = sampling.into();
            exit(Writer::load(&model, adapter.as_deref(), &stores, &local.work_dir).and_then(|writer| {
                for prompt in &prompt {
                    say(writer.answer(system.as_deref(), prompt, sampling, max_new_tokens)?)?;
                }
                Ok(0)
            }))
        }
    }
}

fn exit(result: Result<i32, Error>) -> i32 {
    result.unwrap_or_else(|error| {
        // Nobody may be there to read it.
        let _ = writeln!(std::io::stderr(), "error: {error}");
        error.exit_code()
    })
}

/// Where the engine's time went.
fn profile_table() -> String {
    let (totals, peak) = (profile::totals(), profile::peak_gflops());
    let all: f64 = totals.iter().map(|(_, total)| total.seconds).sum();
    let mut table =
        format!("\n{:<26}{:>9}{:>9}{:>8}{:>10}{:>9}\n", "", "calls", "seconds", "share", "GFLOP/s", "of peak");
    for (name, total) in totals {
        let share = 100.0 * total.seconds / all;
        table += &format!("{name:<26}{:>9}{:>9.2}{share:>6.1} %", total.calls, total.seconds);
        if total.flops > 0.0 {
            let gflops = total.flops / total.seconds * 1e-9;
            table += &format!("{gflops:>10.0}{:>7.0} %", 100.0 * gflops / peak);
        }
        table.push('\n');
    }
    table + &format!("{:<26}{:>9}{all:>9.2}{:>8}{peak:>10.0}\n", "all; peak of products", "", "")
}

fn export(model: &str, adapter: &str, out: &Path, stores: &Stores, work: &Path) -> Result<(), Error> {
    let base = ModelFolder::fetch(&uri(model)?, stores, &work.join("model"))?.folder;
    let adapter = fetch_adapter(&uri(adapter)?, stores, &work.join("adapter"))?;
    Ok(gguf_lora(&base, &adapter, out)?)
}

fn run_here(manifest: &Path, local: &Local, stores: &Stores, runtime: &Runtime) -> Result<i32, Error> {
    let stores = stores.clone().or_local(&local.store);
    let (stop, progress) = (Stop::on_signals(runtime.handle()).map_err(no_signals)?, Progress::new());
    let context = Context { stores: &stores, work: &local.work_dir, progress: &progress, stop: &stop };
    let ended = local::run(manifest, context);
    progress.finish();
    let ended = ended?;
    say(local::summary(&ended, &stores)?)?;
    Ok(match ended.outcome {
        Outcome::Preempted { .. } => exit_code::PREEMPTED,
        _ if ended.gates.iter().any(|gate| !gate.passed) => exit_code::GATE_FAILED,
        _ => 0,
    })
}

fn check_here(manifest: &Path, local: &Local, stores: &Stores, runtime: &Runtime) -> Result<i32, Error> {
    let stop = Stop::on_signals(runtime.handle()).map_err(no_signals)?;
    let (stores, progress) = (stores.clone().or_local(&local.store), Progress::new());
    let context = Context { stores: &stores, work: &local.work_dir, progress: &progress, stop: &stop };
    let checked = local::check(manifest, context);
    progress.finish();
    checked.map(|()| 0)
}

fn preflight_pod(pod: &Pod, stores: &Stores, runtime: &Runtime) -> i32 {
    report_to(&pod.report, || {
        let (stop, progress) = (Stop::on_signals(runtime.handle()).map_err(no_signals)?, Progress::new());
        let context = Context { stores, work: &pod.work_dir, progress: &progress, stop: &stop };
        Ok(Outcome::Preflight(preflight(&read_spec::<RunSpec>(&pod.run_spec)?, context, Keep::Headers)?.report))
    })
}

fn train_pod(pod: &Pod, listen: SocketAddr, stores: &Stores, runtime: &Runtime) -> i32 {
    report_to(&pod.report, || {
        let (stop, progress) = (Stop::on_signals(runtime.handle()).map_err(no_signals)?, Progress::new());
        let spec: RunSpec = read_spec(&pod.run_spec)?;
        match serve(runtime.handle(), listen, &progress) {
            Ok(address) => tracing::info!(%address, "serving /progress"),
            // Training goes on unseen rather than not at all.
            Err(error) => tracing::warn!(%listen, %error, "/progress is not served"),
        }
        train(&spec, Context { stores, work: &pod.work_dir, progress: &progress, stop: &stop })
    })
}

fn copy_pod(pod: &Pod, stores: &Stores, runtime: &Runtime) -> i32 {
    report_to(&pod.report, || {
        Stop::on_signals(runtime.handle()).map_err(no_signals)?;
        Ok(Outcome::Trained(copy(&read_spec(&pod.run_spec)?, stores)?))
    })
}

fn verify_pod(pod: &Pod, stores: &Stores, runtime: &Runtime) -> i32 {
    report_to(&pod.report, || {
        Stop::on_signals(runtime.handle()).map_err(no_signals)?;
        let spec: VerifySpec = read_spec(&pod.run_spec)?;
        let folder = stores.open(Role::Output, &spec.artifact.uri)?;
        Ok(Outcome::Verified(verify(&spec.artifact, &folder)?))
    })
}

fn inspect_pod(pod: &Pod, stores: &Stores, runtime: &Runtime) -> i32 {
    report_to(&pod.report, || {
        Stop::on_signals(runtime.handle()).map_err(no_signals)?;
        Ok(Outcome::Inspected(inspect(&read_spec(&pod.run_spec)?, stores)?))
    })
}

fn no_signals(error: std::io::Error) -> Error {
    Error::Internal(format!("signals can't be listened to: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_of_threads_that_libraries_would_stumble_over_is_refused_by_name() {
        for (value, expected) in [("", None), (" 3\n", Some(3)), ("0", Some(0)), ("1024", Some(1024))] {
            assert_eq!(threads("RAYON_NUM_THREADS", value).unwrap(), expected);
        }
        for value in ["abc", "-1", "1.5", "1025", "99999999999999999999", "\u{fffd}"] {
            let error = threads("TOKIO_WORKER_THREADS", value).unwrap_err();
            assert_eq!(error.exit_code(), exit_code::BAD_SPEC);
            assert!(error.to_string().starts_with("TOKIO_WORKER_THREADS is"), "{error}");
        }
    }
}
