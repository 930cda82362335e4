//! Helpers for loops that the compiler vectorises: lanes for sums, and an exponential without calls.
//!
//! [`vectorize`] compiles a loop for each instruction set and picks one when it runs. Sums go into [`LANES`] partial
//! sums that are added in a fixed order, so a result does not depend on the width of the machine's vectors.

/// Partial sums of a reduction.
pub(crate) const LANES: usize = 16;

/// Runs `f`, compiled for the widest vectors that this CPU has.
#[inline(always)]
pub(crate) fn vectorize<R>(f: impl FnOnce() -> R) -> R {
    struct Op<F>(F);
    impl<R, F: FnOnce() -> R> pulp::NullaryFnOnce for Op<F> {
        type Output = R;
        #[inline(always)]
        fn call(self) -> R {
            (self.0)()
        }
    }
    pulp::Arch::new().dispatch(Op(f))
}

/// Σ f(i) over 0..n, in lanes.
#[inline(always)]
pub(crate) fn sum(n: usize, f: impl Fn(usize) -> f32) -> f32 {
    let mut lanes = [0f32; LANES];
    let whole = n / LANES * LANES;
    for i in (0..whole).step_by(LANES) {
        for (l, lane) in lanes.iter_mut().enumerate() {
            *lane += f(i + l);
        }
    }
    let mut total = 0.0;
    for i in whole..n {
        total += f(i);
    }
    fold(lanes, |a, b| a + b) + total
}

/// Σ a·b, in lanes.
#[inline(always)]
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let n = a.len();
    let (a, b) = (&a[..n], &b[..n]);
    sum(n, |i| a[i] * b[i])
}

/// The largest element; −∞ for none.
#[inline(always)]
pub(crate) fn max(a: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let chunks = a.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane = if *x > *lane { *x } else { *lane };
        }
    }
    rest.iter().fold(fold(lanes, f32::max), |m, x| m.max(*x))
}

#[inline(always)]
fn fold(mut lanes: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut n = LANES / 2;
    while n > 0 {
        for i in 0..n {
            lanes[i] = f(lanes[i], lanes[i + n]);
        }
        n /= 2;
    }
    lanes[0]
}

/// eˣ within 2 ulp for −87 ≤ x ≤ 88; outside, the value at that end. (Cephes' polynomial, without branches.)
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    let x = x.clamp(-87.0, 88.0);
    // Adding and taking away 1.5 · 2²³ rounds to the nearest whole number.
    const ROUND: f32 = 12_582_912.0;
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (x - n * 0.693_359_4) - n * -2.121_944_4e-4;
    let mut p = 1.987_569_1e-4;
    p = p * r + 1.398_199_9e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_5e-1;
    p = p * r + 0.5;
    let y = p * (r * r) + r + 1.0;
    // The low bits of `shifted` hold n; moved into the exponent's place, they are 2ⁿ.
    y * f32::from_bits(shifted.to_bits().wrapping_add(127) << 23)
}

/// tanh(x) within 5 · 10⁻⁷, relative: by [`exp`], but for small x by its series, where the difference from 1 would lose digits.
#[inline(always)]
pub(crate) fn tanh(x: f32) -> f32 {
    let by_exp = 1.0 - 2.0 / (exp(2.0 * x) + 1.0);
    let x2 = x * x;
    let by_series = x
        * (1.0
            + x2 * (-0.333_333_34
                + x2 * (0.133_333_34 + x2 * (-0.053_968_254 + x2 * (0.021_869_488 - x2 * 0.008_863_236)))));
    if x2 < 0.09 { by_series } else { by_exp }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_ulp() {
        let mut x = -86.9f32;
        while x < 87.9 {
            let (ours, exact) = (f64::from(exp(x)), f64::from(x).exp());
            let ulp = 2f64.powi(exact.log2().floor() as i32 - 23);
            assert!((ours - exact).abs() <= 2.0 * ulp, "exp({x}) = {ours}, exact {exact}");
            x += 0.001_37;
        }
        assert!(exp(f32::NEG_INFINITY) < 1.7e-38);
        assert_eq!(exp(0.0), 1.0);
    }

    #[test]
    fn tanh_is_close_everywhere() {
        let mut x = -12.0f32;
        while x < 12.0 {
            let error = (f64::from(tanh(x)) - f64::from(x).tanh()).abs();
            assert!(error < 5e-7 * f64::from(x).tanh().abs().max(0.1), "tanh({x}): {error}");
            x += 0.001_37;
        }
        assert_eq!((tanh(0.0), tanh(1e-8), tanh(100.0), tanh(-100.0)), (0.0, 1e-8, 1.0, -1.0));
    }

    #[test]
    fn sums_and_maxima_see_every_element() {
        for n in [0, 1, 15, 16, 17, 50] {
            let a: Vec<f32> = (0..n).map(|i| i as f32 + 1.0).collect();
            assert_eq!(sum(n, |i| a[i]), (n * (n + 1) / 2) as f32);
            assert_eq!(max(&a), if n == 0 { f32::NEG_INFINITY } else { n as f32 });
        }
    }
}
