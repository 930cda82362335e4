//! Memory and file sizes of a run.
//!
//! Weights and optimizer state follow from the method: mixed-precision full fine-tuning holds 16 bytes a parameter
//! (bf16 weight and gradient, fp32 master and two AdamW moments: Rajbhandari et al., ZeRO, 2020), fewer with a leaner
//! optimizer; a frozen base 2 bytes in bf16, as always on a GPU, and 4 in fp32; QLoRA 0.516 or 1 plus scales (Dettmers et
//! al., QLoRA, 2023). Activations are counted per token and block.

use tunesmith_crds::{
    Method,
    fine_tune_job::{Optim, Quantization, Training},
    run::ModelShape,
};

/// Rows of logits that the chunked loss holds at once.
const LOGIT_ROWS: u64 = 512;
/// What a process holds besides: runtime, buffers of the object store, allocator slack.
const OVERHEAD: u64 = 256 << 20;

/// Where a run computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    /// fp32 activations; fp32 weights, or bf16 if the training says so.
    Cpu,
    /// bf16 weights and activations.
    Gpu,
}

/// What is to be trained.
#[derive(Clone, Debug)]
pub struct Workload<'a> {
    /// Dimensions of the base model.
    pub model: &'a ModelShape,
    /// The method with its options.
    pub method: &'a Method,
    /// The training's options.
    pub training: &'a Training,
    /// Parameters that its LoRA trains, if it has one.
    pub lora_parameters: u64,
}

/// What a run takes, over all its GPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Estimate {
    /// Parameters that are trained.
    pub trainable_parameters: u64,
    /// Size of the published weights.
    pub published_bytes: u64,
    /// Memory that is divided over the GPUs of a sharded run: weights, gradients, optimizer state.
    pub sharded_bytes: u64,
    /// Memory that every GPU holds by itself: activations, logits, buffers.
    pub local_bytes: u64,
}

impl Estimate {
    /// Memory of one GPU (or of the one CPU pod) if `gpus` share the run.
    pub fn bytes_per_device(&self, gpus: u32) -> u64 {
        self.sharded_bytes.div_ceil(u64::from(gpus.max(1))) + self.local_bytes
    }
}

/// Estimates what a run takes on `device`.
pub fn estimate(work: &Workload, device: Device) -> Estimate {
    let parameters = work.model.parameters;
    let (frozen, activation) = match (device, work.training.computes_in_bf16()) {
        (Device::Cpu, false) => (4, 4),
        (Device::Cpu, true) => (2, 4),
        (Device::Gpu, _) => (2, 2),
    };
    // fp32 weight and gradient of LoRA's matrices; what is trained in full has a gradient as wide as the weight that
    // computes, and a master copy if that is bf16.
    let trained = 8 + optimizer_bytes(work.training.optim);
    let trained_in_full = match (device, work.training.computes_in_bf16()) {
        (Device::Cpu, true) => trained + 2,
        _ => trained,
    };
    let adapter = work.lora_parameters;
    let (trainable_parameters, published_bytes, sharded_bytes) = match work.method {
        Method::Full => (parameters, parameters * work.model.bytes_per_parameter, parameters * trained_in_full),
        Method::LoRA { .. } => (adapter, adapter * 4, parameters * frozen + adapter * trained),
        Method::QLoRA { quantization, .. } => {
            (adapter, adapter * 4, quantized_bytes(work.model, quantization, frozen) + adapter * trained)
        }
    };
    let local_bytes = activation_bytes(work.model, work.training, activation) + OVERHEAD;
    Estimate { trainable_parameters, published_bytes, sharded_bytes, local_bytes }
}

/// What an optimizer keeps of a parameter: two fp32 moments, or fewer bits of them.
fn optimizer_bytes(optim: Optim) -> u64 {
    match optim {
        Optim::AdamwTorch => 8,
        Optim::AdamwBnb8bit => 2,
        // A row and a column of each matrix.
        Optim::Adafactor | Optim::Sgd => 0,
    }
}

/// The linear layers' weights in 4 or 8 bits with their scales; embedding and output layer stay as they are.
fn quantized_bytes(model: &ModelShape, quantization: &Quantization, float: u64) -> u64 {
    let kept = (model.vocab_size * model.hidden_size).min(model.parameters);
    // One fp32 scale for 64 weights, or one byte for it and one fp32 for 256 of these with double quantization.
    let bits = match (quantization.bits, quantization.double_quant) {
        (8, _) => 8.02,
        (_, true) => 4.0 + 8.0 / 64.0 + 32.0 / (64.0 * 256.0),
        (_, false) => 4.0 + 32.0 / 64.0,
    };
    ((model.parameters - kept) as f64 * bits / 8.0) as u64 + kept * float
}

/// Activations that wait for the backward pass, and the logits of one chunk with their gradient.
fn activation_bytes(model: &ModelShape, training: &Training, float: u64) -> u64 {
    let tokens = u64::from(training.per_device_train_batch_size) * u64::from(training.max_length);
    // Of one token in one block: inputs of both norms, q, k, v, attention output and the residuals; gate, up and product.
    let block = 8 * model.hidden_size + 3 * model.intermediate_size;
    let kept = match training.gradient_checkpointing {
        true => model.layers * model.hidden_size + block,
        false => model.layers * block,
    };
    tokens * kept * float + 2 * LOGIT_ROWS * model.vocab_size * 4
}

#[cfg(test)]
mod tests {
    use tunesmith_crds::fine_tune_job::{Lora, QuantizationType};

    use super::*;

    const GIB: u64 = 1 << 30;

    fn llama(parameters: u64, layers: u64, hidden_size: u64, intermediate_size: u64) -> ModelShape {
        ModelShape {
            parameters,
            layers,
            hidden_size,
            intermediate_size,
            vocab_size: 32_000,
            bytes_per_parameter: 2,
            stored_as: None,
        }
    }

    fn work<'a>(model: &'a ModelShape, method: &'a Method, training: &'a Training) -> Workload<'a> {
        // q_proj and v_proj: hidden → hidden each.
        let rank = match method {
            Method::Full => 0,
            Method::LoRA { lora } | Method::QLoRA { lora, .. } => u64::from(lora.rank),
        };
        Workload { model, method, training, lora_parameters: rank * model.layers * 4 * model.hidden_size }
    }

    #[test]
    fn rank_8_on_q_and_v_of_llama_2_7b_trains_4_million_parameters_in_under_100_mb() {
        let model = llama(6_738_000_000, 32, 4096, 11008);
        let estimate =
            estimate(&work(&model, &Method::LoRA { lora: Lora::default() }, &Training::default()), Device::Gpu);
        assert_eq!(estimate.trainable_parameters, 8 * 32 * 4 * 4096);
        assert!(estimate.published_bytes < 100_000_000);
    }

    #[test]
    fn a_7b_lora_fits_24_gib_with_checkpointing_and_a_full_run_fits_four_a100s() {
        let model = llama(6_738_000_000, 32, 4096, 11008);
        let training = Training { gradient_checkpointing: true, ..Training::default() };
        let lora = estimate(&work(&model, &Method::LoRA { lora: Lora::default() }, &training), Device::Gpu);
        assert!(lora.bytes_per_device(1) < 20 * GIB, "{lora:?}");
        let full = estimate(&work(&model, &Method::Full, &training), Device::Gpu);
        assert!(full.bytes_per_device(1) > 80 * GIB, "{full:?}");
        assert!(full.bytes_per_device(4) < 40 * GIB, "{full:?}");
    }

    #[test]
    fn qlora_of_65b_fits_one_48_gb_gpu_and_lora_does_not() {
        let model = llama(65_200_000_000, 80, 8192, 22016);
        let training = Training {
            gradient_checkpointing: true,
            per_device_train_batch_size: 1,
            max_length: 512,
            ..Training::default()
        };
        let lora = Lora { rank: 64, ..Lora::default() };
        let quantization =
            Quantization { bits: 4, kind: QuantizationType::Nf4, double_quant: true, outlier_threshold: None };
        let qlora =
            estimate(&work(&model, &Method::QLoRA { lora: lora.clone(), quantization }, &training), Device::Gpu);
        assert!(qlora.bytes_per_device(1) < 48_000_000_000, "{qlora:?}");
        assert!(estimate(&work(&model, &Method::LoRA { lora }, &training), Device::Gpu).bytes_per_device(1) > 48 * GIB);
    }

    #[test]
    fn bf16_halves_the_frozen_base_on_the_cpu_and_a_lean_optimizer_the_state() {
        let model = llama(1_000_000_000, 16, 2048, 8192);
        let estimate_of =
            |method: &Method, training: &Training| estimate(&work(&model, method, training), Device::Cpu).sharded_bytes;
        let lora = Method::LoRA { lora: Lora { rank: 1, ..Lora::default() } };
        let (fp32, bf16) = (Training::default(), Training { bf16: Some(true), ..Training::default() });
        assert_eq!(estimate_of(&lora, &fp32) - estimate_of(&lora, &bf16), 2_000_000_000);
        // The weights that compute are a second copy.
        assert_eq!(estimate_of(&Method::Full, &bf16), 18_000_000_000);
        let eight_bit = Training { optim: Optim::AdamwBnb8bit, ..Training::default() };
        assert_eq!(estimate_of(&Method::Full, &eight_bit), 10_000_000_000);
    }
}
