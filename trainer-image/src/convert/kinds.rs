//! GGUF files that hold something else than a model of text, and keys of a model's that nobody here knows.

use super::{ConvertError, Gguf};

/// Keys of an architecture's that are read, or that change no number: how a model was made and how much of it is there.
const KNOWN: [&str; 32] = [
    "attention.causal",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window",
    "attention.sliding_window_pattern",
    "attention.value_length",
    "attn_logit_softcapping",
    "block_count",
    "context_length",
    "embedding_length",
    "expert_count",
    "expert_used_count",
    "feed_forward_length",
    "final_logit_softcapping",
    "leading_dense_block_count",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.freq_base_swa",
    "rope.scaling.attn_factor",
    "rope.scaling.factor",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "rope.scaling.type",
    "rope.scaling.yarn_attn_factor",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "rope.scaling.yarn_ext_factor",
    "rope.scaling.yarn_log_multiplier",
    "tensor_data_layout",
    "vocab_size",
];

/// Refuses what is no whole model of text, and says what it is.
pub(super) fn refuse_other_kinds(gguf: &Gguf) -> Result<(), ConvertError> {
    let text = |key: &str| gguf.has(key).then(|| gguf.text(key)).transpose();
    let kind = |text: String| Err(ConvertError::Kind(text));
    if gguf.optional_number("split.count")?.is_some_and(|parts| parts > 1) {
        return kind(
            "it is one part of a file that was split: join them with llama.cpp's `llama-gguf-split --merge FIRST-PART \
             JOINED.gguf`, and name the joined file"
                .into(),
        );
    }
    let of = text("general.type")?.unwrap_or("model");
    if of == "adapter" || gguf.has("adapter.type") {
        return kind("it is an adapter, no model: name its base model instead".into());
    }
    if of == "mmproj" || text("general.architecture")? == Some("clip") || gguf.has("clip.projector_type") {
        return kind(
            "it is the part of a multimodal model that sees or hears (mmproj), no model of text: name a model of text alone"
                .into(),
        );
    }
    if of != "model" {
        return kind(format!("general.type is {of:?}; only a model can be trained"));
    }
    match gguf.tensor_names().next() {
        Some(_) => Ok(()),
        None => kind("it has no tensors, so it holds a vocabulary at most: name the file with the weights".into()),
    }
}

/// Refuses the first key of this architecture that is not known and neither false, 0 nor empty.
pub(super) fn refuse_unknown_keys(gguf: &Gguf, architecture: &str) -> Result<(), ConvertError> {
    let own = |key: &&str| key.strip_prefix(architecture).is_some_and(|rest| rest.starts_with('.'));
    let is_known = |key: &str| KNOWN.contains(&&key[architecture.len() + 1..]);
    let mut unknown: Vec<&str> = gguf.keys().filter(own).filter(|key| !is_known(key) && !gguf.is_empty(key)).collect();
    unknown.sort_unstable();
    match unknown.first() {
        None => Ok(()),
        Some(key) => Err(ConvertError::Kind(format!(
            "metadata key `{key}` is not supported: it may change what the model computes; take the model in \
             transformers' format"
        ))),
    }
}
