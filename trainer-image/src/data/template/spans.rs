//! Where in the text of a conversation each learned turn is, and whether all that the turns say has reached the text.
//!
//! Many templates write a turn otherwise once others follow it: they leave out its reasoning, or move the system turn.
//! A turn is found by what changes with it: the conversation is written again with other words in that turn.

use std::{collections::BTreeSet, ops::Range};

use serde_json::Value;

use super::{
    ChatTemplate, Rendered, SENTINELS,
    words::{stands_in, words},
};
use crate::data::{
    conversation::{Conversation, Message},
    formats::is_given,
    notes::Notes,
};

/// Stands for the words of a turn that is looked for.
const PROBE: &str = "\u{fdd2}";
/// Fields of a turn that need no place of their own in the text.
const KNOWN_FIELDS: [&str; 8] =
    ["role", "content", "tool_calls", "tool_call_id", "name", "reasoning_content", "thinking", "reasoning"];

const ADVICE: &str = "the template leaves it out, as docs/templates.md explains: use rows of prompt and completion, of which the last \
                      turn is written as the model will say it, or give a template for training in dataset.chatTemplate";

/// Why a conversation can't be trained on as it is.
enum Problem {
    /// Words of a turn are not in the text.
    Lost { path: String, is_learned: bool },
    /// Anything else.
    Other(String),
}

impl From<String> for Problem {
    fn from(problem: String) -> Self {
        Self::Other(problem)
    }
}

impl Problem {
    fn explain(self) -> String {
        match self {
            Self::Lost { path, is_learned: true } => format!("{path} would not be learned: {ADVICE}"),
            Self::Lost { path, is_learned: false } => format!("{path} would not be seen by the model: {ADVICE}"),
            Self::Other(problem) => problem,
        }
    }
}

impl ChatTemplate {
    /// The conversation as it is trained on, and where the turns are that are learned.
    ///
    /// # Errors
    /// The template refuses the conversation, or leaves out what a turn says; the message names the turn.
    pub fn conversation(&self, conversation: &Conversation, notes: &mut Notes) -> Result<Rendered, String> {
        let scene = Scene::new(self, conversation)?;
        let rendered = match scene.written_at_once() {
            // Of a template that writes the prompt otherwise once it is answered.
            Err(problem @ Problem::Lost { is_learned: false, .. }) => scene.answered_prompt(problem, notes),
            rendered => rendered,
        };
        let (rendered, lost_reasoning) = rendered.map_err(Problem::explain)?;
        scene.note(&rendered.text, lost_reasoning, notes);
        Ok(rendered)
    }

    /// The whole conversation, to be learned but for the turns that the row excludes: their places.
    ///
    /// # Errors
    /// The template refuses the conversation, or leaves out what a turn says; the message names the turn.
    pub fn whole_conversation(
        &self,
        conversation: &Conversation,
        notes: &mut Notes,
    ) -> Result<(String, Vec<Range<usize>>), String> {
        let scene = Scene::new(self, conversation)?;
        let (text, lost_reasoning) = match scene.learned_whole() {
            Err(problem @ Problem::Lost { is_learned: false, .. }) => {
                scene.answered_prompt(problem, notes).map(|(rendered, lost)| (rendered.text, lost))
            }
            whole => whole,
        }
        .map_err(Problem::explain)?;
        scene.note(&text, lost_reasoning, notes);
        let excluded = (0..conversation.turns.len()).filter(|&i| conversation.turns[i].is_excluded());
        let excluded = excluded.map(|i| scene.region(&text, conversation.turns.len(), i)).collect::<Result<_, _>>()?;
        Ok((text, excluded))
    }
}

/// A conversation in the hands of a template.
struct Scene<'a> {
    template: &'a ChatTemplate,
    conversation: &'a Conversation,
}

impl<'a> Scene<'a> {
    fn new(template: &'a ChatTemplate, conversation: &'a Conversation) -> Result<Self, String> {
        let is_mark = |c: char| SENTINELS.contains(&c) || PROBE.contains(c);
        match conversation.turns.iter().find(|turn| Value::Object(turn.fields().clone()).to_string().contains(is_mark))
        {
            Some(turn) => {
                Err(format!("{} holds U+FDD0, U+FDD1 or U+FDD2, which are no characters: remove them", turn.path()))
            }
            None => Ok(Self { template, conversation }),
        }
    }

    fn turns(&self) -> &'a [Message] {
        &self.conversation.turns
    }

    /// The first `count` turns, without marks.
    fn text(&self, count: usize, ask: bool) -> Result<String, String> {
        let text = self.template.render(self.conversation, &self.turns()[..count], ask)?;
        Ok(text.replace(SENTINELS, ""))
    }

    fn is_learned(&self, i: usize) -> bool {
        i >= self.conversation.given && self.turns()[i].is_trained()
    }

    fn learned(&self) -> Vec<usize> {
        (0..self.turns().len()).filter(|&i| self.is_learned(i)).collect()
    }

    /// The whole conversation in one piece, and whether reasoning was lost from turns that are not learned.
    fn written_at_once(&self) -> Result<(Rendered, bool), Problem> {
        let marked = self.template.render(self.conversation, self.turns(), false)?;
        let is_marked = marked.contains(SENTINELS);
        let (text, marks) = marked_spans(&marked)?;
        let learned = self.learned();
        let is_learned = |turn: &Message| learned.iter().any(|&i| std::ptr::eq(turn, &self.turns()[i]));
        if is_marked || !self.template.marking.is_empty() {
            let spans = self.without_unlearned(&text, marks)?;
            let lost = self.check(&text, &is_learned, |_| spans.clone())?;
            return Ok((Rendered { text, spans }, lost));
        }
        let mut spans: Vec<Range<usize>> = Vec::new();
        for &i in &learned {
            let after = spans.last().map_or(0, |span| span.end);
            spans.push(self.span(&text, i, after)?);
        }
        let span_of = |turn: usize| learned.iter().position(|&i| i == turn).map(|at| spans[at].clone());
        let lost = self.check(&text, &is_learned, |turn| span_of(turn).into_iter().collect())?;
        Ok((Rendered { text, spans }, lost))
    }

    /// The whole conversation, of which every turn is learned that the row does not exclude.
    fn learned_whole(&self) -> Result<(String, bool), Problem> {
        let text = self.text(self.turns().len(), false)?;
        let is_learned = |turn: &Message| turn.role() == "assistant" && !turn.is_excluded();
        let lost = self.check(&text, &is_learned, |_| vec_of(0..text.len()))?;
        Ok((text, lost))
    }

    /// The marks that are not those of turns which are not learned.
    fn without_unlearned(&self, text: &str, mut marks: Vec<Range<usize>>) -> Result<Vec<Range<usize>>, String> {
        let unlearned =
            (0..self.turns().len()).filter(|&i| self.turns()[i].role() == "assistant" && !self.is_learned(i));
        for i in unlearned {
            let region = self.region(text, self.turns().len(), i)?;
            marks.retain(|mark| mark.end <= region.start || region.end <= mark.start);
        }
        Ok(marks)
    }

    /// The prompt as the model will be asked, and then the last turn as it stands in the whole conversation: for a
    /// template that writes a prompt otherwise once it is answered.
    fn answered_prompt(&self, problem: Problem, notes: &mut Notes) -> Result<(Rendered, bool), Problem> {
        let last = self.turns().len() - 1;
        let is_excluded = self.turns().iter().any(Message::is_excluded);
        if self.learned() != [last] || last == 0 || is_excluded || !self.template.marking.is_empty() {
            return Err(problem);
        }
        let (prompt, whole) = (self.text(last, true)?, self.text(last + 1, false)?);
        let region = self.region(&whole, last + 1, last)?;
        let Some((_, start)) = end_of_longest_match(&prompt, &whole, 0..region.start) else { return Err(problem) };
        let text = prompt.clone() + &whole[start..];
        let spans = vec_of(prompt.len()..text.len());
        let is_learned = |turn: &Message| std::ptr::eq(turn, &self.turns()[last]);
        match self.check(&text, &is_learned, |_| spans.clone()) {
            Ok(lost) => {
                notes.add(
                    "the chat template writes the prompt otherwise once it is answered: rows are the prompt as the \
                           model will be asked, then the answer",
                );
                Ok((Rendered { text, spans }, lost))
            }
            Err(_) => Err(problem),
        }
    }

    /// The place of a learned turn in the whole text: from the end of what the model is asked with to the end of the
    /// turn, after the byte `after`.
    fn span(&self, text: &str, i: usize, after: usize) -> Result<Range<usize>, Problem> {
        // A conversation of no turn is none, and a template may refuse one that breaks off before any question.
        let asked = if i == 0 { String::new() } else { self.text(i, true).unwrap_or_default() };
        let answered = match self.text(i + 1, false) {
            Err(_) if !self.turns()[i].fields().contains_key("tool_calls") => String::new(),
            answered => answered?,
        };
        if !asked.is_empty() && answered.starts_with(&asked) && text.starts_with(&answered) {
            return Ok(asked.len()..answered.len());
        }
        let region = self.region(text, self.turns().len(), i)?;
        let own_region = if answered.is_empty() { 0..0 } else { self.region(&answered, i + 1, i)? };
        if region.is_empty() || region.start < after {
            let first = words(&self.turns()[i]).into_iter().next();
            let path = first.map_or(self.turns()[i].path().to_owned(), |words| words.path);
            return Err(Problem::Lost { path, is_learned: true });
        }
        let prompt = self.generation_prompt(i);
        let mut header = floor(&answered, common_prefix(&asked, &answered).min(own_region.start));
        let unasked = asked.len().saturating_sub(prompt.len());
        if header < asked.len() && unasked < header {
            header = unasked + whole_markers(&answered[floor(&answered, unasked)..header]);
        }
        let header = &answered[..floor(&answered, header)];
        let start = match text.starts_with(header) && header.len() >= after && header.len() <= region.start {
            true if !header.is_empty() => header.len(),
            _ => self.beginning(text, i, (&prompt, header), after..region.start),
        };
        let rest = &text[region.end..];
        let end = region.end + end_of_turn(rest, &answered[own_region.end..]);
        Ok(start..end)
    }

    /// Where the model begins to write turn `i`, whose words stand behind this part of the text: after as much as there is
    /// of the prompt's beginning or of the header's end, and after the words of the turn before.
    fn beginning(&self, text: &str, i: usize, (prompt, header): (&str, &str), part: Range<usize>) -> usize {
        let before = i.checked_sub(1).and_then(|i| self.region(text, self.turns().len(), i).ok());
        let before = before.filter(|before| before.end <= part.end).map_or(0, |before| before.end);
        let part = part.start.max(before)..part.end;
        let begun = end_of_longest_beginning(prompt, text, part.clone());
        match (begun, end_of_longest_match(header, text, part.clone())) {
            (Some((length, at)), other) if other.is_none_or(|(other, _)| other <= length) => at,
            (_, Some((_, at))) => at,
            _ => part.end,
        }
    }

    /// What the template writes to make the model say turn `i`; empty if nothing.
    fn generation_prompt(&self, i: usize) -> String {
        let of = |count: usize| -> Result<String, String> {
            let (asked, told) = (self.text(count, true)?, self.text(count, false)?);
            Ok(asked[floor(&asked, common_prefix(&asked, &told))..].to_owned())
        };
        let own = if i == 0 { Err(String::new()) } else { of(i) };
        own.or_else(|_| of(self.turns().len())).unwrap_or_default()
    }

    /// The part of `text`, which is that of the first `count` turns, that changes with the words of turn `i`; empty if
    /// none does.
    fn region(&self, text: &str, count: usize, i: usize) -> Result<Range<usize>, String> {
        let mut turns = self.turns()[..count].to_vec();
        turns[i] = turns[i].with_fields(probe(turns[i].fields()));
        let other = self.template.render(self.conversation, &turns, false)?.replace(SENTINELS, "");
        if other == text {
            return Ok(0..0);
        }
        let start = floor(text, common_prefix(text, &other));
        let shorter = text.len().min(other.len()) - start;
        let equal = text.bytes().rev().zip(other.bytes().rev()).take(shorter).take_while(|(a, b)| a == b).count();
        let mut end = text.len() - equal;
        while !text.is_char_boundary(end) {
            end += 1;
        }
        Ok(start..end)
    }

    /// Looks for all that the turns say: in the text, in order; for what is learned, in `parts` of its turn alone. Tells
    /// whether a turn that is not learned has lost its reasoning.
    fn check(
        &self,
        text: &str,
        is_learned: &dyn Fn(&Message) -> bool,
        parts: impl Fn(usize) -> Vec<Range<usize>>,
    ) -> Result<bool, Problem> {
        let (mut from, mut lost_reasoning) = (0, false);
        for (i, turn) in self.turns().iter().enumerate() {
            let is_learned = is_learned(turn);
            let parts = if is_learned { parts(i) } else { vec_of(0..text.len()) };
            // Templates put what the system says where they like.
            let start = if turn.role() == "system" { 0 } else { from };
            let mut used: Vec<Range<usize>> = Vec::new();
            for words in words(turn) {
                let behind = used.last().map_or(start, |last| last.end);
                // Some templates write a call's arguments before its name.
                let found = [behind, start].into_iter().find_map(|start| {
                    parts
                        .iter()
                        .find_map(|part| words.find_apart(text, part.start.max(start)..part.end.max(start), &used))
                });
                match found {
                    Some(found) => {
                        from = if turn.role() == "system" { from } else { from.max(found.end) };
                        used.push(found);
                    }
                    None if words.is_reasoning && !is_learned => lost_reasoning = true,
                    None => return Err(Problem::Lost { path: words.path, is_learned }),
                }
            }
        }
        match self.lost_tool(text) {
            Some(name) => Err(Problem::Lost { path: format!("tools: {name}"), is_learned: false }),
            None => Ok(lost_reasoning),
        }
    }

    /// The name of a function whose definition is not in the text. Calls hold the name too, so that it is looked for under
    /// other names as well.
    fn lost_tool(&self, text: &str) -> Option<&'a str> {
        let tools = &self.conversation.tools;
        let names =
            tools.iter().map(|tool| tool.pointer("/function/name").or(tool.get("name")).and_then(Value::as_str));
        let names: Vec<&str> = names.map(Option::unwrap_or_default).collect();
        if names.iter().all(|name| name.is_empty()) {
            return None;
        }
        let mark = |i: usize| format!("{PROBE}{i}{PROBE}");
        let mut other = self.conversation.clone();
        for (i, tool) in other.tools.iter_mut().enumerate() {
            let path = if tool.get("function").is_some() { "/function/name" } else { "/name" };
            if let Some(name) = tool.pointer_mut(path) {
                *name = mark(i).into();
            }
        }
        let last = self.turns().len() - 1;
        let render = |(count, ask): (usize, bool)| self.template.render(&other, &self.turns()[..count], ask).ok();
        let written: Vec<String> =
            [(last + 1, false), (last, true)].into_iter().filter(|(count, _)| *count > 0).filter_map(render).collect();
        let is_written = |i: usize| written.is_empty() || written.iter().any(|text| text.contains(&mark(i)));
        let stands = |(i, name): &(usize, &str)| name.is_empty() || text.contains(name) && is_written(*i);
        names.into_iter().enumerate().find(|tool| !stands(tool)).map(|(_, name)| name)
    }

    /// Whether what a field says changes nothing. A template may mention its name for another purpose.
    fn is_without_effect(&self, name: &str) -> bool {
        let says_something =
            |turn: &Message| turn.fields().get(name).is_some_and(|value| *value != false && is_given(value));
        let without = |turn: &Message| {
            let fields = turn.fields().iter().filter(|(other, _)| *other != name || turn.role() == "tool");
            turn.with_fields(fields.map(|(name, value)| (name.clone(), value.clone())).collect())
        };
        let others: Vec<Message> = self.turns().iter().map(without).collect();
        let render = |turns: &[Message]| self.template.render(self.conversation, turns, false).ok();
        self.turns().iter().any(says_something)
            && render(self.turns()).is_some_and(|text| render(&others) == Some(text))
    }

    /// Counts what of the conversation the template does not use.
    fn note(&self, text: &str, lost_reasoning: bool, notes: &mut Notes) {
        let mut unused: BTreeSet<String> = BTreeSet::new();
        let names: BTreeSet<&String> = self.turns().iter().flat_map(extra_fields).collect();
        for name in names.into_iter().filter(|name| !self.template.mentions(name) || self.is_without_effect(name)) {
            unused.insert(format!("a turn's field \"{name}\" is not used by the chat template"));
        }
        for (of, said) in self.conversation.tools.iter().flat_map(details) {
            if !stands_in(said, text) {
                unused.insert(format!("the chat template leaves the {of} of functions out"));
            }
        }
        for name in self.conversation.variables.keys().filter(|name| !self.template.mentions(name)) {
            unused.insert(format!("chat_template_kwargs.{name} is not used by the chat template"));
        }
        if lost_reasoning {
            unused.insert(
                "the chat template leaves the reasoning of earlier turns out, as it does when the model is asked"
                    .into(),
            );
        }
        unused.into_iter().for_each(|sentence| notes.add(sentence));
    }
}

/// Fields of a turn that the template need not know. The name of a tool is that of its call.
fn extra_fields(turn: &Message) -> impl Iterator<Item = &String> {
    let is_extra = |name: &str| !KNOWN_FIELDS.contains(&name) || (name == "name" && turn.role() != "tool");
    turn.fields().iter().filter(move |(name, value)| is_extra(name) && !value.is_null()).map(|(name, _)| name)
}

/// What the definition of a function says besides its name, and what that is called.
fn details(tool: &Value) -> impl Iterator<Item = (&'static str, &str)> {
    let function = tool.get("function").unwrap_or(tool);
    let description = function.get("description").and_then(Value::as_str);
    let properties = function.pointer("/parameters/properties").and_then(Value::as_object);
    let parameters = properties.into_iter().flatten().map(|(name, _)| ("parameters", name.as_str()));
    description.map(|text| ("descriptions", text)).into_iter().chain(parameters)
}

/// A turn's fields with other words: each text that is not blank is replaced.
fn probe(fields: &serde_json::Map<String, Value>) -> serde_json::Map<String, Value> {
    let replaced = |name: &String, value: &Value| match (name.as_str(), value) {
        ("content" | "reasoning_content" | "thinking" | "reasoning", Value::String(text))
            if !text.trim().is_empty() =>
        {
            PROBE.into()
        }
        ("tool_calls", Value::Array(calls)) => calls.iter().map(probe_call).collect(),
        _ => value.clone(),
    };
    fields.iter().map(|(name, value)| (name.clone(), replaced(name, value))).collect()
}

fn probe_call(call: &Value) -> Value {
    let mut call = call.clone();
    let function = match call.get_mut("function") {
        Some(function) => function,
        None => &mut call,
    };
    if let Some(name) = function.get_mut("name") {
        *name = PROBE.into();
    }
    match function.get_mut("arguments") {
        Some(arguments @ Value::Object(_)) => *arguments = serde_json::json!({PROBE: PROBE}),
        Some(arguments @ Value::String(_)) => *arguments = PROBE.into(),
        _ => {}
    }
    call
}

/// The text without marks, and the places between them.
fn marked_spans(marked: &str) -> Result<(String, Vec<Range<usize>>), String> {
    let mut text = String::with_capacity(marked.len());
    let (mut spans, mut start) = (Vec::new(), None);
    for character in marked.chars() {
        match (character, start) {
            (c, None) if c == SENTINELS[0] => start = Some(text.len()),
            (c, Some(from)) if c == SENTINELS[1] => {
                spans.push(from..text.len());
                start = None;
            }
            (c, _) if SENTINELS.contains(&c) => {
                return Err("the chat template has a {% generation %} inside another, or one without its end".into());
            }
            (c, _) => text.push(c),
        }
    }
    Ok((text, spans))
}

/// How many bytes behind a turn's words belong to it: what follows them here and elsewhere, less the beginning of a marker
/// that only begins alike (`<|` of `<|user|>` and `<|endoftext|>`).
fn end_of_turn(here: &str, elsewhere: &str) -> usize {
    let shared = &here[..floor(here, common_prefix(here, elsewhere))];
    if shared.len() == elsewhere.len() { shared.len() } else { whole_markers(shared) }
}

/// The length of a text without the marker that only begins at its end.
fn whole_markers(text: &str) -> usize {
    let cut = [('<', '>'), ('[', ']')].map(|(open, close)| match (text.rfind(open), text.rfind(close)) {
        (Some(open), close) if close.is_none_or(|close| close < open) => open,
        _ => text.len(),
    });
    cut[0].min(cut[1])
}

/// One part of a text.
fn vec_of(part: Range<usize>) -> Vec<Range<usize>> {
    std::iter::once(part).collect()
}

/// How many first bytes two texts share.
fn common_prefix(a: &str, b: &str) -> usize {
    a.bytes().zip(b.bytes()).take_while(|(a, b)| a == b).count()
}

/// The last boundary between characters up to a byte.
fn floor(text: &str, mut at: usize) -> usize {
    while !text.is_char_boundary(at) {
        at -= 1;
    }
    at
}

/// The place in this part of a text, its end included, that most of the beginning of `pattern` stands before, and how much
/// of it does; the last one if there are several. None if nothing of it does.
fn end_of_longest_beginning(pattern: &str, text: &str, part: Range<usize>) -> Option<(usize, usize)> {
    let matching = |at: usize| match common_prefix(pattern, &text[at..part.end]) {
        length if length == pattern.len() => length,
        length => whole_markers(&pattern[..floor(pattern, length)]),
    };
    let starts = part.clone().filter(|&at| text.is_char_boundary(at));
    let found = starts.map(|at| (matching(at), at)).filter(|(length, _)| *length > 0).max();
    found.map(|(length, at)| (length, at + length))
}

/// The place in this part of a text, its end included, that most of the end of `pattern` stands before, and how much of it
/// does; the last one if there are several. None if nothing of it does.
fn end_of_longest_match(pattern: &str, text: &str, part: Range<usize>) -> Option<(usize, usize)> {
    let matching = |at: usize| pattern.bytes().rev().zip(text[..at].bytes().rev()).take_while(|(a, b)| a == b).count();
    let ends = (part.start..=part.end).filter(|&at| text.is_char_boundary(at));
    ends.map(|at| (matching(at), at)).filter(|(length, _)| *length > 0).max()
}
