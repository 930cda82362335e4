//! What a job is, in the words of its status.

use std::time::Duration;

use tunesmith_crds::{FineTuneJobPhase as Phase, conditions::reason};

use crate::admission::Refusal;

/// What has no watch (quotas, events) is looked at this often.
const LOOK_AGAIN: Duration = Duration::from_secs(5);
/// A waiting job is looked at this often, should a watch have missed something.
const SAFETY: Duration = Duration::from_secs(600);

/// What a job is, for its status.
#[derive(Clone, Debug, PartialEq)]
pub struct State {
    /// One word.
    pub phase: Phase,
    /// Reason of the conditions.
    pub reason: &'static str,
    /// One sentence.
    pub message: String,
    /// When to look again without an event; None for what only an event can change.
    pub requeue: Option<Duration>,
}

impl State {
    /// A state of this phase.
    pub fn new(phase: Phase, reason: &'static str, message: impl Into<String>) -> Self {
        let requeue = match phase {
            Phase::Queued => Some(LOOK_AGAIN),
            Phase::Succeeded | Phase::Failed | Phase::Suspended => None,
            _ => Some(SAFETY),
        };
        Self { phase, reason, message: message.into(), requeue }
    }

    /// The same, to be looked at again after this time.
    #[must_use]
    pub fn again_in(self, wait: Duration) -> Self {
        Self { requeue: Some(wait.clamp(Duration::from_secs(1), SAFETY)), ..self }
    }

    /// The same, to be looked at again soon: what it waits for has no watch.
    #[must_use]
    pub fn soon(self) -> Self {
        self.again_in(LOOK_AGAIN)
    }

    /// `spec.suspend` is true.
    pub fn suspended() -> Self {
        Self::new(Phase::Suspended, reason::SUSPENDED, "spec.suspend is true")
    }

    /// No GpuClass will do.
    pub fn no_class(why: impl ToString) -> Self {
        Self::new(Phase::Pending, reason::NO_GPU_CLASS, why.to_string())
    }

    /// What the job is after the cluster has refused something.
    #[must_use]
    pub fn refused(self, refusal: Option<Refusal>) -> Self {
        match refusal {
            Some(Refusal { reason, message, is_final: true }) => Self::new(Phase::Failed, reason, message),
            Some(Refusal { reason, message, .. }) => Self::new(Phase::Queued, reason, message),
            None => self,
        }
    }
}
