//! NaN and infinities in a GGUF file, found as its bytes go by.

use std::{
    io::{self, Write},
    ops::Range,
};

use candle_core::{
    Device,
    quantized::{GgmlDType, ggml_file::qtensor_from_ggml},
};

use super::Gguf;

/// Names the tensors of a GGUF file that hold a value which is not finite. Write the file into it.
pub(crate) struct GgufScan {
    tensors: Vec<Scanned>,
    /// Bytes that went by.
    position: u64,
}

struct Scanned {
    name: String,
    dtype: GgmlDType,
    place: Range<u64>,
    is_finite: bool,
    /// The beginning of a block whose end has not come yet.
    partial: Vec<u8>,
}

impl GgufScan {
    /// A scan of the file with this header.
    pub(crate) fn new(gguf: &Gguf) -> Self {
        let scanned = |(name, dtype, place): (&str, GgmlDType, Range<u64>)| Scanned {
            name: name.to_owned(),
            dtype,
            place,
            is_finite: true,
            partial: Vec::new(),
        };
        Self { tensors: gguf.places().map(scanned).collect(), position: 0 }
    }

    /// The tensors that are not finite.
    pub(crate) fn into_names(self) -> Vec<String> {
        self.tensors.into_iter().filter(|tensor| !tensor.is_finite).map(|tensor| tensor.name).collect()
    }
}

impl Write for GgufScan {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let here = self.position..self.position + bytes.len() as u64;
        for tensor in self.tensors.iter_mut().filter(|tensor| tensor.is_finite) {
            let (from, to) = (tensor.place.start.max(here.start), tensor.place.end.min(here.end));
            if from < to {
                tensor.take(&bytes[(from - here.start) as usize..(to - here.start) as usize]);
            }
        }
        self.position = here.end;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Scanned {
    fn take(&mut self, bytes: &[u8]) {
        // In a vector of its own, which candle takes to be aligned as the numbers in it are.
        let mut blocks = std::mem::take(&mut self.partial);
        blocks.extend_from_slice(bytes);
        let whole = blocks.len() / self.dtype.type_size();
        self.partial = blocks.split_off(whole * self.dtype.type_size());
        self.is_finite = are_finite(self.dtype, &blocks, whole * self.dtype.block_size());
    }
}

/// Whether the numbers of whole blocks are finite. A type that can't be dequantized has none that are not: reading the tensor
/// is what refuses it.
fn are_finite(dtype: GgmlDType, blocks: &[u8], numbers: usize) -> bool {
    let values = qtensor_from_ggml(dtype, blocks, vec![numbers], &Device::Cpu)
        .and_then(|tensor| tensor.dequantize(&Device::Cpu)?.to_vec1::<f32>());
    values.ok().is_none_or(|values| values.iter().all(|value| value.is_finite()))
}
