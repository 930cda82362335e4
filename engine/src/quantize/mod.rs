//! Weights in 4 and 8 bits, in the formats of bitsandbytes (Dettmers et al., 2022 and 2023): the same codes for the same
//! weights.

mod dynamic_map;
mod eight_bit;
mod four_bit;

use serde::{Deserialize, Serialize};

pub(crate) use self::{
    eight_bit::{EightBit, OUTLIER},
    four_bit::{BLOCK, FourBit},
};

/// How the linear layers of a frozen base are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Quantization {
    /// 4 bits.
    FourBit {
        /// What the sixteen codes stand for.
        code: FourBitCode,
        /// Whether the scales are quantized too: 4.127 bits a weight instead of 4.5.
        double_quant: bool,
    },
    /// 8 bits, a scale for each row; products with activations in 8 bits too, but for outliers (LLM.int8()).
    Int8,
}

/// What sixteen codes stand for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FourBitCode {
    /// 4-bit NormalFloat: quantiles of the normal distribution.
    Nf4,
    /// A float with a sign, two bits of exponent and one of fraction.
    Fp4,
}
