//! A job's method in the engine's words.

use std::path::Path;

use tunesmith_crds::{
    Method,
    fine_tune_job::{Lora, LoraBias, Optim, Quantization, QuantizationType, Training},
};
use tunesmith_engine::{
    Error, FourBitCode, LoraOptions, Model, ModelConfig, Optimizer, Precision, Quantization as EngineQuantization,
    Recompute, Rule, TargetModules, TrainerOptions, Tuning,
};

/// The options of the low-rank matrices, unless every parameter is trained.
pub fn lora_of(method: &Method) -> Option<&Lora> {
    match method {
        Method::Full => None,
        Method::LoRA { lora } | Method::QLoRA { lora, .. } => Some(lora),
    }
}

/// Parameters that these options of LoRA train.
///
/// # Errors
/// The options select no layer of this model, or a module that is not there.
pub fn lora_parameters(lora: &Lora, training: &Training, config: &ModelConfig) -> Result<u64, Error> {
    Ok(lora_options(lora, training).parameters(config)? as u64)
}

/// Loads a model folder in the form that the method trains.
///
/// # Errors
/// A file is missing or damaged.
pub(crate) fn load(folder: &Path, method: &Method) -> Result<Model, Error> {
    Ok(match method {
        Method::Full | Method::LoRA { .. } => Model::load(folder)?,
        Method::QLoRA { quantization, .. } => {
            let mut model = Model::load_quantized(folder, engine_quantization(quantization))?;
            model.set_outlier_threshold(quantization.outlier_threshold.map(|threshold| threshold as f32));
            model
        }
    })
}

/// How the engine is to store the base.
pub fn engine_quantization(quantization: &Quantization) -> EngineQuantization {
    let code = match quantization.kind {
        QuantizationType::Nf4 => FourBitCode::Nf4,
        QuantizationType::Fp4 => FourBitCode::Fp4,
        QuantizationType::Int8 => return EngineQuantization::Int8,
    };
    EngineQuantization::FourBit { code, double_quant: quantization.double_quant }
}

/// How the engine trains.
pub(crate) fn trainer_options(method: &Method, training: &Training) -> TrainerOptions {
    let lora = lora_of(method);
    let rule = match training.optim {
        Optim::AdamwTorch => Optimizer::default().rule,
        Optim::AdamwBnb8bit => match Optimizer::default().rule {
            Rule::AdamW { beta1, beta2, eps } => Rule::AdamW8bit { beta1, beta2, eps },
            rule => rule,
        },
        Optim::Adafactor => Rule::Adafactor,
        Optim::Sgd => Rule::Sgd { momentum: 0.0 },
    };
    TrainerOptions {
        tuning: match lora {
            None => Tuning::Full,
            Some(lora) => Tuning::Lora(lora_options(lora, training)),
        },
        precision: if training.computes_in_bf16() { Precision::Bf16 } else { Precision::F32 },
        optimizer: Optimizer {
            rule,
            weight_decay: training.weight_decay,
            lora_plus_lr_ratio: lora.map_or(1.0, |lora| lora.lora_plus_lr_ratio),
        },
        recompute: if training.gradient_checkpointing { Recompute::Full } else { Recompute::None },
        neftune_noise_alpha: training.neftune_noise_alpha,
        seed: training.seed,
    }
}

/// The options of LoRA. The seed of the run decides A's first values and dropout.
fn lora_options(lora: &Lora, training: &Training) -> LoraOptions {
    LoraOptions {
        rank: lora.rank as usize,
        alpha: lora.alpha,
        dropout: lora.dropout,
        target_modules: match (&lora.target_modules_regex, lora.target_modules.as_slice()) {
            (Some(regex), _) => TargetModules::Pattern(regex.clone()),
            (None, [all]) if all == "all-linear" => TargetModules::Pattern(all.clone()),
            (None, names) => TargetModules::Names(names.to_vec()),
        },
        use_rslora: lora.use_rslora,
        use_dora: lora.use_dora,
        bias: match lora.bias {
            LoraBias::None => tunesmith_engine::LoraBias::None,
            LoraBias::All => tunesmith_engine::LoraBias::All,
            LoraBias::LoraOnly => tunesmith_engine::LoraBias::LoraOnly,
        },
        modules_to_save: lora.modules_to_save.clone(),
        rank_pattern: lora.rank_pattern.iter().map(|(key, rank)| (key.clone(), *rank as usize)).collect(),
        alpha_pattern: lora.alpha_pattern.clone(),
        seed: training.seed,
    }
}
