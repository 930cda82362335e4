//! What a resumed run needs, and going back to it.

use super::{Trainer, shape};
use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::optim::Part;
use crate::tensors::{LazyTensor, NamedTensor};

/// Everything that a resumed run needs to go on bit for bit.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainState {
    /// Per trained weight `NAME`: the weight itself, and the optimizer's state, such as `NAME.exp_avg`.
    pub tensors: Vec<NamedTensor>,
    /// Optimizer steps taken.
    pub step: u64,
    /// Micro-batches accumulated; decides the next dropout masks.
    pub micro_step: u64,
}

/// A state that a trainer goes back to, tensor by tensor.
pub trait StateSource {
    /// Why a tensor can't be read.
    type Error: From<Error>;
    /// A tensor's shape, if there is one of this name.
    fn shape(&self, name: &str) -> Option<&[usize]>;
    /// The values of a tensor that there is; of one that was saved as codes ([`LazyTensor::is_codes`]), these as numbers.
    ///
    /// # Errors
    /// It can't be read.
    fn values(&self, name: &str) -> std::result::Result<Vec<f32>, Self::Error>;
    /// Optimizer steps taken.
    fn step(&self) -> u64;
    /// Micro-batches accumulated.
    fn micro_step(&self) -> u64;
}

impl StateSource for TrainState {
    type Error = Error;

    fn shape(&self, name: &str) -> Option<&[usize]> {
        let tensor = self.tensors.iter().find(|tensor| tensor.name == name);
        tensor.filter(|tensor| tensor.data.len() == tensor.shape.iter().product::<usize>()).map(|t| t.shape.as_slice())
    }

    fn values(&self, name: &str) -> Result<Vec<f32>> {
        let tensor = self.tensors.iter().find(|tensor| tensor.name == name);
        tensor.map(|tensor| tensor.data.clone()).ok_or_else(|| Error::State(format!("{name} is missing")))
    }

    fn step(&self) -> u64 {
        self.step
    }

    fn micro_step(&self) -> u64 {
        self.micro_step
    }
}

impl<B: Backend> Trainer<B> {
    /// The tensors of [`Trainer::state`].
    pub fn state_tensors(&self) -> Vec<LazyTensor<'_>> {
        let tensors = self.trained().zip(&self.states).flat_map(|((name, param), state)| {
            let parts = state.parts(&self.model.backend).into_iter().map(|part| {
                let Part { name: part, shape: [rows, cols], values, is_codes } = part;
                let mut tensor = LazyTensor::new(format!("{name}.{part}"), shape(rows, cols), values);
                tensor.is_codes = is_codes;
                tensor
            });
            let parts: Vec<LazyTensor<'_>> = parts.collect();
            parts.into_iter().chain([self.lazy(name, &param.value)])
        });
        tensors.collect()
    }

    /// What [`Trainer::restore`] needs. Take it between optimizer steps: accumulated gradients are not part of it.
    pub fn state(&self) -> TrainState {
        let tensors = self.state_tensors().into_iter().map(LazyTensor::read).collect();
        TrainState { tensors, step: self.step, micro_step: self.micro_step }
    }

    /// Goes back to a state of a trainer with the same model and options.
    ///
    /// # Errors
    /// A tensor is missing or has another shape: nothing is changed. Or a tensor can't be read: the trainer is of no more
    /// use.
    pub fn restore<S: StateSource>(&mut self, state: &S) -> std::result::Result<(), S::Error> {
        for LazyTensor { name, shape, .. } in self.state_tensors() {
            let problem = match state.shape(&name) {
                None => format!("{name} is missing; was it saved with other options?"),
                Some(found) if found != shape => {
                    format!(
                        "{name} has shape {found:?}, this run's is {shape:?}; was it saved with another rank or model?"
                    )
                }
                Some(_) => continue,
            };
            return Err(Error::State(problem).into());
        }
        let names: Vec<String> = self.trained().map(|(name, _)| name).collect();
        let Trainer { model, states, .. } = self;
        let (backend, params) = model.parameters_mut();
        let params = params.into_iter().filter(|param| param.is_trained());
        for ((param, optimizer), name) in params.zip(states).zip(names) {
            let [rows, cols] = backend.shape(&param.value);
            param.value = backend.upload(&state.values(&name)?, rows, cols);
            optimizer.set(backend, |part| state.values(&format!("{name}.{part}")))?;
        }
        self.model.refresh();
        self.clear_gradients();
        (self.step, self.micro_step) = (state.step(), state.micro_step());
        Ok(())
    }
}
