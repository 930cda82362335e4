//! Which weights of a model are trained, by name and in one order.

use std::collections::HashSet;

use super::Model;
use crate::backend::Backend;
use crate::block::{Block, Norm};
use crate::error::Result;
use crate::names::{EMBEDDING, FINAL_NORM, LM_HEAD};
use crate::param::{Group, Param, Weight};
use crate::projection::Projection;
use crate::whole_modules::{WholeModule, whole_modules};

impl<B: Backend> Model<B> {
    /// Rounds frozen matrices to what products multiply.
    pub(crate) fn round_frozen(&mut self) {
        let Model { backend, embedding, blocks, lm_head, .. } = self;
        let linears = blocks.iter_mut().flat_map(|block| block.projections.iter_mut().flatten());
        let weights = linears.map(|linear| &mut linear.weight).chain([embedding]).chain(lm_head.as_mut());
        weights.filter_map(Weight::frozen_mut).for_each(|weight| backend.round_weight(weight));
    }

    /// Makes every weight trainable.
    pub(crate) fn train_all(&mut self) {
        let Model { backend, embedding, blocks, norm, lm_head, .. } = self;
        let train = |weight: &mut Weight<B>, group| {
            if let Weight::Frozen(frozen) = weight {
                *weight = Weight::trained(backend, backend.weight_values(frozen), group);
            }
        };
        let linears = |block: &mut Block<B>| {
            for linear in block.projections.iter_mut().flatten() {
                train(&mut linear.weight, Group::Matrix);
                linear.bias.iter_mut().for_each(|bias| bias.train(backend));
            }
            block.norms.iter_mut().flatten().for_each(|norm| norm.train(backend));
        };
        train(embedding, Group::Embedding);
        blocks.iter_mut().for_each(linears);
        norm.train(backend);
        lm_head.iter_mut().for_each(|weight| train(weight, Group::Matrix));
    }

    /// Makes these modules trainable. A tied output layer becomes one of its own, as in PEFT.
    pub(crate) fn train_modules(&mut self, names: &[String]) -> Result<()> {
        let Model { backend, config, embedding, blocks, norm, lm_head } = self;
        let own = |weight: &Weight<B>, group| match weight {
            Weight::Frozen(frozen) => Some(Weight::trained(backend, backend.weight_values(frozen), group)),
            Weight::Trained { .. } => None,
        };
        for (_, module) in whole_modules(config, names)? {
            match module {
                WholeModule::Output => {
                    let trained = own(lm_head.as_ref().unwrap_or(embedding), Group::Matrix);
                    *lm_head = trained.or(lm_head.take());
                }
                WholeModule::Embedding => {
                    if let Some(trained) = own(embedding, Group::Embedding) {
                        *embedding = trained;
                    }
                }
                WholeModule::FinalNorm => norm.train(backend),
                WholeModule::BlockNorm(block, which) => {
                    blocks[block].norms[which as usize].iter_mut().for_each(|norm| norm.train(backend));
                }
            }
        }
        Ok(())
    }

    /// All tensors that can be trained, under the base model's names; those of adapters under PEFT's, without prefix.
    pub(crate) fn parameters(&self) -> Vec<(String, &Param<B::Tensor>)> {
        let mut out = Vec::new();
        out.extend(self.embedding.param().map(|param| (format!("{EMBEDDING}.weight"), param)));
        for (i, block) in self.blocks.iter().enumerate() {
            for which in Norm::ALL {
                let path = which.path(&self.config).unwrap_or_default();
                let norm = block.norms[which as usize].as_ref();
                out.extend(norm.map(|norm| (format!("model.layers.{i}.{path}.weight"), norm)));
            }
            for which in Projection::ALL {
                let Some(linear) = &block.projections[which as usize] else { continue };
                let name = |part: &str| format!("{}.{part}", which.name(i));
                out.extend(linear.weight.param().map(|param| (name("weight"), param)));
                out.extend(linear.bias.as_ref().map(|bias| (name("bias"), bias)));
                let Some(adapter) = &linear.adapter else { continue };
                out.extend([(name("lora_A.weight"), &adapter.a), (name("lora_B.weight"), &adapter.b)]);
                let magnitude = adapter.dora.as_ref().map(|dora| &dora.magnitude);
                out.extend(magnitude.map(|param| (name("lora_magnitude_vector"), param)));
            }
        }
        out.push((format!("{FINAL_NORM}.weight"), &self.norm));
        let lm_head = self.lm_head.as_ref().and_then(Weight::param);
        out.extend(lm_head.map(|param| (format!("{LM_HEAD}.weight"), param)));
        out
    }

    /// The names of the linear layers that have an adapter.
    pub(crate) fn adapted_modules(&self) -> HashSet<String> {
        let blocks = self.blocks.iter().enumerate();
        blocks
            .flat_map(|(i, block)| {
                let adapted = move |which: &Projection| {
                    block.projections[*which as usize].as_ref().is_some_and(|linear| linear.adapter.is_some())
                };
                Projection::ALL.into_iter().filter(adapted).map(move |which| which.name(i))
            })
            .collect()
    }

    /// The tensors of [`Model::parameters`], in the same order.
    pub(crate) fn parameters_mut(&mut self) -> (&B, Vec<&mut Param<B::Tensor>>) {
        let mut out = Vec::new();
        out.extend(self.embedding.param_mut());
        for block in &mut self.blocks {
            out.extend(block.norms.iter_mut().flatten());
            for linear in block.projections.iter_mut().flatten() {
                out.extend(linear.weight.param_mut());
                out.extend(linear.bias.as_mut());
                let Some(adapter) = &mut linear.adapter else { continue };
                out.extend([&mut adapter.a, &mut adapter.b]);
                out.extend(adapter.dora.as_mut().map(|dora| &mut dora.magnitude));
            }
        }
        out.push(&mut self.norm);
        out.extend(self.lm_head.as_mut().and_then(Weight::param_mut));
        (&self.backend, out)
    }

    /// Gives the parameter of this name these values; it exists and is as large. [`Model::refresh`] is due afterwards.
    pub(crate) fn set(&mut self, name: &str, values: &[f32]) {
        let index = self.parameters().iter().position(|(known, _)| known == name);
        let (backend, params) = self.parameters_mut();
        if let Some(param) = index.and_then(|index| params.into_iter().nth(index)) {
            let [rows, cols] = backend.shape(&param.value);
            param.value = backend.upload(values, rows, cols);
        }
    }

    /// Computes anew what follows from weights that were changed.
    pub(crate) fn refresh(&mut self) {
        let Model { backend, embedding, blocks, lm_head, .. } = self;
        embedding.refresh(backend);
        let linears = blocks.iter_mut().flat_map(|block| block.projections.iter_mut().flatten());
        linears.for_each(|linear| linear.refresh(backend));
        lm_head.iter_mut().for_each(|weight| weight.refresh(backend));
    }
}
