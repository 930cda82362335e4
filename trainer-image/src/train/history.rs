//! What was measured so far: goes into checkpoints, so that a resumed run's curve has no gap.

use serde::{Deserialize, Serialize};

/// How far a run is, and what it measured.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct History {
    /// Optimizer steps done.
    pub step: u64,
    /// Micro-batches done; dropout follows from it.
    pub micro_step: u64,
    /// Tokens worked through.
    pub tokens: u64,
    /// Seconds spent in steps, over all attempts.
    pub train_seconds: f64,
    /// Training losses, one for every `loggingSteps` steps.
    pub logs: Vec<TrainPoint>,
    /// Eval losses; the first is the base model's, at step 0.
    pub evals: Vec<EvalPoint>,
    /// Losses since the last entry of `logs`.
    pub window: Window,
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
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TrainPoint {
    /// After this many steps.
    pub step: u64,
    /// Passes over the data.
    pub epoch: f64,
    /// Mean loss of the trained tokens since the last entry, in nats.
    pub loss: f64,
    /// Norm of the last step's gradient, before clipping.
    pub grad_norm: f64,
    /// The last step's learning rate.
    pub learning_rate: f64,
}

/// An eval loss.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EvalPoint {
    /// After this many steps.
    pub step: u64,
    /// Passes over the data.
    pub epoch: f64,
    /// Mean loss of the evaluation tokens, in nats.
    pub loss: f64,
}

/// A sum of losses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Window {
    /// Sum over trained tokens, in nats.
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

/// Six decimals.
pub fn round(x: f64) -> f64 {
    (x * 1e6).round() / 1e6
}
