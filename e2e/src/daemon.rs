//! Long-running programs: started inside the cluster's namespace, found again by pid file, ended for sure.

use std::fs::{self, OpenOptions};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Stdio;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};

use crate::command::last_lines;
use crate::site::Site;

/// How long a daemon may take to end by itself.
const GRACE: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(100);
/// How many of a daemon's last words an error quotes.
const QUOTED_LINES: usize = 12;

/// A program to keep running.
pub(crate) struct Daemon {
    name: &'static str,
    command: Vec<String>,
    environment: Vec<(&'static str, String)>,
}

impl Daemon {
    /// `name` is that of the program, its pid file and its log.
    pub(crate) fn new(site: &Site, name: &'static str, arguments: impl IntoIterator<Item = String>) -> Self {
        let program = site.tools.program(name).display().to_string();
        Self { name, command: std::iter::once(program).chain(arguments).collect(), environment: Vec::new() }
    }

    /// Sets a variable of its environment.
    pub(crate) fn env(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.environment.push((name, value.into()));
        self
    }

    /// Starts it unless it runs already, with these very arguments and in this namespace. Says whether it did.
    pub(crate) fn start(&self, site: &Site) -> Result<bool> {
        if let Some(pid) = recorded_pid(site, self.name) {
            if site.network.holds(pid) && command_line(pid) == self.command {
                return Ok(false);
            }
            stop(pid)?;
        }
        let log = log_file(site, self.name);
        let output = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&log)
            .with_context(|| format!("cannot open {}", log.display()))?;
        let (program, arguments) = self.command.split_first().expect("a command has a program");
        let child = site
            .network
            .enter(program)
            .args(arguments)
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .current_dir(&site.folder)
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            // A group of its own: Ctrl-C in the terminal that started the cluster is not meant for it.
            .process_group(0)
            .spawn()
            .with_context(|| format!("cannot start {}", self.name))?;
        // nsenter becomes the program, so this is the daemon's pid.
        fs::write(pid_file(site, self.name), format!("{}\n", child.id()))?;
        Ok(true)
    }

    /// Waits until `ready` says so. Fails with the daemon's last words when it ends before, or takes too long.
    pub(crate) fn wait(&self, site: &Site, limit: Duration, mut ready: impl FnMut() -> bool) -> Result<()> {
        let start = Instant::now();
        while !ready() {
            let problem = if recorded_pid(site, self.name).is_none() {
                "ended"
            } else if start.elapsed() > limit {
                "is not ready in time"
            } else {
                sleep(POLL);
                continue;
            };
            let log = log_file(site, self.name);
            let words = last_lines(&fs::read_to_string(&log).unwrap_or_default(), QUOTED_LINES);
            bail!("{} {problem}; its log {} ends with:\n{words}", self.name, log.display());
        }
        Ok(())
    }
}

/// The daemons that have been started at this site, and the pids of those that run.
pub(crate) fn recorded(site: &Site) -> Vec<(String, Option<i32>)> {
    let Ok(entries) = fs::read_dir(site.folder.join("run")) else { return Vec::new() };
    let mut found: Vec<_> = entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.strip_suffix(".pid").map(str::to_owned))
        .map(|name| (name.clone(), recorded_pid(site, &name)))
        .collect();
    found.sort();
    found
}

/// Whether a process lives. One that has ended and waits for its parent does not, once its last thread is gone.
pub(crate) fn is_alive(pid: i32) -> bool {
    // "pid (name) state …", where the name may hold anything.
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let Some((_, rest)) = stat.rsplit_once(") ") else { return false };
    !rest.starts_with(['Z', 'X']) || fs::read_dir(format!("/proc/{pid}/task")).is_ok_and(|threads| threads.count() > 1)
}

/// Sends a signal; a process that is gone already is none the worse.
pub(crate) fn signal(pid: i32, signal: Signal) {
    if let Some(pid) = Pid::from_raw(pid) {
        let _ = kill_process(pid, signal);
    }
}

fn stop(pid: i32) -> Result<()> {
    for (kind, patience) in [(Signal::TERM, GRACE), (Signal::KILL, GRACE)] {
        signal(pid, kind);
        let start = Instant::now();
        while start.elapsed() < patience {
            if !is_alive(pid) {
                return Ok(());
            }
            sleep(POLL);
        }
    }
    bail!("process {pid} does not end, even when killed");
}

/// The pid in a daemon's pid file, if that process lives and is the daemon: pids are used again.
fn recorded_pid(site: &Site, name: &str) -> Option<i32> {
    let pid = fs::read_to_string(pid_file(site, name)).ok()?.trim().parse().ok()?;
    let program = site.tools.program(name);
    // For its first moment the process is still nsenter, with the program among its arguments.
    let is_daemon = command_line(pid).iter().any(|word| program.as_os_str() == word.as_str());
    (is_alive(pid) && is_daemon).then_some(pid)
}

fn command_line(pid: i32) -> Vec<String> {
    let raw = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let raw = raw.strip_suffix(b"\0").unwrap_or(&raw);
    raw.split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word).into_owned()).collect()
}

fn pid_file(site: &Site, name: &str) -> PathBuf {
    site.run(&format!("{name}.pid"))
}

fn log_file(site: &Site, name: &str) -> PathBuf {
    site.log(&format!("{name}.log"))
}
