//! What reads a model's, a data set's or an operator's bytes first, one function each, for `make fuzz` and the tests below: whatever the bytes are, it ends
//! in a value or an error, without a panic, and in memory of about their size.

use std::{fs, path::Path};

use tunesmith_crds::{RunSpec, fine_tune_job::DataFormat};
use tunesmith_engine::ModelConfig;

use crate::{
    convert::convert,
    data::{DataFile, rows::Reader},
    model::read_header,
    pod::parse_spec,
};

/// A model's `config.json`.
pub fn config_json(bytes: &[u8]) {
    if let Ok(config) = ModelConfig::parse(&String::from_utf8_lossy(bytes)) {
        config.tensors();
    }
}

/// The header of a safetensors file.
pub fn safetensors_header(bytes: &[u8]) {
    let _ = read_header(&mut &*bytes, bytes.len() as u64);
}

/// A GGUF file, converted.
///
/// # Panics
/// There is no room for temporary files.
pub fn gguf(bytes: &[u8]) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("model.gguf");
    fs::write(&file, bytes).expect("room for the file");
    let _ = convert(&file, &folder.path().join("out"));
}

/// A data file: JSON Lines, plain or compressed, or Parquet.
///
/// # Panics
/// There is no room for temporary files.
pub fn data_rows(bytes: &[u8]) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("rows");
    fs::write(&file, bytes).expect("room for the file");
    let file = DataFile::new(&file);
    if let Ok(mut rows) = Reader::open(&file, DataFormat::Auto) {
        while let Ok(Some(_)) = rows.next_row() {}
    }
}

/// The operator's input for a pod.
pub fn run_spec(bytes: &[u8]) {
    let _ = parse_spec::<RunSpec>(bytes, Path::new("run.json"));
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::{convert, tiny_model};

    type Read = fn(&[u8]);

    /// A sound file of each kind, and what reads it.
    fn seeds() -> Vec<(Vec<u8>, Read)> {
        let folder = tempfile::tempdir().unwrap();
        tiny_model::write(folder.path()).unwrap();
        let read = |name: &str| fs::read(folder.path().join(name)).unwrap();
        let mut weights = read("model.safetensors");
        let header = u64::from_le_bytes(weights[..8].try_into().unwrap()) as usize;
        weights.truncate(8 + header);
        let rows = json!({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]});
        let spec = json!({
            "schemaVersion": 1, "baseModel": "s3://models/m", "adapterName": "a", "output": "s3://adapters",
            "job": {"namespace": "n", "name": "j", "uid": "u", "generation": 1, "run": 1},
            "dataset": {"train": {"uri": "s3://data/t"}, "evalFraction": 0.5}, "training": {},
        });
        parse_spec::<RunSpec>(spec.to_string().as_bytes(), Path::new("run.json")).unwrap();
        vec![
            (read("config.json"), config_json),
            (weights, safetensors_header),
            (convert::tests::gguf(&convert::tests::metadata(), &convert::tests::tensors()), gguf),
            (fs::read(convert::tests::fixture("mistral.gguf")).unwrap(), gguf),
            (format!("{rows}\n{rows}\n").into_bytes(), data_rows),
            (spec.to_string().into_bytes(), run_spec),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]
        #[test]
        fn no_damage_makes_a_reader_panic(
            damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6), keep in 0.0..1.2f64,
        ) {
            thread_local!(static SEEDS: Vec<(Vec<u8>, Read)> = seeds());
            SEEDS.with(|seeds| {
                for (seed, read) in seeds {
                    let mut bytes = seed.clone();
                    damage.iter().for_each(|(at, byte)| bytes[at.index(seed.len())] = *byte);
                    bytes.truncate((keep * seed.len() as f64) as usize);
                    read(&bytes);
                }
            });
        }

        #[test]
        fn no_bytes_make_a_reader_panic(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            [config_json, safetensors_header, gguf, data_rows, run_spec].into_iter().for_each(|read: Read| read(&bytes));
        }
    }
}
