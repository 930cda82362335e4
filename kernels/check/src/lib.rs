//! Checks of the kernels, on any device: each holds results against f64, PyTorch's formulas or bitsandbytes' bytes.
//!
//! `tests/emulated.rs` runs them under the emulation. A program for another device names it by [`stand_on`], and runs [`checks`].

/// Lists the checks of a module. A check that is not listed is dead code.
macro_rules! listed {
    ($($name:ident),* $(,)?) => {
        pub const CHECKS: &[crate::Check] = &[$(crate::Check { name: stringify!($name), run: $name }),*];
    };
}

mod activation;
mod adafactor;
mod attention;
mod bench;
mod cross_entropy;
mod device;
mod embedding;
mod gemm;
mod large;
mod low_rank;
mod noise;
mod norm;
mod optimizer;
mod quantize;
mod rope;

pub use bench::{Make, leave_unfilled, stand_on};

/// A statement about kernels. It panics where the statement is wrong.
struct Check {
    name: &'static str,
    run: fn(),
}

/// The checks of these modules.
macro_rules! of {
    ($($module:ident),* $(,)?) => { [$((stringify!($module), $module::CHECKS)),*] };
}

/// All checks by name, `module::function`. A check panics where a kernel is wrong.
pub fn checks() -> impl Iterator<Item = (String, fn())> {
    let modules = of![
        activation,
        adafactor,
        attention,
        cross_entropy,
        device,
        embedding,
        gemm,
        large,
        low_rank,
        noise,
        norm,
        optimizer,
        quantize,
        rope
    ];
    let named = |(module, checks): (&'static str, &'static [Check])| {
        checks.iter().map(move |check| (format!("{module}::{}", check.name), check.run))
    };
    modules.into_iter().flat_map(named)
}
