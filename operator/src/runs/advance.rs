//! What a decision about a run says: a record, steps that follow from it, and what the run does.

use tunesmith_crds::{FineTuneJobPhase as Phase, FineTuneRunStatus, fine_tune_run::RunStage};

use crate::{plan::Planned, run::Run, state::State};

/// What to do about a run.
#[derive(Clone, Debug, PartialEq)]
pub struct Advance {
    /// The record, to be written before anything is done.
    pub record: FineTuneRunStatus,
    /// In this order; a step that fails ends the list.
    pub steps: Vec<Step>,
    /// What the run does.
    pub state: State,
}

/// One change to the cluster.
#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    /// Check model and data: the Job of the record's try.
    CreateCheck,
    /// Train: the Job of the record's attempt, suspended, and what it works on.
    CreateAttempt(Box<Planned>),
    /// Let a suspended Job begin.
    Admit {
        /// Its name.
        name: String,
        /// Its UID.
        uid: String,
    },
    /// Delete a Job; its pods get time for a checkpoint.
    DeleteJob {
        /// Its name.
        name: String,
        /// Its UID.
        uid: String,
    },
    /// Record what was published.
    CreateVersion,
}

/// Ends the run without a version. What is counted (failures, time) may be allowed later: it goes on then.
pub(super) fn over(record: &mut FineTuneRunStatus, reason: &'static str, message: impl Into<String>) -> State {
    let message = message.into();
    record.stage = Some(RunStage::Done);
    record.reason = Some(reason.into());
    record.message = Some(message.clone());
    State::new(Phase::Failed, reason, message)
}

/// Records the version that was published.
pub(super) fn publish(run: &Run, record: &mut FineTuneRunStatus, steps: &mut Vec<Step>) {
    if let Some(report) = &record.published {
        let adapter = &run.spec.job_spec.output.adapter_name;
        record.adapter_version = Some(tunesmith_crds::names::adapter_version(adapter, report.version));
        record.stage = Some(RunStage::Recorded);
        record.message = None;
        steps.push(Step::CreateVersion);
    }
}
