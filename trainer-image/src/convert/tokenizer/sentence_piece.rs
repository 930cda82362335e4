//! SentencePiece's BPE (Kudo and Richardson, 2018), whose vocabulary has scores in the place of merges: of two neighbours
//! that are a token together, those with the best score are merged first.

use std::collections::HashSet;

use serde_json::{Value, json};

use super::unsupported;
use crate::convert::{ConvertError, Gguf};

/// What SentencePiece has in the place of a space.
const SPACE: &str = "▁";

/// GGUF's token type of those that merges make.
const NORMAL: usize = 1;
/// Longer tokens, in bytes, are not made by merges: SentencePiece has none longer than 16 characters unless it is told.
const LONGEST: usize = 256;

/// Scores of the tokens, and what is done to spaces.
pub(super) struct SentencePiece {
    /// None where no merge makes the token.
    scores: Vec<Option<f32>>,
    /// Whether a text, and what follows a special token, begins with a space.
    adds_space: bool,
}

impl SentencePiece {
    pub(super) fn read(gguf: &Gguf, kinds: &[usize]) -> Result<Self, ConvertError> {
        let scores = gguf.floats("tokenizer.ggml.scores")?;
        if scores.len() != kinds.len() || scores.iter().any(|score| score.is_nan()) {
            let (found, supported) =
                (format!("{} numbers", scores.len()), format!("a number for each of {} tokens", kinds.len()));
            return Err(unsupported("tokenizer.ggml.scores", &found, &supported));
        }
        let scores = scores.into_iter().zip(kinds).map(|(score, &kind)| (kind == NORMAL).then_some(score)).collect();
        let adds_space = gguf.optional_flag("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
        Ok(Self { scores, adds_space })
    }

    /// Writes what is of this kind into a `tokenizer.json`.
    pub(super) fn write(&self, tokens: &[String], unknown: Option<&str>, tokenizer: &mut Value) {
        let replace = |from: &str, to: &str| json!({"type": "Replace", "pattern": {"String": from}, "content": to});
        let prepend = self.adds_space.then(|| json!({"type": "Prepend", "prepend": SPACE}));
        let strip = self.adds_space.then(|| json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
        let normalizers: Vec<Value> = prepend.into_iter().chain([replace(" ", SPACE)]).collect();
        let decoders = [replace(SPACE, " "), json!({"type": "ByteFallback"}), json!({"type": "Fuse"})];
        let decoders: Vec<Value> = decoders.into_iter().chain(strip).collect();
        tokenizer["normalizer"] = json!({"type": "Sequence", "normalizers": normalizers});
        tokenizer["pre_tokenizer"] = Value::Null;
        tokenizer["decoder"] = json!({"type": "Sequence", "decoders": decoders});
        let model = &mut tokenizer["model"];
        model["merges"] = json!(self.merges(tokens));
        model["unk_token"] = json!(unknown);
        model["fuse_unk"] = true.into();
        model["byte_fallback"] = true.into();
    }

    /// Every way to put a token together of two, those of the best score first; of one token's, as in transformers, those
    /// with the longest left part.
    fn merges<'a>(&self, tokens: &'a [String]) -> Vec<[&'a str; 2]> {
        let known: HashSet<&str> = tokens.iter().map(String::as_str).collect();
        let mut merges = Vec::new();
        for (token, score) in tokens.iter().zip(&self.scores) {
            let Some(score) = score.filter(|_| token.len() <= LONGEST) else { continue };
            let splits = token.char_indices().rev().filter(|(at, _)| *at > 0).map(|(at, _)| token.split_at(at));
            let parts = splits.filter(|(left, right)| known.contains(left) && known.contains(right));
            merges.extend(parts.map(|(left, right)| (score, [left, right])));
        }
        merges.sort_by(|a, b| b.0.total_cmp(&a.0));
        merges.into_iter().map(|(_, merge)| merge).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn merges_are_in_the_order_of_scores_and_make_no_control_token() {
        let tokens = ["<s>", "<", "s", ">", "aa", "a", "aaa"].map(str::to_owned);
        let scores = [None, Some(-5.0), Some(-6.0), Some(-7.0), Some(-2.0), Some(-8.0), Some(-1.0)];
        let model = SentencePiece { scores: scores.to_vec(), adds_space: true };
        assert_eq!(model.merges(&tokens), [["aa", "a"], ["a", "aa"], ["a", "a"]]);
    }
}
