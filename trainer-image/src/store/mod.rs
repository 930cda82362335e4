//! Objects in object stores and in folders, behind one type: a [`Location`] is a URI that was opened for a [`Role`].
//!
//! Calls block: the trainer's work is one thread, and neither a signal nor an HTTP request waits for it.

mod azure;
mod client;
mod disk;
mod error;
mod glob;
mod google;
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

pub use error::StoreError;
pub(crate) use error::is_final;
pub use glob::{Object, Pattern};
pub use location::{Created, Location};
use object_store::{ObjectStore, local::LocalFileSystem, path::Path};
pub use settings::HubSettings;
use tokio::runtime::Handle;
use tunesmith_crds::{
    Cloud, Uri,
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
    /// Reads the version that is copied.
    Copied,
}

impl Role {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Model, Self::Dataset, Self::Output, Self::Copied];

    /// What the names of this role's environment variables begin with.
    pub fn env_prefix(self) -> &'static str {
        match self {
            Self::Model => env_prefix::MODEL,
            Self::Dataset => env_prefix::DATASET,
            Self::Output => env_prefix::OUTPUT,
            Self::Copied => env_prefix::COPIED,
        }
    }

    /// The field of the job that names this role's Secret.
    pub fn secret_field(self) -> &'static str {
        match self {
            Self::Model => "baseModel.secretRef (or else output.secretRef)",
            Self::Dataset => "dataset.secretRef (or else output.secretRef)",
            Self::Output => "output.secretRef",
            Self::Copied => "artifact.secretRef of the AdapterVersion that is copied",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Model => "base model",
            Self::Dataset => "dataset",
            Self::Output => "output",
            Self::Copied => "copied version",
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
    /// Stands in for the object stores that the environment does not name.
    local: Option<PathBuf>,
}

impl Stores {
    /// Stores as the environment says: what a pod uses.
    pub fn from_environment(runtime: Handle) -> Self {
        // A value that is not UTF-8 is kept, to be refused by name if it is needed.
        let variables = std::env::vars_os()
            .filter_map(|(key, value)| Some((key.into_string().ok()?, value.to_string_lossy().into_owned())));
        Self::from_variables(runtime, variables)
    }

    /// Stores as these variables say, and none of the environment.
    pub fn from_variables(runtime: Handle, variables: impl IntoIterator<Item = (String, String)>) -> Self {
        Self { runtime, environment: Arc::new(variables.into_iter().collect()), local: None }
    }

    #[cfg(test)]
    pub(crate) fn with_variable(mut self, name: &str, value: &str) -> Self {
        Arc::make_mut(&mut self.environment).insert(name.into(), value.into());
        self
    }

    /// The same; but where the environment has neither credentials nor an endpoint for a kind of store, its bucket is
    /// `<folder>/bucket`.
    pub fn or_local(self, folder: &FilePath) -> Self {
        if let (Some(name), false) =
            (settings::profile(&self.environment), settings::is_configured(&self.environment, Cloud::S3))
        {
            tracing::warn!("{name} is not read here: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY to use S3");
        }
        Self { local: Some(folder.to_owned()), ..self }
    }

    /// The folder that stands in for a kind of store, if one does.
    pub fn local_folder(&self, cloud: Cloud) -> Option<&FilePath> {
        self.local.as_deref().filter(|_| !settings::is_configured(&self.environment, cloud))
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
        let on_disk = match uri {
            Uri::File { path } => resolved(path),
            Uri::Claim { claim, path } => {
                let volume = FilePath::new(CLAIMS_DIR).join(claim);
                if !volume.exists() {
                    return Err("no such claim is mounted here: pvc:// is read in a cluster's pods".into());
                }
                resolved(volume.join(path))
            }
            Uri::Hub { .. } => return Err("hf://owner/name is a base model, nothing else".into()),
            Uri::HubDataset { .. } => return Err("hf://datasets/ holds rows for training, nothing else".into()),
            Uri::Bucket { cloud, bucket, key } => match self.local_folder(*cloud) {
                Some(folder) => resolved(folder.join(bucket).join(key)),
                None => {
                    let path = listing::path_of_key(key)?;
                    return Ok(self.location(role, uri, self.bucket(role, *cloud, bucket)?, path, None));
                }
            },
        };
        let on_disk = on_disk.map_err(|error| error.to_string())?;
        let path = Path::from_absolute_path(&on_disk).map_err(|error| error.to_string())?;
        Ok(self.location(role, uri, Arc::new(LocalFileSystem::new().with_automatic_cleanup(true)), path, Some(on_disk)))
    }

    fn bucket(&self, role: Role, cloud: Cloud, bucket: &str) -> Result<Arc<dyn ObjectStore>, String> {
        Ok(match cloud {
            Cloud::S3 => Arc::new(s3::connect(&self.environment, role, bucket)?),
            Cloud::Google => Arc::new(google::connect(&self.environment, role, bucket)?),
            Cloud::Azure => Arc::new(azure::connect(&self.environment, role, bucket)?),
        })
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
