//! What comes from the machine's own package archive.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::find_program;
use crate::command::{run, succeeds};
use crate::steps::Step;

/// What must be there (a program, or a file by its path), and the Debian package that brings it.
const NEEDED: [(&str, &str); 13] = [
    ("buildah", "buildah"),
    ("gcc", "gcc"),
    ("/usr/include/unistd.h", "libc6-dev"),
    ("ip", "iproute2"),
    ("mmdebstrap", "mmdebstrap"),
    ("mount", "mount"),
    ("nft", "nftables"),
    ("nsenter", "util-linux"),
    ("pip3", "python3-pip"),
    ("pkg-config", "pkg-config"),
    ("python3", "python3"),
    ("sysctl", "procps"),
    ("/usr/include/seccomp.h", "libseccomp-dev"),
];

/// Installs the packages whose programs are missing.
pub(super) fn install() -> Result<()> {
    let step = Step::start("Debian packages");
    let missing = missing();
    if missing.is_empty() {
        step.skipped("already there");
        return Ok(());
    }
    if find_program("apt-get").is_none() {
        bail!(
            "this machine has no apt-get: install what Debian calls {}, or use a cluster that you have with KUBECONFIG=…",
            missing.join(", ")
        );
    }
    let mut install = apt_get();
    install.args(["install", "--yes", "--no-install-recommends"]).args(&missing);
    if !succeeds(&mut install) {
        run(apt_get().arg("update")).context("the package lists could not be fetched")?;
        run(&mut install).with_context(|| format!("install {} by hand, then run this again", missing.join(", ")))?;
    }
    step.done();
    Ok(())
}

fn missing() -> Vec<&'static str> {
    NEEDED
        .iter()
        .filter(
            |(what, _)| !if what.starts_with('/') { Path::new(what).exists() } else { find_program(what).is_some() },
        )
        .map(|(_, package)| *package)
        .collect()
}

fn apt_get() -> Command {
    let mut command = Command::new("apt-get");
    command.env("DEBIAN_FRONTEND", "noninteractive");
    command
}
