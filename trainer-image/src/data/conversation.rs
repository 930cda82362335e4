//! Turns of a conversation, as a chat template sees them.

use serde_json::{Map, Value};

/// A conversation, and how much of it is to be learned.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Conversation {
    /// Its turns, in order.
    pub turns: Vec<Message>,
    /// The first so many turns are given: nothing of them is learned.
    pub given: usize,
    /// Definitions of the functions that the assistant may call, as the template's `tools`; empty if there are none.
    pub tools: Vec<Value>,
    /// Other variables of the template that the row brings (TRL's `chat_template_kwargs`).
    pub variables: Map<String, Value>,
}

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq)]
pub struct Message {
    /// Its fields: a chat template may use any of them. A null content is what transformers leaves out.
    fields: Map<String, Value>,
    /// What an error calls it: `messages[3]`.
    path: String,
    /// Whether it is to be learned; None leaves that to its role.
    trained: Option<bool>,
}

impl Message {
    /// A turn with nothing but a role and a content.
    pub fn new(role: &str, content: &str) -> Self {
        let fields = [("role", role), ("content", content)];
        let fields = fields.into_iter().map(|(name, value)| (name.to_owned(), Value::from(value))).collect();
        Self::from_fields("messages[]", fields, None)
    }

    /// A turn with these fields. `path` is what an error calls it, and `trained` says whether it is to be learned, where
    /// the row says so.
    pub fn from_fields(path: &str, fields: Map<String, Value>, trained: Option<bool>) -> Self {
        Self { fields, path: path.to_owned(), trained }
    }

    /// Who speaks.
    pub fn role(&self) -> &str {
        self.fields.get("role").and_then(Value::as_str).unwrap_or_default()
    }

    /// What is said, where that is a text.
    pub fn content(&self) -> &str {
        self.fields.get("content").and_then(Value::as_str).unwrap_or_default()
    }

    /// All fields.
    pub fn fields(&self) -> &Map<String, Value> {
        &self.fields
    }

    /// What an error calls it.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The same turn with other fields.
    pub(super) fn with_fields(&self, fields: Map<String, Value>) -> Self {
        Self { fields, ..self.clone() }
    }

    /// Whether the row says that it is not to be learned.
    pub fn is_excluded(&self) -> bool {
        self.trained == Some(false)
    }

    /// Whether it is to be learned: the assistant's turns are, unless the row says otherwise.
    pub fn is_trained(&self) -> bool {
        self.role() == "assistant" && self.trained.unwrap_or(true)
    }
}
