//! Chat templates: Jinja as transformers renders it, and which bytes of the result each turn of the assistant is.

mod environment;
mod methods;
mod python;
mod spans;
mod syntax;
#[cfg(test)]
mod tests;
mod values;
mod words;

use std::{collections::BTreeSet, io, ops::Range, path::Path};

use chrono::NaiveDate;
use minijinja::{Environment, Value as JinjaValue};
use serde_json::{Map, Value, json};

use self::{
    environment::{Calendar, environment, explain},
    python::Dumps,
    syntax::{SENTINELS, prepare},
    words::REASONING,
};
use super::conversation::{Conversation, Message};

use crate::layout::TOOL_TEMPLATE;

/// A conversation as the model reads it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rendered {
    /// The text.
    pub text: String,
    /// Bytes of each turn that is learned, in order: all that the model is to write after the prompt, with what ends
    /// the turn.
    pub spans: Vec<Range<usize>>,
}

/// The day that a template writes where it writes one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TemplateDate {
    /// The job names it.
    Pinned(NaiveDate),
    /// That of the run.
    OfRun(NaiveDate),
}

impl TemplateDate {
    /// The day on which this process runs.
    pub fn today() -> Self {
        Self::OfRun(chrono::Local::now().date_naive())
    }

    /// The day itself.
    pub fn date(self) -> NaiveDate {
        match self {
            Self::Pinned(date) | Self::OfRun(date) => date,
        }
    }
}

/// A model's chat template.
pub struct ChatTemplate {
    environment: Environment<'static>,
    /// Names of templates that mark themselves what the assistant says.
    marking: BTreeSet<&'static str>,
    /// What every rendering knows besides the conversation.
    variables: Map<String, Value>,
    /// All names that the templates mention.
    names: BTreeSet<String>,
    source: String,
    calendar: Calendar,
}

/// Name of the template that is used unless another is for a purpose.
const DEFAULT: &str = "default";
/// Name of the template for conversations with tools, where the model has one of its own for them.
const TOOL_USE: &str = "tool_use";
/// Variables that a row can't set.
const RESERVED: [&str; 4] = ["messages", "tools", "documents", "add_generation_prompt"];

impl ChatTemplate {
    /// Reads the template of a model folder: `chat_template.jinja`, or else the one in `tokenizer_config.json`. None
    /// if the model has none. `variables` are its special tokens.
    ///
    /// # Errors
    /// The file can't be read, or the template is no Jinja.
    pub fn load(
        folder: &Path,
        tokenizer_config: &Value,
        variables: Map<String, Value>,
        date: TemplateDate,
    ) -> Result<Option<Self>, String> {
        let configured = &tokenizer_config["chat_template"];
        let (source, tool_use) = match (file(folder, "chat_template.jinja")?, configured) {
            (Some(source), _) => (source, file(folder, TOOL_TEMPLATE)?),
            (None, Value::Null) => return Ok(None),
            (None, Value::String(source)) => (source.clone(), None),
            (None, named) => {
                let template = |name| template_of_name(named, name);
                let source = template(DEFAULT).ok_or(
                    "chat_template in tokenizer_config.json is neither a text nor a list with a template named \
                     \"default\"; name one in dataset.chatTemplate",
                )?;
                (source, template(TOOL_USE))
            }
        };
        Self::compile(&source, tool_use.as_deref(), variables, date).map(Some)
    }

    /// Compiles a template.
    ///
    /// # Errors
    /// It is no Jinja.
    pub fn new(source: &str, variables: Map<String, Value>, date: TemplateDate) -> Result<Self, String> {
        Self::compile(source, None, variables, date)
    }

    fn compile(
        source: &str,
        tool_use: Option<&str>,
        mut variables: Map<String, Value>,
        date: TemplateDate,
    ) -> Result<Self, String> {
        let calendar = Calendar::new(date.date());
        if let TemplateDate::Pinned(date) = date {
            // Llama 3's templates take the date under this name, and in this form.
            variables.insert("date_string".into(), date.format("%d %b %Y").to_string().into());
        }
        let mut template = Self {
            environment: environment(&calendar),
            marking: BTreeSet::new(),
            variables,
            names: BTreeSet::new(),
            source: source.to_owned(),
            calendar,
        };
        template.add(DEFAULT, source)?;
        tool_use.map(|source| template.add(TOOL_USE, source)).transpose()?;
        Ok(template)
    }

    fn add(&mut self, name: &'static str, source: &str) -> Result<(), String> {
        let prepared = prepare(source);
        if prepared.contains(SENTINELS[0]) {
            self.marking.insert(name);
        }
        let is_name = |c: char| c.is_alphanumeric() || c == '_';
        self.names.extend(prepared.split(|c| !is_name(c)).filter(|name| !name.is_empty()).map(str::to_owned));
        let added = self.environment.add_template_owned(name, prepared);
        added.map_err(|error| format!("the chat template can't be read: {}", explain(&error)))
    }

    /// The template's own text.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The day that it has written, if it has.
    pub fn written_date(&self) -> Option<NaiveDate> {
        self.calendar.is_used().then_some(self.calendar.date)
    }

    /// Whether a name stands in the template, so that it may make use of a field or a variable of that name.
    pub fn mentions(&self, name: &str) -> bool {
        self.names.contains(name)
    }

    /// The conversation, up to where the assistant is to speak.
    ///
    /// # Errors
    /// The template refuses it.
    pub fn prompt(&self, turns: &[Message]) -> Result<String, String> {
        let conversation = Conversation { turns: turns.to_vec(), ..Conversation::default() };
        self.render(&conversation, turns, true).map(|text| text.replace(SENTINELS, ""))
    }

    /// The first turns of a conversation, with marks where the template sets some.
    fn render(&self, conversation: &Conversation, turns: &[Message], ask: bool) -> Result<String, String> {
        let Conversation { tools, variables, .. } = conversation;
        if let Some(name) = RESERVED.into_iter().find(|name| variables.contains_key(*name)) {
            return Err(format!("chat_template_kwargs.{name} is what the row itself says; remove it"));
        }
        let name = match self.environment.get_template(TOOL_USE) {
            Ok(_) if !tools.is_empty() => TOOL_USE,
            _ => DEFAULT,
        };
        let render = |turns: Vec<Map<String, Value>>| {
            let mut all = self.variables.clone();
            all.extend(variables.clone());
            let own = [
                ("messages", json!(turns)),
                ("tools", if tools.is_empty() { Value::Null } else { json!(tools) }),
                ("documents", Value::Null),
                ("add_generation_prompt", ask.into()),
            ];
            all.extend(own.map(|(name, value)| (name.to_owned(), value)));
            self.environment.get_template(name)?.render(JinjaValue::from_serialize(all))
        };
        let turns: Vec<_> = turns.iter().map(fields).collect();
        let rendered = render(turns.clone()).or_else(|error| {
            // Some templates join a call's arguments as a text.
            with_arguments_as_text(turns).map_or(Err(error), render)
        });
        rendered.map_err(|error| format!("the chat template refuses it: {}", explain(&error)))
    }
}

/// The text of a file; none if it is not there.
fn file(folder: &Path, name: &str) -> Result<Option<String>, String> {
    match std::fs::read(folder.join(name)) {
        Ok(bytes) => String::from_utf8(bytes).map(Some).map_err(|error| {
            let at = error.utf8_error().valid_up_to() + 1;
            format!("{name} is not UTF-8 at byte {at}; save the file as UTF-8")
        }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(format!("{name} can't be read: {error}")),
    }
}

/// One of several templates: in a list of objects with `name` and `template`, or an object.
fn template_of_name(named: &Value, name: &str) -> Option<String> {
    let listed = || Some(&named.as_array()?.iter().find(|template| template["name"] == name)?["template"]);
    named.get(name).or_else(listed)?.as_str().map(str::to_owned)
}

/// A turn's fields as transformers gives them to a template: none is null, and reasoning has all of its names.
fn fields(turn: &Message) -> Map<String, Value> {
    let is_nothing = |name: &str, value: &Value| value.is_null() || (name == "tool_calls" && *value == json!([]));
    let own = turn.fields().iter().filter(|(name, value)| !is_nothing(name, value));
    let mut fields: Map<String, Value> = own.map(|(name, value)| (name.clone(), value.clone())).collect();
    if let Some(reasoning) = REASONING.iter().find_map(|name| fields.get(*name)).cloned() {
        fields.entry("thinking").or_insert(reasoning.clone());
        fields.insert(REASONING[0].into(), reasoning);
    }
    fields
}

/// The same turns with the arguments of calls as JSON text; None if no call has an object.
fn with_arguments_as_text(mut turns: Vec<Map<String, Value>>) -> Option<Vec<Map<String, Value>>> {
    let mut changed = false;
    let calls = turns.iter_mut().filter_map(|turn| turn.get_mut("tool_calls")?.as_array_mut()).flatten();
    for arguments in calls.filter_map(|call| call.get_mut("function")?.get_mut("arguments")) {
        if arguments.is_object() {
            *arguments = Dumps::default().json(&JinjaValue::from_serialize(&*arguments)).into();
            changed = true;
        }
    }
    changed.then_some(turns)
}
