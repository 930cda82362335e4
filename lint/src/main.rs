//! Checks that the imports between the modules of each crate form no cycle. `make lint` runs it.
//!
//! - **Siblings** are the modules that one module declares. The crate's root and a module's parent are nobody's siblings:
//!   a parent may use its children, and a child what its parent defines.
//! - **An import** is a `use`, or a path anywhere in the code (`crate::…`, `super::…`, `sibling::…`), in arguments of macros and
//!   strings of attributes too. It counts for the siblings that hold its two ends: `a::x` with `use crate::b::y` is an edge
//!   from `a` to `b`. A path through a re-export leads to the module that it names, and on to the one that defines the item.
//! - **Not counted** are code under `#[cfg(test)]`, targets of tests, and re-exports (`pub use`, `pub(crate) use`, …) of
//!   names that the module doesn't use itself.
//!
//! A method call names no module, so an `impl` block may stand wherever its subject is.

mod cycles;
mod imports;
mod resolve;
mod tree;

use std::{collections::BTreeSet, process::ExitCode};

use anyhow::{Context, Result, bail};
use cargo_metadata::{MetadataCommand, Target, TargetKind};
use clap::Parser;

use crate::{cycles::cycles, tree::Tree};

/// Imports between two modules that a report lists.
const SHOWN: usize = 3;

/// Names each cycle of imports between sibling modules, and the imports that make it.
#[derive(Parser)]
struct Options {
    /// Leave a package of the workspace out.
    #[arg(long, value_name = "PACKAGE")]
    exclude: Vec<String>,
    /// List every import of a cycle, not the first few between two modules.
    #[arg(long)]
    all: bool,
}

fn main() -> Result<ExitCode> {
    let options = Options::parse();
    let metadata = MetadataCommand::new().no_deps().exec().context("list the packages of the workspace")?;
    let mut packages = metadata.workspace_packages();
    if let Some(unknown) = options.exclude.iter().find(|name| !packages.iter().any(|package| package.name == **name)) {
        bail!("--exclude {unknown}: the workspace has no such package");
    }
    packages.retain(|package| !options.exclude.iter().any(|name| package.name == *name));
    let shown = if options.all { usize::MAX } else { SHOWN };
    let root = metadata.workspace_root.as_std_path();
    let mut found = 0;
    for package in packages {
        // A module that two targets share is reported once.
        let mut reports = BTreeSet::new();
        for target in package.targets.iter().filter(|target| is_checked(target)) {
            let tree = Tree::read(target.src_path.as_std_path())?;
            reports.extend(cycles(&tree).iter().map(|cycle| cycle.report(&tree, root, shown)));
        }
        for report in &reports {
            println!("{}: {report}", package.name);
        }
        found += reports.len();
    }
    if found == 0 {
        return Ok(ExitCode::SUCCESS);
    }
    println!("{found} cycles of imports. Break each: move what one module takes from the next to where it belongs.");
    Ok(ExitCode::FAILURE)
}

fn is_checked(target: &Target) -> bool {
    !target.kind.contains(&TargetKind::Test)
}
