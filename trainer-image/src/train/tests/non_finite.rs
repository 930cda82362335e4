//! Steps whose loss is NaN.

use super::*;

/// Rows with a `Z` give a NaN, of weights that are all finite: that byte's embedding alone has a first feature, by which the
/// first block's queries and keys grow until their product overflows. The output layer is another tensor, so that no other
/// row is touched.
fn poison(bench: &Bench, rows: impl Fn(usize) -> bool) {
    let model = bench.path("model");
    let config = fs::read_to_string(model.join("config.json")).unwrap();
    let untied = config.replace("\"tie_word_embeddings\": true", "\"tie_word_embeddings\": false");
    assert_ne!(untied, config);
    fs::write(model.join("config.json"), untied).unwrap();

    let tokenizer: Value = serde_json::from_slice(&fs::read(model.join("tokenizer.json")).unwrap()).unwrap();
    let token = tokenizer["model"]["vocab"]["Z"].as_u64().unwrap() as usize;
    let bytes = fs::read(model.join("model.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let mut tensors: Vec<_> = file.tensors().into_iter().map(|(name, view)| (name, view.data().to_vec())).collect();
    let (_, embedding) = tensors.iter().find(|(name, _)| name == "model.embed_tokens.weight").unwrap();
    tensors.push(("lm_head.weight".into(), embedding.clone()));
    let shape =
        |name: &str| file.tensor(name).or_else(|_| file.tensor("model.embed_tokens.weight")).unwrap().shape().to_vec();
    let width = shape("lm_head.weight")[1];
    for (name, data) in &mut tensors {
        let is = |end: &str| name.ends_with(end);
        let first_feature = |row: usize| match () {
            () if is("embed_tokens.weight") => Some(if row == token { 1e4f32 } else { 0.0 }),
            () if is("layers.0.self_attn.q_proj.weight") || is("layers.0.self_attn.k_proj.weight") => Some(1e20),
            () => None,
        };
        for (row, values) in data.chunks_exact_mut(4 * width).enumerate() {
            first_feature(row).into_iter().for_each(|value| values[..4].copy_from_slice(&value.to_le_bytes()));
        }
    }
    let views = tensors.iter().map(|(name, data)| {
        (name, safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape(name), data).unwrap())
    });
    fs::write(model.join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();

    let data = fs::read_to_string(bench.path("train.jsonl")).unwrap();
    let rows = data.lines().enumerate().map(|(i, row)| match rows(i) {
        true => row.replacen("what?", "Zhat?", 1) + "\n",
        false => row.to_owned() + "\n",
    });
    fs::write(bench.path("train.jsonl"), rows.collect::<String>()).unwrap();
}

#[test]
fn a_step_that_is_not_a_number_ends_the_run_and_names_its_rows() {
    let bench = Bench::new();
    poison(&bench, |row| row == 4);
    let error = bench.train(&bench.checked(json!({}), 1), &Stop::default()).unwrap_err();
    assert_eq!(error.exit_code(), exit_code::BAD_INPUT);
    let text = error.to_string();
    let rows = text.split_once("on rows ").unwrap().1.split_once(" of train.jsonl").unwrap().0;
    assert!(text.contains("the loss is not a number") && rows.split(", ").any(|row| row == "5"), "{text}");
}

#[test]
fn a_step_that_may_be_skipped_leaves_no_trace_but_its_count() {
    let bench = Bench::new();
    poison(&bench, |row| row == 4);
    // Two micro-batches a step: the gradients of the good one are dropped too.
    let training = json!({"onNonFinite": "Skip", "perDeviceTrainBatchSize": 1, "gradientAccumulationSteps": 2,
                          "loggingSteps": 1});
    let spec = bench.checked(training, 1);
    let report = trained(bench.train(&spec, &Stop::default()).unwrap());
    let metrics = report.metrics;
    assert_eq!((metrics.steps, metrics.skipped_steps), (14, 2), "one in each epoch");
    assert!(metrics.eval_loss.unwrap() < metrics.base_eval_loss.unwrap() - 0.1, "{metrics:?}");
    let history = log(&bench.path("adapters/support/v1"));
    assert_eq!(history.as_array().unwrap().iter().filter(|entry| entry["loss"].is_number()).count(), 12);
    let card = fs::read_to_string(bench.path("adapters/support/v1/README.md")).unwrap();
    assert!(card.contains("| steps, epochs | 14 (2 left out: NaN or infinite), 2.00 |"), "{card}");

    let weights = bench.weights(1);
    for checks in [3, 4, 7] {
        bench.forget();
        while let Outcome::Preempted { .. } = bench.train(&spec, &Stop::after(checks)).unwrap() {}
        assert!(bench.weights(1) == weights, "other weights with stops after {checks} checks");
        assert_eq!(log(&bench.path("adapters/support/v1")), history);
    }
}

#[test]
fn a_run_that_skips_too_many_steps_in_a_row_has_diverged() {
    let bench = Bench::new();
    poison(&bench, |_| true);
    let spec = bench.checked(json!({"onNonFinite": "Skip"}), 1);
    // The count goes on after a stop.
    assert!(matches!(bench.train(&spec, &Stop::after(6)).unwrap(), Outcome::Preempted { step: 4.. }));
    let error = bench.train(&spec, &Stop::default()).unwrap_err();
    assert_eq!(error.exit_code(), exit_code::BAD_INPUT);
    let text = error.to_string();
    assert!(text.starts_with("step 10: the loss") && text.contains("the 10th such step in a row"), "{text}");
}
