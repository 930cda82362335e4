//! The controller of FineTuneJobs. One reconcile reads: observe → decide → record → act → status.

pub mod decide;
mod observe;
pub mod status;

use std::{panic::AssertUnwindSafe, sync::Arc, time::Duration};

use futures::{FutureExt, StreamExt};
use k8s_openapi::jiff::Timestamp;
use kube::{Resource, ResourceExt, runtime::controller::Action};
use serde_json::json;
use tokio::time::sleep;
use tunesmith_crds::{
    FineTuneJob, FineTuneJobPhase, FineTuneJobStatus, FineTuneRunStatus, conditions::reason, fine_tune_job::Progress,
};

use self::{
    decide::{Decision, decide},
    observe::{ObserveError, observe},
};
use crate::{
    admission::Refusal,
    apply::{ApplyError, Change, apply, apply_status, is_unchanged, write_record},
    cache::{Caches, Guarded, Name},
    conditions::stalled,
    context::{Context, Outcome, Stop, log_failure, words_of},
    details::{Details, Written},
    labels::OPERATOR,
    observed::Observed,
    progress::{self, Live},
    run::Run,
    runs::{
        advance::{Advance, Step},
        build::{build, new_run},
        copied,
        settle::refused,
        with_conditions,
    },
    state::State,
    workload::{JobState, Pods},
};

/// Name of the controller in metrics and logs.
const NAME: &str = "finetunejob";
/// Jobs that are over and are looked at at a time, when the controller begins.
const AT_A_TIME: usize = 500;
/// Time between them.
const BETWEEN: Duration = Duration::from_millis(100);

/// A reconcile that failed; the next one starts over.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Something could not be read.
    #[error(transparent)]
    Observe(#[from] ObserveError),
    /// A change failed.
    #[error(transparent)]
    Apply(#[from] ApplyError),
    /// The status could not be written.
    #[error("cannot write the status: {0}")]
    Status(#[source] kube::Error),
    /// A run's record could not be written.
    #[error("cannot write the record of a run: {0}")]
    Record(#[source] kube::Error),
    /// A defect of the operator.
    #[error("internal error: {0}; please report it")]
    Internal(String),
}

impl Outcome for Error {
    fn label(&self) -> &'static str {
        match self {
            Self::Observe(_) => "observe_error",
            Self::Apply(_) => "apply_error",
            Self::Status(_) | Self::Record(_) => "status_error",
            Self::Internal(_) => "panic",
        }
    }
}

/// The operator's means, and what the watches have seen.
struct Reconciler {
    context: Arc<Context>,
    caches: Caches,
    live: Live,
    details: Details,
    written: Written,
}

/// Runs the controller until `stop`; it looks at every job once, first at those that are not over.
pub async fn run(context: Arc<Context>, caches: Caches, stop: Stop) {
    let live = Live::default();
    let controller = caches.job_queue.controller();
    let polls = progress::run(context.client.clone(), live.clone(), caches.clone());
    let at_once = context.at_once;
    let reconciler = Arc::new(Reconciler {
        context,
        caches: caches.clone(),
        live,
        details: Details::default(),
        written: Written::default(),
    });
    let reconciles = controller
        .with_config(kube::runtime::controller::Config::default().concurrency(at_once))
        .graceful_shutdown_on(stop)
        .run(reconcile, retry, reconciler)
        .for_each(|result| log_failure(NAME, result));
    let wake = async {
        wake_all(&caches).await;
        polls.await;
    };
    tokio::select! {
        () = reconciles => {}
        () = wake => {}
    }
}

/// What is over waits, a few at a time: mostly nothing is to be done for it, and others wait for something.
async fn wake_all(caches: &Caches) {
    let (over, others): (Vec<_>, Vec<_>) = caches.jobs.notes().into_iter().partition(|(_, job)| job.is_over);
    for chunk in [others].iter().map(Vec::as_slice).chain(over.chunks(AT_A_TIME)) {
        for (place, _) in chunk {
            caches.job_queue.wake(place.0.as_deref().unwrap_or_default(), &place.1);
        }
        sleep(BETWEEN).await;
    }
}

async fn reconcile(name: Arc<Name<FineTuneJob>>, reconciler: Arc<Reconciler>) -> Result<Action, Error> {
    let (context, caches) = (&reconciler.context, &reconciler.caches);
    let _timer = context.metrics.time(NAME);
    let Some(job) = caches.jobs.named(&name.namespace().unwrap_or_default(), &name.name_any()) else {
        return Ok(Action::await_change());
    };
    let result = match &job.0 {
        Ok(readable) => {
            // A defect that one job meets must not stop the others.
            let caught = AssertUnwindSafe(reconcile_once(readable, &reconciler)).catch_unwind().await;
            match caught {
                Ok(result) => result,
                Err(panic) => {
                    let error = Error::Internal(words_of(&*panic));
                    stall(&job, &error.to_string(), context).await?;
                    Err(error)
                }
            }
        }
        Err(invalid) => {
            let words = format!("it can't be read: {invalid}; mend its spec, or delete it");
            stall(&job, &words, context).await.map(|()| Action::await_change())
        }
    };
    context.metrics.count(NAME, result.as_ref().map_or_else(Outcome::label, |_| "ok"));
    result
}

/// Says on an object that can't be served why, and touches nothing else.
async fn stall(job: &Guarded<FineTuneJob>, message: &str, context: &Context) -> Result<(), Error> {
    let status = json!({
        "phase": FineTuneJobPhase::Failed,
        "message": message,
        "observedGeneration": job.meta().generation,
        "conditions": stalled(job.meta(), reason::UNREADABLE, message),
    });
    let written = apply_status::<FineTuneJob, _>(&context.client, job.meta(), &status, OPERATOR).await;
    written.map(drop).map_err(Error::Status)
}

async fn reconcile_once(job: &FineTuneJob, reconciler: &Reconciler) -> Result<Action, Error> {
    let Reconciler { context, caches, live, details, written } = reconciler;
    if job.metadata.deletion_timestamp.is_some() {
        live.only(job, None);
        context.backoff.forget(job);
        details.forget(job);
        return Ok(Action::await_change());
    }
    if let Some(wait) = written.lag(job) {
        return Ok(Action::requeue(wait));
    }
    let observed = observe(&context.client, caches, live, context.devices, job).await?;
    ask_pods(&observed, live);
    let now = Timestamp::now();
    let decision = decide(&observed, now);
    let Some(refusal) = carry_out(&observed, &decision, now, reconciler).await? else {
        // A cache lags behind the record: what it shows next decides.
        return Ok(Action::requeue(context.backoff.next(job)));
    };
    let was_refused = refusal.is_some();
    let state = decision.state.clone().refused(refusal);
    let status = status::status(&observed, &decision, &state, now);
    let told_in = write_status(&observed, &decision, status, &state, reconciler).await?;
    let again_in = match was_refused {
        true => Some(context.backoff.next(job)),
        false => {
            context.backoff.forget(job);
            state.requeue
        }
    };
    let wait = again_in.into_iter().chain(told_in).min();
    Ok(wait.map_or_else(Action::await_change, Action::requeue))
}

/// The pod of the run that trains is asked how far it is.
fn ask_pods(observed: &Observed, live: &Live) {
    let running = observed.runs.values().find_map(|run| {
        let job = run.job()?;
        match &job.state {
            JobState::Active { pods: Pods::Running { address: Some(address), .. }, .. } if is_training(run) => {
                Some((job.uid.clone(), *address))
            }
            _ => None,
        }
    });
    live.only(&observed.job, running.as_ref().map(|(uid, _)| uid.as_str()));
    if let Some((uid, address)) = running {
        live.ask(&uid, &observed.job, address);
    }
}

fn is_training(run: &Run) -> bool {
    run.record.active().is_some() && copied(&run.record).is_none()
}

/// Writes records, then does what follows from them. None if a record is no longer as it was read.
async fn carry_out(
    observed: &Observed,
    decision: &Decision,
    now: Timestamp,
    Reconciler { context, caches, .. }: &Reconciler,
) -> Result<Option<Option<Refusal>>, Error> {
    let namespace = observed.job.namespace().unwrap_or_default();
    for (number, advance) in &decision.advances {
        let Some(run) = observed.runs.get(number) else { continue };
        let record = with_conditions(advance.record.clone(), now);
        if let (Some(settled), None) = (&record.settled, &run.record.settled)
            && !caches.claim(&observed.job, settled.version)
        {
            return Ok(None);
        }
        let begins = advance.steps.iter().any(|step| matches!(step, Step::CreateCheck | Step::CreateAttempt(_)));
        let changed = record != run.record;
        let is_as_read = match changed {
            true => write_record(&context.client, run, record).await,
            // What an older record asks for may be over by now.
            false if begins => is_unchanged(&context.client, run).await,
            false => Ok(true),
        };
        if !is_as_read.map_err(Error::Record)? {
            return Ok(None);
        }
        let changes = changes(observed, run, advance, context);
        if let Some(refusal) = apply(&context.client, &namespace, changes).await? {
            // Asked again, for the record that was just written is another version.
            if refusal.is_final && begins && !changed {
                let record = with_conditions(refused(run, &refusal.message, now), now);
                write_record(&context.client, run, record).await.map_err(Error::Record)?;
                return Ok(None);
            }
            return Ok(Some(Some(refusal)));
        }
    }
    let start = decision.start.map(|(number, trigger)| {
        Change::CreateRun(Box::new(new_run(&observed.job, number, trigger, &context.trainer)))
    });
    let forget = decision.forget.iter();
    let forget = forget.map(|run| Change::DeleteRun { name: run.name.clone(), uid: run.uid.clone() });
    let refusal = apply(&context.client, &namespace, start.into_iter().chain(forget).collect()).await?;
    Ok(Some(refusal))
}

fn changes(observed: &Observed, run: &Run, advance: &Advance, context: &Context) -> Vec<Change> {
    let steps: Vec<&Step> = advance.steps.iter().collect();
    steps.into_iter().flat_map(|step| build(step, &observed.job, run, &advance.record, &context.trainer)).collect()
}

/// Writes the status if it has changed, and an event if the phase has, or its reason. What stays the same but for details is
/// written when they last: then it returns when to look again.
async fn write_status(
    observed: &Observed,
    decision: &Decision,
    status: FineTuneJobStatus,
    state: &State,
    Reconciler { context, details, written: writes, .. }: &Reconciler,
) -> Result<Option<Duration>, Error> {
    let job = &observed.job;
    let written = job.status.clone().unwrap_or_default();
    if let Some(progress) = progress_of(observed, decision, written.progress.as_ref())
        && written.progress.as_ref() != Some(&progress)
    {
        progress::write(&context.client, &job.metadata, &progress).await;
    }
    if (FineTuneJobStatus { progress: None, ..written.clone() }) == status {
        details.forget(job);
        return Ok(None);
    }
    let turned = (written.phase, ready_reason(&written)) != (status.phase, Some(state.reason));
    if !turned
        && written.observed_generation == status.observed_generation
        && let Some(wait) = details.wait(job)
    {
        return Ok(Some(wait));
    }
    details.forget(job);
    let version = apply_status::<FineTuneJob, _>(&context.client, &job.metadata, &status, OPERATOR).await;
    writes.note(job, version.map_err(Error::Status)?);
    if turned && is_event(state) {
        let (name, namespace) = (job.name_any(), job.namespace().unwrap_or_default());
        tracing::info!(job = name, namespace, phase = ?state.phase, reason = state.reason, message = state.message);
        context.announce(job, is_warning(state), state.reason, &format!("{:?}", state.phase), &state.message).await;
    }
    Ok(None)
}

/// The progress at either end of a run's training; between them, its pod tells it.
fn progress_of(observed: &Observed, decision: &Decision, before: Option<&Progress>) -> Option<Progress> {
    let run = observed.current()?;
    let advance = decision.advances.iter().find(|(number, _)| *number == run.number());
    let record: &FineTuneRunStatus = advance.map_or(&run.record, |(_, advance)| &advance.record);
    if let Some(report) = &record.published {
        return Some(progress::at_the_end(report, before));
    }
    let report = record.preflight.as_ref().filter(|_| record.adapter_version.is_none())?;
    (record.last_attempt <= 1
        && copied(record).is_none()
        && record.attempts.iter().all(|attempt| attempt.started.is_none()))
    .then(|| progress::at_the_start(report.total_steps))
}

fn ready_reason(status: &FineTuneJobStatus) -> Option<&str> {
    let ready = status.conditions.iter().find(|condition| condition.type_ == "Ready");
    ready.map(|condition| condition.reason.as_str())
}

/// Whether somebody who is not looking at the job should hear of it: it trains, it is over, or it waits for somebody.
fn is_event(state: &State) -> bool {
    let phases = [FineTuneJobPhase::Running, FineTuneJobPhase::Succeeded, FineTuneJobPhase::Suspended];
    is_warning(state) || phases.contains(&state.phase)
}

fn is_warning(state: &State) -> bool {
    let waits_for_someone = [
        reason::RETRYING,
        reason::STORE_UNAVAILABLE,
        reason::INPUTS_CHANGED,
        reason::VERSION_TAKEN,
        reason::NO_GPU_CLASS,
        reason::QUOTA_EXCEEDED,
        reason::ADMISSION_REFUSED,
        reason::UNSCHEDULABLE,
    ];
    state.phase == FineTuneJobPhase::Failed || waits_for_someone.contains(&state.reason)
}

fn retry(job: Arc<Name<FineTuneJob>>, _: &Error, reconciler: Arc<Reconciler>) -> Action {
    Action::requeue(reconciler.context.backoff.next(&*job))
}
