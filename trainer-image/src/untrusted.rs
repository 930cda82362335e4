//! What reads a model's, a data set's or an operator's bytes first, one function each, for `make fuzz` and the tests below: whatever the bytes are, it ends
//! in a value or an error, without a panic, and in memory of about their size.

use std::{fs, io::Write, path::Path};

use tunesmith_crds::RunSpec;
use tunesmith_engine::{FiniteScan, Model, ModelConfig};

use crate::{
    convert::{Gguf, GgufScan, convert, convert_outline},
    data::{DataFile, RowOptions, notes::Notes, probe, rows::Reader},
    model::read_header,
    pod::parse_spec,
};

/// A model's `config.json`.
pub fn config_json(bytes: &[u8]) {
    if let Ok(config) = ModelConfig::parse(&String::from_utf8_lossy(bytes)) {
        config.tensors();
    }
}

/// The header of a safetensors file, and what goes by its offsets.
pub fn safetensors_header(bytes: &[u8]) {
    let _ = read_header(&mut &*bytes, bytes.len() as u64);
    let mut scan = FiniteScan::default();
    let _ = scan.write_all(bytes);
    scan.into_names();
}

/// A GGUF file, converted whole and by its header.
///
/// # Panics
/// There is no room for temporary files.
pub fn gguf(bytes: &[u8]) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("model.gguf");
    fs::write(&file, bytes).expect("room for the file");
    let _ = convert(&file, &folder.path().join("out"));
    let Ok(header) = Gguf::open(&file) else { return };
    let mut scan = GgufScan::new(&header);
    let _ = scan.write_all(bytes);
    let _ = convert_outline(&file, &folder.path().join("outline"), &scan.into_names());
}

/// A data file: JSON, plain or compressed, CSV, Parquet or Arrow.
///
/// # Panics
/// There is no room for temporary files.
pub fn data_rows(bytes: &[u8]) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("rows");
    fs::write(&file, bytes).expect("room for the file");
    let file = DataFile::new(&file);
    let (options, mut notes) = (RowOptions::default(), Notes::default());
    if let Ok(mut rows) = Reader::open(&file, &options) {
        while let Ok(Some(_)) = rows.next_row(&mut notes) {}
    }
}

/// A probe.
///
/// # Panics
/// There is no room for temporary files.
pub fn probe(bytes: &[u8]) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("probe.jsonl");
    fs::write(&file, bytes).expect("room for the file");
    let _ = probe::load(&DataFile::new(&file));
}

/// Bytes of [`adapter`] that are its `adapter_config.json`; the others are its tensors.
const ADAPTER_CONFIG: usize = 512;

/// A LoRA adapter, put on a model.
///
/// # Panics
/// There is no room for temporary files.
pub fn adapter(bytes: &[u8]) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (config, tensors) = bytes.split_at(bytes.len().min(ADAPTER_CONFIG));
    let write = |name: &str, bytes: &[u8]| fs::write(folder.path().join(name), bytes).expect("room for the file");
    write("adapter_config.json", config);
    write("adapter_model.safetensors", tensors);
    let config = r#"{"model_type": "llama", "vocab_size": 8, "hidden_size": 8, "intermediate_size": 8,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}"#;
    let mut model = Model::random(ModelConfig::parse(config).expect("a sound configuration"), 1);
    if model.load_adapter(folder.path()).is_ok() {
        model.adapted_layers();
    }
}

/// The operator's input for a pod.
pub fn run_spec(bytes: &[u8]) {
    let _ = parse_spec::<RunSpec>(bytes, Path::new("run.json"));
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::{
        array::{DictionaryArray, RecordBatch},
        datatypes::Int8Type,
    };
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::{convert, data::tables, tiny_model};

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
            (format!("[{rows},\n{rows}]").into_bytes(), data_rows),
            (b"prompt,completion,label\r\n\"a \"\"b\"\"\n\",c,\n".to_vec(), data_rows),
            (tables::parquet(&table()), data_rows),
            (tables::stream(&table()), data_rows),
            (tables::compressed_file(&table()), data_rows),
            (br#"{"id": "1", "question": "why?", "must_contain": ["so"]}"#.to_vec(), probe),
            (sound_adapter(), adapter),
            (spec.to_string().into_bytes(), run_spec),
        ]
    }

    /// Two columns, one of turns and one that is not used.
    fn table() -> RecordBatch {
        let dictionary: DictionaryArray<Int8Type> = ["x"].into_iter().collect();
        let turns = tables::turns(&[("user", Some("a")), ("assistant", None)]);
        tables::table(vec![("messages", turns), ("system", Arc::new(dictionary))])
    }

    fn sound_adapter() -> Vec<u8> {
        let config = json!({
            "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none",
            "rank_pattern": {"v_proj": 1}, "modules_to_save": ["norm"],
        });
        let config = config.to_string();
        let zeros = [0; 4 * 16];
        let view = |shape: &[usize]| {
            let bytes = 4 * shape.iter().product::<usize>();
            safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.to_vec(), &zeros[..bytes]).unwrap()
        };
        let named = [
            ("model.layers.0.self_attn.q_proj.lora_A", &[2, 8][..]),
            ("model.layers.0.self_attn.q_proj.lora_B", &[8, 2]),
            ("model.layers.0.input_layernorm", &[8]),
            ("model.layers.0.post_attention_layernorm", &[8]),
            ("model.norm", &[8]),
        ];
        let tensors = named.map(|(name, shape)| (format!("base_model.model.{name}.weight"), view(shape)));
        let tensors = safetensors::serialize(tensors, None).unwrap();
        let sound = [format!("{config:<width$}", width = ADAPTER_CONFIG).into_bytes(), tensors].concat();
        adapter(&sound);
        sound
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
            [config_json, safetensors_header, gguf, data_rows, probe, adapter, run_spec].into_iter().for_each(|read: Read| read(&bytes));
        }
    }
}
