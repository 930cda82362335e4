//! `claim.json`: whose a version's folder is. It is created before any other file, if there is none, and stays: two runs
//! never write to one folder, whichever job, namespace or cluster they are of.

use std::fmt;

use serde::{Deserialize, Serialize};
use tunesmith_crds::run::{JobRef, RunSpec, TrainTask};

use super::PublishError;
use crate::{
    layout::CLAIM,
    store::{Location, StoreError},
};

/// The run that a version's folder belongs to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Claim {
    /// Name of the cluster, if it was given one.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    cluster: String,
    namespace: String,
    job: String,
    uid: String,
    run: u32,
    input_digest: String,
}

impl Claim {
    /// The claim of a run.
    pub fn of(spec: &RunSpec, task: &TrainTask) -> Self {
        let JobRef { namespace, name, uid, run, .. } = spec.job.clone();
        let (cluster, input_digest) = (task.cluster.clone(), task.input_digest.clone());
        Self { cluster, namespace, job: name, uid, run, input_digest }
    }

    /// Lays the claim on a version's folder, or finds it there: an earlier attempt of the same run has laid it.
    ///
    /// # Errors
    /// The folder is another run's, or the store fails.
    pub(crate) fn lay(&self, folder: &Location) -> Result<(), PublishError> {
        let json = serde_json::to_value(self).unwrap_or_default();
        // What counts is what is there afterwards: an answer may have been lost on the way.
        folder.join(CLAIM).create(format!("{json:#}\n").into_bytes())?;
        self.check(folder)
    }

    /// Whether a version's folder is this run's, or still nobody's.
    ///
    /// # Errors
    /// The folder is another run's, or the store fails.
    pub(crate) fn check(&self, folder: &Location) -> Result<(), PublishError> {
        match Self::read(folder)? {
            Some(Ok(owner)) if owner != *self => Err(self.taken(folder, owner.to_string())),
            Some(Err(problem)) => Err(self.taken(folder, format!("a run whose claim can't be read ({problem})"))),
            Some(Ok(_)) | None => Ok(()),
        }
    }

    /// Whether this run has laid its claim on a version's folder.
    ///
    /// # Errors
    /// The store fails.
    pub(crate) fn holds(&self, folder: &Location) -> Result<bool, StoreError> {
        Ok(matches!(Self::read(folder)?, Some(Ok(owner)) if owner == *self))
    }

    /// What claims a version's folder.
    fn read(folder: &Location) -> Result<Option<Result<Self, serde_json::Error>>, StoreError> {
        let bytes = folder.join(CLAIM).read_if_exists()?;
        Ok(bytes.map(|bytes| serde_json::from_slice(&bytes)))
    }

    fn taken(&self, folder: &Location, owner: String) -> PublishError {
        PublishError::Taken { uri: Box::new(folder.uri().clone()), owner }
    }
}

impl fmt::Display for Claim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { cluster, namespace, job, run, .. } = self;
        let namespace = if namespace.is_empty() { String::new() } else { format!("{namespace}/") };
        write!(f, "run {run} of {namespace}{job}")?;
        if cluster.is_empty() { Ok(()) } else { write!(f, " in cluster {cluster}") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{Role, Stores};

    fn claim(namespace: &str, run: u32) -> Claim {
        Claim {
            cluster: "prod".into(),
            namespace: namespace.into(),
            job: "support".into(),
            uid: format!("uid-{namespace}"),
            run,
            input_digest: "sha256:x".into(),
        }
    }

    #[test]
    fn the_first_run_has_the_folder_and_keeps_it() {
        let desk = tempfile::tempdir().unwrap();
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let stores = Stores::from_environment(runtime.handle().clone()).or_local(desk.path());
        let folder = stores.open(Role::Output, &"s3://adapters/support/v1".parse().unwrap()).unwrap();
        let (dev, prod) = (claim("dev", 1), claim("prod", 1));
        dev.check(&folder).unwrap();
        dev.lay(&folder).unwrap();
        dev.lay(&folder).unwrap();
        for other in [prod, claim("dev", 2)] {
            let error = other.lay(&folder).unwrap_err().to_string();
            assert!(
                error.contains("s3://adapters/support/v1") && error.contains("run 1 of dev/support in cluster prod")
            );
        }
        folder.join(CLAIM).write("{").unwrap();
        assert!(dev.lay(&folder).unwrap_err().to_string().contains("can't be read"));
    }
}
