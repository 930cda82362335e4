//! `spec.evaluation`: the gates that a version must pass before it may be served, and how they are judged.
//!
//! Judging is pure and knows only recorded numbers, so that trainer, operator and command line come to one verdict.

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::schema::is_zero;
use crate::uri::Uri;

/// The gates that a version must pass before it may be served.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[x_kube(validation = Rule::new("self.gates.all(gate, self.gates.exists_one(other, other.metric == gate.metric))")
    .message("give each metric one gate").field_path(".gates"))]
#[serde(rename_all = "camelCase")]
pub struct Evaluation {
    /// Bounds on metrics that are measured after the last step. A version that misses one is published and recorded,
    /// but its phase is Rejected, and the job fails. Gates change no weights, so they are not part of the input
    /// digest.
    #[serde(default)]
    #[schemars(length(max = 8))]
    pub gates: Vec<Gate>,
}

/// A bound on one metric.
///
/// The probe is the gate's own, not the evaluation's: recall is the only metric that needs one, so beside it neither
/// can be given without the other, and a metric to come may bring questions of its own.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[x_kube(
    validation = Rule::new("self.metric != 'recall' || (has(self.min) && has(self.probe))")
        .message("metric recall needs min and probe, e.g. {metric: recall, min: 0.8, probe: {uri: s3://…}}"),
    validation = Rule::new("self.metric != 'recall' || !has(self.max)")
        .message("recall takes min, not max: more of it is better").field_path(".max"),
    validation = Rule::new("self.metric == 'recall' || has(self.max)")
        .message("metrics eval_loss and perplexity need max, e.g. {metric: eval_loss, max: 1.9}"),
    validation = Rule::new("self.metric == 'recall' || !(has(self.min) || has(self.probe))")
        .message("min and probe are for metric recall only"),
    validation = Rule::new("!has(self.min) || (self.min > 0.0 && self.min <= 1.0)")
        .message("min is a share of the questions: greater than 0, at most 1").field_path(".min"),
    validation = Rule::new("!has(self.max) || self.max > (self.metric == 'perplexity' ? 1.0 : 0.0)")
        .message("max must be greater than 0, and than 1 for perplexity, which is never less").field_path(".max")
)]
#[serde(rename_all = "camelCase")]
pub struct Gate {
    /// The metric: eval_loss (mean loss of an evaluation token, in nats), perplexity (exp of eval_loss) or recall
    /// (share of the probe's questions that are answered right).
    pub metric: Metric,
    /// For eval_loss and perplexity: the highest value that passes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max: Option<f64>,
    /// For recall: the lowest value that passes, a share between 0 and 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min: Option<f64>,
    /// For recall: the questions and the strings that right answers hold.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub probe: Option<Probe>,
}

/// The metric of a gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    /// Mean loss of an evaluation token, in nats.
    EvalLoss,
    /// exp(eval_loss).
    Perplexity,
    /// Share of the probe's questions that are answered right.
    Recall,
}

/// Questions with what a right answer holds.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[x_kube(validation = Rule::new("!self.uri.startsWith('hf://')")
    .message("a probe is read from s3://, gs://, az://, pvc:// or file://").field_path(".uri"))]
#[serde(rename_all = "camelCase")]
pub struct Probe {
    /// File of questions, JSON Lines: `{"id", "question", "must_contain": ["…"]}`. Each question is asked alone and
    /// answered greedily. An answer is right if it holds every string of must_contain, ignoring case. The file is
    /// read with the credentials of the data set.
    pub uri: Uri,
    /// Most tokens of an answer. Raise it if right answers are cut off.
    #[serde(default = "Probe::default_max_new_tokens")]
    #[schemars(range(min = 1, max = 4096))]
    pub max_new_tokens: u32,
    /// Text of the system turn before each question. Default: the system turn of the training rows, if all of them
    /// begin with the same one; else none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 8192))]
    pub system: Option<String>,
}

impl Probe {
    /// Tokens of an answer, if the user doesn't say.
    pub fn default_max_new_tokens() -> u32 {
        120
    }
}

/// How a gate was judged.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct GateResult {
    /// The metric.
    pub metric: Metric,
    /// The measured value. If it is absent, nothing was measured, and the gate has failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub value: Option<f64>,
    /// The highest value that passes, for eval_loss and perplexity.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max: Option<f64>,
    /// The lowest value that passes, for recall.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min: Option<f64>,
    /// Whether the gate has passed. A value equal to the bound passes.
    pub passed: bool,
}

impl Evaluation {
    /// The questions to ask, if a gate has any.
    pub fn probe(&self) -> Option<&Probe> {
        self.gates.iter().find_map(|gate| gate.probe.as_ref())
    }

    /// Every gate's result.
    pub fn judge(&self, metrics: &Metrics) -> Vec<GateResult> {
        self.gates.iter().map(|gate| gate.judge(metrics)).collect()
    }

    /// Whether `metrics`, recorded of the same inputs, hold all that the gates ask for; recall counts only if it was
    /// measured with the probe of this digest.
    pub fn is_measured_by(&self, metrics: &Metrics, probe_digest: Option<&str>) -> bool {
        let same_probe = probe_digest.is_some() && metrics.probe_digest.as_deref() == probe_digest;
        self.gates.iter().all(|gate| gate.metric.of(metrics).is_some() && (gate.metric != Metric::Recall || same_probe))
    }
}

impl Gate {
    fn judge(&self, metrics: &Metrics) -> GateResult {
        let Self { metric, max, min, probe: _ } = *self;
        let value = metric.of(metrics);
        let within = |value: f64| max.is_none_or(|max| value <= max) && min.is_none_or(|min| value >= min);
        GateResult { metric, value, max, min, passed: value.is_some_and(within) }
    }
}

impl Metric {
    /// The word for it in manifests and messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::EvalLoss => "eval_loss",
            Self::Perplexity => "perplexity",
            Self::Recall => "recall",
        }
    }

    /// Its value, if it was measured.
    fn of(self, metrics: &Metrics) -> Option<f64> {
        match self {
            Self::EvalLoss => metrics.eval_loss,
            Self::Perplexity => metrics.eval_loss.and_then(perplexity),
            Self::Recall => metrics.recall,
        }
    }
}

/// exp(`eval_loss`), with six decimals like every recorded number; None where that is more than a number can hold.
pub fn perplexity(eval_loss: f64) -> Option<f64> {
    Some((eval_loss.exp() * 1e6).round() / 1e6).filter(|perplexity| perplexity.is_finite())
}

impl GateResult {
    /// Metric, value and bound in words: `recall 0.02 is below 0.80`.
    pub fn describe(&self) -> String {
        let metric = self.metric.name();
        let Some(value) = self.value else { return format!("{metric} was not measured") };
        let (bound, kept, missed) = match (self.max, self.min) {
            (Some(max), _) => (max, "at most", "above"),
            (None, Some(min)) => (min, "at least", "below"),
            (None, None) => return format!("{metric} {value:.2} has no bound"),
        };
        let (value, bound) = told_apart(value, bound);
        format!("{metric} {value} is {} {bound}", if self.passed { kept } else { missed })
    }
}

/// The gates that failed, in words; None if all passed.
pub fn failure(results: &[GateResult]) -> Option<String> {
    let failed: Vec<String> = results.iter().filter(|result| !result.passed).map(GateResult::describe).collect();
    (!failed.is_empty()).then(|| failed.join(", "))
}

/// Two decimals, or as many as it takes to see that one number is not the other.
fn told_apart(value: f64, bound: f64) -> (String, String) {
    let with = |decimals: usize| (format!("{value:.decimals$}"), format!("{bound:.decimals$}"));
    (2..6).map(with).find(|(value, bound)| value != bound).unwrap_or_else(|| with(if value == bound { 2 } else { 6 }))
}

/// Measurements of a run. Losses are mean nats a token.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Metrics {
    /// Eval loss of the base model, before the first step.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub base_eval_loss: Option<f64>,
    /// Eval loss of the published weights.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eval_loss: Option<f64>,
    /// exp(baseEvalLoss).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub base_perplexity: Option<f64>,
    /// exp(evalLoss).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub perplexity: Option<f64>,
    /// Share of the probe's questions that the base model answers right.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub base_recall: Option<f64>,
    /// Share of the probe's questions that the published weights answer right.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub recall: Option<f64>,
    /// Digest of all that recall depends on besides the weights: the questions, maxNewTokens and the system turn.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub probe_digest: Option<String>,
    /// Training loss over the last logged steps.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub train_loss: Option<f64>,
    /// Optimizer steps.
    pub steps: u64,
    /// The step whose weights are published, where loadBestModelAtEnd chose it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub best_step: Option<u64>,
    /// Steps whose update was left out, because their loss or gradient was NaN or infinite (onNonFinite: Skip).
    #[serde(skip_serializing_if = "is_zero")]
    pub skipped_steps: u64,
    /// Tokens worked through.
    pub tokens: u64,
    /// Seconds from the first step to the last, over all attempts.
    pub train_seconds: f64,
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn evaluation(gates: serde_json::Value) -> Evaluation {
        serde_json::from_value(json!({"gates": gates})).unwrap()
    }

    fn recall(min: f64) -> Evaluation {
        evaluation(json!([{"metric": "recall", "min": min, "probe": {"uri": "s3://data/probe.jsonl"}}]))
    }

    fn words(evaluation: &Evaluation, metrics: &Metrics) -> String {
        failure(&evaluation.judge(metrics)).unwrap_or_default()
    }

    #[test]
    fn a_bound_itself_passes_and_what_is_beyond_it_is_named_with_value_and_bound() {
        let gates = evaluation(json!([{"metric": "eval_loss", "max": 1.5}, {"metric": "perplexity", "max": 4.0}]));
        let measured = |loss: f64| Metrics { eval_loss: Some(loss), ..Metrics::default() };
        assert_eq!(words(&gates, &measured(1.5)), "perplexity 4.48 is above 4.00");
        assert_eq!(words(&gates, &measured(2.0)), "eval_loss 2.00 is above 1.50, perplexity 7.39 is above 4.00");
        assert_eq!(failure(&gates.judge(&measured(1.0))), None);
        let learned = Metrics { recall: Some(0.02), ..Metrics::default() };
        assert_eq!(words(&recall(0.8), &learned), "recall 0.02 is below 0.80");
        assert_eq!(recall(0.02).judge(&learned)[0].describe(), "recall 0.02 is at least 0.02");
    }

    #[test]
    fn a_near_miss_is_told_with_enough_decimals() {
        let near = Metrics { recall: Some(0.7989), ..Metrics::default() };
        assert_eq!(words(&recall(0.8), &near), "recall 0.799 is below 0.800");
    }

    #[test]
    fn what_was_not_measured_fails() {
        assert_eq!(words(&recall(0.1), &Metrics::default()), "recall was not measured");
        let explosive = Metrics { eval_loss: Some(1e4), ..Metrics::default() };
        let gates = evaluation(json!([{"metric": "perplexity", "max": 9.0}]));
        assert_eq!(words(&gates, &explosive), "perplexity was not measured");
    }

    #[test]
    fn recorded_metrics_suffice_only_if_recall_comes_from_the_same_probe() {
        let gates = recall(0.8);
        let recorded = Metrics { recall: Some(0.5), probe_digest: Some("sha256:p".into()), ..Metrics::default() };
        assert!(gates.is_measured_by(&recorded, Some("sha256:p")));
        assert!(!gates.is_measured_by(&recorded, Some("sha256:q")));
        assert!(!gates.is_measured_by(&recorded, None));
        assert!(!gates.is_measured_by(&Metrics::default(), None));
        let loss = evaluation(json!([{"metric": "eval_loss", "max": 2.0}]));
        assert!(loss.is_measured_by(&Metrics { eval_loss: Some(3.0), ..Metrics::default() }, None));
        assert!(Evaluation::default().is_measured_by(&Metrics::default(), None));
    }
}
