//! Reads the weights of a Hugging Face folder: `model.safetensors`, or the shards that
//! `model.safetensors.index.json` names. Files are mapped, not read, so a weight costs memory once.

mod stored;

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;
use rayon::prelude::*;
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;

use crate::block::Norm;
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::host_tensor::{CHUNK, HostTensor, release, widen};
use crate::names::{ADAPTER_WEIGHTS, EMBEDDING, FINAL_NORM, LM_HEAD};
use crate::projection::Projection;
use crate::quantize::StoredWeight;

/// All tensors of a folder.
pub(crate) struct Checkpoint {
    dir: PathBuf,
    tensors: HashMap<String, Entry>,
}

/// A linear layer's weight as a checkpoint has it.
pub(crate) enum Linear {
    Float(HostTensor),
    Stored(StoredWeight),
}

/// A tensor's bytes where they lie.
#[derive(Clone, Copy)]
pub(crate) struct Bytes<'a> {
    pub(crate) dtype: Dtype,
    pub(crate) data: &'a [u8],
}

fn is_float(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16)
}

fn unsupported(name: &str, dtype: Dtype) -> String {
    format!("{name} has dtype {dtype:?}; supported: F32, F16, BF16")
}

struct Entry {
    file: Arc<str>,
    map: Arc<Mmap>,
    start: usize,
    len: usize,
    dtype: Dtype,
    shape: Vec<usize>,
}

impl Entry {
    fn is_in(&self, file: &str) -> bool {
        &*self.file == file
    }
}

/// Maps a file and adds its tensors, whatever their types: which are used shows later.
fn add_file(tensors: &mut HashMap<String, Entry>, path: &Path) -> Result<()> {
    let file = File::open(path).map_err(|e| Error::io(path, e))?;
    // SAFETY: model files are not changed while a process uses them; a writer would have to replace them.
    let map = Arc::new(unsafe { Mmap::map(&file) }.map_err(|e| Error::io(path, e))?);
    let parsed = SafeTensors::deserialize(&map)
        .map_err(|e| Error::weights(path, format!("not a whole safetensors file: {e}")))?;
    let file: Arc<str> = path.file_name().unwrap_or_default().to_string_lossy().into();
    for (name, view) in parsed.iter() {
        let start = view.data().as_ptr() as usize - map.as_ptr() as usize;
        let len = view.data().len();
        let shape = view.shape().to_vec();
        let entry = Entry { file: file.clone(), map: map.clone(), start, len, dtype: view.dtype(), shape };
        if let Some(other) = tensors.insert(name.to_owned(), entry) {
            return Err(Error::weights(path, format!("{name} is in two shards, in {} too", other.file)));
        }
    }
    Ok(())
}

/// Checks that a folder holds every tensor that a model of this configuration uses, as loading it does.
///
/// # Errors
/// A file is missing or damaged, a tensor is missing, of another shape or stored in another way; the message names it.
pub fn check(dir: &Path, config: &ModelConfig) -> Result<()> {
    let checkpoint = Checkpoint::open(dir)?;
    let checked = checkpoint.check(config);
    checkpoint.release();
    checked
}

impl ModelConfig {
    /// Name and shape of every tensor that a checkpoint of this model holds.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let table = vec![self.vocab_size, self.hidden_size];
        let mut out = vec![(format!("{EMBEDDING}.weight"), table.clone())];
        for block in 0..self.num_hidden_layers {
            for which in Norm::ALL {
                let name = which.path(self).map(|path| format!("model.layers.{block}.{path}.weight"));
                out.extend(name.map(|name| (name, vec![which.len(self)])));
            }
            for which in Projection::of(self) {
                let [output, input] = which.shape(self);
                out.push((format!("{}.weight", which.name(block)), vec![output, input]));
                if which.has_bias(self) {
                    out.push((format!("{}.bias", which.name(block)), vec![output]));
                }
            }
        }
        out.push((format!("{FINAL_NORM}.weight"), vec![self.hidden_size]));
        if !self.tie_word_embeddings {
            out.push((format!("{LM_HEAD}.weight"), table));
        }
        out
    }
}

#[derive(Deserialize)]
struct Index {
    weight_map: HashMap<String, String>,
}

impl Checkpoint {
    /// Maps the files of a model folder and reads their headers.
    pub(crate) fn open(dir: &Path) -> Result<Self> {
        let single = dir.join("model.safetensors");
        let index = dir.join("model.safetensors.index.json");
        if single.exists() {
            return Self::open_files(dir, &[single]);
        }
        if !index.exists() {
            return Err(Error::weights(
                dir,
                "has neither model.safetensors nor model.safetensors.index.json; convert other formats first",
            ));
        }
        let text = std::fs::read_to_string(&index).map_err(|e| Error::io(&index, e))?;
        let map = serde_json::from_str::<Index>(text.strip_prefix('\u{feff}').unwrap_or(&text))
            .map_err(|e| Error::weights(&index, format!("not a safetensors index: {e}")))?
            .weight_map;
        let mut shards: Vec<&String> = map.values().collect();
        shards.sort();
        shards.dedup();
        if let Some(name) = shards.iter().find(|n| Path::new(n).components().count() != 1 || **n == "..") {
            return Err(Error::weights(&index, format!("shard {name:?} is not a file of this folder")));
        }
        let mut tensors = HashMap::new();
        for shard in shards {
            add_file(&mut tensors, &dir.join(shard))?;
            let listed = map.iter().filter(|(_, file)| *file == shard).map(|(name, _)| name);
            // Those of earlier shards are not this one's, so that a tensor in the wrong shard is found too.
            if let Some(name) = listed.filter(|name| !tensors.get(*name).is_some_and(|entry| entry.is_in(shard))).min()
            {
                return Err(Error::weights(&index, format!("says that {name} is in {shard}, which does not hold it")));
            }
        }
        Ok(Checkpoint { dir: dir.to_owned(), tensors })
    }

    /// Checks that the files hold every tensor that a model of this configuration uses, in its shape and a type that can
    /// be computed with. Others are ignored.
    pub(crate) fn check(&self, config: &ModelConfig) -> Result<()> {
        let linears: HashSet<String> = Projection::of(config)
            .flat_map(|which| (0..config.num_hidden_layers).map(move |block| format!("{}.weight", which.name(block))))
            .collect();
        for (name, shape) in config.tensors() {
            let is_linear = linears.contains(&name);
            match (is_linear, shape.as_slice()) {
                (true, &[output, input]) => self.check_linear(config, &name, [output, input])?,
                _ => drop(self.tensor(&name, &shape)?),
            }
        }
        Ok(())
    }

    /// Checks that a linear layer is stored as the configuration says.
    fn check_linear(&self, config: &ModelConfig, name: &str, shape: [usize; 2]) -> Result<()> {
        let Linear::Stored(weight) = self.linear(name, shape)? else { return Ok(()) };
        let message = match config.stored_as {
            Some(stored) if weight.is_of(stored) => return Ok(()),
            Some(stored) => format!("{name} is not stored as {}, as quantization_config says", stored.name()),
            None => format!("{name} is stored in few bits, and config.json has no quantization_config"),
        };
        Err(Error::weights(&self.dir, message))
    }

    /// Tells the system that nothing of the files is needed for now. What is released tensor by tensor leaves their edges,
    /// and what was read along with its neighbours.
    pub(crate) fn release(&self) {
        let maps: HashMap<*const u8, &Mmap> = self.tensors.values().map(|e| (e.map.as_ptr(), &*e.map)).collect();
        maps.values().for_each(|map| release(map, 0, map.len()));
    }

    /// Maps these files and reads their headers.
    pub(crate) fn open_files(dir: &Path, files: &[PathBuf]) -> Result<Self> {
        let mut tensors = HashMap::new();
        files.iter().try_for_each(|path| add_file(&mut tensors, path))?;
        Ok(Checkpoint { dir: dir.to_owned(), tensors })
    }

    /// The names of all tensors, sorted.
    pub(crate) fn names(&self) -> Vec<&str> {
        let mut names: Vec<&str> = self.tensors.keys().map(String::as_str).collect();
        names.sort_unstable();
        names
    }

    /// The bytes of a tensor, if it is there.
    pub(crate) fn bytes(&self, name: &str) -> Option<Bytes<'_>> {
        let Entry { map, start, len, dtype, .. } = self.tensors.get(name)?;
        Some(Bytes { dtype: *dtype, data: &map[*start..start + len] })
    }

    /// Whether all values of a tensor of floats are finite.
    pub(crate) fn is_finite(&self, name: &str) -> bool {
        let Some(Bytes { dtype, data }) = self.bytes(name).filter(|bytes| is_float(bytes.dtype)) else { return true };
        let chunks = data.par_chunks(dtype.bitsize() / 8 * CHUNK);
        chunks.all(|chunk| widen(chunk, dtype).iter().all(|value| value.is_finite()))
    }

    /// Whether both tensors are there and have other values or shapes.
    pub(crate) fn differ(&self, one: &str, other: &str) -> bool {
        let (Some(a), Some(b)) = (self.bytes(one), self.bytes(other)) else { return false };
        if self.tensors[one].shape != self.tensors[other].shape || !is_float(a.dtype) || !is_float(b.dtype) {
            return true;
        }
        let chunk = |bytes: Bytes<'_>| bytes.dtype.bitsize() / 8 * CHUNK;
        let chunks = a.data.par_chunks(chunk(a)).zip(b.data.par_chunks(chunk(b)));
        chunks.any(|(x, y)| (a.dtype != b.dtype || x != y) && widen(x, a.dtype) != widen(y, b.dtype))
    }

    /// A linear layer's weight [out, in], in few bits where the checkpoint has it so.
    pub(crate) fn linear(&self, name: &str, shape: [usize; 2]) -> Result<Linear> {
        match stored::read(self, name, shape).map_err(|problem| Error::weights(&self.dir, problem))? {
            Some(weight) => Ok(Linear::Stored(weight)),
            None => Ok(Linear::Float(self.tensor(name, &shape)?)),
        }
    }

    /// The tensor, which must have this shape.
    pub(crate) fn tensor(&self, name: &str, shape: &[usize]) -> Result<HostTensor> {
        let entry = self
            .tensors
            .get(name)
            .ok_or_else(|| Error::weights(&self.dir, format!("{name} is missing; expected shape {shape:?}")))?;
        if entry.shape != shape {
            let config = if self.dir.ends_with(ADAPTER_WEIGHTS) { "adapter_config.json" } else { "config.json" };
            let message = format!("{name} has shape {:?}; {config} asks for {shape:?}", entry.shape);
            return Err(Error::weights(&self.dir, message));
        }
        let Entry { map, start, len, dtype, .. } = entry;
        if !is_float(*dtype) {
            return Err(Error::weights(&self.dir, unsupported(name, *dtype)));
        }
        Ok(HostTensor::mapped(map.clone(), (*start, *len), *dtype, shape.to_vec()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(files: &[(&str, &[u8])]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, bytes) in files {
            std::fs::write(dir.path().join(name), bytes).unwrap();
        }
        dir
    }

    fn file(tensors: &[(&str, Dtype, &[usize], &[u8])]) -> Vec<u8> {
        let views = tensors.iter().map(|(name, dtype, shape, data)| {
            (*name, safetensors::tensor::TensorView::new(*dtype, shape.to_vec(), data).unwrap())
        });
        safetensors::serialize(views, None).unwrap()
    }

    fn message<T>(result: Result<T>) -> String {
        result.err().expect("an error").to_string()
    }

    #[test]
    fn half_precision_is_widened_exactly() {
        let bytes = |bits: [u16; 2]| bits.iter().flat_map(|b| b.to_le_bytes()).collect::<Vec<u8>>();
        let f16 = bytes([0x3C00, 0xC100]);
        let bf16 = bytes([0x3F80, 0xC020]);
        let data = file(&[("h", Dtype::F16, &[2], &f16), ("b", Dtype::BF16, &[1, 2], &bf16)]);
        let dir = folder(&[("model.safetensors", &data)]);
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        assert_eq!(checkpoint.tensor("h", &[2]).unwrap().into_f32().as_f32().unwrap(), [1.0, -2.5]);
        assert_eq!(checkpoint.tensor("b", &[1, 2]).unwrap().to_f32(), [1.0, -2.5]);
    }

    #[test]
    fn f16_is_rounded_to_bf16_as_its_numbers_are() {
        // Every number of f16, infinities and NaN too, over more than one chunk.
        let bits: Vec<u16> = (0..=u16::MAX).collect();
        let bytes: Vec<u8> = bits.iter().flat_map(|b| b.to_le_bytes()).collect();
        let data = file(&[("h", Dtype::F16, &[256, 256], &bytes)]);
        let dir = folder(&[("model.safetensors", &data)]);
        let mut tensor = Checkpoint::open(dir.path()).unwrap().tensor("h", &[256, 256]).unwrap();
        tensor.round();
        let expected = bits.iter().map(|b| half::bf16::from_f32(half::f16::from_bits(*b).to_f32()).to_le_bytes());
        assert!(tensor.as_bf16().unwrap().chunks_exact(2).eq(expected));
    }

    #[test]
    fn shards_are_found_through_the_index() {
        let a = file(&[("a", Dtype::F32, &[1], &1f32.to_le_bytes())]);
        let b = file(&[("b", Dtype::F32, &[1], &2f32.to_le_bytes())]);
        let index = br#"{"metadata": {}, "weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}"#;
        let dir = folder(&[("1.safetensors", &a), ("2.safetensors", &b), ("model.safetensors.index.json", index)]);
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        assert_eq!(checkpoint.names(), ["a", "b"]);
        assert_eq!(checkpoint.tensor("b", &[1]).unwrap().to_f32(), [2.0]);
        assert!(message(checkpoint.tensor("b", &[2])).contains("b has shape [1]; config.json asks for [2]"));
        assert!(message(checkpoint.tensor("c", &[3])).contains("c is missing; expected shape [3]"));
    }

    #[test]
    fn damaged_files_are_errors_that_name_them() {
        let good = file(&[("a", Dtype::F32, &[1], &1f32.to_le_bytes())]);
        let huge_header = [&u64::MAX.to_le_bytes()[..], b"{}"].concat();
        let cases: [(&[u8], &str); 4] = [
            (b"", "model.safetensors"),
            (b"{", "model.safetensors"),
            (&huge_header, "model.safetensors"),
            (&good[..good.len() - 1], "model.safetensors"),
        ];
        for (bytes, expected) in cases {
            let dir = folder(&[("model.safetensors", bytes)]);
            let message = message(Checkpoint::open(dir.path()));
            assert!(message.contains(expected), "{message}");
        }
    }

    #[test]
    fn a_shard_outside_the_folder_is_refused() {
        let index = br#"{"weight_map": {"a": "../secret.safetensors"}}"#;
        let dir = folder(&[("model.safetensors.index.json", index)]);
        assert!(message(Checkpoint::open(dir.path())).contains("is not a file of this folder"));
    }

    #[test]
    fn a_tensor_that_no_shard_holds_is_named() {
        let a = file(&[("a", Dtype::F32, &[1], &1f32.to_le_bytes())]);
        let index = br#"{"weight_map": {"a": "1.safetensors", "b": "1.safetensors"}}"#;
        let dir = folder(&[("1.safetensors", &a), ("model.safetensors.index.json", index)]);
        let message = message(Checkpoint::open(dir.path()));
        assert!(message.contains("says that b is in 1.safetensors, which does not hold it"), "{message}");
    }

    #[test]
    fn a_tensor_in_another_shard_than_the_index_says_or_in_two_is_refused() {
        let a = file(&[("a", Dtype::F32, &[1], &1f32.to_le_bytes())]);
        let b = file(&[("b", Dtype::F32, &[1], &2f32.to_le_bytes())]);
        let swapped = br#"{"weight_map": {"a": "2.safetensors", "b": "1.safetensors"}}"#;
        let dir = folder(&[("1.safetensors", &a), ("2.safetensors", &b), ("model.safetensors.index.json", swapped)]);
        assert!(message(Checkpoint::open(dir.path())).contains("says that b is in 1.safetensors"));
        let both = file(&[("a", Dtype::F32, &[1], &1f32.to_le_bytes()), ("b", Dtype::F32, &[1], &2f32.to_le_bytes())]);
        let index = br#"{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}"#;
        let dir = folder(&[("1.safetensors", &a), ("2.safetensors", &both), ("model.safetensors.index.json", index)]);
        let message = message(Checkpoint::open(dir.path()));
        assert!(message.contains("2.safetensors: a is in two shards, in 1.safetensors too"), "{message}");
    }

    #[test]
    fn a_tensor_that_is_not_used_may_be_of_any_type_and_one_that_is_may_not() {
        let data = file(&[
            ("a", Dtype::F32, &[1], &1f32.to_le_bytes()),
            ("ids", Dtype::I64, &[1], &[0; 8]),
            ("mask", Dtype::BOOL, &[2], &[0; 2]),
        ]);
        let dir = folder(&[("model.safetensors", &data)]);
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        assert_eq!(checkpoint.tensor("a", &[1]).unwrap().to_f32(), [1.0]);
        assert!(message(checkpoint.tensor("ids", &[1])).contains("ids has dtype I64; supported: F32, F16, BF16"));
    }
}
