//! The base model's folder: which of its files are used, their digest, and whether they fit together. A GGUF file becomes
//! such a folder first.

mod source;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io::Read,
    path::{Path, PathBuf},
};

use safetensors::{
    Dtype,
    tensor::{Metadata, TensorInfo},
};
use serde_json::Value;
use source::{Fetched, Source, fetch_file};
use tunesmith_crds::{
    Uri,
    fine_tune_job::{Quantization, QuantizationType},
    run::ModelShape,
};
use tunesmith_engine::{FourBitCode, ModelConfig, Quantization as EngineQuantization};

use crate::{
    convert::convert,
    digest,
    store::{StoreError, Stores},
};

/// The weights in one file.
const WEIGHTS: &str = "model.safetensors";
/// Names the files of sharded weights.
const INDEX: &str = "model.safetensors.index.json";
/// What every model folder needs besides weights.
const REQUIRED: [&str; 3] = ["config.json", "tokenizer.json", "tokenizer_config.json"];
/// What is used where it is there.
const OPTIONAL: [&str; 3] = ["generation_config.json", "chat_template.jinja", "special_tokens_map.json"];
/// The longest header of a safetensors file, as the format defines it.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// A base model on this machine.
pub struct ModelFolder {
    /// Where its files are.
    pub folder: PathBuf,
    /// Digest (`sha256:…`) of the files that are used.
    pub digest: String,
    /// Its dimensions.
    pub config: ModelConfig,
    /// The same for the planner, with the number of stored parameters.
    pub shape: ModelShape,
}

/// Why a model folder can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The store failed, or a file is gone.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Nothing is there.
    #[error(
        "no files under {uri} (base model): check baseModel.uri, and that the model was uploaded; \
         it must hold config.json, model.safetensors, tokenizer.json and tokenizer_config.json"
    )]
    Empty {
        /// Where the model should be.
        uri: Uri,
    },
    /// A file is missing.
    #[error("{uri} (base model) has no {file}{hint}")]
    MissingFile {
        /// Where the model is.
        uri: Uri,
        /// What is missing.
        file: &'static str,
        /// What to do about it.
        hint: &'static str,
    },
    /// A file holds what can't be used.
    #[error("{uri}: {problem}")]
    Unusable {
        /// Which file.
        uri: Uri,
        /// What is wrong with it.
        problem: String,
    },
}

impl ModelFolder {
    /// Brings a model to this machine (into `work`, unless it is on a disk already) and checks it. `uri` is a Hugging
    /// Face folder or a GGUF file.
    ///
    /// # Errors
    /// A file is missing or damaged, or the model is not supported.
    pub fn fetch(uri: &Uri, stores: &Stores, work: &Path) -> Result<Self, ModelError> {
        if !is_gguf(uri.file_name()) {
            return Self::fetch_folder(&Source::open(uri, stores, work)?);
        }
        let (folder, digest) = convert_gguf(uri, stores, work)?;
        let converted = Uri::File { path: folder.display().to_string() };
        Ok(Self { digest, ..Self::fetch_folder(&Source::open(&converted, stores, work)?)? })
    }

    fn fetch_folder(source: &Source) -> Result<Self, ModelError> {
        let (present, folder) = (source.files(), source.folder());
        if present.is_empty() {
            return Err(ModelError::Empty { uri: source.uri().clone() });
        }
        let missing = |file, hint| ModelError::MissingFile { uri: source.uri().clone(), file, hint };
        if let Some(file) = REQUIRED.into_iter().find(|file| !present.contains(*file)) {
            return Err(missing(file, hint(present)));
        }
        let mut files = Vec::new();
        for name in REQUIRED.into_iter().chain(OPTIONAL.into_iter().filter(|name| present.contains(*name))) {
            files.push(source.fetch(name)?);
        }
        let unusable = |file: &str, problem: String| ModelError::Unusable { uri: source.uri().join(file), problem };
        let weights = match (present.contains(WEIGHTS), present.contains(INDEX)) {
            (true, _) => vec![WEIGHTS.to_owned()],
            (false, true) => {
                files.push(source.fetch(INDEX)?);
                shards(&folder.join(INDEX)).map_err(|problem| unusable(INDEX, problem))?
            }
            (false, false) => return Err(missing(WEIGHTS, hint(present))),
        };
        let mut tensors = BTreeMap::new();
        for name in &weights {
            files.push(source.fetch(name)?);
            tensors.extend(header(&folder.join(name)).map_err(|problem| unusable(name, problem))?);
        }

        let config = fs::read_to_string(folder.join("config.json")).map_err(|error| error.to_string());
        let config = config.and_then(|text| ModelConfig::parse(&text));
        let config = config.map_err(|problem| unusable("config.json", problem))?;
        // An output layer beside the embedding may be used although the configuration ties them.
        let config = match config.tie_word_embeddings && tensors.contains_key("lm_head.weight") {
            true => ModelConfig::of_folder(folder).map_err(|error| unusable("config.json", error.to_string()))?,
            false => config,
        };
        check_tensors(&config, &tensors).map_err(|problem| unusable(&weights[0], problem))?;
        let (digest, shape) = (digest::of_files(&files), shape(&config, &tensors));
        Ok(Self { digest, shape, folder: folder.to_owned(), config })
    }
}

fn is_gguf(name: &str) -> bool {
    name.to_ascii_lowercase().ends_with(".gguf")
}

/// Turns a GGUF file into a folder under `work`, where it may be already, and tells the file's digest.
fn convert_gguf(uri: &Uri, stores: &Stores, work: &Path) -> Result<(PathBuf, String), ModelError> {
    let Fetched { path, file, is_copy } = fetch_file(uri, stores, work, "model.gguf")?;
    let digest = digest::of_files(&[file]);
    let folder = work.join(format!("gguf-{}", &digest["sha256:".len()..][..16]));
    if !folder.exists() {
        let unusable = |problem| ModelError::Unusable { uri: uri.clone(), problem };
        convert(&path, &folder).map_err(|error| unusable(error.to_string()))?;
        tracing::info!(%uri, "converted from GGUF");
    }
    if is_copy {
        // Weights are not kept twice.
        fs::remove_file(&path).map_err(|source| StoreError::Disk { path, source })?;
    }
    Ok((folder, digest))
}

/// What to tell the owner of a folder in which a file is missing.
fn hint(present: &BTreeSet<String>) -> &'static str {
    match present {
        files if files.iter().any(|name| is_gguf(name)) => ", but a GGUF file: name that file in baseModel.uri",
        files if files.iter().any(|name| name.ends_with(".bin") || name.ends_with(".pt")) => {
            ", but pickled weights: save the model as safetensors"
        }
        _ => ": baseModel.uri must be a whole Hugging Face model folder",
    }
}

/// The files that an index names.
fn shards(index: &Path) -> Result<Vec<String>, String> {
    let text = fs::read(index).map_err(|error| error.to_string())?;
    let index: Value = serde_json::from_slice(&text).map_err(|error| format!("not valid JSON: {error}"))?;
    let map = index["weight_map"].as_object().ok_or("has no weight_map")?;
    let names: BTreeSet<&str> = map.values().filter_map(Value::as_str).collect();
    match names.iter().find(|name| name.contains('/') || !name.ends_with(".safetensors")) {
        Some(name) => Err(format!("weight_map names {name:?}, which is no safetensors file of this folder")),
        None if names.is_empty() => Err("weight_map is empty".into()),
        None => Ok(names.into_iter().map(str::to_owned).collect()),
    }
}

/// A stored tensor.
pub(crate) struct Tensor {
    dtype: Dtype,
    shape: Vec<usize>,
}

/// The tensors of a safetensors file, by name. Only its header is read.
fn header(path: &Path) -> Result<BTreeMap<String, Tensor>, String> {
    let io = |error: std::io::Error| error.to_string();
    let mut file = File::open(path).map_err(io)?;
    let bytes = file.metadata().map_err(io)?.len();
    read_header(&mut file, bytes)
}

/// The same of a file that has so many bytes.
pub(crate) fn read_header(file: &mut impl Read, bytes: u64) -> Result<BTreeMap<String, Tensor>, String> {
    let mut length = [0; 8];
    file.read_exact(&mut length).map_err(|_| "too short for a safetensors file; upload it again")?;
    let header_bytes = u64::from_le_bytes(length);
    if header_bytes > MAX_HEADER_BYTES {
        return Err("not a safetensors file: its header would be too long".into());
    }
    let mut header = Vec::new();
    file.take(header_bytes).read_to_end(&mut header).map_err(|error| error.to_string())?;
    let metadata: Metadata =
        serde_json::from_slice(&header).map_err(|error| format!("not a whole safetensors file: {error}"))?;
    let expected = 8 + header_bytes + metadata.data_len() as u64;
    if bytes != expected {
        return Err(format!(
            "has {bytes} bytes, its header says {expected}: the upload was cut short; upload it again"
        ));
    }
    let tensor = |info: &TensorInfo| Tensor { dtype: info.dtype, shape: info.shape.clone() };
    Ok(metadata.tensors().into_iter().map(|(name, info)| (name, tensor(info))).collect())
}

/// Checks that every weight that the configuration asks for is there, in its shape.
fn check_tensors(config: &ModelConfig, tensors: &BTreeMap<String, Tensor>) -> Result<(), String> {
    for (name, shape) in config.tensors() {
        match tensors.get(&name) {
            None => return Err(format!("{name} is missing; config.json asks for shape {shape:?}")),
            // What else belongs to a weight in few bits, the engine checks as it loads it.
            Some(Tensor { dtype, shape: packed })
                if matches!(config.stored_as, Some(EngineQuantization::FourBit { .. }))
                    && packed.iter().product::<usize>() * dtype.bitsize() / 8
                        == shape.iter().product::<usize>().div_ceil(2) => {}
            Some(Tensor { dtype: Dtype::I8, shape: found }) if config.stored_as.is_some() && *found == shape => {}
            Some(tensor) if tensor.shape != shape => {
                return Err(format!("{name} has shape {:?}; config.json asks for {shape:?}", tensor.shape));
            }
            Some(Tensor { dtype: Dtype::F32 | Dtype::F16 | Dtype::BF16, .. }) => {}
            Some(tensor) => return Err(format!("{name} is stored as {:?}; supported: F32, F16, BF16", tensor.dtype)),
        }
    }
    Ok(())
}

fn stored_as(quantization: EngineQuantization) -> Quantization {
    let (bits, kind, double_quant) = match quantization {
        EngineQuantization::Int8 => (8, QuantizationType::Int8, false),
        EngineQuantization::FourBit { code: FourBitCode::Nf4, double_quant } => {
            (4, QuantizationType::Nf4, double_quant)
        }
        EngineQuantization::FourBit { code: FourBitCode::Fp4, double_quant } => {
            (4, QuantizationType::Fp4, double_quant)
        }
    };
    Quantization { bits, kind, double_quant, outlier_threshold: None }
}

fn shape(config: &ModelConfig, tensors: &BTreeMap<String, Tensor>) -> ModelShape {
    let size = |shape: &[usize]| shape.iter().product::<usize>() as u64;
    let parameters = config.tensors().iter().map(|(_, shape)| size(shape)).sum();
    let bits: u64 = tensors.values().map(|tensor| size(&tensor.shape) * tensor.dtype.bitsize() as u64).sum();
    ModelShape {
        parameters,
        layers: config.num_hidden_layers as u64,
        hidden_size: config.hidden_size as u64,
        intermediate_size: config.intermediate_size as u64,
        vocab_size: config.vocab_size as u64,
        bytes_per_parameter: (bits / 8).div_ceil(parameters.max(1)),
        stored_as: config.stored_as.map(stored_as),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_in_few_bits_are_counted_by_what_they_stand_for() {
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../engine/tests/fixtures");
        let shape = |name: &str| {
            let folder = fixtures.join(name);
            let (config, tensors) = (ModelConfig::load(&folder).unwrap(), header(&folder.join(WEIGHTS)).unwrap());
            check_tensors(&config, &tensors).unwrap();
            shape(&config, &tensors)
        };
        let float = shape("tied/model");
        for name in ["quantized/nf4", "quantized/fp4", "quantized/int8"] {
            let stored = shape(name);
            let kind = stored.stored_as.map(|stored| serde_json::to_value(stored.kind).unwrap());
            assert_eq!(kind.unwrap(), name.rsplit('/').next().unwrap());
            assert_eq!(stored.parameters, float.parameters, "{name}");
            assert!(stored.bytes_per_parameter < float.bytes_per_parameter, "{name}");
        }
    }
}
