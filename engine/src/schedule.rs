//! Learning-rate schedules, as `transformers.get_scheduler` computes them.

use std::f64::consts::PI;

use serde::{Deserialize, Serialize};

/// How the learning rate falls after warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScheduleKind {
    /// In a straight line to zero.
    Linear,
    /// Along half a cosine to zero.
    Cosine,
    /// Along half a cosine to zero, several times, each from the peak again.
    CosineWithRestarts {
        /// How many times.
        num_cycles: u32,
    },
    /// To `lr_end`, along a power of the share of steps that is left.
    Polynomial {
        /// The learning rate after the last step.
        lr_end: f64,
        /// The power; 1 is a straight line.
        power: f64,
    },
    /// With the inverse square root of the step, on and on.
    InverseSqrt,
    /// Not at all, until the last `num_decay_steps`.
    WarmupStableDecay {
        /// Steps of the fall.
        num_decay_steps: u64,
        /// Its shape.
        decay_type: DecayType,
        /// What the rise begins and the fall ends with, as a share of the peak.
        min_lr_ratio: f64,
    },
    /// Not at all, not even a warm-up.
    Constant,
    /// Not at all, after a warm-up.
    ConstantWithWarmup,
}

/// The shape of a fall from 1 to 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DecayType {
    /// A straight line.
    Linear,
    /// Half a cosine.
    Cosine,
    /// One minus the square root, which falls fast at first.
    #[serde(rename = "1-sqrt")]
    OneMinusSqrt,
}

impl DecayType {
    fn at(self, progress: f64) -> f64 {
        match self {
            DecayType::Linear => 1.0 - progress,
            DecayType::Cosine => half_cosine(progress),
            DecayType::OneMinusSqrt => 1.0 - progress.sqrt(),
        }
    }
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

/// The timescale of [`ScheduleKind::InverseSqrt`] without a warm-up, in steps.
const DEFAULT_TIMESCALE: u64 = 10_000;

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
        match step < self.warmup_steps && self.kind != ScheduleKind::Constant {
            true => self.peak * self.rise(step),
            false => self.peak * self.fall(step),
        }
    }

    /// The share of the peak during the warm-up.
    fn rise(&self, step: u64) -> f64 {
        let progress = step as f64 / self.warmup_steps as f64;
        match self.kind {
            ScheduleKind::WarmupStableDecay { min_lr_ratio, .. } => above(min_lr_ratio, progress),
            _ => progress,
        }
    }

    /// The share of the peak after the warm-up.
    fn fall(&self, step: u64) -> f64 {
        let Schedule { peak, warmup_steps, total_steps, .. } = *self;
        let decay_steps = total_steps.saturating_sub(warmup_steps).max(1) as f64;
        let progress = || (step - warmup_steps) as f64 / decay_steps;
        match self.kind {
            ScheduleKind::Constant | ScheduleKind::ConstantWithWarmup => 1.0,
            ScheduleKind::Linear => total_steps.saturating_sub(step) as f64 / decay_steps,
            ScheduleKind::Cosine => half_cosine(progress()),
            ScheduleKind::CosineWithRestarts { .. } if progress() >= 1.0 => 0.0,
            ScheduleKind::CosineWithRestarts { num_cycles } => half_cosine((f64::from(num_cycles) * progress()) % 1.0),
            ScheduleKind::Polynomial { lr_end, .. } if step > total_steps => lr_end / peak,
            ScheduleKind::Polynomial { lr_end, power } => {
                ((peak - lr_end) * (1.0 - progress()).powf(power) + lr_end) / peak
            }
            ScheduleKind::InverseSqrt => {
                let timescale = if warmup_steps > 0 { warmup_steps } else { DEFAULT_TIMESCALE };
                1.0 / ((step - warmup_steps + timescale) as f64 / timescale as f64).sqrt()
            }
            ScheduleKind::WarmupStableDecay { num_decay_steps, .. } if step + num_decay_steps < total_steps => 1.0,
            ScheduleKind::WarmupStableDecay { min_lr_ratio, .. } if step >= total_steps => min_lr_ratio,
            ScheduleKind::WarmupStableDecay { num_decay_steps, decay_type, min_lr_ratio } => {
                let progress = (step + num_decay_steps - total_steps) as f64 / num_decay_steps.max(1) as f64;
                above(min_lr_ratio, decay_type.at(progress))
            }
        }
    }
}

/// From 1 to 0 along half a cosine.
fn half_cosine(progress: f64) -> f64 {
    (0.5 * (1.0 + (PI * progress).cos())).max(0.0)
}

/// A share of what lies above the least.
fn above(least: f64, share: f64) -> f64 {
    (share * (1.0 - least) + least).max(0.0)
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

    /// The numbers below are those of transformers 5.23's `get_scheduler`, with a peak of 2 and 10 steps.
    const STEPS: std::ops::Range<u64> = 0..12;

    fn transformers(kind: ScheduleKind, warmup_steps: u64, expected: &[f64]) {
        let schedule = Schedule::new(kind, 2.0, Warmup::Steps(warmup_steps), 10);
        close(&STEPS.map(|step| schedule.learning_rate(step)).collect::<Vec<_>>(), expected);
    }

    #[test]
    fn cosine_with_restarts_begins_at_the_peak_again_and_ends_at_zero() {
        transformers(
            ScheduleKind::CosineWithRestarts { num_cycles: 3 },
            2,
            &[
                0.0,
                1.0,
                2.0,
                1.3826834323650898,
                0.29289321881345254,
                1.9238795325112867,
                1.0,
                0.07612046748871326,
                1.7071067811865475,
                0.6173165676349103,
                0.0,
                0.0,
            ],
        );
    }

    #[test]
    fn polynomial_falls_to_its_end_and_stays_there() {
        transformers(
            ScheduleKind::Polynomial { lr_end: 0.1, power: 2.0 },
            2,
            &[0.0, 1.0, 2.0, 1.5546875, 1.16875, 0.8421875, 0.575, 0.3671875, 0.21875, 0.1296875, 0.1, 0.1],
        );
    }

    #[test]
    fn inverse_sqrt_takes_the_warmup_for_its_timescale() {
        transformers(
            ScheduleKind::InverseSqrt,
            4,
            &[
                0.0,
                0.5,
                1.0,
                1.5,
                2.0,
                1.7888543819998317,
                1.6329931618554523,
                1.5118578920369088,
                std::f64::consts::SQRT_2,
                1.3333333333333333,
                1.2649110640673518,
                1.2060453783110545,
            ],
        );
        let without_warmup = rates(ScheduleKind::InverseSqrt, Warmup::Steps(0));
        close(&without_warmup[..3], &[2.0, 1.9999000074993754, 1.9998000299950012]);
    }

    #[test]
    fn warmup_stable_decay_stays_at_the_peak_until_the_last_steps() {
        let kind = |decay_type| ScheduleKind::WarmupStableDecay { num_decay_steps: 4, decay_type, min_lr_ratio: 0.1 };
        let falls = [
            (DecayType::Linear, [1.55, 1.1, 0.65]),
            (DecayType::Cosine, [1.7363961030678927, 1.1, 0.4636038969321073]),
            (DecayType::OneMinusSqrt, [1.1, 0.7272077938642143, 0.44115427318801054]),
        ];
        for (decay_type, [a, b, c]) in falls {
            transformers(kind(decay_type), 2, &[0.2, 1.1, 2.0, 2.0, 2.0, 2.0, 2.0, a, b, c, 0.2, 0.2]);
        }
    }

    #[test]
    fn a_decay_that_begins_in_the_warmup_is_met_half_way() {
        let decay =
            ScheduleKind::WarmupStableDecay { num_decay_steps: 8, decay_type: DecayType::Cosine, min_lr_ratio: 0.0 };
        transformers(
            decay,
            4,
            &[
                0.0,
                0.5,
                1.0,
                1.5,
                1.7071067811865475,
                1.3826834323650898,
                1.0,
                0.6173165676349103,
                0.29289321881345254,
                0.07612046748871326,
                0.0,
                0.0,
            ],
        );
    }

    #[test]
    fn a_warmup_ratio_is_rounded_up() {
        assert_eq!(Warmup::Ratio(0.03).steps(541), 17);
        assert_eq!(Warmup::Ratio(0.0).steps(541), 0);
        close(&rates(ScheduleKind::Linear, Warmup::Ratio(0.15)), &rates(ScheduleKind::Linear, Warmup::Steps(2)));
    }
}
