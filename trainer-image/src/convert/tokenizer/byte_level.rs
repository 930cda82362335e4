//! Byte-level BPE, as GPT-2 introduced it: a text is split, and in each part bytes are merged.

use serde_json::{Value, json};

use super::unsupported;
use crate::convert::{ConvertError, Gguf};

/// Merges, and how texts are split before them.
pub(super) struct ByteLevel {
    merges: Vec<[String; 2]>,
    split: Split,
}

/// What GGUF's `tokenizer.ggml.pre` stands for.
struct Split {
    name: &'static str,
    /// Parts of a text, one of which each match is; none splits as GPT-2 does.
    pattern: Option<&'static str>,
    /// Whether each digit is a part of its own, before anything else.
    digits: bool,
    /// Whether texts are brought into Unicode's form C.
    composes: bool,
    /// Whether a part that is a token stays whole, whatever the merges say.
    ignores_merges: bool,
    /// Whether rows begin with a token for that, where the file does not say.
    begins: bool,
}

const GPT2: Split =
    Split { name: "gpt-2", pattern: None, digits: false, composes: false, ignores_merges: false, begins: false };

/// Words with one other sign before them, numbers of up to three digits, signs, line breaks, spaces.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// The same, digits one by one.
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Words that begin a new part with each capital, without contractions.
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

static SPLITS: [Split; 6] = [
    GPT2,
    Split { name: "smollm", digits: true, ..GPT2 },
    Split { name: "llama-bpe", pattern: Some(LLAMA3), ignores_merges: true, begins: true, ..GPT2 },
    Split { name: "qwen2", pattern: Some(QWEN2), composes: true, ..GPT2 },
    Split { name: "tekken", pattern: Some(TEKKEN), ignores_merges: true, begins: true, ..GPT2 },
    // Phi 4.
    Split { name: "dbrx", pattern: Some(LLAMA3), ..GPT2 },
];

impl ByteLevel {
    pub(super) fn read(gguf: &Gguf) -> Result<Self, ConvertError> {
        let name = gguf.text("tokenizer.ggml.pre")?;
        let split = SPLITS.iter().find(|split| split.name == name);
        let merge = |merge: &str| match merge.split_once(' ') {
            Some((left, right)) => Ok([left.to_owned(), right.to_owned()]),
            None => Err(unsupported("tokenizer.ggml.merges", merge, "two tokens with a space between")),
        };
        Ok(Self {
            split: split.map(|split| Split { ..*split }).ok_or_else(|| {
                let known: Vec<&str> = SPLITS.iter().map(|split| split.name).collect();
                unsupported("tokenizer.ggml.pre", name, &known.join(", "))
            })?,
            merges: gguf.texts("tokenizer.ggml.merges")?.into_iter().map(merge).collect::<Result<_, _>>()?,
        })
    }

    /// Whether rows begin with a token for that, where the file does not say.
    pub(super) fn begins_by_default(&self) -> bool {
        self.split.begins
    }

    /// Writes what is of this kind into a `tokenizer.json`.
    pub(super) fn write(&self, tokenizer: &mut Value) {
        let byte_level = |use_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex});
        let digits = self.split.digits.then(|| json!({"type": "Digits", "individual_digits": true}));
        let pattern = self.split.pattern.map(
            |pattern| json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false}),
        );
        let bytes = byte_level(pattern.is_none());
        let steps: Vec<Value> = digits.into_iter().chain(pattern).chain([bytes]).collect();
        tokenizer["normalizer"] = if self.split.composes { json!({"type": "NFC"}) } else { Value::Null };
        tokenizer["pre_tokenizer"] = json!({"type": "Sequence", "pretokenizers": steps});
        tokenizer["decoder"] = byte_level(true);
        tokenizer["model"]["merges"] = json!(self.merges);
        tokenizer["model"]["ignore_merges"] = self.split.ignores_merges.into();
    }
}
