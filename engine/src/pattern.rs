//! Regular expressions on names of modules, which Python's `re` and Rust's `regex` must read alike: PEFT will match with
//! the same text.

use regex::Regex;

use crate::error::{Error, Result};

/// Keys that match modules, with their values; the first that matches a module counts, as in PEFT's `get_pattern_key`.
pub(crate) struct Patterns<V> {
    field: &'static str,
    entries: Vec<(String, Regex, V)>,
}

impl<V: Copy + PartialEq> Patterns<V> {
    /// The keys in their order; each must match the end of a module's name, from a dot on.
    ///
    /// # Errors
    /// A key is no regular expression, or would be another one in Python.
    pub(crate) fn new<'a>(field: &'static str, pattern: impl IntoIterator<Item = (&'a String, &'a V)>) -> Result<Self>
    where
        V: 'a,
    {
        let entry = |(key, value): (&String, &V)| {
            Ok((key.clone(), compile(field, key, &format!(r"^(?:.*\.)?(?:{key})$"))?, *value))
        };
        Ok(Patterns { field, entries: pattern.into_iter().map(entry).collect::<Result<_>>()? })
    }

    /// The value for this module, if a key matches.
    pub(crate) fn first(&self, module: &str) -> Option<V> {
        self.matching(module).next().map(|(_, value)| value)
    }

    /// Refuses keys that match none of these modules, and two that match the same with different values.
    ///
    /// # Errors
    /// As said.
    pub(crate) fn check(&self, modules: &[String]) -> Result<()> {
        let field = self.field;
        if let Some((key, ..)) = self.entries.iter().find(|(_, key, _)| !modules.iter().any(|x| key.is_match(x))) {
            return Err(Error::Lora(format!("{field}: {key:?} matches no layer that has an adapter")));
        }
        for module in modules {
            let mut matching = self.matching(module);
            let Some((first, value)) = matching.next() else { continue };
            if let Some((second, _)) = matching.find(|(_, other)| *other != value) {
                return Err(Error::Lora(format!(
                    "{field}: {first:?} and {second:?} both match {module} and differ; write keys that match apart"
                )));
            }
        }
        Ok(())
    }

    fn matching(&self, module: &str) -> impl Iterator<Item = (&str, V)> {
        let matches = move |(_, key, _): &&(String, Regex, V)| key.is_match(module);
        self.entries.iter().filter(matches).map(|(key, _, value)| (key.as_str(), *value))
    }
}

/// Compiles `regex`, which is made of the user's `pattern`.
///
/// # Errors
/// The pattern is no regular expression, or would be another one in Python.
pub(crate) fn compile(field: &str, pattern: &str, regex: &str) -> Result<Regex> {
    if let Some(part) = unportable(pattern) {
        return Err(Error::Lora(format!(
            "{field}: {pattern:?} has {part:?}, which PEFT would read otherwise or not at all; write it without"
        )));
    }
    Regex::new(regex)
        .map_err(|error| Error::Lora(format!("{field}: {pattern:?} is no regular expression: {}", last_line(&error))))
}

/// The part of an error that says what is wrong; the lines before draw the pattern with what was put around it.
fn last_line(error: &regex::Error) -> String {
    let text = error.to_string();
    let line = text.lines().last().unwrap_or_default();
    line.strip_prefix("error: ").unwrap_or(line).to_owned()
}

/// A part of a pattern that Python's `re` reads otherwise than Rust's `regex`, or that one of them does not know.
fn unportable(pattern: &str) -> Option<String> {
    let mut rest = pattern.chars().peekable();
    let mut is_in_class = false;
    while let Some(char) = rest.next() {
        let next = rest.peek().copied();
        let both = || [char].into_iter().chain(next).collect::<String>();
        match (char, next) {
            ('\\', Some(escaped)) => {
                rest.next();
                let is_known =
                    !escaped.is_alphanumeric() || (escaped.is_alphabetic() && "dDwWsSbBAntrfv".contains(escaped));
                if !is_known || "<>".contains(escaped) || (escaped == 'b' && rest.peek() == Some(&'{')) {
                    return Some(format!("\\{escaped}"));
                }
            }
            ('[', _) if is_in_class => return Some("[".into()),
            ('[', _) => {
                is_in_class = true;
                // A bracket that closes comes first as itself.
                rest.next_if_eq(&'^');
                rest.next_if_eq(&']');
            }
            (']', _) => is_in_class = false,
            ('&' | '-' | '~' | '|', Some(same)) if is_in_class && same == char => return Some(both()),
            ('(', Some('?')) if !is_in_class => {
                rest.next();
                match rest.next() {
                    Some(':') => {}
                    other => return Some("(?".chars().chain(other).collect()),
                }
            }
            // Possessive in Python, twice repeated in Rust.
            ('*' | '+' | '?' | '}', Some('+')) if !is_in_class => return Some(both()),
            _ => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn patterns(keys: &[(&str, usize)]) -> Result<Patterns<usize>> {
        let keys: Vec<(String, usize)> = keys.iter().map(|(key, value)| ((*key).to_owned(), *value)).collect();
        Patterns::new("rank_pattern", keys.iter().map(|(key, value)| (key, value)))
    }

    #[test]
    fn the_first_key_that_matches_counts_from_a_dot_on() {
        let name = "model.layers.1.self_attn.q_proj";
        for (keys, expected) in [
            (&[("q_proj", 2), (r"layers\.1\..*", 3)][..], Some(2)),
            (&[(r"layers\.1\..*", 3), ("q_proj", 2)], Some(3)),
            (&[("proj", 2), ("_proj", 3), ("q_pro", 4)], None),
            (&[("^model.layers.1.self_attn.q_proj", 5)], Some(5)),
            (&[("k_proj|q_proj", 6)], Some(6)),
        ] {
            assert_eq!(patterns(keys).unwrap().first(name), expected, "{keys:?}");
        }
    }

    #[test]
    fn keys_without_order_must_agree_and_match_something() {
        let modules = ["a.q_proj".to_owned(), "a.v_proj".to_owned()];
        let check = |keys: &[(&str, usize)]| patterns(keys).and_then(|p| p.check(&modules)).map_err(|e| e.to_string());
        check(&[("q_proj", 2), ("v_proj", 3)]).unwrap();
        check(&[("._proj", 2), ("v_proj", 2)]).unwrap();
        let error = check(&[("._proj", 2), ("v_proj", 3)]).unwrap_err();
        assert!(error.contains("\"._proj\" and \"v_proj\" both match a.v_proj"), "{error}");
        let error = check(&[("down_proj", 2)]).unwrap_err();
        assert!(error.contains("rank_pattern: \"down_proj\" matches no layer"), "{error}");
    }

    #[test]
    fn a_pattern_that_python_reads_otherwise_is_refused() {
        for pattern in [
            r"\pL",
            r"\p{Greek}",
            r"q\z",
            r"q\Z",
            r"\<q",
            r"\x{71}",
            r"\u0071",
            "(?i)q",
            "(?=q)",
            "(?P<n>q)",
            "(?<n>q)",
            "[a-z&&[^b]]",
            "[[:alpha:]]",
            "[a--b]",
            "[a~~b]",
            "q*+",
            "q++",
            r"\b{start}q",
            r"(q)\1",
        ] {
            assert!(unportable(pattern).is_some(), "{pattern}");
        }
        for pattern in [
            r".*\.(q_proj|down_proj)",
            r"model\.layers\.(?:[0-9]|1[0-5])\..*",
            "[]q]",
            r"[^\]]",
            "q*",
            "q+?",
            r"\d+",
            "[a-z_-]+",
            r".*(self_attn|mlp).*_proj$",
            r"a\+\+b",
            "(a+)+",
            r"\bq",
        ] {
            assert_eq!(unportable(pattern), None, "{pattern}");
            compile("target_modules", pattern, pattern).unwrap();
        }
    }
}
