//! Puts a fresh adapter on a model, and makes trainable what is trained beside it.

use super::{LoraBias, LoraOptions};
use crate::backend::Backend;
use crate::error::Result;
use crate::linear::{Linear, LoraLayer};
use crate::model::Model;
use crate::projection::Projection;
use crate::random;

impl LoraOptions {
    /// Puts a fresh adapter on the model: A uniform within ±1/√in (torch's kaiming_uniform with a = √5), B zero; and
    /// makes trainable what is to be trained beside it.
    pub(crate) fn apply<B: Backend>(&self, model: &mut Model<B>) -> Result<()> {
        let shapes = self.shapes(&model.config)?;
        let Model { backend, config, blocks, .. } = model;
        for (block, (layers, shapes)) in blocks.iter_mut().zip(shapes).enumerate() {
            for which in Projection::ALL {
                let Some(linear) = &mut layers.projections[which as usize] else { continue };
                linear.adapter = shapes[which as usize].map(|shape| {
                    let [output, input] = which.shape(config);
                    let key = random::key(self.seed, &[block as u64, which as u64]);
                    let a = random::uniform(shape.rank * input, 1.0 / (input as f32).sqrt(), key);
                    let a = backend.upload(&a, shape.rank, input);
                    let b = backend.zeros(output, shape.rank);
                    fresh(backend, linear, a, b, shape.scale, self.use_dora)
                });
                let train = match self.bias {
                    LoraBias::None => false,
                    LoraBias::All => true,
                    LoraBias::LoraOnly => linear.adapter.is_some(),
                };
                if let (true, Some(bias)) = (train, &mut linear.bias) {
                    bias.train(backend);
                }
            }
        }
        model.train_modules(&self.modules_to_save)
    }
}

/// A layer's adapter before its first step; DoRA's magnitude is at first the length of the weight's rows.
fn fresh<B: Backend>(
    backend: &B,
    linear: &Linear<B>,
    a: B::Tensor,
    b: B::Tensor,
    scale: f32,
    use_dora: bool,
) -> LoraLayer<B::Tensor> {
    let mut layer = LoraLayer::new(a, b, scale);
    if use_dora {
        let [output, _] = backend.shape(&layer.b.value);
        let ones = backend.upload(&vec![1.0; output], 1, output);
        let inverse = backend.dora_factors(linear.weight.get(), &layer.as_ref(None), &ones);
        let lengths: Vec<f32> = backend.download(&inverse).iter().map(|x| 1.0 / x).collect();
        layer.add_magnitude(backend, linear.weight.get(), backend.upload(&lengths, 1, output));
    }
    layer.train(backend);
    layer
}
