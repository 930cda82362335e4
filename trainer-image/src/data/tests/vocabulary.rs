//! What a tokenizer's files say, and what of it is taken: as transformers reads them.

use std::path::Path;

use serde_json::{Value, json};

use super::{EOS, encode, encoder_of, trained, vocabulary};
use crate::{
    data::{formats::Row, vocabulary::Vocabulary},
    tiny_model,
};

/// The tiny model's folder after a change to it.
fn folder(change: impl FnOnce(&Path)) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    tiny_model::write(folder.path()).unwrap();
    change(folder.path());
    folder
}

fn edit(folder: &Path, name: &str, change: impl FnOnce(&mut Value)) {
    let path = folder.join(name);
    let mut json = std::fs::read(&path).map_or(json!({}), |text| serde_json::from_slice(&text).unwrap());
    change(&mut json);
    std::fs::write(path, json.to_string()).unwrap();
}

fn load(folder: &tempfile::TempDir) -> Result<Vocabulary, String> {
    Vocabulary::load(folder.path(), None).map_err(|error| error.to_string())
}

#[test]
fn truncation_and_padding_that_a_tokenizer_was_saved_with_are_off() {
    let truncation = json!({"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0});
    let padding = json!({"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0,
                         "pad_type_id": 0, "pad_token": "<|endoftext|>"});
    let saved = vocabulary(|tokenizer, _| {
        (tokenizer["truncation"], tokenizer["padding"]) = (truncation, padding);
    });
    let plain = vocabulary(|_, _| {});
    let text = "a text of more than four tokens";
    assert_eq!(saved.text(text).unwrap(), plain.text(text).unwrap());
    assert_eq!(saved.prompt(None, text).unwrap(), plain.prompt(None, text).unwrap());
}

#[test]
fn a_special_token_that_is_no_text_is_refused_by_name() {
    for token in [json!(5), json!(["a"]), json!({"lstrip": true}), json!(true)] {
        let folder = folder(|folder| edit(folder, "tokenizer_config.json", |json| json["bos_token"] = token.clone()));
        let expected =
            format!("tokenizer_config.json: bos_token is {token}; expected a text, or an object with content");
        assert!(load(&folder).err().unwrap().contains(&expected));
    }
    let folder = folder(|folder| edit(folder, "tokenizer_config.json", |json| json["pad_token"] = Value::Null));
    load(&folder).unwrap();
}

#[test]
fn a_tokenizer_that_would_draw_lots_is_refused() {
    let folder = folder(|folder| edit(folder, "tokenizer.json", |json| json["model"]["dropout"] = json!(0.1)));
    assert!(load(&folder).err().unwrap().contains("model.dropout 0.1"));
}

#[test]
fn tokens_that_only_tokenizer_config_adds_are_tokens() {
    let token = |content: &str, special: bool| json!({"content": content, "lstrip": false, "rstrip": false, "single_word": false, "normalized": !special, "special": special});
    for (config, is_special) in [
        (json!({"added_tokens_decoder": {"259": token("<tool>", false)}}), false),
        (json!({"added_tokens_decoder": {"259": token("<tool>", true)}}), true),
        (json!({"extra_special_tokens": ["<tool>"]}), true),
        (json!({"extra_special_tokens": {"tool_token": "<tool>"}}), true),
        (json!({"additional_special_tokens": [token("<tool>", true)]}), true),
        (json!({"tool_token": "<tool>"}), true),
        (json!({"sep_token": "<tool>"}), true),
    ] {
        let folder = folder(|folder| {
            edit(folder, "tokenizer_config.json", |json| {
                json.as_object_mut().unwrap().extend(config.as_object().unwrap().clone())
            });
        });
        let vocabulary = load(&folder).unwrap();
        assert_eq!(vocabulary.text("<tool>").unwrap(), [259], "{config}");
        assert_eq!(vocabulary.decode(&[259]).unwrap().is_empty(), is_special, "{config}");
        assert!(vocabulary.warnings().is_empty());
    }
    let legacy = folder(|folder| edit(folder, "added_tokens.json", |json| *json = json!({"<tool>": 259})));
    assert_eq!(load(&legacy).unwrap().text("<tool>").unwrap(), [259]);
    let elsewhere = json!({"added_tokens_decoder": {"300": token("<tool>", false)}});
    let moved = folder(|folder| {
        edit(folder, "tokenizer_config.json", |json| {
            json.as_object_mut().unwrap().extend(elsewhere.as_object().unwrap().clone())
        });
    });
    let warnings = load(&moved).unwrap().warnings();
    assert!(warnings[0].contains("token 300") && warnings[0].contains("259"), "{warnings:?}");
}

#[test]
fn an_end_token_that_is_only_a_word_of_the_vocabulary_is_one_token() {
    let vocabulary = vocabulary(|tokenizer, config| {
        tokenizer["model"]["vocab"]["</s>"] = json!(259);
        config["eos_token"] = json!("</s>");
    });
    assert_eq!(vocabulary.text("a</s>").unwrap().last(), Some(&259));
    assert_eq!(vocabulary.eos(), 259);
}

#[test]
fn an_end_token_may_stand_in_special_tokens_map_alone() {
    let folder = folder(|folder| {
        edit(folder, "tokenizer_config.json", |json| drop(json.as_object_mut().unwrap().remove("eos_token")));
        edit(folder, "special_tokens_map.json", |json| json["eos_token"] = json!({"content": "<|im_end|>"}));
    });
    assert_eq!(load(&folder).unwrap().eos(), EOS);
}

#[test]
fn a_file_that_can_not_be_read_is_another_thing_than_none() {
    for name in ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "generation_config.json"] {
        let folder = folder(|folder| std::fs::write(folder.join(name), "{\"eos").unwrap());
        assert!(load(&folder).err().unwrap().starts_with(&format!("{name}: not valid JSON")), "{name}");
    }
}

#[test]
fn special_tokens_that_a_model_lacks_are_undefined_in_its_template() {
    for bos in [Value::Null, json!("<|im_start|>")] {
        let vocabulary = vocabulary(|_, config| {
            config["bos_token"] = bos.clone();
            config["chat_template"] =
                json!("{{ bos_token }}{{ messages[0].content }}{{ 'x' if bos_token is defined }}");
        });
        let expected = if bos.is_null() { "a" } else { "<|im_start|>ax" };
        assert_eq!(vocabulary.decode_with_specials(&vocabulary.prompt(None, "a").unwrap()).unwrap(), expected);
    }
}

#[test]
fn tokenizer_config_says_whether_texts_have_a_beginning_and_an_end() {
    let tokens = |bos: Value, eos: Value| {
        vocabulary(|_, config| (config["add_bos_token"], config["add_eos_token"]) = (bos, eos)).text("a").unwrap().len()
    };
    assert_eq!(tokens(json!(true), Value::Null), 2);
    assert_eq!(tokens(json!(false), json!(false)), 1);
    assert_eq!(tokens(Value::Null, json!(true)), 1, "the end is put there once, by the row");
}

#[test]
fn the_end_tokens_of_generation_end_turns_too() {
    let folder = folder(|folder| {
        edit(folder, "generation_config.json", |json| json["eos_token_id"] = json!([2, 0]));
        edit(folder, "tokenizer_config.json", |json| {
            let template = "{% for m in messages %}{{ m.role }}:{{ m.content }}<|endoftext|>\n{% endfor %}\
                {% if add_generation_prompt %}assistant:{% endif %}";
            json["chat_template"] = json!(template);
        });
    });
    let encoder = encoder_of(load(&folder).unwrap());
    assert_eq!(encoder.vocabulary.stops(), [2, 0]);
    let row = super::chat(&[("user", "a"), ("assistant", "I <|im_end|> here")]);
    let example = encode(&encoder, &row);
    assert_eq!(trained(&encoder, &example), "I $ here", "its own end token has no text, and nothing follows it");
    assert_eq!(example.targets.iter().rev().find(|&&target| target != super::IGNORE), Some(&0));
}

#[test]
fn without_generation_config_the_end_tokens_are_those_of_config() {
    let folder = folder(|folder| edit(folder, "config.json", |json| json["eos_token_id"] = json!([2, 0])));
    assert_eq!(load(&folder).unwrap().stops(), [2, 0]);
}

#[test]
fn only_an_end_token_that_the_tokenizer_adds_is_taken_off() {
    let ending = json!({
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<|im_end|>", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|im_end|>": {"id": "<|im_end|>", "ids": [2], "tokens": ["<|im_end|>"]}},
    });
    for post_processor in [Value::Null, ending] {
        let encoder = encoder_of(vocabulary(|tokenizer, _| tokenizer["post_processor"] = post_processor.clone()));
        assert_eq!(encoder.vocabulary.text("a<|im_end|>").unwrap().last(), Some(&EOS));
        assert_ne!(encoder.vocabulary.text("a").unwrap().last(), Some(&EOS));
        let row = Row::PromptCompletion { prompt: "a<|im_end|>".into(), completion: "b".into() };
        let example = encode(&encoder, &row);
        assert_eq!(example.tokens.iter().filter(|&&token| token == EOS).count(), 2, "the prompt keeps its own");
        assert_eq!(trained(&encoder, &example), "b$");
    }
}

#[test]
fn markers_of_the_jobs_template_that_are_no_tokens_are_named() {
    let folder = folder(|_| {});
    let template = "{% for m in messages %}{{ '<|start|>' + m['role'] }}[INST]{{ m.content }}<|im_end|><turn_end>{% endfor %}\
        {% if messages[0]['role'] < 3 and 4 > 2 %}{% endif %}";
    let vocabulary = Vocabulary::load(folder.path(), Some(template)).unwrap();
    let warnings = vocabulary.warnings();
    assert!(warnings[0].contains("writes <turn_end>, <|start|>, [INST], which"), "{warnings:?}");
    assert!(load(&folder).unwrap().warnings().is_empty());
}

#[test]
fn a_date_in_the_template_is_told_unless_the_job_pins_it() {
    use crate::data::template::TemplateDate::{OfRun, Pinned};
    let folder = folder(|folder| {
        edit(folder, "tokenizer_config.json", |json| {
            json["chat_template"] = json!("{{ strftime_now('%d %b') }} {{ messages[0].content }}")
        });
    });
    let day = chrono::NaiveDate::from_ymd_opt(2026, 11, 27).unwrap();
    for (date, warnings) in [(OfRun(day), 1), (Pinned(day), 0)] {
        let vocabulary = Vocabulary::load_on(folder.path(), None, date).unwrap();
        assert!(vocabulary.warnings().is_empty(), "nothing is written yet");
        assert_eq!(vocabulary.decode(&vocabulary.prompt(None, "a").unwrap()).unwrap(), "27 Nov a");
        assert_eq!(vocabulary.warnings().len(), warnings);
    }
}
