//! A tensor in the host's memory or in a mapped file, in the type in which it is stored.

use std::sync::Arc;

use memmap2::Mmap;
use rayon::prelude::*;
use safetensors::Dtype;

/// A tensor on the host, as a checkpoint stores it.
pub struct HostTensor {
    shape: Vec<usize>,
    values: Values,
}

/// Numbers that one task rounds.
pub(crate) const CHUNK: usize = 1 << 15;

enum Values {
    Floats(Vec<f32>),
    /// Little-endian.
    Bf16(Vec<u8>),
    Mapped {
        map: Arc<Mmap>,
        start: usize,
        len: usize,
        dtype: Dtype,
    },
}

impl HostTensor {
    /// A tensor of these values; their number is the shape's.
    pub fn new(values: Vec<f32>, shape: Vec<usize>) -> Self {
        assert_eq!(values.len(), shape.iter().product::<usize>());
        HostTensor { shape, values: Values::Floats(values) }
    }

    /// A tensor whose values lie in a mapped file, `len` bytes from `start` on.
    pub(crate) fn mapped(map: Arc<Mmap>, (start, len): (usize, usize), dtype: Dtype, shape: Vec<usize>) -> Self {
        HostTensor { shape, values: Values::Mapped { map, start, len, dtype } }
    }

    /// A tensor of these values rounded to bf16, to the nearest and ties to even.
    pub(crate) fn bf16(values: &[f32], shape: Vec<usize>) -> Self {
        let mut bytes = vec![0; 2 * values.len()];
        round(values, &mut bytes);
        HostTensor { shape, values: Values::Bf16(bytes) }
    }

    /// Puts these values, rounded to bf16, in the place of as many that are.
    pub(crate) fn set_bf16(&mut self, values: &[f32]) {
        match &mut self.values {
            Values::Bf16(bytes) if bytes.len() == 2 * values.len() => round(values, bytes),
            _ => *self = Self::bf16(values, std::mem::take(&mut self.shape)),
        }
    }

    /// The shape, row-major.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The values where they lie, if they are f32 and aligned.
    pub fn as_f32(&self) -> Option<&[f32]> {
        match &self.values {
            Values::Floats(values) => Some(values),
            Values::Mapped { map, start, len, dtype: Dtype::F32 } if cfg!(target_endian = "little") => {
                // SAFETY: every bit pattern is an f32; align_to splits off what is not aligned.
                let (before, floats, after) = unsafe { map[*start..start + len].align_to::<f32>() };
                (before.is_empty() && after.is_empty()).then_some(floats)
            }
            Values::Mapped { .. } | Values::Bf16(_) => None,
        }
    }

    /// The values' bytes, if they are little-endian bf16.
    pub(crate) fn as_bf16(&self) -> Option<&[u8]> {
        match &self.values {
            Values::Bf16(bytes) => Some(bytes),
            Values::Mapped { map, start, len, dtype: Dtype::BF16 } => Some(&map[*start..start + len]),
            _ => None,
        }
    }

    /// The values' bytes, if they are little-endian f16.
    pub(crate) fn as_f16(&self) -> Option<&[u8]> {
        match &self.values {
            Values::Mapped { map, start, len, dtype: Dtype::F16 } => Some(&map[*start..start + len]),
            _ => None,
        }
    }

    /// The values, widened to f32.
    pub fn to_f32(&self) -> Vec<f32> {
        match &self.values {
            Values::Floats(values) => values.clone(),
            Values::Bf16(bytes) => widen(bytes, Dtype::BF16),
            Values::Mapped { map, start, len, dtype } => widen(&map[*start..start + len], *dtype),
        }
    }

    /// Tells the system that the values of a mapped tensor are not needed for now, so that they count as memory no more.
    pub(crate) fn release(&self) {
        if let Values::Mapped { map, start, len, .. } = &self.values {
            release(map, *start, *len);
        }
    }

    /// The same values in f32, in place where they already are.
    pub(crate) fn into_f32(self) -> Self {
        if self.as_f32().is_some() {
            return self;
        }
        let values = Values::Floats(self.to_f32());
        HostTensor { values, ..self }
    }

    /// Rounds the values to bf16, unless they are.
    pub(crate) fn round(&mut self) {
        if self.as_bf16().is_some() {
            return;
        }
        let rounded = match (&self.values, self.as_f32()) {
            (_, Some(values)) => Self::bf16(values, self.shape.clone()),
            (Values::Mapped { map, start, len, dtype }, None) => {
                // Chunk by chunk: the whole in f32 would take twice the memory of the tensor.
                let size = dtype.bitsize() / 8;
                let mut bytes = vec![0; 2 * (len / size)];
                let chunks = bytes.par_chunks_mut(2 * CHUNK).zip(map[*start..start + len].par_chunks(size * CHUNK));
                chunks.for_each(|(bytes, stored)| round_chunk(&widen(stored, *dtype), bytes));
                HostTensor { shape: self.shape.clone(), values: Values::Bf16(bytes) }
            }
            (Values::Floats(_) | Values::Bf16(_), None) => return,
        };
        self.release();
        *self = rounded;
    }
}

fn round(values: &[f32], bytes: &mut [u8]) {
    let chunks = bytes.par_chunks_mut(2 * CHUNK).zip(values.par_chunks(CHUNK));
    chunks.for_each(|(bytes, values)| round_chunk(values, bytes));
}

fn round_chunk(values: &[f32], bytes: &mut [u8]) {
    for (bytes, x) in bytes.chunks_exact_mut(2).zip(values) {
        bytes.copy_from_slice(&half::bf16::from_f32(*x).to_le_bytes());
    }
}

/// Tells the system that so many bytes of a mapping are not needed for now.
pub(crate) fn release(map: &Mmap, start: usize, len: usize) {
    #[cfg(unix)]
    {
        // SAFETY: the mapping is read-only and of a file: a page that is dropped is read again when it is touched.
        let advised = unsafe { map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, start, len) };
        // It is advice: without it more memory is held.
        drop(advised);
    }
}

/// Numbers that lie in these bytes, little-endian, as f32.
pub(crate) fn widen(bytes: &[u8], dtype: Dtype) -> Vec<f32> {
    let pair = |b: &[u8]| u16::from_le_bytes([b[0], b[1]]);
    match dtype {
        Dtype::F16 => bytes.chunks_exact(2).map(|b| half::f16::from_bits(pair(b)).to_f32()).collect(),
        Dtype::BF16 => bytes.chunks_exact(2).map(|b| half::bf16::from_bits(pair(b)).to_f32()).collect(),
        _ => bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
    }
}
