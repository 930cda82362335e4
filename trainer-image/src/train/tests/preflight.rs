//! A preflight that keeps headers reports what one does that keeps all.

use super::*;
use crate::convert::tests::fixture;

#[test]
fn a_gguf_base_model_has_the_same_report_by_its_header() {
    let bench = Bench::new();
    // One of mistral's tokenizer, which has bytes for every text.
    let model = bench.path("base.gguf");
    fs::copy(fixture("mistral.gguf"), &model).unwrap();
    let mut spec = bench.spec(json!({"maxLength": 32}));
    spec.base_model = format!("file://{}", model.display()).parse().unwrap();
    spec.dataset.chat_template = Some("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}".into());
    let [whole, headers] = [Keep::Whole, Keep::Headers].map(|keep| {
        bench
            .with_context(&Stop::default(), |context| preflight(&spec, context, keep).map(|found| found.report))
            .unwrap_or_else(|error| panic!("{error}"))
    });
    assert_eq!(headers, whole);
    assert!(headers.dataset.tokens > 0 && headers.model.parameters > 0);
    let folder = |work: &str| {
        let gguf = fs::read_dir(bench.path(work)).unwrap().map(|entry| entry.unwrap().path());
        gguf.filter(|path| path.is_dir() && path.file_name().unwrap().to_str().unwrap().starts_with("gguf-")).count()
    };
    assert_eq!([folder("work/model"), folder("work/model/headers")], [1, 1]);
}
