//! Names of files in the folders of models and versions.

/// Name of the manifest in a version's folder.
pub(crate) const MANIFEST: &str = "manifest.json";

/// Name of the claim in a version's folder.
pub(crate) const CLAIM: &str = "claim.json";

/// Holds a chat template, before which that of `tokenizer_config.json` does not count.
pub(crate) const CHAT_TEMPLATE: &str = "chat_template.jinja";

/// Holds the chat template for conversations with tools, as transformers 5 writes it.
pub(crate) const TOOL_TEMPLATE: &str = "additional_chat_templates/tool_use.jinja";
