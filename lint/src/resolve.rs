//! Which modules a path leads to.

use crate::tree::{ROOT, Tree};

/// Re-exports of re-exports beyond this many are a loop.
const MOST_STEPS: usize = 16;

/// The modules that `path`, written in `module`, leads to: the one that it names, and where that one re-exports the item,
/// those on the way to its definition. None for a path that leaves the crate.
pub fn resolve(tree: &Tree, module: usize, path: &[String]) -> Vec<usize> {
    let mut reached = Vec::new();
    Walk { tree, reached: &mut reached }.path(module, path, 0);
    reached
}

struct Walk<'a> {
    tree: &'a Tree,
    reached: &'a mut Vec<usize>,
}

impl Walk<'_> {
    fn path(&mut self, module: usize, path: &[String], steps: usize) {
        let Some((first, rest)) = path.split_first() else { return };
        match first.as_str() {
            "crate" => self.within(ROOT, rest, steps),
            "self" => self.within(module, rest, steps),
            "super" => {
                let mut at = self.tree.modules[module].parent.unwrap_or(ROOT);
                let mut rest = rest;
                while rest.first().is_some_and(|name| name == "super") {
                    at = self.tree.modules[at].parent.unwrap_or(ROOT);
                    rest = &rest[1..];
                }
                self.within(at, rest, steps);
            }
            _ => {
                self.named(module, path, steps);
            }
        }
    }

    /// `path` below `module`.
    fn within(&mut self, module: usize, path: &[String], steps: usize) {
        if !self.named(module, path, steps) {
            self.reached.push(module);
        }
    }

    /// Follows `path` if `module` declares its first name or brings it in; whether it does.
    fn named(&mut self, module: usize, path: &[String], steps: usize) -> bool {
        let here = &self.tree.modules[module];
        let Some((name, rest)) = path.split_first() else { return false };
        if steps > MOST_STEPS {
            return false;
        }
        if let Some(&child) = here.children.get(name) {
            self.within(child, rest, steps);
            return true;
        }
        if here.items.contains(name) {
            self.reached.push(module);
            return true;
        }
        if let Some(binding) = here.bindings.get(name) {
            self.reached.push(module);
            // `use clap;` brings in the name that it names.
            if binding.first() != Some(name) {
                self.path(module, &[binding, rest].concat(), steps + 1);
            }
            return true;
        }
        here.globs.iter().any(|glob| {
            let mut targets = Vec::new();
            Walk { tree: self.tree, reached: &mut targets }.path(module, glob, steps + 1);
            targets.last().is_some_and(|&target| target != module && self.named(target, path, steps + 1))
        })
    }
}
