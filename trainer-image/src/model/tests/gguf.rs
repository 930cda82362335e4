//! A GGUF file of which a preflight keeps the header is the same model as the whole one, and refused in the same words.

use std::os::unix::fs::MetadataExt;

use candle_core::quantized::gguf_file::Value as Metadata;

use super::*;
use crate::convert::tests::{fixture, gguf, metadata, tensors};

/// A file's metadata, and its tensors' names and shapes.
type Contents = (Vec<(&'static str, Metadata)>, Vec<(&'static str, Vec<usize>)>);

const FILES: [&str; 4] = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"];

impl Bench {
    /// What comes of a GGUF file of these bytes.
    fn bring(&self, bytes: &[u8], keep: Keep) -> Result<ModelFolder, Error> {
        let stores =
            Stores::from_environment(self.runtime.handle().clone()).or_local(&self.folder.path().join("store"));
        self.write("m.gguf", bytes);
        let uri = "s3://models/tiny/m.gguf".parse().unwrap();
        Ok(ModelFolder::bring(&uri, &stores, &self.folder.path().join("work"), keep)?)
    }

    fn check_same(&self, bytes: &[u8]) {
        let [whole, outline] =
            [Keep::Whole, Keep::Headers].map(|keep| self.bring(bytes, keep).unwrap_or_else(|error| panic!("{error}")));
        assert_eq!((&outline.digest, &outline.config, &outline.shape), (&whole.digest, &whole.config, &whole.shape));
        assert_eq!((&outline.warnings, &whole.warnings), (&vec![], &vec![]));
        for name in FILES {
            assert_eq!(fs::read(outline.folder.join(name)).unwrap(), fs::read(whole.folder.join(name)).unwrap());
        }
        let read = |model: &ModelFolder| fs::read(model.folder.join(WEIGHTS)).unwrap();
        let (whole, outlined) = (read(&whole), read(&outline));
        let data = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
        assert!(outlined.len() == whole.len() && outlined[..data] == whole[..data]);
        assert!(outlined[data..].iter().all(|byte| *byte == 0));
    }

    /// Both are refused in these words.
    fn check_refused(&self, bytes: &[u8], part: &str) {
        let [whole, outline] = [Keep::Whole, Keep::Headers].map(|keep| {
            let error = self.bring(bytes, keep).map(drop).expect_err(part);
            assert_eq!(error.exit_code(), exit_code::BAD_INPUT, "{error}");
            // The parser names the copy that it read.
            let work = self.folder.path().join("work/headers/model.gguf").display().to_string();
            error.to_string().replace(&work, &self.model().join("m.gguf").display().to_string())
        });
        assert!(whole.contains(part), "{part}: {whole}");
        assert_eq!(outline, whole);
    }
}

/// Bytes that the files below a folder take on the disk.
fn room(folder: &Path) -> u64 {
    let files = walkdir::WalkDir::new(folder).into_iter().map(|entry| entry.unwrap().metadata().unwrap());
    files.filter(fs::Metadata::is_file).map(|file| file.blocks() * 512).sum()
}

/// A model whose weights take some megabytes, and the divisors that its configuration holds lie behind them.
fn large() -> Contents {
    const WIDE: usize = 1 << 16;
    let mut metadata: Vec<_> = metadata().into_iter().filter(|(key, _)| *key != "llama.feed_forward_length").collect();
    metadata.push(("llama.feed_forward_length", Metadata::U32(WIDE as u32)));
    metadata.push(("llama.rope.scaling.original_context_length", Metadata::U32(16)));
    let widened = |length: usize| if length == 64 { WIDE } else { length };
    let mut tensors = tensors();
    tensors.iter_mut().flat_map(|(_, shape)| shape).for_each(|length| *length = widened(*length));
    tensors.extend([("rope_factors_long.weight", vec![4]), ("rope_factors_short.weight", vec![4])]);
    (metadata, tensors)
}

#[test]
fn the_header_of_a_gguf_file_tells_the_same_as_the_whole() {
    let bench = Bench::new();
    for name in ["llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3"] {
        bench.check_same(&fs::read(fixture(&format!("{name}.gguf"))).unwrap());
    }
}

#[test]
fn a_large_gguf_file_takes_no_more_room_than_its_header() {
    let (mut metadata, tensors) = large();
    for template_bytes in [10, 3 << 20] {
        let template = Metadata::String("x".repeat(template_bytes));
        metadata.push(("tokenizer.chat_template", template));
        let (bench, bytes) = (Bench::new(), gguf(&metadata, &tensors));
        assert!(bytes.len() > 3 << 20);
        bench.bring(&bytes, Keep::Headers).unwrap();
        let room = room(&bench.folder.path().join("work"));
        assert!(room < 2 * template_bytes as u64 + (1 << 19), "{room}");
        bench.check_same(&bytes);
        metadata.pop();
    }
}

#[test]
fn a_gguf_file_that_was_cut_short_is_refused_by_its_header_too() {
    let bench = Bench::new();
    let small = fs::read(fixture("llama.gguf")).unwrap();
    for length in (1..small.len()).step_by(small.len() / 25) {
        bench.check_refused(&small[..length], "download it again");
    }
    bench.check_refused(&[], "is empty");
    bench.check_refused(b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull");
    bench.check_refused(&vec![7; 3 << 20], "unknown magic");
    let (metadata, tensors) = large();
    let large = gguf(&metadata, &tensors);
    // The divisors, which come last, are read first; behind them are 16 bytes that fill up.
    for length in [large.len() - 17, large.len() - 1000, large.len() / 2] {
        bench.check_refused(&large[..length], "remaining in file; download it again");
    }
}

#[test]
fn values_that_are_not_finite_are_found_as_a_gguf_file_goes_by() {
    let bench = Bench::new();
    let content =
        |bytes: &[u8]| candle_core::quantized::gguf_file::Content::read(&mut std::io::Cursor::new(bytes)).unwrap();
    // F32, and the scale of a block of Q4_1; the last goes by when the header is known.
    for (name, own, (metadata, tensors)) in [
        ("output_norm.weight", "model.norm.weight", (metadata(), tensors())),
        ("blk.0.ffn_down.weight", "model.layers.0.mlp.down_proj.weight", (metadata(), tensors())),
        ("blk.0.ffn_down.weight", "model.layers.0.mlp.down_proj.weight", large()),
    ] {
        let mut bytes = gguf(&metadata, &tensors);
        let content = content(&bytes);
        let info = &content.tensor_infos[name];
        let start = (content.tensor_data_offset + info.offset) as usize;
        let blocks = info.shape.elem_count() / info.ggml_dtype.block_size();
        for block in [0, blocks - 1].map(|i| start + i * info.ggml_dtype.type_size()) {
            let sound = bytes[block..block + 4].to_vec();
            bytes[block..block + 4].copy_from_slice(&[0, 0x7c, 0x80, 0x7f]);
            bench.check_refused(&bytes, &format!("NaN or infinite values in {own}: "));
            bytes[block..block + 4].copy_from_slice(&sound);
        }
    }
}

#[test]
fn other_defects_of_a_gguf_file_are_told_in_the_same_words() {
    let bench = Bench::new();
    let with = |key: &'static str, value: Metadata| {
        let others = metadata().into_iter().filter(|(name, _)| *name != key).collect::<Vec<_>>();
        [others, vec![(key, value)]].concat()
    };
    let text = |text: &str| Metadata::String(text.into());
    for (bytes, part) in [
        (gguf(&with("general.architecture", text("mamba")), &tensors()), "\"mamba\""),
        (gguf(&with("split.count", Metadata::U16(3)), &tensors()), "llama-gguf-split --merge"),
        (gguf(&with("general.type", text("adapter")), &tensors()), "name its base model"),
        (gguf(&metadata(), &tensors()[1..]), "no tensor `token_embd.weight`"),
        (gguf(&metadata(), &[]), "a vocabulary at most"),
        (gguf(&with("llama.feed_forward_length", Metadata::U32(96)), &tensors()), "has shape [64, 32]"),
    ] {
        bench.check_refused(&bytes, part);
    }
    let mut unknown = gguf(&metadata(), &tensors());
    let name = b"blk.0.ffn_up.weight";
    let at = unknown.windows(name.len()).position(|window| window == name).unwrap() + name.len() + 4 + 2 * 8;
    for (kind, part) in [(23u32, "a tensor's type is none of F32"), (9, "not supported yet")] {
        unknown[at..at + 4].copy_from_slice(&kind.to_le_bytes());
        bench.check_refused(&unknown, part);
    }
}
