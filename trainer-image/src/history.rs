//! What was measured so far: goes into checkpoints, so that a resumed run's curve has no gap.

mod best;

use serde::{Deserialize, Serialize};

use tunesmith_crds::adapter_version::Execution;

/// How far a run is, and what it measured.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct History {
    /// Optimizer steps done, skipped ones included.
    pub step: u64,
    /// Steps whose update was left out.
    pub skipped_steps: u64,
    /// Of these, the last ones in a row.
    pub skipped_in_a_row: u64,
    /// Micro-batches done; dropout follows from it.
    pub micro_step: u64,
    /// Tokens worked through.
    pub tokens: u64,
    /// Seconds spent in steps, over all attempts.
    #[serde(with = "exact")]
    pub train_seconds: f64,
    /// Training losses, one for every `loggingSteps` steps.
    pub logs: Vec<TrainPoint>,
    /// Eval losses; the first is the base model's, at step 0.
    pub evals: Vec<EvalPoint>,
    /// Losses since the last entry of `logs`.
    pub window: Window,
    /// How the last attempt was executed.
    #[serde(default)]
    pub execution: Execution,
    /// Shares of right answers; the base model's have step 0.
    #[serde(default)]
    pub recalls: Vec<RecallPoint>,
}

/// A share of right answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RecallPoint {
    /// After this many steps.
    pub step: u64,
    /// Digest of the probe, which may change from one run of the same inputs to the next.
    pub probe: String,
    /// The share, in [0, 1].
    pub recall: f64,
}

/// A training loss.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TrainPoint {
    /// After this many steps.
    pub step: u64,
    /// Passes over the data.
    pub epoch: f64,
    /// Mean loss of the trained tokens since the last entry, in nats.
    pub loss: f64,
    /// Norm of the last step's gradient, before clipping; None if that step was skipped.
    pub grad_norm: Option<f64>,
    /// The last step's learning rate.
    #[serde(with = "exact")]
    pub learning_rate: f64,
    /// Tokens worked through by then.
    pub tokens: u64,
    /// Seconds spent in steps by then.
    pub seconds: f64,
}

/// An eval loss.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EvalPoint {
    /// After this many steps.
    pub step: u64,
    /// Passes over the data.
    pub epoch: f64,
    /// Mean loss of the evaluation tokens, in nats.
    pub loss: f64,
    /// Seconds spent in steps by then.
    pub seconds: f64,
}

/// A sum of losses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Window {
    /// Sum over trained tokens, in nats.
    #[serde(with = "exact")]
    pub sum: f64,
    /// Trained tokens.
    pub tokens: u64,
}

impl Window {
    /// The mean, with six decimals, which JSON gives back exactly.
    pub fn mean(self) -> f64 {
        round(self.sum / self.tokens.max(1) as f64)
    }
}

impl History {
    /// Eval loss of the base model.
    pub fn base_eval_loss(&self) -> Option<f64> {
        self.evals.first().filter(|eval| eval.step == 0).map(|eval| eval.loss)
    }

    /// Updates of the weights: AdamW counts these.
    pub fn updates(&self) -> u64 {
        self.step.saturating_sub(self.skipped_steps)
    }

    /// The newest eval loss.
    pub fn eval_loss(&self) -> Option<f64> {
        self.evals.last().map(|eval| eval.loss)
    }

    /// The newest training loss.
    pub fn train_loss(&self) -> Option<f64> {
        self.logs.last().map(|log| log.loss)
    }

    /// The share of right answers to this probe after so many steps.
    pub fn recall(&self, step: u64, probe: &str) -> Option<f64> {
        self.recalls.iter().find(|point| point.step == step && point.probe == probe).map(|point| point.recall)
    }

    /// Whether the weights after the last step were evaluated.
    pub fn is_evaluated(&self) -> bool {
        self.evals.last().is_some_and(|eval| eval.step == self.step)
    }
}

/// Floats as text: serde_json's own parser is off by a bit now and then, and a resumed run must not be.
mod exact {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(super) fn serialize<S: Serializer>(x: &f64, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(x)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

/// Six decimals.
pub fn round(x: f64) -> f64 {
    (x * 1e6).round() / 1e6
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_gives_back_every_bit() {
        // The shares of the peak of a cosine, of which serde_json alone reads some as their neighbours.
        for step in 1..1000 {
            let rate = 1e-4 * (f64::from(step) * 1e-3).cos();
            let log = TrainPoint { learning_rate: rate, loss: round(rate * 1e5), ..TrainPoint::default() };
            let window = Window { sum: rate * 1e5, tokens: 7 };
            let history = History { logs: vec![log], window, train_seconds: rate, ..History::default() };
            let json = serde_json::to_vec(&history).unwrap();
            assert_eq!(serde_json::from_slice::<History>(&json).unwrap(), history);
        }
    }
}
