//! The tensors that a model's files hold, by their headers alone, and the dimensions that the planner counts with.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io::Read,
    path::Path,
};

use safetensors::{
    Dtype,
    tensor::{Metadata, TensorInfo},
};
use tunesmith_crds::{
    fine_tune_job::{Quantization, QuantizationType},
    run::ModelShape,
};
use tunesmith_engine::{FourBitCode, ModelConfig, Quantization as EngineQuantization};

/// The longest header of a safetensors file, as the format defines it.
pub(super) const MAX_HEADER_BYTES: u64 = 100_000_000;

/// A stored tensor.
pub(crate) struct Tensor {
    dtype: Dtype,
    shape: Vec<usize>,
}

/// The tensors of a safetensors file, by name. Only its header is read.
pub(super) fn header(path: &Path) -> Result<BTreeMap<String, Tensor>, String> {
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
        let what = if bytes < expected { "the upload was cut short" } else { "something else follows" };
        return Err(format!("has {bytes} bytes, its header says {expected}: {what}; upload it again"));
    }
    let tensor = |info: &TensorInfo| Tensor { dtype: info.dtype, shape: info.shape.clone() };
    Ok(metadata.tensors().into_iter().map(|(name, info)| (name, tensor(info))).collect())
}

/// The tensors that are not finite and that a model of this configuration uses: its weights, and the scales of those in few
/// bits. Codes may be typed as floats, and look like anything.
pub(super) fn used<'a>(
    names: &'a [String],
    config: &ModelConfig,
    tensors: &BTreeMap<String, Tensor>,
) -> Vec<&'a String> {
    let weights: BTreeSet<String> = config.tensors().into_iter().map(|(name, _)| name).collect();
    let is_used = |name: &str| {
        let holds_codes = tensors.contains_key(&format!("{name}.absmax"));
        let of_scales = [".absmax", ".nested_absmax"].iter().find_map(|end| name.strip_suffix(end));
        let of_rows = name.strip_suffix(".SCB").map(|module| format!("{module}.weight"));
        (weights.contains(name) && !holds_codes)
            || of_scales.is_some_and(|weight| weights.contains(weight))
            || of_rows.is_some_and(|weight| weights.contains(&weight))
    };
    names.iter().filter(|name| is_used(name)).collect()
}

/// What to say of tensors that are not finite.
pub(super) fn not_finite(names: &[&String]) -> String {
    let shown: Vec<&str> = names.iter().take(3).map(|name| name.as_str()).collect();
    let others = match names.len() - shown.len() {
        0 => String::new(),
        others => format!(" and {others} more tensors"),
    };
    format!(
        "NaN or infinite values in {}{others}: nothing can be trained on it. Download or convert the model again, or name \
         another",
        shown.join(", ")
    )
}

/// A sentence about tensors that a model of this configuration has no place for. Frequencies of the rotary embedding, which
/// old files hold, and an output layer that is the embedding are no such tensors.
pub(super) fn unplaced(config: &ModelConfig, tensors: &BTreeMap<String, Tensor>) -> Option<String> {
    const SHOWN: usize = 3;
    let weights: BTreeSet<String> = config.tensors().into_iter().map(|(name, _)| name).collect();
    // What belongs to a weight in few bits has its name, or that of its module, with an end.
    let belongs = |name: &str| {
        let module = name.strip_suffix(".SCB").or(name.strip_suffix(".weight_format"));
        name == "lm_head.weight"
            || name.ends_with(".rotary_emb.inv_freq")
            || module.is_some_and(|module| weights.contains(&format!("{module}.weight")))
            || name.match_indices('.').any(|(end, _)| weights.contains(&name[..end]))
    };
    let unplaced: Vec<&str> =
        tensors.keys().map(String::as_str).filter(|name| !weights.contains(*name) && !belongs(name)).collect();
    let more = if unplaced.len() > SHOWN { ", …" } else { "" };
    let shown = unplaced.iter().take(SHOWN).copied().collect::<Vec<_>>().join(", ");
    (!unplaced.is_empty()).then(|| {
        format!(
            "the model's files hold {} tensors that its config.json has no place for, and that are not used: {shown}{more}",
            unplaced.len()
        )
    })
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

/// Dimensions, and how much is stored for each parameter.
pub(super) fn shape(config: &ModelConfig, tensors: &BTreeMap<String, Tensor>) -> ModelShape {
    let size = |shape: &[usize]| shape.iter().product::<usize>() as u64;
    let parameters = config.tensors().iter().map(|(_, shape)| size(shape)).sum();
    // What belongs to a weight in few bits has its name, or that of its module, with an end.
    let modules: BTreeSet<String> =
        config.tensors().into_iter().filter_map(|(name, _)| Some(name.rsplit_once('.')?.0.to_owned())).collect();
    let is_used = |name: &str| name.match_indices('.').any(|(end, _)| modules.contains(&name[..end]));
    let used = tensors.iter().filter(|(name, _)| is_used(name)).map(|(_, tensor)| tensor);
    let bits: u64 = used.map(|tensor| size(&tensor.shape).saturating_mul(tensor.dtype.bitsize() as u64)).sum();
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
