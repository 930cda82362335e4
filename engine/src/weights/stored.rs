//! Weights that a checkpoint holds in 4 or 8 bits, as bitsandbytes saves them through transformers. Beside `NAME.weight`
//! lie, in 4 bits, `NAME.weight.absmax`, `.quant_map`, `.nested_absmax`, `.nested_quant_map` and a JSON text,
//! `.quant_state.bitsandbytes__nf4` (or fp4); in 8 bits, `NAME.SCB` and `NAME.weight_format`. The codes in 4 bits may
//! be typed as anything (`bnb_4bit_quant_storage`): their bytes count.

use safetensors::Dtype;
use serde::Deserialize;

use super::{Bytes, Checkpoint};
use crate::quantize::{BLOCK, EightBit, FourBit, FourBitCode, STATE_BLOCK, Scales, StoredWeight, dynamic_map};

/// What the text beside a weight in 4 bits says.
#[derive(Deserialize)]
struct QuantState {
    quant_type: FourBitCode,
    blocksize: usize,
    shape: Vec<usize>,
    #[serde(default)]
    nested_blocksize: Option<usize>,
    #[serde(default)]
    nested_offset: Option<f32>,
}

/// The weight `name` [rows, cols], if the checkpoint holds it in few bits.
pub(super) fn read(
    checkpoint: &Checkpoint,
    name: &str,
    [rows, cols]: [usize; 2],
) -> Result<Option<StoredWeight>, String> {
    let part = |suffix: &str| checkpoint.bytes(&format!("{name}.{suffix}"));
    let state = ["nf4", "fp4"].iter().find_map(|kind| part(&format!("quant_state.bitsandbytes__{kind}")));
    if let Some(state) = state {
        let state: QuantState = serde_json::from_slice(state.data)
            .map_err(|error| format!("{name}: its quant_state can't be read: {error}"))?;
        return four_bit(checkpoint, name, [rows, cols], &state).map(StoredWeight::FourBit).map(Some);
    }
    let scales = name.strip_suffix(".weight").and_then(|module| checkpoint.bytes(&format!("{module}.SCB")));
    scales.map(|scales| eight_bit(checkpoint, name, [rows, cols], scales).map(StoredWeight::EightBit)).transpose()
}

fn four_bit(
    checkpoint: &Checkpoint,
    name: &str,
    [rows, cols]: [usize; 2],
    state: &QuantState,
) -> Result<FourBit, String> {
    let count = rows * cols;
    if state.shape != [rows, cols] {
        return Err(format!(
            "{name} has shape {:?} in its quant_state; config.json asks for {:?}",
            state.shape,
            [rows, cols]
        ));
    }
    if state.blocksize != BLOCK || state.nested_blocksize.is_some_and(|size| size != STATE_BLOCK) {
        let (size, nested) = (state.blocksize, state.nested_blocksize.unwrap_or(STATE_BLOCK));
        return Err(format!(
            "{name} has blocks of {size}, and of {nested} scales; supported: {BLOCK} and {STATE_BLOCK}"
        ));
    }
    let part = |suffix: &str, dtype: Dtype, count: usize| bytes(checkpoint, &format!("{name}.{suffix}"), dtype, count);
    let floats = |suffix: &str, count: usize| Ok::<_, String>(floats(part(suffix, Dtype::F32, count)?));
    let code = state.quant_type;
    if floats("quant_map", 16)? != code.table() {
        return Err(format!("{name}.quant_map is not that of {code:?}"));
    }
    let blocks = count.div_ceil(BLOCK);
    let scales = match state.nested_offset {
        None => Scales::Plain(floats("absmax", blocks)?),
        Some(offset) => {
            if floats("nested_quant_map", 256)? != dynamic_map(true) {
                return Err(format!("{name}.nested_quant_map is not bitsandbytes' dynamic map"));
            }
            let absmax = floats("nested_absmax", blocks.div_ceil(STATE_BLOCK))?;
            Scales::Nested { codes: part("absmax", Dtype::U8, blocks)?.to_vec(), absmax, offset }
        }
    };
    let codes = checkpoint.bytes(name).map(|found| found.data).filter(|bytes| bytes.len() == count.div_ceil(2));
    let codes = codes.ok_or_else(|| format!("{name} is not {} bytes of codes", count.div_ceil(2)))?.to_vec();
    Ok(FourBit { rows, cols, code, codes, scales })
}

fn eight_bit(
    checkpoint: &Checkpoint,
    name: &str,
    [rows, cols]: [usize; 2],
    scales: Bytes<'_>,
) -> Result<EightBit, String> {
    let codes = bytes(checkpoint, name, Dtype::I8, rows * cols)?;
    let format = name.strip_suffix(".weight").map(|module| format!("{module}.weight_format"));
    if let Some((format, found)) = format.and_then(|format| Some((format.clone(), checkpoint.bytes(&format)?)))
        && found.data != [0]
    {
        return Err(format!("{format} is {:?}; supported: [0], rows one after the other", found.data));
    }
    if scales.dtype != Dtype::F32 || scales.data.len() != 4 * rows {
        return Err(format!("{name}: its SCB must be {rows} scales in F32"));
    }
    Ok(EightBit { rows, cols, codes: codes.iter().map(|&code| code as i8).collect(), absmax: floats(scales.data) })
}

/// The bytes of a tensor that must have so many values of this type.
fn bytes<'a>(checkpoint: &'a Checkpoint, name: &str, dtype: Dtype, count: usize) -> Result<&'a [u8], String> {
    let found = checkpoint.bytes(name).ok_or_else(|| format!("{name} is missing"))?;
    match found.dtype == dtype && found.data.len() == count * dtype.bitsize() / 8 {
        true => Ok(found.data),
        false => Err(format!("{name} is not {count} values of type {dtype:?}")),
    }
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}
