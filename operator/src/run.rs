//! One run, as its record and its Job show it.

use k8s_openapi::jiff::Timestamp;
use tunesmith_crds::{FineTuneRunSpec, FineTuneRunStatus, run::LiveProgress};

use crate::{admission::Refusal, workload::TrainerJob};

/// One run, as its record and its Job show it.
#[derive(Clone, Debug, PartialEq)]
pub struct Run {
    /// The record's name, UID and resourceVersion.
    pub object: Object,
    /// When it began.
    pub created: Timestamp,
    /// What it serves.
    pub spec: FineTuneRunSpec,
    /// How far it is.
    pub record: FineTuneRunStatus,
    /// The Job of the try or attempt that is not over.
    pub work: Work,
}

/// An object, and no other that may have its name later.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Object {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its UID.
    pub uid: String,
    /// The version of it that was read.
    pub resource_version: String,
}

/// The Job of the try or attempt that is not over.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Work {
    /// The record knows of none that is not over, or of one that was never seen to exist.
    #[default]
    None,
    /// It existed, and the API server says that it does so no more.
    Gone,
    /// It is there.
    There {
        /// The Job.
        job: Box<TrainerJob>,
        /// Why it has no pods.
        refusal: Option<Refusal>,
        /// What its pod says of itself.
        live: Option<LiveProgress>,
    },
}

impl Run {
    /// Its number.
    pub fn number(&self) -> u32 {
        self.spec.number
    }

    /// The Job of the try or attempt that is not over, if it is there.
    pub fn job(&self) -> Option<&TrainerJob> {
        match &self.work {
            Work::There { job, .. } => Some(job.as_ref()),
            _ => None,
        }
    }

    /// What its training pod says of itself.
    pub fn live(&self) -> Option<&LiveProgress> {
        match &self.work {
            Work::There { live, .. } => live.as_ref(),
            _ => None,
        }
    }
}
