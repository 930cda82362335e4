//! Names of the modules that are no part of a block, and of an adapter's file.

/// The embedding, which is the output layer too in some models.
pub(crate) const EMBEDDING: &str = "model.embed_tokens";

/// The norm behind the last block.
pub(crate) const FINAL_NORM: &str = "model.norm";

/// The output layer, where it has weights of its own.
pub(crate) const LM_HEAD: &str = "lm_head";

/// The tensors of an adapter, in its folder.
pub(crate) const ADAPTER_WEIGHTS: &str = "adapter_model.safetensors";
