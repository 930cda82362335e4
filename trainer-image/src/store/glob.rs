//! URIs with `*`: the objects that they mean.

use tunesmith_crds::Uri;

use super::{Location, Role, StoreError, Stores};

/// An object that a URI means.
pub struct Object {
    /// Where it is.
    pub location: Location,
    /// What messages call it: its name, or its path below the folder of a pattern.
    pub name: String,
}

impl Stores {
    /// The objects that a URI means: the one that it names, there or not; or for a URI with `*` all that match, in the
    /// order of their names, without what engines of tables write beside their rows.
    ///
    /// # Errors
    /// Nothing matches, or the store fails.
    pub fn expand(&self, role: Role, uri: &Uri) -> Result<Vec<Object>, StoreError> {
        let Some((folder, pattern)) = uri.split_pattern() else {
            return Ok(vec![Object { location: self.open(role, uri)?, name: uri.file_name().to_owned() }]);
        };
        let pattern = Pattern::new(pattern);
        let folder = self.open(role, &folder)?;
        let present = folder.list_to_depth(pattern.depth())?;
        let matching = present.iter().filter(|name| pattern.matches(name));
        let (left_out, names): (Vec<_>, Vec<_>) = matching.partition(|name| pattern.leaves_out(name));
        if !left_out.is_empty() {
            tracing::info!(%uri, files = left_out.len(), first = left_out[0], "left out: no rows, but an engine's notes");
        }
        if names.is_empty() {
            return Err(StoreError::NoMatch { role, uri: uri.clone(), found: found(folder.uri(), &present) });
        }
        names.into_iter().map(|name| Ok(Object { location: folder.object(name)?, name: name.clone() })).collect()
    }
}

/// What there is instead of what was meant.
fn found(folder: &Uri, present: &[String]) -> String {
    const SHOWN: usize = 3;
    match present {
        [] => format!("there is nothing in {folder}"),
        _ => {
            let more = if present.len() > SHOWN { ", …" } else { "" };
            let names = present[..present.len().min(SHOWN)].join(", ").replace(char::is_control, "\u{fffd}");
            format!("in {folder} there are {} objects ({names}{more})", present.len())
        }
    }
}

/// What engines of tables write beside their rows.
const NOTES: [&str; 3] = ["_SUCCESS", "_metadata", "_common_metadata"];
/// The same, with something of their own behind it.
const NOTES_BEGIN: [&str; 2] = ["_committed_", "_started_"];
/// Checksums.
const CHECKSUM: &str = ".crc";
/// Folders of such notes, and of file systems.
const NOTES_FOLDERS: [&str; 4] = ["_temporary", "_delta_log", "_spark_metadata", "lost+found"];
/// Any folders, or none.
const ANY_DEPTH: &str = "**";

/// A pattern, part by part.
pub struct Pattern<'a>(Vec<&'a str>);

impl<'a> Pattern<'a> {
    /// Reads a pattern, which any text is.
    pub fn new(pattern: &'a str) -> Self {
        Self(pattern.split('/').collect())
    }

    /// Parts of the longest path that it means.
    fn depth(&self) -> usize {
        if self.0.contains(&ANY_DEPTH) { usize::MAX } else { self.0.len() }
    }

    /// Whether a path is one of those that it means.
    pub fn matches(&self, path: &str) -> bool {
        let path: Vec<&str> = path.split('/').collect();
        // Whether the pattern so far means the first parts of the path, by their number.
        let mut meant = vec![false; path.len() + 1];
        meant[0] = true;
        for pattern in &self.0 {
            let mut next = if *pattern == ANY_DEPTH { meant.clone() } else { vec![false; meant.len()] };
            for (i, part) in path.iter().enumerate() {
                next[i + 1] |= match *pattern {
                    ANY_DEPTH => next[i] && !part.starts_with('.'),
                    pattern => meant[i] && part_matches(pattern, part),
                };
            }
            meant = next;
        }
        meant[path.len()]
    }

    /// Whether a path that it means is none that its author meant.
    pub fn leaves_out(&self, path: &str) -> bool {
        let last = self.0.last().copied().unwrap_or_default();
        let (folders, name) = path.rsplit_once('/').unwrap_or(("", path));
        let is_note = NOTES.contains(&name) || NOTES_BEGIN.iter().any(|start| name.starts_with(start));
        let in_notes = folders.split('/').any(|part| NOTES_FOLDERS.contains(&part) && !self.0.contains(&part));
        (is_note && !last.starts_with('_')) || (name.ends_with(CHECKSUM) && !last.ends_with(CHECKSUM)) || in_notes
    }
}

/// As in a shell: `*` is any characters, but for a dot at the beginning, which hides a file.
fn part_matches(pattern: &str, part: &str) -> bool {
    let Some((beginning, rest)) = pattern.split_once('*') else { return pattern == part };
    if part.starts_with('.') && !beginning.starts_with('.') {
        return false;
    }
    let Some(mut part) = part.strip_prefix(beginning) else { return false };
    let (middle, end) = rest.rsplit_once('*').unwrap_or(("", rest));
    // Each piece where it comes first leaves the most to those that follow.
    for piece in middle.split('*') {
        match part.find(piece) {
            Some(at) => part = &part[at + piece.len()..],
            None => return false,
        }
    }
    part.ends_with(end)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use proptest::prelude::*;
    use tokio::runtime::Runtime;

    use super::*;

    #[test]
    fn a_star_stays_within_one_part_of_the_path() {
        for (pattern, path) in [
            ("*.jsonl", "a.jsonl"),
            ("part-*.jsonl", "part-.jsonl"),
            ("*/train-*.jsonl", "x/train-0.jsonl"),
            ("a*b*c", "a-b-b-c"),
            ("*", "anything"),
            (".*", ".hidden"),
        ] {
            assert!(Pattern::new(pattern).matches(path), "{pattern} {path}");
        }
        for (pattern, path) in [
            ("*.jsonl", "a.json"),
            ("*.jsonl", "x/a.jsonl"),
            ("*.jsonl", ".a.jsonl"),
            ("a*a", "a"),
            ("a*b*c", "a-c-b"),
            ("*/train.jsonl", "train.jsonl"),
        ] {
            assert!(!Pattern::new(pattern).matches(path), "{pattern} {path}");
        }
    }

    #[test]
    fn two_stars_are_any_folders() {
        for (pattern, path, meant) in [
            ("**/*.jsonl", "a.jsonl", true),
            ("**/*.jsonl", "x/y/a.jsonl", true),
            ("**/*.jsonl", "x/.git/a.jsonl", false),
            ("x/**", "x/y/z", true),
            ("x/**", "y/z", false),
            ("**/y/**/*.json", "x/y/z/a.json", true),
            ("**/y/**/*.json", "x/z/a.json", false),
            ("a**.jsonl", "a/b.jsonl", false),
            ("a**.jsonl", "ab.jsonl", true),
        ] {
            assert_eq!(Pattern::new(pattern).matches(path), meant, "{pattern} {path}");
        }
        let (many, deep) = ("**/a/".repeat(60) + "c", "a/".repeat(300) + "b");
        assert!(!Pattern::new(&many).matches(&deep), "and it takes no time");
    }

    #[test]
    fn notes_of_engines_are_no_rows_unless_they_are_named() {
        for (pattern, path, left_out) in [
            ("*", "_SUCCESS", true),
            ("*", "_committed_4711", true),
            ("*", "part-0.parquet.crc", true),
            ("*/*", "_delta_log/0.json", true),
            ("*", "_rows.jsonl", false),
            ("_*", "_SUCCESS", false),
            ("_delta_log/*", "_delta_log/0.json", false),
            ("*.crc", "a.crc", false),
        ] {
            assert_eq!(Pattern::new(pattern).leaves_out(path), left_out, "{pattern} {path}");
        }
    }

    #[test]
    fn odd_names_on_a_disk_are_read_as_they_are() {
        let folder = tempfile::tempdir().unwrap();
        let names = ["50%20off.jsonl", "a b.jsonl", "c#1", "q?.jsonl", "[x].jsonl", "列.jsonl"];
        names.iter().for_each(|name| fs::write(folder.path().join(name), name).unwrap());
        std::os::unix::fs::symlink("/nothing/here", folder.path().join("zz-link")).unwrap();
        let runtime = Runtime::new().unwrap();
        let stores = Stores::from_environment(runtime.handle().clone());
        let uri = |name: &str| format!("file://{}/{name}", folder.path().display()).parse().unwrap();
        let objects = stores.expand(Role::Dataset, &uri("*")).unwrap();
        let found: Vec<&str> = objects.iter().map(|object| object.name.as_str()).collect();
        assert_eq!(found, ["50%20off.jsonl", "[x].jsonl", "a b.jsonl", "c#1", "q?.jsonl", "zz-link", "列.jsonl"]);
        for object in &objects {
            let path = object.location.on_disk().unwrap();
            match object.location.digest_on_disk(path, &object.name) {
                Ok(_) => assert_eq!(fs::read_to_string(path).unwrap(), object.name),
                Err(error) => {
                    assert!(object.name == "zz-link" && matches!(error, StoreError::Missing { .. }), "{error}")
                }
            }
        }
        for name in names {
            assert_eq!(stores.expand(Role::Dataset, &uri(name)).unwrap()[0].name, name);
        }
        let odd = stores.expand(Role::Dataset, &uri("a b*")).unwrap();
        assert_eq!(odd[0].location.read().unwrap(), "a b.jsonl");
    }

    #[test]
    fn an_error_tells_what_is_there_instead() {
        let folder = tempfile::tempdir().unwrap();
        let runtime = Runtime::new().unwrap();
        let stores = Stores::from_environment(runtime.handle().clone());
        let error = |pattern: &str| {
            let uri = format!("file://{}/{pattern}", folder.path().display()).parse().unwrap();
            stores.expand(Role::Dataset, &uri).err().unwrap().to_string()
        };
        assert!(error("*.jsonl").contains("there is nothing in file://"), "{}", error("*.jsonl"));
        ["train.json", "_SUCCESS"].iter().for_each(|name| fs::write(folder.path().join(name), "").unwrap());
        assert!(error("*.jsonl").contains("there are 2 objects (_SUCCESS, train.json)"), "{}", error("*.jsonl"));
        assert!(error("tr[a]in.*").contains("all other characters for themselves"));
    }

    #[test]
    fn objects_come_in_the_order_of_their_names_and_none_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["part-2.jsonl", "part-10.jsonl", "part-1.jsonl", "other.jsonl", "more/part-0.jsonl"] {
            fs::create_dir_all(folder.path().join("more")).unwrap();
            fs::write(folder.path().join(name), "").unwrap();
        }
        let runtime = Runtime::new().unwrap();
        let stores = Stores::from_environment(runtime.handle().clone());
        let expand = |pattern: &str| {
            let uri = format!("file://{}/{pattern}", folder.path().display()).parse().unwrap();
            stores.expand(Role::Dataset, &uri)
        };
        let names = |pattern| expand(pattern).unwrap().into_iter().map(|object| object.name).collect::<Vec<_>>();
        assert_eq!(names("part-*.jsonl"), ["part-1.jsonl", "part-10.jsonl", "part-2.jsonl"]);
        assert_eq!(names("*/part-*"), ["more/part-0.jsonl"]);
        assert_eq!(names("absent.jsonl"), ["absent.jsonl"], "whether it is there shows when it is read");
        assert!(expand("part-1*").unwrap()[0].location.on_disk().unwrap().is_file());
        let error = expand("*.parquet").err().unwrap();
        assert_eq!(error.exit_code(), tunesmith_crds::names::exit_code::BAD_INPUT);
        assert!(error.to_string().contains("*.parquet (dataset)"), "{error}");
    }

    proptest! {
        #[test]
        fn whatever_fills_the_stars_matches(
            pieces in prop::collection::vec("[ab.-]{0,3}", 2..5), fillings in prop::collection::vec("[ab.-]{0,3}", 4),
        ) {
            let filled: String = pieces.iter().zip(&fillings).map(|(piece, filling)| piece.clone() + filling).collect();
            let last = fillings[pieces.len() - 1].len();
            let filled = &filled[..filled.len() - last];
            let pattern = pieces.join("*");
            prop_assume!(!filled.starts_with('.') || pattern.starts_with('.'));
            prop_assert!(Pattern::new(&pattern).matches(filled), "{} {}", pattern, filled);
        }
    }
}
