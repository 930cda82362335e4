//! Cycles of imports among siblings, and how they are told.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write,
    path::Path,
};

use petgraph::{
    algo::{astar, tarjan_scc},
    graphmap::DiGraphMap,
};

use crate::{imports::Import, resolve::resolve, tree::Tree};

/// Siblings of which each imports the next, and the last the first.
#[derive(Debug, PartialEq)]
pub struct Cycle {
    edges: Vec<Edge>,
}

/// The imports by which one sibling uses another.
#[derive(Clone, Debug, PartialEq)]
struct Edge {
    from: usize,
    to: usize,
    /// Each with the module that holds it.
    imports: Vec<(usize, Import)>,
}

/// For each import that lies on cycles, the shortest of them, each once.
pub fn cycles(tree: &Tree) -> Vec<Cycle> {
    let edges = edges(tree);
    // Siblings only are joined, so that one graph holds every level.
    let graph: DiGraphMap<usize, ()> = edges.keys().map(|&(from, to)| (from, to, ())).collect();
    let mut seen = BTreeSet::new();
    let mut cycles = Vec::new();
    for group in tarjan_scc(&graph).into_iter().filter(|group| group.len() > 1) {
        for (from, to, ()) in graph.all_edges().filter(|(from, to, ())| group.contains(from) && group.contains(to)) {
            let Some((_, back)) = astar(&graph, to, |at| at == from, |_| 1, |_| 0) else { continue };
            if seen.insert(back.iter().copied().collect::<BTreeSet<_>>()) {
                let pairs = back.windows(2).map(|pair| (pair[0], pair[1]));
                let edges = std::iter::once((from, to)).chain(pairs).map(|pair| edges[&pair].clone()).collect();
                cycles.push(Cycle { edges });
            }
        }
    }
    cycles
}

/// All imports between siblings.
fn edges(tree: &Tree) -> BTreeMap<(usize, usize), Edge> {
    let mut edges = BTreeMap::new();
    for (module, imports) in tree.modules.iter().map(|module| &module.imports).enumerate() {
        for import in imports {
            for target in resolve(tree, module, &import.path) {
                let Some((from, to)) = siblings(tree, module, target) else { continue };
                let edge = edges.entry((from, to)).or_insert_with(|| Edge { from, to, imports: Vec::new() });
                // Where a name is used that a `use` above brings in, that `use` is listed.
                let is_listed = |(holder, known): &(usize, Import)| {
                    *holder == module && (known.path.last() == import.path.first() || known.path == import.path)
                };
                if !edge.imports.iter().any(is_listed) {
                    edge.imports.push((module, import.clone()));
                }
            }
        }
    }
    edges
}

/// The two siblings that hold `from` and `to`; none if one of the two holds the other.
fn siblings(tree: &Tree, from: usize, to: usize) -> Option<(usize, usize)> {
    tree.line(from).into_iter().zip(tree.line(to)).find(|(from, to)| from != to)
}

impl Cycle {
    /// `a -> b -> a`, and the places, relative to `root`, of the first `shown` imports between each two.
    pub fn report(&self, tree: &Tree, root: &Path, shown: usize) -> String {
        let mut names: Vec<_> = self.edges.iter().map(|edge| tree.path(edge.from)).collect();
        names.extend(names.first().cloned());
        let mut report = names.join(" -> ");
        for edge in &self.edges {
            let (from, to) = (&tree.modules[edge.from].name, &tree.modules[edge.to].name);
            for (holder, import) in edge.imports.iter().take(shown) {
                let file = &tree.modules[*holder].file;
                let file = file.strip_prefix(root).unwrap_or(file).display();
                let _ = write!(report, "\n  {from} -> {to}  {file}:{}  {}", import.line, import.path.join("::"));
            }
            if edge.imports.len() > shown {
                let _ = write!(report, "\n  {from} -> {to}  and {} more", edge.imports.len() - shown);
            }
        }
        report
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// The first line of each report.
    fn found(text: &str) -> Vec<String> {
        let tree = Tree::parse(text);
        cycles(&tree)
            .iter()
            .map(|cycle| cycle.report(&tree, Path::new(""), 1).lines().next().unwrap().to_owned())
            .collect()
    }

    const NONE: [&str; 0] = [];

    #[test]
    fn two_modules_that_import_each_other_are_a_cycle() {
        let text = "mod a { use crate::b::B; pub struct A; }
                    mod b { use super::a::A; pub struct B; }";
        assert_eq!(found(text), ["crate::a -> crate::b -> crate::a"]);
    }

    #[test]
    fn imports_of_nested_modules_count_for_the_siblings_that_hold_them() {
        let text = "mod a { mod deep { mod deeper { use crate::b::B; } } }
                    mod b { mod deep { fn f() { super::super::c::inner::f() } } pub struct B; }
                    mod c { pub mod inner { pub fn f() { let _ = crate::a::A; } } }";
        assert_eq!(found(text), ["crate::a -> crate::b -> crate::c -> crate::a"]);
    }

    #[test]
    fn siblings_below_the_root_are_checked_too() {
        let text = "mod outer { mod a { use super::b::B; } mod b { use crate::outer::a::A; } }";
        assert_eq!(found(text), ["crate::outer::a -> crate::outer::b -> crate::outer::a"]);
    }

    #[test]
    fn each_import_of_a_tangle_is_on_a_named_cycle() {
        let text = "mod a { use crate::b::B; }
                    mod b { use crate::{a::A, c::C}; }
                    mod c { use crate::a::A; }";
        assert_eq!(found(text), ["crate::a -> crate::b -> crate::a", "crate::b -> crate::c -> crate::a -> crate::b"]);
    }

    #[test]
    fn one_way_and_outwards_is_no_cycle() {
        let text = "mod a { use crate::b::B; use std::fmt; use anyhow::b; }
                    mod b { use crate::c::C; }
                    mod c { pub struct C; }";
        assert_eq!(found(text), NONE);
    }

    #[test]
    fn a_parent_and_its_child_are_no_siblings() {
        let text = "use a::A; pub struct Root;
                    mod a { use self::child::Child; pub struct A;
                            mod child { use super::A; use crate::Root; pub struct Child; } }";
        assert_eq!(found(text), NONE);
    }

    #[test]
    fn tests_are_left_out() {
        let text = "mod a { use crate::b::B; }
                    mod b { #[cfg(test)] mod tests { use crate::a::A; }
                            #[cfg(test)] use crate::a::A;
                            #[cfg(all(test, unix))] fn f() { crate::a::f() }
                            #[test] fn g() { crate::a::f() }
                            impl B { #[cfg(test)] fn h() { crate::a::f() } } }";
        assert_eq!(found(text), NONE);
        assert_eq!(found(&text.replace("cfg(test)", "cfg(unix)")).len(), 1);
    }

    #[test]
    fn a_re_export_counts_once_the_module_uses_the_name_itself() {
        let text = "mod a { use crate::b::B; pub struct A; }
                    mod b { pub use crate::a::A; pub struct B; }";
        assert_eq!(found(text), NONE);
        let used = text.replace("struct B", "struct B(A)");
        assert_eq!(found(&used), ["crate::a -> crate::b -> crate::a"]);
    }

    #[test]
    fn a_path_through_a_re_export_leads_to_the_definition() {
        let text = "mod outer { pub use a::A; use b::B;
                                mod a { use super::B; pub struct A; }
                                mod b { use crate::outer::A; pub struct B; } }";
        assert_eq!(found(text), ["crate::outer::a -> crate::outer::b -> crate::outer::a"]);
    }

    #[test]
    fn a_glob_counts_for_the_names_that_are_used() {
        let text = "mod outer { pub use a::*;
                                pub mod a { use super::b::B; pub struct A; }
                                pub mod b { use super::*; pub struct B; fn f() -> A { A } } }";
        assert_eq!(found(text), ["crate::outer::a -> crate::outer::b -> crate::outer::a"]);
        assert_eq!(found(&text.replace("fn f() -> A { A }", "")), NONE);
    }

    #[test]
    fn paths_in_code_macros_and_attributes_are_imports() {
        for there in [
            "type X = Vec<crate::a::A>;",
            "use crate::a; fn f() { a::f() }",
            "fn f() { println!(\"{}\", crate::a::f()) }",
            "macro_rules! m { () => { $crate::a::f() } }",
            "#[derive(crate::a::A)] struct S;",
            "#[serde(default = \"crate::a::seed\")] struct S;",
            "struct S { #[serde(default = \"super::a::seed\")] seed: u64 }",
        ] {
            let text = format!("mod a {{ use crate::b::B; }} mod b {{ {there} }}");
            assert_eq!(found(&text).len(), 1, "{there}");
        }
    }

    #[test]
    fn a_report_names_the_file_and_line_of_each_edge() {
        let folder = tempfile::tempdir().unwrap();
        let write = |file: &str, text: &str| {
            let file = folder.path().join(file);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, text).unwrap();
        };
        write("src/lib.rs", "mod a;\nmod b;\n");
        write("src/a.rs", "mod child;\n");
        write("src/a/child.rs", "\n\nuse crate::b::Of;\n");
        write("src/b/mod.rs", "mod inner;\n#[path = \"elsewhere.rs\"]\nmod other;\n");
        write("src/b/inner.rs", "");
        write("src/b/elsewhere.rs", "\nuse crate::a::A;\nfn f() -> A {\n    crate::a::g()\n}\n");
        let tree = Tree::read(&folder.path().join("src/lib.rs")).unwrap();
        let reports: Vec<_> = cycles(&tree).iter().map(|cycle| cycle.report(&tree, folder.path(), 1)).collect();
        assert_eq!(
            reports,
            ["crate::a -> crate::b -> crate::a\n  \
              a -> b  src/a/child.rs:3  crate::b::Of\n  \
              b -> a  src/b/elsewhere.rs:2  crate::a::A\n  \
              b -> a  and 1 more"]
        );
    }
}
