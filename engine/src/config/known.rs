//! The fields of a `config.json` that are known: those that the engine reads, and those that change no number that it
//! computes. Any other field passes if it is null, false or empty; else the model is refused by that field's name.

use serde_json::{Map, Value};

/// Fields that every family reads.
const READ: [&str; 18] = [
    "architectures",
    "head_dim",
    "hidden_size",
    "intermediate_size",
    "is_encoder_decoder",
    "max_position_embeddings",
    "model_type",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "pad_token_id",
    "partial_rotary_factor",
    "quantization_config",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "tie_word_embeddings",
    "vocab_size",
];

/// Fields that change nothing here: how a model is loaded, how it generates, what it is called, how its weights were
/// first drawn. They are those that transformers 2 to 5 writes for every model, and those of models on the Hub.
const HARMLESS: [&str; 91] = [
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_attn_implementation_internal",
    "_commit_hash",
    "_experts_implementation",
    "_flash_attn_2_enabled",
    "_name_or_path",
    "attn_implementation",
    "auto_map",
    "bad_words_ids",
    "begin_suppress_tokens",
    "bos_token_id",
    "cache_implementation",
    "chunk_size_feed_forward",
    "decoder_start_token_id",
    "diversity_penalty",
    "do_sample",
    "dtype",
    // vLLM's alone, and for rows that are longer than any that is trained here.
    "dual_chunk_attention_config",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "encoder_repetition_penalty",
    "eos_token_id",
    "epsilon_cutoff",
    "eta_cutoff",
    "exponential_decay_length_penalty",
    "finetuning_task",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "gradient_checkpointing",
    "id2label",
    "initializer_range",
    // SmolLM's.
    "is_decoder",
    "is_llama_config",
    "keys_to_ignore_at_inference",
    "label2id",
    "length_penalty",
    "max_length",
    "max_sequence_length",
    "max_window_layers",
    "min_length",
    "model_max_length",
    "name_or_path",
    "no_repeat_ngram_size",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "assistant_confidence_threshold",
    "assistant_lookbehind",
    "target_lookbehind",
    "num_beam_groups",
    "num_beams",
    "num_labels",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "output_past",
    "output_scores",
    "prefix",
    "problem_type",
    "remove_invalid_values",
    "repetition_penalty",
    "return_dict",
    "return_dict_in_generate",
    "sep_token_id",
    "suppress_tokens",
    "task_specific_params",
    "temperature",
    "tf_legacy_loss",
    "tie_encoder_decoder",
    "tokenizer_class",
    "tokenizer_model_max_length",
    "tokenizer_padding_side",
    "top_k",
    "top_p",
    "torch_dtype",
    "torchscript",
    "transformers.js_config",
    "transformers_version",
    "typical_p",
    "unk_token_id",
    "unsloth_fixed",
    "unsloth_version",
    "use_bfloat16",
    "use_cache",
    "use_flash_attention",
    "use_flash_attention_2",
    "use_flash_attn",
    "use_return_dict",
    "vocab_file",
    "bos_token",
    "eos_token",
];

/// Fields for which one number says that the part is not there.
const NEUTRAL: [(&str, f64); 5] = [
    ("pretraining_tp", 1.0),
    ("full_attn_mod", 1.0),
    ("interpolate_factor", 1.0),
    ("num_experts", 0.0),
    ("num_local_experts", 0.0),
];

/// Refuses the first field that is none of these, none of `of_family`, and not null, false or empty.
pub(super) fn refuse_unknown(fields: &Map<String, Value>, model_type: &str, of_family: &[&str]) -> Result<(), String> {
    for (name, value) in fields {
        let name = name.as_str();
        if is_dropout(name) {
            if !is_empty(value) && value.as_f64() != Some(0.0) {
                return Err(format!("{name} is {}; supported: 0 (set lora.dropout instead)", shown(value)));
            }
            continue;
        }
        if let Some((_, neutral)) = NEUTRAL.iter().find(|(known, _)| *known == name) {
            if !is_empty(value) && value.as_f64() != Some(*neutral) {
                return Err(format!("{name} is {}; supported: {neutral}", shown(value)));
            }
            continue;
        }
        let is_known = READ.contains(&name) || HARMLESS.contains(&name) || of_family.contains(&name);
        if !is_known && !is_empty(value) {
            return Err(format!(
                "{name} is {}, and is not supported for model_type {model_type}: it may change what the model computes. \
                 Remove it from config.json if it does not",
                shown(value)
            ));
        }
    }
    Ok(())
}

/// Refuses the first field of the object `object` that is not `known`, and not null, false or empty.
pub(super) fn refuse_unknown_in(object: &str, fields: &Map<String, Value>, known: &[&str]) -> Result<(), String> {
    match fields.iter().find(|(name, value)| !known.contains(&name.as_str()) && !is_empty(value)) {
        None => Ok(()),
        Some((name, value)) => {
            Err(format!("{object}.{name} is {}, and is not supported there; known: {}", shown(value), known.join(", ")))
        }
    }
}

fn is_dropout(name: &str) -> bool {
    ["dropout", "pdrop", "dropout_prob", "layerdrop"].iter().any(|end| name.ends_with(end))
}

pub(super) fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        Value::Bool(true) | Value::Number(_) => false,
    }
}

/// A value as a message shows it: the beginning of a long one.
pub(super) fn shown(value: &Value) -> String {
    const LENGTH: usize = 60;
    let text = value.to_string();
    match text.char_indices().nth(LENGTH) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}
