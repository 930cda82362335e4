//! `quantization_config`: how a checkpoint stores its weights, if in few bits.

use serde_json::Value;

use super::known::{refuse_unknown_in, shown};
use crate::quantize::{FourBitCode, Quantization};

/// Fields that transformers writes for bitsandbytes. Those that are not read say how it computes, and what it leaves as it
/// is, which the tensors themselves tell.
const KNOWN: [&str; 13] = [
    "_load_in_4bit",
    "_load_in_8bit",
    "bnb_4bit_compute_dtype",
    "bnb_4bit_quant_storage",
    "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant",
    "llm_int8_enable_fp32_cpu_offload",
    "llm_int8_skip_modules",
    "llm_int8_threshold",
    "load_in_4bit",
    "load_in_8bit",
    "modules_to_not_convert",
    "quant_method",
];

/// Reads a `quantization_config`.
pub(super) fn read(config: &Value) -> Result<Quantization, String> {
    let name = |field: &str| format!("quantization_config.{field}");
    let fields =
        config.as_object().ok_or_else(|| format!("quantization_config is {}; expected an object", shown(config)))?;
    // Older files of bitsandbytes don't say it.
    let is_older = config["load_in_8bit"] == true || config["load_in_4bit"] == true;
    match &config["quant_method"] {
        Value::String(method) if method == "bitsandbytes" => {}
        Value::Null if is_older => {}
        method => {
            return Err(format!(
                "{} is {}; supported: bitsandbytes. Name the model that is not quantized: method QLoRA quantizes it as it \
                 loads",
                name("quant_method"),
                shown(method)
            ));
        }
    }
    refuse_unknown_in("quantization_config", fields, &KNOWN)?;
    let flag = |field: &str| match &config[field] {
        Value::Null => Ok(false),
        Value::Bool(flag) => Ok(*flag),
        other => Err(format!("{} is {}; expected true or false", name(field), shown(other))),
    };
    match (flag("load_in_4bit")?, flag("load_in_8bit")?) {
        (true, true) => Err("quantization_config has both load_in_4bit and load_in_8bit".into()),
        (false, false) => Err("quantization_config has neither load_in_4bit nor load_in_8bit".into()),
        (false, true) => Ok(Quantization::Int8),
        (true, false) => {
            let code = match &config["bnb_4bit_quant_type"] {
                Value::String(code) if code == "nf4" => FourBitCode::Nf4,
                Value::String(code) if code == "fp4" => FourBitCode::Fp4,
                // As bitsandbytes takes it where nothing is said.
                Value::Null => FourBitCode::Fp4,
                other => {
                    return Err(format!("{} is {}; supported: nf4, fp4", name("bnb_4bit_quant_type"), shown(other)));
                }
            };
            Ok(Quantization::FourBit { code, double_quant: flag("bnb_4bit_use_double_quant")? })
        }
    }
}
