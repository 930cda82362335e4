//! JSON files that other programs wrote: a byte order mark may come first.

use std::{fs, path::Path};

use serde_json::Value;

/// The JSON text of a file. A byte order mark before it is skipped, as some editors of Windows write it.
pub(crate) fn read_json(path: &Path) -> Result<Value, String> {
    json(&fs::read(path).map_err(|error| format!("can't be read: {error}"))?)
}

/// The same of its bytes.
pub(crate) fn json(bytes: &[u8]) -> Result<Value, String> {
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    serde_json::from_slice(bytes).map_err(|error| format!("not valid JSON: {error}"))
}
