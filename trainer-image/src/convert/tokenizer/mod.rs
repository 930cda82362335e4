//! The tokenizer: from GGUF metadata to `tokenizer.json` and `tokenizer_config.json`.

mod byte_level;
mod sentence_piece;

use serde_json::{Map, Value, json};

use self::{byte_level::ByteLevel, sentence_piece::SentencePiece};
use super::{ConvertError, Gguf};

/// GGUF's token type of control tokens such as `<|im_start|>`.
const CONTROL: usize = 3;
/// GGUF's token type of tokens that were added to a finished vocabulary.
const USER_DEFINED: usize = 4;

/// A tokenizer.
pub(super) struct Tokenizer {
    tokens: Vec<String>,
    kind: Kind,
    added: Vec<Added>,
    add_bos: bool,
    pub(super) bos: Option<usize>,
    pub(super) eos: usize,
    /// What ends a turn of a chat, if that is not [`Tokenizer::eos`].
    pub(super) end_of_turn: Option<usize>,
    pub(super) pad: Option<usize>,
    unknown: Option<usize>,
    chat_template: Option<String>,
}

/// How text becomes tokens.
enum Kind {
    ByteLevel(ByteLevel),
    SentencePiece(SentencePiece),
}

/// A token that is found in a text before anything else.
struct Added {
    id: usize,
    /// Whether it is skipped when decoding for people.
    is_special: bool,
    /// Whether it takes the white space behind it.
    strips_right: bool,
}

impl Tokenizer {
    pub(super) fn read(gguf: &Gguf) -> Result<Self, ConvertError> {
        let tokens: Vec<String> = gguf.texts("tokenizer.ggml.tokens")?.into_iter().map(str::to_owned).collect();
        let id = |key: &str| -> Result<Option<usize>, ConvertError> {
            match gguf.optional_number(key)? {
                Some(id) if id >= tokens.len() => Err(unsupported(
                    key,
                    &id.to_string(),
                    &format!("below {}, the size of the vocabulary", tokens.len()),
                )),
                id => Ok(id),
            }
        };
        let kinds = gguf.numbers("tokenizer.ggml.token_type")?;
        if kinds.len() != tokens.len() {
            let (found, supported) =
                (format!("{} numbers", kinds.len()), format!("one for each of {} tokens", tokens.len()));
            return Err(unsupported("tokenizer.ggml.token_type", &found, &supported));
        }
        let kind = match gguf.text("tokenizer.ggml.model")? {
            "gpt2" => Kind::ByteLevel(ByteLevel::read(gguf)?),
            "llama" => Kind::SentencePiece(SentencePiece::read(gguf, &kinds)?),
            other => {
                return Err(unsupported("tokenizer.ggml.model", other, "gpt2 (byte-level BPE), llama (SentencePiece)"));
            }
        };
        let begins_by_default = match &kind {
            Kind::ByteLevel(kind) => kind.begins_by_default(),
            Kind::SentencePiece(_) => true,
        };
        // Of the models that have SentencePiece tokens, Phi 3's take the white space behind special ones.
        let is_phi = gguf.text("general.architecture")? == "phi3" && matches!(kind, Kind::SentencePiece(_));
        let added = kinds.into_iter().enumerate().filter_map(|(id, kind)| {
            let strips_right = is_phi && !["<unk>", "<s>", "<|endoftext|>"].contains(&tokens[id].as_str());
            match kind {
                CONTROL | USER_DEFINED => Some(Added { id, is_special: kind == CONTROL, strips_right }),
                _ => None,
            }
        });
        let added = added.collect();
        let eos = id("tokenizer.ggml.eos_token_id")?;
        Ok(Self {
            kind,
            added,
            add_bos: gguf.optional_flag("tokenizer.ggml.add_bos_token")?.unwrap_or(begins_by_default),
            bos: id("tokenizer.ggml.bos_token_id")?,
            eos: eos.ok_or_else(|| ConvertError::MissingKey("tokenizer.ggml.eos_token_id".into()))?,
            end_of_turn: id("tokenizer.ggml.eot_token_id")?,
            pad: id("tokenizer.ggml.padding_token_id")?,
            unknown: id("tokenizer.ggml.unknown_token_id")?,
            chat_template: match gguf.has("tokenizer.chat_template") {
                true => Some(gguf.text("tokenizer.chat_template")?.to_owned()),
                false => None,
            },
            tokens,
        })
    }

    pub(super) fn tokenizer_json(&self) -> Value {
        let vocabulary: Map<String, Value> =
            self.tokens.iter().enumerate().map(|(id, token)| (token.clone(), json!(id))).collect();
        let bos = self.bos.filter(|_| self.add_bos).map(|id| (id, &self.tokens[id]));
        let mut tokenizer = json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": self.added.iter().map(|added| self.added_token(added)).collect::<Vec<_>>(),
            "post_processor": bos.map(|(id, token)| json!({
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [
                    {"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                    {"SpecialToken": {"id": token, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}},
                ],
                "special_tokens": {token: {"id": token, "ids": [id], "tokens": [token]}},
            })),
            "model": {
                "type": "BPE",
                "dropout": null,
                "unk_token": null,
                "continuing_subword_prefix": null,
                "end_of_word_suffix": null,
                "fuse_unk": false,
                "byte_fallback": false,
                "ignore_merges": false,
                "vocab": vocabulary,
            },
        });
        match &self.kind {
            Kind::ByteLevel(kind) => kind.write(&mut tokenizer),
            Kind::SentencePiece(kind) => {
                kind.write(&self.tokens, self.unknown.map(|id| self.tokens[id].as_str()), &mut tokenizer);
            }
        }
        tokenizer
    }

    pub(super) fn tokenizer_config_json(&self, context_length: usize) -> Value {
        let token = |id: Option<usize>| id.map(|id| self.tokens[id].as_str());
        let decoder: Map<String, Value> = self
            .added
            .iter()
            .map(|added| {
                let mut token = self.added_token(added);
                token.as_object_mut().map(|token| token.remove("id"));
                (added.id.to_string(), token)
            })
            .collect();
        let mut config = json!({
            "add_bos_token": self.add_bos,
            "add_prefix_space": false,
            "added_tokens_decoder": decoder,
            "bos_token": token(self.bos),
            "clean_up_tokenization_spaces": false,
            "eos_token": token(Some(self.eos)),
            "model_max_length": context_length,
            "pad_token": token(self.pad),
            // The class that takes tokenizer.json as it is; GPT2Tokenizer would build its own splitting.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": token(self.unknown),
        });
        if let Some(template) = &self.chat_template {
            config["chat_template"] = json!(template);
        }
        config
    }

    fn added_token(&self, added: &Added) -> Value {
        json!({
            "id": added.id, "content": self.tokens[added.id], "single_word": false, "lstrip": false,
            "rstrip": added.strips_right, "normalized": false, "special": added.is_special,
        })
    }
}

fn unsupported(key: &str, found: &str, supported: &str) -> ConvertError {
    ConvertError::UnsupportedKey { key: key.into(), found: format!("\"{found}\""), supported: supported.into() }
}
