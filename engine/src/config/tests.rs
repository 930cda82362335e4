//! What is read of a `config.json`, and what is refused.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

const SMOL: &str = r#"{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 8192, "rms_norm_eps": 1e-05,
    "rope_theta": 100000, "rope_scaling": null, "tie_word_embeddings": true, "attention_bias": false}"#;

fn with(changes: Value) -> std::result::Result<ModelConfig, String> {
    let mut json: Value = serde_json::from_str(SMOL).unwrap();
    json.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    ModelConfig::parse(&json.to_string())
}

#[test]
fn smollm2_is_read() {
    let config = ModelConfig::parse(SMOL).unwrap();
    assert_eq!((config.head_dim, config.query_size(), config.key_value_size()), (64, 576, 192));
    assert_eq!(config.ropes, [Rope { theta: 100_000.0, dim: 64, scaling: RopeScaling::None, attention_factor: 1.0 }]);
    assert!(config.tie_word_embeddings);
}

#[test]
fn rope_is_read_where_newer_transformers_write_it() {
    let config = with(json!({
        "rope_theta": null,
        "rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 4.0}
    }))
    .unwrap();
    let scaling = RopeScaling::Linear { factor: 4.0 };
    assert_eq!(config.ropes, [Rope { theta: 500_000.0, dim: 64, scaling, attention_factor: 1.0 }]);
}

/// The fields of public models, and all that transformers writes for each family.
#[test]
fn models_that_people_train_are_read() {
    let models: serde_json::Map<String, Value> = serde_json::from_str(include_str!("real_models.json")).unwrap();
    assert!(models.len() > 30);
    for (name, config) in &models {
        let config = ModelConfig::parse(&config.to_string()).unwrap_or_else(|problem| panic!("{name}: {problem}"));
        assert!(!config.tensors().is_empty());
    }
    let read = |name: &str| ModelConfig::parse(&models[name].to_string()).unwrap();
    assert_eq!(read("Phi 3 mini 4k").layers[0].window, Some(2047));
    assert_eq!(read("Phi 4 mini").ropes[0].dim, 96);
    assert!(read("Phi 3 mini 128k, first upload").ropes[0].depends_on_length());
    assert!(read("Qwen 2.5 7B Instruct, long").ropes[0].attention_factor > 1.1);
    assert_eq!(read("DeepSeek R1 Distill Qwen 1.5B").layers[27].window, None);
}

/// SmolLM2's file with these fields in place of its own is refused, in words that hold each of `parts`.
#[track_caller]
fn refused(changes: Value, parts: &[&str]) {
    let message = with(changes).unwrap_err();
    for part in parts {
        assert!(message.contains(part), "{part}: {message}");
    }
}

#[test]
fn what_would_change_the_numbers_is_refused_by_name() {
    for (changes, name) in [
        (json!({"attention_dropout": 0.1}), "attention_dropout"),
        (json!({"residual_dropout": 0.1}), "residual_dropout"),
        (json!({"hidden_act": "gelu"}), "hidden_act"),
        (json!({"model_type": "mamba"}), "model_type"),
        (json!({"rope_scaling": {"type": "ntk", "factor": 2.0}}), "rope_type"),
        (json!({"rope_scaling": {"type": "linear"}}), "factor"),
        (json!({"hidden_size": 0}), "hidden_size"),
        (json!({"vocab_size": 1e30}), "vocab_size"),
        (json!({"num_key_value_heads": 4}), "num_key_value_heads"),
        (json!({"head_dim": 63}), "head_dim"),
        (json!({"tie_word_embeddings": "yes"}), "tie_word_embeddings is \"yes\"; expected true or false"),
        (json!({"pretraining_tp": 2}), "pretraining_tp is 2; supported: 1"),
        (json!({"sliding_window": 512}), "sliding_window is 512; model_type llama has none"),
        (json!({"layer_types": vec!["sliding_attention"; 30]}), "layer_types has sliding_attention"),
        (json!({"partial_rotary_factor": 0.5}), "partial_rotary_factor is 0.5; supported: 1"),
        (json!({"model_type": "gemma2", "architectures": [], "hidden_act": "gelu"}), "hidden_act is \"gelu\""),
        (json!({"model_type": "mistral", "architectures": [], "attention_bias": true}), "attention_bias is true"),
        (
            json!({"model_type": "gemma3_text", "architectures": [], "hidden_act": null, "attn_logit_softcapping": 50}),
            "attn_logit_softcapping is 50",
        ),
    ] {
        refused(changes, &[name]);
    }
}

#[test]
fn an_unknown_field_passes_only_if_it_is_empty() {
    for empty in [json!(null), json!(false), json!(""), json!([]), json!({})] {
        with(json!({"attn_logit_softcapping": empty})).unwrap();
    }
    for (name, value) in [
        ("attn_logit_softcapping", json!(50.0)),
        ("mlp_only_layers", json!([1])),
        ("attention_multiplier", json!(0.0078125)),
        ("logits_scaling", json!(8.0)),
        ("embedding_multiplier", json!(12.0)),
        ("residual_multiplier", json!(0.22)),
        ("no_rope_layers", json!([1, 1, 1, 0])),
        ("use_parallel_residual", json!(true)),
        ("layer_norm_eps", json!(1e-5)),
        ("qk_layernorm", json!(true)),
        ("attention_in_bias", json!(true)),
        ("rope_interleaved", json!(true)),
        ("lm_head_bias", json!(true)),
        ("transformers_weights", json!("other.safetensors")),
        ("quantization", json!({"group_size": 64, "bits": 4})),
    ] {
        refused(json!({name: value}), &[name, "model_type llama", "Remove it from config.json"]);
    }
    refused(json!({"full_attn_mod": 2}), &["full_attn_mod is 2; supported: 1"]);
    let long = "x".repeat(500);
    assert!(with(json!({"unknown": long})).unwrap_err().len() < 300);
}

#[test]
fn unknown_fields_of_its_objects_are_refused_too() {
    let llama3 = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192});
    with(json!({"rope_scaling": llama3})).unwrap();
    let mut changed = llama3.clone();
    changed["attention_factor"] = json!(1.2);
    refused(json!({"rope_scaling": changed}), &["rope_scaling.attention_factor is 1.2", "low_freq_factor"]);
    refused(
        json!({"rope_scaling": {"rope_type": "default", "mrope_section": [16, 24, 24]}}),
        &["rope_scaling.mrope_section"],
    );
    refused(json!({"rope_scaling": {"rope_type": "yarn", "type": "linear", "factor": 2.0}}), &["rope_type", "type"]);
    let bits = |changes: Value| {
        let mut config = json!({"quant_method": "bitsandbytes", "load_in_4bit": true, "bnb_4bit_quant_type": "nf4"});
        config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        json!({"quantization_config": config})
    };
    with(bits(json!({}))).unwrap();
    for (changes, part) in [
        (json!({"quant_method": "gptq", "bits": 4}), "quant_method is \"gptq\"; supported: bitsandbytes"),
        (json!({"quant_method": "awq"}), "\"awq\""),
        (json!({"quant_method": "fp8"}), "\"fp8\""),
        (json!({"quant_method": "mxfp4"}), "Name the model that is not quantized"),
        (json!({"load_in_4bit": false}), "neither load_in_4bit nor load_in_8bit"),
        (json!({"load_in_8bit": true}), "both load_in_4bit and load_in_8bit"),
        (json!({"load_in_4bit": "yes"}), "load_in_4bit is \"yes\""),
        (json!({"bnb_4bit_quant_type": "int4"}), "bnb_4bit_quant_type is \"int4\""),
        (json!({"llm_int8_has_fp16_weight": true}), "llm_int8_has_fp16_weight"),
        (json!({"bnb_4bit_use_double_quant": 1}), "bnb_4bit_use_double_quant is 1"),
    ] {
        refused(bits(changes), &[part]);
    }
    refused(json!({"quantization_config": {"bits": 4, "group_size": 128}}), &["quant_method is null"]);
    refused(json!({"quantization_config": "nf4"}), &["quantization_config is \"nf4\"; expected an object"]);
}

#[test]
fn what_is_said_twice_must_be_the_same() {
    let linear = json!({"rope_type": "linear", "factor": 4.0, "rope_theta": 100000});
    with(json!({"rope_parameters": linear, "rope_scaling": linear})).unwrap();
    refused(
        json!({"rope_parameters": linear, "rope_scaling": {"type": "linear", "factor": 2.0}}),
        &["rope_parameters and rope_scaling are both there"],
    );
    refused(
        json!({"rope_theta": 5e5, "rope_parameters": linear}),
        &["rope_theta is 500000.0 at the top, and 100000 in rope_parameters"],
    );
    let yarn = json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048});
    refused(
        json!({"original_max_position_embeddings": 4096, "rope_scaling": yarn}),
        &["original_max_position_embeddings is 4096 at the top", "2048"],
    );
    refused(
        json!({"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}),
        &["rope_type is \"mrope\"; supported: default, linear"],
    );
}

#[test]
fn other_kinds_of_models_are_named() {
    with(json!({"text_config": {}, "vision_config": {}, "mm_vision_tower": ""})).unwrap();
    for (changes, parts) in [
        (
            json!({"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "text_config": {"a": 1}}),
            ["has text_config: a multimodal model", "a model of text alone"],
        ),
        (
            json!({"model_type": "llava_llama", "architectures": ["LlavaLlamaForCausalLM"], "mm_vision_tower": "clip"}),
            ["has mm_vision_tower", "multimodal"],
        ),
        (
            json!({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": true}),
            ["is_encoder_decoder is true", "an encoder-decoder"],
        ),
        (
            json!({"model_type": "bert", "architectures": ["BertForMaskedLM"]}),
            ["architectures is BertForMaskedLM: an encoder", "only causal language models"],
        ),
        (json!({"architectures": ["LlamaForSequenceClassification"]}), ["a classifier or reward model", "causal"]),
        (json!({"model_type": "qwen3", "architectures": ["Qwen3Model"]}), ["without an output layer", "Qwen3Model"]),
        (
            json!({"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 8}),
            ["num_local_experts is 8: a mixture of experts", "dense"],
        ),
        (json!({"num_experts": 60}), ["num_experts is 60", "mixture of experts"]),
        (
            json!({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}),
            ["model_type is gpt2", "supported: llama"],
        ),
    ] {
        refused(changes, &parts);
    }
    // A class of today's that an older one stands beside.
    with(json!({"architectures": ["CustomModel", "LlamaForCausalLM"]})).unwrap();
}

#[test]
fn a_byte_order_mark_is_no_damage_and_other_bytes_are() {
    let bytes = [b"\xef\xbb\xbf", SMOL.as_bytes()].concat();
    assert_eq!(ModelConfig::parse_bytes(&bytes), ModelConfig::parse(SMOL));
    let utf16: Vec<u8> = SMOL.encode_utf16().flat_map(u16::to_le_bytes).collect();
    assert!(ModelConfig::parse_bytes(&[&[0xff, 0xfe], &utf16[..]].concat()).unwrap_err().contains("not UTF-8 text"));
}

#[derive(serde::Deserialize)]
struct RotaryCase {
    config: Value,
    rows: Vec<RotaryRow>,
}

#[derive(serde::Deserialize)]
struct RotaryRow {
    length: usize,
    frequencies: Vec<f64>,
    attention_factor: f64,
}

/// `e2e/oracle/rotary.py` writes what transformers computes.
#[test]
fn rotary_frequencies_and_attention_factors_are_those_of_transformers() {
    let cases: Vec<RotaryCase> = serde_json::from_str(include_str!("../../tests/fixtures/rotary.json")).unwrap();
    assert!(cases.len() > 15);
    for RotaryCase { config: json, rows } in &cases {
        let config = ModelConfig::parse(&json.to_string()).unwrap();
        let rope = &config.ropes[0];
        for row in rows {
            let ours = rope.frequencies(row.length);
            assert_eq!(ours.len(), row.frequencies.len(), "{json}");
            for (i, (ours, theirs)) in ours.iter().zip(&row.frequencies).enumerate() {
                let difference = (f64::from(*ours) / theirs - 1.0).abs();
                assert!(difference < 1e-6, "{json}: row of {}, frequency {i}: {ours} {theirs}", row.length);
            }
            assert!((f64::from(rope.attention_factor) - row.attention_factor).abs() < 1e-6, "{json}");
        }
        assert_eq!(rope.depends_on_length(), rows.len() > 1, "{json}");
    }
}

#[test]
fn settings_of_yarn_and_longrope_that_do_not_fit_are_refused() {
    let yarn = |changes: Value| {
        let mut yarn = json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048});
        yarn.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        json!({"rope_scaling": yarn})
    };
    with(yarn(json!({"finetuned": true}))).unwrap();
    for (changes, part) in [
        (json!({"attn_factor": 1.0}), "rope_scaling.attn_factor is 1.0, and is not supported there"),
        (json!({"factor": -4.0}), "factor is -4"),
        (json!({"attention_factor": 0}), "attention_factor is 0"),
        (json!({"truncate": "no"}), "truncate is \"no\""),
        (json!({"rope_theta": 1.0}), "rope_theta is 100000 at the top"),
        (json!({"beta_fast": -1.0}), "beta_fast is -1"),
        (json!({"original_max_position_embeddings": 0}), "original_max_position_embeddings is 0"),
    ] {
        refused(yarn(changes), &[part]);
    }
    let longrope = |short: Value| {
        json!({"rope_scaling": {"type": "longrope", "short_factor": short, "long_factor": vec![1.5; 32],
            "original_max_position_embeddings": 2048}})
    };
    with(longrope(json!(vec![1.0; 32]))).unwrap();
    for wrong in [json!(vec![1.0; 31]), json!(vec![0.0; 32]), json!(1.0), json!(null), json!(vec!["1"; 32])] {
        refused(longrope(wrong), &["short_factor"]);
    }
}

/// Any value that JSON can hold, of the kinds that a damaged or malicious file would.
fn value() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        (0u64..70).prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        "[a-z_0-9]{0,12}".prop_map(Value::from),
        Just(json!({"rope_type": "dynamic", "factor": 1e300, "full_attention": {"factor": -1}})),
        Just(json!(["sliding_attention", 7])),
        Just(
            json!({"rope_type": "yarn", "factor": 1e-300, "original_max_position_embeddings": 1e-300, "beta_fast": -1})
        ),
        (0usize..70).prop_map(|n| json!({"rope_type": "longrope", "short_factor": vec![1e30; n], "long_factor": [1]})),
    ]
}

proptest! {
    #[test]
    fn no_configuration_makes_the_engine_panic(
        family in prop::sample::select(vec!["llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3_text"]),
        changes in prop::collection::vec((prop::sample::select(vec![
            "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "num_hidden_layers", "vocab_size",
            "intermediate_size", "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling",
            "rope_parameters", "layer_types", "sliding_window", "use_sliding_window", "max_window_layers",
            "sliding_window_pattern", "partial_rotary_factor", "query_pre_attn_scalar", "attn_logit_softcapping",
            "final_logit_softcapping", "pad_token_id", "hidden_act", "hidden_activation", "tie_word_embeddings",
            "attention_bias", "mlp_bias", "attention_dropout", "architectures", "original_max_position_embeddings",
                "quantization_config", "is_encoder_decoder", "num_experts", "text_config", "_sliding_window_pattern",
        ]), value()), 0..4),
    ) {
        let mut json = json!({"architectures": null, "model_type": family, "hidden_act": null});
        for (field, value) in changes {
            json[field] = value;
        }
        if let Ok(config) = with(json) {
            prop_assert!(config.layers.len() == config.num_hidden_layers);
            config.ropes.iter().for_each(|rope| drop(rope.frequencies(100_000)));
            prop_assert!(config.tensors().len() < 20_000);
        }
    }
}
