//! The weights of a model with its adapter in them: W + scale·B·A, and with DoRA each row scaled.

use crate::backend::{Backend, WeightRef};
use crate::block::Norm;
use crate::linear::Linear;
use crate::model::{Model, NamedTensor};
use crate::param::Weight;
use crate::projection::Projection;

impl<B: Backend> Model<B> {
    /// Every tensor of the checkpoint that this model is once its adapter is merged, under the base model's names. A tied
    /// output layer that was trained comes as one of its own; see [`Model::has_own_output`].
    pub fn merged(&self) -> Vec<NamedTensor> {
        let Model { backend, config, .. } = self;
        let vector = |name: String, x: &B::Tensor| {
            let data = backend.download(x);
            NamedTensor { name, shape: vec![data.len()], data }
        };
        let mut out = vec![self.matrix("model.embed_tokens.weight".into(), &self.embedding)];
        for (i, block) in self.blocks.iter().enumerate() {
            for which in Norm::ALL {
                let norm = which.path(config).zip(block.norms[which as usize].as_ref());
                out.extend(norm.map(|(path, norm)| vector(format!("model.layers.{i}.{path}.weight"), &norm.value)));
            }
            for which in Projection::of(config) {
                let Some(linear) = &block.projections[which as usize] else { continue };
                let name = |part: &str| format!("{}.{part}", which.name(i));
                out.push(self.merged_weight(name("weight"), linear));
                out.extend(linear.bias.as_ref().map(|bias| vector(name("bias"), &bias.value)));
            }
        }
        out.push(vector("model.norm.weight".into(), &self.norm.value));
        out.extend(self.lm_head.as_ref().map(|weight| self.matrix("lm_head.weight".into(), weight)));
        out
    }

    /// Whether the output layer has weights of its own, other than the configuration may say.
    pub fn has_own_output(&self) -> bool {
        self.lm_head.is_some()
    }

    fn values(&self, weight: &Weight<B>) -> B::Tensor {
        match weight.get() {
            WeightRef::Frozen(weight) => self.backend.weight_values(weight),
            WeightRef::Trained(x) => self.backend.copy(x),
        }
    }

    fn matrix(&self, name: String, weight: &Weight<B>) -> NamedTensor {
        let x = self.values(weight);
        NamedTensor { name, shape: self.backend.shape(&x).to_vec(), data: self.backend.download(&x) }
    }

    fn merged_weight(&self, name: String, linear: &Linear<B>) -> NamedTensor {
        let Some(adapter) = &linear.adapter else { return self.matrix(name, &linear.weight) };
        let backend = &self.backend;
        let mut merged = self.values(&linear.weight);
        let [output, rank] = backend.shape(&adapter.b.value);
        let b = backend.download(&adapter.b.value);
        // A weight's gradient is dyᵀ·x: with dy = scale·Bᵀ and x = A, it adds the update.
        let scaled: Vec<f32> = (0..rank * output).map(|i| adapter.scale * b[i % output * rank + i / output]).collect();
        let scaled = backend.upload(&scaled, rank, output);
        backend.linear_weight_backward(&adapter.a.value, &scaled, &mut merged);
        let mut data = backend.download(&merged);
        if let Some(magnitude) = &adapter.magnitude {
            let lora = adapter.as_ref(None);
            let factors = backend.dora_factors(linear.weight.get(), &lora, &magnitude.value);
            let width = data.len() / output;
            for (row, factor) in data.chunks_exact_mut(width).zip(backend.download(&factors)) {
                row.iter_mut().for_each(|x| *x *= factor);
            }
        }
        NamedTensor { name, shape: backend.shape(&merged).to_vec(), data }
    }
}
