//! Where this process's time goes, operation by operation. Off, it costs one look at a flag for each.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use super::Cpu;
use crate::backend::{Backend, WeightRef};
use crate::host_tensor::HostTensor;

static IS_ON: AtomicBool = AtomicBool::new(false);
static TOTALS: Mutex<BTreeMap<&'static str, Total>> = Mutex::new(BTreeMap::new());

/// What an operation took, all its calls together.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Total {
    /// How often it was called.
    pub calls: u64,
    /// Seconds of the thread that called it; its work is on all threads.
    pub seconds: f64,
    /// Floating-point operations of its products; zero where it has none.
    pub flops: f64,
}

/// Counts from now on.
pub fn start() {
    TOTALS.lock().unwrap_or_else(PoisonError::into_inner).clear();
    IS_ON.store(true, Ordering::Relaxed);
}

/// What was counted, the operation that took longest first.
pub fn totals() -> Vec<(&'static str, Total)> {
    let totals = TOTALS.lock().unwrap_or_else(PoisonError::into_inner);
    let mut totals: Vec<_> = totals.iter().map(|(name, total)| (*name, *total)).collect();
    totals.sort_by(|(_, a), (_, b)| b.seconds.total_cmp(&a.seconds));
    totals
}

/// Counts an operation until it is dropped.
pub(super) struct Timer(Option<(&'static str, usize, Instant)>);

/// Times an operation whose products take so many floating-point operations.
pub(super) fn time(name: &'static str, flops: usize) -> Timer {
    Timer(IS_ON.load(Ordering::Relaxed).then(|| (name, flops, Instant::now())))
}

impl Drop for Timer {
    fn drop(&mut self) {
        let Some((name, flops, start)) = self.0 else { return };
        let mut totals = TOTALS.lock().unwrap_or_else(PoisonError::into_inner);
        let total = totals.entry(name).or_default();
        total.calls += 1;
        total.seconds += start.elapsed().as_secs_f64();
        total.flops += flops as f64;
    }
}

/// GFLOP/s of this machine's products, best of some of an MLP's shape: 512 rows, 576 and 1536 features.
pub fn peak_gflops() -> f64 {
    let cpu = Cpu::default();
    let (rows, input, output) = (512, 576, 1536);
    let x = cpu.upload(&vec![0.5; rows * input], rows, input);
    let w = cpu.weight(HostTensor::new(vec![0.25; output * input], vec![output, input]));
    let best = (0..40).map(|_| {
        let start = Instant::now();
        std::hint::black_box(cpu.linear(&x, WeightRef::Frozen(&w)));
        start.elapsed().as_secs_f64()
    });
    2e-9 * (rows * input * output) as f64 / best.fold(f64::MAX, f64::min)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_operation_is_counted_with_its_work_once_counting_has_begun() {
        let cpu = Cpu::default();
        let x = cpu.zeros(3, 8);
        let w = cpu.weight(HostTensor::new(vec![0.0; 40], vec![5, 8]));
        let run = || cpu.linear(&x, WeightRef::Frozen(&w));
        run();
        start();
        run();
        run();
        // Tests beside this one count too.
        let (_, total) = totals().into_iter().find(|(name, _)| *name == "linear").unwrap();
        assert!(total.calls >= 2 && total.seconds > 0.0 && total.flops >= 2.0 * 2.0 * (3 * 8 * 5) as f64, "{total:?}");
    }
}
