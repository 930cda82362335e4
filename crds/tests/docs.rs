//! The documentation agrees with itself: README repeats figures as their source has them, and links lead somewhere.
//!
//! A figure is followed by a comment with its name: `2.51× <!-- figure: speed -->`. The same comment stands at the source, in a
//! page under docs/ or examples/.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use regex::Regex;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize().unwrap()
}

/// The Markdown files of the root, docs/, examples/ and charts/.
fn pages() -> Vec<PathBuf> {
    let mut pages = Vec::new();
    let mut folders: Vec<PathBuf> = ["docs", "examples", "charts"].iter().map(|name| root().join(name)).collect();
    let is_page = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "md");
    let entries = |folder: &Path| fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect::<Vec<_>>();
    pages.extend(entries(&root()).into_iter().filter(is_page));
    while let Some(folder) = folders.pop() {
        let (below, files): (Vec<_>, Vec<_>) = entries(&folder).into_iter().partition(|path| path.is_dir());
        folders.extend(below);
        pages.extend(files.into_iter().filter(is_page));
    }
    pages
}

/// The text without fenced code.
fn prose(text: &str) -> String {
    Regex::new(r"(?ms)^```.*?^```").unwrap().replace_all(text, "").into_owned()
}

/// The figures of a page by their names: the last number before each comment.
fn figures(text: &str) -> Result<BTreeMap<String, String>, String> {
    let mut figures = BTreeMap::new();
    let comment = Regex::new(r"(?s)(.*?)<!-- figure: ([a-z0-9-]+) -->").unwrap();
    let number = Regex::new(r"[0-9][0-9,.]*½?[^0-9<>|\n]*\s*$").unwrap();
    for found in comment.captures_iter(text) {
        let figure = number.find(&found[1]).ok_or_else(|| format!("{}: no number before the comment", &found[2]))?;
        let figure: String = figure.as_str().chars().take_while(|c| c.is_ascii_digit() || ",.½".contains(*c)).collect();
        if let Some(other) = figures.insert(found[2].to_owned(), figure.clone())
            && other != figure
        {
            return Err(format!("{} is {other} and {figure} on one page", &found[2]));
        }
    }
    Ok(figures)
}

/// Each figure of `copy` that no source has with the same number.
fn strays(copy: &str, sources: &[String]) -> Vec<String> {
    let known: Vec<BTreeMap<String, String>> = sources.iter().map(|source| figures(source).unwrap()).collect();
    let mut strays = Vec::new();
    for (name, figure) in figures(copy).unwrap() {
        let there: Vec<&String> = known.iter().filter_map(|figures| figures.get(&name)).collect();
        if there.is_empty() || there.iter().any(|other| **other != figure) {
            strays.push(format!("{name}: README says {figure}, its source {there:?}"));
        }
    }
    strays
}

#[test]
fn every_figure_of_readme_is_its_source_s() {
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    let sources: Vec<String> = pages()
        .into_iter()
        .filter(|page| !page.ends_with("README.md") || page.parent() != Some(&root()))
        .map(|page| fs::read_to_string(page).unwrap())
        .collect();
    assert_eq!(strays(&readme, &sources), Vec::<String>::new());
    assert!(!figures(&readme).unwrap().is_empty(), "README has no figure with a name");
}

#[test]
fn no_measured_figure_of_readme_is_without_a_name() {
    let readme = prose(&fs::read_to_string(root().join("README.md")).unwrap());
    let measured = Regex::new(r"[0-9][0-9,.]*½?(×| minutes| seconds| times| tokens/s| GFLOP)( PEFT's)?").unwrap();
    let nameless: Vec<&str> = measured
        .find_iter(&readme)
        .filter(|found| !readme[found.end()..].trim_start().starts_with("<!-- figure: "))
        .map(|found| found.as_str())
        .collect();
    assert_eq!(nameless, Vec::<&str>::new(), "write `<!-- figure: name -->` behind each, and at its source");
}

#[test]
fn a_figure_that_differs_from_its_source_is_found() {
    let source = "| 2.51× <!-- figure: a --> | **0.3** GiB <!-- figure: b --> |".to_owned();
    assert_eq!(
        strays("2.51× PEFT's <!-- figure: a -->,\n0.3 <!-- figure: b -->", std::slice::from_ref(&source)),
        Vec::<String>::new()
    );
    assert_eq!(strays("2.52× <!-- figure: a -->", std::slice::from_ref(&source)).len(), 1);
    assert_eq!(strays("1 <!-- figure: c -->", &[source]).len(), 1, "without a source");
    assert!(figures("no number <!-- figure: d -->").is_err());
}

/// A heading's anchor, as GitHub makes it.
fn anchor(heading: &str) -> String {
    let link = Regex::new(r"\[([^\]]*)\]\([^)]*\)").unwrap();
    let text = link.replace_all(heading.trim_start_matches('#').trim(), "$1").to_lowercase();
    text.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c)).map(|c| if c == ' ' { '-' } else { c }).collect()
}

#[test]
fn every_link_between_pages_leads_to_a_file_and_a_heading() {
    let link = Regex::new(r"\]\(([^)\s]+)\)").unwrap();
    let code = Regex::new("`[^`\n]*`").unwrap();
    let mut broken = Vec::new();
    for page in pages() {
        let text = prose(&fs::read_to_string(&page).unwrap());
        let text = code.replace_all(&text, "");
        for found in link.captures_iter(&text) {
            let target = &found[1];
            if target.contains("://") || target.starts_with("mailto:") {
                continue;
            }
            let (path, heading) = target.split_once('#').unwrap_or((target, ""));
            let file = if path.is_empty() { page.clone() } else { page.parent().unwrap().join(path) };
            let has_heading = heading.is_empty()
                || fs::read_to_string(&file).is_ok_and(|text| {
                    prose(&text).lines().any(|line| line.starts_with('#') && anchor(line) == heading)
                });
            if !file.exists() || !has_heading {
                broken.push(format!("{}: {target}", page.strip_prefix(root()).unwrap().display()));
            }
        }
    }
    assert_eq!(broken, Vec::<String>::new());
}
