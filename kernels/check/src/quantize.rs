//! Quantization against the bytes that bitsandbytes' CPU library makes of the same weights (`engine/tests/fixtures/quantized`, by
//! `e2e/oracle/quantized.py`), and what it reads from them.

use half::bf16;
use safetensors::SafeTensors;
use tunesmith_kernels::{
    Address, Grid,
    kernels::{
        Code, Dequantize4Bit, Dequantize8Bit, MeanOfScales, NestScales, Quantize4BitBf16, Quantize4BitF32,
        Quantize8BitBf16, Quantize8BitF32, Scales,
    },
};

use crate::bench::{BF16, Bench, SEEDS, assert_close, blocks};

listed![
    four_bits_and_nested_scales_are_the_bytes_of_bitsandbytes,
    eight_bits_are_the_bytes_of_bitsandbytes,
    weights_in_bf16_give_the_codes_of_the_same_numbers_in_f32,
    whole_blocks_are_multiplied_by_an_inverse_and_a_ragged_one_is_divided,
    rows_of_zeros_and_scales_without_a_spread_have_the_code_zero,
    weights_of_a_tensor_beyond_two_to_the_31_are_found,
];

const THREADS: u32 = 256;
/// Of a block that holds a code, or a map and more.
const CODE_BYTES: u32 = size_of::<Code>() as u32;
const NESTING_BYTES: u32 = 4 * (256 + 8);
const TABLES_BYTES: u32 = 4 * (16 + 256);
const TOTALS_BYTES: u32 = 8 * 8;
const ROW_BYTES: u32 = 4 * 8;

const NF4: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];
const FP4: [f32; 16] = [
    0.0,
    0.005_208_333_5,
    0.666_666_7,
    1.0,
    0.333_333_34,
    0.5,
    0.166_666_67,
    0.25,
    0.0,
    -0.005_208_333_5,
    -0.666_666_7,
    -1.0,
    -0.333_333_34,
    -0.5,
    -0.166_666_67,
    -0.25,
];

/// What bitsandbytes made of three weights: of whole blocks, of an odd number, and of values that are hard to round.
struct Reference(&'static [u8]);

impl Reference {
    fn load() -> Self {
        Self(include_bytes!("../../../engine/tests/fixtures/quantized/codes.safetensors"))
    }

    fn bytes(&self, name: &str) -> Vec<u8> {
        SafeTensors::deserialize(self.0).unwrap().tensor(name).unwrap_or_else(|_| panic!("{name}")).data().to_vec()
    }

    fn floats(&self, name: &str) -> Vec<f32> {
        self.bytes(name).chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect()
    }

    fn shape(&self, name: &str) -> [usize; 2] {
        SafeTensors::deserialize(self.0).unwrap().tensor(name).unwrap().shape().try_into().unwrap()
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

fn four_bits_and_nested_scales_are_the_bytes_of_bitsandbytes() {
    let reference = Reference::load();
    for (name, seed) in ["even", "odd", "special"].into_iter().flat_map(|name| SEEDS.map(|seed| (name, seed))) {
        let weights = reference.floats(&format!("{name}.weight"));
        for (values, kind) in [(NF4, "nf4"), (FP4, "fp4")] {
            let bench = Bench::new(seed);
            let (count, scale_count) = (weights.len(), weights.len().div_ceil(64));
            let code = bench.put("code", &[Code::new(values)]);
            let (codes, absmax) =
                (bench.empty::<u8>("codes", count.div_ceil(2)), bench.empty::<f32>("absmax", scale_count));
            let launch = Quantize4BitF32 {
                codes: codes.at,
                absmax: absmax.at,
                weights: bench.put("weights", &weights).at,
                code: code.at,
                count: count as i64,
            };
            bench.run(&launch, Grid::row(blocks(count, 8 * 256), THREADS).with_shared(CODE_BYTES));
            assert_eq!(codes.get(), reference.bytes(&format!("{name}.{kind}.codes")), "{name} {kind}");
            assert_eq!(bits(&absmax.get()), bits(&reference.floats(&format!("{name}.{kind}.absmax"))), "{name} {kind}");

            let part = |part: &str| format!("{name}.{kind}.nested.{part}");
            let (mean, map) = (bench.empty::<f32>("mean", 1), bench.put("map", &reference.floats(&part("map"))));
            let launch = MeanOfScales { mean: mean.at, scales: absmax.at, count: scale_count as i64 };
            bench.run(&launch, Grid::row(1, THREADS).with_shared(TOTALS_BYTES));
            let nested = bench.empty::<u8>("nested", scale_count);
            let nested_absmax = bench.empty::<f32>("nested_absmax", scale_count.div_ceil(256));
            let launch = NestScales {
                codes: nested.at,
                absmax: nested_absmax.at,
                scales: absmax.at,
                mean: mean.at,
                map: map.at,
                count: scale_count as i64,
            };
            bench.run(&launch, Grid::row(blocks(scale_count, 256), 256).with_shared(NESTING_BYTES));
            assert_eq!(nested.get(), reference.bytes(&part("absmax")), "{name} {kind}");
            // torch sums the mean in f32, so its last bit may differ, and what follows from it.
            let close = |a: f32, b: f32| assert!((a - b).abs() <= 2e-7 * b.abs().max(1.0), "{name} {kind}: {a} {b}");
            close(mean.get()[0], reference.floats(&part("offset"))[0]);
            let expected = reference.floats(&part("nested_absmax"));
            nested_absmax.get().into_iter().zip(expected).for_each(|(a, b)| close(a, b));

            let scales = |nested: Address, absmax: Address| Scales { absmax, nested, map: map.at, mean: mean.at };
            for (scales, expected) in [
                (scales(Address::NONE, absmax.at), format!("{name}.{kind}.values")),
                (scales(nested.at, nested_absmax.at), part("values")),
            ] {
                if name == "even" && !(kind == "nf4" && expected.contains("nested")) {
                    continue; // bitsandbytes' values of these are not kept
                }
                let out = bench.empty::<bf16>("out", count);
                let launch =
                    Dequantize4Bit { weights: out.at, codes: codes.at, scales, code: code.at, count: count as i64 };
                bench.run(&launch, Grid::row(blocks(count, 16 * 256), THREADS).with_shared(TABLES_BYTES));
                let expected: Vec<f64> = reference.floats(&expected).into_iter().map(f64::from).collect();
                assert_close(&format!("{name} {kind}"), &out.floats(), &expected, BF16, 1e-7);
            }
        }
    }
}

fn eight_bits_are_the_bytes_of_bitsandbytes() {
    let reference = Reference::load();
    for name in ["even", "odd"] {
        let (weights, [rows, width]) =
            (reference.floats(&format!("{name}.weight")), reference.shape(&format!("{name}.weight")));
        for seed in SEEDS {
            let bench = Bench::new(seed);
            let (codes, absmax) = (bench.empty::<i8>("codes", weights.len()), bench.empty::<f32>("absmax", rows));
            let launch = Quantize8BitF32 {
                codes: codes.at,
                absmax: absmax.at,
                weights: bench.put("weights", &weights).at,
                width: width as i32,
            };
            bench.run(&launch, Grid::row(rows as u32, THREADS).with_shared(ROW_BYTES));
            let found: Vec<u8> = codes.get().into_iter().map(|code| code as u8).collect();
            assert_eq!(found, reference.bytes(&format!("{name}.int8.codes")), "{name}");
            assert_eq!(bits(&absmax.get()), bits(&reference.floats(&format!("{name}.int8.SCB"))), "{name}");

            let out = bench.empty::<bf16>("out", weights.len());
            let launch = Dequantize8Bit { weights: out.at, codes: codes.at, absmax: absmax.at, width: width as i32 };
            bench
                .run(&launch, Grid { blocks: [blocks(width, 256), rows as u32, 1], threads: THREADS, shared_bytes: 0 });
            let (codes, absmax) = (codes.get(), absmax.get());
            let expected: Vec<f32> = (0..weights.len())
                .map(|i| bf16::from_f32(f32::from(codes[i]) * (absmax[i / width] / 127.0)).to_f32())
                .collect();
            assert_eq!(bits(&out.floats()), bits(&expected), "{name}");
        }
    }
}

fn weights_in_bf16_give_the_codes_of_the_same_numbers_in_f32() {
    for count in [64, 777, 778, 4096, 5000] {
        let bench = Bench::new(1);
        let weights = bench.bf16s(count);
        let code = bench.put("code", &[Code::new(NF4)]).at;
        let (f32s, bf16s) = (bench.put("f32", &weights), bench.put_bf16("bf16", &weights));
        let grid = Grid::row(blocks(count, 8 * 256), THREADS).with_shared(CODE_BYTES);
        let made = || (bench.empty::<u8>("codes", count.div_ceil(2)), bench.empty::<f32>("absmax", count.div_ceil(64)));
        let (a, b) = (made(), made());
        let count = count as i64;
        bench.run(&Quantize4BitF32 { codes: a.0.at, absmax: a.1.at, weights: f32s.at, code, count }, grid);
        bench.run(&Quantize4BitBf16 { codes: b.0.at, absmax: b.1.at, weights: bf16s.at, code, count }, grid);
        assert_eq!((a.0.get(), a.1.get()), (b.0.get(), b.1.get()));

        let made = || (bench.empty::<i8>("codes", weights.len()), bench.empty::<f32>("absmax", 1));
        let (a, b) = (made(), made());
        let (width, grid) = (weights.len() as i32, Grid::row(1, THREADS).with_shared(ROW_BYTES));
        bench.run(&Quantize8BitF32 { codes: a.0.at, absmax: a.1.at, weights: f32s.at, width }, grid);
        bench.run(&Quantize8BitBf16 { codes: b.0.at, absmax: b.1.at, weights: bf16s.at, width }, grid);
        assert_eq!((a.0.get(), a.1.get()), (b.0.get(), b.1.get()));
    }
}

fn whole_blocks_are_multiplied_by_an_inverse_and_a_ragged_one_is_divided() {
    let code = Code::new(NF4);
    let nearest = |scaled: f32| code.order[code.midpoints.iter().filter(|midpoint| **midpoint < scaled).count()];
    let (multiplied, divided) = (|x: f32, most: f32| nearest(x * (1.0 / most)), |x: f32, most: f32| nearest(x / most));
    // A weight at a midpoint, which the two round to either side.
    let pairs = (1..1000).flat_map(|most| code.midpoints.map(|midpoint| (midpoint * most as f32, most as f32)));
    let (weight, most) = pairs.into_iter().find(|(x, most)| multiplied(*x, *most) != divided(*x, *most)).unwrap();
    let bench = Bench::new(1);
    // Two blocks; the second one is whole or not.
    for (count, second) in [(128, multiplied(weight, most)), (126, divided(weight, most))] {
        let mut weights = vec![0.0; count];
        for block in [0, 64] {
            weights[block..block + 2].copy_from_slice(&[most, weight]);
        }
        let (codes, absmax) = (bench.empty::<u8>("codes", count / 2), bench.empty::<f32>("absmax", 2));
        let launch = Quantize4BitF32 {
            codes: codes.at,
            absmax: absmax.at,
            weights: bench.put("weights", &weights).at,
            code: bench.put("code", &[code]).at,
            count: count as i64,
        };
        bench.run(&launch, Grid::row(1, THREADS).with_shared(CODE_BYTES));
        let codes = codes.get();
        assert_eq!([codes[0], codes[32]], [0xf0 | multiplied(weight, most), 0xf0 | second], "{weight} of {most}");
    }
}

fn rows_of_zeros_and_scales_without_a_spread_have_the_code_zero() {
    let bench = Bench::new(1);
    let weights = bench.put("weights", &[0.0f32; 300]).at;
    let (codes, absmax) = (bench.empty::<i8>("codes", 300), bench.empty::<f32>("absmax", 1));
    let launch = Quantize8BitF32 { codes: codes.at, absmax: absmax.at, weights, width: 300 };
    bench.run(&launch, Grid::row(1, THREADS).with_shared(ROW_BYTES));
    assert_eq!((codes.get(), absmax.get()), (vec![0; 300], vec![0.0]));

    let map: Vec<f32> = (0..256).map(|i| (i - 128) as f32 / 127.0).collect();
    let (codes, absmax) = (bench.empty::<u8>("codes", 300), bench.empty::<f32>("absmax", 2));
    let launch = NestScales {
        codes: codes.at,
        absmax: absmax.at,
        scales: bench.put("scales", &[0.5f32; 300]).at,
        mean: bench.put("mean", &[0.5f32]).at,
        map: bench.put("map", &map).at,
        count: 300,
    };
    bench.run(&launch, Grid::row(2, THREADS).with_shared(NESTING_BYTES));
    assert_eq!((codes.get(), absmax.get()), (vec![0; 300], vec![0.0; 2]));
}

fn weights_of_a_tensor_beyond_two_to_the_31_are_found() {
    // The last blocks of 3 · 2³⁰ weights. A device that is no emulation runs all of them, in 15 GB.
    let bench = Bench::new(1);
    let count: usize = 3 << 30;
    let (weights, codes) = (bench.sparse("weights", 2 * count), bench.sparse("codes", count / 2));
    let absmax = bench.sparse("absmax", 4 * (count / 64));
    let code = bench.put("code", &[Code::new(NF4)]).at;
    let tail = bench.bf16s(4096);
    let rounded: Vec<bf16> = tail.iter().map(|x| bf16::from_f32(*x)).collect();
    let tail_of = |address: Address| address.plus(2 * (count as u64 - 4096));
    bench.upload(tail_of(weights), &rounded);
    let grid = Grid::row(blocks(count, 8 * 256), THREADS).with_shared(CODE_BYTES);
    bench.only_blocks(u64::from(grid.blocks[0]) - 2, 2);
    bench.run(&Quantize4BitBf16 { codes, absmax, weights, code, count: count as i64 }, grid);

    let out = bench.sparse("out", 2 * count);
    let scales = Scales { absmax, nested: Address::NONE, map: Address::NONE, mean: Address::NONE };
    let grid = Grid::row(blocks(count, 16 * 256), THREADS).with_shared(TABLES_BYTES);
    bench.only_blocks(u64::from(grid.blocks[0]) - 1, 1);
    bench.run(&Dequantize4Bit { weights: out, codes, scales, code, count: count as i64 }, grid);
    let found: Vec<bf16> = bench.download(tail_of(out), 4096);
    let off = tail.iter().zip(&found).map(|(a, b)| (a - b.to_f32()).abs()).fold(0.0, f32::max);
    assert!(off > 0.0 && off < 0.2, "{off}");
}
