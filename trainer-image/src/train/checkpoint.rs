//! Checkpoints in the object store: `<folder>/step-N/` with `state.safetensors` and `history.json`, and
//! `COMPLETE.json`, which lists both with their digests and is written last. Without it, there is no checkpoint.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use safetensors::SafeTensors;
use serde::{Deserialize, Serialize};
use tunesmith_crds::adapter_version::ArtifactFile;
use tunesmith_engine::{NamedTensor, TrainState};

use super::History;
use crate::{
    digest,
    publish::safetensors_of,
    store::{Location, StoreError},
};

const STATE: &str = "state.safetensors";
const HISTORY: &str = "history.json";
const COMPLETE: &str = "COMPLETE.json";

/// The checkpoints of one set of inputs.
pub struct Checkpoints {
    folder: Location,
    limit: usize,
}

/// Lists what a whole checkpoint consists of.
#[derive(Serialize, Deserialize)]
struct Complete {
    step: u64,
    files: Vec<ArtifactFile>,
}

impl Checkpoints {
    /// The checkpoints in `folder`, of which `limit` are kept.
    pub fn new(folder: Location, limit: u32) -> Self {
        Self { folder, limit: limit as usize }
    }

    /// Writes a checkpoint, and deletes those that are too many: by the number of the step, the oldest first.
    ///
    /// # Errors
    /// The store fails.
    pub fn save(&self, state: &TrainState, history: &History) -> Result<(), StoreError> {
        let folder = self.folder_of(history.step);
        // A checkpoint of this step may be there and damaged: it must not look whole while it is replaced.
        folder.join(COMPLETE).delete()?;
        let files = [(STATE, safetensors_of(&state.tensors)), (HISTORY, to_json(history))];
        let described = files.iter().map(|(name, bytes)| digest::file_of_bytes(name, bytes)).collect();
        for (name, bytes) in files {
            folder.join(name).write(bytes)?;
        }
        folder.join(COMPLETE).create(to_json(&Complete { step: history.step, files: described }))?;
        tracing::info!(uri = %folder.uri(), "checkpoint is complete");
        self.rotate(history.step)
    }

    /// The newest whole checkpoint, if there is one. A damaged one is passed over.
    ///
    /// # Errors
    /// The store fails.
    pub fn newest(&self) -> Result<Option<(TrainState, History)>, StoreError> {
        for (step, _) in self.complete()?.into_iter().rev() {
            match self.load(step)? {
                Ok(checkpoint) => return Ok(Some(checkpoint)),
                Err(problem) => tracing::warn!(uri = %self.folder_of(step).uri(), problem, "checkpoint is damaged"),
            }
        }
        Ok(None)
    }

    fn load(&self, step: u64) -> Result<Result<(TrainState, History), String>, StoreError> {
        let folder = self.folder_of(step);
        let complete = folder.join(COMPLETE).read()?;
        let Ok(complete) = serde_json::from_slice::<Complete>(&complete) else {
            return Ok(Err(format!("{COMPLETE} can't be read")));
        };
        let mut contents = HashMap::new();
        for file in complete.files {
            let Some(bytes) = folder.join(&file.path).read_if_exists()? else {
                return Ok(Err(format!("{} is missing", file.path)));
            };
            if digest::file_of_bytes(&file.path, &bytes) != file {
                return Ok(Err(format!("{} is not what was written", file.path)));
            }
            contents.insert(file.path, bytes);
        }
        let (Some(state), Some(history)) = (contents.get(STATE), contents.get(HISTORY)) else {
            return Ok(Err(format!("{COMPLETE} does not list {STATE} and {HISTORY}")));
        };
        Ok(parse(state, history))
    }

    /// Whole checkpoints by step, each with its objects; and the others.
    fn complete(&self) -> Result<BTreeMap<u64, Vec<String>>, StoreError> {
        let mut checkpoints = self.by_step()?;
        checkpoints.retain(|_, objects| objects.iter().any(|object| object.ends_with(COMPLETE)));
        Ok(checkpoints)
    }

    fn by_step(&self) -> Result<BTreeMap<u64, Vec<String>>, StoreError> {
        let mut checkpoints: BTreeMap<u64, Vec<String>> = BTreeMap::new();
        for object in self.folder.list()? {
            let step = object.strip_prefix("step-").and_then(|rest| rest.split_once('/')?.0.parse().ok());
            if let Some(step) = step {
                checkpoints.entry(step).or_default().push(object);
            }
        }
        Ok(checkpoints)
    }

    /// Keeps the newest `limit` whole checkpoints up to `step`, and nothing else that is older.
    fn rotate(&self, step: u64) -> Result<(), StoreError> {
        let kept: BTreeSet<u64> = self.complete()?.into_keys().rev().take(self.limit).collect();
        for (old, mut objects) in self.by_step()? {
            if kept.contains(&old) || old >= step {
                continue;
            }
            // COMPLETE.json first: half a checkpoint must not look whole.
            objects.sort_by_key(|object| !object.ends_with(COMPLETE));
            for object in objects {
                self.folder.join(&object).delete()?;
            }
        }
        Ok(())
    }

    fn folder_of(&self, step: u64) -> Location {
        self.folder.join(&format!("step-{step}"))
    }
}

fn to_json(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec_pretty(value).unwrap_or_else(|error| unreachable!("plain fields: {error}"))
}

fn parse(state: &[u8], history: &[u8]) -> Result<(TrainState, History), String> {
    let history: History = serde_json::from_slice(history).map_err(|error| error.to_string())?;
    let file = SafeTensors::deserialize(state).map_err(|error| error.to_string())?;
    let tensor = |(name, view): (&str, safetensors::tensor::TensorView<'_>)| NamedTensor {
        name: name.to_owned(),
        shape: view.shape().to_vec(),
        data: view.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
    };
    let tensors = file.iter().map(tensor).collect();
    Ok((TrainState { tensors, step: history.step, micro_step: history.micro_step }, history))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{Role, Stores};

    fn with_checkpoints(limit: u32, test: impl FnOnce(&Checkpoints, &std::path::Path)) {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let uri = format!("file://{}/checkpoints", dir.path().display()).parse().unwrap();
        let folder = Stores::from_environment(runtime.handle().clone()).open(Role::Output, &uri).unwrap();
        test(&Checkpoints::new(folder, limit), &dir.path().join("checkpoints"));
    }

    fn state(step: u64) -> (TrainState, History) {
        let tensor = NamedTensor { name: "a".into(), shape: vec![2, 1], data: vec![step as f32, f32::MIN_POSITIVE] };
        let history = History { step, micro_step: 2 * step, train_seconds: 0.1 + 0.2, ..History::default() };
        (TrainState { tensors: vec![tensor], step, micro_step: 2 * step }, history)
    }

    fn save(checkpoints: &Checkpoints, step: u64) {
        let (state, history) = state(step);
        checkpoints.save(&state, &history).unwrap();
    }

    #[test]
    fn rotation_goes_by_the_number_of_the_step() {
        with_checkpoints(2, |checkpoints, _| {
            for step in [5, 10, 90, 100] {
                save(checkpoints, step);
            }
            assert_eq!(checkpoints.by_step().unwrap().into_keys().collect::<Vec<_>>(), [90, 100]);
            assert_eq!(checkpoints.newest().unwrap().unwrap(), state(100));
        });
    }

    #[test]
    fn an_unfinished_or_damaged_checkpoint_is_passed_over() {
        with_checkpoints(3, |checkpoints, dir| {
            assert!(checkpoints.newest().unwrap().is_none());
            for step in [10, 20, 30] {
                save(checkpoints, step);
            }
            std::fs::remove_file(dir.join("step-30/COMPLETE.json")).unwrap();
            std::fs::write(dir.join("step-20/state.safetensors"), b"half").unwrap();
            assert_eq!(checkpoints.newest().unwrap().unwrap(), state(10));
            save(checkpoints, 20);
            assert_eq!(checkpoints.newest().unwrap().unwrap(), state(20));
        });
    }
}
