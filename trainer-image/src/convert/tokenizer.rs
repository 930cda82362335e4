//! The tokenizer: byte-level BPE from GGUF metadata to `tokenizer.json` and `tokenizer_config.json`.

use serde_json::{Map, Value, json};

use super::{ConvertError, Gguf};

/// GGUF's token type of control tokens such as `<|im_start|>`.
const CONTROL: usize = 3;
/// GGUF's token type of tokens that were added to a finished vocabulary.
const USER_DEFINED: usize = 4;

/// A byte-level BPE tokenizer.
pub(super) struct Tokenizer {
    tokens: Vec<String>,
    merges: Vec<[String; 2]>,
    /// Token and whether it is special (skipped when decoding for people).
    added: Vec<(usize, bool)>,
    /// Each digit is a token of its own.
    split_digits: bool,
    add_bos: bool,
    pub(super) bos: Option<usize>,
    pub(super) eos: usize,
    pub(super) pad: Option<usize>,
    unknown: Option<usize>,
    chat_template: Option<String>,
}

impl Tokenizer {
    pub(super) fn read(gguf: &Gguf) -> Result<Self, ConvertError> {
        let model = gguf.text("tokenizer.ggml.model")?;
        if model != "gpt2" {
            return Err(unsupported("tokenizer.ggml.model", model, "gpt2 (byte-level BPE)"));
        }
        let split_digits = match gguf.text("tokenizer.ggml.pre")? {
            "smollm" => true,
            "gpt-2" => false,
            other => return Err(unsupported("tokenizer.ggml.pre", other, "smollm, gpt-2")),
        };
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
        let merge = |merge: &str| match merge.split_once(' ') {
            Some((left, right)) => Ok([left.to_owned(), right.to_owned()]),
            None => Err(unsupported("tokenizer.ggml.merges", merge, "two tokens with a space between")),
        };
        let kinds = gguf.numbers("tokenizer.ggml.token_type")?;
        let added = kinds.into_iter().enumerate().take(tokens.len());
        let eos = id("tokenizer.ggml.eos_token_id")?;
        Ok(Self {
            merges: gguf.texts("tokenizer.ggml.merges")?.into_iter().map(merge).collect::<Result<_, _>>()?,
            added: added
                .filter(|(_, kind)| [CONTROL, USER_DEFINED].contains(kind))
                .map(|(id, kind)| (id, kind == CONTROL))
                .collect(),
            split_digits,
            add_bos: gguf.flag("tokenizer.ggml.add_bos_token")?,
            bos: id("tokenizer.ggml.bos_token_id")?,
            eos: eos.ok_or_else(|| ConvertError::MissingKey("tokenizer.ggml.eos_token_id".into()))?,
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
        let byte_level = json!({
            "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true,
        });
        let digits = json!({"type": "Digits", "individual_digits": true});
        let bos = self.bos.filter(|_| self.add_bos).map(|id| (id, &self.tokens[id]));
        json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": self.added.iter().map(|&(id, special)| self.added_token(id, special)).collect::<Vec<_>>(),
            "normalizer": null,
            "pre_tokenizer": match self.split_digits {
                true => json!({"type": "Sequence", "pretokenizers": [digits, byte_level]}),
                false => byte_level.clone(),
            },
            "post_processor": bos.map(|(id, token)| json!({
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [
                    {"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                    {"SpecialToken": {"id": token, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}},
                ],
                "special_tokens": {token: {"id": token, "ids": [id], "tokens": [token]}},
            })),
            "decoder": byte_level,
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
                "merges": self.merges,
            },
        })
    }

    pub(super) fn tokenizer_config_json(&self, context_length: usize) -> Value {
        let token = |id: Option<usize>| id.map(|id| self.tokens[id].as_str());
        let decoder: Map<String, Value> = self
            .added
            .iter()
            .map(|&(id, special)| {
                let mut token = self.added_token(id, special);
                token.as_object_mut().map(|token| token.remove("id"));
                (id.to_string(), token)
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

    fn added_token(&self, id: usize, special: bool) -> Value {
        json!({
            "id": id, "content": self.tokens[id], "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": special,
        })
    }
}

fn unsupported(key: &str, found: &str, supported: &str) -> ConvertError {
    ConvertError::UnsupportedKey { key: key.into(), found: format!("\"{found}\""), supported: supported.into() }
}
