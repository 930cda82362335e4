//! The learning-rate schedule that a job asks for.

use tunesmith_crds::fine_tune_job::{self as job, LrScheduler, Training};
use tunesmith_engine::{Schedule, ScheduleKind, Warmup, schedule::DecayType};

use crate::error::Error;

/// Where a polynomial schedule ends unless the job says otherwise, as in transformers.
const DEFAULT_LR_END: f64 = 1e-7;

/// The schedule of a run of `total_steps`.
///
/// # Errors
/// The options do not fit the number of steps or the learning rate.
pub fn schedule(training: &Training, total_steps: u64) -> Result<Schedule, Error> {
    let warmup = match training.warmup_steps {
        Some(steps) => Warmup::Steps(steps),
        None => Warmup::Ratio(training.warmup_ratio),
    };
    let options = training.lr_scheduler_kwargs.unwrap_or_default();
    let kind = match training.lr_scheduler_type {
        LrScheduler::Linear => ScheduleKind::Linear,
        LrScheduler::Cosine => ScheduleKind::Cosine,
        LrScheduler::CosineWithRestarts => {
            ScheduleKind::CosineWithRestarts { num_cycles: options.num_cycles.unwrap_or(1) }
        }
        LrScheduler::Polynomial => ScheduleKind::Polynomial {
            lr_end: lr_end(training.learning_rate, options.lr_end)?,
            power: options.power.unwrap_or(1.0),
        },
        LrScheduler::InverseSqrt => ScheduleKind::InverseSqrt,
        LrScheduler::WarmupStableDecay => ScheduleKind::WarmupStableDecay {
            num_decay_steps: num_decay_steps(options.num_decay_steps, warmup.steps(total_steps), total_steps)?,
            decay_type: decay_type(options.decay_type.unwrap_or_default()),
            min_lr_ratio: options.min_lr_ratio.unwrap_or(0.0),
        },
        LrScheduler::Constant => ScheduleKind::ConstantWithWarmup,
    };
    Ok(Schedule::new(kind, training.learning_rate, warmup, total_steps))
}

fn lr_end(learning_rate: f64, lr_end: Option<f64>) -> Result<f64, Error> {
    let lr_end = lr_end.unwrap_or(DEFAULT_LR_END);
    match lr_end < learning_rate {
        true => Ok(lr_end),
        false => Err(Error::Spec(format!(
            "training.learningRate is {learning_rate:e}, but a polynomial schedule falls from it to {lr_end:e}: set \
             training.lrSchedulerKwargs.lrEnd to less than learningRate"
        ))),
    }
}

fn num_decay_steps(steps: Option<u64>, warmup: u64, total: u64) -> Result<u64, Error> {
    match steps {
        None => Err(Error::Spec(
            "training.lrSchedulerType warmup_stable_decay needs lrSchedulerKwargs.numDecaySteps, the steps of the \
             fall at the end"
                .into(),
        )),
        Some(steps) if warmup.saturating_add(steps) > total => Err(Error::Spec(format!(
            "the run has {total} steps, too few for {warmup} of warm-up and {steps} of decay: lower \
             training.lrSchedulerKwargs.numDecaySteps or the warm-up, or train for more steps"
        ))),
        Some(steps) => Ok(steps),
    }
}

fn decay_type(decay_type: job::DecayType) -> DecayType {
    match decay_type {
        job::DecayType::Linear => DecayType::Linear,
        job::DecayType::Cosine => DecayType::Cosine,
        job::DecayType::OneMinusSqrt => DecayType::OneMinusSqrt,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn rates(training: Value) -> Result<Vec<f64>, String> {
        let training: Training = serde_json::from_value(training).unwrap();
        let schedule = schedule(&training, 10).map_err(|error| error.to_string())?;
        Ok((0..10).map(|step| schedule.learning_rate(step)).collect())
    }

    #[test]
    fn options_that_are_left_out_have_the_defaults_of_transformers() {
        let base = |kind: &str, options: Value| {
            let training = json!({"lrSchedulerType": kind, "lrSchedulerKwargs": options, "warmupSteps": 2});
            rates(training).unwrap()
        };
        let none = || json!({});
        assert_eq!(base("cosine_with_restarts", none()), base("cosine_with_restarts", json!({"numCycles": 1})));
        assert_eq!(base("polynomial", none()), base("polynomial", json!({"power": 1.0, "lrEnd": 1e-7})));
        let decay = base("warmup_stable_decay", json!({"numDecaySteps": 4}));
        let spelled_out = json!({"numDecaySteps": 4, "decayType": "cosine", "minLrRatio": 0.0});
        assert_eq!(decay, base("warmup_stable_decay", spelled_out));
        assert_ne!(decay, base("warmup_stable_decay", json!({"numDecaySteps": 4, "decayType": "1-sqrt"})));
    }

    #[test]
    fn a_schedule_that_does_not_fit_the_run_is_refused_with_what_to_change() {
        let decay = json!({"lrSchedulerType": "warmup_stable_decay", "lrSchedulerKwargs": {"numDecaySteps": 9},
                           "warmupSteps": 2});
        assert!(rates(decay).unwrap_err().contains("10 steps, too few for 2 of warm-up and 9 of decay"));
        let end = rates(json!({"lrSchedulerType": "polynomial", "learningRate": 1e-8})).unwrap_err();
        assert!(end.contains("learningRate is 1e-8") && end.contains("lrEnd"), "{end}");
    }
}
