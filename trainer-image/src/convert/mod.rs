//! GGUF files, in and out. `convert`: a model becomes a Hugging Face folder (config.json, model.safetensors,
//! tokenizer.json, …). `export`: a LoRA adapter becomes a file for llama.cpp.
//!
//! A model's weights are dequantized to f32, because nothing smaller holds every value of a quantized block exactly.

mod adapter;
mod architecture;
mod config;
mod gguf;
mod kinds;
mod names;
mod scan;
#[cfg(test)]
pub(crate) mod tests;
mod tokenizer;
mod weights;

use std::{
    fs,
    path::{Path, PathBuf},
};

pub use adapter::gguf_lora;
pub use gguf::Gguf;
pub(crate) use scan::GgufScan;
use serde_json::Value;

/// Why a GGUF file was not converted.
#[derive(Debug, thiserror::Error)]
pub enum ConvertError {
    /// A file can't be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The output folder is taken.
    #[error("{} exists already: remove it, or choose another --out", .0.display())]
    Exists(PathBuf),
    /// An adapter that can't be exported.
    #[error("the adapter can't be exported: {0}")]
    Adapter(String),
    /// Not a GGUF file, or a damaged one.
    #[error("{} is no whole GGUF file: {problem}; download it again", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What the parser says.
        problem: String,
    },
    /// A tensor is stored in a way that is not known.
    #[error(
        "{}: a tensor's type is none of F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 and Q2_K to Q6_K; take another file \
         of the model: {problem}",
        path.display()
    )]
    UnknownType {
        /// The file.
        path: PathBuf,
        /// What the parser says.
        problem: String,
    },
    /// Something else than a model that can be converted, and what to do.
    #[error("{0}")]
    Kind(String),
    /// A metadata key is missing.
    #[error("the GGUF has no metadata key `{0}`: it is not a complete model")]
    MissingKey(String),
    /// A metadata key holds something else than expected.
    #[error("metadata key `{key}` is {found}; supported: {supported}")]
    UnsupportedKey {
        /// The key.
        key: String,
        /// What it holds.
        found: String,
        /// What would be converted.
        supported: String,
    },
    /// A tensor is missing.
    #[error("the GGUF has no tensor `{0}`: it is not a complete model")]
    MissingTensor(String),
    /// A tensor has another shape than the metadata says.
    #[error("tensor `{name}` has shape {found:?}; the metadata asks for {expected:?}")]
    Shape {
        /// The tensor.
        name: String,
        /// Its shape.
        found: Vec<usize>,
        /// What the metadata asks for.
        expected: Vec<usize>,
    },
    /// A tensor that would change the numbers in a way that is not known, and why.
    #[error("tensor `{0}` can't be converted: {1}")]
    UnknownTensor(String, &'static str),
}

impl ConvertError {
    fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { path, source }
    }
}

/// Converts the GGUF file `model` to the new folder `out`. The folder appears when it is complete, never before.
///
/// # Errors
/// The file is damaged, of another family, or uses what is not supported; the message names the key or tensor.
pub fn convert(model: &Path, out: &Path) -> Result<(), ConvertError> {
    convert_with(model, out, weights::write)
}

/// The same without its weights: `model` may have holes in place of them, and `model.safetensors` has. Returns the names
/// there of the tensors that `model` calls `named`.
///
/// # Errors
/// As for [`convert`].
pub(crate) fn convert_outline(model: &Path, out: &Path, named: &[String]) -> Result<Vec<String>, ConvertError> {
    convert_with(model, out, |gguf, dimensions, path| weights::outline(gguf, dimensions, path, named))
}

fn convert_with<T>(
    model: &Path,
    out: &Path,
    write_weights: impl FnOnce(&mut Gguf, &config::Dimensions, &Path) -> Result<T, ConvertError>,
) -> Result<T, ConvertError> {
    let taken = fs::read_dir(out).is_ok_and(|mut entries| entries.next().is_some()) || out.is_file();
    if taken {
        return Err(ConvertError::Exists(out.to_owned()));
    }
    let mut gguf = Gguf::open(model)?;
    kinds::refuse_other_kinds(&gguf)?;
    let dimensions = config::Dimensions::read(&mut gguf)?;
    let tokenizer = tokenizer::Tokenizer::read(&gguf)?;

    let partial = sibling(out);
    fs::create_dir_all(&partial).map_err(ConvertError::io(&partial))?;
    let written = (|| {
        write_json(&partial.join("config.json"), &dimensions.config_json(&tokenizer))?;
        write_json(&partial.join("generation_config.json"), &config::generation_config_json(&tokenizer))?;
        write_json(&partial.join("tokenizer.json"), &tokenizer.tokenizer_json())?;
        write_json(
            &partial.join("tokenizer_config.json"),
            &tokenizer.tokenizer_config_json(dimensions.context_length),
        )?;
        let weights = write_weights(&mut gguf, &dimensions, &partial.join("model.safetensors"))?;
        if out.exists() {
            fs::remove_dir(out).map_err(ConvertError::io(out))?;
        }
        fs::rename(&partial, out).map_err(ConvertError::io(out))?;
        Ok(weights)
    })();
    if written.is_err() {
        // The conversion's own error says more than a failed clean-up would.
        let _ = fs::remove_dir_all(&partial);
    }
    written
}

/// A hidden folder beside `out`, so that a rename moves no data.
pub(crate) fn sibling(out: &Path) -> PathBuf {
    let name = out.file_name().unwrap_or_default().to_string_lossy();
    out.with_file_name(format!(".{name}.{}.partial", std::process::id()))
}

fn write_json(path: &Path, value: &Value) -> Result<(), ConvertError> {
    let text = format!("{value:#}\n");
    fs::write(path, text).map_err(ConvertError::io(path))
}
