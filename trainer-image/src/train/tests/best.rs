//! Early stopping, and the choice of the best weights.

use super::*;
use crate::{
    data::batches::{in_order, micro_batch},
    inputs::Inputs,
};

/// Other answers than those of the training: what is learned first helps with them too, what is learned later does
/// harm, and the best evaluation lies in the middle.
fn too_much_of_a_good_thing(bench: &Bench) -> Value {
    let row = |i: usize| {
        let messages = [("user", "what? ".repeat(1 + i)), ("assistant", format!("ZZZZ{i}"))];
        json!({"messages": messages.map(|(role, content)| json!({"role": role, "content": content}))}).to_string()
    };
    fs::write(bench.path("eval.jsonl"), (0..4).map(row).collect::<Vec<_>>().join("\n")).unwrap();
    json!({"learningRate": 0.02, "warmupSteps": 0, "evalSteps": 2, "loadBestModelAtEnd": true, "saveTotalLimit": 1})
}

fn evals(bench: &Bench) -> Vec<(u64, f64)> {
    let log = log(&bench.path("adapters/support/v1"));
    let eval = |entry: &Value| Some((entry["step"].as_u64()?, entry["eval_loss"].as_f64()?));
    log.as_array().unwrap().iter().filter_map(eval).collect()
}

/// The eval loss of a published version, measured anew.
fn eval_loss(bench: &Bench, spec: &RunSpec) -> f64 {
    let mut model = tunesmith_engine::Model::load(&bench.path("model")).unwrap();
    model.load_adapter(&bench.path("adapters/support/v1")).unwrap();
    let inputs = bench
        .with_context(&Stop::default(), |context| Inputs::load(spec, context.stores, context.work, TODAY, Keep::Whole));
    let inputs = inputs.unwrap();
    let losses = in_order(inputs.eval.lengths(), 512).into_iter();
    let losses = losses.map(|rows| model.evaluate(&micro_batch(&inputs.eval, rows).unwrap()).unwrap());
    let (sum, tokens) = losses.fold((0.0, 0), |(sum, tokens), loss| (sum + loss.sum, tokens + loss.tokens));
    sum / tokens as f64
}

#[test]
fn the_weights_with_the_lowest_eval_loss_are_published() {
    let bench = Bench::new();
    let spec = bench.checked(too_much_of_a_good_thing(&bench), 1);
    let report = trained(bench.train(&spec, &Stop::default()).unwrap());
    let evals = evals(&bench);
    let (step, lowest) = evals[1..].iter().copied().min_by(|a, b| a.1.total_cmp(&b.1)).unwrap();
    assert!((2..14).contains(&step), "{evals:?}");
    assert_eq!((report.metrics.best_step, report.metrics.eval_loss), (Some(step), Some(lowest)));
    assert_eq!(report.metrics.steps, 14);
    let measured = eval_loss(&bench, &spec);
    assert!((measured - lowest).abs() < 1e-5, "{measured} is not {lowest}");
}

#[test]
fn the_best_weights_survive_every_stop() {
    let bench = Bench::new();
    let spec = bench.checked(too_much_of_a_good_thing(&bench), 1);
    trained(bench.train(&spec, &Stop::default()).unwrap());
    let (weights, history) = (bench.weights(1), log(&bench.path("adapters/support/v1")));
    for checks in [2, 3, 5] {
        bench.forget();
        while let Outcome::Preempted { .. } = bench.train(&spec, &Stop::after(checks)).unwrap() {}
        assert!(bench.weights(1) == weights, "other weights with stops after {checks} checks");
        assert_eq!(log(&bench.path("adapters/support/v1")), history);
    }
}

#[test]
fn a_run_without_progress_ends_when_its_patience_does() {
    let bench = Bench::new();
    // Nothing is better by 100 nats: step 2 is the best, and steps 4 and 6 are of no use.
    let training = json!({"evalSteps": 2, "earlyStoppingPatience": 2, "earlyStoppingThreshold": 100.0});
    let spec = bench.checked(training, 1);
    let report = trained(bench.train(&spec, &Stop::default()).unwrap());
    assert_eq!((report.metrics.steps, report.metrics.best_step), (6, None));
    let state = fs::read(bench.path("adapters/support/v1/trainer_state.json")).unwrap();
    let state: Value = serde_json::from_slice(&state).unwrap();
    let counter = &state["stateful_callbacks"]["EarlyStoppingCallback"]["attributes"];
    assert_eq!(counter["early_stopping_patience_counter"], 2);
    assert_eq!((&state["global_step"], &state["max_steps"]), (&json!(6), &json!(14)));

    let weights = bench.weights(1);
    bench.forget();
    while let Outcome::Preempted { .. } = bench.train(&spec, &Stop::after(3)).unwrap() {}
    assert!(bench.weights(1) == weights);
}
