use proptest::prelude::*;

use super::*;
use crate::cpu::weight::Weight;
use crate::host_tensor::HostTensor;
use crate::quantize::{FourBitCode, Quantization};

fn numbers(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..n)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}

/// Checks both layouts of A and B, set and add, against sums in f64.
fn check(m: usize, n: usize, k: usize, seed: u64) {
    let (a, b, c) = (numbers(m * k, seed), numbers(k * n, seed + 1), numbers(m * n, seed + 2));
    for (a_transposed, b_transposed) in [(false, false), (false, true), (true, false)] {
        let a_view = if a_transposed { View::new(&a, k, m).t() } else { View::new(&a, m, k) };
        let b_view = if b_transposed { View::new(&b, n, k).t() } else { View::new(&b, k, n) };
        let at = |v: &View<'_>, i: usize, j: usize| f64::from(v.data[i * v.row_stride + j * v.col_stride]);
        for output in [Output::Set, Output::Add] {
            let mut parallel = c.clone();
            gemm(ViewMut::new(&mut parallel, m, n), output, 0.5, a_view, b_view);
            let mut serial = c.clone();
            gemm_serial(ViewMut::new(&mut serial, m, n), output, 0.5, a_view, b_view);
            assert_eq!(parallel, serial);
            if !b_transposed && k > 0 {
                let mut in_place = c.clone();
                let b = Operand::InPlace(b_view);
                gemm(ViewMut::new(&mut in_place, m, n), output, 0.5, a_view, b);
                for (a, b) in in_place.iter().zip(&parallel) {
                    assert!((a - b).abs() < 1e-4, "{a} {b}");
                }
            }
            for i in 0..m {
                for j in 0..n {
                    let dot: f64 = (0..k).map(|k| at(&a_view, i, k) * at(&b_view, k, j)).sum();
                    let held = if output == Output::Add { f64::from(c[i * n + j]) } else { 0.0 };
                    let error = (f64::from(parallel[i * n + j]) - held - 0.5 * dot).abs();
                    assert!(error < 1e-5 * (k as f64).sqrt().max(1.0), "({i}, {j}): {error}");
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn products_equal_sums_in_f64(m in 1usize..40, n in 1usize..140, k in 0usize..90, seed in 0u64..1000) {
        check(m, n, k, seed);
    }
}

#[test]
fn long_sums_are_cut_into_blocks() {
    check(7, 33, 2 * MAX_K_BLOCK + 3, 5);
}

#[test]
fn a_sum_of_products_is_the_products_one_after_the_other() {
    let (m, n) = (50, 33);
    let (a, b, a2, b2) = (numbers(m * 700, 1), numbers(n * 700, 2), numbers(m * 8, 3), numbers(8 * n, 4));
    let (a, b) = (View::new(&a, m, 700), View::new(&b, n, 700).t());
    let (a2, b2) = (View::new(&a2, m, 8), View::new(&b2, 8, n));
    let (mut at_once, mut in_turn) = (vec![0.0; m * n], vec![0.0; m * n]);
    let terms = [Term::new(1.0, a, b), Term::new(0.5, a2, b2)];
    gemm_sum(ViewMut::new(&mut at_once, m, n), Output::Set, &terms);
    gemm(ViewMut::new(&mut in_turn, m, n), Output::Set, 1.0, a, b);
    gemm(ViewMut::new(&mut in_turn, m, n), Output::Add, 0.5, a2, b2);
    assert_eq!(at_once, in_turn);
}

#[test]
fn tasks_cover_a_matrix_whatever_the_number_of_threads() {
    for (m, n, threads) in [(1, 1, 1), (0, 5, 2), (512, 576, 2), (759, 576, 2), (512, 192, 16), (7, 49152, 64)] {
        let cut = Cut::new(m, n, threads);
        assert!(cut.rows * cut.row_tasks >= m && cut.cols * cut.col_tasks >= n, "{m}×{n}");
        assert!(cut.row_tasks == 0 || cut.rows * (cut.row_tasks - 1) < m, "{m}×{n}: an empty task");
    }
    let cut = Cut::new(512, 576, 2);
    assert_eq!(cut.row_tasks * cut.col_tasks % 2, 0, "two threads are done at the same time");
}

#[test]
fn a_row_is_the_same_alone_and_among_others() {
    let (m, n, k) = (61, 200, 700);
    let (a, b) = (numbers(m * k, 1), numbers(n * k, 2));
    let mut all = vec![0.0; m * n];
    gemm(ViewMut::new(&mut all, m, n), Output::Set, 1.0, View::new(&a, m, k), View::new(&b, n, k).t());
    for i in [0, 5, 59, 60] {
        let mut alone = vec![0.0; n];
        let row = &a[i * k..][..k];
        gemm(ViewMut::new(&mut alone, 1, n), Output::Set, 1.0, View::new(row, 1, k), View::new(&b, n, k).t());
        assert_eq!(alone, all[i * n..][..n]);
    }
}

#[test]
fn columns_beyond_the_view_are_left_alone() {
    let (a, b) = (numbers(6 * 8, 1), numbers(8 * 5, 2));
    let mut c = vec![7.0; 6 * 9];
    gemm(ViewMut::strided(&mut c, 6, 5, 9), Output::Set, 1.0, View::new(&a, 6, 8), View::new(&b, 8, 5));
    for row in c.chunks(9) {
        assert_eq!(row[5..], [7.0; 4]);
        assert!(row[..5].iter().all(|x| *x != 7.0));
    }
}

/// Checks every layout of A and B in bf16 against sums in f64 of rounded numbers.
fn check_bf16(m: usize, n: usize, k: usize, seed: u64, pairs: bool) {
    let (a, b) = (numbers(m * k, seed), numbers(k * n, seed + 1));
    let transposed = |x: &[f32], rows: usize, cols: usize| -> Vec<f32> {
        (0..cols).flat_map(|j| (0..rows).map(move |i| x[i * cols + j])).collect()
    };
    let (a_t, b_t) = (transposed(&a, m, k), transposed(&b, k, n));
    let weight = |x: &[f32], rows: usize, cols: usize, stored: bool| {
        let mut weight = Weight::new(HostTensor::new(x.to_vec(), vec![rows, cols]));
        if stored {
            weight.round();
        }
        weight
    };
    let weights = [false, true].map(|stored| (weight(&b, k, n, stored), weight(&b_t, n, k, stored)));
    let operands = weights.iter().flat_map(|(w, t)| [Operand::new(w.matrix()), Operand::transposed(t.matrix())]);
    let rounded = |x: f32| f64::from(half::bf16::from_f32(x));
    for b_operand in operands {
        for a_view in [View::new(&a, m, k), View::new(&a_t, k, m).t()] {
            let mut c = vec![3.0; m * n];
            let term = Term::new(0.5, a_view, b_operand).with(Precision::Bf16);
            multiply(ViewMut::new(&mut c, m, n), Output::Add, &[term], pairs);
            for i in 0..m {
                for j in 0..n {
                    let dot: f64 = (0..k).map(|p| rounded(a[i * k + p]) * rounded(b[p * n + j])).sum();
                    let error = (f64::from(c[i * n + j]) - 3.0 - 0.5 * dot).abs();
                    assert!(error < 1e-5 * (k as f64).sqrt().max(1.0), "({i}, {j}): {error}");
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn products_in_bf16_equal_sums_of_rounded_numbers(m in 1usize..40, n in 1usize..140, k in 0usize..90, seed in 0u64..1000) {
        check_bf16(m, n, k, seed, multiplies_pairs());
        check_bf16(m, n, k, seed, false);
    }
}

#[test]
fn long_sums_in_bf16_are_cut_into_blocks() {
    check_bf16(7, 33, 4 * MAX_K_BLOCK + 3, 5, multiplies_pairs());
    check_bf16(7, 33, 4 * MAX_K_BLOCK + 3, 5, false);
}

#[test]
fn a_weight_of_few_bits_is_rounded_as_it_is_packed() {
    let (m, n, k) = (5, 64, 128);
    let (a, b) = (numbers(m * k, 1), numbers(n * k, 2));
    let quantization = Quantization::FourBit { code: FourBitCode::Nf4, double_quant: true };
    let quantized = Weight::quantized(&HostTensor::new(b, vec![n, k]), quantization);
    let mut wide = vec![0.0; n * k];
    (0..n).for_each(|row| quantized.matrix().widen(row, 0, &mut wide[row * k..][..k]));
    let multiply = |b: Operand<'_>, rows: usize, cols: usize| {
        let mut c = vec![0.0; m * cols];
        let term = Term::new(1.0, View::new(&a[..m * rows], m, rows), b).with(Precision::Bf16);
        gemm_sum(ViewMut::new(&mut c, m, cols), Output::Set, &[term]);
        c
    };
    let forward = multiply(Operand::transposed(quantized.matrix()), k, n);
    assert_eq!(forward, multiply(Operand::View(View::new(&wide, n, k).t()), k, n));
    let backward = multiply(Operand::new(quantized.matrix()), n, k);
    assert_eq!(backward, multiply(Operand::View(View::new(&wide, n, k)), n, k));
}

#[test]
fn pairs_are_summed_to_the_same_bits_with_and_without_instructions_for_them() {
    if !multiplies_pairs() {
        return;
    }
    for (m, n, k) in [(1, 1, 1), (2, 7, 3), (61, 200, 700), (5, 33, 4 * MAX_K_BLOCK + 3)] {
        let (a, b) = (numbers(m * k, 1), numbers(n * k, 2));
        for a_view in [View::new(&a, m, k), View::new(&a, k, m).t()] {
            for b_view in [View::new(&b, k, n), View::new(&b, n, k).t()] {
                let product = |pairs: bool| {
                    let mut c = vec![0.0; m * n];
                    let term = Term::new(1.0, a_view, b_view).with(Precision::Bf16);
                    multiply(ViewMut::new(&mut c, m, n), Output::Set, &[term], pairs);
                    c
                };
                assert_eq!(product(true), product(false), "{m}×{n}×{k}");
            }
        }
    }
}

/// For one row nothing is packed, but all is rounded as for many, in every form that a weight can have.
#[test]
fn a_product_of_one_row_is_that_row_of_a_product_of_many() {
    let (rows, cols, tokens) = (70, 333, 5);
    let values = crate::random::normal(rows * cols, 1);
    let tensor = || HostTensor::new(values.clone(), vec![rows, cols]);
    let four_bit = Quantization::FourBit { code: FourBitCode::Nf4, double_quant: true };
    let weights = [
        Weight::new(tensor()),
        Weight::new(HostTensor::bf16(&values, vec![rows, cols])),
        Weight::quantized(&tensor(), four_bit),
        Weight::quantized(&tensor(), Quantization::Int8),
    ];
    let x = crate::random::normal(tokens * cols, 2);
    for (form, weight) in weights.iter().enumerate() {
        for precision in [Precision::F32, Precision::Bf16] {
            let mut many = vec![0.0; tokens * rows];
            let term =
                Term::new(1.0, View::new(&x, tokens, cols), Operand::transposed(weight.matrix())).with(precision);
            gemm_sum(ViewMut::new(&mut many, tokens, rows), Output::Set, &[term]);
            for (x, many) in x.chunks_exact(cols).zip(many.chunks_exact(rows)) {
                let mut one = vec![0.0; rows];
                matvec(weight.matrix(), x, precision, Output::Set, &mut one);
                let worst = one.iter().zip(many).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                // Numbers of bf16 multiply exactly: what is left is the order of the sum. Unrounded, it is 0.05.
                assert!(worst < 1e-4, "form {form}, {precision:?}: {worst:.1e}");
            }
        }
    }
}
