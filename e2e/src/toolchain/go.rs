//! Go programs, each group built inside a module of its own whose go.sum refuses a changed download.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::{Stamp, find_program, python};
use crate::command::run;
use crate::paths::{repository, sha256};
use crate::steps::Step;

/// The oldest Go that builds every module (containerd asks for the most).
const MINIMUM: (u32, u32, u32) = (1, 26, 6);

/// A group of programs that one module under `e2e/toolchain/` pins.
pub(super) struct Module {
    /// Its folder, and the name people know it by.
    name: &'static str,
    /// The Go module whose version is the group's version.
    source: &'static str,
    /// Each program's file name and the package it is built from.
    pub(super) programs: &'static [(&'static str, &'static str)],
    cgo: bool,
    tags: &'static str,
    /// Linker flags; `{version}` stands for the version without its v.
    link: &'static str,
    /// About how long the first build takes on two cores, where that wants saying.
    cold: &'static str,
}

const PLAIN: Module = Module { name: "", source: "", programs: &[], cgo: false, tags: "", link: "", cold: "" };

/// All groups, the longest build first: it runs beside the others.
pub(super) const MODULES: &[Module] = &[
    Module {
        name: "kubernetes",
        source: "k8s.io/kubernetes",
        programs: &[
            ("kube-apiserver", "k8s.io/kubernetes/cmd/kube-apiserver"),
            ("kube-controller-manager", "k8s.io/kubernetes/cmd/kube-controller-manager"),
            ("kube-proxy", "k8s.io/kubernetes/cmd/kube-proxy"),
            ("kube-scheduler", "k8s.io/kubernetes/cmd/kube-scheduler"),
            ("kubectl", "k8s.io/kubernetes/cmd/kubectl"),
            ("kubelet", "k8s.io/kubernetes/cmd/kubelet"),
        ],
        // Without these, /version is no semantic version and clients refuse the server.
        link: "-X k8s.io/component-base/version.gitVersion=v{version} \
               -X k8s.io/component-base/version.gitMajor={major} \
               -X k8s.io/component-base/version.gitMinor={minor}",
        cold: "the first time beside those below, about 12 minutes together",
        ..PLAIN
    },
    Module {
        name: "etcd",
        source: "go.etcd.io/etcd/server/v3",
        programs: &[("etcd", "go.etcd.io/etcd/server/v3")],
        ..PLAIN
    },
    Module {
        name: "containerd",
        source: "github.com/containerd/containerd/v2",
        programs: &[
            ("containerd", "github.com/containerd/containerd/v2/cmd/containerd"),
            ("containerd-shim-runc-v2", "github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2"),
            ("ctr", "github.com/containerd/containerd/v2/cmd/ctr"),
        ],
        ..PLAIN
    },
    Module {
        name: "runc",
        source: "github.com/opencontainers/runc",
        programs: &[("runc", "github.com/opencontainers/runc")],
        // Without seccomp every pod with the default profile fails.
        cgo: true,
        tags: "seccomp",
        ..PLAIN
    },
    Module {
        name: "cni",
        source: "github.com/containernetworking/plugins",
        programs: &[
            ("bridge", "github.com/containernetworking/plugins/plugins/main/bridge"),
            ("host-local", "github.com/containernetworking/plugins/plugins/ipam/host-local"),
            ("loopback", "github.com/containernetworking/plugins/plugins/main/loopback"),
        ],
        ..PLAIN
    },
    Module {
        name: "coredns",
        source: "github.com/coredns/coredns",
        // Our own main.go, with fewer plugins.
        programs: &[("coredns", ".")],
        ..PLAIN
    },
    Module { name: "helm", source: "helm.sh/helm/v4", programs: &[("helm", "helm.sh/helm/v4/cmd/helm")], ..PLAIN },
];

/// The tests' Google Cloud Storage, which no cluster needs.
pub(super) const GCS: Module = Module {
    name: "gcs",
    source: "github.com/fsouza/fake-gcs-server",
    // Our own main.go, which adds the XML API's uploads.
    programs: &[("fake-gcs", ".")],
    ..PLAIN
};

/// Neither inlining nor debug information: etcd compiles in 52 s instead of 73, and nobody waits for these programs to run.
const COMPILE: &str = "all=-l -dwarf=false";

/// A Go that is new enough.
pub(super) struct Go {
    program: PathBuf,
}

impl Go {
    /// The machine's Go, or else the one that this installs beside the programs.
    pub(super) fn find_or_install(bin: &Path) -> Result<Self> {
        let machine = find_program("go").into_iter().chain([PathBuf::from("/usr/local/go/bin/go")]);
        for program in machine {
            if version(&program).is_some_and(|version| version >= MINIMUM) {
                return Ok(Self { program });
            }
        }
        let folder = bin.join("go");
        python::install(&python::GO, &folder)?;
        Ok(Self { program: folder.join("go/bin/go") })
    }

    /// Builds the programs of a module into `bin`, unless they were built from the same pins before.
    pub(super) fn build(&self, module: &Module, bin: &Path) -> Result<()> {
        let folder = repository().join("e2e/toolchain").join(module.name);
        let pins = fs::read_to_string(folder.join("go.mod"))
            .with_context(|| format!("cannot read the pins of {}", module.name))?;
        let sums = fs::read(folder.join("go.sum"))?;
        let main = fs::read(folder.join("main.go")).unwrap_or_default();
        let version = required_version(&pins, module.source)
            .with_context(|| format!("{}/go.mod does not require {}", folder.display(), module.source))?;
        let link = link_flags(module, version);

        let step = Step::start(format!("{} {version}", module.name));
        let stamp = Stamp::new(
            bin,
            module.name,
            sha256([pins.as_bytes(), &sums, &main, module.tags.as_bytes(), link.as_bytes(), COMPILE.as_bytes()]),
        );
        if stamp.is_current() && module.programs.iter().all(|(name, _)| bin.join(name).exists()) {
            step.skipped("already there");
            return Ok(());
        }
        if !module.cold.is_empty() {
            step.note(module.cold);
        }
        // A running program cannot be written over, but it can be replaced.
        let fresh = bin.join(format!("{}.new", module.name));
        fs::create_dir_all(&fresh)?;
        let mut build = Command::new(&self.program);
        build
            .current_dir(&folder)
            .env("CGO_ENABLED", if module.cgo { "1" } else { "0" })
            .env("GOFLAGS", "-mod=readonly -trimpath -buildvcs=false")
            .env("GOTOOLCHAIN", "local")
            .env("GOWORK", "off")
            .args(["build", "-gcflags", COMPILE, "-tags", module.tags, "-ldflags", &link, "-o"]);
        // All at once, so that one links while others compile. Their packages end with their names.
        match module.programs {
            [(name, package)] => build.arg(fresh.join(name)).arg(package),
            several => build.arg(&fresh).args(several.iter().map(|(_, package)| package)),
        };
        run(&mut build).with_context(|| format!("cannot build {}", module.name))?;
        for (name, _) in module.programs {
            fs::rename(fresh.join(name), bin.join(name))?;
        }
        fs::remove_dir(&fresh)?;
        stamp.write()?;
        step.done();
        Ok(())
    }
}

fn link_flags(module: &Module, version: &str) -> String {
    let mut parts = version.split('.');
    let (major, minor) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    let stamps = module.link.replace("{version}", version).replace("{major}", major).replace("{minor}", minor);
    format!("-s -w {stamps}")
}

/// The version, without its v, at which a go.mod requires a module.
fn required_version<'a>(go_mod: &'a str, module: &str) -> Option<&'a str> {
    go_mod.lines().find_map(|line| {
        let line = line.trim();
        let line = line.strip_prefix("require ").unwrap_or(line);
        let rest = line.strip_prefix(module)?.strip_prefix(" v")?;
        rest.split_whitespace().next()
    })
}

fn version(go: &Path) -> Option<(u32, u32, u32)> {
    // GOTOOLCHAIN: a go.mod near the current folder must not make this Go speak for another.
    parse_version(&run(Command::new(go).arg("version").env("GOTOOLCHAIN", "local")).ok()?)
}

/// Reads "go version go1.26.8 linux/amd64".
fn parse_version(line: &str) -> Option<(u32, u32, u32)> {
    let mut numbers = line.split_whitespace().nth(2)?.strip_prefix("go")?.split('.').map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?, numbers.next().unwrap_or(Ok(0)).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn go_versions_compare_as_numbers() {
        assert_eq!(parse_version("go version go1.26.8 linux/amd64"), Some((1, 26, 8)));
        assert!(parse_version("go version go1.26.10 linux/amd64") > parse_version("go version go1.26.8 linux/amd64"));
        assert_eq!(parse_version("go version go1.27 linux/amd64"), Some((1, 27, 0)));
        assert_eq!(parse_version("no go"), None);
    }

    #[test]
    fn a_module_is_found_in_a_block_and_on_a_line_but_not_by_a_prefix() {
        let go_mod = "require k8s.io/kubernetes v1.37.2\nrequire (\n\texample.com/a/v2 v2.1.0 // indirect\n\texample.com/a v1.0.0\n)";
        assert_eq!(required_version(go_mod, "k8s.io/kubernetes"), Some("1.37.2"));
        assert_eq!(required_version(go_mod, "example.com/a"), Some("1.0.0"));
        assert_eq!(required_version(go_mod, "example.com/b"), None);
    }

    #[test]
    fn every_module_pins_its_source_and_its_programs() {
        for module in MODULES.iter().chain([&GCS]) {
            let go_mod =
                fs::read_to_string(repository().join("e2e/toolchain").join(module.name).join("go.mod")).unwrap();
            assert!(required_version(&go_mod, module.source).is_some(), "{}", module.name);
            for (_, package) in module.programs {
                assert!(go_mod.contains(package), "{package} is no tool of {}", module.name);
            }
        }
    }
}
