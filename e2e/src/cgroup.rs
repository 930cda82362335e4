//! The cluster's own control groups, below which the kubelet keeps its pods. Version 1 (also hybrid) and version 2.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

const ROOT: &str = "/sys/fs/cgroup";

/// The cgroup of one cluster, the same path in every hierarchy: the kubelet's `cgroupRoot`.
#[derive(Clone, Debug)]
pub(crate) struct Cgroup {
    path: String,
}

impl Cgroup {
    pub(crate) fn new(cluster: &str) -> Self {
        Self { path: format!("/tunesmith/{cluster}") }
    }

    /// Its path below each hierarchy's root.
    pub(crate) fn path(&self) -> &str {
        &self.path
    }

    /// Makes the group in every hierarchy.
    pub(crate) fn create(&self) -> Result<()> {
        for folder in self.folders()? {
            fs::create_dir_all(&folder).with_context(|| format!("cannot make the cgroup {}", folder.display()))?;
        }
        if Path::new(ROOT).join("cgroup.controllers").exists() {
            for parent in [ROOT.to_owned(), format!("{ROOT}/tunesmith"), format!("{ROOT}{}", self.path)] {
                let available = fs::read_to_string(format!("{parent}/cgroup.controllers"))?;
                let all: Vec<_> = available.split_whitespace().map(|name| format!("+{name}")).collect();
                fs::write(format!("{parent}/cgroup.subtree_control"), all.join(" "))
                    .with_context(|| format!("cannot hand controllers down from {parent}"))?;
            }
        }
        Ok(())
    }

    /// The processes in the group and below: those in pods.
    pub(crate) fn processes(&self) -> Result<BTreeSet<i32>> {
        let mut pids = BTreeSet::new();
        for group in self.groups()? {
            // A group may go away while it is read.
            let listed = fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
            pids.extend(listed.lines().filter_map(|line| line.parse::<i32>().ok()));
        }
        Ok(pids)
    }

    /// Removes the group and all below it. No process may be left inside.
    pub(crate) fn remove(&self) -> Result<()> {
        for group in self.groups()? {
            fs::remove_dir(&group).with_context(|| format!("cannot remove the cgroup {}", group.display()))?;
        }
        for folder in self.folders()? {
            if let Some(shared) = folder.parent() {
                // Other clusters may still be using it.
                let _ = fs::remove_dir(shared);
            }
        }
        Ok(())
    }

    /// The group's folder in every hierarchy.
    fn folders(&self) -> Result<Vec<PathBuf>> {
        let root = Path::new(ROOT);
        if root.join("cgroup.controllers").exists() {
            return Ok(vec![root.join(&self.path[1..])]);
        }
        let hierarchies = fs::read_dir(root).context("cannot read /sys/fs/cgroup")?;
        // A link stands for a hierarchy under another of its names ("cpu" for "cpu,cpuacct").
        Ok(hierarchies
            .flatten()
            .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
            .map(|entry| entry.path())
            .filter(|folder| folder.join("cgroup.procs").exists())
            .map(|folder| folder.join(&self.path[1..]))
            .collect())
    }

    /// The groups that exist, children before their parents.
    fn groups(&self) -> Result<Vec<PathBuf>> {
        let mut found = Vec::new();
        for folder in self.folders()? {
            collect_children_first(&folder, &mut found);
        }
        Ok(found)
    }
}

fn collect_children_first(group: &Path, found: &mut Vec<PathBuf>) {
    let Ok(entries) = fs::read_dir(group) else { return };
    for entry in entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
        collect_children_first(&entry.path(), found);
    }
    found.push(group.to_owned());
}
