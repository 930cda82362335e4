//! Weights as they are stored, and as products read them: f32 where it lies, all else widened a few rows at a time.

use super::four_bit;
use crate::cpu::view::View;
use crate::host_tensor::HostTensor;
use crate::quantize::{EightBit, FourBit, Quantization, StoredWeight};

/// A frozen weight [out, in].
pub struct Weight(Stored);

enum Stored {
    /// f32, f16 or bf16, where a file is mapped or in memory.
    Plain {
        tensor: HostTensor,
        outputs: usize,
        inputs: usize,
    },
    FourBit(FourBit),
    EightBit(EightBit),
}

/// A weight, or some of its rows, to read.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<'a> {
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    form: Form<'a>,
}

#[derive(Clone, Copy)]
enum Form<'a> {
    Floats(&'a [f32]),
    Bf16(&'a [u8]),
    F16(&'a [u8]),
    /// From this element on.
    FourBit(&'a FourBit, usize),
    EightBit(&'a EightBit),
}

impl Weight {
    /// Keeps f32, bf16 and f16 as they are stored.
    pub(super) fn new(tensor: HostTensor) -> Self {
        let &[outputs, inputs] = tensor.shape() else { panic!("a linear weight is a matrix") };
        let is_half = tensor.as_bf16().is_some() || tensor.as_f16().is_some();
        let tensor = if is_half { tensor } else { tensor.into_f32() };
        Weight(Stored::Plain { tensor, outputs, inputs })
    }

    pub(super) fn quantized(tensor: &HostTensor, quantization: Quantization) -> Self {
        let &[rows, cols] = tensor.shape() else { panic!("a linear weight is a matrix") };
        let values = tensor.to_f32();
        tensor.release();
        Weight(match quantization {
            Quantization::FourBit { code, double_quant } => {
                Stored::FourBit(FourBit::quantize(&values, rows, cols, code, double_quant))
            }
            Quantization::Int8 => Stored::EightBit(EightBit::quantize(&values, rows, cols)),
        })
    }

    pub(super) fn stored(weight: StoredWeight) -> Self {
        Weight(match weight {
            StoredWeight::FourBit(weight) => Stored::FourBit(weight),
            StoredWeight::EightBit(weight) => Stored::EightBit(weight),
        })
    }

    /// Rounds what is in f32 to bf16.
    pub(super) fn round(&mut self) {
        if let Stored::Plain { tensor, .. } = &mut self.0 {
            tensor.round();
        }
    }

    /// Puts other values, rounded to bf16, in its place.
    pub(super) fn set_bf16(&mut self, values: &[f32]) {
        if let Stored::Plain { tensor, .. } = &mut self.0 {
            tensor.set_bf16(values);
        }
    }

    pub(super) fn matrix(&self) -> Matrix<'_> {
        match &self.0 {
            Stored::Plain { tensor, outputs, inputs } => {
                let form = match (tensor.as_f32(), tensor.as_bf16(), tensor.as_f16()) {
                    (Some(values), ..) => Form::Floats(values),
                    (_, Some(bytes), _) => Form::Bf16(bytes),
                    (.., Some(bytes)) => Form::F16(bytes),
                    _ => unreachable!("Weight::new widened it"),
                };
                Matrix { rows: *outputs, cols: *inputs, form }
            }
            Stored::FourBit(w) => Matrix { rows: w.rows, cols: w.cols, form: Form::FourBit(w, 0) },
            Stored::EightBit(w) => Matrix { rows: w.rows, cols: w.cols, form: Form::EightBit(w) },
        }
    }
}

impl<'a> Matrix<'a> {
    /// A dense row-major matrix of f32.
    pub(crate) fn new(values: &'a [f32], rows: usize, cols: usize) -> Self {
        Matrix { rows, cols, form: Form::Floats(values) }
    }

    /// `count` rows from `first` on.
    pub(crate) fn rows(self, first: usize, count: usize) -> Self {
        let elements = first * self.cols..(first + count) * self.cols;
        let form = match self.form {
            Form::Floats(values) => Form::Floats(&values[elements]),
            Form::Bf16(bytes) => Form::Bf16(&bytes[2 * elements.start..2 * elements.end]),
            Form::F16(bytes) => Form::F16(&bytes[2 * elements.start..2 * elements.end]),
            Form::FourBit(w, start) => Form::FourBit(w, start + elements.start),
            Form::EightBit(_) => unreachable!("output layers are never in 8 bits"),
        };
        Matrix { rows: count, form, ..self }
    }

    /// Whether the values are stored in 8 bits.
    pub(crate) fn is_eight_bit(self) -> bool {
        matches!(self.form, Form::EightBit(_))
    }

    /// The values, where they are f32.
    pub(crate) fn view(self) -> Option<View<'a>> {
        match self.form {
            Form::Floats(values) => Some(View::new(values, self.rows, self.cols)),
            _ => None,
        }
    }

    /// The row's values, where they are f32.
    #[inline(always)]
    pub(crate) fn row(&self, row: usize) -> Option<&'a [f32]> {
        match self.form {
            Form::Floats(values) => Some(&values[row * self.cols..][..self.cols]),
            _ => None,
        }
    }

    /// `count` values of the row from column `from` on, where they are stored in bf16 (two bytes each).
    #[inline(always)]
    pub(crate) fn bf16(&self, row: usize, from: usize, count: usize) -> Option<&'a [u8]> {
        match self.form {
            Form::Bf16(bytes) => Some(&bytes[2 * (row * self.cols + from)..][..2 * count]),
            _ => None,
        }
    }

    /// Widens the row's values from column `from` on, as many as `out` holds.
    #[inline(always)]
    pub(crate) fn widen(&self, row: usize, from: usize, out: &mut [f32]) {
        debug_assert!(from + out.len() <= self.cols);
        let start = row * self.cols + from;
        match self.form {
            Form::Floats(values) => out.copy_from_slice(&values[start..][..out.len()]),
            Form::Bf16(bytes) => {
                let bytes = &bytes[2 * start..][..2 * out.len()];
                for (out, bytes) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                    *out = f32::from_bits(u32::from(u16::from_le_bytes([bytes[0], bytes[1]])) << 16);
                }
            }
            Form::F16(bytes) => {
                let bytes = &bytes[2 * start..][..2 * out.len()];
                for (out, bytes) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                    *out = widen_f16(u16::from_le_bytes([bytes[0], bytes[1]]));
                }
            }
            Form::FourBit(w, first) => four_bit::widen(w, first + start, out),
            Form::EightBit(w) => {
                let scale = w.absmax[row] / 127.0;
                out.iter_mut().zip(&w.codes[start..]).for_each(|(out, code)| *out = f32::from(*code) * scale);
            }
        }
    }
}

/// f16 to f32, exactly and without branches, so that loops over it are vectorised: the bits move to the places that f32
/// has for them, and a factor makes up for the other offset of the exponent, also where f16 has none.
#[inline(always)]
fn widen_f16(bits: u16) -> f32 {
    const INFINITE: u32 = 0x7C00 << 13;
    let bits = u32::from(bits);
    let (sign, magnitude) = ((bits & 0x8000) << 16, (bits & 0x7FFF) << 13);
    let finite = (f32::from_bits(magnitude) * 2f32.powi(127 - 15)).to_bits();
    let found = if magnitude >= INFINITE { magnitude | 0x7F80_0000 } else { finite };
    f32::from_bits(found | sign)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_of_f16_is_widened_exactly() {
        for bits in 0..=u16::MAX {
            let (ours, exact) = (widen_f16(bits), half::f16::from_bits(bits).to_f32());
            assert!(ours.to_bits() == exact.to_bits() || (ours.is_nan() && exact.is_nan()), "{bits:04x}");
        }
    }
}
