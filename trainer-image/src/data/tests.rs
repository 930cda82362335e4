//! Encoding, tried with a real tokenizer: which tokens are trained is what a chat model lives or dies by.

use std::path::Path;

use proptest::prelude::*;
use serde_json::{Value, json};
use tunesmith_engine::IGNORE;

use super::{
    Encoder, Example,
    encode::Vocabulary,
    rows::{Message, Row},
};
use crate::tiny_model;

fn vocabulary(change: impl FnOnce(&mut Value, &mut Value)) -> Vocabulary {
    let folder = tempfile::tempdir().unwrap();
    tiny_model::write(folder.path()).unwrap();
    let read = |name: &str| serde_json::from_slice(&std::fs::read(folder.path().join(name)).unwrap()).unwrap();
    let (mut tokenizer, mut config) = (read("tokenizer.json"), read("tokenizer_config.json"));
    change(&mut tokenizer, &mut config);
    let write = |name: &str, json: &Value| std::fs::write(folder.path().join(name), json.to_string()).unwrap();
    write("tokenizer.json", &tokenizer);
    write("tokenizer_config.json", &config);
    Vocabulary::load(folder.path()).unwrap()
}

fn encoder(max_length: usize) -> Encoder {
    Encoder { vocabulary: vocabulary(|_, _| {}), max_length, assistant_only: true }
}

/// Puts `<|im_start|>` before every text, as tokenizers with a BOS do.
fn add_bos(tokenizer: &mut Value, _: &mut Value) {
    tokenizer["post_processor"] = json!({
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}},
    });
}

fn chat(turns: &[(&str, &str)]) -> Row {
    Row::Messages(turns.iter().map(|(role, content)| Message::new(role, content)).collect())
}

const EOS: u32 = 2;
const BOS: u32 = 1;

/// The trained tokens as text, with `$` for the end token.
fn trained(encoder: &Encoder, example: &Example) -> String {
    let targets = example.targets.iter().filter(|&&target| target != IGNORE);
    let text = |&target: &u32| match target {
        EOS => "$".to_owned(),
        target => encoder.vocabulary.decode(&[target]).unwrap(),
    };
    targets.map(text).collect()
}

#[test]
fn each_assistant_turn_is_trained_with_its_end_token_and_nothing_else_is() {
    let encoder = encoder(1024);
    let row = chat(&[("system", "s"), ("user", "hi"), ("assistant", "yes"), ("user", "sure?"), ("assistant", "no")]);
    let example = encoder.encode(1, &row).unwrap();
    assert_eq!(trained(&encoder, &example), "yes$no$");
    // The first trained token is predicted at the last token of the assistant's header.
    let first = example.targets.iter().position(|&target| target != IGNORE).unwrap();
    assert_eq!(encoder.vocabulary.decode(&example.tokens[first..=first]).unwrap(), "\n");
}

#[test]
fn a_template_without_end_token_gets_one_after_the_answer() {
    let template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}\
        {% if add_generation_prompt %}assistant: {% endif %}";
    let vocabulary = vocabulary(|_, config| config["chat_template"] = json!(template));
    let encoder = Encoder { vocabulary, max_length: 1024, assistant_only: true };
    let example = encoder.encode(1, &chat(&[("user", "hi"), ("assistant", "yes")])).unwrap();
    assert_eq!(trained(&encoder, &example), "yes\n$");
}

#[test]
fn every_token_is_trained_when_the_user_asks_for_that() {
    let encoder = Encoder { assistant_only: false, ..encoder(1024) };
    let example = encoder.encode(1, &chat(&[("user", "hi"), ("assistant", "yes")])).unwrap();
    assert_eq!(example.trained_tokens(), example.tokens.len() - 1);
    assert_eq!(example.tokens.iter().filter(|&&token| token == EOS).count(), 2, "no third end token");
}

#[test]
fn a_completion_is_trained_and_its_prompt_is_not() {
    let encoder = encoder(1024);
    let row = Row::PromptCompletion { prompt: "2 + 2 =".into(), completion: " 4".into() };
    assert_eq!(trained(&encoder, &encoder.encode(1, &row).unwrap()), " 4$");
    let text = encoder.encode(1, &Row::Text("abc".into())).unwrap();
    assert_eq!(trained(&encoder, &text), "bc$", "the first token has nothing to be predicted from");
}

#[test]
fn there_is_one_bos_whoever_adds_it() {
    let encoder = Encoder { vocabulary: vocabulary(add_bos), max_length: 1024, assistant_only: true };
    let bos = |row: &Row| encoder.encode(1, row).unwrap().tokens.iter().take_while(|&&token| token == BOS).count();
    assert_eq!(bos(&Row::Text("abc".into())), 1, "the tokenizer adds it");
    assert_eq!(bos(&Row::Text("<|im_start|>abc".into())), 1, "the text has it, and the tokenizer adds it");
    assert_eq!(bos(&chat(&[("user", "a"), ("assistant", "b")])), 1, "the template has it");
}

#[test]
fn a_row_whose_answer_is_cut_off_is_refused_with_advice() {
    let error = encoder(40).encode(1, &chat(&[("user", &"a".repeat(100)), ("assistant", "yes")])).unwrap_err();
    assert!(error.contains("first 40 tokens") && error.contains("training.maxLength"), "{error}");
    let example = encoder(40).encode(1, &chat(&[("user", "a"), ("assistant", &"yes".repeat(30))])).unwrap();
    assert!(example.truncated && example.tokens.len() == 40);
    assert_eq!(example.targets.last(), Some(&IGNORE));
}

#[test]
fn a_conversation_without_an_assistant_teaches_nothing() {
    let error = encoder(1024).encode(1, &chat(&[("user", "hi")])).unwrap_err();
    assert_eq!(error, "no assistant turn, nothing to train on (messages[].role)");
}

#[test]
fn a_model_without_an_end_token_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    tiny_model::write(folder.path()).unwrap();
    std::fs::write(folder.path().join("tokenizer_config.json"), "{}").unwrap();
    let load = |folder: &Path| Vocabulary::load(folder).err().unwrap().to_string();
    assert!(load(folder.path()).contains("eos_token"));
}

proptest! {
    #[test]
    fn what_is_trained_is_exactly_what_the_assistant_says(
        turns in prop::collection::vec(("[a-zé☕ 0-9\n<>|]{1,12}", "[a-zé☕ 0-9\n<>|]{1,12}"), 1..4),
    ) {
        let encoder = encoder(4096);
        let messages = turns.iter().flat_map(|(user, assistant)| [("user", user.as_str()), ("assistant", assistant)]);
        let example = encoder.encode(1, &chat(&messages.collect::<Vec<_>>())).unwrap();
        let said: String = turns.iter().map(|(_, assistant)| format!("{assistant}<|im_end|>")).collect();
        let bytes = said.replace("<|im_end|>", "$").len();
        // Every byte is a token here, so tokens can be counted without decoding half a character.
        prop_assert_eq!(example.trained_tokens(), bytes);
        let shifted = example.tokens.iter().skip(1).zip(&example.targets);
        prop_assert!(shifted.into_iter().all(|(next, target)| *target == IGNORE || next == target));
    }
}
