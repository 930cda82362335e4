//! Learning-rate schedules, as `transformers.get_scheduler` computes them.

use std::f64::consts::PI;

use serde::{Deserialize, Serialize};

/// How the learning rate falls after warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScheduleKind {
    /// In a straight line to zero.
    Linear,
    /// Along half a cosine to zero.
    Cosine,
    /// Not at all, not even a warm-up.
    Constant,
    /// Not at all, after a warm-up.
    ConstantWithWarmup,
}

/// How long the learning rate rises from zero.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Warmup {
    /// A number of optimizer steps.
    Steps(u64),
    /// A share of all optimizer steps, rounded up.
    Ratio(f64),
}

impl Warmup {
    /// The number of steps, of `total_steps`.
    pub fn steps(self, total_steps: u64) -> u64 {
        match self {
            Warmup::Steps(steps) => steps,
            Warmup::Ratio(ratio) => (total_steps as f64 * ratio).ceil() as u64,
        }
    }
}

/// A learning rate for every optimizer step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    kind: ScheduleKind,
    peak: f64,
    warmup_steps: u64,
    total_steps: u64,
}

impl Schedule {
    /// A schedule that reaches `peak` after the warm-up and ends after `total_steps`.
    pub fn new(kind: ScheduleKind, peak: f64, warmup: Warmup, total_steps: u64) -> Self {
        Schedule { kind, peak, warmup_steps: warmup.steps(total_steps), total_steps }
    }

    /// The learning rate of optimizer step `step`; the first step is 0.
    pub fn learning_rate(&self, step: u64) -> f64 {
        if self.kind == ScheduleKind::Constant {
            return self.peak;
        }
        if step < self.warmup_steps {
            return self.peak * (step as f64 / self.warmup_steps.max(1) as f64);
        }
        let decay_steps = self.total_steps.saturating_sub(self.warmup_steps).max(1) as f64;
        let factor = match self.kind {
            ScheduleKind::Constant | ScheduleKind::ConstantWithWarmup => 1.0,
            ScheduleKind::Linear => self.total_steps.saturating_sub(step) as f64 / decay_steps,
            ScheduleKind::Cosine => {
                let progress = (step - self.warmup_steps) as f64 / decay_steps;
                (0.5 * (1.0 + (PI * progress).cos())).max(0.0)
            }
        };
        self.peak * factor
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rates(kind: ScheduleKind, warmup: Warmup) -> Vec<f64> {
        let schedule = Schedule::new(kind, 2.0, warmup, 10);
        (0..11).map(|step| schedule.learning_rate(step)).collect()
    }

    fn close(a: &[f64], b: &[f64]) {
        assert_eq!(a.len(), b.len());
        for (a, b) in a.iter().zip(b) {
            assert!((a - b).abs() < 1e-12, "{a} is not {b}");
        }
    }

    #[test]
    fn linear_rises_then_falls_to_zero() {
        let expected = [0.0, 1.0, 2.0, 1.75, 1.5, 1.25, 1.0, 0.75, 0.5, 0.25, 0.0];
        close(&rates(ScheduleKind::Linear, Warmup::Steps(2)), &expected);
    }

    #[test]
    fn cosine_is_half_way_in_the_middle() {
        let r = rates(ScheduleKind::Cosine, Warmup::Steps(2));
        close(&[r[0], r[1], r[2], r[6], r[10]], &[0.0, 1.0, 2.0, 1.0, 0.0]);
    }

    #[test]
    fn constant_ignores_the_warmup_and_constant_with_warmup_does_not() {
        close(&rates(ScheduleKind::Constant, Warmup::Steps(4)), &[2.0; 11]);
        let r = rates(ScheduleKind::ConstantWithWarmup, Warmup::Steps(4));
        close(&r[..6], &[0.0, 0.5, 1.0, 1.5, 2.0, 2.0]);
    }

    #[test]
    fn a_warmup_ratio_is_rounded_up() {
        assert_eq!(Warmup::Ratio(0.03).steps(541), 17);
        assert_eq!(Warmup::Ratio(0.0).steps(541), 0);
        close(&rates(ScheduleKind::Linear, Warmup::Ratio(0.15)), &rates(ScheduleKind::Linear, Warmup::Steps(2)));
    }
}
