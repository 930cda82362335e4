//! An adapter's folder: its files brought to this machine, and what to say where they are not there.

use std::{
    collections::BTreeSet,
    fs, io,
    path::{Path, PathBuf},
};

use tunesmith_crds::Uri;

use crate::{
    error::Error,
    layout::{CHAT_TEMPLATE, MANIFEST},
    model::check_whole,
    store::{Location, Role, StoreError, Stores},
};

/// What the engine reads of an adapter.
const FILES: [&str; 2] = ["adapter_config.json", "adapter_model.safetensors"];
/// What an adapter may have besides.
const OPTIONAL: [&str; 2] = [CHAT_TEMPLATE, MANIFEST];

/// An adapter's files on disk; what has to be downloaded goes into `work`.
///
/// # Errors
/// A file is missing, empty or none; what lies there instead tells what to do.
pub(crate) fn fetch_adapter(uri: &Uri, stores: &Stores, work: &Path) -> Result<PathBuf, Error> {
    let location = stores.open(Role::Output, uri)?;
    if location.on_disk().is_some_and(Path::is_file) {
        return Err(Error::Input(format!("{uri} (adapter) is a file: name the folder that holds it")));
    }
    let present: BTreeSet<String> = location.list()?.into_iter().collect();
    if let Some(missing) = FILES.into_iter().find(|name| !present.contains(*name)) {
        return Err(Error::Input(format!("{uri} (adapter) has no {missing}{}", hint(missing, &present))));
    }
    let folder = match location.on_disk() {
        Some(folder) => folder.to_owned(),
        None => {
            for name in FILES {
                location.join(name).download(&work.join(name))?;
            }
            OPTIONAL.iter().try_for_each(|name| bring(name, present.contains(*name), &location.join(name), work))?;
            work.to_owned()
        }
    };
    for name in FILES {
        let whole = check_whole(&folder.join(name));
        whole.map_err(|problem| Error::Input(format!("{} (adapter): {problem}", uri.join(name))))?;
    }
    Ok(folder)
}

/// Downloads a small file, or removes that of another adapter from the folder.
fn bring(name: &str, is_there: bool, from: &Location, work: &Path) -> Result<(), Error> {
    let path = work.join(name);
    let done = match is_there {
        true => fs::write(&path, from.read()?),
        false => fs::remove_file(&path).or_else(|error| match error.kind() {
            io::ErrorKind::NotFound => Ok(()),
            _ => Err(error),
        }),
    };
    done.map_err(|source| StoreError::Disk { path, source }.into())
}

/// What to tell the owner of a folder in which `missing` is missing.
fn hint(missing: &str, present: &BTreeSet<String>) -> String {
    let has = |name: &str| present.contains(name);
    let deeper = present.iter().find_map(|name| name.strip_suffix(missing)?.strip_suffix('/'));
    let ends = |end: &str| present.iter().any(|name| name.to_ascii_lowercase().ends_with(end));
    match () {
        () if present.is_empty() => ": nothing is there".into(),
        () if has("adapter_model.bin") => {
            ", but adapter_model.bin, which is pickled: load the adapter with PEFT and save it \
                                           with save_pretrained, which writes safetensors"
                .into()
        }
        () if has("config.json") => {
            ", but config.json: it is a whole model. Name it as the model, without an adapter".into()
        }
        () if ends(".gguf") => ", but a GGUF file: adapters are read in PEFT's format only".into(),
        () => match deeper {
            Some(folder) => format!(", but {folder}/ in it does: name that folder"),
            None => format!(": name the folder that holds {} and {}, such as …/v1", FILES[0], FILES[1]),
        },
    }
}

/// The chat template that an adapter was trained with, if it has one of its own.
pub(crate) fn chat_template(adapter: &Path) -> Result<Option<String>, Error> {
    let path = adapter.join(CHAT_TEMPLATE);
    match fs::read_to_string(&path) {
        Ok(template) => Ok(Some(template)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        // What the adapter was trained with is not what the base model has.
        Err(error) => Err(Error::Input(format!("{} of the adapter can't be read: {error}", path.display()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::generate::uri;

    /// What is said of a folder with such files.
    fn refusal(files: &[(&str, &str)]) -> String {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in files {
            fs::create_dir_all(folder.path().join(name).parent().unwrap()).unwrap();
            fs::write(folder.path().join(name), text).unwrap();
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let stores = Stores::from_environment(runtime.handle().clone());
        let place = uri(folder.path().to_str().unwrap()).unwrap();
        let error = fetch_adapter(&place, &stores, folder.path()).err().unwrap();
        assert_eq!(error.exit_code(), tunesmith_crds::names::exit_code::BAD_INPUT, "{error}");
        error.to_string().replace(&place.to_string(), "ADAPTER")
    }

    #[test]
    fn a_folder_that_is_no_adapter_says_what_it_is() {
        const CONFIG: (&str, &str) = ("adapter_config.json", "{}");
        for (files, expected) in [
            (&[][..], "ADAPTER (adapter) has no adapter_config.json: nothing is there"),
            (
                &[CONFIG, ("adapter_model.bin", "x")],
                "no adapter_model.safetensors, but adapter_model.bin, which is pickled",
            ),
            (&[("config.json", "{}")], "but config.json: it is a whole model"),
            (&[("lora.GGUF", "x")], "but a GGUF file"),
            (&[("v2/adapter_config.json", "{}")], "but v2/ in it does"),
            (&[CONFIG], "has no adapter_model.safetensors: name the folder that holds"),
            (&[CONFIG, ("adapter_model.safetensors", "")], "ADAPTER/adapter_model.safetensors (adapter): is empty"),
            (
                &[CONFIG, ("adapter_model.safetensors", "version https://git-lfs.github.com/spec/v1\noid")],
                "ADAPTER/adapter_model.safetensors (adapter): is git-lfs' pointer",
            ),
        ] {
            let refusal = refusal(files);
            assert!(refusal.contains(expected), "{refusal}");
        }
    }
}
