//! The checks on a device of which they know nothing but the trait. The fast build of the emulation plays it.

use tunesmith_kernel_checks::{checks, stand_on};
use tunesmith_kernels::emulator::Emulator;

/// It works on 15 GB, all of which another device has.
const LARGE: &str = "quantize::weights_of_a_tensor_beyond_two_to_the_31_are_found";

#[test]
fn checks_run_on_any_device() {
    stand_on(|_| Ok(Box::new(Emulator::fast())));
    let (large, others): (Vec<_>, Vec<_>) = checks().partition(|(name, _)| name == LARGE);
    assert_eq!(large.len(), 1);
    others.into_iter().for_each(|(_, run)| run());
}
