//! A data set of the Hub: which of its files are the rows to train on.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

use serde_json::Value;
use tunesmith_crds::{Uri, adapter_version::ArtifactFile};

use super::Repository;
use crate::{
    data::DataFile,
    store::{Pattern, Role, StoreError, Stores},
};

/// What files of rows end in, compressed or not.
const ROWS: [&str; 6] = [".parquet", ".jsonl", ".ndjson", ".json", ".csv", ".arrow"];
const COMPRESSED: [&str; 2] = [".gz", ".zst"];
/// JSON that describes a data set.
const ABOUT: [&str; 5] =
    ["dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json", "metadata.json"];
/// Words that name a split, between other characters than letters.
const TRAIN: [&str; 2] = ["train", "training"];
const OTHER_SPLITS: [&str; 8] = ["test", "testing", "eval", "evaluation", "dev", "val", "valid", "validation"];
/// A data set's own words about its files, in YAML before its text.
const CARD: &str = "README.md";

/// Brings the files that a URI means here, in the order of their names.
///
/// # Errors
/// The Hub fails, or it is not clear which files are meant.
pub fn fetch(uri: &Uri, stores: &Stores, work: &Path) -> Result<Vec<(DataFile, ArtifactFile)>, StoreError> {
    let role = Role::Dataset;
    let repository = Repository::open(uri, role, stores, work)?;
    let files = repository.files();
    let chosen = match uri.path() {
        "" => train_split(files, card(&repository)?.as_ref()),
        path => named(files, path),
    };
    let chosen = chosen.map_err(|problem| StoreError::Unreadable { role, uri: uri.clone(), problem })?;
    let fetch = |name: String| {
        let file = repository.fetch(&name)?;
        Ok((DataFile { path: repository.folder().join(&name), name }, file))
    };
    chosen.into_iter().map(fetch).collect()
}

/// The YAML of the card, if the data set has some.
fn card(repository: &Repository) -> Result<Option<Value>, StoreError> {
    if !repository.files().contains(CARD) {
        return Ok(None);
    }
    repository.fetch(CARD)?;
    let path = repository.folder().join(CARD);
    let text = fs::read(&path).map_err(|source| StoreError::Disk { path, source })?;
    let text = String::from_utf8_lossy(&text).replace("\r\n", "\n");
    let Some((yaml, _)) = text.strip_prefix("---\n").and_then(|rest| rest.split_once("\n---")) else { return Ok(None) };
    serde_saphyr::from_str(yaml).map(Some).map_err(|error| StoreError::Unreadable {
        role: Role::Dataset,
        uri: repository.uri().clone(),
        problem: format!(
            "its {CARD} is to say which files are the train split, and begins with no YAML: {error}; \
                          add a file or a pattern to the URI"
        ),
    })
}

/// The files that a path or a pattern means.
fn named(files: &BTreeSet<String>, path: &str) -> Result<Vec<String>, String> {
    if files.contains(path) {
        return Ok(vec![path.to_owned()]);
    }
    if !path.contains('*') {
        let below = format!("{path}/");
        let is_folder = files.iter().any(|name| name.starts_with(&below));
        return Err(match is_folder {
            true => format!("{path} is a folder: name one of its files, or a pattern such as {path}/*"),
            false => format!("it has no file {path}; {}", found(files)),
        });
    }
    let chosen = matching(files, path);
    if chosen.is_empty() { Err(format!("no file matches {path}; {}", found(files))) } else { Ok(chosen) }
}

fn matching(files: &BTreeSet<String>, pattern: &str) -> Vec<String> {
    let pattern = Pattern::new(pattern);
    files.iter().filter(|name| pattern.matches(name) && !pattern.leaves_out(name)).cloned().collect()
}

fn found(files: &BTreeSet<String>) -> String {
    let rows: Vec<String> = families(files.iter().filter(|name| is_rows(name))).into_keys().collect();
    match rows.is_empty() {
        true => "it holds no Parquet, JSON Lines, CSV or Arrow files".into(),
        false => format!("there are {}", listed(&rows)),
    }
}

fn listed(names: &[String]) -> String {
    const SHOWN: usize = 12;
    let more = if names.len() > SHOWN { ", …" } else { "" };
    format!("{}{more}", names[..names.len().min(SHOWN)].join(", "))
}

/// The files of the split `train`, as the card says, or else as their names do.
fn train_split(files: &BTreeSet<String>, card: Option<&Value>) -> Result<Vec<String>, String> {
    if let Some(configs) = card.and_then(|card| card["configs"].as_array()).filter(|configs| !configs.is_empty()) {
        return train_of_card(files, configs);
    }
    let rows: BTreeSet<&String> = files.iter().filter(|name| is_rows(name)).collect();
    let is = |name: &str, words: &[&str]| has_word(name, words);
    let train: Vec<&String> = rows.iter().copied().filter(|name| is(name, &TRAIN)).collect();
    let unnamed = || rows.iter().copied().filter(|name| !is(name, &OTHER_SPLITS)).collect();
    let train: Vec<&String> = if train.is_empty() { unnamed() } else { train };
    let families = families(train.iter().copied());
    match families.len() {
        0 => Err(format!("it has no rows to train on; {}", found(files))),
        1 => Ok(train.into_iter().cloned().collect()),
        _ => Err(ambiguous(&families.into_keys().collect::<Vec<_>>())),
    }
}

fn ambiguous(patterns: &[String]) -> String {
    format!(
        "it is not clear which of its files to train on: {}; add one of these to the URI after a slash",
        listed(patterns)
    )
}

/// The same by the configurations that the card lists.
fn train_of_card(files: &BTreeSet<String>, configs: &[Value]) -> Result<Vec<String>, String> {
    let is_default = |config: &&Value| config["default"] == true || config["config_name"] == "default";
    let config = match configs {
        [config] => config,
        configs => match configs.iter().find(is_default) {
            Some(config) => config,
            None => return Err(ambiguous(&configs.iter().flat_map(train_patterns).collect::<Vec<_>>())),
        },
    };
    let mut chosen = BTreeSet::new();
    for pattern in train_patterns(config) {
        let found = matching(files, &pattern);
        if found.is_empty() {
            return Err(format!(
                "its README.md names {pattern} for the split train, which is no file of it; {}",
                self::found(files)
            ));
        }
        chosen.extend(found);
    }
    match chosen.is_empty() {
        true => Err(format!("its README.md names no files for the split train; {}", found(files))),
        false => Ok(chosen.into_iter().collect()),
    }
}

/// The patterns of `data_files` for the split train: one, several, or some for each split.
fn train_patterns(config: &Value) -> Vec<String> {
    fn paths(value: &Value) -> Vec<String> {
        match value {
            Value::String(path) => vec![path.trim_start_matches("./").to_owned()],
            Value::Array(all) => all.iter().flat_map(paths).collect(),
            _ => Vec::new(),
        }
    }
    match &config["data_files"] {
        Value::Array(splits) if splits.iter().any(Value::is_object) => {
            splits.iter().filter(|split| split["split"] == "train").flat_map(|split| paths(&split["path"])).collect()
        }
        Value::Object(splits) => splits.get("train").map(paths).unwrap_or_default(),
        Value::Null => match config["data_dir"].as_str() {
            Some(folder) => vec![format!("{}/**", folder.trim_matches('/'))],
            None => Vec::new(),
        },
        all => paths(all),
    }
}

fn is_rows(name: &str) -> bool {
    let file = name.rsplit('/').next().unwrap_or(name);
    let plain = COMPRESSED.iter().find_map(|end| name.strip_suffix(end)).unwrap_or(name);
    ROWS.iter().any(|end| plain.ends_with(end)) && !file.starts_with(['.', '_']) && !ABOUT.contains(&file)
}

fn has_word(name: &str, words: &[&str]) -> bool {
    let name = name.to_ascii_lowercase();
    name.split(|c: char| !c.is_ascii_alphabetic()).any(|word| words.contains(&word))
}

/// Files that are shards of one another, by the pattern that means them all.
fn families<'a>(files: impl Iterator<Item = &'a String>) -> BTreeMap<String, Vec<&'a String>> {
    let mut families: BTreeMap<String, Vec<&String>> = BTreeMap::new();
    for name in files {
        families.entry(family(name)).or_default().push(name);
    }
    // A pattern of one file is that file.
    families
        .into_iter()
        .map(|(family, files)| (if files.len() == 1 { files[0].clone() } else { family }, files))
        .collect()
}

/// `data/train-*.parquet` for `data/train-00000-of-00003-a1b2c3d4.parquet`.
fn family(name: &str) -> String {
    let (folder, file) = name.rsplit_once('/').map_or(("", name), |(folder, file)| (folder, file));
    let (stem, end) = file.split_once('.').unwrap_or((file, ""));
    let stem = match stem.split_once("-of-") {
        Some((start, _)) => start,
        None => stem,
    };
    let start = stem.trim_end_matches(|c: char| c.is_ascii_digit());
    let stem = if start.len() < stem.len() { format!("{start}*") } else { stem.to_owned() };
    let file = if end.is_empty() { stem } else { format!("{stem}.{end}") };
    if folder.is_empty() { file } else { format!("{folder}/{file}") }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn files(names: &[&str]) -> BTreeSet<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    fn train(names: &[&str]) -> Result<Vec<String>, String> {
        train_split(&files(names), None)
    }

    #[test]
    fn the_train_split_is_found_by_the_usual_names() {
        for (present, chosen) in [
            (
                &[
                    "README.md",
                    "data/test-00000-of-00001.parquet",
                    "data/train-00000-of-00002.parquet",
                    "data/train-00001-of-00002.parquet",
                ][..],
                &["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"][..],
            ),
            (&["train.jsonl", "validation.jsonl", "dataset_infos.json"], &["train.jsonl"]),
            (&["alpaca_data.json", "README.md", "images/a.png"], &["alpaca_data.json"]),
            (&["rows.csv.gz", "test.csv.gz"], &["rows.csv.gz"]),
            (
                &["train/0000.parquet", "train/0001.parquet", "test/0000.parquet"],
                &["train/0000.parquet", "train/0001.parquet"],
            ),
            (&["restraint.jsonl", "eval.jsonl"], &["restraint.jsonl"]),
            (&["data/train-00000-of-00001-3f2a.parquet", "state.json"], &["data/train-00000-of-00001-3f2a.parquet"]),
        ] {
            assert_eq!(
                train(present).as_deref(),
                Ok(&chosen.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>()[..])
            );
        }
    }

    #[test]
    fn what_is_not_clear_is_refused_with_what_is_there() {
        for (present, named) in [
            (
                &["main/train-00000-of-00001.parquet", "socratic/train-00000-of-00001.parquet"][..],
                "main/train-00000-of-00001.parquet, socratic/train-00000-of-00001.parquet",
            ),
            (
                &[
                    "data/train_sft-00000-of-00002.parquet",
                    "data/train_sft-00001-of-00002.parquet",
                    "data/train_gen-00000-of-00001.parquet",
                ],
                "data/train_gen-00000-of-00001.parquet, data/train_sft-*.parquet",
            ),
            (&["train.jsonl", "train.parquet"], "train.jsonl, train.parquet"),
            (&["en.jsonl", "de.jsonl"], "de.jsonl, en.jsonl"),
            (&["test.jsonl"], "no rows to train on; there are test.jsonl"),
            (&["README.md", "images/a.png"], "no Parquet, JSON Lines"),
        ] {
            let error = train(present).unwrap_err();
            assert!(error.contains(named), "{error}");
        }
    }

    #[test]
    fn a_path_is_a_file_or_a_pattern_and_never_a_folder() {
        let present = files(&["data/train-0.parquet", "data/train-1.parquet", "data/_SUCCESS", "README.md"]);
        assert_eq!(named(&present, "data/train-1.parquet").unwrap(), ["data/train-1.parquet"]);
        assert_eq!(named(&present, "data/*").unwrap(), ["data/train-0.parquet", "data/train-1.parquet"]);
        assert!(named(&present, "data").unwrap_err().contains("data/*"));
        assert!(named(&present, "data/x").unwrap_err().contains("there are data/train-*.parquet"));
        assert!(named(&present, "*.csv").unwrap_err().contains("no file matches *.csv"));
    }

    #[test]
    fn the_card_says_which_files_are_which() {
        let present = files(&["a/one.jsonl", "a/two.jsonl", "b/one.jsonl", "README.md"]);
        let by = |configs: Value| train_split(&present, Some(&json!({"configs": configs})));
        let split = |path: Value| json!([{"split": "test", "path": "b/*"}, {"split": "train", "path": path}]);
        let one = json!({"config_name": "x", "data_files": split(json!("a/*"))});
        assert_eq!(by(json!([one])).unwrap(), ["a/one.jsonl", "a/two.jsonl"]);
        let lists = json!({"config_name": "x", "data_files": split(json!(["a/two.jsonl", "b/one.jsonl"]))});
        assert_eq!(by(json!([lists])).unwrap(), ["a/two.jsonl", "b/one.jsonl"]);
        assert_eq!(
            by(json!([{"config_name": "y", "data_files": "b/one.jsonl"}, {"config_name": "default",
            "data_files": {"train": "a/one.jsonl"}}]))
            .unwrap(),
            ["a/one.jsonl"]
        );
        let error = by(json!([{"config_name": "a", "data_files": "a/*"}, {"config_name": "b", "data_files": "b/*"}]));
        assert!(error.unwrap_err().contains("a/*, b/*"));
        let error = by(json!([{"config_name": "a", "data_files": "c/*"}])).unwrap_err();
        assert!(error.contains("names c/*"), "{error}");
    }
}
