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
    /// order of their names.
    ///
    /// # Errors
    /// Nothing matches, or the store fails.
    pub fn expand(&self, role: Role, uri: &Uri) -> Result<Vec<Object>, StoreError> {
        let Some((folder, pattern)) = uri.split_pattern() else {
            return Ok(vec![Object { location: self.open(role, uri)?, name: uri.file_name().to_owned() }]);
        };
        let folder = self.open(role, &folder)?;
        let names = folder.list()?.into_iter().filter(|name| matches(pattern, name));
        let objects: Vec<Object> = names.map(|name| Object { location: folder.join(&name), name }).collect();
        match objects.is_empty() {
            true => Err(StoreError::NoMatch { role, uri: uri.clone() }),
            false => Ok(objects),
        }
    }
}

/// Whether a path is one of those that a pattern means, part by part.
fn matches(pattern: &str, path: &str) -> bool {
    pattern.split('/').count() == path.split('/').count()
        && pattern.split('/').zip(path.split('/')).all(|(pattern, part)| part_matches(pattern, part))
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
            assert!(matches(pattern, path), "{pattern} {path}");
        }
        for (pattern, path) in [
            ("*.jsonl", "a.json"),
            ("*.jsonl", "x/a.jsonl"),
            ("*.jsonl", ".a.jsonl"),
            ("a*a", "a"),
            ("a*b*c", "a-c-b"),
            ("*/train.jsonl", "train.jsonl"),
        ] {
            assert!(!matches(pattern, path), "{pattern} {path}");
        }
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
            prop_assert!(matches(&pattern, filled), "{} {}", pattern, filled);
        }
    }
}
