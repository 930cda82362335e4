//! Products of matrices: views, transposes, sums, and what is refused.

use half::bf16;
use tunesmith_kernels::{Gemm, Matrix, Number};

use crate::bench::{BF16, Bench, assert_close};

listed![
    products_are_those_of_f64_whichever_way_the_factors_lie,
    a_view_of_columns_leaves_what_is_beside_it,
    an_algorithm_that_was_chosen_is_given_again,
    what_does_not_fit_is_refused,
];

const M: usize = 5;
const K: usize = 19;
const N: usize = 33;

/// alpha · a·b + c, in f64.
fn reference(a: impl Fn(usize, usize) -> f32, b: impl Fn(usize, usize) -> f32, alpha: f64) -> Vec<f64> {
    let of = |i: usize, j: usize| alpha * (0..K).map(|l| f64::from(a(i, l)) * f64::from(b(l, j))).sum::<f64>();
    (0..M).flat_map(|i| (0..N).map(move |j| (i, j))).map(|(i, j)| of(i, j)).collect()
}

fn products_are_those_of_f64_whichever_way_the_factors_lie() {
    let bench = Bench::new(0);
    let (a, b) = (bench.bf16s(M * K), bench.bf16s(K * N));
    let turned = |x: &[f32], rows: usize, columns: usize| -> Vec<f32> {
        (0..columns).flat_map(|c| (0..rows).map(move |r| (r, c))).map(|(r, c)| x[r * columns + c]).collect()
    };
    let expected = reference(|i, l| a[i * K + l], |l, j| b[l * N + j], 0.5);
    let plain = [bench.put_bf16("a", &a).at, bench.put_bf16("b", &b).at];
    let flipped = [bench.put_bf16("a", &turned(&a, M, K)).at, bench.put_bf16("b", &turned(&b, K, N)).at];
    for (a_is_flipped, b_is_flipped) in [(false, false), (false, true), (true, false), (true, true)] {
        let a = match a_is_flipped {
            true => Matrix::new(flipped[0], K, M, Number::Bf16).transpose(),
            false => Matrix::new(plain[0], M, K, Number::Bf16),
        };
        let b = match b_is_flipped {
            true => Matrix::new(flipped[1], N, K, Number::Bf16).transpose(),
            false => Matrix::new(plain[1], K, N, Number::Bf16),
        };
        let d = bench.empty::<f32>("d", M * N);
        let gemm = Gemm { a, b, c: None, d: Matrix::new(d.at, M, N, Number::F32), alpha: 0.5 };
        bench.multiply(&gemm).unwrap();
        assert_close("d", &d.get(), &expected, 1e-5, 1e-6);
        let rounded = bench.empty::<bf16>("d", M * N);
        bench.multiply(&Gemm { d: Matrix::new(rounded.at, M, N, Number::Bf16), ..gemm }).unwrap();
        assert_close("d", &rounded.floats(), &expected, BF16, 1e-6);
        // Onto itself.
        let onto = Gemm { c: Some(gemm.d), ..gemm };
        bench.multiply(&onto).unwrap();
        let twice: Vec<f64> = expected.iter().map(|x| 2.0 * x).collect();
        assert_close("d", &d.get(), &twice, 1e-5, 1e-6);
    }
}

fn a_view_of_columns_leaves_what_is_beside_it() {
    let bench = Bench::new(0);
    let (a, b, beside) = (bench.bf16s(M * K), bench.bf16s(K * N), bench.randoms(M * 2 * N));
    let wide = bench.put("d", &beside);
    let d = Matrix { stride: 2 * N, ..Matrix::new(wide.at.plus(4 * N as u64), M, N, Number::F32) };
    let (a_at, b_at) = (bench.put_bf16("a", &a).at, bench.put_bf16("b", &b).at);
    let factors = (Matrix::new(a_at, M, K, Number::Bf16), Matrix::new(b_at, K, N, Number::Bf16));
    bench.multiply(&Gemm { a: factors.0, b: factors.1, c: None, d, alpha: 1.0 }).unwrap();
    let expected = reference(|i, l| a[i * K + l], |l, j| b[l * N + j], 1.0);
    for (i, row) in wide.get().chunks(2 * N).enumerate() {
        assert_eq!(row[..N], beside[i * 2 * N..i * 2 * N + N]);
        assert_close("d", &row[N..], &expected[i * N..(i + 1) * N], 1e-5, 1e-6);
    }
}

fn an_algorithm_that_was_chosen_is_given_again() {
    let multiplied = |chosen| {
        let bench = Bench::new(0);
        bench.device().fix(chosen);
        let (a, b) = (bench.bf16s(M * K), bench.bf16s(K * N));
        let (a, b, d) = (bench.put_bf16("a", &a), bench.put_bf16("b", &b), bench.empty::<f32>("d", M * N));
        let (a, b) = (Matrix::new(a.at, M, K, Number::Bf16), Matrix::new(b.at, K, N, Number::Bf16));
        bench.multiply(&Gemm { a, b, c: None, d: Matrix::new(d.at, M, N, Number::F32), alpha: 1.0 }).unwrap();
        (bench.device().chosen(), d.get())
    };
    let first = multiplied(Vec::new());
    assert_eq!(multiplied(first.0.clone()), first);
}

fn what_does_not_fit_is_refused() {
    let bench = Bench::new(0);
    let (a, b, d) = (
        bench.put_bf16("a", &vec![0.0; M * K]),
        bench.put_bf16("b", &vec![0.0; K * N]),
        bench.empty::<f32>("d", M * N),
    );
    let sound = Gemm {
        a: Matrix::new(a.at, M, K, Number::Bf16),
        b: Matrix::new(b.at, K, N, Number::Bf16),
        c: None,
        d: Matrix::new(d.at, M, N, Number::F32),
        alpha: 1.0,
    };
    for (gemm, words) in [
        (Gemm { a: sound.a.transpose(), ..sound }, "[19, 5] by"),
        (Gemm { d: Matrix { rows: M + 1, ..sound.d }, ..sound }, "instead of [5, 33]"),
        (Gemm { c: Some(Matrix { number: Number::Bf16, ..sound.d }), ..sound }, "c is not as d is"),
        (Gemm { a: Matrix { number: Number::F32, ..sound.a }, ..sound }, "not of bf16"),
    ] {
        let error = bench.multiply(&gemm).unwrap_err().to_string();
        assert!(error.contains(words), "{words}: {error}");
    }
    bench.multiply(&sound).unwrap();
}
