//! Every method, from a job's options to files that load.

use candle_core::{Device, quantized::gguf_file::Content};
use tunesmith_crds::fine_tune_job::{Lora, LoraBias, Quantization, QuantizationType};
use tunesmith_engine::Model;

use super::*;
use crate::{convert::gguf_lora, data::batches::micro_batch, inputs::Inputs, merge::merge};

/// Publishes what the method makes of the bench's data; its folder, and the loss before and after.
fn published_by(bench: &Bench, method: Method, training: Value) -> (PathBuf, f64, f64) {
    let spec = RunSpec { method: Some(method), ..bench.checked(training, 1) };
    let metrics = trained(bench.train(&spec, &Stop::default()).unwrap()).metrics;
    (bench.path("adapters/support/v1"), metrics.base_eval_loss.unwrap(), metrics.eval_loss.unwrap())
}

#[test]
fn full_fine_tuning_publishes_a_model_that_loads_by_itself() {
    for bf16 in [false, true] {
        let bench = Bench::new();
        let (folder, before, after) = published_by(&bench, Method::Full, json!({"learningRate": 0.003, "bf16": bf16}));
        assert!(after < before - 0.1, "{before} → {after}");
        assert!(!folder.join("adapter_config.json").exists());
        let inputs = bench.with_context(&Stop::default(), |context| {
            Inputs::load(&bench.spec(json!({})), context.stores, context.work, TODAY, Keep::Whole)
        });
        let batch = micro_batch(&inputs.as_ref().unwrap().eval, 0..4).unwrap();
        let loss = Model::load(&folder).unwrap().evaluate(&batch).unwrap();
        let again = loss.sum / loss.tokens as f64;
        // With bf16 the norms are rounded too when they are published.
        let limit = if bf16 { 1e-2 } else { 1e-6 };
        assert!((again - after).abs() < limit * after, "the published model gives {again}, the run measured {after}");
    }
}

#[test]
fn qlora_publishes_an_adapter_over_each_kind_of_quantized_base() {
    let kinds = [(4, QuantizationType::Nf4), (4, QuantizationType::Fp4), (8, QuantizationType::Int8)];
    for ((bits, kind), bf16) in kinds.into_iter().zip([false, true, true]) {
        let quantization = Quantization { bits, kind, double_quant: true, outlier_threshold: None };
        let (before, after) = tuned_over(quantization, bf16);
        assert!(after < before - 0.02, "{kind:?}: {before} → {after}");
    }
}

#[test]
fn an_outlier_threshold_reaches_the_products_of_the_base() {
    let with = |outlier_threshold| {
        let (bits, kind, double_quant) = (8, QuantizationType::Int8, false);
        tuned_over(Quantization { bits, kind, double_quant, outlier_threshold }, false)
    };
    let (exact, rounded) = (with(None), with(Some(1.5)));
    assert!(rounded.1 < rounded.0 - 0.02, "{rounded:?}");
    assert!(rounded.0 != exact.0 && (rounded.0 - exact.0).abs() < 0.01, "{rounded:?} {exact:?}");
}

/// The evaluation losses of the base and of an adapter over it, which has been published and loads.
fn tuned_over(quantization: Quantization, bf16: bool) -> (f64, f64) {
    let bench = Bench::new();
    let lora = Lora { dropout: 0.0, ..Lora::default() };
    let (folder, before, after) =
        published_by(&bench, Method::QLoRA { lora, quantization }, json!({"learningRate": 0.02, "bf16": bf16}));
    Model::load(&bench.path("model")).unwrap().load_adapter(&folder).unwrap();
    (before, after)
}

#[test]
fn every_option_of_lora_reaches_the_adapters_files() {
    let bench = Bench::new();
    let lora = Lora {
        rank: 3,
        target_modules_regex: Some(r".*\.(q_proj|down_proj)".into()),
        use_dora: true,
        bias: LoraBias::All,
        modules_to_save: vec!["norm".into()],
        rank_pattern: [("down_proj".to_owned(), 2)].into(),
        alpha_pattern: [("q_proj".to_owned(), 5.0)].into(),
        lora_plus_lr_ratio: 4.0,
        ..Lora::default()
    };
    let (folder, before, after) =
        published_by(&bench, Method::LoRA { lora }, json!({"neftuneNoiseAlpha": 2.0, "learningRate": 0.02}));
    assert!(after < before, "{before} → {after}");
    let config: Value = serde_json::from_slice(&fs::read(folder.join("adapter_config.json")).unwrap()).unwrap();
    assert_eq!(config["target_modules"], r".*\.(q_proj|down_proj)");
    assert_eq!((&config["bias"], &config["use_dora"]), (&json!("all"), &json!(true)));
    assert_eq!(
        (&config["rank_pattern"], &config["alpha_pattern"]),
        (&json!({"down_proj": 2}), &json!({"q_proj": 5.0}))
    );
    assert_eq!(config["modules_to_save"], json!(["norm"]));
    let bytes = fs::read(folder.join("adapter_model.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let shape = |name: &str| tensors.tensor(&format!("base_model.model.model.{name}")).unwrap().shape().to_vec();
    assert_eq!(shape("layers.0.mlp.down_proj.lora_A.weight")[0], 2);
    assert_eq!(shape("layers.1.self_attn.q_proj.lora_B.weight"), [32, 3]);
    assert_eq!((shape("layers.0.self_attn.q_proj.lora_magnitude_vector"), shape("norm.weight")), (vec![32], vec![32]));
    let load = || Model::load(&bench.path("model")).unwrap().load_adapter(&folder).map_err(|error| error.to_string());
    load().unwrap();

    // An adapter without its tensors would let the base model answer.
    for (is_kept, problem) in [
        (&(|_: &str| false) as &dyn Fn(&str) -> bool, "it holds no tensor"),
        (&|name| !name.contains("layers.1.self_attn.q_proj"), "layers.1.self_attn.q_proj.lora_A.weight is missing"),
        (
            &|name| name != "base_model.model.model.norm.weight",
            "norm.weight is missing, which modules_to_save asks for",
        ),
    ] {
        let kept = tensors.iter().filter(|(name, _)| is_kept(name));
        fs::write(folder.join("adapter_model.safetensors"), safetensors::serialize(kept, None).unwrap()).unwrap();
        let error = load().unwrap_err();
        assert!(error.contains(problem), "{error}");
    }
    let config = config.to_string().replace("\"down_proj\":2", "\"down_proj\":0");
    fs::write(folder.join("adapter_config.json"), config).unwrap();
    assert!(load().unwrap_err().contains("down_proj is 0; it must be at least 1"));
}

#[test]
fn a_merge_says_what_a_quantized_base_has_lost_and_leaves_none() {
    let bench = Bench::new();
    let quantization =
        Quantization { bits: 4, kind: QuantizationType::Nf4, double_quant: true, outlier_threshold: None };
    let method = Method::QLoRA { lora: Lora::default(), quantization };
    let (folder, ..) = published_by(&bench, method, json!({}));
    let stores = Stores::from_environment(bench.runtime.handle().clone());
    let merged = |base: &Path, adapter: &Path, out: &str| {
        let paths = [base, adapter].map(|path| path.to_str().unwrap());
        merge(paths[0], paths[1], &bench.path(out), false, &stores, &bench.path("work")).unwrap().unwrap_or_default()
    };
    assert!(merged(&bench.path("model"), &folder, "one").contains("trained over a quantized base"));

    // A base that bitsandbytes stored, with a tokenizer.
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../engine/tests/fixtures");
    let base = bench.path("stored");
    fs::create_dir(&base).unwrap();
    for name in ["config.json", "model.safetensors"] {
        fs::copy(fixtures.join("quantized/nf4").join(name), base.join(name)).unwrap();
    }
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        fs::copy(bench.path("model").join(name), base.join(name)).unwrap();
    }
    assert!(merged(&base, &fixtures.join("tied/adapter"), "two").contains("the base is quantized"));
    let model = Model::load(&bench.path("two")).unwrap();
    assert_eq!(model.config().stored_as, None);
}

#[test]
fn a_merged_model_has_the_loss_of_its_adapter_and_needs_nothing_else() {
    let bench = Bench::new();
    let lora = Lora { dropout: 0.0, ..Lora::default() };
    let (folder, _, after) = published_by(&bench, Method::LoRA { lora }, json!({"learningRate": 0.02}));
    let (base, merged) = (bench.path("model"), bench.path("merged-1.5"));
    // What others left behind is no part of it.
    for stale in [merged.with_extension("part"), crate::convert::sibling(&merged)] {
        fs::create_dir(&stale).unwrap();
        fs::write(stale.join("model.safetensors.index.json"), "{}").unwrap();
    }
    let stores = Stores::from_environment(bench.runtime.handle().clone());
    let run = || merge(base.to_str().unwrap(), folder.to_str().unwrap(), &merged, false, &stores, &bench.path("work"));
    assert_eq!(run().unwrap(), None);
    assert!(!merged.join("model.safetensors.index.json").exists());
    let mut spec = bench.spec(json!({}));
    spec.base_model = format!("file://{}", merged.display()).parse().unwrap();
    let inputs = bench.with_context(&Stop::default(), |context| {
        Inputs::load(&spec, context.stores, context.work, TODAY, Keep::Whole)
    });
    let inputs = inputs.unwrap();
    let batch = micro_batch(&inputs.eval, 0..4).unwrap();
    let loss = Model::load(&inputs.model.folder).unwrap().evaluate(&batch).unwrap();
    assert!((loss.sum / loss.tokens as f64 - after).abs() < 1e-5 * after);
    assert!(run().unwrap_err().to_string().contains("exists"), "nothing is overwritten");
}

#[test]
fn an_adapter_is_exported_with_the_names_scale_and_order_of_llama_cpp() {
    let bench = Bench::new();
    let lora = Lora {
        rank: 3,
        target_modules: vec!["q_proj".into(), "down_proj".into()],
        alpha_pattern: [("q_proj".to_owned(), 5.0)].into(),
        ..Lora::default()
    };
    let (folder, ..) = published_by(&bench, Method::LoRA { lora }, json!({"learningRate": 0.02}));
    let (base, out) = (bench.path("model"), bench.path("support.gguf"));
    gguf_lora(&base, &folder, &out).unwrap();
    assert!(gguf_lora(&base, &folder, &out).unwrap_err().to_string().contains("exists"), "nothing is overwritten");

    let mut file = fs::File::open(&out).unwrap();
    let content = Content::read(&mut file).unwrap();
    let text = |key: &str| content.metadata[key].to_string().unwrap().clone();
    assert_eq!(text("general.architecture") + &text("general.type") + &text("adapter.type"), "llamaadapterlora");
    let alpha = content.metadata["adapter.lora.alpha"].to_f32().unwrap();
    let mut read = |name: &str| -> (Vec<usize>, Vec<f32>) {
        let tensor = content.tensor(&mut file, name, &Device::Cpu).unwrap().dequantize(&Device::Cpu).unwrap();
        (tensor.dims().to_vec(), tensor.flatten_all().unwrap().to_vec1().unwrap())
    };
    let mut model = Model::load(&base).unwrap();
    model.load_adapter(&folder).unwrap();
    let layers = model.adapted_layers();
    assert_eq!((layers.len(), content.tensor_infos.len()), (4, 8));
    for layer in layers {
        let (block, name) = match layer.module.rsplit_once('.').unwrap() {
            (path, "q_proj") => (path.split('.').nth(2).unwrap(), "attn_q"),
            (path, _) => (path.split('.').nth(2).unwrap(), "ffn_down"),
        };
        let (shape, a) = read(&format!("blk.{block}.{name}.weight.lora_a"));
        assert_eq!((shape[0], a), (3, layer.a));
        let (shape, b) = read(&format!("blk.{block}.{name}.weight.lora_b"));
        assert_eq!(shape, [32, 3]);
        let (half, dim) = (4, 8);
        for row in 0..32 {
            // A head's features come in pairs that rotate together; llama.cpp scales by alpha / rank.
            let paired = row / dim * dim + (row % 2) * half + row % dim / 2;
            let source = if name == "attn_q" { paired } else { row };
            for column in 0..3 {
                let (found, expected) = (alpha / 3.0 * b[row * 3 + column], layer.scale * layer.b[source * 3 + column]);
                assert!((found - expected).abs() <= 1e-6 * expected.abs(), "{name}, row {row}: {found}, {expected}");
            }
        }
    }
}

#[test]
fn an_adapter_that_is_more_than_lora_is_not_exported() {
    let bench = Bench::new();
    let lora = Lora { use_dora: true, ..Lora::default() };
    let (folder, ..) = published_by(&bench, Method::LoRA { lora }, json!({"learningRate": 0.02}));
    let error = gguf_lora(&bench.path("model"), &folder, &bench.path("support.gguf")).unwrap_err().to_string();
    assert!(error.contains("DoRA") && error.contains("merge"), "{error}");
    assert!(!bench.path("support.gguf").exists());
}
