//! `merge`: puts an adapter into its base model, as a Hugging Face folder that needs no PEFT.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, BufWriter, Write},
    path::Path,
};

use tunesmith_engine::Model;

use crate::{
    adapter::{chat_template, fetch_adapter},
    convert::sibling,
    error::Error,
    generate::uri,
    json_file::read_json,
    layout::MANIFEST,
    model::ModelFolder,
    publish::{ModelFiles, base_files, full_model, put_template},
    store::{StoreError, Stores},
    tensors::TensorFile,
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
    let was_quantized = was_quantized(&adapter)?;

    let unusable = |problem: String| Error::Input(format!("config.json of {}: {problem}", base.display()));
    let mut config = read_json(&base.join("config.json")).map_err(unusable)?;
    // What is written is quantized no more.
    config.as_object_mut().and_then(|config| config.remove("quantization_config"));
    let merged = model.merged();
    let ModelFiles { shards, others: mut files } =
        full_model(&merged, config.to_string().as_bytes(), bf16).map_err(unusable)?;
    files.extend(base_files(&base)?);
    if let Some(template) = chat_template(&adapter)? {
        put_template(&mut files, template);
    }
    // Beside its place first, so that nothing half-written has the name.
    let part = sibling(out);
    let written = write(&part, &shards, &files).and_then(|()| fs::rename(&part, out).map_err(disk(out)));
    if written.is_err() {
        // The error says more than that of a failed clean-up would.
        let _ = fs::remove_dir_all(&part);
    }
    written?;
    Ok(if is_quantized {
        Some(
            "the base is quantized: what its weights have lost, the merged ones lack too; the original base has it still",
        )
    } else if was_quantized {
        Some(
            "the adapter was trained over a quantized base: merged into the unquantized one, its answers differ a little",
        )
    } else {
        None
    })
}

fn disk(path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| StoreError::Disk { path, source }.into()
}

/// Writes all files into a new folder.
fn write(folder: &Path, shards: &[TensorFile<'_>], files: &BTreeMap<String, Vec<u8>>) -> Result<(), Error> {
    folder.parent().map_or(Ok(()), fs::create_dir_all).map_err(disk(folder))?;
    if folder.exists() {
        // Of a process with this one's number, that was killed.
        fs::remove_dir_all(folder).map_err(disk(folder))?;
    }
    fs::create_dir(folder).map_err(disk(folder))?;
    for shard in shards {
        let path = folder.join(&shard.name);
        let file = File::create(&path).map_err(disk(&path))?;
        let mut file = BufWriter::new(file);
        shard.write(&mut file).and_then(|()| file.flush()).map_err(disk(&path))?;
    }
    for (name, bytes) in files {
        let path = folder.join(name);
        path.parent().map_or(Ok(()), fs::create_dir_all).map_err(disk(&path))?;
        fs::write(&path, bytes).map_err(disk(&path))?;
    }
    Ok(())
}

/// Whether the manifest beside the adapter, if there is one, says that its base was quantized.
fn was_quantized(adapter: &Path) -> Result<bool, Error> {
    let path = adapter.join(MANIFEST);
    if !path.exists() {
        return Ok(false);
    }
    let manifest = read_json(&path).map_err(|problem| Error::Input(format!("{}: {problem}", path.display())))?;
    Ok(manifest["method"] == "QLoRA")
}
