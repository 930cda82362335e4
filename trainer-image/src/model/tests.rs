//! Model folders of all kinds: what is read, what is refused, and in which words.

mod gguf;

use std::{collections::BTreeMap, fs, os::unix::fs::symlink};

use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::runtime::Runtime;
use tunesmith_crds::names::exit_code;

use super::*;
use crate::{error::Error, json_file::read_json, tiny_model};

/// Types, shapes and bytes of tensors, by name.
type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

/// A folder with a tiny model, and stores to read it from.
struct Bench {
    folder: TempDir,
    runtime: Runtime,
}

impl Bench {
    fn new() -> Self {
        let bench = Self { folder: tempfile::tempdir().unwrap(), runtime: Runtime::new().unwrap() };
        tiny_model::write(&bench.model()).unwrap();
        bench
    }

    fn model(&self) -> PathBuf {
        self.folder.path().join("store/models/tiny")
    }

    fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> &Self {
        let path = self.model().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
        self
    }

    fn remove(&self, name: &str) -> &Self {
        fs::remove_file(self.model().join(name)).unwrap();
        self
    }

    fn tensors(&self) -> Tensors {
        let bytes = fs::read(self.model().join(WEIGHTS)).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let tensor = |(name, view): (&str, TensorView<'_>)| {
            (name.to_owned(), (view.dtype(), view.shape().to_vec(), view.data().to_vec()))
        };
        tensors.iter().map(tensor).collect()
    }

    fn write_tensors(&self, file: &str, tensors: &Tensors) -> &Self {
        let views = tensors.iter().map(|(name, (dtype, shape, bytes))| {
            (name.as_str(), TensorView::new(*dtype, shape.clone(), bytes).unwrap())
        });
        self.write(file, safetensors::serialize(views, None).unwrap())
    }

    /// The weights in two shards, the first of which has one tensor.
    fn shard(&self) -> &Self {
        let mut first = self.tensors();
        let second = first.split_off("model.embed_tokens.weight\0");
        let in_file = |file: &'static str| move |name: &String| (name.clone(), Value::from(file));
        let map: serde_json::Map<_, _> =
            first.keys().map(in_file("a.safetensors")).chain(second.keys().map(in_file("b.safetensors"))).collect();
        self.write_tensors("a.safetensors", &first).write_tensors("b.safetensors", &second).remove(WEIGHTS);
        self.write(INDEX, json!({"weight_map": map}).to_string())
    }

    /// The same with these fields of `config.json` in place of its own.
    fn configure(&self, changes: Value) -> &Self {
        let mut config = read_json(&self.model().join("config.json")).unwrap();
        config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        self.write("config.json", config.to_string())
    }

    fn fetch(&self, uri: &str) -> Result<ModelFolder, Error> {
        let stores =
            Stores::from_environment(self.runtime.handle().clone()).or_local(&self.folder.path().join("store"));
        Ok(ModelFolder::fetch(&uri.parse().unwrap(), &stores, &self.folder.path().join("work"))?)
    }

    fn load(&self) -> ModelFolder {
        self.fetch("s3://models/tiny").unwrap_or_else(|error| panic!("{error}"))
    }

    /// It is refused for good, from any place, in words that hold each of `parts`.
    #[track_caller]
    fn refused(&self, parts: &[&str]) {
        for uri in ["s3://models/tiny".to_owned(), format!("file://{}", self.model().display())] {
            let error = self.fetch(&uri).map(drop).unwrap_err();
            let message = error.to_string();
            assert_eq!(error.exit_code(), exit_code::BAD_INPUT, "{message}");
            assert!(!message.contains("disk"), "{message}");
            for part in parts {
                assert!(message.contains(part), "{part}: {message}");
            }
        }
    }
}

#[test]
fn tensors_that_are_not_used_may_be_anything() {
    let bench = Bench::new();
    let before = bench.load().shape;
    let mut tensors = bench.tensors();
    tensors.insert("model.layers.0.self_attn.rotary_emb.inv_freq".into(), (Dtype::F32, vec![1], vec![0xff; 4]));
    tensors.insert("position_ids".into(), (Dtype::I64, vec![2048], vec![0; 8 * 2048]));
    tensors.insert("causal_mask".into(), (Dtype::BOOL, vec![64, 2048], vec![0; 64 * 2048]));
    bench.write_tensors(WEIGHTS, &tensors);
    let after = bench.load();
    assert_eq!(after.shape.bytes_per_parameter, before.bytes_per_parameter);
    tunesmith_engine::Model::load(&after.folder).unwrap();
}

#[test]
fn tensors_that_the_configuration_has_no_place_for_are_named() {
    let bench = Bench::new();
    let mut tensors = bench.tensors();
    for name in ["model.layers.0.self_attn.rotary_emb.inv_freq", "lm_head.weight"] {
        let same = tensors["model.embed_tokens.weight"].clone();
        tensors.insert(name.into(), same);
    }
    assert_eq!(bench.write_tensors(WEIGHTS, &tensors).load().warnings, Vec::<String>::new());
    for name in ["model.layers.0.self_attn.q_proj.bias", "model.layers.7.input_layernorm.weight", "v_head.weight", "z"]
    {
        tensors.insert(name.into(), (Dtype::F32, vec![1], vec![0; 4]));
    }
    assert_eq!(
        bench.write_tensors(WEIGHTS, &tensors).load().warnings,
        ["the model's files hold 4 tensors that its config.json has no place for, and that are not used: \
          model.layers.0.self_attn.q_proj.bias, model.layers.7.input_layernorm.weight, v_head.weight, …"]
    );
}

#[test]
fn an_adapter_beside_a_whole_model_is_refused() {
    let bench = Bench::new();
    bench.write("adapter_config.json", "{}");
    bench.refused(&["adapter_config.json", "merge"]);
}

#[test]
fn the_template_for_tools_is_used_and_part_of_the_digest() {
    let bench = Bench::new();
    let without = bench.load().digest;
    let tools = "additional_chat_templates/tool_use.jinja";
    bench.write(tools, "{{ tools | length }}{% for m in messages %}{{ m.content }}{% endfor %}");
    assert_ne!(bench.load().digest, without);
    assert!(copied_in(&bench.model()).contains(&tools.to_owned()));
    bench.write("additional_chat_templates/rag.jinja", "x");
    let with = bench.load().digest;
    bench.write("additional_chat_templates/rag.jinja", "y");
    assert_eq!(bench.load().digest, with);
}

#[test]
fn tensors_that_are_used_are_checked_as_loading_checks_them() {
    const NORM: &str = "model.norm.weight";
    let damaged = |change: &dyn Fn(&mut Tensors)| {
        let bench = Bench::new();
        let mut tensors = bench.tensors();
        change(&mut tensors);
        bench.write_tensors(WEIGHTS, &tensors);
        bench
    };
    damaged(&|tensors| drop(tensors.remove(NORM))).refused(&["model.norm.weight is missing; expected shape [32]"]);
    damaged(&|tensors| {
        tensors.insert(NORM.into(), (Dtype::F32, vec![16], vec![0; 64]));
    })
    .refused(&["model.norm.weight has shape [16]; config.json asks for [32]"]);
    damaged(&|tensors| {
        tensors.insert(NORM.into(), (Dtype::I64, vec![32], vec![0; 256]));
    })
    .refused(&["model.norm.weight has dtype I64; supported: F32, F16, BF16"]);
    for bytes in [f32::NAN, f32::INFINITY].map(f32::to_le_bytes) {
        damaged(&|tensors| tensors.get_mut(NORM).unwrap().2[..4].copy_from_slice(&bytes)).refused(&[
            "tiny/model.safetensors",
            "NaN or infinite values in model.norm.weight",
            "convert the model again",
        ]);
    }
    // An output layer of its own is used, although the configuration ties it.
    damaged(&|tensors| {
        let (dtype, shape, _) = &tensors["model.embed_tokens.weight"];
        let nan = f32::NAN.to_le_bytes().repeat(shape.iter().product());
        let output = (*dtype, shape.clone(), nan);
        tensors.insert("lm_head.weight".into(), output);
    })
    .refused(&["NaN or infinite values in lm_head.weight"]);
}

#[test]
fn scales_and_floats_of_a_base_in_few_bits_must_be_finite_and_codes_are_any_bytes() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../engine/tests/fixtures/quantized");
    for (kind, scales) in
        [("nf4", "q_proj.weight.nested_absmax"), ("fp4_as_bf16", "q_proj.weight.absmax"), ("int8", "q_proj.SCB")]
    {
        let bench = Bench::new();
        for file in ["config.json", WEIGHTS] {
            bench.write(file, fs::read(fixtures.join(kind).join(file)).unwrap());
        }
        bench.load();
        let mut tensors = bench.tensors();
        let codes = tensors.get_mut("model.layers.0.self_attn.q_proj.weight").unwrap();
        codes.2.fill(0xff);
        bench.write_tensors(WEIGHTS, &tensors);
        bench.load();
        let name = format!("model.layers.0.self_attn.{scales}");
        let (dtype, _, bytes) = tensors.get_mut(&name).unwrap_or_else(|| panic!("{kind} has {name}"));
        assert_eq!(*dtype, Dtype::F32);
        bytes[..4].copy_from_slice(&f32::NAN.to_le_bytes());
        bench.write_tensors(WEIGHTS, &tensors).refused(&["NaN or infinite values in", &name]);
    }
}

#[test]
fn weights_in_few_bits_must_be_what_the_configuration_says() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../engine/tests/fixtures/quantized");
    let bench = Bench::new();
    for file in ["config.json", WEIGHTS] {
        bench.write(file, fs::read(fixtures.join("nf4").join(file)).unwrap());
    }
    bench.configure(json!({"quantization_config": null}));
    bench.refused(&["is stored in few bits, and config.json has no quantization_config"]);
    let fp4 = json!({"quant_method": "bitsandbytes", "load_in_4bit": true, "bnb_4bit_quant_type": "fp4"});
    bench
        .configure(json!({"quantization_config": fp4}))
        .refused(&["is not stored as fp4, as quantization_config says"]);
}

#[test]
fn shards_are_all_there_and_hold_what_the_index_says() {
    let bench = Bench::new();
    let parameters = bench.load().shape.parameters;
    assert_eq!(bench.shard().load().shape.parameters, parameters);
    let index = fs::read_to_string(bench.model().join(INDEX)).unwrap();
    let with_absent = index.replacen("{\"weight_map\":{", "{\"weight_map\":{\"absent\":\"a.safetensors\",", 1);
    bench.write(INDEX, with_absent).refused(&["says that absent is in a.safetensors, which does not hold it"]);
    bench.write(INDEX, index.replace("b.safetensors", "a.safetensors")).refused(&["which does not hold it"]);
    bench.write(INDEX, format!("\u{feff}{index}")).load();
    bench.write(INDEX, &index);
    let b = fs::read(bench.model().join("b.safetensors")).unwrap();
    bench.write("a.safetensors", &b).refused(&["says that model.embed_tokens.weight is in a.safetensors"]);

    let bench = Bench::new();
    bench.shard().remove("b.safetensors");
    bench.refused(&["weight_map names 2 files, and 1 of them are missing (b.safetensors): upload them, too"]);
    bench.write("b.safetensors/part", "x").refused(&["1 of them are missing (b.safetensors)"]);
    bench
        .write(INDEX, r#"{"weight_map": {"a": 1}}"#)
        .refused(&["weight_map names 1 for a; expected the name of a file"]);
    bench.write(INDEX, r#"{"weight_map": {"a": "../x.safetensors"}}"#).refused(&["no safetensors file of this folder"]);
    bench.write(INDEX, "{}").refused(&["has no weight_map"]);
}

#[test]
fn what_is_no_whole_file_is_refused_for_good_and_says_so() {
    const POINTER: &str = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 2471645608\n";
    for name in ["config.json", "tokenizer.json", "tokenizer_config.json", WEIGHTS] {
        Bench::new().write(name, "").refused(&[name, "is empty: upload it again"]);
        Bench::new().write(name, POINTER).refused(&[name, "git-lfs", "git lfs pull"]);
        let bench = Bench::new();
        bench.remove(name).write(&format!("{name}/x"), "x");
        bench.refused(&[name, "is a folder there, where a file is meant"]);
        Bench::new().remove(name).refused(&[name, "has no"]);
    }
    for name in OPTIONAL {
        Bench::new().write(name, "").refused(&[name, "is empty"]);
        Bench::new().write(&format!("{name}/x"), "x").refused(&[name, "is a folder there"]);
    }
    Bench::new().write("config.json", "{").refused(&["config.json: not valid JSON"]);
    Bench::new().write("config.json", "[]").refused(&["config.json: not a JSON object"]);
    Bench::new().write("config.json", b"\xff\xfe{\0}\0").refused(&["config.json: not UTF-8 text"]);
    Bench::new().write(WEIGHTS, "<!DOCTYPE html>").refused(&["model.safetensors", "not a safetensors file"]);
}

#[test]
fn a_link_that_leads_nowhere_is_a_missing_file() {
    let bench = Bench::new();
    bench.remove(WEIGHTS);
    symlink("gone", bench.model().join(WEIGHTS)).unwrap();
    bench.refused(&["model.safetensors"]);
}

#[test]
fn a_byte_order_mark_is_skipped() {
    let bench = Bench::new();
    let config = fs::read(bench.model().join("config.json")).unwrap();
    bench.write("config.json", [b"\xef\xbb\xbf", config.as_slice()].concat());
    tunesmith_engine::Model::load(&bench.load().folder).unwrap();
}

#[test]
fn other_things_than_a_model_folder_are_named_with_what_to_do() {
    // Each: what lies in the folder, and what is said.
    let cases: [(&[&str], &[&str]); 16] = [
        (
            &["adapter_config.json", "adapter_model.safetensors", "tokenizer.json"],
            &["it is an adapter", "tunesmith-trainer merge"],
        ),
        (&["model_index.json", "unet/config.json"], &["model_index.json", "a pipeline that makes images"]),
        (
            &["config.json", "tokenizer.model", "tokenizer_config.json", WEIGHTS],
            &["no tokenizer.json, but tokenizer.model", "save_pretrained"],
        ),
        (&["config.json", "vocab.json", "merges.txt", "tokenizer_config.json", WEIGHTS], &["but vocab.json"]),
        (&["config.json", "tokenizer.json", WEIGHTS], &["no tokenizer_config.json: upload tokenizer_config.json"]),
        (&["consolidated.safetensors", "params.json", "tekken.json"], &["Mistral's or Meta's own format"]),
        (&["consolidated.00.pth", "params.json", "tokenizer.model"], &["Mistral's or Meta's own format"]),
        (&["x.Q4_K_M.gguf"], &["but a GGUF file: name that file in baseModel.uri"]),
        (&["x-00001-of-00003.gguf", "x-00002-of-00003.gguf"], &["split in parts", "llama-gguf-split --merge"]),
        (&["config.json", "tokenizer.json", "tokenizer_config.json", "model.onnx"], &["an ONNX model"]),
        (&["config.json", "tokenizer.json", "tokenizer_config.json", "pytorch_model.bin"], &["pickled weights"]),
        (&["config.json", "tokenizer.json", "tokenizer_config.json", "tf_model.h5"], &["weights of TensorFlow"]),
        (
            &["config.json", "tokenizer.json", "tokenizer_config.json", "model-00001-of-00002.safetensors"],
            &["nor model.safetensors.index.json, which names the shards"],
        ),
        (&["model.tar.gz"], &["an archive: unpack it"]),
        (&["model.tgz"], &["an archive: unpack it"]),
        (&["v1/config.json", "v1/tokenizer.json"], &["but v1/ in it does: add that to baseModel.uri"]),
    ];
    for (files, parts) in cases {
        let bench = Bench::new();
        fs::remove_dir_all(bench.model()).unwrap();
        for file in files {
            bench.write(file, "x");
        }
        bench.refused(parts);
    }
    let bench = Bench::new();
    for (uri, part) in [
        (format!("file://{}/model.safetensors", bench.model().display()), "is a file: name the folder"),
        (format!("file://{}/x-00001-of-00002.gguf", bench.model().display()), "split in parts"),
        ("s3://models/none".to_owned(), "no files under s3://models/none"),
    ] {
        let error = bench.fetch(&uri).map(drop).unwrap_err();
        assert!(error.to_string().contains(part), "{error}");
        assert_eq!(error.exit_code(), exit_code::BAD_INPUT);
    }
}

#[test]
fn other_kinds_of_models_are_named() {
    for (changes, parts) in [
        (json!({"quantization_config": {"quant_method": "gptq", "bits": 4}}), ["\"gptq\"", "QLoRA quantizes it"]),
        (json!({"quantization_config": {"quant_method": "mxfp4"}}), ["\"mxfp4\"", "is not quantized"]),
        (json!({"model_type": "gemma3", "text_config": {"hidden_size": 8}}), ["multimodal", "text_config"]),
        (json!({"model_type": "t5", "is_encoder_decoder": true}), ["is_encoder_decoder", "encoder-decoder"]),
        (json!({"attn_logit_softcapping": 50.0}), ["attn_logit_softcapping is 50.0", "config.json"]),
    ] {
        Bench::new().configure(changes).refused(&parts);
    }
}

#[test]
fn what_is_only_copied_is_no_part_of_the_digest_and_comes_with_a_whole_model() {
    let bench = Bench::new();
    let digest = bench.load().digest;
    bench
        .write("tokenizer.model", "pieces")
        .write("merges.txt", "")
        .write("additional_chat_templates/rag.jinja", "{{ x }}");
    bench.write("README.md", "no").write("additional_chat_templates/a/b.jinja", "no");
    let model = bench.load();
    assert_eq!(model.digest, digest);
    // Of this one, tokens depend where an old tokenizer_config.json lacks them.
    bench.write("added_tokens.json", r#"{"<tool>": 258}"#);
    assert_ne!(bench.load().digest, digest);
    bench.remove("added_tokens.json");
    let files = crate::publish::base_files(&model.folder).unwrap();
    let names: Vec<&str> = files.keys().map(String::as_str).collect();
    let expected = [
        "additional_chat_templates/rag.jinja",
        "merges.txt",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    ];
    assert_eq!(names, expected);
    assert_eq!(files["tokenizer.model"], b"pieces");
}

#[test]
fn a_gguf_file_that_is_none_is_refused_for_good() {
    let bench = Bench::new();
    for (bytes, part) in
        [("", "is empty"), ("version https://git-lfs.github.com/spec/v1\n", "git lfs pull"), ("x", "GGUF")]
    {
        bench.write("m.gguf", bytes);
        let error = bench.fetch("s3://models/tiny/m.gguf").map(drop).unwrap_err();
        assert!(error.to_string().contains(part), "{error}");
        assert_eq!(error.exit_code(), exit_code::BAD_INPUT);
    }
    fs::remove_file(bench.model().join("m.gguf")).unwrap();
    fs::create_dir(bench.model().join("m.gguf")).unwrap();
    let error = bench.fetch("s3://models/tiny/m.gguf").map(drop).unwrap_err();
    assert_eq!(error.exit_code(), exit_code::BAD_INPUT, "{error}");
    assert!(error.to_string().contains("is a folder"), "{error}");
}

#[test]
fn a_broken_generation_config_is_not_an_absent_one() {
    use crate::generate::Voice;
    let bench = Bench::new();
    Voice::load(&bench.model()).unwrap();
    for (text, part) in [("{", "not valid JSON"), ("{\"eos_token_id\": \"</s>\"}", "eos_token_id holds \"</s>\"")] {
        bench.write("generation_config.json", text);
        let message = Voice::load(&bench.model()).err().unwrap().to_string();
        assert!(message.contains("generation_config.json") && message.contains(part), "{message}");
    }
    bench.write("generation_config.json", "\u{feff}{\"eos_token_id\": [1, 2]}");
    Voice::load(&bench.model()).unwrap();
}

#[test]
fn weights_in_few_bits_are_counted_by_what_they_stand_for() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../engine/tests/fixtures");
    let shape = |name: &str| {
        let folder = fixtures.join(name);
        let (config, tensors) = (ModelConfig::load(&folder).unwrap(), header(&folder.join(WEIGHTS)).unwrap());
        weights::check(&folder, &config).unwrap();
        shape(&config, &tensors)
    };
    let float = shape("tied/model");
    for name in ["quantized/nf4", "quantized/fp4", "quantized/int8"] {
        let stored = shape(name);
        let kind = stored.stored_as.map(|stored| serde_json::to_value(stored.kind).unwrap());
        assert_eq!(kind.unwrap(), name.rsplit('/').next().unwrap());
        assert_eq!(stored.parameters, float.parameters, "{name}");
        assert!(stored.bytes_per_parameter < float.bytes_per_parameter, "{name}");
    }
}
