//! Trainer Jobs, as the controllers make and read them: [`pod`] builds the pod, [`job`] reads Job and pods into a
//! [`TrainerJob`], [`ending`] tells how a Job ended.

pub mod ending;
pub mod job;
pub mod pod;

pub use ending::{Cause, Ending};
pub use job::{JobState, Pods, TrainerJob};
pub use pod::{CheckResources, TrainerDefaults, TrainerPod};

/// The trainer's subcommands that run in pods.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Checks model and data.
    Preflight,
    /// Trains and publishes.
    Train,
    /// Copies what was published, to another folder.
    Copy,
    /// Compares published files with their manifest.
    Verify,
    /// Looks up the files of many versions.
    Inspect,
}

impl Stage {
    /// The subcommand, and the value of the stage label.
    pub fn name(self) -> &'static str {
        match self {
            Self::Preflight => "preflight",
            Self::Train => "train",
            Self::Copy => "copy",
            Self::Verify => "verify",
            Self::Inspect => "inspect",
        }
    }

    /// The stage of this name.
    pub fn from_name(name: &str) -> Option<Self> {
        let all = [Self::Preflight, Self::Train, Self::Copy, Self::Verify, Self::Inspect];
        all.into_iter().find(|stage| stage.name() == name)
    }
}
