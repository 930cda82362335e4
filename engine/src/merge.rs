//! The weights of a model with its adapter in them: W + scale·B·A, and with DoRA each row scaled.

use crate::backend::{Backend, WeightRef};
use crate::block::Norm;
use crate::linear::Linear;
use crate::model::Model;
use crate::param::Weight;
use crate::projection::Projection;
use crate::tensors::LazyTensor;

impl<B: Backend> Model<B> {
    /// Every tensor of the checkpoint that this model is once its adapter is merged, under the base model's names. A tied
    /// output layer that was trained comes as one of its own; see [`Model::has_own_output`].
    pub fn merged(&self) -> Vec<LazyTensor<'_>> {
        let Model { backend, config, .. } = self;
        let vector =
            |name: String, x| LazyTensor::new(name, vec![backend.shape(x).iter().product()], || backend.download(x));
        let table = |name: &str, weight| {
            let shape = vec![config.vocab_size, config.hidden_size];
            LazyTensor::new(name.into(), shape, move || backend.download(&self.values(weight)))
        };
        let mut out = vec![table("model.embed_tokens.weight", &self.embedding)];
        for (i, block) in self.blocks.iter().enumerate() {
            for which in Norm::ALL {
                let norm = which.path(config).zip(block.norms[which as usize].as_ref());
                out.extend(norm.map(|(path, norm)| vector(format!("model.layers.{i}.{path}.weight"), &norm.value)));
            }
            for which in Projection::of(config) {
                let Some(linear) = &block.projections[which as usize] else { continue };
                let name = |part: &str| format!("{}.{part}", which.name(i));
                let shape = which.shape(config).to_vec();
                out.push(LazyTensor::new(name("weight"), shape, || self.merged_weight(linear)));
                out.extend(linear.bias.as_ref().map(|bias| vector(name("bias"), &bias.value)));
            }
        }
        out.push(vector("model.norm.weight".into(), &self.norm.value));
        out.extend(self.lm_head.as_ref().map(|weight| table("lm_head.weight", weight)));
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

    fn merged_weight(&self, linear: &Linear<B>) -> Vec<f32> {
        let backend = &self.backend;
        let mut merged = self.values(&linear.weight);
        let Some(adapter) = &linear.adapter else { return backend.download(&merged) };
        let [output, rank] = backend.shape(&adapter.b.value);
        let b = backend.download(&adapter.b.value);
        // A weight's gradient is dyᵀ·x: with dy = scale·Bᵀ and x = A, it adds the update.
        let scaled: Vec<f32> = (0..rank * output).map(|i| adapter.scale * b[i % output * rank + i / output]).collect();
        let scaled = backend.upload(&scaled, rank, output);
        backend.linear_weight_backward(&adapter.a.value, &scaled, &mut merged);
        let mut data = backend.download(&merged);
        if let Some(dora) = &adapter.dora {
            let width = data.len() / output;
            for (row, factor) in data.chunks_exact_mut(width).zip(backend.download(&dora.factors)) {
                row.iter_mut().for_each(|x| *x *= factor);
            }
        }
        data
    }
}
