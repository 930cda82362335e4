//! The controller of AdapterVersions: a pod in the version's namespace compares its files with their manifest, once. A
//! version that failed a gate is Rejected without one: nobody is to load it.

mod build;
mod decide;
mod status;

use std::{panic::AssertUnwindSafe, sync::Arc};

use futures::{FutureExt, StreamExt};
use k8s_openapi::{api::batch::v1::Job, jiff::Timestamp};
use kube::{
    Api, Resource, ResourceExt,
    runtime::{
        Controller,
        controller::{self, Action},
        reflector::ObjectRef,
        watcher,
    },
};
use serde_json::json;
use tunesmith_crds::{AdapterVersion, conditions::reason, names::STAGE_LABEL};

use self::decide::{Observed, Step, decide, is_settled};
use crate::{
    admission,
    apply::{ApplyError, Change, apply, apply_status},
    cache::{Guarded, Index, owners, touched, watch},
    conditions::stalled,
    context::{Context, Outcome, Stop, log_failure, words_of},
    labels::OPERATOR,
    workload::{Stage, TrainerJob, job::fresh_pods},
};

/// Name of the controller in metrics and logs.
const NAME: &str = "adapterversion";

/// A reconcile that failed; the next one starts over.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Something could not be read.
    #[error("cannot read {what}: {source}")]
    Observe {
        /// What.
        what: &'static str,
        /// Why.
        source: kube::Error,
    },
    /// A change failed.
    #[error(transparent)]
    Apply(#[from] ApplyError),
    /// The status could not be written.
    #[error("cannot write the status: {0}")]
    Status(#[source] kube::Error),
    /// A defect of the operator.
    #[error("internal error: {0}; please report it")]
    Internal(String),
}

impl Outcome for Error {
    fn label(&self) -> &'static str {
        match self {
            Self::Observe { .. } => "observe_error",
            Self::Apply(_) => "apply_error",
            Self::Status(_) => "status_error",
            Self::Internal(_) => "panic",
        }
    }
}

/// The operator's means, and the Jobs that verify.
struct Reconciler {
    context: Arc<Context>,
    jobs: Arc<Index<Job>>,
}

/// Runs the controller until `stop`.
pub async fn run(context: Arc<Context>, stop: Stop) {
    let verifications = watcher::Config::default().labels(&format!("{STAGE_LABEL}={}", Stage::Verify.name()));
    let (jobs, events) = watch(context.api(), verifications, owners::<Job>, trim_job);
    let at_once = context.at_once;
    let reconciler = Arc::new(Reconciler { context: context.clone(), jobs });
    Controller::new(context.api::<Guarded<AdapterVersion>>(), watcher::Config::default())
        .reconcile_on(touched(events, |job| owner_of(&job)))
        .with_config(controller::Config::default().concurrency(at_once))
        .graceful_shutdown_on(stop)
        .run(reconcile, retry, reconciler)
        .for_each(|result| log_failure(NAME, result))
        .await;
}

/// The version that a Job verifies.
fn owner_of(job: &Job) -> Option<ObjectRef<Guarded<AdapterVersion>>> {
    let owner = job.owner_references().iter().find(|owner| owner.kind == AdapterVersion::kind(&()))?;
    Some(ObjectRef::new(&owner.name).within(&job.namespace()?))
}

/// Only that it is there, and whose it is, counts.
fn trim_job(job: &mut Job) {
    (job.spec, job.status) = (None, None);
}

async fn reconcile(version: Arc<Guarded<AdapterVersion>>, reconciler: Arc<Reconciler>) -> Result<Action, Error> {
    let Reconciler { context, jobs } = &*reconciler;
    // Of thousands of versions, most have their verdict, and nothing is left to be done.
    let uid = version.meta().uid.as_deref().unwrap_or_default();
    if version.0.as_ref().is_ok_and(is_settled) && jobs.with_key(uid).is_empty() {
        return Ok(Action::await_change());
    }
    let _timer = context.metrics.time(NAME);
    let result = match &version.0 {
        Ok(readable) => {
            let caught = AssertUnwindSafe(reconcile_once(readable, context)).catch_unwind().await;
            match caught {
                Ok(result) => result,
                Err(panic) => {
                    let error = Error::Internal(words_of(&*panic));
                    stall(&version, &error.to_string(), context).await?;
                    Err(error)
                }
            }
        }
        Err(invalid) => {
            let words = format!("it can't be read: {invalid}; delete it");
            stall(&version, &words, context).await.map(|()| Action::await_change())
        }
    };
    context.metrics.count(NAME, result.as_ref().map_or_else(Outcome::label, |_| "ok"));
    result
}

/// Says on a version that can't be served why, and touches nothing else.
async fn stall(version: &Guarded<AdapterVersion>, message: &str, context: &Context) -> Result<(), Error> {
    let conditions = stalled(version.meta(), reason::UNREADABLE, message);
    let status = json!({"observedGeneration": version.meta().generation, "conditions": conditions});
    let written = apply_status::<AdapterVersion, _>(&context.client, version.meta(), &status, OPERATOR).await;
    written.map_err(Error::Status)
}

async fn reconcile_once(version: &AdapterVersion, context: &Context) -> Result<Action, Error> {
    let Some(observed) = observe(version, context).await? else {
        context.backoff.forget(version);
        return Ok(Action::await_change());
    };
    let decision = decide(&observed, Timestamp::now());
    let (before, after): (Vec<Step>, Vec<Step>) = decision.steps.into_iter().partition(|step| *step == Step::Start);
    let namespace = version.namespace().unwrap_or_default();
    let changes = |steps: Vec<Step>| -> Vec<Change> {
        steps.iter().flat_map(|step| build::build(step, &observed.version, &context.trainer)).collect()
    };
    let refusal = apply(&context.client, &namespace, changes(before)).await?;
    let state = match &refusal {
        Some(refusal) => decision.state.refused(refusal),
        None => decision.state,
    };
    let status = status::status(&observed.version, &state, Timestamp::now());
    if observed.version.status.as_ref() != Some(&status) {
        apply_status::<AdapterVersion, _>(&context.client, &observed.version.metadata, &status, OPERATOR)
            .await
            .map_err(Error::Status)?;
        if state.is_verdict() {
            let version = version.name_any();
            tracing::info!(version, namespace, phase = ?state.phase, message = state.message);
            let action = format!("{:?}", state.phase);
            context.announce(&observed.version, state.is_bad(), state.reason, &action, &state.message).await;
        }
    }
    // What the verdict came from goes only when the verdict is written.
    apply(&context.client, &namespace, changes(after)).await?;
    Ok(match (refusal, state.requeue) {
        (Some(_), _) => Action::requeue(context.backoff.next(version)),
        (None, Some(wait)) => Action::requeue(wait),
        (None, None) => Action::await_change(),
    })
}

/// Reads a version and the Job that verifies it; None if it is gone or going.
async fn observe(version: &AdapterVersion, context: &Context) -> Result<Option<Observed>, Error> {
    let failed = |what| move |source| Error::Observe { what, source };
    let (name, namespace) = (version.name_any(), version.namespace().unwrap_or_default());
    let version = Api::<AdapterVersion>::namespaced(context.client.clone(), &namespace).get_opt(&name).await;
    let Some(version) = version.map_err(failed("the AdapterVersion"))? else { return Ok(None) };
    if version.metadata.deletion_timestamp.is_some() {
        return Ok(None);
    }
    let jobs = Api::<Job>::namespaced(context.client.clone(), &namespace);
    let job = match jobs.get_opt(&build::verify_name(&version)).await.map_err(failed("the verify Job"))? {
        Some(job) => {
            let pods = fresh_pods(&context.client, &job).await.map_err(failed("the pods of a Job"))?;
            TrainerJob::read(&job, &pods)
        }
        None => None,
    };
    let refusal = match &job {
        Some(job) => {
            admission::of_job(&context.client, &namespace, job).await.map_err(failed("why a Job has no pods"))?
        }
        None => None,
    };
    Ok(Some(Observed { version, job, refusal }))
}

fn retry(version: Arc<Guarded<AdapterVersion>>, _: &Error, reconciler: Arc<Reconciler>) -> Action {
    Action::requeue(reconciler.context.backoff.next(&*version))
}
