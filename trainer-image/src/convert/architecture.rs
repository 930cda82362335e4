//! The model families that GGUF knows too: what tells one from another there.

/// A family of models.
pub(super) struct Architecture {
    /// `general.architecture`, with which the keys of its sizes begin.
    pub(super) name: &'static str,
    /// transformers' `model_type`.
    pub(super) model_type: &'static str,
    /// transformers' class.
    pub(super) class: &'static str,
    /// Whether GGUF keeps the rows of queries and keys in another order.
    pub(super) is_permuted: bool,
    /// Whether queries, keys and values have a bias.
    pub(super) has_biases: bool,
    /// Whether queries and keys are normed head by head.
    pub(super) norms_heads: bool,
    /// Whether query, key and value are one projection, and gate and up another.
    pub(super) is_fused: bool,
    /// Whether attention and MLP are normed behind as well, and GGUF's norms are those of transformers plus one.
    pub(super) is_gemma: bool,
}

const PLAIN: Architecture = Architecture {
    name: "",
    model_type: "",
    class: "",
    is_permuted: false,
    has_biases: false,
    norms_heads: false,
    is_fused: false,
    is_gemma: false,
};

/// All that can be converted.
pub(super) static ARCHITECTURES: [Architecture; 6] = [
    Architecture { name: "llama", model_type: "llama", class: "LlamaForCausalLM", is_permuted: true, ..PLAIN },
    Architecture { name: "qwen2", model_type: "qwen2", class: "Qwen2ForCausalLM", has_biases: true, ..PLAIN },
    Architecture { name: "qwen3", model_type: "qwen3", class: "Qwen3ForCausalLM", norms_heads: true, ..PLAIN },
    Architecture { name: "phi3", model_type: "phi3", class: "Phi3ForCausalLM", is_fused: true, ..PLAIN },
    Architecture { name: "gemma2", model_type: "gemma2", class: "Gemma2ForCausalLM", is_gemma: true, ..PLAIN },
    Architecture {
        name: "gemma3",
        model_type: "gemma3_text",
        class: "Gemma3ForCausalLM",
        norms_heads: true,
        is_gemma: true,
        ..PLAIN
    },
];

impl Architecture {
    /// That of a Hugging Face model.
    pub(super) fn of_model_type(model_type: &str) -> Option<&'static Self> {
        // GGUF takes a Mistral for a Llama.
        let model_type = if model_type == "mistral" { "llama" } else { model_type };
        ARCHITECTURES.iter().find(|architecture| architecture.model_type == model_type)
    }
}
