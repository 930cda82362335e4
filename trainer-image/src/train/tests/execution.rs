//! How a run is executed is on record, and changes nothing of its result.

use super::*;

/// A template that writes the day, and the task of a run that began on `day`.
fn dated(bench: &Bench, day: &str) -> RunSpec {
    let template = "Today is {{ strftime_now('%d %b %Y') }}.\n{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>\n\
        {% endfor %}{% if add_generation_prompt %}assistant: {% endif %}";
    let mut spec = bench.spec(json!({}));
    spec.dataset.chat_template = Some(template.into());
    let mut spec = bench.check(spec, 1);
    let task = spec.train.as_mut().unwrap();
    assert!(task.template_date.is_some(), "preflight saw the template write the date");
    task.template_date = Some(day.into());
    spec
}

#[test]
fn a_run_keeps_its_day_when_it_goes_on_on_another() {
    let bench = Bench::new();
    let spec = dated(&bench, "2026-11-26");
    let whole = trained(bench.train(&spec, &Stop::default()).unwrap());
    assert_eq!(whole.execution.template_date.as_deref(), Some("2026-11-26"));
    assert_eq!((whole.execution.device.as_str(), whole.execution.world_size), ("cpu", 1));
    let manifest: Value =
        serde_json::from_slice(&fs::read(bench.path("adapters/support/v1/manifest.json")).unwrap()).unwrap();
    assert_eq!(manifest["source"]["execution"], json!({"device": "cpu", "worldSize": 1, "templateDate": "2026-11-26"}));
    let weights = bench.weights(1);

    bench.forget();
    bench.train(&spec, &Stop::after(9)).unwrap();
    let next_day = dated(&bench, "2026-11-27");
    assert_eq!(spec.train.as_ref().unwrap().input_digest, next_day.train.as_ref().unwrap().input_digest);
    bench.train(&next_day, &Stop::default()).unwrap();
    assert!(bench.weights(1) == weights, "resumed on the next day");

    bench.forget();
    bench.train(&next_day, &Stop::default()).unwrap();
    assert!(bench.weights(1) != weights, "the day is in the text");
}

#[test]
fn a_day_that_the_job_pins_is_an_input_and_no_part_of_the_execution() {
    let bench = Bench::new();
    let pinned = |day: &str| {
        let mut spec = dated(&bench, "2026-11-26");
        spec.dataset.template_date = Some(day.into());
        bench.check(RunSpec { train: None, ..spec }, 1)
    };
    let (spec, other) = (pinned("2026-11-27"), pinned("2026-11-28"));
    let digest = |spec: &RunSpec| spec.train.as_ref().unwrap().input_digest.clone();
    assert_ne!(digest(&spec), digest(&other));
    assert_eq!(spec.train.as_ref().unwrap().template_date, None);
    assert_eq!(trained(bench.train(&spec, &Stop::default()).unwrap()).execution.template_date, None);
    let mut impossible = spec.clone();
    impossible.dataset.template_date = Some("2026-02-30".into());
    let error =
        bench.with_context(&Stop::default(), |context| preflight(&impossible, context, Keep::Headers)).err().unwrap();
    assert!(error.to_string().contains("dataset.templateDate is \"2026-02-30\""), "{error}");
}
