//! The controller of AdapterVersions: a pod in the version's namespace compares its files with their manifest, once. A
//! version that failed a gate is Rejected without one: nobody is to load it.

mod build;
mod decide;
mod inspections;
mod status;

use std::{panic::AssertUnwindSafe, sync::Arc};

use futures::{FutureExt, StreamExt};
use k8s_openapi::{api::batch::v1::Job, jiff::Timestamp};
use kube::{
    Api, Resource, ResourceExt,
    runtime::controller::{self, Action},
};
use serde_json::json;
use tunesmith_crds::{AdapterVersion, conditions::reason};

use self::{
    decide::{Observed, Step, decide, is_settled},
    inspections::{Findings, Found},
};
use crate::{
    admission,
    apply::{ApplyError, Change, apply, apply_status},
    cache::{Caches, Guarded, Name},
    conditions::stalled,
    context::{Context, Outcome, Stop, log_failure, words_of},
    details::Details,
    labels::OPERATOR,
    workload::{TrainerJob, ending::finished, job::fresh_pods},
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

/// The operator's means, and what the watches have seen.
struct Reconciler {
    context: Arc<Context>,
    caches: Caches,
    details: Details,
    findings: Findings,
}

/// Runs the controller until `stop`; it looks at every version once.
pub async fn run(context: Arc<Context>, caches: Caches, stop: Stop) {
    let controller = caches.version_queue.controller();
    for (place, _) in caches.versions.notes() {
        caches.version_queue.wake(place.0.as_deref().unwrap_or_default(), &place.1);
    }
    let (at_once, findings) = (context.at_once, Findings::default());
    let inspections = inspections::run(context.clone(), caches.clone(), findings.clone());
    let reconciler = Arc::new(Reconciler { context, caches, details: Details::default(), findings });
    let reconciles = controller
        .with_config(controller::Config::default().concurrency(at_once))
        .graceful_shutdown_on(stop)
        .run(reconcile, retry, reconciler)
        .for_each(|result| log_failure(NAME, result));
    tokio::select! {
        () = reconciles => {}
        () = inspections => {}
    }
}

async fn reconcile(name: Arc<Name<AdapterVersion>>, reconciler: Arc<Reconciler>) -> Result<Action, Error> {
    let Reconciler { context, caches, .. } = &*reconciler;
    let Some(version) = caches.versions.named(&name.namespace().unwrap_or_default(), &name.name_any()) else {
        return Ok(Action::await_change());
    };
    // Of thousands of versions, most have their verdict, and nothing is left to be done.
    let uid = name.metadata.uid.as_deref().unwrap_or_default();
    let mut verifications = caches.verifications.with_key(uid).into_iter().filter_map(|job| job.0.ok());
    let is_found = reconciler.findings.of(&*name).is_some();
    if !is_found && version.0.as_ref().is_ok_and(is_settled) && verifications.all(|job| finished(&job).is_some()) {
        return Ok(Action::await_change());
    }
    let _timer = context.metrics.time(NAME);
    let result = match &version.0 {
        Ok(readable) => {
            let caught = AssertUnwindSafe(reconcile_once(readable, &reconciler)).catch_unwind().await;
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
    written.map(drop).map_err(Error::Status)
}

async fn reconcile_once(version: &AdapterVersion, reconciler: &Reconciler) -> Result<Action, Error> {
    let Reconciler { context, details, findings, .. } = reconciler;
    let found = findings.of(version);
    let Some(observed) = observe(version, found, context).await? else {
        context.backoff.forget(version);
        details.forget(version);
        findings.forget(version);
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
        Some(refusal) if !decision.state.is_verdict() => decision.state.refused(refusal),
        _ => decision.state,
    };
    let status = status::status(&observed.version, &state, Timestamp::now());
    let told = observed.version.status.clone().unwrap_or_default();
    // One without a status waits like one that is verified: so far this is a detail.
    let is_detail = !state.is_verdict() && told.phase.is_none_or(|phase| phase == state.phase);
    let told_in = if told == status {
        details.forget(version);
        findings.forget(version);
        None
    } else if let Some(wait) = details.wait(version).filter(|_| is_detail) {
        Some(wait)
    } else {
        details.forget(version);
        let turned = told.phase != status.phase;
        apply_status::<AdapterVersion, _>(&context.client, &observed.version.metadata, &status, OPERATOR)
            .await
            .map_err(Error::Status)?;
        findings.forget(version);
        if state.is_verdict() && turned {
            let version = version.name_any();
            tracing::info!(version, namespace, phase = ?state.phase, message = state.message);
            // Good news are its job's.
            if state.is_bad() {
                let action = format!("{:?}", state.phase);
                context.announce(&observed.version, true, state.reason, &action, &state.message).await;
            }
        }
        None
    };
    // What the verdict came from goes only when the verdict is written.
    apply(&context.client, &namespace, changes(after)).await?;
    let again_in = match refusal {
        Some(_) => Some(context.backoff.next(version)),
        None => state.requeue,
    };
    let wait = again_in.into_iter().chain(told_in).min();
    Ok(wait.map_or_else(Action::await_change, Action::requeue))
}

/// Reads a version and the Job that verifies it; None if it is gone or going.
async fn observe(version: &AdapterVersion, found: Option<Found>, context: &Context) -> Result<Option<Observed>, Error> {
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
    Ok(Some(Observed { version, job, refusal, found }))
}

fn retry(version: Arc<Name<AdapterVersion>>, _: &Error, reconciler: Arc<Reconciler>) -> Action {
    Action::requeue(reconciler.context.backoff.next(&*version))
}
