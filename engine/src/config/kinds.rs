//! Kinds of models that are no causal language model of text, told by their `config.json`, with what to do instead.

use serde_json::Value;

use super::fields::Fields;
use super::known::{is_empty, shown};

/// Objects that hold the configuration of a part of a model that sees or hears, and that of its text.
const PARTS: [&str; 8] = [
    "text_config",
    "vision_config",
    "audio_config",
    "llm_config",
    "language_config",
    "thinker_config",
    "vision_tower",
    "mm_vision_tower",
];

/// Fields that only mixtures of experts have.
const EXPERTS: [&str; 6] = [
    "num_local_experts",
    "num_experts",
    "n_routed_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "decoder_sparse_step",
];

/// Refuses a model of another kind, and names the kind.
pub(super) fn refuse_other_kinds(fields: &Fields<'_>) -> Result<(), String> {
    if fields.flag("is_encoder_decoder")? {
        return Err(
            "is_encoder_decoder is true: an encoder-decoder can't be trained, only causal language models".into()
        );
    }
    if fields.flag("use_bidirectional_attention")? {
        return Err("use_bidirectional_attention is true; only causal models can be trained".into());
    }
    let is_part = |value: &Value| (value.is_object() || value.is_string()) && !is_empty(value);
    let part = PARTS.iter().find(|part| fields.get(part).is_some_and(is_part));
    if let Some(part) = part {
        return Err(format!(
            "has {part}: a multimodal model can't be trained, not even its text part; name a model of text alone, such as \
             gemma-3-1b-it instead of gemma-3-4b-it"
        ));
    }
    let experts = EXPERTS.iter().find_map(|name| Some((*name, fields.get(name)?)));
    if let Some((name, value)) = experts.filter(|(_, value)| value.as_u64() != Some(0)) {
        return Err(format!("{name} is {}: a mixture of experts can't be trained, only dense models", shown(value)));
    }
    Ok(())
}

/// Refuses a class that is none of a causal language model, and says what it is.
pub(super) fn refuse_class(fields: &Fields<'_>) -> Result<(), String> {
    let class = fields.get("architectures").and_then(Value::as_array).and_then(|names| names.first()?.as_str());
    match class.and_then(|class| Some((class, kind_of(class)?))) {
        Some((class, kind)) => {
            Err(format!("architectures is {class}: {kind}; only causal language models can be trained"))
        }
        None => Ok(()),
    }
}

/// What a class of transformers is, if its name says that it is no causal language model.
fn kind_of(class: &str) -> Option<&'static str> {
    let ends = [
        ("ForConditionalGeneration", "a multimodal model or an encoder-decoder"),
        ("ForSeq2SeqLM", "an encoder-decoder"),
        ("ForSequenceClassification", "a classifier or reward model"),
        ("ForTokenClassification", "a classifier of tokens"),
        ("ForQuestionAnswering", "a model that marks answers"),
        ("ForMaskedLM", "an encoder"),
        ("ForImageTextToText", "a multimodal model"),
        ("ForVision2Seq", "a multimodal model"),
        ("EncoderModel", "an encoder"),
        ("Model", "a model without an output layer, such as one of embeddings"),
    ];
    let is_causal = class.ends_with("LMHeadModel");
    ends.iter().find(|(end, _)| class.ends_with(end) && !is_causal).map(|(_, kind)| *kind)
}
