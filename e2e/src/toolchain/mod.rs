//! The programs that the local cluster is made of, installed once into the cache.
//!
//! Go programs are built from the modules under `e2e/toolchain/`, pinned by their go.mod and go.sum; Python packages
//! by hash; Debian packages come from the machine's own archive. Each is skipped when a stamp says that exactly this
//! version was installed before.

mod debian;
mod go;
mod node;
pub(crate) mod python;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use anyhow::{Context, Result, bail};

use crate::command::run;
use crate::paths::{cache, repository, sha256};
use crate::steps::Step;

/// The folder of installed programs.
#[derive(Clone, Debug)]
pub struct Toolchain {
    bin: PathBuf,
}

impl Toolchain {
    /// The toolchain in the cache, installed or not.
    pub fn new() -> Result<Self> {
        Ok(Self { bin: cache()?.join("bin") })
    }

    /// Installs what is missing.
    ///
    /// # Errors
    /// When the machine cannot run the local cluster (not Linux's root, no Debian packages), or a download differs
    /// from its pinned hash.
    pub fn install(&self) -> Result<()> {
        require_root()?;
        let _lock = self.lock()?;
        debian::install()?;
        let go = go::Go::find_or_install(&self.bin)?;
        // While one waits for downloads or links, the other compiles.
        let (longest, others) = go::MODULES.split_first().context("there are modules")?;
        thread::scope(|scope| {
            let longest = scope.spawn(|| go.build(longest, &self.bin));
            let others = others.iter().try_for_each(|module| go.build(module, &self.bin));
            longest.join().unwrap_or_else(|_| bail!("the build panicked")).and(others)
        })?;
        python::install(&python::SEAWEEDFS, &self.bin.join("seaweedfs"))?;
        self.compile_pause()
    }

    /// Installs the object stores that tests ask, without the cluster.
    ///
    /// # Errors
    /// A download differs from its pinned hash, or can't be had.
    pub fn install_stores(&self) -> Result<()> {
        let _lock = self.lock()?;
        python::install(&python::SEAWEEDFS, &self.bin.join("seaweedfs"))?;
        go::Go::find_or_install(&self.bin)?.build(&go::GCS, &self.bin)?;
        node::install_azurite(&self.bin)
    }

    fn lock(&self) -> Result<File> {
        fs::create_dir_all(&self.bin).with_context(|| format!("cannot create {}", self.bin.display()))?;
        let lock = File::create(self.bin.join(".lock"))?;
        lock.lock().context("cannot lock the toolchain folder")?;
        Ok(lock)
    }

    /// The path of an installed program, named as it is called: `kubectl`, `helm`, `etcd`.
    pub fn program(&self, name: &str) -> PathBuf {
        match name {
            "weed" => self.bin.join("seaweedfs/bin/weed"),
            _ => self.bin.join(name),
        }
    }

    /// The folder that holds the programs, and the CNI plugins among them.
    pub fn bin(&self) -> &Path {
        &self.bin
    }

    /// Fails with what to do when something is not installed.
    pub(crate) fn require_installed(&self) -> Result<()> {
        let missing: Vec<_> = go::MODULES
            .iter()
            .flat_map(|module| module.programs)
            .map(|(name, _)| *name)
            .chain(["weed", "pause"])
            .filter(|name| !self.program(name).exists())
            .collect();
        if !missing.is_empty() {
            bail!("not installed: {}; run `e2e/cluster install` first", missing.join(", "));
        }
        Ok(())
    }

    /// The program that holds a pod's namespaces: static, so that its image is this one file.
    fn compile_pause(&self) -> Result<()> {
        let step = Step::start("pause");
        let source = repository().join("e2e/toolchain/pause.c");
        let stamp = Stamp::new(&self.bin, "pause", sha256([fs::read(&source)?.as_slice()]));
        let program = self.program("pause");
        if stamp.is_current() && program.exists() {
            step.skipped("already there");
            return Ok(());
        }
        run(Command::new("gcc").args(["-Os", "-static", "-s", "-o"]).arg(&program).arg(&source))?;
        stamp.write()?;
        step.done();
        Ok(())
    }
}

/// Fails unless this process may make namespaces, mounts and cgroups.
pub(crate) fn require_root() -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        bail!("the local cluster needs root: run this as root, or use a cluster that you have with KUBECONFIG=…");
    }
    Ok(())
}

/// A file that remembers from which inputs something was installed.
pub(crate) struct Stamp {
    file: PathBuf,
    digest: String,
}

impl Stamp {
    /// The stamp of `name` in `folder`; `digest` is that of the inputs.
    pub(crate) fn new(folder: &Path, name: &str, digest: String) -> Self {
        Self { file: folder.join(format!(".{name}.stamp")), digest }
    }

    /// Whether what lies there was made from the same inputs.
    pub(crate) fn is_current(&self) -> bool {
        fs::read_to_string(&self.file).is_ok_and(|written| written == self.digest)
    }

    /// To be written last, when all that it vouches for is in place.
    pub(crate) fn write(&self) -> Result<()> {
        fs::write(&self.file, &self.digest).with_context(|| format!("cannot write {}", self.file.display()))
    }
}

/// The path of a program of the machine, looked for in PATH and in the administrator's folders.
pub(crate) fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|folder| folder.join(name))
        .find(|candidate| candidate.is_file())
}
