//! `merge`: puts an adapter into its base model, as a Hugging Face folder that needs no PEFT.

use std::{
    fs::{self, File},
    io::{BufWriter, Write},
    path::Path,
};

use serde_json::Value;
use tunesmith_engine::Model;

use crate::{
    error::Error,
    generate::{chat_template, fetch_adapter, uri},
    model::ModelFolder,
    publish::{BASE_FILES, CHAT_TEMPLATE, MANIFEST, ModelFiles, full_model},
    store::{StoreError, Stores},
};

/// Merges and writes the folder, which must not exist; `bf16` rounds the weights to it. The result says what to know
/// about it, if anything.
///
/// # Errors
/// A file is missing, model and adapter don't fit, or the folder can't be written.
pub fn merge(
    model: &str,
    adapter: &str,
    out: &Path,
    bf16: bool,
    stores: &Stores,
    work: &Path,
) -> Result<Option<&'static str>, Error> {
    if out.exists() {
        return Err(Error::Spec(format!("{} exists: name a folder that does not, or remove it", out.display())));
    }
    let base = ModelFolder::fetch(&uri(model)?, stores, &work.join("model"))?.folder;
    let adapter = fetch_adapter(&uri(adapter)?, stores, &work.join("adapter"))?;
    let mut model = Model::load(&base)?;
    model.load_adapter(&adapter)?;
    let is_quantized = model.config().stored_as.is_some();

    let mut config: Value = read(&base.join("config.json")).and_then(|bytes| {
        serde_json::from_slice(&bytes).map_err(|error| Error::Input(format!("config.json is no JSON: {error}")))
    })?;
    // What is written is quantized no more.
    config.as_object_mut().and_then(|config| config.remove("quantization_config"));
    let merged = model.merged();
    let ModelFiles { shards, others: mut files } = full_model(&merged, config.to_string().as_bytes(), bf16);
    for name in BASE_FILES {
        let path = base.join(name);
        if path.exists() {
            files.insert(name.into(), read(&path)?);
        }
    }
    files.extend(chat_template(&adapter).map(|template| (CHAT_TEMPLATE.into(), template.into_bytes())));
    // Beside its place first, so that nothing half-written has the name.
    let part = out.with_extension("part");
    let disk = |path: &Path| {
        let path = path.to_owned();
        move |source| Error::from(StoreError::Disk { path, source })
    };
    fs::create_dir_all(&part).map_err(disk(&part))?;
    for shard in shards {
        let path = part.join(&shard.name);
        let file = File::create(&path).map_err(disk(&path))?;
        let mut file = BufWriter::new(file);
        shard.write(&mut file).and_then(|()| file.flush()).map_err(disk(&path))?;
    }
    for (name, bytes) in files {
        let path = part.join(name);
        fs::write(&path, bytes).map_err(disk(&path))?;
    }
    fs::rename(&part, out).map_err(disk(out))?;
    Ok(if is_quantized {
        Some(
            "the base is quantized: what its weights have lost, the merged ones lack too; the original base has it still",
        )
    } else if was_quantized(&adapter) {
        Some(
            "the adapter was trained over a quantized base: merged into the unquantized one, its answers differ a little",
        )
    } else {
        None
    })
}

fn read(path: &Path) -> Result<Vec<u8>, Error> {
    fs::read(path).map_err(|source| StoreError::Disk { path: path.to_owned(), source }.into())
}

/// Whether the manifest beside the adapter says that its base was quantized.
fn was_quantized(adapter: &Path) -> bool {
    let manifest = fs::read(adapter.join(MANIFEST)).ok();
    let manifest: Option<Value> = manifest.and_then(|bytes| serde_json::from_slice(&bytes).ok());
    manifest.is_some_and(|manifest| manifest["method"] == "QLoRA")
}
