//! Weights and optimizer state in 4 and 8 bits, in the formats of bitsandbytes (Dettmers et al., 2022 and 2023). Weights get
//! the bytes of its CPU library; its CUDA kernels round FP4 and nested scales differently. Optimizer state gets the nearest
//! code, as in its CUDA kernels.

mod blockwise;
mod dynamic_map;
mod eight_bit;
mod four_bit;
mod stored;

use serde::{Deserialize, Serialize};

pub(crate) use self::{
    blockwise::BLOCK as STATE_BLOCK,
    dynamic_map::dynamic_map,
    four_bit::{BLOCK, Scales},
};
pub use self::{blockwise::Blockwise, eight_bit::EightBit, four_bit::FourBit, stored::StoredWeight};

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
    /// 8 bits, and a scale for each row.
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

#[cfg(test)]
mod tests {
    use std::path::Path;

    use safetensors::SafeTensors;

    use super::*;
    use crate::backend::{AdamWStep, Backend};
    use crate::cpu::Cpu;

    /// What bitsandbytes made of some weights (`e2e/oracle/quantized.py`).
    struct Reference(Vec<u8>);

    impl Reference {
        fn load() -> Self {
            Self::of("codes")
        }

        fn of(name: &str) -> Self {
            let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/quantized");
            Self(std::fs::read(folder.join(format!("{name}.safetensors"))).unwrap())
        }

        fn bytes(&self, name: &str) -> Vec<u8> {
            let file = SafeTensors::deserialize(&self.0).unwrap();
            file.tensor(name).unwrap_or_else(|_| panic!("{name}")).data().to_vec()
        }

        fn floats(&self, name: &str) -> Vec<f32> {
            self.bytes(name).chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
        }

        fn weight(&self, name: &str) -> (Vec<f32>, usize, usize) {
            let file = SafeTensors::deserialize(&self.0).unwrap();
            let shape = file.tensor(&format!("{name}.weight")).unwrap().shape().to_vec();
            (self.floats(&format!("{name}.weight")), shape[0], shape[1])
        }
    }

    const WEIGHTS: [&str; 3] = ["even", "odd", "special"];

    #[test]
    fn four_bit_codes_and_scales_are_the_bytes_of_bitsandbytes_cpu_library() {
        let reference = Reference::load();
        for name in WEIGHTS {
            let (values, rows, cols) = reference.weight(name);
            for (code, kind) in [(FourBitCode::Nf4, "nf4"), (FourBitCode::Fp4, "fp4")] {
                let w = FourBit::quantize(&values, rows, cols, code, false);
                assert_eq!(w.codes, reference.bytes(&format!("{name}.{kind}.codes")), "{name} {kind}");
                let Scales::Plain(absmax) = w.scales else { panic!() };
                assert_eq!(absmax, reference.floats(&format!("{name}.{kind}.absmax")), "{name} {kind}");
            }
        }
    }

    #[test]
    fn nested_scales_are_the_bytes_of_bitsandbytes_cpu_library() {
        let reference = Reference::load();
        assert_eq!(dynamic_map::dynamic_map(true)[..], reference.floats("even.nf4.nested.map"));
        for name in WEIGHTS {
            let (values, rows, cols) = reference.weight(name);
            for (code, kind) in [(FourBitCode::Nf4, "nf4"), (FourBitCode::Fp4, "fp4")] {
                let w = FourBit::quantize(&values, rows, cols, code, true);
                let Scales::Nested { codes, absmax, offset } = w.scales else { panic!() };
                let part = |part: &str| format!("{name}.{kind}.nested.{part}");
                assert_eq!(codes, reference.bytes(&part("absmax")), "{name} {kind}");
                // torch sums the mean in an order of its own, so its last bit may differ, and what follows from it.
                let close =
                    |a: f32, b: f32| assert!((a - b).abs() <= 2e-7 * b.abs().max(1.0), "{name} {kind}: {a} {b}");
                close(offset, reference.floats(&part("offset"))[0]);
                let expected = reference.floats(&part("nested_absmax"));
                assert_eq!(absmax.len(), expected.len());
                absmax.iter().zip(expected).for_each(|(a, b)| close(*a, b));
            }
        }
    }

    #[test]
    fn int8_codes_and_scales_are_the_bytes_of_bitsandbytes_cpu_library() {
        let reference = Reference::load();
        for name in ["even", "odd"] {
            let (values, rows, cols) = reference.weight(name);
            let w = EightBit::quantize(&values, rows, cols);
            let codes: Vec<u8> = w.codes.iter().map(|code| *code as u8).collect();
            assert_eq!(codes, reference.bytes(&format!("{name}.int8.codes")), "{name}");
            assert_eq!(w.absmax, reference.floats(&format!("{name}.int8.SCB")), "{name}");
        }
    }

    #[test]
    fn three_steps_of_adamw_in_8_bits_are_those_of_bitsandbytes_with_the_nearest_code() {
        let reference = Reference::of("optimizer");
        assert_eq!(dynamic_map::dynamic_map(false)[..], reference.floats("map"));
        let (cpu, [rows, cols]) = (Cpu::default(), [43, 101]);
        let tensor = |name: &str| cpu.upload(&reference.floats(name), rows, cols);
        let mut param = tensor("param");
        let [mut state1, mut state2] = [true, false].map(|signed| cpu.zeros_8bit(rows * cols, signed));
        for step in 1..=3 {
            let grad = tensor(&format!("grad{}", step - 1));
            let (lr, weight_decay) = (0.01, 0.1);
            let numbers = AdamWStep { lr, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay, step, grad_scale: 1.0 };
            cpu.adamw_8bit(&mut param, &grad, (&mut state1, &mut state2), &numbers);
        }
        for (state, part) in [(&state1, "1"), (&state2, "2")] {
            // torch fuses other operations than we do: what lies between two codes may fall to either side.
            let expected = reference.bytes(&format!("state{part}"));
            let apart = state.codes.iter().zip(&expected).map(|(a, b)| a.abs_diff(*b));
            assert!(apart.clone().all(|apart| apart <= 1) && apart.filter(|apart| *apart > 0).count() < 10, "{part}");
            let scales = state.absmax.iter().zip(reference.floats(&format!("absmax{part}")));
            scales.for_each(|(a, b)| assert!((a - b).abs() <= 1e-6 * b, "{part}: {a}, {b}"));
        }
        let after = param.values().iter().zip(reference.floats("after"));
        let far = after.filter(|(a, b)| (*a - b).abs() > 1e-6 * b.abs().max(1.0)).count();
        assert!(far < 10, "{far} values differ");
    }

    #[test]
    fn errors_of_nf4_on_normal_weights_are_those_of_bitsandbytes_own_test() {
        // Its figures for blocks of 64: mean error 0.072798 ± 0.000074, relative 0.203339 ± 0.000379.
        let values = crate::random::normal(1 << 20, 5);
        let w = FourBit::quantize(&values, 1024, 1024, FourBitCode::Nf4, false);
        let (mut absolute, mut relative) = (0.0, 0.0);
        for (i, value) in values.iter().enumerate() {
            let code = if i % 2 == 0 { w.codes[i / 2] >> 4 } else { w.codes[i / 2] & 15 };
            let error = f64::from((FourBitCode::Nf4.table()[code as usize] * w.scales.get(i / BLOCK) - value).abs());
            absolute += error;
            relative += error / (f64::from(value.abs()) + 1e-8);
        }
        let (absolute, relative) = (absolute / values.len() as f64, relative / values.len() as f64);
        assert!((absolute - 0.072_798).abs() < 4.0 * 0.000_074, "{absolute}");
        assert!((relative - 0.203_339).abs() < 4.0 * 0.000_379, "{relative}");
    }
}
