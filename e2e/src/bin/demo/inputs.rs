//! The base model and the data, put where the job looks for them.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use anyhow::{Context, Result};
use object_store::ObjectStoreExt;
use object_store::aws::AmazonS3;
use object_store::buffered::BufWriter;
use object_store::path::Path as Key;
use serde_json::Value;
use tokio::io::AsyncWriteExt;
use tunesmith_e2e::{Step, cache, model, programs_folder, repository, run};

use crate::target::Target;

const MODEL: &str = "smollm2-135m-instruct";
const DATA: &str = "telecom-support";
/// The part size of an upload.
const BUFFER: usize = 16 << 20;

/// What the demo trains with, as it lies on this machine.
pub(crate) struct Inputs {
    /// The base model's folder.
    pub(crate) model: PathBuf,
    /// What the system turn of every row says.
    pub(crate) system: String,
}

/// Fetches and converts the model, and uploads it with the data.
pub(crate) async fn provide(target: &Target) -> Result<Inputs> {
    let model = converted(target, &model::fetch()?)?;
    let data = repository().join("examples").join(DATA);

    let step = Step::start("model and data in S3");
    let models = target.s3.bucket("models")?;
    let datasets = target.s3.bucket("datasets")?;
    let mut uploaded = 0;
    for file in files(&model, "")? {
        uploaded += usize::from(upload(&models, MODEL, &file).await?);
    }
    for file in files(&data, ".jsonl")? {
        uploaded += usize::from(upload(&datasets, DATA, &file).await?);
    }
    match uploaded {
        0 => step.skipped("already there"),
        _ => step.done(),
    }
    Ok(Inputs { model, system: system_turn(&data.join("train.jsonl"))? })
}

/// The system turn of the first row.
fn system_turn(rows: &Path) -> Result<String> {
    let rows = fs::read_to_string(rows).with_context(|| format!("cannot read {}", rows.display()))?;
    let row: Value = serde_json::from_str(rows.lines().next().unwrap_or_default())?;
    Ok(row["messages"][0]["content"].as_str().context("the first row has no system turn")?.to_owned())
}

/// The model's Hugging Face folder, converted again when the GGUF or the trainer is newer.
fn converted(target: &Target, gguf: &Path) -> Result<PathBuf> {
    let folder = cache()?.join("converted").join(MODEL);
    let step = Step::start("model.safetensors, config.json, tokenizer.json");
    let trainer = programs_folder().join("tunesmith-trainer");
    let made = modified(&folder.join("model.safetensors"));
    if made.is_ok_and(|made| [gguf, &trainer].iter().all(|input| modified(input).is_ok_and(|time| time < made))) {
        step.skipped("already converted");
        return Ok(folder);
    }
    let unfinished = folder.with_extension("tmp");
    for old in [&folder, &unfinished] {
        if old.exists() {
            fs::remove_dir_all(old)?;
        }
    }
    fs::create_dir_all(folder.parent().context("it has a parent")?)?;
    run(target.trainer().arg("convert").arg(gguf).arg("--out").arg(&unfinished))?;
    fs::rename(&unfinished, &folder)?;
    step.done();
    Ok(folder)
}

/// Puts a file into `bucket/prefix/`, unless what is there has its size and is newer. Says whether it did.
async fn upload(bucket: &AmazonS3, prefix: &str, file: &Path) -> Result<bool> {
    let name = file.file_name().context("a file has a name")?.to_string_lossy();
    let key = Key::from(format!("{prefix}/{name}"));
    let local = fs::metadata(file)?;
    match bucket.head(&key).await {
        Ok(there) if there.size == local.len() && SystemTime::from(there.last_modified) > local.modified()? => {
            return Ok(false);
        }
        Ok(_) | Err(object_store::Error::NotFound { .. }) => {}
        Err(error) => return Err(error).context("the S3 store refuses to be read"),
    }
    let mut writer = BufWriter::with_capacity(Arc::new(bucket.clone()), key.clone(), BUFFER);
    let mut reader = tokio::fs::File::open(file).await?;
    tokio::io::copy(&mut reader, &mut writer).await.with_context(|| format!("cannot upload {key}"))?;
    writer.shutdown().await.with_context(|| format!("cannot upload {key}"))?;
    Ok(true)
}

fn files(folder: &Path, ending: &str) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let mut files: Vec<_> = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.is_file() && path.to_string_lossy().ends_with(ending))
        .collect();
    files.sort();
    Ok(files)
}

fn modified(file: &Path) -> Result<SystemTime> {
    Ok(fs::metadata(file)?.modified()?)
}
