//! What a training loop relies on: rows that do not see each other, exact resume, the same bits on any number of threads.

use proptest::prelude::*;
use tunesmith_engine::{
    Error, Generator, IGNORE, LoraOptions, MicroBatch, Model, ModelConfig, NamedTensor, Optimizer, Precision,
    Recompute, Rule, Sampling, TargetModules, Trainer, TrainerOptions,
};

const VOCABULARY: u32 = 300;

fn config() -> ModelConfig {
    let config = serde_json::json!({
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 400,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": true,
    });
    ModelConfig::parse(&config.to_string()).unwrap()
}

fn options(dropout: f64) -> LoraOptions {
    LoraOptions {
        rank: 4,
        alpha: 16.0,
        dropout,
        target_modules: TargetModules::Pattern("all-linear".into()),
        seed: 9,
        ..LoraOptions::default()
    }
}

fn trainer_with(options: &LoraOptions, recompute: Recompute) -> Trainer {
    let model = Model::random(config(), 1);
    let options = TrainerOptions { recompute, ..options.clone().into() };
    let mut trainer = Trainer::new(model, &options).unwrap();
    // A fresh adapter's B is zero, and with it A's gradient; one step makes all gradients count.
    trainer.accumulate(&batch(&[9, 5], 77), 0.1).unwrap();
    trainer.step(0.02, None).unwrap();
    trainer
}

fn trainer(dropout: f64) -> Trainer {
    trainer_with(&options(dropout), Recompute::None)
}

/// Random rows of these lengths; about a third of the positions are not trained.
fn batch(row_lengths: &[usize], seed: u32) -> MicroBatch {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
    let mut next = move || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state >> 8
    };
    let mut batch = MicroBatch { row_lengths: row_lengths.to_vec(), ..MicroBatch::default() };
    for _ in 0..row_lengths.iter().sum() {
        batch.tokens.push(next() % VOCABULARY);
        batch.targets.push(if next() % 3 == 0 { IGNORE } else { next() % VOCABULARY });
    }
    batch
}

/// Each row as a batch of its own.
fn rows(batch: &MicroBatch) -> Vec<MicroBatch> {
    let mut start = 0;
    batch
        .row_lengths
        .iter()
        .map(|&len| {
            let range = start..start + len;
            start += len;
            MicroBatch {
                tokens: batch.tokens[range.clone()].to_vec(),
                targets: batch.targets[range].to_vec(),
                row_lengths: vec![len],
            }
        })
        .collect()
}

fn assert_close(a: &[NamedTensor], b: &[NamedTensor]) {
    let norm = |x: &mut dyn Iterator<Item = f32>| x.map(|x| f64::from(x).powi(2)).sum::<f64>().sqrt();
    assert_eq!(a.len(), b.len());
    for (a, b) in a.iter().zip(b) {
        assert_eq!(a.name, b.name);
        let size = norm(&mut b.data.iter().copied());
        let difference = norm(&mut a.data.iter().zip(&b.data).map(|(a, b)| a - b));
        assert!(size > 0.0, "{} is zero: nothing would be compared", a.name);
        assert!(difference < 1e-5 * size, "{} differs by {:.1e}", a.name, difference / size);
    }
}

#[test]
fn a_row_has_the_same_loss_alone_and_packed() {
    let trainer = trainer(0.0);
    // (A batch of one token alone goes through the matrix-vector product of generation.)
    let packed = batch(&[70, 2, 12, 3], 5);
    let alone: f64 = rows(&packed).iter().map(|row| trainer.evaluate(row).unwrap().sum).sum();
    let together = trainer.evaluate(&packed).unwrap();
    // The losses of the tokens are the same bits; only the f64 sums are bracketed differently.
    assert!((alone - together.sum).abs() < 1e-9 * together.sum, "{alone} {together:?}");
    let trained = packed.targets.iter().filter(|t| **t != IGNORE).count();
    assert_eq!(together.tokens, trained);
}

#[test]
fn a_row_does_not_see_what_it_is_packed_with() {
    let trainer = trainer(0.0);
    let mut packed = batch(&[20, 30], 6);
    packed.targets[..20].fill(IGNORE);
    let before = trainer.evaluate(&packed).unwrap();
    packed.tokens[..20].fill(3);
    assert_eq!(trainer.evaluate(&packed).unwrap(), before);
    packed.tokens[20] = (packed.tokens[20] + 1) % VOCABULARY;
    assert_ne!(trainer.evaluate(&packed).unwrap(), before);
}

#[test]
fn gradients_add_up_over_micro_batches_with_one_scale_for_all_tokens() {
    let whole = batch(&[40, 7, 15], 7);
    let scale = 1.0 / whole.targets.iter().filter(|t| **t != IGNORE).count() as f32;
    let mut together = trainer(0.0);
    let loss = together.accumulate(&whole, scale).unwrap();
    let mut apart = trainer(0.0);
    let losses: f64 = rows(&whole).iter().map(|row| apart.accumulate(row, scale).unwrap().sum).sum();
    assert!((loss.sum - losses).abs() < 1e-9 * losses);
    assert_close(&apart.gradients(), &together.gradients());
}

#[test]
fn rows_that_begin_alike_have_the_losses_and_gradients_of_rows_that_do_not() {
    let mut alike = batch(&[90, 40, 33, 75], 8);
    let starts = [0, 90, 130, 163];
    // The first, the third and the fourth share 30 tokens, which are not trained.
    for start in starts {
        alike.targets[start..start + 30].fill(IGNORE);
    }
    for start in [starts[2], starts[3]] {
        alike.tokens.copy_within(0..30, start);
    }
    for recompute in [Recompute::None, Recompute::Full] {
        let mut together = trainer_with(&options(0.0), recompute);
        let mut apart = trainer_with(&options(0.0), recompute);
        let evaluated = together.evaluate(&alike).unwrap();
        let loss = together.accumulate(&alike, 0.01).unwrap();
        let losses: Vec<_> = rows(&alike).iter().map(|row| apart.accumulate(row, 0.01).unwrap()).collect();
        let sum: f64 = losses.iter().map(|loss| loss.sum).sum();
        assert!((loss.sum - sum).abs() < 1e-6 * sum && (evaluated.sum - sum).abs() < 1e-6 * sum);
        assert_eq!(loss.tokens, losses.iter().map(|loss| loss.tokens).sum::<usize>());
        assert_close(&together.gradients(), &apart.gradients());
    }
}

#[test]
fn recomputing_changes_no_bit() {
    for targets in ["all-linear", r".*(q|v)_proj", r".*mlp\.down_proj"] {
        let options = LoraOptions { target_modules: TargetModules::Pattern(targets.into()), ..options(0.2) };
        let [mut kept, mut recomputed] =
            [Recompute::None, Recompute::Full].map(|recompute| trainer_with(&options, recompute));
        for seed in 0..2 {
            let batch = batch(&[25, 40], seed);
            let loss = kept.accumulate(&batch, 0.1).unwrap();
            assert_eq!(recomputed.accumulate(&batch, 0.1).unwrap(), loss);
        }
        assert_eq!(kept.gradients(), recomputed.gradients());
    }
}

#[test]
fn threads_change_no_bit() {
    for precision in [Precision::F32, Precision::Bf16] {
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let options = TrainerOptions { precision, ..options(0.1).into() };
                let mut trainer = Trainer::new(Model::random(config(), 1), &options).unwrap();
                let loss = trainer.accumulate(&batch(&[130, 66, 9], 3), 0.01).unwrap();
                (loss, trainer.gradients())
            })
        };
        let one = run(1);
        assert_eq!(run(2), one);
        assert_eq!(run(5), one);
    }
}

#[test]
fn gradients_with_dropout_predict_how_the_loss_changes() {
    let batch = batch(&[30, 20], 8);
    let mut trainer = trainer(0.3);
    let start = trainer.state();
    trainer.accumulate(&batch, 1.0).unwrap();
    let gradients = trainer.gradients();
    let square: f64 = gradients.iter().flat_map(|g| &g.data).map(|&g| f64::from(g).powi(2)).sum();
    // Along the gradient, with the same masks: the loss rises by step · ‖g‖².
    let mut loss_at = |step: f32, micro_step: u64| {
        let mut moved = start.clone();
        moved.micro_step = micro_step;
        for gradient in &gradients {
            let weight = moved.tensors.iter_mut().find(|t| t.name == gradient.name).unwrap();
            weight.data.iter_mut().zip(&gradient.data).for_each(|(w, g)| *w += step * g);
        }
        trainer.restore(&moved).unwrap();
        trainer.accumulate(&batch, 0.0).unwrap().sum
    };
    let masks = start.micro_step;
    let step = 1e-2 / square.sqrt() as f32;
    let rise = loss_at(step, masks) - loss_at(-step, masks);
    let predicted = 2.0 * f64::from(step) * square;
    assert!((rise / predicted - 1.0).abs() < 0.01, "rose by {rise}, predicted {predicted}");
    // Other masks give another loss, or there was nothing to test.
    assert!((loss_at(0.0, masks + 1) - loss_at(0.0, masks)).abs() > 1e-3);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]
    #[test]
    fn a_resumed_run_ends_with_the_same_bits(stop in 0u32..5, seed in 0u64..100, which in 0usize..4, bf16: bool, use_dora: bool) {
        let step = |trainer: &mut Trainer, i: u32| {
            for part in 0..2 {
                trainer.accumulate(&batch(&[6, 11], 10 * i + part), 0.05).unwrap();
            }
            trainer.step(1e-2 / f64::from(i + 1), Some(0.5)).unwrap()
        };
        let (rule, rank) = [
            (Optimizer::default().rule, 4),
            // Large enough for a state in 8 bits.
            (Rule::AdamW8bit { beta1: 0.9, beta2: 0.999, eps: 1e-8 }, 96),
            (Rule::Sgd { momentum: 0.9 }, 4),
            (Rule::Adafactor, 4),
        ][which];
        let options = LoraOptions { seed, rank, use_dora, ..options(0.1) };
        let optimizer = Optimizer { rule, weight_decay: 0.1, ..Optimizer::default() };
        let precision = if bf16 { Precision::Bf16 } else { Precision::F32 };
        let options = TrainerOptions { optimizer, precision, ..options.into() };
        let new = || Trainer::new(Model::random(config(), 1), &options).unwrap();
        let mut through = new();
        let mut state = through.state();
        for i in 0..5 {
            if i == stop {
                state = through.state();
            }
            step(&mut through, i);
        }
        let mut resumed = new();
        // What was accumulated before the restore must not count.
        resumed.accumulate(&batch(&[8], 1), 1.0).unwrap();
        resumed.restore(&state).unwrap();
        for i in stop..5 {
            step(&mut resumed, i);
        }
        prop_assert_eq!(state.tensors.iter().any(|t| t.name.ends_with("absmax1")), which == 1);
        prop_assert_eq!(resumed.state(), through.state());
    }
}

#[test]
fn adapters_above_frozen_blocks_get_the_gradients_they_would_get_with_adapters_below() {
    let pattern =
        |pattern: &str| LoraOptions { target_modules: TargetModules::Pattern(pattern.into()), ..options(0.0) };
    let fresh = |pattern_of: &str| {
        let model = Model::random(config(), 1);
        let options = pattern(pattern_of);
        let mut trainer = Trainer::new(model, &options.into()).unwrap();
        trainer.accumulate(&batch(&[30, 20], 8), 0.1).unwrap();
        trainer.gradients()
    };
    let b = |gradients: Vec<NamedTensor>| -> Vec<NamedTensor> {
        gradients.into_iter().filter(|g| g.name.contains("layers.2.self_attn.v_proj.lora_B")).collect()
    };
    let all = b(fresh(r".*v_proj"));
    assert_eq!(all.len(), 1);
    assert_eq!(b(fresh(r"model\.layers\.2\..*v_proj")), all);
}

#[test]
fn a_batch_that_trains_nothing_has_no_loss_and_no_gradient() {
    let mut trainer = trainer(0.0);
    let mut batch = batch(&[12], 1);
    batch.targets.fill(IGNORE);
    let loss = trainer.accumulate(&batch, 1.0).unwrap();
    assert_eq!((loss.sum, loss.tokens), (0.0, 0));
    assert!(trainer.gradients().iter().all(|g| g.data.iter().all(|x| *x == 0.0)));
}

#[test]
fn nan_gradients_are_refused_and_change_nothing() {
    let mut trainer = trainer(0.0);
    let before = trainer.state();
    trainer.accumulate(&batch(&[12], 1), f32::NAN).unwrap();
    let error = trainer.step(1e-3, Some(1.0)).unwrap_err();
    assert!(matches!(error, Error::NonFinite { step: 2, .. }), "{error}");
    assert_eq!(trainer.state().tensors, before.tensors);
    assert_eq!(trainer.state().step, before.step);
}

#[test]
fn clipping_divides_by_the_norm_and_a_smaller_norm_is_left_alone() {
    let step = |limit: Option<f64>, scale: f32| {
        let mut trainer = trainer(0.0);
        trainer.accumulate(&batch(&[20], 2), scale).unwrap();
        let norm = trainer.step(1e-3, limit).unwrap().grad_norm;
        let first_moment: Vec<f32> =
            trainer.state().tensors.into_iter().filter(|t| t.name.ends_with("exp_avg")).flat_map(|t| t.data).collect();
        (norm, first_moment)
    };
    let (norm, _) = step(None, 1.0);
    assert!((step(Some(norm / 2.0), 1.0).0 - norm).abs() < 1e-9, "the norm is that before clipping");
    assert_eq!(step(Some(norm * 2.0), 1.0).1, step(None, 1.0).1);
    let (clipped, halved) = (step(Some(norm / 2.0), 1.0).1, step(None, 0.5).1);
    for (a, b) in clipped.iter().zip(halved) {
        assert!((a - b).abs() <= 1e-4 * b.abs() + 1e-9, "{a} {b}");
    }
}

#[test]
fn inconsistent_batches_are_refused_by_name() {
    let mut trainer = trainer(0.0);
    let good = batch(&[4, 5], 1);
    let with = |change: &dyn Fn(&mut MicroBatch)| {
        let mut bad = good.clone();
        change(&mut bad);
        bad
    };
    for (bad, words) in [
        (with(&|b| b.tokens[3] = VOCABULARY), "token 300 at position 3"),
        (with(&|b| b.targets[3] = VOCABULARY), "target 300"),
        (with(&|b| b.row_lengths[0] = 5), "row lengths [5, 5]"),
        (with(&|b| b.row_lengths = vec![9, 0]), "row lengths [9, 0]"),
        (with(&|b| b.targets.truncate(2)), "9 tokens have 2 targets"),
        (MicroBatch::default(), "no tokens"),
    ] {
        let error = trainer.accumulate(&bad, 1.0).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
        assert!(trainer.evaluate(&bad).is_err());
    }
}

#[test]
fn a_state_of_another_adapter_is_refused() {
    let mut trainer = trainer(0.0);
    let other = LoraOptions { rank: 8, ..options(0.0) };
    let other = Trainer::new(Model::random(config(), 1), &other.into());
    let error = trainer.restore(&other.unwrap().state()).unwrap_err().to_string();
    assert!(error.contains("another rank"), "{error}");
    let mut short = trainer.state();
    short.tensors.retain(|t| !t.name.ends_with("exp_avg_sq"));
    assert!(trainer.restore(&short).unwrap_err().to_string().contains("exp_avg_sq is missing"));
}

fn adapted(targets: TargetModules) -> Result<Vec<String>, String> {
    let options = LoraOptions { target_modules: targets, ..options(0.0) };
    let model = Model::random(config(), 1);
    let trainer = Trainer::new(model, &options.into());
    Ok(trainer.map_err(|e| e.to_string())?.weights().into_iter().map(|t| t.name).collect())
}

#[test]
fn target_modules_are_chosen_as_peft_does() {
    let names = |names: &[&str]| TargetModules::Names(names.iter().map(|n| n.to_string()).collect());
    let pattern = |pattern: &str| TargetModules::Pattern(pattern.into());
    assert_eq!(
        adapted(names(&["layers.1.self_attn.q_proj"])).unwrap(),
        ["lora_A", "lora_B"].map(|part| format!("base_model.model.model.layers.1.self_attn.q_proj.{part}.weight"))
    );
    assert_eq!(adapted(names(&["q_proj", "v_proj"])).unwrap().len(), 2 * 2 * 3);
    assert_eq!(adapted(pattern("all-linear")).unwrap().len(), 2 * 7 * 3);
    assert_eq!(adapted(pattern(r"model\.layers\.[01]\.mlp\.(up|down)_proj")).unwrap().len(), 2 * 2 * 2);
    for (targets, words) in [
        (pattern("q_proj"), "matches no linear layer"),
        (pattern("("), "no regular expression"),
        (pattern(".*"), "lm_head"),
        (names(&["q_proj", "lm_head"]), "lm_head"),
        (names(&["q_proj", "c_attn"]), "\"c_attn\" matches no linear layer"),
        (names(&["_proj"]), "matches no linear layer"),
        (names(&[]), "matches no linear layer"),
    ] {
        let error = adapted(targets).unwrap_err();
        assert!(error.contains(words), "{error}");
    }
}

#[test]
fn options_out_of_range_are_refused() {
    for (bad, words) in [
        (LoraOptions { rank: 0, ..options(0.0) }, "rank is 0"),
        (options(1.0), "dropout is 1"),
        (options(-0.1), "dropout is -0.1"),
        (LoraOptions { alpha: f64::NAN, ..options(0.0) }, "alpha is NaN"),
    ] {
        let trainer = Trainer::new(Model::random(config(), 1), &bad.into());
        let error = trainer.err().unwrap().to_string();
        assert!(error.contains(words), "{error}");
    }
}

#[test]
fn a_fresh_adapter_changes_nothing_and_its_a_is_kaiming_uniform() {
    let tokens = [5, 6, 7, 8];
    let base = Model::random(config(), 1).logits(&tokens).unwrap();
    let model = Model::random(config(), 1);
    let trainer = Trainer::new(model, &options(0.5).into()).unwrap();
    assert_eq!(trainer.model().logits(&tokens).unwrap(), base);
    for tensor in trainer.weights() {
        let largest = tensor.data.iter().fold(0f32, |m, x| m.max(x.abs()));
        if tensor.name.contains("lora_B") {
            assert_eq!(largest, 0.0);
        } else {
            let bound = 1.0 / (tensor.shape[1] as f32).sqrt();
            assert!(largest <= bound && largest > 0.9 * bound, "{}: {largest}", tensor.name);
        }
    }
}

#[test]
fn cached_generation_writes_what_whole_rows_would() {
    let mut trainer = trainer(0.0);
    trainer.accumulate(&batch(&[9, 5], 77), 0.1).unwrap();
    trainer.step(0.05, None).unwrap();
    let model = trainer.model();
    // Long enough that the cache grows on the way.
    let mut tokens = batch(&[250], 4).tokens;
    let mut generator = Generator::new(model, &tokens, Sampling::default(), &[]).unwrap();
    for _ in 0..12 {
        let logits = model.logits(&tokens).unwrap();
        let last = &logits[logits.len() - VOCABULARY as usize..];
        let best = (0..VOCABULARY).max_by(|&a, &b| last[a as usize].total_cmp(&last[b as usize]));
        assert_eq!(generator.next_token().unwrap(), best);
        tokens.extend(best);
    }
}

#[test]
fn generation_ends_at_a_stop_token_and_at_the_longest_row() {
    let model = Model::random(config(), 1);
    let prompt = batch(&[395], 4).tokens;
    let write = |stop: &[u32]| {
        let mut generator = Generator::new(&model, &prompt, Sampling::default(), stop).unwrap();
        std::iter::from_fn(|| generator.next_token().unwrap()).collect::<Vec<u32>>()
    };
    let all = write(&[]);
    assert_eq!(all.len(), 5);
    let stop = all[2];
    let first = all.iter().position(|&t| t == stop).unwrap();
    assert_eq!(write(&[stop]), all[..first]);
    assert!(Generator::new(&model, &batch(&[400], 1).tokens, Sampling::default(), &[]).is_err());
    assert!(Generator::new(&model, &[], Sampling::default(), &[]).is_err());
}
