//! What gates ask for is measured once, whatever happens to the run.

use std::fs;

use serde_json::{Value, json};
use tunesmith_crds::{Evaluation, RunSpec, run::Outcome};
use tunesmith_engine::Sampling;

use super::{Bench, Stop, trained};
use crate::{generate::Writer, store::Stores};

#[test]
fn perplexity_follows_from_the_eval_loss_and_gates_are_in_the_manifest() {
    let bench = Bench::new();
    let mut spec = bench.checked(json!({}), 1);
    spec.evaluation = evaluation(json!([{"metric": "perplexity", "max": 1.5}]));
    let metrics = trained(bench.train(&spec, &Stop::default()).unwrap()).metrics;
    assert!((metrics.perplexity.unwrap() - metrics.eval_loss.unwrap().exp()).abs() < 1e-6);
    assert_eq!((metrics.recall, metrics.probe_digest), (None, None), "nobody asked for it");
    let manifest = fs::read(bench.path("adapters/support/v1/manifest.json")).unwrap();
    let manifest: Value = serde_json::from_slice(&manifest).unwrap();
    let [gate] = &manifest["gates"].as_array().unwrap()[..] else { panic!("{manifest}") };
    assert_eq!((&gate["value"], &gate["passed"]), (&json!(metrics.perplexity), &json!(false)));
}

fn evaluation(gates: Value) -> Evaluation {
    serde_json::from_value(json!({"gates": gates})).unwrap()
}

impl Bench {
    /// What the model of this folder says, with the adapter of a version or without.
    fn answer(&self, version: Option<u32>, question: &str) -> String {
        let stores = Stores::from_environment(self.runtime.handle().clone());
        let path = |name: &str| self.path(name).display().to_string();
        let adapter = version.map(|version| path(&format!("adapters/support/v{version}")));
        let writer = Writer::load(&path("model"), adapter.as_deref(), &stores, &self.path("work")).unwrap();
        writer.answer(None, question, Sampling::default(), 8).unwrap()
    }

    /// The same run with a recall gate, whose one question is right with this answer.
    pub(super) fn asked(&self, spec: RunSpec, question: &str, must_contain: &str) -> RunSpec {
        let row = json!({"id": "a", "question": question, "must_contain": [must_contain]});
        fs::write(self.path("probe.jsonl"), row.to_string()).unwrap();
        let uri = format!("file://{}", self.path("probe.jsonl").display());
        let gate = json!({"metric": "recall", "min": 0.5, "probe": {"uri": uri, "maxNewTokens": 8}});
        RunSpec { evaluation: evaluation(json!([gate])), ..spec }
    }

    fn recalls(&self) -> Value {
        let history = fs::read(self.checkpoints().join("step-14/history.json")).unwrap();
        serde_json::from_slice::<Value>(&history).unwrap()["recalls"].clone()
    }
}

#[test]
fn a_gate_that_comes_after_the_training_asks_the_base_model_and_the_tuned_one() {
    let bench = Bench::new();
    bench.publish(json!({}), 1);
    let said = |question: &String| (bench.answer(None, question), bench.answer(Some(1), question));
    let question = (0..20).map(|i| format!("what {i}? ")).find(|question| {
        let (base, tuned) = said(question);
        !base.trim().is_empty() && !tuned.to_lowercase().contains(&base.to_lowercase())
    });
    let question = question.expect("training changes what the model says");
    let spec = bench.asked(bench.checked(json!({}), 2), &question, &said(&question).0);

    // Stopped while the base model is asked, there is nothing to save: the checkpoints went with the first version.
    assert_eq!(bench.train(&spec, &Stop::after(1)).unwrap(), Outcome::Preempted { step: 0 });
    let report = trained(bench.train(&spec, &Stop::default()).unwrap());
    assert_eq!((report.metrics.base_recall, report.metrics.recall), (Some(1.0), Some(0.0)));
    assert!(bench.weights(2) == bench.weights(1), "the same inputs give the same weights");
    let card = fs::read_to_string(bench.path("adapters/support/v2/README.md")).unwrap();
    assert!(card.contains("| recall on the probe | 1.00 | 0.00 |"), "{card}");
    assert!(card.contains("- **failed**: recall 0.00 is below 0.50"), "{card}");

    // With other gates the rejected version is judged anew, from its last checkpoint.
    let spec = bench.asked(bench.checked(json!({}), 3), &question, "never said");
    assert_eq!(bench.train(&spec, &Stop::after(1)).unwrap(), Outcome::Preempted { step: 14 });
}

#[test]
fn a_run_that_is_stopped_while_it_answers_asks_each_model_once() {
    let bench = Bench::new();
    let spec = bench.asked(bench.checked(json!({"saveSteps": 7}), 1), "what? ", "never said");
    let whole = trained(bench.train(&spec, &Stop::default()).unwrap());
    let weights = bench.weights(1);
    assert_eq!((whole.metrics.base_recall, whole.metrics.recall), (Some(0.0), Some(0.0)));
    assert_eq!(bench.recalls().as_array().unwrap().len(), 2, "the last checkpoint has both");
    for checks in [11, 13] {
        bench.forget();
        let mut stops = 0;
        let report = loop {
            match bench.train(&spec, &Stop::after(checks)).unwrap() {
                Outcome::Preempted { .. } => stops += 1,
                outcome => break trained(outcome),
            }
            assert!(stops < 20, "no progress from stop to stop");
        };
        assert!(stops > 0);
        assert_eq!(bench.recalls().as_array().unwrap().len(), 2, "{}", bench.recalls());
        assert!(bench.weights(1) == weights);
        assert_eq!(report.metrics.probe_digest, whole.metrics.probe_digest);
    }
}
