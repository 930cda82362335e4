//! A small GGUF file, written with candle, goes through the whole conversion.

use std::{
    fs,
    io::Cursor,
    path::{Path, PathBuf},
};

use candle_core::{
    DType, Device, Tensor,
    quantized::{
        GgmlDType, QTensor,
        gguf_file::{Value, write},
    },
};
use safetensors::SafeTensors;
use serde_json::{Value as Json, json};
use tunesmith_engine::{Model, ModelConfig};

use super::{Gguf, convert};
use crate::{data::vocabulary::Vocabulary, model::ModelFolder, store::Stores};

const HIDDEN: usize = 32;

pub(crate) fn metadata() -> Vec<(&'static str, Value)> {
    let texts = |texts: &[&str]| Value::Array(texts.iter().map(|text| Value::String((*text).into())).collect());
    let tokens = ["<|eos|>", "a", "b", "ab", "1"];
    vec![
        ("general.architecture", Value::String("llama".into())),
        ("llama.block_count", Value::U32(1)),
        ("llama.context_length", Value::U32(64)),
        ("llama.embedding_length", Value::U32(HIDDEN as u32)),
        ("llama.feed_forward_length", Value::U32(64)),
        ("llama.attention.head_count", Value::U32(4)),
        ("llama.attention.head_count_kv", Value::U32(2)),
        ("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5)),
        ("tokenizer.ggml.model", Value::String("gpt2".into())),
        ("tokenizer.ggml.pre", Value::String("smollm".into())),
        ("tokenizer.ggml.tokens", texts(&tokens)),
        ("tokenizer.ggml.token_type", Value::Array([3, 1, 1, 1, 1].map(Value::I32).into())),
        ("tokenizer.ggml.merges", texts(&["a b"])),
        ("tokenizer.ggml.eos_token_id", Value::U32(0)),
    ]
}

pub(crate) fn tensors() -> Vec<(&'static str, Vec<usize>)> {
    vec![
        ("token_embd.weight", vec![5, HIDDEN]),
        ("output_norm.weight", vec![HIDDEN]),
        ("blk.0.attn_norm.weight", vec![HIDDEN]),
        ("blk.0.attn_q.weight", vec![HIDDEN, HIDDEN]),
        ("blk.0.attn_k.weight", vec![HIDDEN / 2, HIDDEN]),
        ("blk.0.attn_v.weight", vec![HIDDEN / 2, HIDDEN]),
        ("blk.0.attn_output.weight", vec![HIDDEN, HIDDEN]),
        ("blk.0.ffn_norm.weight", vec![HIDDEN]),
        ("blk.0.ffn_gate.weight", vec![64, HIDDEN]),
        ("blk.0.ffn_up.weight", vec![64, HIDDEN]),
        ("blk.0.ffn_down.weight", vec![HIDDEN, 64]),
    ]
}

pub(crate) fn gguf(metadata: &[(&str, Value)], tensors: &[(&str, Vec<usize>)]) -> Vec<u8> {
    let tensor = |name: &str, shape: &Vec<usize>| {
        // Divisors are above 0.
        let (low, high) = if name.starts_with("rope_factors") { (1.0, 2.0) } else { (-1.0, 1.0) };
        let values =
            Tensor::rand(low, high, shape.as_slice(), &Device::Cpu).and_then(|x| x.to_dtype(DType::F32)).unwrap();
        QTensor::quantize(&values, if shape.len() == 1 { GgmlDType::F32 } else { GgmlDType::Q4_1 }).unwrap()
    };
    let tensors: Vec<_> = tensors.iter().map(|(name, shape)| (*name, tensor(name, shape))).collect();
    let mut file = Cursor::new(Vec::new());
    let metadata: Vec<_> = metadata.iter().map(|(key, value)| (*key, value)).collect();
    write(&mut file, &metadata, &tensors.iter().map(|(name, tensor)| (*name, tensor)).collect::<Vec<_>>()).unwrap();
    file.into_inner()
}

fn convert_bytes(bytes: &[u8], folder: &Path) -> Result<(), String> {
    let file = folder.join("model.gguf");
    fs::write(&file, bytes).unwrap();
    convert(&file, &folder.join("out")).map_err(|error| error.to_string())
}

#[test]
fn a_converted_model_loads_with_its_tokenizer() {
    let folder = tempfile::tempdir().unwrap();
    convert_bytes(&gguf(&metadata(), &tensors()), folder.path()).unwrap();
    let model = Model::load(&folder.path().join("out")).unwrap();
    assert!(model.config().tie_word_embeddings);
    let vocabulary = Vocabulary::load(&folder.path().join("out"), None).unwrap();
    assert_eq!(vocabulary.text("ab11b").unwrap(), [3, 4, 4, 2], "digits stand alone, merges apply");
    assert_eq!(vocabulary.eos(), 0);
    let error = convert_bytes(&gguf(&metadata(), &tensors()), folder.path()).unwrap_err();
    assert!(error.contains("exists already"), "{error}");
}

/// A file that `e2e/oracle/gguf_files.py` wrote.
pub(crate) fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/gguf").join(name)
}

fn floats(file: &SafeTensors<'_>, name: &str) -> Vec<f32> {
    let data = file.tensor(name).unwrap().data();
    data.chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect()
}

fn assert_close(name: &str, ours: &[f32], expected: &[f32]) {
    assert_eq!(ours.len(), expected.len(), "{name}");
    let worst = ours.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst < 1e-4, "{name}: {worst}");
}

#[test]
fn every_family_keeps_transformers_logits_and_its_tokenizers_tokens() {
    for name in ["llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3"] {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join(name);
        convert(&fixture(&format!("{name}.gguf")), &out).unwrap();
        let expected: Json = serde_json::from_slice(&fs::read(fixture(&format!("{name}.json"))).unwrap()).unwrap();
        let ids = |ids: &Json| -> Vec<u32> { serde_json::from_value(ids.clone()).unwrap() };

        let logits = fs::read(fixture(&format!("{name}.safetensors"))).unwrap();
        let logits = floats(&SafeTensors::deserialize(&logits).unwrap(), "logits");
        assert_close(name, &Model::load(&out).unwrap().logits(&ids(&expected["tokens"])).unwrap(), &logits);

        let vocabulary = Vocabulary::load(&out, None).unwrap();
        for text in expected["texts"].as_array().unwrap() {
            let begin = if name.starts_with("qwen") { &[][..] } else { &[1] };
            let (text, expected) = (text["text"].as_str().unwrap(), [begin, &ids(&text["ids"])].concat());
            assert_eq!(vocabulary.text(text).unwrap(), expected, "{name}: {text:?}");
        }
    }
}

#[test]
fn a_type_that_is_not_known_is_no_damage() {
    let mut bytes = gguf(&metadata(), &tensors());
    // The type follows a tensor's name, its number of dimensions and these.
    let name = b"blk.0.ffn_up.weight";
    let at = bytes.windows(name.len()).position(|window| window == name).unwrap() + name.len() + 4 + 2 * 8;
    let iq4_xs = 23u32;
    bytes[at..at + 4].copy_from_slice(&iq4_xs.to_le_bytes());
    let error = convert_bytes(&bytes, tempfile::tempdir().unwrap().path()).unwrap_err();
    assert!(error.contains("a tensor's type is none of F32"), "{error}");
}

#[test]
fn every_type_has_the_values_of_llama_cpps_own_package() {
    let expected = fs::read(fixture("types.safetensors")).unwrap();
    let expected = SafeTensors::deserialize(&expected).unwrap();
    let mut gguf = Gguf::open(&fixture("types.gguf")).unwrap();
    assert_eq!(expected.len(), 13);
    for name in expected.names() {
        assert_close(name, &gguf.dequantize(name).unwrap(), &floats(&expected, name));
    }
}

#[test]
fn a_gguf_file_is_a_base_model_as_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let (file, work) = (folder.path().join("model.gguf"), folder.path().join("work"));
    fs::write(&file, gguf(&metadata(), &tensors())).unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let stores = Stores::from_environment(runtime.handle().clone());
    let uri = format!("file://{}", file.display()).parse().unwrap();
    let first = ModelFolder::fetch(&uri, &stores, &work).unwrap();
    assert_eq!((first.shape.layers, first.config.vocab_size), (1, 5));
    let again = ModelFolder::fetch(&uri, &stores, &work).unwrap();
    assert_eq!((&again.digest, &again.folder), (&first.digest, &first.folder));
    assert!(file.exists(), "the user's file is left alone");

    fs::write(&file, gguf(&metadata(), &tensors())).unwrap();
    let other = ModelFolder::fetch(&uri, &stores, &work).unwrap();
    assert_ne!(other.digest, first.digest, "other weights");
    fs::write(&file, b"GGUF").unwrap();
    let error = ModelFolder::fetch(&uri, &stores, &work).map(|_| ()).unwrap_err().to_string();
    assert!(error.starts_with(&format!("{uri}: ")) && error.contains("no whole GGUF file"), "{error}");
}

#[test]
fn what_is_missing_or_unsupported_is_named_and_leaves_no_folder() {
    let without = |key: &str| metadata().into_iter().filter(|(name, _)| *name != key).collect::<Vec<_>>();
    let with = |key: &'static str, value| [without(key), vec![(key, value)]].concat();
    let text = |text: &str| Value::String(text.into());
    let mut extra = tensors();
    extra.push(("blk.0.attn_q.bias", vec![HIDDEN]));
    let mut stretched = tensors();
    stretched.push(("rope_freqs.weight", vec![4]));
    let mut too_stretched = tensors();
    too_stretched.push(("rope_freqs.weight", vec![5]));
    // Written with another one, as the writer divides by it too.
    let mut aligned_to_zero = gguf(&with("general.alignment", Value::U32(0x0123_4560)), &[]);
    let at = aligned_to_zero.windows(4).position(|bytes| bytes == 0x0123_4560u32.to_le_bytes()).unwrap();
    aligned_to_zero[at..at + 4].fill(0);
    let cases = [
        (gguf(&without("llama.block_count"), &tensors()), "no metadata key `llama.block_count`"),
        (
            gguf(&with("general.architecture", text("mamba")), &tensors()),
            "`general.architecture` is \"mamba\"; supported: llama, qwen2, qwen3, phi3, gemma2, gemma3",
        ),
        (gguf(&with("tokenizer.ggml.model", text("t5")), &tensors()), "tokenizer.ggml.model"),
        (gguf(&with("tokenizer.ggml.model", text("llama")), &tensors()), "no metadata key `tokenizer.ggml.scores`"),
        (gguf(&with("tokenizer.ggml.token_type", Value::Array(vec![])), &tensors()), "one for each of 5 tokens"),
        (gguf(&metadata(), &too_stretched), "`rope_freqs.weight` has shape [5]"),
        (aligned_to_zero, "`general.alignment` is 0; supported: at least 1"),
        (gguf(&with("llama.attention.key_length", Value::U32(1)), &tensors()), "an even number above 0"),
        (gguf(&with("llama.attention.head_count", Value::U32(0)), &tensors()), "`llama.attention.head_count` is 0"),
        (
            gguf(&with("llama.attention.head_count_kv", Value::U32(0)), &tensors()),
            "`llama.attention.head_count_kv` is 0",
        ),
        (gguf(&with("llama.rope.scaling.type", text("yarn")), &tensors()), "llama.rope.scaling.factor"),
        (gguf(&with("llama.rope.scaling.type", text("ntk")), &tensors()), "none, linear, yarn, longrope"),
        (gguf(&with("llama.rope.scaling.type", text("longrope")), &tensors()), "original_context_length"),
        (
            gguf(&with("llama.rope.scaling.attn_factor", Value::F32(1.5)), &tensors()),
            "attn_factor` is 1.5; supported: 1",
        ),
        (gguf(&with("llama.attention.scale", Value::F32(0.5)), &tensors()), "`llama.attention.scale` is not supported"),
        (gguf(&with("llama.attention.sliding_window", Value::U32(32)), &tensors()), "sliding_window` is 32"),
        (gguf(&with("llama.attention.value_length", Value::U32(4)), &tensors()), "value_length` is 4"),
        (gguf(&with("llama.attention.causal", Value::Bool(false)), &tensors()), "attention.causal` is false"),
        (gguf(&with("split.count", Value::U16(3)), &tensors()), "llama-gguf-split --merge"),
        (gguf(&with("general.type", text("adapter")), &tensors()), "an adapter, no model: name its base model"),
        (gguf(&with("general.type", text("mmproj")), &tensors()), "sees or hears (mmproj)"),
        (gguf(&with("general.architecture", text("clip")), &tensors()), "sees or hears (mmproj)"),
        (gguf(&with("general.type", text("imatrix")), &tensors()), "general.type is \"imatrix\""),
        (gguf(&metadata(), &[]), "a vocabulary at most"),
        (gguf(&with("llama.expert_count", Value::U32(8)), &tensors()), "no mixture of experts"),
        (gguf(&with("tokenizer.ggml.pre", text("deepseek")), &tensors()), "tokenizer.ggml.pre"),
        (gguf(&with("llama.attention.head_count", Value::U32(5)), &tensors()), "llama.attention.head_count"),
        (gguf(&with("tokenizer.ggml.eos_token_id", Value::U32(9)), &tensors()), "below 5"),
        // As one damaged byte makes of 1: for each block, names would be made up.
        (
            gguf(&with("llama.block_count", Value::U32(0x0900_0001)), &tensors()),
            "`llama.block_count` is 150994945; supported: at most",
        ),
        (
            gguf(&with("llama.attention.key_length", Value::U64(1 << 62)), &tensors()),
            "`llama.attention.key_length` is 4611686018427387904; supported: at most 16777216",
        ),
        (gguf(&metadata(), &tensors()[1..]), "no tensor `token_embd.weight`"),
        (gguf(&metadata(), &extra), "`blk.0.attn_q.bias` can't be converted: no model that can be converted has it"),
        (
            gguf(&metadata(), &stretched),
            "`rope_freqs.weight` can't be converted: its divisors are not those of Llama 3",
        ),
        (
            gguf(&with("llama.feed_forward_length", Value::U32(96)), &tensors()),
            "`blk.0.ffn_gate.weight` has shape [64, 32]",
        ),
        (b"GGUF".to_vec(), "no whole GGUF file"),
    ];
    for (bytes, expected) in cases {
        let folder = tempfile::tempdir().unwrap();
        let error = convert_bytes(&bytes, folder.path()).unwrap_err();
        assert!(error.contains(expected), "expected `{expected}`, got `{error}`");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "{expected}: something is left");
    }
}

#[test]
fn yarn_and_longrope_are_what_transformers_calls_them() {
    let scaled = |keys: &[(&'static str, Value)], more: &[(&'static str, Vec<usize>)]| {
        let folder = tempfile::tempdir().unwrap();
        let bytes = gguf(&[metadata(), keys.to_vec()].concat(), &[tensors(), more.to_vec()].concat());
        convert_bytes(&bytes, folder.path()).unwrap();
        let config = fs::read(folder.path().join("out/config.json")).unwrap();
        let config: Json = serde_json::from_slice(&config).unwrap();
        (config["rope_scaling"].clone(), ModelConfig::parse(&config.to_string()).unwrap())
    };
    let yarn = [
        ("llama.rope.scaling.type", Value::String("yarn".into())),
        ("llama.rope.scaling.factor", Value::F32(4.0)),
        ("llama.rope.scaling.original_context_length", Value::U32(16)),
        ("llama.rope.scaling.yarn_beta_fast", Value::F32(16.0)),
    ];
    let (yarn, config) = scaled(&yarn, &[]);
    let expected = json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 16.0,
        "beta_slow": null});
    assert_eq!(yarn, expected);
    assert!((config.ropes[0].attention_factor - 1.138_629_4).abs() < 1e-6);

    let longrope = [
        ("llama.rope.scaling.attn_factor", Value::F32(1.25)),
        ("llama.rope.scaling.original_context_length", Value::U32(16)),
    ];
    let factors = [("rope_factors_long.weight", vec![4]), ("rope_factors_short.weight", vec![4])];
    let (longrope, config) = scaled(&longrope, &factors);
    assert_eq!((longrope["rope_type"].as_str(), longrope["attention_factor"].as_f64()), (Some("longrope"), Some(1.25)));
    assert_eq!(longrope["long_factor"].as_array().map(Vec::len), Some(4));
    assert!(config.ropes[0].depends_on_length());
}

#[test]
fn a_file_that_was_cut_short_is_no_model() {
    let whole = gguf(&metadata(), &tensors());
    let folder = tempfile::tempdir().unwrap();
    for length in (0..whole.len()).step_by(whole.len() / 25) {
        let error = convert_bytes(&whole[..length], folder.path()).unwrap_err();
        assert!(error.contains("download it again"), "{length} bytes: {error}");
    }
}
