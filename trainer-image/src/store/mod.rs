//! Objects in S3 and in folders, behind one type: a [`Location`] is a URI that was opened for a [`Role`].
//!
//! Calls block: the trainer's work is one thread, and neither a signal nor an HTTP request waits for it.

mod disk;
mod error;
mod glob;
mod listing;
mod location;
mod s3;
mod settings;
#[cfg(test)]
mod tests;

use std::{
    collections::BTreeMap,
    fmt, fs, io,
    path::{Component, Path as FilePath, PathBuf, absolute},
    sync::Arc,
};

pub(crate) use disk::is_final;
pub use error::StoreError;
pub use glob::{Object, Pattern};
pub use location::{Created, Location};
use object_store::{ObjectStore, local::LocalFileSystem, path::Path};
pub use settings::HubSettings;
use tokio::runtime::Handle;
use tunesmith_crds::{
    Uri,
    names::{CLAIMS_DIR, env_prefix},
};

/// What a store is used for; each role has credentials of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// Reads the base model.
    Model,
    /// Reads the data set.
    Dataset,
    /// Reads and writes artifacts and checkpoints.
    Output,
}

impl Role {
    /// What the names of this role's environment variables begin with.
    pub fn env_prefix(self) -> &'static str {
        match self {
            Self::Model => env_prefix::MODEL,
            Self::Dataset => env_prefix::DATASET,
            Self::Output => env_prefix::OUTPUT,
        }
    }

    /// The field of the job that names this role's Secret.
    pub fn secret_field(self) -> &'static str {
        match self {
            Self::Model => "baseModel.secretRef (or else output.secretRef)",
            Self::Dataset => "dataset.secretRef (or else output.secretRef)",
            Self::Output => "output.secretRef",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Model => "base model",
            Self::Dataset => "dataset",
            Self::Output => "output",
        })
    }
}

/// Environment variables by name.
type Environment = BTreeMap<String, String>;

/// Opens URIs with the credentials of this process.
#[derive(Clone)]
pub struct Stores {
    runtime: Handle,
    environment: Arc<Environment>,
    /// Stands in for S3 where the environment names no S3.
    local: Option<PathBuf>,
}

impl Stores {
    /// Stores as the environment says: what a pod uses.
    pub fn from_environment(runtime: Handle) -> Self {
        // A value that is not UTF-8 is kept, to be refused by name if it is needed.
        let environment = std::env::vars_os()
            .filter_map(|(key, value)| Some((key.into_string().ok()?, value.to_string_lossy().into_owned())))
            .collect();
        Self { runtime, environment: Arc::new(environment), local: None }
    }

    #[cfg(test)]
    pub(crate) fn with_variable(mut self, name: &str, value: &str) -> Self {
        Arc::make_mut(&mut self.environment).insert(name.into(), value.into());
        self
    }

    /// The same; but where the environment has neither credentials nor an endpoint, `s3://bucket/key` is
    /// `<folder>/bucket/key`.
    pub fn or_local(self, folder: &FilePath) -> Self {
        let local = (!settings::is_configured(&self.environment)).then(|| folder.to_owned());
        if let (Some(name), Some(_)) = (settings::profile(&self.environment), &local) {
            tracing::warn!("{name} is not read here: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY to use S3");
        }
        Self { local, ..self }
    }

    /// The folder that stands in for S3, if one does.
    pub fn local_folder(&self) -> Option<&FilePath> {
        self.local.as_deref()
    }

    /// Opens an object or a folder. Nothing is read yet.
    ///
    /// # Errors
    /// The environment's settings or the path can't be used.
    pub fn open(&self, role: Role, uri: &Uri) -> Result<Location, StoreError> {
        self.connect(role, uri).map_err(|problem| StoreError::Settings { role, uri: uri.clone(), problem })
    }

    /// The settings of the Hugging Face Hub's clients (`HF_…`) for a role.
    ///
    /// # Errors
    /// One of them can't be used.
    pub fn hub_settings(&self, role: Role, uri: &Uri) -> Result<HubSettings, StoreError> {
        HubSettings::of_role(&self.environment, role).map_err(|problem| {
            let (field, prefix) = (role.secret_field(), role.env_prefix());
            let advice = format!("correct the HF_… keys of the Secret that {field} names, or the environment");
            let problem = format!("{problem}; {advice} ({prefix}HF_…, HF_…)");
            StoreError::Settings { role, uri: uri.clone(), problem }
        })
    }

    /// Text without this process's credentials.
    pub fn redact(&self, text: &str) -> String {
        settings::redact(text, &settings::secrets(&self.environment))
    }

    fn connect(&self, role: Role, uri: &Uri) -> Result<Location, String> {
        let on_disk = match (uri, &self.local) {
            (Uri::File { path }, _) => resolved(path),
            (Uri::Claim { claim, path }, _) => {
                let volume = FilePath::new(CLAIMS_DIR).join(claim);
                if !volume.exists() {
                    return Err("no such claim is mounted here: pvc:// is read in a cluster's pods".into());
                }
                resolved(volume.join(path))
            }
            (Uri::Hub { .. }, _) => return Err("hf://owner/name is a base model, nothing else".into()),
            (Uri::HubDataset { .. }, _) => return Err("hf://datasets/ holds rows for training, nothing else".into()),
            (Uri::S3 { bucket, key }, Some(folder)) => resolved(folder.join(bucket).join(key)),
            (Uri::S3 { bucket, key }, None) => {
                let store: Arc<dyn ObjectStore> = Arc::new(s3::connect(&self.environment, role, bucket)?);
                let path = listing::path_of_key(key)?;
                return Ok(self.location(role, uri, store, path, None));
            }
        };
        let on_disk = on_disk.map_err(|error| error.to_string())?;
        let path = Path::from_absolute_path(&on_disk).map_err(|error| error.to_string())?;
        Ok(self.location(role, uri, Arc::new(LocalFileSystem::new().with_automatic_cleanup(true)), path, Some(on_disk)))
    }

    fn location(
        &self,
        role: Role,
        uri: &Uri,
        store: Arc<dyn ObjectStore>,
        path: Path,
        on_disk: Option<PathBuf>,
    ) -> Location {
        let secrets = settings::secrets(&self.environment).into();
        Location { runtime: self.runtime.clone(), store, path, uri: uri.clone(), role, on_disk, secrets }
    }
}

/// An absolute path without `..`, where a link's parent is that of what it points to.
fn resolved(path: impl AsRef<FilePath>) -> io::Result<PathBuf> {
    let mut resolved = PathBuf::new();
    for part in absolute(path)?.components() {
        match part {
            Component::ParentDir => {
                resolved = fs::canonicalize(&resolved).unwrap_or(resolved);
                resolved.pop();
            }
            part => resolved.push(part),
        }
    }
    Ok(resolved)
}
