//! The names of a model folder's files: which are used, which are only copied, and what else lies there instead of them.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::Read,
    path::Path,
};

use serde_json::Value;

use crate::{json_file::read_json, layout::TOOL_TEMPLATE};

/// The weights in one file.
pub(super) const WEIGHTS: &str = "model.safetensors";
/// Names the files of sharded weights.
pub(super) const INDEX: &str = "model.safetensors.index.json";
/// Makes a folder that of an adapter.
pub(super) const ADAPTER: &str = "adapter_config.json";
/// What every model folder needs besides weights.
pub(super) const REQUIRED: [&str; 3] = ["config.json", "tokenizer.json", "tokenizer_config.json"];
/// What is used where it is there.
pub(super) const OPTIONAL: [&str; 5] =
    ["added_tokens.json", TOOL_TEMPLATE, "chat_template.jinja", "generation_config.json", "special_tokens_map.json"];
/// What other programs read of a tokenizer. It is published with a whole model, and no part of the digest: no number
/// depends on it.
const COPIED: [&str; 9] = [
    "chat_template.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "spiece.model",
    "tekken.json",
    "tokenizer.model",
    "tokenizer.model.v3",
    "vocab.json",
    "vocab.txt",
];
/// The folder of a model's other chat templates, as transformers 5 writes them.
const TEMPLATES: &str = "additional_chat_templates";

/// Whether a file is only copied.
pub(crate) fn is_copied(name: &str) -> bool {
    let is_template = || {
        let template = name.strip_prefix(TEMPLATES).and_then(|rest| rest.strip_prefix('/'));
        template.is_some_and(|name| !name.contains('/') && name.ends_with(".jinja"))
    };
    COPIED.contains(&name) || is_template()
}

/// Those of a folder on this machine that are only copied.
pub(crate) fn copied_in(folder: &Path) -> Vec<String> {
    let templates = fs::read_dir(folder.join(TEMPLATES)).into_iter().flatten().flatten();
    let templates = templates.filter_map(|entry| Some(format!("{TEMPLATES}/{}", entry.file_name().to_str()?)));
    let others = COPIED.iter().filter(|name| folder.join(name).is_file()).map(|name| (*name).to_owned());
    others.chain(templates.filter(|name| is_copied(name))).collect()
}

/// Whether a name is that of a GGUF file.
pub(super) fn is_gguf(name: &str) -> bool {
    name.to_ascii_lowercase().ends_with(".gguf")
}

/// Whether it is one part of a GGUF file that was split (`…-00001-of-00003.gguf`).
pub(super) fn is_part_of_gguf(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    let parts = name.strip_suffix(".gguf").and_then(|name| name.rsplit_once("-of-"));
    let is_number = |text: &str| text.len() == 5 && text.bytes().all(|byte| byte.is_ascii_digit());
    parts.is_some_and(|(first, count)| {
        is_number(count) && count != "00001" && first.get(first.len().saturating_sub(5)..).is_some_and(is_number)
    })
}

/// What to say to someone whose GGUF file is split.
pub(super) const SPLIT: &str = "a GGUF file that is split in parts: join them with llama.cpp's `llama-gguf-split --merge \
                                FIRST-PART JOINED.gguf`, and name the joined file";

/// Weights of formats that are not read, and what to do about them.
const FORMATS: [(&str, &str); 13] = [
    (".bin", ", but pickled weights: save the model as safetensors"),
    (".pt", ", but pickled weights: save the model as safetensors"),
    (".pth", ", but pickled weights: save the model as safetensors"),
    (".ckpt", ", but pickled weights: save the model as safetensors"),
    (".onnx", ", but an ONNX model, which can't be trained: name the model that it was exported from"),
    (".h5", ", but weights of TensorFlow: save the model as safetensors"),
    (".msgpack", ", but weights of Flax: save the model as safetensors"),
    (".npz", ", but weights of MLX: name the model that they were made from"),
    (".7z", ", but an archive: unpack it and upload its files"),
    (".tar", ", but an archive: unpack it and upload its files"),
    (".tgz", ", but an archive: unpack it and upload its files"),
    (".tar.gz", ", but an archive: unpack it and upload its files"),
    (".zip", ", but an archive: unpack it and upload its files"),
];

/// What to tell the owner of a folder in which `missing` is missing.
pub(super) fn hint(missing: &str, present: &BTreeSet<String>) -> String {
    let has = |name: &str| present.contains(name);
    let ends = |end: &str| present.iter().find(|name| name.to_ascii_lowercase().ends_with(end));
    let inside = |folder: &str| present.iter().any(|name| name.starts_with(&format!("{folder}/")));
    let has_weights = ends(".safetensors").is_some_and(|name| !name.starts_with("adapter_model"));
    if inside(missing) {
        return format!(": {missing} is a folder there, where a file is meant");
    }
    if has("adapter_config.json") && (!has_weights || !has("config.json")) {
        return ", but adapter_config.json: it is an adapter. Name its base model (base_model_name_or_path in that file), or \
                put it into its base model with `tunesmith-trainer merge` and name the result"
            .into();
    }
    if has("model_index.json") {
        return ", but model_index.json: it is a pipeline that makes images; only causal language models can be trained".into();
    }
    if missing.starts_with("tokenizer") && (has("config.json") || has_weights) {
        return tokenizer_hint(missing, present);
    }
    if let Some(name) = present.iter().find(|name| is_gguf(name)) {
        let split = if is_part_of_gguf(name) { format!(", {SPLIT}") } else { String::new() };
        return match split.is_empty() {
            true => ", but a GGUF file: name that file in baseModel.uri".into(),
            false => split,
        };
    }
    if ["params.json", "consolidated.safetensors", "consolidated.00.pth"].iter().any(|name| has(name)) {
        return ", but params.json or consolidated weights: it is in Mistral's or Meta's own format. Name the model in \
                transformers' format (config.json, model.safetensors), or convert it with transformers' \
                convert_…_weights_to_hf.py"
            .into();
    }
    if missing == WEIGHTS && has_weights {
        return format!(", nor {INDEX}, which names the shards: upload all files of the folder");
    }
    if let Some((_, hint)) = FORMATS.iter().find(|(end, _)| ends(end).is_some()) {
        return (*hint).to_owned();
    }
    let deeper = present.iter().find_map(|name| name.strip_suffix(missing)?.strip_suffix('/'));
    match deeper {
        Some(folder) => format!(", but {folder}/ in it does: add that to baseModel.uri"),
        None => ": baseModel.uri must be a whole Hugging Face model folder".into(),
    }
}

fn tokenizer_hint(missing: &str, present: &BTreeSet<String>) -> String {
    let others = ["tokenizer.model", "spiece.model", "tekken.json", "vocab.json", "vocab.txt"];
    match others.iter().find(|name| present.contains(**name)) {
        Some(other) if missing == "tokenizer.json" => format!(
            ", but {other}, which is not read: write tokenizer.json with transformers, \
             AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        ),
        _ => format!(": upload {missing} of the model, too; transformers' save_pretrained of the tokenizer writes it"),
    }
}

/// The files that an index names, which must all be there.
pub(super) fn shards(index: &Path, present: &BTreeSet<String>) -> Result<Vec<String>, String> {
    let index = read_json(index)?;
    let map = index["weight_map"].as_object().ok_or("has no weight_map")?;
    if let Some((name, file)) = map.iter().find(|(_, file)| !file.is_string()) {
        return Err(format!("weight_map names {file} for {name}; expected the name of a file"));
    }
    let names: BTreeSet<&str> = map.values().filter_map(Value::as_str).collect();
    if let Some(name) = names.iter().find(|name| name.contains('/') || !name.ends_with(".safetensors")) {
        return Err(format!("weight_map names {name:?}, which is no safetensors file of this folder"));
    }
    let missing: Vec<&str> = names.iter().copied().filter(|name| !present.contains(*name)).collect();
    match (names.len(), missing.as_slice()) {
        (0, _) => Err("weight_map is empty".into()),
        (_, []) => Ok(names.into_iter().map(str::to_owned).collect()),
        (all, [first, ..]) => Err(format!(
            "weight_map names {all} files, and {} of them are missing ({first}): upload them, too",
            missing.len()
        )),
    }
}

/// Whether an index lists a tensor.
pub(super) fn is_listed(index: &Path, tensor: &str) -> bool {
    read_json(index).is_ok_and(|index| index["weight_map"][tensor].is_string())
}

/// Git puts a file like this in the place of one that git-lfs keeps.
const LFS_POINTER: &[u8] = b"version https://git-lfs.github.com/spec/";

/// Checks that a file is not empty, nor git-lfs' pointer to one.
pub(crate) fn check_whole(path: &Path) -> Result<(), String> {
    let mut start = Vec::new();
    let file = File::open(path).and_then(|file| file.take(LFS_POINTER.len() as u64).read_to_end(&mut start));
    match file {
        Err(error) => Err(format!("can't be read: {error}")),
        Ok(0) => Err("is empty: upload it again".into()),
        Ok(_) if start == LFS_POINTER => {
            Err("is git-lfs' pointer to the file, not the file: run `git lfs pull` in the \
                                              clone and upload the files again"
                .into())
        }
        Ok(_) => Ok(()),
    }
}
