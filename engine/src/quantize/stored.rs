//! Weights in 4 or 8 bits as a checkpoint holds them, and what tells their formats apart.

use super::{EightBit, FourBit, FourBitCode, Quantization};

/// A weight in few bits, on the host.
pub enum StoredWeight {
    /// 4 bits.
    FourBit(FourBit),
    /// 8 bits.
    EightBit(EightBit),
}

impl StoredWeight {
    /// Whether its codes are those of this kind.
    pub(crate) fn is_of(&self, quantization: Quantization) -> bool {
        match (self, quantization) {
            (StoredWeight::FourBit(weight), Quantization::FourBit { code, .. }) => weight.code == code,
            (StoredWeight::EightBit(_), Quantization::Int8) => true,
            _ => false,
        }
    }
}

impl Quantization {
    /// Whether both store the same codes.
    pub fn is_like(self, other: Self) -> bool {
        match (self, other) {
            (Quantization::Int8, Quantization::Int8) => true,
            (Quantization::FourBit { code, .. }, Quantization::FourBit { code: other, .. }) => code == other,
            _ => false,
        }
    }

    /// The format's name.
    pub fn name(self) -> &'static str {
        match self {
            Quantization::FourBit { code: FourBitCode::Nf4, .. } => "nf4",
            Quantization::FourBit { code: FourBitCode::Fp4, .. } => "fp4",
            Quantization::Int8 => "int8",
        }
    }
}
