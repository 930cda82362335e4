//! `adapter_config.json`: PEFT's LoraConfig, field by field. A field that changes the numbers is carried out or refused by
//! name: to load such an adapter as plain LoRA would give other answers than PEFT's.

use std::path::Path;

use regex::Regex;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::lora::{ALL_LINEAR, LoraBias, Shape, TargetModules, scale};
use crate::pattern::{Patterns, compile};

/// The fields that are carried out.
const READ: [&str; 14] = [
    "alpha_pattern",
    "bias",
    "exclude_modules",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "modules_to_save",
    "peft_type",
    "r",
    "rank_pattern",
    "target_modules",
    "use_dora",
    "use_rslora",
];

/// Fields of PEFT 0.21 that say nothing about what a trained adapter computes.
const HARMLESS: [&str; 10] = [
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
];

/// First values of A and B with which PEFT leaves the base model's weights as they are.
const PLAIN_INITS: [&str; 3] = ["gaussian", "orthogonal", "eva"];

/// The layers that PEFT adapts in these families where `target_modules` is null.
const DEFAULT_TARGETS: [&str; 2] = ["q_proj", "v_proj"];

/// The fields of `adapter_config.json` that decide the numbers.
#[derive(Debug)]
pub(super) struct AdapterConfig {
    rank: usize,
    alpha: f64,
    use_rslora: bool,
    pub(super) use_dora: bool,
    pub(super) bias: LoraBias,
    pub(super) modules_to_save: Vec<String>,
    target_modules: Option<TargetModules>,
    exclude_modules: Option<TargetModules>,
    layers_to_transform: Vec<usize>,
    layers_pattern: Vec<String>,
    /// In the order of the file: the first key that matches counts.
    rank_pattern: Vec<(String, usize)>,
    alpha_pattern: Vec<(String, f64)>,
}

/// A value, or a list of such.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum OneOrMany<T> {
    One(T),
    Many(Vec<T>),
}

impl<T> OneOrMany<T> {
    fn into_vec(self) -> Vec<T> {
        match self {
            Self::One(value) => vec![value],
            Self::Many(values) => values,
        }
    }
}

impl AdapterConfig {
    pub(super) fn load(dir: &Path) -> Result<Self> {
        let path = dir.join(super::CONFIG);
        let text = std::fs::read_to_string(&path).map_err(|e| Error::io(&path, e))?;
        Self::parse(&text).map_err(|message| Error::config(&path, message))
    }

    /// Reads the file's text; the error is a message without the file's name.
    fn parse(text: &str) -> std::result::Result<Self, String> {
        let fields: Map<String, Value> =
            serde_json::from_str(text).map_err(|e| format!("not an adapter configuration: {e}"))?;
        let fields = Fields(fields);
        let kind = fields.get::<String>("peft_type", "a string")?.ok_or("peft_type is missing")?;
        if kind != "LORA" {
            return Err(format!("peft_type is {kind}; supported: LORA"));
        }
        fields.refuse_unsupported()?;
        let (names, flag) = ("a name or a list of names", "true or false");
        let layers: Option<OneOrMany<usize>> = fields.get("layers_to_transform", "numbers of layers")?;
        let layers_pattern: Option<OneOrMany<String>> = fields.get("layers_pattern", names)?;
        let config = AdapterConfig {
            rank: fields.get("r", "a whole number")?.ok_or("r is missing")?,
            alpha: fields.get("lora_alpha", "a number")?.ok_or("lora_alpha is missing")?,
            use_rslora: fields.get("use_rslora", flag)?.unwrap_or(false),
            use_dora: fields.get("use_dora", flag)?.unwrap_or(false),
            bias: fields.get("bias", "none, all or lora_only")?.unwrap_or_default(),
            modules_to_save: fields.get("modules_to_save", "a list of names")?.unwrap_or_default(),
            target_modules: fields.get("target_modules", names)?,
            exclude_modules: fields.get("exclude_modules", names)?,
            layers_to_transform: layers.map(OneOrMany::into_vec).unwrap_or_default(),
            layers_pattern: layers_pattern.map(OneOrMany::into_vec).unwrap_or_default(),
            rank_pattern: fields.pattern("rank_pattern", "a whole number")?,
            alpha_pattern: fields.pattern("alpha_pattern", "a number")?,
        };
        config.validate()?;
        Ok(config)
    }

    fn validate(&self) -> std::result::Result<(), String> {
        let ranks = self.rank_pattern.iter().map(|(key, rank)| (format!("rank_pattern: {key}"), *rank));
        if let Some((name, _)) = [("r".to_owned(), self.rank)].into_iter().chain(ranks).find(|(_, rank)| *rank == 0) {
            return Err(format!("{name} is 0; it must be at least 1"));
        }
        let is_pattern = matches!(&self.target_modules, Some(TargetModules::Pattern(text)) if !is_all_linear(text));
        for (name, is_set) in [
            ("layers_to_transform", !self.layers_to_transform.is_empty()),
            ("layers_pattern", !self.layers_pattern.is_empty()),
        ] {
            if is_pattern && is_set {
                return Err(format!("{name} can't stand beside a target_modules that is a pattern"));
            }
        }
        if self.layers_to_transform.is_empty() && !self.layers_pattern.is_empty() {
            return Err("layers_pattern is set, but layers_to_transform is not".into());
        }
        Ok(())
    }

    /// Which layers the adapter is on, and in which shape: by a layer's whole name.
    ///
    /// # Errors
    /// A pattern is no regular expression, or the model has no default for a missing `target_modules`.
    pub(super) fn layers(&self, model: &ModelConfig) -> Result<impl Fn(&str) -> Option<Shape> + '_> {
        let is_targeted = self.targets(model)?;
        let ranks = Patterns::new("rank_pattern", self.rank_pattern.iter().map(|(key, rank)| (key, rank)))?;
        let alphas = Patterns::new("alpha_pattern", self.alpha_pattern.iter().map(|(key, alpha)| (key, alpha)))?;
        Ok(move |module: &str| {
            let rank = ranks.first(module).unwrap_or(self.rank);
            let scale = scale(rank, alphas.first(module).unwrap_or(self.alpha), self.use_rslora);
            is_targeted(module).then_some(Shape { rank, scale })
        })
    }

    /// PEFT's `check_target_module_exists`.
    fn targets(&self, model: &ModelConfig) -> Result<impl Fn(&str) -> bool + '_> {
        let targets = match &self.target_modules {
            Some(TargetModules::Pattern(pattern)) if is_all_linear(pattern) => all_linear(),
            Some(targets) => targets.clone(),
            None if model.fused => {
                return Err(Error::Lora("target_modules is null, for which PEFT has no default in this family".into()));
            }
            None => TargetModules::Names(DEFAULT_TARGETS.map(str::to_owned).into()),
        };
        let selects = targets.matcher()?;
        // As a pattern, this one matches nothing.
        let excluded = self.exclude_modules.as_ref().filter(|excluded| **excluded != all_linear());
        let excludes = excluded.map(TargetModules::matcher).transpose()?;
        let places = self.layer_places()?;
        Ok(move |module: &str| {
            if excludes.as_ref().is_some_and(|excludes| excludes(module)) || !selects(module) {
                return false;
            }
            // A module that is named whole is taken whatever its layer.
            let is_whole_name = matches!(&targets, TargetModules::Names(names) if names.iter().any(|x| x == module));
            if self.layers_to_transform.is_empty() || is_whole_name {
                return true;
            }
            let index = places.iter().find_map(|place| place.captures(module)?.name("index")?.as_str().parse().ok());
            index.is_some_and(|index: usize| self.layers_to_transform.contains(&index))
        })
    }

    /// Where a module's name has the number of its layer.
    fn layer_places(&self) -> Result<Vec<Regex>> {
        let place = |pattern: &String| {
            compile("layers_pattern", pattern, &format!(r"^(?:^|.*?\.)(?:{pattern})\.(?P<index>\d+)\."))
        };
        match self.layers_pattern.is_empty() {
            true => Ok(vec![compile("layers_pattern", "", r"^.*?\.[^.]*\.(?P<index>\d+)\.")?]),
            false => self.layers_pattern.iter().map(place).collect(),
        }
    }
}

/// The fields of the file.
struct Fields(Map<String, Value>);

impl Fields {
    /// The field's value; absent and null are the same.
    fn get<T: DeserializeOwned>(&self, name: &str, expected: &str) -> std::result::Result<Option<T>, String> {
        let Some(value) = self.0.get(name).filter(|value| !value.is_null()) else { return Ok(None) };
        let wrong = |_| format!("{name} is {}; expected {expected}", shown(value));
        T::deserialize(value).map(Some).map_err(wrong)
    }

    /// Keys and values of a pattern, in the order of the file.
    fn pattern<T: DeserializeOwned>(
        &self,
        name: &str,
        expected: &str,
    ) -> std::result::Result<Vec<(String, T)>, String> {
        let pattern: Map<String, Value> = self.get(name, "an object")?.unwrap_or_default();
        let entry = |(key, value): (String, Value)| {
            let wrong = |_| format!("{name}: {key} is {}; expected {expected}", shown(&value));
            let number = T::deserialize(&value).map_err(wrong)?;
            Ok((key, number))
        };
        pattern.into_iter().map(entry).collect()
    }

    /// Refuses the fields that change what the adapter computes and that are not carried out; unknown ones count as such
    /// unless they are null, false or empty.
    fn refuse_unsupported(&self) -> std::result::Result<(), String> {
        let init = self.0.get("init_lora_weights").unwrap_or(&Value::Null);
        let is_plain = match init {
            Value::Null | Value::Bool(_) => true,
            Value::String(name) => PLAIN_INITS.contains(&name.to_ascii_lowercase().as_str()),
            _ => false,
        };
        if !is_plain {
            return Err(format!(
                "init_lora_weights is {}: PEFT changes the base model's weights when it loads such an adapter; save it with \
                 PEFT's save_pretrained(path_initial_model_for_weight_conversion=…), which makes a plain adapter of it",
                shown(init)
            ));
        }
        let is_known = |name: &str| {
            READ.contains(&name) || HARMLESS.contains(&name) || (name == "eva_config" && init.as_str() == Some("eva"))
        };
        let unsupported = self.0.iter().find(|(name, value)| !is_known(name) && !is_empty(value));
        match unsupported {
            None => Ok(()),
            Some((name, value)) => Err(format!(
                "{name} is {}, which is not supported: the adapter would be computed as plain LoRA without it",
                shown(value)
            )),
        }
    }
}

fn is_all_linear(pattern: &str) -> bool {
    pattern.eq_ignore_ascii_case(ALL_LINEAR)
}

fn all_linear() -> TargetModules {
    TargetModules::Pattern(ALL_LINEAR.into())
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::String(text) => text.is_empty(),
        Value::Array(values) => values.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        Value::Bool(true) | Value::Number(_) => false,
    }
}

/// A value as a message shows it.
fn shown(value: &Value) -> String {
    const LONGEST: usize = 60;
    let text = value.to_string();
    match text.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// What PEFT 0.21 writes, with some fields changed.
    fn with(changes: Value) -> std::result::Result<AdapterConfig, String> {
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/tied/adapter/adapter_config.json");
        let mut config: Map<String, Value> = serde_json::from_str(&std::fs::read_to_string(file).unwrap()).unwrap();
        config.extend(changes.as_object().unwrap().clone());
        AdapterConfig::parse(&Value::Object(config).to_string())
    }

    #[test]
    fn a_field_that_changes_the_numbers_is_refused_by_name() {
        for (field, value) in [
            ("alora_invocation_tokens", json!([5, 6])),
            ("use_qalora", json!(true)),
            ("lora_bias", json!(true)),
            ("trainable_token_indices", json!([1])),
            ("trainable_token_indices", json!({"embed_tokens": [1]})),
            ("target_parameters", json!(["mlp.experts.gate_up_proj"])),
            ("layer_replication", json!([[0, 1]])),
            ("megatron_config", json!({"x": 1})),
            ("fan_in_fan_out", json!(true)),
            ("arrow_config", json!({"top_k": 2})),
            ("kasa_config", json!({"beta": 1e-4})),
            ("velora_config", json!({"num_groups": 2})),
            ("monteclora_config", json!({"num_samples": 8})),
            ("use_bdlora", json!({"nblocks": 2})),
            ("corda_config", json!({"corda_method": "ipm"})),
            ("loftq_config", json!({"loftq_bits": 4})),
            ("eva_config", json!({"rho": 2.0})),
            ("ensure_weight_tying", json!(true)),
            ("a_field_of_tomorrow", json!(0.5)),
            ("a_field_of_tomorrow", json!(0)),
            ("init_lora_weights", json!("pissa")),
            ("init_lora_weights", json!("pissa_niter_16")),
            ("init_lora_weights", json!("olora")),
            ("init_lora_weights", json!("OLoRA")),
            ("init_lora_weights", json!("loftq")),
            ("init_lora_weights", json!("corda")),
            ("init_lora_weights", json!("lora_ga")),
            ("init_lora_weights", json!(3)),
        ] {
            let message = with(json!({field: value})).unwrap_err();
            assert!(message.starts_with(&format!("{field} is {value}")), "{message}");
        }
    }

    #[test]
    fn a_field_that_says_nothing_of_the_numbers_passes() {
        for changes in [
            json!({}),
            json!({"task_type": "SEQ_CLS", "peft_version": "0.5.0", "revision": "main", "lora_dropout": 0.3}),
            json!({"auto_mapping": {"base_model_class": "LlamaForCausalLM"}, "inference_mode": false}),
            json!({"megatron_core": "megatron.core", "qalora_group_size": 32, "runtime_config": {"x": true}}),
            json!({"a_field_of_tomorrow": null, "another": false, "third": "", "fourth": [], "fifth": {}}),
            json!({"enable_lora": null, "merge_weights": false, "fan_in_fan_out": false}),
            json!({"init_lora_weights": "eva", "eva_config": {"rho": 2.0}}),
            json!({"init_lora_weights": "Gaussian"}),
            json!({"init_lora_weights": null, "use_rslora": null, "use_dora": null, "bias": null}),
        ] {
            with(changes.clone()).unwrap_or_else(|message| panic!("{changes}: {message}"));
        }
    }

    #[test]
    fn a_field_of_another_type_is_named() {
        for (changes, name) in [
            (json!({"r": "8"}), "r is \"8\""),
            (json!({"r": 0}), "r is 0"),
            (json!({"r": null}), "r is missing"),
            (json!({"lora_alpha": []}), "lora_alpha is []"),
            (json!({"target_modules": 5}), "target_modules is 5"),
            (json!({"layers_to_transform": [-1]}), "layers_to_transform is [-1]"),
            (json!({"rank_pattern": {"q_proj": 1.5}}), "rank_pattern: q_proj is 1.5"),
            (json!({"rank_pattern": {"q_proj": 0}}), "rank_pattern: q_proj is 0"),
            (json!({"alpha_pattern": {"q_proj": "x"}}), "alpha_pattern: q_proj is \"x\""),
            (json!({"bias": "some"}), "bias is \"some\""),
            (json!({"peft_type": "LOHA"}), "peft_type is LOHA"),
            (json!({"peft_type": null}), "peft_type is missing"),
            (json!({"target_modules": ".*q_proj", "layers_to_transform": [1]}), "layers_to_transform"),
            (json!({"layers_pattern": "layers"}), "layers_pattern"),
        ] {
            let message = with(changes).unwrap_err();
            assert!(message.contains(name), "{message}");
        }
        assert!(AdapterConfig::parse("[]").is_err() && AdapterConfig::parse("{").is_err());
    }
}
