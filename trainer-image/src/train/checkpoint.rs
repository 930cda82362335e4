//! Checkpoints in the object store: `<folder>/step-N/` with `state.safetensors` and `history.json`, and
//! `COMPLETE.json`, which lists both with their digests and is written last. Without it, there is no checkpoint.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
};

use safetensors::{Dtype, tensor::Metadata};
use serde::{Deserialize, Serialize};
use tunesmith_crds::{
    adapter_version::{ArtifactFile, Execution},
    fine_tune_job::Training,
};
use tunesmith_engine::{LazyTensor, StateSource};

use crate::{
    digest,
    error::Error,
    history::History,
    store::{Location, StoreError},
    tensors::TensorFile,
};

const STATE: &str = "state.safetensors";
const HISTORY: &str = "history.json";
const COMPLETE: &str = "COMPLETE.json";
/// As the safetensors library has it.
const MAX_HEADER_BYTES: u64 = 100_000_000;

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

/// The weights and the optimizer's state of a whole checkpoint, read from the store tensor by tensor.
#[derive(Debug)]
pub struct SavedState {
    object: Location,
    /// Where the tensors begin.
    start: u64,
    tensors: Metadata,
    step: u64,
    micro_step: u64,
}

impl StateSource for SavedState {
    type Error = Error;

    fn shape(&self, name: &str) -> Option<&[usize]> {
        self.tensors.info(name).map(|info| info.shape.as_slice())
    }

    fn values(&self, name: &str) -> Result<Vec<f32>, Error> {
        let info = self.tensors.info(name);
        let (from, to) = info.map_or((0, 0), |info| info.data_offsets);
        let bytes = self.object.read_range(self.start + from as u64..self.start + to as u64)?;
        Ok(match info.map(|info| info.dtype) {
            Some(Dtype::U8) => bytes.iter().map(|code| f32::from(*code)).collect(),
            _ => bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
        })
    }

    fn step(&self) -> u64 {
        self.step
    }

    fn micro_step(&self) -> u64 {
        self.micro_step
    }
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
    pub fn save(&self, state: &[LazyTensor<'_>], history: &History) -> Result<(), StoreError> {
        let folder = self.folder_of(history.step);
        // A checkpoint of this step may be there and damaged: it must not look whole while it is replaced.
        folder.join(COMPLETE).delete()?;
        let state = TensorFile { name: STATE.into(), tensors: state.iter().collect(), bf16: false };
        let state = folder.join(STATE).stream_in(|to| state.write(to))?;
        let bytes = to_json(history);
        let files = vec![state, digest::file_of_bytes(HISTORY, &bytes)];
        folder.join(HISTORY).write(bytes)?;
        folder.join(COMPLETE).create(to_json(&Complete { step: history.step, files }))?;
        tracing::info!(uri = %folder.uri(), "checkpoint is complete");
        self.rotate(history)
    }

    /// The newest whole checkpoint, if there is one. A damaged one is passed over, and so is one whose best is damaged.
    ///
    /// # Errors
    /// The store fails.
    pub fn newest(&self) -> Result<Option<(SavedState, History)>, StoreError> {
        for step in self.complete()?.into_keys().rev() {
            match self.load_with_best(step)? {
                Ok(checkpoint) => return Ok(Some(checkpoint)),
                Err(problem) => tracing::warn!(uri = %self.folder_of(step).uri(), problem, "checkpoint is damaged"),
            }
        }
        Ok(None)
    }

    /// How the attempt was executed that wrote the newest checkpoint; None if there is none.
    ///
    /// # Errors
    /// The store fails.
    pub fn execution(&self) -> Result<Option<Execution>, StoreError> {
        let Some((step, _)) = self.complete()?.pop_last() else { return Ok(None) };
        let history = self.folder_of(step).join(HISTORY).read_if_exists()?.unwrap_or_default();
        // A damaged one is passed over on resume.
        Ok(serde_json::from_slice::<History>(&history).ok().map(|history| history.execution))
    }

    /// The weights and the optimizer after `step`, of which there is a checkpoint.
    ///
    /// # Errors
    /// It was damaged meanwhile, or the store fails.
    pub fn state(&self, step: u64) -> Result<SavedState, Error> {
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
    fn load_with_best(&self, step: u64) -> Result<Result<(SavedState, History), String>, StoreError> {
        let loaded = self.load(step)?;
        let best = loaded.as_ref().ok().and_then(|(_, history)| self.best(history)).filter(|&best| best != step);
        match best {
            Some(best) => {
                Ok(self.load(best)?.map_err(|problem| format!("step {best}, the best: {problem}")).and(loaded))
            }
            None => Ok(loaded),
        }
    }

    fn load(&self, step: u64) -> Result<Result<(SavedState, History), String>, StoreError> {
        let folder = self.folder_of(step);
        let complete = folder.join(COMPLETE).read_if_exists()?.unwrap_or_default();
        let Ok(complete) = serde_json::from_slice::<Complete>(&complete) else {
            return Ok(Err(format!("{COMPLETE} can't be read")));
        };
        // The state is as large as all that is trained, three times over: it is read for its digest, and later in parts.
        for file in complete.files {
            let found = match folder.join(&file.path).digest() {
                Err(StoreError::Missing { .. }) => return Ok(Err(format!("{} is missing", file.path))),
                found => found?,
            };
            if found != file {
                return Ok(Err(format!("{} is not what was written", file.path)));
            }
        }
        let history = folder.join(HISTORY).read_if_exists()?.unwrap_or_default();
        let Ok(history) = serde_json::from_slice::<History>(&history) else {
            return Ok(Err(format!("{HISTORY} can't be read")));
        };
        let object = folder.join(STATE);
        let Some((start, tensors)) = header(&object)? else { return Ok(Err(format!("{STATE} can't be read"))) };
        let (step, micro_step) = (history.updates(), history.micro_step);
        Ok(Ok((SavedState { object, start, tensors, step, micro_step }, history)))
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

/// Where a file's tensors begin, and what it says of them.
fn header(object: &Location) -> Result<Option<(u64, Metadata)>, StoreError> {
    let length = object.read_range(0..8)?;
    let Ok(length) = <[u8; 8]>::try_from(&length[..]).map(u64::from_le_bytes) else { return Ok(None) };
    if length > MAX_HEADER_BYTES {
        return Ok(None);
    }
    let tensors = serde_json::from_slice(&object.read_range(8..8 + length)?);
    Ok(tensors.ok().map(|tensors| (8 + length, tensors)))
}

#[cfg(test)]
mod tests {
    use tunesmith_engine::NamedTensor;

    use super::*;
    use crate::history::EvalPoint;
    use crate::store::{Role, Stores};

    fn with_checkpoints(limit: u32, keeps_best: bool, test: impl FnOnce(&Checkpoints, &std::path::Path)) {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let uri = format!("file://{}", dir.path().display()).parse().unwrap();
        let adapter = Stores::from_environment(runtime.handle().clone()).open(Role::Output, &uri).unwrap();
        let training = Training { save_total_limit: limit, load_best_model_at_end: keeps_best, ..Training::default() };
        test(&Checkpoints::new(&adapter, "sha256:0123", &training), &dir.path().join("checkpoints/0123"));
    }

    fn history(step: u64) -> History {
        History { step, micro_step: 2 * step, train_seconds: 0.1 + 0.2, ..History::default() }
    }

    fn values(step: u64) -> Vec<f32> {
        vec![step as f32, f32::MIN_POSITIVE]
    }

    fn save(checkpoints: &Checkpoints, history: &History) {
        let tensor = |name: &str, data| NamedTensor { name: name.into(), shape: vec![2, 1], data };
        let tensors = [tensor("b", vec![0.5; 2]), tensor("a", values(history.step))];
        checkpoints.save(&tensors.each_ref().map(LazyTensor::from), history).unwrap();
    }

    /// Whether this is what [`save`] wrote.
    fn is_saved((state, found): &(SavedState, History), step: u64) -> bool {
        let tensor = (state.shape("a"), state.values("a").unwrap(), state.values("b").unwrap());
        assert_eq!(tensor, (Some(&[2, 1][..]), values(step), vec![0.5; 2]));
        assert_eq!((state.step(), state.micro_step(), state.shape("c")), (step, 2 * step, None));
        *found == history(step)
    }

    #[test]
    fn codes_of_the_optimizer_lie_in_8_bits_and_come_back_as_they_were() {
        with_checkpoints(1, false, |checkpoints, dir| {
            let codes: Vec<f32> = (0..=255u8).map(f32::from).collect();
            let tensor = |name: &str| NamedTensor { name: name.into(), shape: vec![256], data: codes.clone() };
            let tensors = [tensor("w.state1"), tensor("w")];
            let mut lazy = tensors.each_ref().map(LazyTensor::from);
            lazy[0].is_codes = true;
            checkpoints.save(&lazy, &history(1)).unwrap();
            let (state, _) = checkpoints.newest().unwrap().unwrap();
            assert_eq!((state.values("w.state1").unwrap(), state.values("w").unwrap()), (codes.clone(), codes));
            let size = std::fs::metadata(dir.join("step-1").join(STATE)).unwrap().len();
            assert_eq!(size - state.start, 256 + 4 * 256);
        });
    }

    #[test]
    fn rotation_goes_by_the_number_of_the_step() {
        with_checkpoints(2, false, |checkpoints, _| {
            for step in [5, 10, 90, 100] {
                save(checkpoints, &history(step));
            }
            assert_eq!(checkpoints.by_step().unwrap().into_keys().collect::<Vec<_>>(), [90, 100]);
            assert!(is_saved(&checkpoints.newest().unwrap().unwrap(), 100));
        });
    }

    #[test]
    fn an_unfinished_or_damaged_checkpoint_is_passed_over() {
        with_checkpoints(3, false, |checkpoints, dir| {
            assert!(checkpoints.newest().unwrap().is_none());
            for step in [10, 20, 30] {
                save(checkpoints, &history(step));
            }
            std::fs::remove_file(dir.join("step-30/COMPLETE.json")).unwrap();
            std::fs::write(dir.join("step-20/state.safetensors"), b"half").unwrap();
            assert!(is_saved(&checkpoints.newest().unwrap().unwrap(), 10));
            save(checkpoints, &history(20));
            assert!(is_saved(&checkpoints.newest().unwrap().unwrap(), 20));
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
                    save(checkpoints, &History { evals: evaluated(&[5, 10]).evals, ..history(step) });
                }
                assert_eq!(checkpoints.by_step().unwrap().into_keys().collect::<Vec<_>>(), kept, "limit {limit}");
                assert_eq!(checkpoints.state(10).unwrap().values("a").unwrap(), values(10));
            });
        }
    }

    #[test]
    fn a_run_whose_best_checkpoint_is_damaged_begins_before_it() {
        with_checkpoints(3, true, |checkpoints, dir| {
            for (step, evals) in [(5, &[5][..]), (10, &[5, 10]), (20, &[5, 10, 20])] {
                save(checkpoints, &History { evals: evaluated(evals).evals, ..history(step) });
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
            save(checkpoints, &history(10));
            std::fs::remove_file(dir.join("step-10/COMPLETE.json")).unwrap();
            save(checkpoints, &history(20));
            checkpoints.clear();
            assert!(checkpoints.by_step().unwrap().is_empty());
            checkpoints.clear();
        });
    }

    #[test]
    fn steps_that_were_skipped_are_no_steps_of_the_optimizer() {
        with_checkpoints(3, false, |checkpoints, _| {
            save(checkpoints, &History { skipped_steps: 3, skipped_in_a_row: 1, ..history(10) });
            let (state, history) = checkpoints.newest().unwrap().unwrap();
            assert_eq!((state.step(), history.step, history.skipped_in_a_row), (7, 10, 1));
        });
    }
}
