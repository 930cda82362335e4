//! The modules of one target, read from its files.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use syn::{Expr, Item, ItemMod, Lit, Meta};

use crate::imports::{Import, Imports, name_of, tests_only};

/// The crate's root, in [`Tree::modules`].
pub const ROOT: usize = 0;

/// All modules of a target; a module's number is its place in `modules`.
#[derive(Debug, Default)]
pub struct Tree {
    pub modules: Vec<Module>,
}

/// A module, without what is compiled for tests only.
#[derive(Debug, Default)]
pub struct Module {
    pub name: String,
    pub file: PathBuf,
    pub parent: Option<usize>,
    pub children: BTreeMap<String, usize>,
    /// Names of the items that it defines itself.
    pub items: BTreeSet<String>,
    /// Names that a `use` brings in, with the path of each.
    pub bindings: BTreeMap<String, Vec<String>>,
    /// Paths of `use …::*`.
    pub globs: Vec<Vec<String>>,
    pub imports: Vec<Import>,
}

/// Where the files of a module's children lie.
struct Place<'a> {
    file: &'a Path,
    folder: PathBuf,
}

impl Tree {
    /// Reads the target whose root is `file`, and each file that its `mod` items name.
    pub fn read(file: &Path) -> Result<Self> {
        let mut tree = Self::default();
        let folder = file.parent().unwrap_or(Path::new("")).to_owned();
        tree.add_file("crate".to_owned(), None, &Place { file, folder })?;
        Ok(tree)
    }

    fn add_file(&mut self, name: String, parent: Option<usize>, place: &Place) -> Result<usize> {
        let path = place.file.display();
        let text = fs::read_to_string(place.file).with_context(|| format!("read {path}"))?;
        let file = syn::parse_file(&text).with_context(|| format!("parse {path}"))?;
        self.add(name, parent, &file.items, place)
    }

    fn add(&mut self, name: String, parent: Option<usize>, items: &[Item], place: &Place) -> Result<usize> {
        let id = self.modules.len();
        let Imports { bindings, globs, imports } = Imports::of(items);
        let names = items.iter().filter_map(name_of).collect();
        let file = place.file.to_owned();
        self.modules.push(Module { name, file, parent, items: names, bindings, globs, imports, ..Module::default() });
        for item in items {
            if let Item::Mod(child) = item
                && !tests_only(&child.attrs)
            {
                let name = child.ident.to_string();
                let number = self.add_child(child, &name, id, place)?;
                self.modules[id].children.insert(name, number);
            }
        }
        Ok(id)
    }

    fn add_child(&mut self, child: &ItemMod, name: &str, parent: usize, place: &Place) -> Result<usize> {
        let folder = place.folder.join(name);
        if let Some((_, items)) = &child.content {
            return self.add(name.to_owned(), Some(parent), items, &Place { file: place.file, folder });
        }
        if let Some(path) = path_attribute(child) {
            let file = place.file.parent().unwrap_or(Path::new("")).join(path);
            let folder = file.parent().unwrap_or(Path::new("")).to_owned();
            return self.add_file(name.to_owned(), Some(parent), &Place { file: &file, folder });
        }
        let beside = place.folder.join(format!("{name}.rs"));
        let file = if beside.exists() { beside } else { folder.join("mod.rs") };
        self.add_file(name.to_owned(), Some(parent), &Place { file: &file, folder })
    }

    /// The modules from the root down to `module`, both included.
    pub fn line(&self, module: usize) -> Vec<usize> {
        let mut line: Vec<_> = std::iter::successors(Some(module), |&at| self.modules[at].parent).collect();
        line.reverse();
        line
    }

    /// As it is written: `crate::data::rows`.
    pub fn path(&self, module: usize) -> String {
        self.line(module).iter().map(|&at| self.modules[at].name.as_str()).collect::<Vec<_>>().join("::")
    }

    /// The tree of a target of one file.
    #[cfg(test)]
    pub fn parse(text: &str) -> Self {
        let mut tree = Self::default();
        let items = syn::parse_file(text).unwrap().items;
        let place = Place { file: Path::new("lib.rs"), folder: PathBuf::new() };
        tree.add("crate".to_owned(), None, &items, &place).unwrap();
        tree
    }
}

/// The file that `#[path = "…"]` names.
fn path_attribute(module: &ItemMod) -> Option<String> {
    module.attrs.iter().find_map(|attribute| match &attribute.meta {
        Meta::NameValue(meta) if meta.path.is_ident("path") => match &meta.value {
            Expr::Lit(literal) => match &literal.lit {
                Lit::Str(path) => Some(path.value()),
                _ => None,
            },
            _ => None,
        },
        _ => None,
    })
}
