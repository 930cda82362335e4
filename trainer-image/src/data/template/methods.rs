//! Methods and filters of texts as Python has them.

use minijinja::{
    Error, State, Value,
    value::{Kwargs, Rest, ValueKind, from_args},
};
use minijinja_contrib::pycompat::unknown_method_callback;

use super::values::{MAX_WIDTH, is_wide, too_wide, tuple, view, wrong};

/// Methods of Python's types.
pub(super) fn method(state: &State, value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    let known = || unknown_method_callback(state, value, method, args);
    let text = match value.as_str() {
        Some(text) => text,
        None if value.kind() == ValueKind::Map && ["items", "keys", "values"].contains(&method) => {
            return view(method, &known()?);
        }
        None => return known(),
    };
    let one = || from_args::<(&str,)>(args).map(|(part,)| part);
    let three = |before: &str, part: &str, after: &str| tuple(Rest([before, part, after].map(Value::from).to_vec()));
    let all =
        |is: fn(char) -> bool| from_args::<()>(args).map(|()| Value::from(!text.is_empty() && text.chars().all(is)));
    Ok(match method {
        "title" => title(text).into(),
        "strip" | "lstrip" | "rstrip" => {
            let (characters,): (Option<&str>,) = from_args(args)?;
            let start = if method == "rstrip" { text } else { strip_start(text, characters) };
            if method == "lstrip" { start.into() } else { strip_end(start, characters).into() }
        }
        "split" => split(text, args)?.into(),
        "splitlines" => lines(text, from_args::<(Option<bool>,)>(args)?.0.unwrap_or(false)),
        "islower" => is_lower(text).into(),
        "isupper" => is_upper(text).into(),
        "isspace" => all(is_space)?,
        "isalpha" => all(char::is_alphabetic)?,
        "isalnum" => all(char::is_alphanumeric)?,
        "isdigit" | "isnumeric" if text.is_empty() => false.into(),
        "rsplit" => rsplit(text, args)?.into(),
        "partition" => match text.split_once(one()?) {
            Some((before, after)) => three(before, one()?, after),
            None => three(text, "", ""),
        },
        "rpartition" => match text.rsplit_once(one()?) {
            Some((before, after)) => three(before, one()?, after),
            None => three("", "", text),
        },
        "removeprefix" => text.strip_prefix(one()?).unwrap_or(text).into(),
        "removesuffix" => text.strip_suffix(one()?).unwrap_or(text).into(),
        "format" if widest(text) > MAX_WIDTH => return Err(too_wide("format")),
        "ljust" | "rjust" | "center" | "zfill" if args.first().is_some_and(is_wide) => return Err(too_wide(method)),
        _ => return known(),
    })
}

/// The largest number in the braces of a format.
fn widest(format: &str) -> usize {
    let fields = format.split('{').skip(1).filter_map(|rest| rest.split('}').next());
    let numbers =
        fields.flat_map(|field| field.split(|c: char| !c.is_ascii_digit()).filter(|digits| !digits.is_empty()));
    numbers.map(|digits| digits.parse().unwrap_or(usize::MAX)).max().unwrap_or(0)
}

/// The arguments of `split` and `rsplit`: the separator, which is white space where there is none, and how often it splits.
fn limits(args: &[Value]) -> Result<(Option<String>, usize), Error> {
    let (separator, most, named): (Option<Value>, Option<i64>, Kwargs) = from_args(args)?;
    let separator = match separator {
        Some(separator) => Some(separator),
        None => named.get("sep")?,
    };
    let most = match most {
        Some(most) => Some(most),
        None => named.get("maxsplit")?,
    };
    named.assert_all_used()?;
    let text = |separator: Value| match separator.as_str() {
        Some(text) if !text.is_empty() => Ok(text.to_owned()),
        _ => Err(wrong("split: the separator must be a string, and not empty")),
    };
    let separator = separator.filter(|separator| !separator.is_none()).map(text).transpose()?;
    Ok((separator, most.and_then(|most| usize::try_from(most).ok()).unwrap_or(usize::MAX)))
}

/// The parts of a text, of which so many are split off from its beginning.
fn split(text: &str, args: &[Value]) -> Result<Vec<String>, Error> {
    let (separator, most) = limits(args)?;
    let (mut rest, mut parts) = (text, Vec::new());
    loop {
        if separator.is_none() {
            rest = rest.trim_start_matches(is_space);
        }
        let split = match &separator {
            _ if parts.len() == most => None,
            Some(separator) => rest.split_once(separator),
            None => rest.split_once(is_space),
        };
        let Some((part, behind)) = split else { break };
        parts.push(part.to_owned());
        rest = behind;
    }
    if separator.is_some() || !rest.is_empty() {
        parts.push(rest.to_owned());
    }
    Ok(parts)
}

/// The parts of a text, of which so many are split off from its end.
fn rsplit(text: &str, args: &[Value]) -> Result<Vec<String>, Error> {
    let (separator, most) = limits(args)?;
    let (mut rest, mut parts) = (text, Vec::new());
    loop {
        if separator.is_none() {
            rest = rest.trim_end_matches(is_space);
        }
        let split = match &separator {
            _ if parts.len() == most => None,
            Some(separator) => rest.rsplit_once(separator),
            None => rest.rsplit_once(is_space),
        };
        let Some((before, part)) = split else { break };
        parts.push(part.to_owned());
        rest = before;
    }
    if separator.is_some() || !rest.is_empty() {
        parts.push(rest.to_owned());
    }
    parts.reverse();
    Ok(parts)
}

/// White space as `str.isspace` has it.
pub(super) fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

fn strip_start<'a>(text: &'a str, characters: Option<&str>) -> &'a str {
    text.trim_start_matches(|c| characters.map_or(is_space(c), |characters| characters.contains(c)))
}

fn strip_end<'a>(text: &'a str, characters: Option<&str>) -> &'a str {
    text.trim_end_matches(|c| characters.map_or(is_space(c), |characters| characters.contains(c)))
}

/// The filter `trim`.
pub(super) fn trim(value: &Value, characters: Option<&str>) -> String {
    strip_end(strip_start(&super::python::str(value), characters), characters).to_owned()
}

/// `str.title`: a letter is upper case behind anything that has no case.
fn title(text: &str) -> String {
    let mut out = String::new();
    let mut is_inside = false;
    for c in text.chars() {
        if is_inside {
            out.extend(c.to_lowercase())
        } else {
            out.extend(c.to_uppercase())
        }
        is_inside = c.is_lowercase() || c.is_uppercase();
    }
    out
}

/// The filter `title`, for which words begin behind white space, dashes and opening brackets alone.
pub(super) fn title_filter(value: &Value) -> String {
    let text = super::python::str(value);
    let begins = |c: char| is_space(c) || "-({[<".contains(c);
    let word = |word: &str| {
        let rest = word.chars().next().map_or(0, char::len_utf8);
        word[..rest].to_uppercase() + &word[rest..].to_lowercase()
    };
    text.split_inclusive(begins).map(word).collect()
}

/// The lines of a text, at whatever Python breaks it.
fn lines(text: &str, keep_ends: bool) -> Value {
    const ENDS: [char; 10] =
        ['\n', '\r', '\u{b}', '\u{c}', '\u{1c}', '\u{1d}', '\u{1e}', '\u{85}', '\u{2028}', '\u{2029}'];
    let mut lines = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let end = rest.find(ENDS).unwrap_or(rest.len());
        let behind = match rest[end..].strip_prefix("\r\n") {
            Some(behind) => behind,
            None => rest[end..].strip_prefix(ENDS).unwrap_or_default(),
        };
        let line = if keep_ends { &rest[..rest.len() - behind.len()] } else { &rest[..end] };
        lines.push(Value::from(line));
        rest = behind;
    }
    lines.into()
}

/// `str.islower`.
pub(super) fn is_lower(text: &str) -> bool {
    text.contains(char::is_lowercase) && !text.contains(char::is_uppercase)
}

/// `str.isupper`.
pub(super) fn is_upper(text: &str) -> bool {
    text.contains(char::is_uppercase) && !text.contains(char::is_lowercase)
}

/// The filter `round`: half goes to the even digit.
pub(super) fn round(value: &Value, precision: Option<i64>) -> Result<Value, Error> {
    let precision = precision.unwrap_or(0);
    match (f64::try_from(value.clone()), usize::try_from(precision)) {
        _ if value.is_integer() && precision >= 0 => Ok(value.clone()),
        (Ok(float), Ok(digits)) if value.is_number() && !is_wide(&Value::from(digits)) => {
            Ok(Value::from(format!("{float:.digits$}").parse::<f64>().unwrap_or(float)))
        }
        _ => Err(wrong(format!("round: {value} can't be rounded to {precision} digits"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_template_can_not_ask_for_more_spaces_than_there_is_memory() {
        let mut environment = minijinja::Environment::new();
        environment.set_unknown_method_callback(method);
        for (template, is_fine) in [
            ("{{ '{:>8}|{}'.format(1, 2) }}", true),
            ("{{ '{:>99999999999}'.format(1) }}", false),
            ("{{ '{0:99999999999999999999999999}'.format(1) }}", false),
            ("{{ '{:.99999999999f}'.format(1.5) }}", false),
        ] {
            let rendered = environment.render_str(template, ());
            assert_eq!(rendered.is_ok(), is_fine, "{template}: {rendered:?}");
        }
    }
}
