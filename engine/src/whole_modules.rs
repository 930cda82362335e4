//! The modules that are trained whole beside an adapter (`modules_to_save`).

use crate::block::Norm;
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::names::{EMBEDDING, FINAL_NORM, LM_HEAD};

/// A module that can be trained whole beside an adapter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum WholeModule {
    Output,
    Embedding,
    FinalNorm,
    BlockNorm(usize, Norm),
}

impl WholeModule {
    /// All of a model, with their names; the output layer first.
    fn all(config: &ModelConfig) -> Vec<(String, Self)> {
        let norms_of = |block: usize| {
            let named = move |which: Norm| Some((format!("model.layers.{block}.{}", which.path(config)?), which));
            Norm::ALL.into_iter().filter_map(named).map(move |(name, which)| (name, Self::BlockNorm(block, which)))
        };
        let others = [(LM_HEAD, Self::Output), (EMBEDDING, Self::Embedding), (FINAL_NORM, Self::FinalNorm)];
        let others = others.into_iter().map(|(name, module)| (name.to_owned(), module));
        others.chain((0..config.num_hidden_layers).flat_map(norms_of)).collect()
    }

    /// How many parameters it has.
    pub(crate) fn parameters(self, config: &ModelConfig) -> usize {
        match self {
            Self::Output | Self::Embedding => config.vocab_size * config.hidden_size,
            Self::FinalNorm => config.hidden_size,
            Self::BlockNorm(_, which) => which.len(config),
        }
    }
}

/// The modules that `modules_to_save` names, with their whole names, as PEFT matches them: by the end of these.
///
/// # Errors
/// A name matches none, or an embedding that is the output layer too.
pub(crate) fn whole_modules(config: &ModelConfig, names: &[String]) -> Result<Vec<(String, WholeModule)>> {
    let all = WholeModule::all(config);
    if let Some(name) = names.iter().find(|name| !all.iter().any(|(module, _)| module.ends_with(name.as_str()))) {
        return Err(Error::Lora(format!(
            "modules_to_save: {name:?} is no lm_head, embed_tokens or norm of this model; \
             linear layers are adapted by target_modules"
        )));
    }
    let named = |(module, _): &(String, _)| names.iter().any(|name| module.ends_with(name.as_str()));
    let modules: Vec<(String, WholeModule)> = all.into_iter().filter(named).collect();
    let has = |wanted: WholeModule| modules.iter().any(|(_, module)| *module == wanted);
    if has(WholeModule::Embedding) && config.tie_word_embeddings && !has(WholeModule::Output) {
        let message = "modules_to_save: embed_tokens is also the output layer of this model \
            (tie_word_embeddings), which would change with it; train lm_head, or use method Full";
        return Err(Error::Lora(message.into()));
    }
    Ok(modules)
}
