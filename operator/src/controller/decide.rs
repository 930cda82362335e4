//! What to do next for a FineTuneJob: a state machine without a client and without a clock of its own.
//!
//! It reads from top to bottom like a run: wait for the pods of an older run, preflight, reuse or reserve a version,
//! attempts, the version's record and its gates. Every object that it asks for has a name that follows from job, run and
//! attempt, so that deciding twice from an old view is a conflict, not a duplicate.

mod outcome;

use std::time::Duration;

use k8s_openapi::jiff::Timestamp;
use tunesmith_crds::{
    FineTuneJobPhase as Phase, RunSpec,
    conditions::reason,
    digest::input_digest,
    fine_tune_job::MethodName,
    names,
    run::{LiveProgress, PreflightReport, TrainReport, TrainStage},
};

use self::outcome::outcome;
use super::observed::{Named, Observed, Run};
use crate::{
    plan::{Planned, plan},
    trainer::{Cause, Ending, JobState, Pods, TrainerJob},
};

/// Progress is polled this often.
const POLL: Duration = Duration::from_secs(2);
/// What has no watch (quotas, events) is looked at this often.
const LOOK_AGAIN: Duration = Duration::from_secs(5);
/// A waiting job is looked at this often, should a watch have missed something.
const SAFETY: Duration = Duration::from_secs(300);

/// What to do, and what the job is then.
#[derive(Clone, Debug, PartialEq)]
pub struct Decision {
    /// In this order; a step that fails ends the list.
    pub steps: Vec<Step>,
    /// What the status says.
    pub state: State,
}

/// One change to the cluster.
#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    /// Write on a Job how it ended.
    RecordEnding {
        /// The Job.
        job: String,
        /// Its ending.
        ending: Ending,
    },
    /// Record what a run has published.
    CreateVersion {
        /// The run.
        run: u32,
        /// What it published.
        report: TrainReport,
    },
    /// Write on a run which version it led to.
    SettleRun {
        /// The run.
        run: u32,
        /// Name of the AdapterVersion.
        version: String,
    },
    /// Delete a Job; its pods get time for a checkpoint.
    DeleteJob(Named),
    /// Delete a ConfigMap of an older run.
    DeleteConfigMap(Named),
    /// Begin a run: the ConfigMap that says which spec it serves.
    StartRun {
        /// Its number.
        run: u32,
    },
    /// Check model and data.
    CreatePreflight {
        /// The run.
        run: u32,
    },
    /// Reserve a version for a run: the ConfigMap with what its attempts work on.
    ReserveVersion {
        /// The run.
        run: u32,
        /// The version.
        version: u32,
        /// The method that the run uses.
        method: MethodName,
        /// Digest of all that decides the result.
        input_digest: String,
        /// What preflight found.
        preflight: PreflightReport,
        /// What the run is first planned for.
        planned: Box<Planned>,
    },
    /// Train.
    CreateAttempt {
        /// The run.
        run: u32,
        /// Number of the attempt.
        attempt: u32,
        /// The version that is reserved.
        version: u32,
        /// What it asks for.
        planned: Box<Planned>,
        /// Seconds that are left for it.
        deadline: Option<i64>,
    },
}

/// What a job is, for its status.
#[derive(Clone, Debug, PartialEq)]
pub struct State {
    /// One word.
    pub phase: Phase,
    /// Reason of the conditions.
    pub reason: &'static str,
    /// One sentence.
    pub message: String,
    /// When to look again without an event.
    pub requeue: Duration,
}

impl State {
    fn new(phase: Phase, reason: &'static str, message: impl Into<String>) -> Self {
        let requeue = match phase {
            Phase::Preflight | Phase::Queued | Phase::Starting => LOOK_AGAIN,
            Phase::Running | Phase::Publishing => POLL,
            _ => SAFETY,
        };
        Self { phase, reason, message: message.into(), requeue }
    }

    fn suspended() -> Self {
        Self::new(Phase::Suspended, reason::SUSPENDED, "spec.suspend is true")
    }

    fn no_class(why: impl ToString) -> Self {
        Self::new(Phase::Pending, reason::NO_GPU_CLASS, why.to_string())
    }
}

/// Decides what to do next.
pub fn decide(observed: &Observed, now: Timestamp) -> Decision {
    let mut steps = bookkeeping(observed);
    let state = match observed.current() {
        None => begin(observed, &mut steps),
        Some(run) => clear_older(observed, run.number, &mut steps)
            .or_else(|| outcome(observed, run, &mut steps))
            .or_else(|| check(observed, run, &mut steps))
            .unwrap_or_else(|| train(observed, run, now, &mut steps)),
    };
    Decision { steps, state }
}

/// What has happened is written down before anything else happens.
fn bookkeeping(observed: &Observed) -> Vec<Step> {
    let mut steps = Vec::new();
    for job in observed.runs.values().flat_map(Run::jobs) {
        if let JobState::Ended { ending, recorded: false } = &job.state {
            steps.push(Step::RecordEnding { job: job.name.clone(), ending: ending.clone() });
        }
    }
    for run in observed.runs.values().filter(|run| run.version.is_none()) {
        if let (Some(report), Some(task)) = (run.train_report(), &run.task) {
            let version = names::adapter_version(&task.adapter_name, report.version);
            steps.push(Step::CreateVersion { run: run.number, report: report.clone() });
            steps.push(Step::SettleRun { run: run.number, version });
        }
    }
    steps
}

/// No run serves the spec: the next one starts, once the pods of those before are gone.
fn begin(observed: &Observed, steps: &mut Vec<Step>) -> State {
    let active: Vec<&TrainerJob> = observed.runs.values().flat_map(Run::jobs).filter(|job| job.is_active()).collect();
    if let Some(job) = active.first() {
        let message = format!("the spec has changed: waits for Job {} to end", job.name);
        steps.extend(active.iter().filter_map(|job| delete(job)));
        return State::new(Phase::Pending, reason::PENDING, message);
    }
    if observed.job.spec.suspend {
        return State::suspended();
    }
    if let Err(why) = plan(&observed.job.spec, &observed.offers, None, None) {
        return State::no_class(why);
    }
    let run = observed.next_number();
    steps.extend([Step::StartRun { run }, Step::CreatePreflight { run }]);
    State::new(Phase::Preflight, reason::PREFLIGHT, "checks model and data")
}

/// Objects of older runs go; their pods must be gone before this run does anything.
fn clear_older(observed: &Observed, current: u32, steps: &mut Vec<Step>) -> Option<State> {
    let older = || observed.runs.range(..current).map(|(_, run)| run);
    let jobs: Vec<&TrainerJob> = older().flat_map(Run::jobs).collect();
    steps.extend(jobs.iter().filter_map(|job| delete(job)));
    if let Some(job) = jobs.iter().find(|job| job.is_active()) {
        let message = format!("waits for Job {} of an older run to end", job.name);
        return Some(State::new(Phase::Pending, reason::PENDING, message));
    }
    if jobs.is_empty() {
        let config_maps = older().flat_map(|run| run.config_maps.iter().cloned());
        steps.extend(config_maps.map(Step::DeleteConfigMap));
    }
    None
}

/// Preflight; None once it has passed.
fn check(observed: &Observed, run: &Run, steps: &mut Vec<Step>) -> Option<State> {
    let suspend = observed.job.spec.suspend;
    let Some(job) = &run.preflight else {
        if suspend {
            return Some(State::suspended());
        }
        steps.push(Step::CreatePreflight { run: run.number });
        return Some(checking("checks model and data"));
    };
    if job.deleting {
        return Some(if suspend { State::suspended() } else { checking("starts again") });
    }
    let cause = match &job.state {
        JobState::Active { .. } if suspend => {
            steps.extend(delete(job));
            return Some(State::suspended());
        }
        JobState::Active { pods, last_failure } => return Some(checks(observed, pods, last_failure.as_deref())),
        JobState::Ended { ending, .. } => &ending.cause,
    };
    match cause {
        Cause::Done { .. } if run.preflight_report().is_some() => None,
        Cause::Disrupted { message } => {
            steps.extend(delete(job));
            Some(checking(&format!("starts again: {message}")))
        }
        cause => {
            let words = cause.complaint().unwrap_or("the pod left the report of another subcommand");
            Some(State::new(Phase::Failed, reason::PREFLIGHT_FAILED, words))
        }
    }
}

fn checking(message: &str) -> State {
    State::new(Phase::Preflight, reason::PREFLIGHT, message)
}

fn checks(observed: &Observed, pods: &Pods, last_failure: Option<&str>) -> State {
    let retried = last_failure.map(|message| format!(" (tried again: {message})")).unwrap_or_default();
    match pods {
        Pods::Missing | Pods::Unschedulable(_) => waits(observed, pods, Phase::Preflight, &retried),
        Pods::Starting(words) => checking(&format!("preflight pod {words}{retried}")),
        Pods::Running { .. } => checking(&format!("checks model and data{retried}")),
        Pods::Over => match last_failure {
            Some(message) => State::new(Phase::Preflight, reason::RETRYING, message),
            None => checking("reads the report"),
        },
    }
}

/// Attempts, one after the other, until one has published or no more are allowed.
fn train(observed: &Observed, run: &Run, now: Timestamp, steps: &mut Vec<Step>) -> State {
    let spec = &observed.job.spec;
    if let Some(active) = run.attempts.iter().find(|attempt| attempt.is_active()) {
        if spec.suspend {
            steps.extend(delete(active));
            return State::suspended();
        }
        return trains(observed, run, active);
    }
    if let Some(state) = gave_up(observed, run) {
        return state;
    }
    if spec.suspend {
        return State::suspended();
    }
    let wait = run.next_attempt_at().duration_since(now);
    if wait.is_positive() {
        let message =
            format!("attempt {} ended: {}", observed.last_attempt(run), run.last_failure().unwrap_or_default());
        let state = State::new(Phase::Starting, reason::RETRYING, message);
        return State { requeue: wait.unsigned_abs().max(Duration::from_secs(1)), ..state };
    }
    let Some(report) = run.preflight_report() else {
        return State::new(Phase::Pending, reason::PENDING, "waits for preflight");
    };
    let planned = match plan(spec, &observed.offers, Some(report), method_of(run)) {
        Ok(planned) => planned,
        Err(why) => return State::no_class(why),
    };
    if let Some(message) = lacks_gpus(&planned) {
        return State::new(Phase::Failed, reason::PREFLIGHT_FAILED, message);
    }
    let version = reserve(observed, run, report, &planned, steps);
    steps.push(Step::CreateAttempt {
        run: run.number,
        attempt: observed.last_attempt(run) + 1,
        version,
        planned: Box::new(planned),
        deadline: spec.active_deadline_seconds.map(|seconds| (seconds - run.seconds_taken()).max(1)),
    });
    match run.last_failure() {
        Some(failure) => State::new(Phase::Starting, reason::RETRYING, format!("tries again: {failure}")),
        None => State::new(Phase::Starting, reason::STARTING, "creates the training Job"),
    }
}

/// Why a sharded run can't be trained: this release's trainer computes on the CPU of one pod.
fn lacks_gpus(planned: &Planned) -> Option<String> {
    let (plan, method) = (&planned.plan, planned.method.name());
    let gpus = plan.pods * plan.gpus_per_pod;
    (method == MethodName::Full && gpus > 0 || plan.pods > 1).then(|| {
        format!(
            "method {method:?} would share {gpus} GPUs of class {} in {} pods, but this release trains on the CPU of one \
             pod: set resources.gpuClass to a class without GPUs that offers {method:?}, such as cpu",
            plan.gpu_class, plan.pods
        )
    })
}

/// The version that the run publishes, with the step that reserves it if none is yet.
fn reserve(observed: &Observed, run: &Run, report: &PreflightReport, planned: &Planned, steps: &mut Vec<Step>) -> u32 {
    if let Some(task) = run.task.as_ref().and_then(|task| task.train.as_ref()) {
        return task.version;
    }
    let version = observed.next_version(report);
    steps.push(Step::ReserveVersion {
        run: run.number,
        version,
        method: planned.method.name(),
        input_digest: input_digest(
            &planned.resolve(RunSpec::preflight(&observed.job, run.number)),
            &planned.method,
            report,
        ),
        preflight: report.clone(),
        planned: Box::new(planned.clone()),
    });
    version
}

/// Why there is no next attempt, if so.
fn gave_up(observed: &Observed, run: &Run) -> Option<State> {
    let spec = &observed.job.spec;
    let ending = run.attempts.last()?.ending()?;
    let failed = |reason, message: String| Some(State::new(Phase::Failed, reason, message));
    let deadline = spec.active_deadline_seconds;
    match &ending.cause {
        Cause::Final { message } => failed(reason::TRAINING_FAILED, message.clone()),
        Cause::Done { .. } => failed(reason::TRAINING_FAILED, "the pod left the report of another subcommand".into()),
        _ if i64::from(run.failures()) > i64::from(spec.backoff_limit) => {
            let (times, message) = (run.failures(), run.last_failure().unwrap_or_default());
            failed(reason::BACKOFF_LIMIT_EXCEEDED, format!("failed {times} times, backoffLimit reached: {message}"))
        }
        _ if deadline.is_some_and(|seconds| run.seconds_taken() >= seconds) => {
            let seconds = deadline.unwrap_or_default();
            failed(reason::DEADLINE_EXCEEDED, format!("the run took longer than activeDeadlineSeconds: {seconds}"))
        }
        _ => None,
    }
}

/// What the active attempt does.
fn trains(observed: &Observed, run: &Run, attempt: &TrainerJob) -> State {
    let retried = match run.last_failure() {
        Some(failure) => format!(" (attempt {}, after: {failure})", attempt.attempt),
        None => String::new(),
    };
    let pods = match &attempt.state {
        JobState::Active { pods, .. } if !attempt.deleting => pods,
        _ => return State::new(Phase::Starting, reason::STARTING, format!("waits for Job {} to end", attempt.name)),
    };
    match pods {
        Pods::Missing | Pods::Unschedulable(_) => waits(observed, pods, Phase::Starting, &retried),
        Pods::Starting(words) => State::new(Phase::Starting, reason::STARTING, format!("pod {words}{retried}")),
        Pods::Running { .. } => runs(observed.live.as_ref(), &retried),
        Pods::Over => State::new(Phase::Running, reason::TRAINING, format!("the pods have ended{retried}")),
    }
}

fn runs(live: Option<&LiveProgress>, retried: &str) -> State {
    let Some(live) = live else {
        return State::new(Phase::Running, reason::TRAINING, format!("the trainer is up{retried}"));
    };
    match live.stage {
        TrainStage::Loading => {
            State::new(Phase::Running, reason::TRAINING, format!("loads model, data and checkpoint{retried}"))
        }
        TrainStage::Training => {
            let (step, total) = (live.progress.step, live.progress.total_steps);
            State::new(Phase::Running, reason::TRAINING, format!("step {step} of {total}{retried}"))
        }
        TrainStage::Evaluating => {
            let (step, total) = (live.progress.step, live.progress.total_steps);
            State::new(Phase::Running, reason::TRAINING, format!("evaluating after step {step} of {total}{retried}"))
        }
        TrainStage::Publishing => {
            State::new(Phase::Publishing, reason::PUBLISHING, format!("writes the artifact{retried}"))
        }
    }
}

/// The Job is there, but the cluster has no place for its pods.
fn waits(observed: &Observed, pods: &Pods, otherwise: Phase, retried: &str) -> State {
    match (pods, &observed.refusal) {
        (Pods::Unschedulable(words), _) => {
            State::new(Phase::Queued, reason::UNSCHEDULABLE, format!("no node takes the pod: {words}{retried}"))
        }
        (_, Some(refusal)) => State::new(Phase::Queued, refusal.reason, format!("{}{retried}", refusal.message)),
        _ if otherwise == Phase::Preflight => checking(&format!("waits for the preflight pod{retried}")),
        _ => State::new(Phase::Starting, reason::STARTING, format!("waits for the training pods{retried}")),
    }
}

/// Digest of the run's inputs, as its version was reserved for them; before that, as it would be planned now. None if no
/// class can say what Auto means, how many devices share the work and how exactly they compute.
pub(super) fn digest_of(observed: &Observed, run: &Run, report: &PreflightReport) -> Option<String> {
    if let Some(task) = run.task.as_ref().and_then(|task| task.train.as_ref()) {
        return Some(task.input_digest.clone());
    }
    let planned = plan(&observed.job.spec, &observed.offers, Some(report), None).ok()?;
    let spec = planned.resolve(RunSpec::preflight(&observed.job, run.number));
    Some(input_digest(&spec, &planned.method, report))
}

/// The method that a run has settled on.
fn method_of(run: &Run) -> Option<MethodName> {
    run.task.as_ref()?.method.as_ref().map(tunesmith_crds::Method::name)
}

fn delete(job: &TrainerJob) -> Option<Step> {
    (!job.deleting).then(|| Step::DeleteJob(Named { name: job.name.clone(), uid: job.uid.clone() }))
}

#[cfg(test)]
mod model;
#[cfg(test)]
mod tests;
