//! A model's tokenizer and chat template, as its folder describes them and transformers reads them.

use std::{io, ops::Range, path::Path};

use chrono::NaiveDate;
use serde::{Deserialize, de::IgnoredAny};
use serde_json::{Map, Value, json};
use tokenizers::{AddedToken, Tokenizer, processors::PostProcessorWrapper};

use super::{ChatTemplate, conversation::Message, template::TemplateDate};

use crate::json_file::read_json;

/// A model's tokenizer and chat template, as its folder describes them.
pub struct Vocabulary {
    pub(super) tokenizer: Tokenizer,
    pub(super) template: Option<ChatTemplate>,
    eos: u32,
    /// The text of each token that ends a turn: the tokenizer's end token, and those at which generation stops.
    pub(super) ends: Vec<(u32, String)>,
    date: TemplateDate,
    warnings: Vec<String>,
}

/// Why text can't be turned into tokens: a message that names file and field.
#[derive(Debug, thiserror::Error)]
pub enum VocabularyError {
    /// The model folder's tokenizer can't be used.
    #[error("{0}")]
    Folder(String),
    /// The job's own chat template can't be used.
    #[error("dataset.chatTemplate: {0}")]
    Template(String),
}

/// Tokens, and the bytes of the text that each stands for.
pub(super) type Placed = (Vec<u32>, Vec<Range<usize>>);

/// Tokens with a name of their own in `tokenizer_config.json`, which chat templates know by it.
const NAMED_TOKENS: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

impl Vocabulary {
    /// Reads `tokenizer.json`, `tokenizer_config.json` and the chat template of a model folder, or takes another template
    /// in its place.
    ///
    /// # Errors
    /// A file is missing or damaged, or there is no end-of-sequence token, or the template is no Jinja.
    pub fn load(folder: &Path, template: Option<&str>) -> Result<Self, VocabularyError> {
        Self::load_on(folder, template, TemplateDate::today())
    }

    /// The same, with a template that writes another day.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn load_on(folder: &Path, template: Option<&str>, date: TemplateDate) -> Result<Self, VocabularyError> {
        use VocabularyError::{Folder, Template};
        let config = configuration(folder).map_err(Folder)?;
        let mut tokenizer = tokenizer(folder).map_err(Folder)?;
        let mut warnings = Vec::new();
        add_tokens(&mut tokenizer, &config, &mut warnings).map_err(Folder)?;
        set_ends(&mut tokenizer, &config).map_err(Folder)?;
        let own_template = template.is_some();
        let template = match template {
            Some(template) => Some(ChatTemplate::new(template, special_tokens(&config), date).map_err(Template)?),
            None => ChatTemplate::load(folder, &config, special_tokens(&config), date).map_err(Folder)?,
        };
        let Some(eos_text) = token_text(&config["eos_token"]) else {
            let message = "neither tokenizer_config.json nor special_tokens_map.json has an eos_token: a model trained without \
                           one would never stop";
            return Err(Folder(message.into()));
        };
        let eos = tokenizer.token_to_id(&eos_text).ok_or_else(|| {
            Folder(format!("eos_token {eos_text:?} of tokenizer_config.json is not in tokenizer.json"))
        })?;
        let stops = stop_tokens(folder).map_err(Folder)?.into_iter().filter(|&id| id != eos);
        let stops = stops.filter_map(|id| Some((id, tokenizer.id_to_token(id)?)));
        let ends = [(eos, eos_text)].into_iter().chain(stops).collect();
        if let Some(template) = template.as_ref().filter(|_| own_template) {
            warnings.extend(unknown_markers(template.source(), &tokenizer));
        }
        Ok(Self { tokenizer, template, eos, ends, date, warnings })
    }

    /// The token that ends a text.
    pub fn eos(&self) -> u32 {
        self.eos
    }

    /// Tokens at which the model stops: the end token first.
    pub fn stops(&self) -> Vec<u32> {
        self.ends.iter().map(|(id, _)| *id).collect()
    }

    /// Tokens in all, added ones too.
    pub fn size(&self) -> usize {
        self.tokenizer.get_vocab_size(true)
    }

    /// The day that the chat template has written, if it has, and if the job does not pin it.
    pub fn date_of_run(&self) -> Option<NaiveDate> {
        let date = self.template.as_ref().and_then(ChatTemplate::written_date);
        date.filter(|_| matches!(self.date, TemplateDate::OfRun(_)))
    }

    /// What of the folder's or the job's settings is not used as it stands, a sentence each.
    pub fn warnings(&self) -> Vec<String> {
        let date = self.date_of_run().map(|date| {
            format!(
                "the chat template writes the date, {date} in this run: set dataset.templateDate to train the same on \
                 another day"
            )
        });
        self.warnings.iter().cloned().chain(date).collect()
    }

    /// Tokens that make the model answer `user`: by the chat template, or as plain text where the model has none.
    ///
    /// # Errors
    /// The template refuses the conversation.
    pub fn prompt(&self, system: Option<&str>, user: &str) -> Result<Vec<u32>, String> {
        if self.template.is_none() {
            return self.text(user);
        }
        let system = system.map(|content| Message::new("system", content));
        let turns: Vec<Message> = system.into_iter().chain([Message::new("user", user)]).collect();
        self.conversation(&turns)
    }

    /// Tokens that make the model say the next turn.
    ///
    /// # Errors
    /// There is no template, or it refuses the conversation.
    pub fn conversation(&self, turns: &[Message]) -> Result<Vec<u32>, String> {
        let template = self.template.as_ref().ok_or("the model has no chat template: it can't hold a conversation")?;
        self.rendered(&template.prompt(turns)?).map(|(tokens, _)| tokens)
    }

    /// Tokens of a plain text, with what the tokenizer puts before texts, but no end token that the text has not.
    ///
    /// # Errors
    /// The tokenizer fails.
    pub fn text(&self, text: &str) -> Result<Vec<u32>, String> {
        self.placed_text(text).map(|(tokens, _)| tokens)
    }

    /// The same, with the place of each token.
    pub(super) fn placed_text(&self, text: &str) -> Result<Placed, String> {
        let encoding = self.tokenizer.encode(text, true).map_err(tokenizer_failed)?;
        let (ids, added) = (encoding.get_ids(), encoding.get_special_tokens_mask());
        let added_eos = ids.iter().zip(added).rev().take_while(|&(&id, &added)| id == self.eos && added == 1).count();
        // A text that begins with the token that the tokenizer puts there as well.
        let doubled = ids.len() > 1 && ids[0] == ids[1] && added[0] == 1 && added[1] == 0;
        let kept = usize::from(doubled)..ids.len() - added_eos.min(ids.len() - usize::from(doubled));
        let offsets = encoding.get_offsets()[kept.clone()].iter().map(|&(start, end)| start..end).collect();
        Ok((ids[kept].to_vec(), offsets))
    }

    /// The text of tokens, without special ones.
    ///
    /// # Errors
    /// The tokenizer fails.
    pub fn decode(&self, tokens: &[u32]) -> Result<String, String> {
        self.tokenizer.decode(tokens, true).map_err(tokenizer_failed)
    }

    /// The text of tokens, with special ones.
    ///
    /// # Errors
    /// The tokenizer fails.
    pub fn decode_with_specials(&self, tokens: &[u32]) -> Result<String, String> {
        self.tokenizer.decode(tokens, false).map_err(tokenizer_failed)
    }

    /// Tokens of a rendered template, which holds its special tokens already, and the bytes that each stands for.
    pub(super) fn rendered(&self, text: &str) -> Result<Placed, String> {
        let encoding = self.tokenizer.encode(text, false).map_err(tokenizer_failed)?;
        let offsets = encoding.get_offsets().iter().map(|&(start, end)| start..end).collect();
        Ok((encoding.get_ids().to_vec(), offsets))
    }
}

fn tokenizer_failed(error: tokenizers::Error) -> String {
    format!("the tokenizer fails: {error}")
}

/// A JSON file of the folder; None if it is not there, which is another thing than a file that can't be read.
fn json_file(folder: &Path, name: &str) -> Result<Option<Value>, String> {
    let path = folder.join(name);
    match std::fs::symlink_metadata(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        _ => read_json(&path).map(Some).map_err(|problem| format!("{name}: {problem}")),
    }
}

/// `tokenizer_config.json`, completed from files that older versions of transformers write beside it.
fn configuration(folder: &Path) -> Result<Value, String> {
    let config = json_file(folder, "tokenizer_config.json")?.ok_or("tokenizer_config.json is missing")?;
    let Value::Object(mut config) = config else { return Err("tokenizer_config.json is not a JSON object".into()) };
    let is_legacy = config.get("added_tokens_decoder").is_none_or(Value::is_null);
    if let Some(Value::Object(special)) = json_file(folder, "special_tokens_map.json")? {
        for (name, value) in special {
            if is_legacy || config.get(&name).is_none_or(Value::is_null) {
                config.insert(name, value);
            }
        }
    }
    if let Some(Value::Object(added)) = json_file(folder, "added_tokens.json")?.filter(|_| is_legacy) {
        let token = |(text, id): (String, Value)| (id.to_string(), json!({"content": text}));
        config.insert("added_tokens_decoder".into(), Value::Object(added.into_iter().map(token).collect()));
    }
    let is_sound = |token: &Value| token.is_null() || token_text(token).is_some();
    if let Some(name) = NAMED_TOKENS.into_iter().find(|name| config.get(*name).is_some_and(|token| !is_sound(token))) {
        let token = &config[name];
        return Err(format!("tokenizer_config.json: {name} is {token}; expected a text, or an object with content"));
    }
    Ok(Value::Object(config))
}

/// The settings of a `tokenizer.json` that would change rows behind the user's back.
#[derive(Deserialize)]
struct Settings {
    truncation: Option<IgnoredAny>,
    padding: Option<IgnoredAny>,
    model: Option<ModelSettings>,
}

#[derive(Deserialize)]
struct ModelSettings {
    dropout: Option<f64>,
}

/// The tokenizer, without truncation and padding, which `save_pretrained` keeps after a call with them.
fn tokenizer(folder: &Path) -> Result<Tokenizer, String> {
    let unreadable = |error: &dyn std::fmt::Display| format!("tokenizer.json can't be read: {error}");
    let mut text = std::fs::read(folder.join("tokenizer.json")).map_err(|error| unreadable(&error))?;
    let settings: Settings = serde_json::from_slice(&text).map_err(|error| unreadable(&error))?;
    if let Some(dropout) = settings.model.and_then(|model| model.dropout).filter(|dropout| *dropout != 0.0) {
        return Err(format!(
            "tokenizer.json has model.dropout {dropout}: the same text would get other tokens each time; set it to null"
        ));
    }
    if settings.truncation.is_some() || settings.padding.is_some() {
        let mut json: Value = serde_json::from_slice(&text).map_err(|error| unreadable(&error))?;
        (json["truncation"], json["padding"]) = (Value::Null, Value::Null);
        text = json.to_string().into_bytes();
    }
    Tokenizer::from_bytes(text).map_err(|error| unreadable(&error))
}

/// The text of a token: a string, or an object that holds it.
fn token_text(token: &Value) -> Option<String> {
    match token {
        Value::Object(token) => token.get("content")?.as_str(),
        token => token.as_str(),
    }
    .map(str::to_owned)
}

/// A token as transformers adds it; special unless it says otherwise.
fn added_token(token: &Value, is_special: bool) -> Option<AddedToken> {
    let flag = |name: &str, default: bool| token.get(name).and_then(Value::as_bool).unwrap_or(default);
    let special = flag("special", is_special);
    let added = AddedToken::from(token_text(token)?, special);
    Some(
        added
            .single_word(flag("single_word", false))
            .lstrip(flag("lstrip", false))
            .rstrip(flag("rstrip", false))
            .normalized(flag("normalized", !special)),
    )
}

/// The tokens with a name, and their texts, as templates know them.
fn special_tokens(config: &Value) -> Map<String, Value> {
    let named = NAMED_TOKENS.into_iter().map(|name| (name.to_owned(), &config[name]));
    let is_of_model =
        |name: &str| name.ends_with("_token") && !name.starts_with("add_") && !NAMED_TOKENS.contains(&name);
    let own = config.as_object().into_iter().flatten().filter(|(name, _)| is_of_model(name));
    let extra = config["extra_special_tokens"].as_object().into_iter().flatten();
    let own = own.chain(extra).map(|(name, value)| (name.clone(), value));
    named.chain(own).filter_map(|(name, token)| Some((name, token_text(token)?.into()))).collect()
}

/// Adds the tokens that `tokenizer_config.json` has and `tokenizer.json` has not, in transformers' order.
fn add_tokens(tokenizer: &mut Tokenizer, config: &Value, warnings: &mut Vec<String>) -> Result<(), String> {
    let known = tokenizer.get_added_tokens_decoder();
    let is_known = |text: &str| known.values().any(|token| token.content == text);
    let special = special_tokens(config);
    let is_special = |text: &str| special.values().any(|token| token == text);
    let mut declared: Vec<(u32, AddedToken)> = Vec::new();
    for (id, token) in config["added_tokens_decoder"].as_object().into_iter().flatten() {
        let is_special = token_text(token).is_some_and(|text| is_special(&text));
        let token = added_token(token, is_special).zip(id.parse().ok());
        let (mut token, id) = token.ok_or_else(|| {
            format!("tokenizer_config.json: added_tokens_decoder[{id:?}] is no token with a number and a content")
        })?;
        token.special |= is_special;
        declared.push((id, token));
    }
    declared.sort_by_key(|(id, _)| *id);
    let mut added: Vec<AddedToken> =
        declared.iter().map(|(_, token)| token.clone()).filter(|token| !known.values().any(|k| k == token)).collect();
    let named = NAMED_TOKENS.iter().map(|name| config[*name].clone());
    let extra = ["extra_special_tokens", "additional_special_tokens"].map(|name| config[name].as_array().cloned());
    let candidates = named.chain(special.values().cloned()).chain(extra.into_iter().flatten().flatten());
    for token in candidates.filter_map(|token| added_token(&token, true)) {
        if !is_known(&token.content) && !added.iter().any(|other| other.content == token.content) {
            added.push(AddedToken { special: true, ..token });
        }
    }
    tokenizer.add_tokens(added).map_err(tokenizer_failed)?;
    for (id, AddedToken { content, .. }) in declared {
        let found = tokenizer.token_to_id(&content);
        if let Some(found) = found.filter(|&found| found != id) {
            warnings.push(format!(
                "{content:?} is token {id} in tokenizer_config.json, but {found} in tokenizer.json, which counts"
            ));
        }
    }
    Ok(())
}

/// Lets the tokenizer put a beginning and an end around texts where `tokenizer_config.json` says whether it does, and split
/// special tokens where it says so.
fn set_ends(tokenizer: &mut Tokenizer, config: &Value) -> Result<(), String> {
    if config["split_special_tokens"] == true {
        tokenizer.set_encode_special_tokens(true);
    }
    let says = |name: &str| config.get(name).is_some_and(|value| !value.is_null());
    if !says("add_bos_token") && !says("add_eos_token") {
        return Ok(());
    }
    let token = |flag: &str, name: &str| -> Option<(String, u32)> {
        let text = token_text(&config[name]).filter(|_| config[flag] == true)?;
        let id = tokenizer.token_to_id(&text)?;
        Some((text, id))
    };
    let (bos, eos) = (token("add_bos_token", "bos_token"), token("add_eos_token", "eos_token"));
    let around = |sequence: &str, type_id: u32| -> Vec<Value> {
        let special = |token: &Option<(String, u32)>| {
            token.as_ref().map(|(text, _)| json!({"SpecialToken": {"id": text, "type_id": type_id}}))
        };
        let sequence = json!({"Sequence": {"id": sequence, "type_id": type_id}});
        special(&bos).into_iter().chain([sequence]).chain(special(&eos)).collect()
    };
    let known = |(text, id): &(String, u32)| (text.clone(), json!({"id": text, "ids": [id], "tokens": [text]}));
    let pair = [around("A", 0), around("B", 1)].concat();
    let processor = json!({
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": pair,
        "special_tokens": bos.iter().chain(&eos).map(known).collect::<Map<_, _>>(),
    });
    let processor: PostProcessorWrapper = serde_json::from_value(processor)
        .map_err(|error| format!("tokenizer_config.json: add_bos_token and add_eos_token: {error}"))?;
    tokenizer.with_post_processor(Some(processor));
    Ok(())
}

/// The end tokens of `generation_config.json`, one or several. Where that file is absent, transformers makes it from
/// `config.json`.
fn stop_tokens(folder: &Path) -> Result<Vec<u32>, String> {
    let (name, config) = match json_file(folder, "generation_config.json")? {
        Some(config) => ("generation_config.json", config),
        None => ("config.json", json_file(folder, "config.json")?.unwrap_or_default()),
    };
    let ids =
        match [&config["eos_token_id"], &config["text_config"]["eos_token_id"]].into_iter().find(|id| !id.is_null()) {
            None => return Ok(Vec::new()),
            Some(Value::Array(ids)) => ids.clone(),
            Some(id) => vec![id.clone()],
        };
    let id = |id: &Value| u32::try_from(id.as_u64()?).ok();
    let refuse = |value: &Value| format!("{name}: eos_token_id holds {value}; expected numbers of tokens");
    ids.iter().map(|value| id(value).ok_or_else(|| refuse(value))).collect()
}

/// A warning about words in a template that look like tokens and are none.
fn unknown_markers(template: &str, tokenizer: &Tokenizer) -> Option<String> {
    let mut unknown: Vec<&str> =
        markers(template).into_iter().filter(|marker| tokenizer.token_to_id(marker).is_none()).collect();
    unknown.sort_unstable();
    unknown.dedup();
    (!unknown.is_empty()).then(|| {
        format!(
            "dataset.chatTemplate writes {}, which the model's vocabulary does not know as tokens: the model reads them \
             letter by letter",
            unknown.join(", ")
        )
    })
}

/// Words like `<|user|>`, `<start_of_turn>` and `[INST]`.
fn markers(template: &str) -> Vec<&str> {
    let mut found = Vec::new();
    for (open, close) in [('<', '>'), ('[', ']')] {
        for (start, _) in template.match_indices(open) {
            let Some(length) = template[start..].find(close) else { continue };
            let inner = &template[start + 1..start + length];
            let is_word = |c: char| c.is_alphanumeric() || matches!(c, '_' | '|' | '/' | '｜' | '▁');
            let is_name = match open {
                '<' => inner.chars().all(is_word) && inner.chars().any(char::is_alphabetic),
                _ => inner.len() > 1 && inner.chars().all(|c| c.is_ascii_uppercase() || matches!(c, '_' | '/')),
            };
            if is_name {
                found.push(&template[start..start + length + 1]);
            }
        }
    }
    found
}
