//! Encoding, tried with a real tokenizer: which tokens are trained is what a chat model lives or dies by.

mod loading;
mod merges;
mod vocabulary;

use std::path::Path;

use proptest::prelude::*;
use serde_json::{Value, json};
use tunesmith_crds::fine_tune_job::{DataFormat, Overflow};
use tunesmith_engine::IGNORE;

use super::{
    Encoder, Example,
    columns::Columns,
    conversation::{Conversation, Message},
    formats::{Alpaca, Row, parse},
    notes::Notes,
    vocabulary::Vocabulary,
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
    Vocabulary::load(folder.path(), None).unwrap()
}

fn encoder(max_length: usize) -> Encoder {
    Encoder { max_length, ..encoder_of(vocabulary(|_, _| {})) }
}

fn encoder_of(vocabulary: Vocabulary) -> Encoder {
    Encoder { vocabulary, max_length: 1024, overflow: Overflow::Truncate, assistant_only: true }
}

/// The encoder of a model with another chat template.
fn encoder_with(template: &str) -> Encoder {
    encoder_of(vocabulary(|_, config| config["chat_template"] = json!(template)))
}

fn encode(encoder: &Encoder, row: &Row) -> Example {
    encoder.encode(row, &mut Notes::default()).unwrap().unwrap()
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

fn messages(turns: &[(&str, &str)]) -> Vec<Message> {
    turns.iter().map(|(role, content)| Message::new(role, content)).collect()
}

fn chat(turns: &[(&str, &str)]) -> Row {
    Row::Conversation(Conversation { turns: messages(turns), ..Conversation::default() })
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
    let example = encode(&encoder, &row);
    assert_eq!(trained(&encoder, &example), "yes$no$");
    // The first trained token is predicted at the last token of the assistant's header.
    let first = example.targets.iter().position(|&target| target != IGNORE).unwrap();
    assert_eq!(encoder.vocabulary.decode(&example.tokens[first..=first]).unwrap(), "\n");
}

#[test]
fn a_template_without_end_token_gets_one_after_the_answer() {
    let template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}\
        {% if add_generation_prompt %}assistant: {% endif %}";
    let encoder = encoder_with(template);
    let example = encode(&encoder, &chat(&[("user", "hi"), ("assistant", "yes")]));
    assert_eq!(trained(&encoder, &example), "yes\n$");
}

#[test]
fn an_end_token_outside_the_generation_tags_is_trained_after_every_turn() {
    let template = "{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' %}{% generation %}{{ m.content }}\
        {% endgeneration %}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}";
    let encoder = encoder_with(template);
    let row = chat(&[("user", "hi"), ("assistant", "yes"), ("user", "sure?"), ("assistant", "no")]);
    let example = encode(&encoder, &row);
    assert_eq!(trained(&encoder, &example), "yes$no$");
    assert_eq!(example.tokens.iter().filter(|&&token| token == EOS).count(), 4, "none is added");
}

#[test]
fn an_answer_that_ends_in_an_end_token_has_another_one_in_a_template_that_marks_more() {
    let template = "{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' %}{% generation %}{{ m.content }}\
        <|im_end|>{% endgeneration %}{% else %}{{ m.content }}{% endif %}\n{% endfor %}\
        {% generation %}<|im_start|>{% endgeneration %}";
    let encoder = encoder_with(template);
    let example = encode(&encoder, &chat(&[("user", "a"), ("assistant", "the end: <|im_end|>")]));
    assert_eq!(trained(&encoder, &example), "the end: $$$", "its own, that of the turn, and one behind the last mark");
}

#[test]
fn an_end_token_is_trained_whether_it_is_the_pad_token_or_there_is_none() {
    for pad_token in [json!("<|im_end|>"), json!("<|endoftext|>"), Value::Null] {
        let encoder = encoder_of(vocabulary(|_, config| config["pad_token"] = pad_token.clone()));
        let example = encode(&encoder, &chat(&[("user", "hi"), ("assistant", "yes")]));
        assert_eq!(trained(&encoder, &example), "yes$", "pad_token {pad_token}");
        let text = encode(&encoder, &Row::Text("abc".into()));
        assert_eq!(trained(&encoder, &text), "bc$", "pad_token {pad_token}");
    }
}

#[test]
fn a_template_of_the_job_replaces_the_one_of_the_model() {
    let folder = tempfile::tempdir().unwrap();
    tiny_model::write(folder.path()).unwrap();
    let load = |template| Vocabulary::load(folder.path(), Some(template));
    let encoder = encoder_of(load("{% for m in messages %}[{{ m.content }}]{{ eos_token }}{% endfor %}").unwrap());
    let example = encode(&encoder, &chat(&[("user", "hi"), ("assistant", "yes")]));
    assert_eq!(encoder.vocabulary.decode(&example.tokens).unwrap(), "[hi][yes]");
    assert_eq!(trained(&encoder, &example), "[yes]$");
    let error = load("{% for %}").err().unwrap().to_string();
    assert!(error.starts_with("dataset.chatTemplate: the chat template can't be read"), "{error}");
}

#[test]
fn every_token_is_trained_when_the_user_asks_for_that() {
    let encoder = Encoder { assistant_only: false, ..encoder(1024) };
    let example = encode(&encoder, &chat(&[("user", "hi"), ("assistant", "yes")]));
    assert_eq!(example.trained_tokens(), example.tokens.len() - 1);
    assert_eq!(example.tokens.iter().filter(|&&token| token == EOS).count(), 2, "no third end token");
}

#[test]
fn a_completion_is_trained_and_its_prompt_is_not() {
    let encoder = encoder(1024);
    let row = Row::PromptCompletion { prompt: "2 + 2 =".into(), completion: " 4".into() };
    assert_eq!(trained(&encoder, &encode(&encoder, &row)), " 4$");
    let text = encode(&encoder, &Row::Text("abc".into()));
    assert_eq!(trained(&encoder, &text), "bc$", "the first token has nothing to be predicted from");
}

#[test]
fn of_a_prompt_in_turns_only_what_the_assistant_completes_is_trained() {
    let after = |prompt: &[(&str, &str)], completion: &[(&str, &str)]| {
        let turns = messages(&[prompt, completion].concat());
        Row::Conversation(Conversation { turns, given: prompt.len(), ..Conversation::default() })
    };
    let prompt = [("user", "hi"), ("assistant", "yes"), ("user", "sure?")];
    let row = after(&prompt, &[("assistant", "no")]);
    let whole = chat(&[("user", "hi"), ("assistant", "yes"), ("user", "sure?"), ("assistant", "no")]);
    let assistant_only = encoder(1024);
    let example = encode(&assistant_only, &row);
    assert_eq!(trained(&assistant_only, &example), "no$");
    assert_eq!(example.tokens, encode(&assistant_only, &whole).tokens);
    let all = Encoder { assistant_only: false, ..encoder(1024) };
    assert_eq!(encode(&all, &row), encode(&all, &whole));
    let error = assistant_only.encode(&after(&prompt, &prompt[..1]), &mut Notes::default()).unwrap_err();
    assert_eq!(error, "no assistant turn, nothing to train on (completion[].role)");
}

#[test]
fn alpaca_is_a_conversation_where_there_is_a_template_and_stanfords_words_where_there_is_none() {
    let row = |input: &str| {
        Row::Alpaca(Alpaca { instruction: "Add.".into(), input: input.into(), output: "4".into(), ..Alpaca::default() })
    };
    let with_template = encoder(1024);
    for (input, user) in [("2, 2", "Add.\n\n2, 2"), ("", "Add.")] {
        let expected = encode(&with_template, &chat(&[("user", user), ("assistant", "4")]));
        assert_eq!(encode(&with_template, &row(input)), expected);
    }
    let without = encoder_of(vocabulary(|_, config| config["chat_template"] = Value::Null));
    for (input, expected) in [
        (
            "2, 2",
            "Below is an instruction that describes a task, paired with an input that provides further context. Write a \
             response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n2, 2\n\n\
             ### Response:\n4",
        ),
        (
            "",
            "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n\
             ### Instruction:\nAdd.\n\n### Response:\n4",
        ),
    ] {
        let example = encode(&without, &row(input));
        assert_eq!(without.vocabulary.decode(&example.tokens).unwrap(), expected);
        assert_eq!(trained(&without, &example), "4$");
    }
}

#[test]
fn every_token_of_a_prompt_and_its_completion_is_trained_when_the_user_asks_for_that() {
    let encoder = Encoder { assistant_only: false, ..encoder(1024) };
    let row = Row::PromptCompletion { prompt: "2 + 2 =".into(), completion: " 4".into() };
    assert_eq!(trained(&encoder, &encode(&encoder, &row)), " + 2 = 4$", "all but the first token");
}

#[test]
fn there_is_one_bos_whoever_adds_it() {
    let encoder = encoder_of(vocabulary(add_bos));
    let bos = |row: &Row| encode(&encoder, row).tokens.iter().take_while(|&&token| token == BOS).count();
    assert_eq!(bos(&Row::Text("abc".into())), 1, "the tokenizer adds it");
    assert_eq!(bos(&Row::Text("<|im_start|>abc".into())), 1, "the text has it, and the tokenizer adds it");
    assert_eq!(bos(&chat(&[("user", "a"), ("assistant", "b")])), 1, "the template has it");
}

#[test]
fn a_row_whose_answer_is_cut_off_is_refused_with_advice() {
    let error = encoder(40)
        .encode(&chat(&[("user", &"a".repeat(100)), ("assistant", "yes")]), &mut Notes::default())
        .unwrap_err();
    assert!(error.contains("first 40 tokens") && error.contains("training.maxLength"), "{error}");
    let example = encode(&encoder(40), &chat(&[("user", "a"), ("assistant", &"yes".repeat(30))]));
    assert!(example.truncated && example.tokens.len() == 40);
    assert_eq!(example.targets.last(), Some(&IGNORE));
}

#[test]
fn a_row_that_is_too_long_is_truncated_dropped_or_refused_as_the_user_says() {
    let long = chat(&[("user", "a"), ("assistant", &"yes".repeat(30))]);
    let short = chat(&[("user", "a"), ("assistant", "b")]);
    let answer_cut_off = chat(&[("user", &"a".repeat(100)), ("assistant", "yes")]);
    let dropping = Encoder { overflow: Overflow::Drop, ..encoder(60) };
    assert_eq!(dropping.encode(&long, &mut Notes::default()).unwrap(), None);
    assert_eq!(
        dropping.encode(&answer_cut_off, &mut Notes::default()).unwrap(),
        None,
        "dropped before anyone asks what it teaches"
    );
    assert!(!encode(&dropping, &short).truncated);
    let refusing = Encoder { overflow: Overflow::Error, ..encoder(60) };
    let error = refusing.encode(&long, &mut Notes::default()).unwrap_err();
    assert!(error.starts_with("has ") && error.contains("training.maxLength is 60"), "{error}");
    assert_eq!(encode(&refusing, &short), encode(&encoder(60), &short));
}

#[test]
fn a_conversation_without_an_assistant_teaches_nothing() {
    let error = encoder(1024).encode(&chat(&[("user", "hi")]), &mut Notes::default()).unwrap_err();
    assert_eq!(error, "no assistant turn, nothing to train on (messages[].role)");
    let excluded = "the row excludes each of the assistant's turns (weight: 0, train: false, …): nothing to train on";
    let turns = json!([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes", "train": false}]);
    let columns = Columns::from_iter([("messages".to_owned(), turns)]);
    let row = parse(DataFormat::Messages, columns, &mut Notes::default()).unwrap();
    assert_eq!(encoder(1024).encode(&row, &mut Notes::default()).unwrap_err(), excluded);
}

#[test]
fn a_model_without_an_end_token_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    tiny_model::write(folder.path()).unwrap();
    std::fs::write(folder.path().join("tokenizer_config.json"), "{}").unwrap();
    let load = |folder: &Path| Vocabulary::load(folder, None).err().unwrap().to_string();
    assert!(load(folder.path()).contains("eos_token"));
}

proptest! {
    #[test]
    fn what_is_trained_is_exactly_what_the_assistant_says(
        turns in prop::collection::vec(("[a-zé☕ 0-9\n<>|]{1,12}", "[a-zé☕ 0-9\n<>|]{1,12}"), 1..4),
    ) {
        let encoder = encoder(4096);
        let messages = turns.iter().flat_map(|(user, assistant)| [("user", user.as_str()), ("assistant", assistant)]);
        let example = encode(&encoder, &chat(&messages.collect::<Vec<_>>()));
        let said: String = turns.iter().map(|(_, assistant)| format!("{assistant}<|im_end|>")).collect();
        let bytes = said.replace("<|im_end|>", "$").len();
        // Every byte is a token here, so tokens can be counted without decoding half a character.
        prop_assert_eq!(example.trained_tokens(), bytes);
        let shifted = example.tokens.iter().skip(1).zip(&example.targets);
        prop_assert!(shifted.into_iter().all(|(next, target)| *target == IGNORE || next == target));
    }
}
