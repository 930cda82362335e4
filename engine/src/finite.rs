//! NaN and infinities in a safetensors file, found as its bytes go by: whoever computes the file's digest reads it anyway.

use std::io::{self, Write};

use safetensors::Dtype;
use safetensors::tensor::Metadata;

/// Names the tensors of a safetensors file that hold a value which is not finite. Write the file into it.
///
/// A file whose header can't be read has no such tensors: reading its header is what refuses it.
#[derive(Default)]
pub struct FiniteScan {
    /// The header's length and the header, until both are whole.
    header: Vec<u8>,
    /// Once the header is whole: floating-point tensors by their place in the data.
    tensors: Option<Vec<Scanned>>,
    /// The tensor that the next byte belongs to, or lies before.
    current: usize,
    /// Bytes of the data that went by.
    position: usize,
    /// The beginning of a value whose end has not come yet.
    partial: Vec<u8>,
}

struct Scanned {
    name: String,
    dtype: Dtype,
    start: usize,
    end: usize,
    is_finite: bool,
}

/// The longest header of a safetensors file, as the format defines it.
const MAX_HEADER_BYTES: u64 = 100_000_000;
/// Bytes of the header's length.
const LENGTH_BYTES: usize = 8;

impl FiniteScan {
    /// The tensors that are not finite.
    pub fn into_names(self) -> Vec<String> {
        let tensors = self.tensors.unwrap_or_default().into_iter();
        tensors.filter(|tensor| !tensor.is_finite).map(|tensor| tensor.name).collect()
    }

    /// Takes what belongs to the header, and returns the rest.
    fn take_header<'a>(&mut self, bytes: &'a [u8]) -> &'a [u8] {
        let missing = LENGTH_BYTES.saturating_sub(self.header.len()).min(bytes.len());
        let (length, bytes) = bytes.split_at(missing);
        self.header.extend_from_slice(length);
        let Some(Ok(length)) = self.header.get(..LENGTH_BYTES).map(<[u8; LENGTH_BYTES]>::try_from) else {
            return bytes;
        };
        let length = u64::from_le_bytes(length);
        if length > MAX_HEADER_BYTES {
            self.tensors = Some(Vec::new());
            return bytes;
        }
        let missing = (LENGTH_BYTES + length as usize - self.header.len()).min(bytes.len());
        let (header, bytes) = bytes.split_at(missing);
        self.header.extend_from_slice(header);
        if self.header.len() == LENGTH_BYTES + length as usize {
            self.tensors = Some(floats(&std::mem::take(&mut self.header)[LENGTH_BYTES..]));
        }
        bytes
    }

    fn scan(&mut self, mut bytes: &[u8]) {
        let Some(tensors) = &mut self.tensors else { return };
        while let Some(tensor) = tensors.get_mut(self.current) {
            let before = tensor.start.saturating_sub(self.position).min(bytes.len());
            self.position += before;
            // A damaged header may have tensors overlap.
            let missing = tensor.end.saturating_sub(self.position);
            let (own, rest) = bytes[before..].split_at(missing.min(bytes.len() - before));
            self.position += own.len();
            bytes = rest;
            if tensor.is_finite {
                tensor.is_finite = are_finite(&mut self.partial, own, tensor.dtype);
            }
            if self.position < tensor.end {
                return;
            }
            self.current += 1;
            self.partial.clear();
        }
    }
}

impl Write for FiniteScan {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let data = if self.tensors.is_none() { self.take_header(bytes) } else { bytes };
        self.scan(data);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The floating-point tensors of a header, in the order of their bytes.
fn floats(header: &[u8]) -> Vec<Scanned> {
    let Ok(metadata) = serde_json::from_slice::<Metadata>(header) else { return Vec::new() };
    let tensors = metadata.tensors().into_iter().filter(|(_, info)| mask(info.dtype).is_some());
    let mut tensors: Vec<Scanned> = tensors
        .map(|(name, info)| {
            let (start, end) = info.data_offsets;
            Scanned { name, dtype: info.dtype, start, end, is_finite: true }
        })
        .collect();
    tensors.sort_by_key(|tensor| tensor.start);
    tensors
}

/// Bits of the exponent: all set in NaN and infinities, and nowhere else.
fn mask(dtype: Dtype) -> Option<u32> {
    match dtype {
        Dtype::F16 => Some(0x7C00),
        Dtype::BF16 => Some(0x7F80),
        Dtype::F32 => Some(0x7F80_0000),
        _ => None,
    }
}

/// Whether values are finite. `partial` holds the bytes of one that has begun before them, and then of the last, if it
/// has not ended.
fn are_finite(partial: &mut Vec<u8>, bytes: &[u8], dtype: Dtype) -> bool {
    let width = dtype.bitsize() / 8;
    let missing = if partial.is_empty() { 0 } else { (width - partial.len()).min(bytes.len()) };
    let (end, bytes) = bytes.split_at(missing);
    partial.extend_from_slice(end);
    let mut finite = true;
    if partial.len() == width {
        finite = all_finite(partial, dtype);
        partial.clear();
    }
    let whole = bytes.len() - bytes.len() % width;
    partial.extend_from_slice(&bytes[whole..]);
    finite && all_finite(&bytes[..whole], dtype)
}

/// The same of whole values. The loops have no exit, so that the compiler makes vectors of them.
fn all_finite(bytes: &[u8], dtype: Dtype) -> bool {
    let mask = mask(dtype).unwrap_or(u32::MAX);
    match dtype {
        Dtype::F32 => {
            let values = bytes.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]));
            !values.fold(false, |found, bits| found | (bits & mask == mask))
        }
        _ => {
            let mask = mask as u16;
            let values = bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]]));
            !values.fold(false, |found, bits| found | (bits & mask == mask))
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use safetensors::tensor::TensorView;

    use super::*;

    /// A file of a tensor of each type, of which the one of this number has this value somewhere.
    fn file(bad: usize, value: f32, at: usize) -> Vec<u8> {
        let values = |number: usize| (0..7).map(move |i| if number == bad && i == at { value } else { i as f32 - 3.0 });
        let f16: Vec<u8> = values(0).flat_map(|x| half::f16::from_f32(x).to_le_bytes()).collect();
        let f32: Vec<u8> = values(1).flat_map(f32::to_le_bytes).collect();
        let bf16: Vec<u8> = values(2).flat_map(|x| half::bf16::from_f32(x).to_le_bytes()).collect();
        let tensors = [
            ("f16", Dtype::F16, f16.as_slice()),
            ("f32", Dtype::F32, &f32),
            ("bf16", Dtype::BF16, &bf16),
            // Codes may look like anything.
            ("codes", Dtype::U8, &[0xff; 7]),
        ];
        let views = tensors.map(|(name, dtype, bytes)| (name, TensorView::new(dtype, vec![7], bytes).unwrap()));
        safetensors::serialize(views, None).unwrap()
    }

    fn names(file: &[u8], piece: usize) -> Vec<String> {
        let mut scan = FiniteScan::default();
        file.chunks(piece).for_each(|piece| scan.write_all(piece).unwrap());
        scan.into_names()
    }

    #[test]
    fn tensors_with_nan_or_infinity_are_named_however_the_bytes_come() {
        for value in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for (number, name) in ["f16", "f32", "bf16"].into_iter().enumerate() {
                for at in 0..7 {
                    let file = file(number, value, at);
                    for piece in [1, 2, 3, 5, 7, 64, 1 << 20] {
                        assert_eq!(names(&file, piece), [name], "{value} at {at}, {piece} bytes at once");
                    }
                }
            }
        }
    }

    #[test]
    fn the_largest_finite_values_are_finite() {
        assert!(names(&file(0, 65504.0, 2), 4).is_empty());
        for number in [1, 2] {
            assert!(names(&file(number, 3.38e38, 3), 4).is_empty());
        }
    }

    #[test]
    fn tensors_that_overlap_or_end_before_they_begin_are_no_panic() {
        let header = br#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},
            "b":{"dtype":"F16","shape":[1],"data_offsets":[2,4]},"c":{"dtype":"F32","shape":[1],"data_offsets":[9,5]}}"#;
        let bytes = [&(header.len() as u64).to_le_bytes(), &header[..], &[0xff; 16]].concat();
        (1..30).for_each(|piece| drop(names(&bytes, piece)));
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), at: prop::sample::Index, byte: u8) {
            names(&bytes, 7);
            let mut damaged = file(0, 1.0, 0);
            let at = at.index(damaged.len());
            damaged[at] = byte;
            names(&damaged, 9);
        }
    }
}
