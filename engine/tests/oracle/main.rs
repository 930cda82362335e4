//! The engine against torch, transformers and PEFT, whose results `e2e/oracle/fixtures.py` wrote into `tests/fixtures`.

mod adapters;
mod checkpoints;
mod run;

use std::path::{Path, PathBuf};

use run::{Run, accumulate, read_json, read_tensors, train, trainer, trainer_of};
use serde::Deserialize;
use tunesmith_engine::{
    FourBitCode, Generator, LazyTensor, MicroBatch, Model, NamedTensor, Precision, Quantization, Recompute, Sampling,
    Trainer, TrainerOptions, Tuning,
};

#[derive(Deserialize)]
struct Expected {
    losses: Vec<f64>,
    grad_norms: Vec<f64>,
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// Largest absolute difference of two lists of the same length.
fn difference<T: Copy + Into<f64>>(a: &[T], b: &[T]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(&a, &b)| (a.into() - b.into()).abs()).fold(0.0, f64::max)
}

/// ‖a − b‖ / ‖b‖, per tensor; the worst of all, which must be the same set on both sides.
fn relative_difference(ours: &[NamedTensor], theirs: &[NamedTensor]) -> f64 {
    assert_eq!(ours.len(), theirs.len());
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    let mut worst: f64 = 0.0;
    for theirs in theirs {
        let ours = ours.iter().find(|t| t.name == theirs.name);
        let ours = ours.unwrap_or_else(|| panic!("{} is missing", theirs.name));
        assert_eq!(ours.shape, theirs.shape, "{}", theirs.name);
        let mut pairs = ours.data.iter().zip(&theirs.data).map(|(a, b)| f64::from(a - b));
        let size = norm(&mut theirs.data.iter().map(|&x| f64::from(x)));
        assert!(size > 0.0, "{} is zero: nothing would be compared", theirs.name);
        worst = worst.max(norm(&mut pairs) / size);
    }
    worst
}

fn logits_equal(name: &str) {
    let dir = fixture(name);
    let expected = read_tensors(&dir.join("logits.safetensors"));
    let expected = |which: &str| &expected.iter().find(|t| t.name == which).unwrap().data;
    let tokens: Vec<u32> = read_json(&dir.join("tokens.json"));

    let mut model = Model::load(&dir.join("model")).unwrap();
    let base = difference(&model.logits(&tokens).unwrap(), expected("base"));
    model.load_adapter(&dir.join("adapter")).unwrap();
    let adapted = difference(&model.logits(&tokens).unwrap(), expected("adapter"));
    assert!(base < 1e-4 && adapted < 1e-4, "logits differ by {base:.1e} and {adapted:.1e}");
    assert!(difference(expected("base"), expected("adapter")) > 0.1, "the adapter does nothing");
}

fn gradients_equal(name: &str, recompute: Recompute) {
    let dir = fixture(name);
    let run: Run = read_json(&dir.join("run.json"));
    let mut trainer = trainer(&dir.join("model"), &dir.join("adapter"), &run, recompute);
    accumulate(&mut trainer, &run.steps[0]);
    let expected = read_tensors(&dir.join("gradients.safetensors"));
    let worst = relative_difference(&trainer.gradients(), &expected);
    assert!(worst < 1e-5, "gradients differ by {worst:.1e}");
}

fn curves_equal(name: &str) {
    let dir = fixture(name);
    let run: Run = read_json(&dir.join("run.json"));
    let mut trainer = trainer(&dir.join("model"), &dir.join("adapter"), &run, Recompute::None);
    let curve = train(&mut trainer, &run);
    let expected: Expected = read_json(&dir.join("curve.json"));
    assert!(curve.losses.len() == 20);
    let losses = difference(&curve.losses, &expected.losses);
    let norms = difference(&curve.grad_norms, &expected.grad_norms);
    assert!(losses < 1e-4 && norms < 1e-3, "losses differ by {losses:.1e}, norms by {norms:.1e}");
    let adapter = relative_difference(&trainer.weights(), &read_tensors(&dir.join("final.safetensors")));
    assert!(adapter < 1e-4, "adapters differ by {adapter:.1e}");
}

#[test]
fn logits_of_base_and_adapter_equal_transformers() {
    logits_equal("tied");
    logits_equal("sharded");
}

#[test]
fn gradients_equal_peft() {
    for recompute in [Recompute::None, Recompute::Full] {
        gradients_equal("tied", recompute);
        gradients_equal("sharded", recompute);
    }
}

/// Whatever is rounded, torch's autocast rounds as well, and more.
#[test]
fn gradients_in_bf16_are_as_close_to_those_in_f32_as_torchs_autocast() {
    for name in ["tied", "sharded"] {
        let dir = fixture(name);
        let run: Run = read_json(&dir.join("run.json"));
        let model = Model::load(&dir.join("model")).unwrap();
        let mut trainer = trainer_of(model, &dir.join("adapter"), &run, Recompute::None, Precision::Bf16);
        accumulate(&mut trainer, &run.steps[0]);
        let exact = read_tensors(&dir.join("gradients.safetensors"));
        let ours = relative_difference(&trainer.gradients(), &exact);
        let torchs = relative_difference(&read_tensors(&dir.join("gradients_bf16.safetensors")), &exact);
        println!("{name}: {ours:.1e} from f32, torch {torchs:.1e}");
        assert!((1e-4..torchs).contains(&ours), "{name}: {ours:.1e} from f32, torch {torchs:.1e}");
    }
}

#[test]
fn twenty_steps_equal_peft() {
    curves_equal("tied");
    curves_equal("sharded");
}

#[test]
fn twenty_steps_in_bf16_have_the_losses_of_those_in_f32() {
    for name in ["tied", "sharded"] {
        let dir = fixture(name);
        let run: Run = read_json(&dir.join("run.json"));
        let model = Model::load(&dir.join("model")).unwrap();
        let mut trainer = trainer_of(model, &dir.join("adapter"), &run, Recompute::None, Precision::Bf16);
        let losses = train(&mut trainer, &run).losses;
        let expected: Expected = read_json(&dir.join("curve.json"));
        let worst = losses.iter().zip(&expected.losses).map(|(ours, f32)| (ours / f32 - 1.0).abs()).fold(0.0, f64::max);
        assert!(worst < 0.01, "{name}: losses differ by {worst:.1e}, relative");
    }
}

const FAMILIES: [&str; 9] = ["llama", "mistral", "qwen2", "qwen3", "phi3", "yarn", "longrope", "gemma2", "gemma3"];

#[test]
fn every_family_has_transformers_logits_with_and_without_an_adapter() {
    FAMILIES.iter().for_each(|family| logits_equal(&format!("families/{family}")));
}

#[test]
fn every_family_has_pefts_gradients() {
    for family in FAMILIES {
        for recompute in [Recompute::None, Recompute::Full] {
            gradients_equal(&format!("families/{family}"), recompute);
        }
    }
}

#[test]
fn every_weight_of_every_family_has_transformers_gradient() {
    for family in FAMILIES {
        let dir = fixture("families").join(family);
        let run: Run = read_json(&dir.join("run.json"));
        for recompute in [Recompute::None, Recompute::Full] {
            let options = TrainerOptions { recompute, ..TrainerOptions::new(Tuning::Full) };
            let mut trainer = Trainer::new(Model::load(&dir.join("model")).unwrap(), &options).unwrap();
            accumulate(&mut trainer, &run.steps[0]);
            let expected = read_tensors(&dir.join("full_gradients.safetensors"));
            let worst = relative_difference(&trainer.gradients(), &expected);
            assert!(worst < 1e-4, "{family}: gradients differ by {worst:.1e}");
        }
    }
}

#[test]
fn checkpoints_that_bitsandbytes_quantized_load_as_they_are() {
    let tokens: Vec<u32> = read_json(&fixture("tied/tokens.json"));
    let four_bit = |code| Quantization::FourBit { code, double_quant: false };
    let kinds =
        [("nf4", four_bit(FourBitCode::Nf4)), ("fp4", four_bit(FourBitCode::Fp4)), ("int8", Quantization::Int8)];
    // Codes may be typed as other numbers.
    for (name, quantization) in kinds.into_iter().chain([("fp4_as_bf16", four_bit(FourBitCode::Fp4))]) {
        let dir = fixture("quantized").join(name);
        let expected = read_tensors(&dir.join("logits.safetensors")).remove(0).data;
        for model in [Model::load(&dir), Model::load_quantized(&dir, quantization)] {
            let worst = difference(&model.unwrap().logits(&tokens).unwrap(), &expected);
            assert!(worst < 1e-4, "{name}: logits differ by {worst:.1e}");
        }
        let (_, other) = kinds.into_iter().find(|(_, other)| !other.is_like(quantization)).unwrap();
        let error = Model::load_quantized(&dir, other).err().unwrap().to_string();
        assert!(error.contains(&format!("stored as {}", quantization.name())), "{error}");
    }
}

#[test]
fn quantized_bases_have_the_logits_and_gradients_of_bitsandbytes() {
    let tied = fixture("tied");
    let (run, tokens): (Run, Vec<u32>) = (read_json(&tied.join("run.json")), read_json(&tied.join("tokens.json")));
    let expected = read_tensors(&fixture("quantized/models.safetensors"));
    let four_bit = |code, double_quant| Quantization::FourBit { code, double_quant };
    for (kind, quantization, outlier_threshold) in [
        ("nf4", four_bit(FourBitCode::Nf4, true), None),
        ("fp4", four_bit(FourBitCode::Fp4, false), None),
        ("int8", Quantization::Int8, None),
        ("int8_outliers", Quantization::Int8, Some(1.5)),
    ] {
        let expected: Vec<NamedTensor> = expected
            .iter()
            .filter_map(|t| Some(NamedTensor { name: t.name.strip_prefix(&format!("{kind}."))?.into(), ..t.clone() }))
            .collect();
        let (logits, gradients): (Vec<_>, Vec<_>) = expected.into_iter().partition(|t| t.name == "logits");
        let load = || {
            let mut model = Model::load_quantized(&tied.join("model"), quantization).unwrap();
            model.set_outlier_threshold(outlier_threshold);
            model
        };
        let mut model = load();
        model.load_adapter(&tied.join("adapter")).unwrap();
        let shape = logits[0].shape.clone();
        let ours = NamedTensor { name: "logits".into(), shape, data: model.logits(&tokens).unwrap() };
        let logits = relative_difference(&[ours], &logits);
        let mut trainer = trainer_of(load(), &tied.join("adapter"), &run, Recompute::None, Precision::F32);
        match outlier_threshold {
            None => accumulate(&mut trainer, &run.steps[0]),
            // The outliers' columns are those of all rows, and padding has some in the reference.
            Some(_) => accumulate(&mut trainer, &[first_row(&run.steps[0][0])]),
        };
        let gradients = relative_difference(&trainer.gradients(), &gradients);
        assert!(logits < 1e-5 && gradients < 1e-5, "{kind}: {logits:.1e} {gradients:.1e}");
    }
}

fn first_row(batch: &MicroBatch) -> MicroBatch {
    let length = batch.row_lengths[0];
    let of_row = |ids: &[u32]| ids[..length].to_vec();
    MicroBatch { tokens: of_row(&batch.tokens), targets: of_row(&batch.targets), row_lengths: vec![length] }
}

#[test]
fn a_row_that_grows_beyond_the_short_ones_goes_on_as_one_that_was_long_from_the_start() {
    let dir = fixture("families/longrope");
    let tokens: Vec<u32> = read_json(&dir.join("tokens.json"));
    let model = Model::load(&dir.join("model")).unwrap();
    // From 33 tokens on, each row has the long factors.
    let mut row = tokens[..30].to_vec();
    let mut generator = Generator::new(&model, &row, Sampling::default(), &[]).unwrap();
    for _ in 0..6 {
        let logits = model.logits(&row).unwrap();
        let last = &logits[logits.len() - model.config().vocab_size..];
        let likeliest = (0..last.len()).max_by(|&a, &b| last[a].total_cmp(&last[b])).unwrap() as u32;
        assert_eq!(generator.next_token().unwrap(), Some(likeliest), "after {} tokens", row.len());
        row.push(likeliest);
    }
}

#[test]
fn a_merged_adapter_gives_the_logits_of_the_adapter() {
    for family in FAMILIES {
        let dir = fixture("families").join(family);
        let tokens: Vec<u32> = read_json(&dir.join("tokens.json"));
        let mut model = Model::load(&dir.join("model")).unwrap();
        model.load_adapter(&dir.join("adapter")).unwrap();

        let folder = tempfile::tempdir().unwrap();
        let mut config: serde_json::Value = read_json(&dir.join("model/config.json"));
        config["tie_word_embeddings"] = (!model.has_own_output()).into();
        std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
        let tensors: Vec<(LazyTensor<'_>, Vec<u8>)> = model
            .merged()
            .into_iter()
            .map(|tensor| {
                let bytes = tensor.values().iter().flat_map(|x| x.to_le_bytes()).collect();
                (tensor, bytes)
            })
            .collect();
        let views = tensors.iter().map(|(tensor, bytes)| {
            let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, tensor.shape.clone(), bytes);
            (tensor.name.as_str(), view.unwrap())
        });
        safetensors::serialize_to_file(views, None, &folder.path().join("model.safetensors")).unwrap();
        let merged = Model::load(folder.path()).unwrap();
        let difference = difference(&merged.logits(&tokens).unwrap(), &model.logits(&tokens).unwrap());
        assert!(difference < 1e-4, "{family}: {difference:.1e}");
    }
}
