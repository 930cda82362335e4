//! Chat templates: Jinja as transformers renders it, and which bytes of the result the assistant said.

use std::{ops::Range, path::Path};

use minijinja::{Environment, Error as JinjaError, ErrorKind, Value as JinjaValue, context, value::Kwargs};
use serde::Serialize;
use serde_json::{Value, json};

use super::conversation::Message;

/// Stand for `{% generation %}` and `{% endgeneration %}` in rendered text: code points that Unicode reserves for
/// uses like this one, so that no text holds them.
const SENTINELS: [char; 2] = ['\u{fdd0}', '\u{fdd1}'];

/// A conversation as the model reads it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rendered {
    /// The text.
    pub text: String,
    /// Bytes that the assistant said.
    pub assistant: Vec<Range<usize>>,
}

/// A model's chat template.
pub struct ChatTemplate {
    environment: Environment<'static>,
    special_tokens: Value,
    /// Whether the template itself marks what the assistant says.
    marks_generation: bool,
}

/// Name of the one template in its environment.
const NAME: &str = "chat_template";

impl ChatTemplate {
    /// Reads the template of a model folder: `chat_template.jinja`, or else what `tokenizer_config.json` holds. None
    /// if the model has none.
    ///
    /// # Errors
    /// The template is no Jinja.
    pub fn load(folder: &Path, tokenizer_config: &Value) -> Result<Option<Self>, String> {
        let file = std::fs::read_to_string(folder.join("chat_template.jinja")).ok();
        let named = |templates: &Value| {
            let default = templates.as_array()?.iter().find(|template| template["name"] == "default")?;
            Some(default["template"].as_str()?.to_owned())
        };
        let configured = &tokenizer_config["chat_template"];
        let source = file.or_else(|| configured.as_str().map(str::to_owned)).or_else(|| named(configured));
        source.map(|source| Self::new(&source, tokenizer_config)).transpose()
    }

    /// Compiles a template.
    ///
    /// # Errors
    /// It is no Jinja.
    pub fn new(source: &str, tokenizer_config: &Value) -> Result<Self, String> {
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", |format: &str| chrono::Local::now().format(format).to_string());
        environment.add_filter("tojson", to_json);
        let marked = mark_generation(source);
        let marks_generation = marked != source;
        environment
            .add_template_owned(NAME, marked)
            .map_err(|error| format!("the chat template can't be read: {}", explain(&error)))?;
        let names = ["bos_token", "eos_token", "pad_token", "unk_token"];
        let special_tokens = names.into_iter().map(|name| (name, special_token(tokenizer_config, name))).collect();
        Ok(Self { environment, special_tokens, marks_generation })
    }

    /// The conversation, up to where the assistant is to speak.
    ///
    /// # Errors
    /// The template refuses it.
    pub fn prompt(&self, messages: &[Message]) -> Result<String, String> {
        self.render(messages, true).map(|text| text.replace(SENTINELS, ""))
    }

    /// The whole conversation.
    ///
    /// # Errors
    /// The template refuses it.
    pub fn text(&self, messages: &[Message]) -> Result<String, String> {
        self.render(messages, false).map(|text| text.replace(SENTINELS, ""))
    }

    /// The conversation, and where the assistant speaks in it after the first `given` turns.
    ///
    /// # Errors
    /// The template refuses it, or it can't be told where the assistant speaks.
    pub fn conversation(&self, messages: &[Message], given: usize) -> Result<Rendered, String> {
        if !self.marks_generation {
            return self.spans_by_prefixes(messages, given);
        }
        let mut rendered = marked_spans(&self.render(messages, false)?)?;
        let start = self.end_of_prompt(&rendered.text, &messages[..given])?;
        rendered.assistant.retain(|span| span.end > start);
        Ok(rendered)
    }

    /// Where in the text what comes after these first turns begins.
    fn end_of_prompt(&self, text: &str, given: &[Message]) -> Result<usize, String> {
        if given.is_empty() {
            return Ok(0);
        }
        // The next turn's header is part of the prompt if it is the assistant's.
        for prompt in [self.prompt(given)?, self.text(given)?] {
            if text.starts_with(&prompt) {
                return Ok(prompt.len());
            }
        }
        Err("the chat template renders the prompt differently before its completion, so where the completion begins \
             can't be told; set dataset.assistantOnlyLoss to false, or use rows of messages"
            .into())
    }

    /// An assistant turn is what the conversation up to it has more than the conversation before it, with the
    /// assistant's header.
    fn spans_by_prefixes(&self, messages: &[Message], given: usize) -> Result<Rendered, String> {
        let text = self.render(messages, false)?;
        let mut assistant = Vec::new();
        for i in (given..messages.len()).filter(|&i| messages[i].role() == "assistant") {
            let before = self.render(&messages[..i], true)?;
            let after = self.render(&messages[..=i], false)?;
            if !(after.starts_with(&before) && text.starts_with(&after)) {
                return Err(format!(
                    "the chat template renders messages[{i}] differently inside the conversation, so what the \
                     assistant says can't be told apart; set dataset.assistantOnlyLoss to false, or use a template \
                     with {{% generation %}}"
                ));
            }
            assistant.push(before.len()..after.len());
        }
        Ok(Rendered { text, assistant })
    }

    fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String, String> {
        let messages: Vec<_> = messages.iter().map(Message::fields).collect();
        let variables = context! {
            messages, add_generation_prompt, tools => (), documents => (),
            ..JinjaValue::from_serialize(&self.special_tokens)
        };
        let template = self.environment.get_template(NAME);
        let rendered = template.and_then(|template| template.render(variables));
        rendered.map_err(|error| format!("the chat template refuses it: {}", explain(&error)))
    }
}

/// A special token's text in `tokenizer_config.json`: a string, or an object that holds it; null if there is none.
pub fn special_token(tokenizer_config: &Value, name: &str) -> Value {
    match &tokenizer_config[name] {
        Value::Object(token) => token.get("content").cloned().unwrap_or_default(),
        token => token.clone(),
    }
}

/// Rewrites `{% generation %}` blocks, which only transformers knows, to blocks that put sentinels around their
/// content. The tags keep their dashes and stay block tags, so white space is trimmed as before.
fn mark_generation(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let Some(end) = rest[start..].find("%}").map(|end| start + end + 2) else { break };
        let inner = &rest[start + 2..end - 2];
        let (open, close) =
            (if inner.starts_with('-') { "-" } else { "" }, if inner.ends_with('-') { "-" } else { "" });
        out.push_str(&rest[..start]);
        match inner.trim_matches('-').trim() {
            "generation" => out.push_str(&format!("{{%{open} if true %}}{}{{% endif {close}%}}", SENTINELS[0])),
            "endgeneration" => out.push_str(&format!("{{%{open} if true %}}{}{{% endif {close}%}}", SENTINELS[1])),
            _ => out.push_str(&rest[start..end]),
        }
        rest = &rest[end..];
    }
    out.push_str(rest);
    out
}

fn marked_spans(marked: &str) -> Result<Rendered, String> {
    let mut text = String::with_capacity(marked.len());
    let mut assistant = Vec::new();
    let mut start = None;
    for character in marked.chars() {
        match (character, start) {
            (c, None) if c == SENTINELS[0] => start = Some(text.len()),
            (c, Some(from)) if c == SENTINELS[1] => {
                assistant.push(from..text.len());
                start = None;
            }
            (c, _) if SENTINELS.contains(&c) => {
                return Err("a message holds U+FDD0 or U+FDD1, which are no characters: remove them".into());
            }
            (c, _) => text.push(c),
        }
    }
    Ok(Rendered { text, assistant })
}

fn raise_exception(message: String) -> Result<JinjaValue, JinjaError> {
    Err(JinjaError::new(ErrorKind::InvalidOperation, message))
}

/// What the user reads of a template's failure: the template's own words where it raised.
fn explain(error: &JinjaError) -> String {
    match error.detail() {
        Some(detail) if error.kind() == ErrorKind::InvalidOperation => detail.to_owned(),
        _ => error.to_string(),
    }
}

/// JSON as Python writes it: `{"a": 1, "b": 2}`, without escaping for HTML; or with `indent`.
fn to_json(value: JinjaValue, options: Kwargs) -> Result<String, JinjaError> {
    let indent: Option<usize> = options.get("indent")?;
    options.assert_all_used()?;
    let json = json!(value);
    let mut out = Vec::new();
    let written = match indent {
        Some(width) => {
            let spaces = vec![b' '; width];
            let formatter = serde_json::ser::PrettyFormatter::with_indent(&spaces);
            json.serialize(&mut serde_json::Serializer::with_formatter(&mut out, formatter))
        }
        None => json.serialize(&mut serde_json::Serializer::with_formatter(&mut out, PythonFormatter)),
    };
    written.map_err(|error| JinjaError::new(ErrorKind::BadSerialization, error.to_string()))?;
    Ok(String::from_utf8_lossy(&out).into_owned())
}

/// A space after each comma and colon.
struct PythonFormatter;

impl serde_json::ser::Formatter for PythonFormatter {
    fn begin_array_value<W: ?Sized + std::io::Write>(&mut self, out: &mut W, first: bool) -> std::io::Result<()> {
        out.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(&mut self, out: &mut W, first: bool) -> std::io::Result<()> {
        out.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, out: &mut W) -> std::io::Result<()> {
        out.write_all(b": ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHATML: &str = "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + \
        message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}\
        {{ '<|im_start|>assistant\n' }}{% endif %}";

    fn conversation() -> Vec<Message> {
        [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")].map(|(r, c)| Message::new(r, c)).into()
    }

    fn said(rendered: &Rendered) -> Vec<&str> {
        rendered.assistant.iter().map(|span| &rendered.text[span.clone()]).collect()
    }

    #[test]
    fn what_the_assistant_says_is_found_by_rendering_prefixes() {
        let template = ChatTemplate::new(CHATML, &json!({})).unwrap();
        let rendered = template.conversation(&conversation(), 0).unwrap();
        assert_eq!(said(&rendered), ["b<|im_end|>\n", "d<|im_end|>\n"]);
        assert_eq!(
            template.prompt(&conversation()[..1]).unwrap(),
            "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
        );
    }

    #[test]
    fn generation_tags_mark_what_the_assistant_says_and_leave_no_trace() {
        let source = "{%- for m in messages %}\n{%- if m.role == 'assistant' %}\n[{% generation %}\n{{ m.content }}!\
            {%- endgeneration -%}  ]\n{%- else %}<{{ m.content }}>{% endif %}\n{%- endfor %}";
        let plain = source.replace("{% generation %}\n", "").replace("{%- endgeneration -%}  ", "");
        let template = ChatTemplate::new(source, &json!({})).unwrap();
        let rendered = template.conversation(&conversation(), 0).unwrap();
        assert_eq!(said(&rendered), ["b!", "d!"]);
        let without = ChatTemplate::new(&plain, &json!({})).unwrap().render(&conversation(), false).unwrap();
        assert_eq!(rendered.text, without);
    }

    #[test]
    fn what_is_given_is_not_said_again() {
        let marked = "{% for m in messages %}{% if m.role == 'assistant' %}A:{% generation %}{{ m.content }};\
            {% endgeneration %}{% else %}U:{{ m.content }};{% endif %}{% endfor %}{% if add_generation_prompt %}A:{% endif %}";
        for (source, expected) in [(CHATML, "d<|im_end|>\n"), (marked, "d;")] {
            let template = ChatTemplate::new(source, &json!({})).unwrap();
            for given in [2, 3] {
                let rendered = template.conversation(&conversation(), given).unwrap();
                assert_eq!(said(&rendered), [expected], "{given} turns given");
                assert_eq!(rendered.text, template.text(&conversation()).unwrap());
            }
        }
    }

    #[test]
    fn a_prompt_that_changes_when_it_is_answered_is_refused_rather_than_masked_wrongly() {
        let source = "{{ messages | length }}{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}";
        let error = ChatTemplate::new(source, &json!({})).unwrap().conversation(&conversation(), 1).unwrap_err();
        assert!(error.contains("renders the prompt differently"), "{error}");
    }

    #[test]
    fn a_template_that_rewrites_earlier_turns_is_refused_rather_than_masked_wrongly() {
        let last_only = "{% for m in messages %}{{ m.content if loop.last else '' }};{% endfor %}";
        let error = ChatTemplate::new(last_only, &json!({})).unwrap().conversation(&conversation(), 0).unwrap_err();
        assert!(error.contains("messages[1]") && error.contains("assistantOnlyLoss"), "{error}");
    }

    #[test]
    fn a_template_can_raise_and_its_words_reach_the_user() {
        let template = ChatTemplate::new("{{ raise_exception('roles must alternate') }}", &json!({})).unwrap();
        let error = template.conversation(&conversation(), 0).unwrap_err();
        assert_eq!(error, "the chat template refuses it: roles must alternate");
    }

    #[test]
    fn templates_may_use_python_methods_special_tokens_and_json() {
        let config = json!({"bos_token": {"content": "<s>"}, "eos_token": "</s>"});
        let source = "{{ bos_token }}{{ messages[0].content.strip().upper() }}{{ messages[0] | tojson }}\
            {% if tools is not none %}x{% endif %}{{ eos_token }}";
        let template = ChatTemplate::new(source, &config).unwrap();
        let text = template.render(&[Message::new("user", " a<b ")], false).unwrap();
        assert_eq!(text, r#"<s>A<B{"role": "user", "content": " a<b "}</s>"#);
    }
}
