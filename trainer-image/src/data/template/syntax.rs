//! Jinja's own words in a template's text, where minijinja reads them otherwise: `{% generation %}`, which only transformers
//! knows; tuples, which would be lists; and `and`, whose constant operands would become true or false.

use super::values::TUPLE;

/// Stand for `{% generation %}` and `{% endgeneration %}` in rendered text: code points that Unicode reserves for
/// uses like this one, so that no text holds them.
pub(super) const SENTINELS: [char; 2] = ['\u{fdd0}', '\u{fdd1}'];

/// A name that stands for true, and that minijinja does not compute with before a template runs.
pub(super) const TRUE: &str = "__true__";

/// Words of Jinja behind which a parenthesis is no call.
const OPERATORS: [&str; 11] = ["and", "or", "not", "in", "is", "if", "else", "elif", "for", "set", "with"];
/// Those behind which it holds names that are assigned.
const ASSIGNING: [&str; 3] = ["for", "set", "with"];

/// The text of a template for minijinja: with plain line breaks, and with sentinels around the content of
/// `{% generation %}` blocks. The tags keep their dashes and stay block tags, so white space is trimmed as before.
pub(super) fn prepare(source: &str) -> String {
    let source = source.replace("\r\n", "\n").replace('\r', "\n");
    let mut out = String::with_capacity(source.len());
    let mut rest = source.as_str();
    while let Some((start, kind)) = tag(rest) {
        let (text, tag) = rest.split_at(start);
        out.push_str(text);
        let Some(end) = end_of(tag, kind) else {
            rest = tag;
            break;
        };
        let (tag, behind) = tag.split_at(end);
        rest = behind;
        match kind {
            '#' => out.push_str(tag),
            '{' => out.push_str(&expression(tag)),
            _ => match tag[2..end - 2].trim_matches(['-', '+']).trim() {
                "generation" => out.push_str(&mark(tag, SENTINELS[0])),
                "endgeneration" => out.push_str(&mark(tag, SENTINELS[1])),
                "raw" => {
                    let end = end_of_raw(rest);
                    out.push_str(tag);
                    out.push_str(&rest[..end]);
                    rest = &rest[end..];
                }
                _ => out.push_str(&expression(tag)),
            },
        }
    }
    out + rest
}

/// The next tag, and what stands behind its brace.
fn tag(text: &str) -> Option<(usize, char)> {
    let behind = |start: usize| text[start + 1..].chars().next().filter(|c| "{%#".contains(*c));
    text.match_indices('{').find_map(|(start, _)| Some((start, behind(start)?)))
}

/// Where a tag ends, behind its closing brace.
fn end_of(tag: &str, kind: char) -> Option<usize> {
    if kind == '#' {
        return Some(tag.find("#}")? + 2);
    }
    let close = if kind == '{' { "}}" } else { "%}" };
    let mut depth = 0_usize;
    let mut at = 2;
    loop {
        let rest = &tag[at..];
        if depth == 0 && rest.starts_with(close) {
            return Some(at + 2);
        }
        let next = rest.chars().next()?;
        match next {
            '(' | '[' | '{' => depth += 1,
            ')' | ']' | '}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        at += token(rest);
    }
}

/// Where the content of a `{% raw %}` ends.
fn end_of_raw(text: &str) -> usize {
    let is_end = |start: usize| text[start + 2..].trim_start_matches(['-', '+']).trim_start().starts_with("endraw");
    text.match_indices("{%").map(|(start, _)| start).find(|start| is_end(*start)).unwrap_or(text.len())
}

/// A block tag that writes a mark.
fn mark(tag: &str, sentinel: char) -> String {
    let sign = |c: Option<char>| c.filter(|c| "-+".contains(*c)).map(String::from).unwrap_or_default();
    let (open, close) = (sign(tag[2..].chars().next()), sign(tag[..tag.len() - 2].chars().next_back()));
    format!("{{%{open} if true %}}{sentinel}{{% endif {close}%}}")
}

/// Bytes of the first token: a string, a word or number, or a character.
fn token(text: &str) -> usize {
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    let Some(first) = text.chars().next() else { return 0 };
    match first {
        '\'' | '"' => {
            let mut is_escaped = false;
            let end = text.char_indices().skip(1).find(|(_, c)| {
                let is_end = *c == first && !is_escaped;
                is_escaped = *c == '\\' && !is_escaped;
                is_end
            });
            end.map_or(text.len(), |(at, c)| at + c.len_utf8())
        }
        c if is_word(c) => text.find(|c| !is_word(c)).unwrap_or(text.len()),
        c => c.len_utf8(),
    }
}

/// A bracket that is open.
struct Open {
    /// Its place in what is written.
    at: usize,
    /// It may be a tuple's: it opens no call, and assigns nothing.
    is_group: bool,
    /// It holds names that are assigned.
    is_assigning: bool,
    has_comma: bool,
    is_empty: bool,
}

/// A tag whose tuples are calls of [`TUPLE`], and whose `and` has operands that are not constant.
fn expression(tag: &str) -> String {
    let mut out = String::with_capacity(tag.len());
    let mut open: Vec<Open> = Vec::new();
    // The last token, and whether a value ends with it.
    let (mut before, mut is_value) = ("", false);
    let mut rest = tag;
    while !rest.is_empty() {
        let (token, behind) = rest.split_at(token(rest));
        rest = behind;
        if token.trim().is_empty() {
            out.push_str(token);
            continue;
        }
        if let Some(last) = open.last_mut() {
            last.has_comma |= token == ",";
            last.is_empty &= [")", "]", "}"].contains(&token);
        }
        match token {
            "(" | "[" | "{" => {
                let is_assigning = ASSIGNING.contains(&before) || open.last().is_some_and(|open| open.is_assigning);
                let is_group = token == "(" && !is_value && !is_assigning;
                open.push(Open { at: out.len(), is_group, is_assigning, has_comma: false, is_empty: true });
            }
            ")" | "]" | "}" => {
                if let Some(Open { at, is_group: true, has_comma, is_empty, .. }) = open.pop()
                    && (has_comma || is_empty)
                {
                    out.insert_str(at, TUPLE);
                }
            }
            _ => {}
        }
        out.push_str(token);
        let is_attribute = before == ".";
        if token == "and" && !is_attribute {
            out.push_str(&format!(" {TRUE} and"));
        }
        let ends = |c: char| c.is_alphanumeric() || "_)]}'\"".contains(c);
        is_value = token.ends_with(ends) && (is_attribute || !OPERATORS.contains(&token));
        before = token;
    }
    out
}
