//! Lets `e2e/oracle/check.py` see what the engine computes:
//!
//! ```text
//! oracle logits    MODEL TOKENS.json OUT.safetensors [ADAPTER]    "logits" [tokens, vocabulary]
//! oracle gradients MODEL ADAPTER RUN.json OUT.safetensors         of the first step, under PEFT's names
//! oracle train     MODEL ADAPTER RUN.json OUT.safetensors         "losses", "grad_norms", and the final adapter
//! ```

#[path = "../tests/oracle/run.rs"]
mod run;

use std::path::Path;

use run::{Run, accumulate, read_json, train, trainer};
use tunesmith_engine::{Model, NamedTensor, Recompute};

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args[..] {
        ["logits", model, tokens, out] => logits(model, tokens, None, out),
        ["logits", model, tokens, out, adapter] => logits(model, tokens, Some(adapter), out),
        ["gradients", model, adapter, run, out] => {
            let run: Run = read_json(Path::new(run));
            let mut trainer = trainer(model.as_ref(), adapter.as_ref(), &run, Recompute::None);
            accumulate(&mut trainer, &run.steps[0]);
            write(out, trainer.gradients());
        }
        ["train", model, adapter, run, out] => {
            let run: Run = read_json(Path::new(run));
            let mut trainer = trainer(model.as_ref(), adapter.as_ref(), &run, Recompute::None);
            let curve = train(&mut trainer, &run);
            let list = |name: &str, values: Vec<f64>| NamedTensor {
                name: name.into(),
                shape: vec![values.len()],
                data: values.into_iter().map(|x| x as f32).collect(),
            };
            let mut tensors = trainer.weights();
            tensors.push(list("losses", curve.losses));
            tensors.push(list("grad_norms", curve.grad_norms));
            write(out, tensors);
        }
        _ => {
            eprintln!("usage: oracle logits|gradients|train …; see examples/oracle.rs");
            std::process::exit(2);
        }
    }
}

fn logits(model: &str, tokens: &str, adapter: Option<&str>, out: &str) {
    let tokens: Vec<u32> = read_json(Path::new(tokens));
    let mut model = Model::load(Path::new(model)).expect("a model folder");
    if let Some(adapter) = adapter {
        model.load_adapter(Path::new(adapter)).expect("an adapter folder");
    }
    let data = model.logits(&tokens).expect("tokens of the vocabulary");
    let shape = vec![tokens.len(), model.config().vocab_size];
    write(out, vec![NamedTensor { name: "logits".into(), shape, data }]);
}

fn write(path: &str, tensors: Vec<NamedTensor>) {
    let bytes: Vec<(NamedTensor, Vec<u8>)> = tensors
        .into_iter()
        .map(|tensor| {
            let bytes = tensor.data.iter().flat_map(|x| x.to_le_bytes()).collect();
            (tensor, bytes)
        })
        .collect();
    let views = bytes.iter().map(|(tensor, bytes)| {
        let dtype = safetensors::Dtype::F32;
        let view = safetensors::tensor::TensorView::new(dtype, tensor.shape.clone(), bytes);
        (tensor.name.as_str(), view.expect("as many bytes as the shape says"))
    });
    safetensors::serialize_to_file(views, None, Path::new(path)).expect("OUT can be written");
}
