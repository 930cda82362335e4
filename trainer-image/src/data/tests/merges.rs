//! Tokenizers whose tokens reach over the boundary of an answer: a space and the word behind it are one token.

use serde_json::{Value, json};

use super::{encode, encoder_of, messages, vocabulary};
use crate::data::{Encoder, conversation::Conversation, formats::Row, notes::Notes};

/// Merges of byte-level BPE.
fn merge(tokenizer: &mut Value, pairs: &[(&str, &str)]) {
    let next = tokenizer["model"]["vocab"].as_object().unwrap().len();
    for (i, (left, right)) in pairs.iter().enumerate() {
        tokenizer["model"]["vocab"][format!("{left}{right}")] = json!(next + i);
    }
    tokenizer["model"]["merges"] = pairs.iter().map(|(left, right)| json!([left, right])).collect();
}

/// A space and the word "yes" are one token; its place holds the space, or not.
fn byte_level(trim_offsets: bool) -> impl FnOnce(&mut Value, &mut Value) {
    move |tokenizer, config| {
        merge(tokenizer, &[("y", "e"), ("ye", "s"), ("Ġ", "yes")]);
        tokenizer["post_processor"] =
            json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": trim_offsets, "use_regex": true});
        config["chat_template"] = json!(
            "{% for m in messages %}{{ 'Answer: ' if m.role == 'assistant' else 'Question: ' }}{{ m.content }}<|im_end|>{% endfor %}\
             {% if add_generation_prompt %}Answer: {% endif %}"
        );
    }
}

/// As SentencePiece: a space is a letter of the word behind it, and one is put before each text.
fn sentence_piece(tokenizer: &mut Value, config: &mut Value) {
    byte_level(true)(tokenizer, config);
    let vocabulary: Vec<&str> = vec![
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<unk>",
        "▁",
        "y",
        "e",
        "s",
        "ye",
        "yes",
        "▁yes",
        "2",
        "+",
        "=",
        "4",
        "▁2",
        "▁4",
        "A",
        "n",
        "w",
        "r",
        ":",
        "Q",
        "u",
        "t",
        "i",
        "o",
        "▁A",
        "▁Q",
        "h",
    ];
    let ids: serde_json::Map<String, Value> =
        vocabulary.iter().enumerate().map(|(i, token)| ((*token).to_owned(), json!(i))).collect();
    tokenizer["model"] = json!({"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
        "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": false, "ignore_merges": false, "vocab": ids,
        "merges": [["y", "e"], ["ye", "s"], ["▁", "yes"], ["▁", "2"], ["▁", "4"], ["▁", "A"], ["▁", "Q"]]});
    tokenizer["pre_tokenizer"] =
        json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": false});
    tokenizer["decoder"] = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": false});
    tokenizer["post_processor"] = Value::Null;
}

/// The trained tokens as the vocabulary has them.
fn trained(encoder: &Encoder, row: &Row) -> Vec<String> {
    let example = encode(encoder, row);
    let targets = example.targets.iter().filter(|&&target| target != super::IGNORE);
    targets.map(|&target| encoder.vocabulary.tokenizer.id_to_token(target).unwrap()).collect()
}

fn question_and_answer() -> Row {
    let turns = messages(&[("user", "is it"), ("assistant", "yes")]);
    Row::Conversation(Conversation { turns, ..Conversation::default() })
}

#[test]
fn a_token_belongs_to_the_answer_if_any_of_its_bytes_does() {
    for trim_offsets in [true, false] {
        let encoder = encoder_of(vocabulary(byte_level(trim_offsets)));
        assert_eq!(trained(&encoder, &question_and_answer()), ["Ġyes", "<|im_end|>"], "trim_offsets {trim_offsets}");
    }
    let encoder = encoder_of(vocabulary(sentence_piece));
    assert_eq!(trained(&encoder, &question_and_answer()), ["▁yes", "<|im_end|>"]);
    let marked = |tokenizer: &mut Value, config: &mut Value| {
        byte_level(false)(tokenizer, config);
        config["chat_template"] = json!(
            "{% for m in messages %}{{ m.role }}: {% generation %}{{ m.content }}{% endgeneration %}<|im_end|>{% endfor %}"
        );
    };
    let encoder = encoder_of(vocabulary(marked));
    assert!(trained(&encoder, &question_and_answer()).ends_with(&["Ġyes".into(), "<|im_end|>".into()]));
}

#[test]
fn an_answer_whose_first_token_begins_before_it_is_counted() {
    let encoder = encoder_of(vocabulary(byte_level(false)));
    let mut notes = Notes::default();
    encoder.encode(&question_and_answer(), &mut notes).unwrap();
    assert!(
        notes.lines()[0].starts_with("the first token of an answer holds the end of what stands before it"),
        "{notes:?}"
    );
}

#[test]
fn prompt_and_completion_are_one_text() {
    let row =
        |prompt: &str, completion: &str| Row::PromptCompletion { prompt: prompt.into(), completion: completion.into() };
    let encoder = encoder_of(vocabulary(sentence_piece));
    assert_eq!(trained(&encoder, &row("2+2=", "4")), ["4", "<|im_end|>"], "no space comes between");
    assert_eq!(trained(&encoder, &row("2+2=", " 4")), ["▁4", "<|im_end|>"], "one space is one");
    let whole = encode(&encoder, &Row::Text("2+2= 4".into())).tokens;
    assert_eq!(encode(&encoder, &row("2+2=", " 4")).tokens, whole);
    // The prompt alone ends in a token of its own.
    let mut notes = Notes::default();
    let example = encoder.encode(&row("2+2= ", "4"), &mut notes).unwrap().unwrap();
    assert_eq!(example.tokens, whole);
    assert_eq!(trained(&encoder, &row("2+2= ", "4")), ["▁4", "<|im_end|>"]);
    assert!(
        notes.lines()[0].starts_with("the prompt's tokens are other ones once the completion follows"),
        "{notes:?}"
    );
}

#[test]
fn stanfords_words_and_the_output_are_one_text_too() {
    let encoder = encoder_of(vocabulary(|tokenizer, config| {
        byte_level(true)(tokenizer, config);
        merge(tokenizer, &[("Ċ", "y")]);
        config["chat_template"] = Value::Null;
    }));
    let task = crate::data::formats::Alpaca { instruction: "Say.".into(), output: "y".into(), ..Default::default() };
    assert_eq!(trained(&encoder, &Row::Alpaca(task)), ["y", "<|im_end|>"], "line breaks are words of their own");
}
