//! Checkpoints in the object store: `<folder>/step-N/` with `state.safetensors` and `history.json`, and
//! `COMPLETE.json`, which lists both with their digests and is written last. Without it, there is no checkpoint.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, HashMap},
};

use safetensors::SafeTensors;
use serde::{Deserialize, Serialize};
use tunesmith_crds::{adapter_version::ArtifactFile, fine_tune_job::Training};
use tunesmith_engine::{NamedTensor, TrainState};

use super::History;
use crate::{
    digest,
    error::Error,
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
    /// Whether the one with the lowest eval loss is kept too.
    keeps_best: bool,
}

/// Lists what a whole checkpoint consists of.
#[derive(Serialize, Deserialize)]
struct Complete {
    step: u64,
    files: Vec<ArtifactFile>,
}

impl Checkpoints {
    /// The checkpoints of these inputs, in the adapter's folder.
    pub fn new(adapter: &Location, input_digest: &str, training: &Training) -> Self {
        let hex = input_digest.strip_prefix("sha256:").unwrap_or(input_digest);
        let folder = adapter.join(&format!("checkpoints/{}", hex.get(..16).unwrap_or(hex)));
        Self { folder, limit: training.save_total_limit as usize, keeps_best: training.load_best_model_at_end }
    }

    /// Writes a checkpoint, and deletes those that are too many: by the number of the step, the oldest first, but never
    /// the best one.
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
        self.rotate(history)
    }

    /// The newest whole checkpoint, if there is one. A damaged one is passed over, and so is one whose best is damaged.
    ///
    /// # Errors
    /// The store fails.
    pub fn newest(&self) -> Result<Option<(TrainState, History)>, StoreError> {
        for step in self.complete()?.into_keys().rev() {
            match self.load_with_best(step)? {
                Ok(checkpoint) => return Ok(Some(checkpoint)),
                Err(problem) => tracing::warn!(uri = %self.folder_of(step).uri(), problem, "checkpoint is damaged"),
            }
        }
        Ok(None)
    }

    /// The weights and the optimizer after `step`, of which there is a checkpoint.
    ///
    /// # Errors
    /// It was damaged meanwhile, or the store fails.
    pub fn state(&self, step: u64) -> Result<TrainState, Error> {
        let uri = || self.folder_of(step).uri().clone();
        let (state, _) = self.load(step)?.map_err(|problem| Error::Checkpoint { uri: uri(), problem })?;
        Ok(state)
    }

    /// The step of the checkpoint that no rotation deletes: that with the lowest eval loss, if it is to be published.
    pub fn best(&self, history: &History) -> Option<u64> {
        history.best().filter(|_| self.keeps_best).map(|eval| eval.step)
    }

    /// Deletes all of them, once their version is published. What can't be deleted is of no use, but does no harm.
    pub fn clear(&self) {
        if let Err(error) = self.folder.list().and_then(|objects| self.delete(objects)) {
            tracing::warn!(uri = %self.folder.uri(), %error, "checkpoints are left over");
        }
    }

    /// A checkpoint, if it is whole and the best one of its history is too.
    fn load_with_best(&self, step: u64) -> Result<Result<(TrainState, History), String>, StoreError> {
        let loaded = self.load(step)?;
        let best = loaded.as_ref().ok().and_then(|(_, history)| self.best(history)).filter(|&best| best != step);
        match best {
            Some(best) => {
                Ok(self.load(best)?.map_err(|problem| format!("step {best}, the best: {problem}")).and(loaded))
            }
            None => Ok(loaded),
        }
    }

    fn load(&self, step: u64) -> Result<Result<(TrainState, History), String>, StoreError> {
        let folder = self.folder_of(step);
        let complete = folder.join(COMPLETE).read_if_exists()?.unwrap_or_default();
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

    /// Keeps this step's checkpoint, the best one, and of the whole ones before as many as the limit leaves room for.
    fn rotate(&self, history: &History) -> Result<(), StoreError> {
        let (step, best) = (history.step, self.best(history));
        let mut whole: Vec<u64> = self.complete()?.into_keys().filter(|&old| old <= step).collect();
        whole.sort_by_key(|&old| (old != step, Some(old) != best, Reverse(old)));
        let indispensable = if best.is_some_and(|best| best != step) { 2 } else { 1 };
        let kept: BTreeSet<u64> = whole.into_iter().take(self.limit.max(indispensable)).collect();
        for (old, objects) in self.by_step()? {
            if old < step && !kept.contains(&old) {
                self.delete(objects)?;
            }
        }
        Ok(())
    }

    fn delete(&self, mut objects: Vec<String>) -> Result<(), StoreError> {
        // COMPLETE.json first: half a checkpoint must not look whole.
        objects.sort_by_key(|object| !object.ends_with(COMPLETE));
        objects.iter().try_for_each(|object| self.folder.join(object).delete())
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
    Ok((TrainState { tensors, step: history.updates(), micro_step: history.micro_step }, history))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        store::{Role, Stores},
        train::EvalPoint,
    };

    fn with_checkpoints(limit: u32, keeps_best: bool, test: impl FnOnce(&Checkpoints, &std::path::Path)) {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let uri = format!("file://{}", dir.path().display()).parse().unwrap();
        let adapter = Stores::from_environment(runtime.handle().clone()).open(Role::Output, &uri).unwrap();
        let training = Training { save_total_limit: limit, load_best_model_at_end: keeps_best, ..Training::default() };
        test(&Checkpoints::new(&adapter, "sha256:0123", &training), &dir.path().join("checkpoints/0123"));
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
        with_checkpoints(2, false, |checkpoints, _| {
            for step in [5, 10, 90, 100] {
                save(checkpoints, step);
            }
            assert_eq!(checkpoints.by_step().unwrap().into_keys().collect::<Vec<_>>(), [90, 100]);
            assert_eq!(checkpoints.newest().unwrap().unwrap(), state(100));
        });
    }

    #[test]
    fn an_unfinished_or_damaged_checkpoint_is_passed_over() {
        with_checkpoints(3, false, |checkpoints, dir| {
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

    /// A history whose evaluations were made after these steps; that of step 10 is the best.
    fn evaluated(steps: &[u64]) -> History {
        let loss = |step| if step == 10 { 1.0 } else { 2.0 };
        let eval = |&step: &u64| EvalPoint { step, loss: loss(step), ..EvalPoint::default() };
        History { evals: steps.iter().map(eval).collect(), ..History::default() }
    }

    #[test]
    fn neither_the_best_nor_the_newest_checkpoint_is_ever_deleted() {
        for (limit, kept) in [(1, vec![10, 40]), (2, vec![10, 40]), (3, vec![10, 30, 40])] {
            with_checkpoints(limit, true, |checkpoints, _| {
                for step in [5, 10, 20, 30, 40] {
                    let (state, history) = state(step);
                    let history = History { evals: evaluated(&[5, 10]).evals, ..history };
                    checkpoints.save(&state, &history).unwrap();
                }
                assert_eq!(checkpoints.by_step().unwrap().into_keys().collect::<Vec<_>>(), kept, "limit {limit}");
                assert_eq!(checkpoints.state(10).unwrap(), state(10).0);
            });
        }
    }

    #[test]
    fn a_run_whose_best_checkpoint_is_damaged_begins_before_it() {
        with_checkpoints(3, true, |checkpoints, dir| {
            for (step, evals) in [(5, &[5][..]), (10, &[5, 10]), (20, &[5, 10, 20])] {
                let (state, history) = state(step);
                checkpoints.save(&state, &History { evals: evaluated(evals).evals, ..history }).unwrap();
            }
            std::fs::write(dir.join("step-10/state.safetensors"), b"half").unwrap();
            assert_eq!(checkpoints.newest().unwrap().unwrap().1.step, 5);
            let error = checkpoints.state(10).unwrap_err();
            assert!(error.to_string().contains("step-10 can't be used"), "{error}");
        });
    }

    #[test]
    fn clearing_leaves_nothing_and_may_be_done_again() {
        with_checkpoints(3, false, |checkpoints, dir| {
            checkpoints.clear();
            save(checkpoints, 10);
            std::fs::remove_file(dir.join("step-10/COMPLETE.json")).unwrap();
            save(checkpoints, 20);
            checkpoints.clear();
            assert!(checkpoints.by_step().unwrap().is_empty());
            checkpoints.clear();
        });
    }

    #[test]
    fn steps_that_were_skipped_are_no_steps_of_the_optimizer() {
        with_checkpoints(3, false, |checkpoints, _| {
            let (state, history) = state(10);
            checkpoints.save(&state, &History { skipped_steps: 3, skipped_in_a_row: 1, ..history }).unwrap();
            let (state, history) = checkpoints.newest().unwrap().unwrap();
            assert_eq!((state.step, history.step, history.skipped_in_a_row), (7, 10, 1));
        });
    }
}
