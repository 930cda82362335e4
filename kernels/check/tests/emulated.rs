//! The checks under the emulation, a test each: `cargo test --package tunesmith-kernel-checks norm::`.

use std::process::ExitCode;

use libtest_mimic::{Arguments, Trial};

fn main() -> ExitCode {
    let trial = |(name, run): (String, fn())| {
        Trial::test(name, move || {
            run();
            Ok(())
        })
    };
    libtest_mimic::run(&Arguments::from_args(), tunesmith_kernel_checks::checks().map(trial).collect()).exit_code()
}
