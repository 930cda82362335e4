//! The controller of FineTuneJobs. One reconcile reads: observe → decide → build → apply → status.

mod build;
pub mod decide;
mod observe;
pub mod observed;
mod status;
mod watches;

use std::sync::Arc;

use futures::StreamExt;
use k8s_openapi::jiff::Timestamp;
use kube::{ResourceExt, runtime::controller::Action};
use tunesmith_crds::{FineTuneJob, FineTuneJobPhase, FineTuneJobStatus, conditions::reason};

use self::{
    build::build,
    decide::{State, decide},
    observe::{Caches, ObserveError, observe},
};
use crate::{
    apply::{ApplyError, apply, apply_status},
    context::{Context, Outcome, Stop, log_failure},
};

/// Name of the controller in metrics and logs.
const NAME: &str = "finetunejob";

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
}

impl Outcome for Error {
    fn label(&self) -> &'static str {
        match self {
            Self::Observe(_) => "observe_error",
            Self::Apply(_) => "apply_error",
            Self::Status(_) => "status_error",
        }
    }
}

/// The operator's means, and what the watches have seen.
struct Reconciler {
    context: Arc<Context>,
    caches: Caches,
}

/// Runs the controller until `stop`.
pub async fn run(context: Arc<Context>, stop: Stop) {
    let (controller, caches) = watches::controller(&context);
    let reconciler = Arc::new(Reconciler { context, caches });
    controller
        .graceful_shutdown_on(stop)
        .run(reconcile, retry, reconciler)
        .for_each(|result| log_failure(NAME, result))
        .await;
}

async fn reconcile(job: Arc<FineTuneJob>, reconciler: Arc<Reconciler>) -> Result<Action, Error> {
    let _timer = reconciler.context.metrics.time(NAME);
    let result = reconcile_once(&job, &reconciler).await;
    reconciler.context.metrics.count(NAME, result.as_ref().map_or_else(Outcome::label, |_| "ok"));
    result
}

async fn reconcile_once(job: &FineTuneJob, reconciler: &Reconciler) -> Result<Action, Error> {
    let Reconciler { context, caches } = reconciler;
    caches.listed.clone().await;
    let Some(observed) = observe(&context.client, caches, job).await? else {
        context.backoff.forget(job);
        return Ok(Action::await_change());
    };
    let now = Timestamp::now();
    let decision = decide(&observed, now);
    let changes = decision.steps.iter().filter_map(|step| build(step, &observed, &context.image)).collect();
    let refusal = apply(&context.client, &job.namespace().unwrap_or_default(), changes).await?;
    let was_refused = refusal.is_some();
    let state = status::refused(decision.state, refusal);
    let status = status::status(&observed, &state, now);
    write_status(&observed.job, status, &state, context).await?;
    Ok(Action::requeue(match was_refused {
        true => context.backoff.next(job),
        false => {
            context.backoff.forget(job);
            state.requeue
        }
    }))
}

/// Writes the status if it has changed, and an event if the phase or its reason has.
async fn write_status(
    job: &FineTuneJob,
    status: FineTuneJobStatus,
    state: &State,
    context: &Context,
) -> Result<(), Error> {
    if job.status.as_ref() == Some(&status) {
        return Ok(());
    }
    let before = job.status.as_ref().map(|status| (status.phase, ready_reason(status)));
    let turned = before != Some((status.phase, Some(state.reason)));
    apply_status(&context.client, job, &status).await.map_err(Error::Status)?;
    if turned {
        let (name, namespace) = (job.name_any(), job.namespace().unwrap_or_default());
        tracing::info!(job = name, namespace, phase = ?state.phase, reason = state.reason, message = state.message);
        context.announce(job, is_warning(state), state.reason, &format!("{:?}", state.phase), &state.message).await;
    }
    Ok(())
}

fn ready_reason(status: &FineTuneJobStatus) -> Option<&str> {
    let ready = status.conditions.iter().find(|condition| condition.type_ == "Ready");
    ready.map(|condition| condition.reason.as_str())
}

fn is_warning(state: &State) -> bool {
    let waits_for_someone = [
        reason::RETRYING,
        reason::NO_GPU_CLASS,
        reason::QUOTA_EXCEEDED,
        reason::ADMISSION_REFUSED,
        reason::UNSCHEDULABLE,
    ];
    state.phase == FineTuneJobPhase::Failed || waits_for_someone.contains(&state.reason)
}

fn retry(job: Arc<FineTuneJob>, _: &Error, reconciler: Arc<Reconciler>) -> Action {
    Action::requeue(reconciler.context.backoff.next(&*job))
}
