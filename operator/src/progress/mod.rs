//! How far the training pods are: each is asked by itself, and writes into its job's `status.progress`, under a field
//! manager of its own. The controller hears of it only when a pod goes on to another stage.

mod pod;

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use futures::{StreamExt, stream};
use kube::{
    Client,
    runtime::reflector::{ObjectRef, Store},
};
use serde_json::json;
use tokio::{sync::mpsc, time::sleep};
use tunesmith_crds::{
    FineTuneJob,
    fine_tune_job::Progress,
    run::{LiveProgress, TrainReport},
};

use self::pod::poll;
use crate::{apply::apply_status, cache::Guarded};

/// Manager of the field.
const MANAGER: &str = "tunesmith-progress";
/// Pods are asked this often.
const EVERY: Duration = Duration::from_secs(2);
/// A job's progress is written at most this often.
const WRITE_EVERY: Duration = Duration::from_secs(15);
/// Pods that are asked at once.
const AT_ONCE: usize = 64;

/// What the running training pods say of themselves, by the UIDs of their Jobs.
#[derive(Clone, Default)]
pub struct Live(Arc<Mutex<HashMap<String, Pod>>>);

/// A running training pod.
#[derive(Clone)]
struct Pod {
    job: ObjectRef<Guarded<FineTuneJob>>,
    address: IpAddr,
    said: Option<LiveProgress>,
    written: Option<(Progress, Instant)>,
}

impl Live {
    /// What the pod of this Job said last.
    pub fn of(&self, uid: &str) -> Option<LiveProgress> {
        self.lock().get(uid)?.said.clone()
    }

    /// The pod of this Job runs, and is asked from now on.
    pub fn ask(&self, uid: &str, job: &FineTuneJob, address: IpAddr) {
        let job = ObjectRef::new(job.metadata.name.as_deref().unwrap_or_default())
            .within(job.metadata.namespace.as_deref().unwrap_or_default());
        let mut pods = self.lock();
        let pod = pods.entry(uid.to_owned());
        pod.or_insert(Pod { job, address, said: None, written: None }).address = address;
    }

    /// The pods of a job run no more, but for the one of this Job.
    pub fn only(&self, job: &FineTuneJob, uid: Option<&str>) {
        let (name, namespace) = (job.metadata.name.as_deref(), job.metadata.namespace.as_deref());
        self.lock().retain(|known, pod| {
            Some(known.as_str()) == uid
                || Some(pod.job.name.as_str()) != name
                || pod.job.namespace.as_deref() != namespace
        });
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Pod>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Asks all pods again and again. A job whose pod goes on to another stage is sent to `turned`.
pub async fn run(
    client: Client,
    live: Live,
    jobs: Store<Guarded<FineTuneJob>>,
    turned: mpsc::UnboundedSender<ObjectRef<Guarded<FineTuneJob>>>,
) {
    loop {
        sleep(EVERY).await;
        let pods: Vec<(String, Pod)> = live.lock().iter().map(|(uid, pod)| (uid.clone(), pod.clone())).collect();
        let asked = stream::iter(pods).map(|(uid, pod)| async move {
            let said = poll(pod.address).await;
            (uid, pod, said)
        });
        let mut asked = asked.buffer_unordered(AT_ONCE);
        while let Some((uid, pod, said)) = asked.next().await {
            let Some(said) = said else { continue };
            // Known first: whoever hears of it looks at once.
            if let Some(known) = live.lock().get_mut(&uid) {
                known.said = Some(said.clone());
            }
            if pod.said.as_ref().map(|before| before.stage) != Some(said.stage) {
                // The receiver lives as long as the controller.
                let _ = turned.send(pod.job.clone());
            }
            let is_due =
                pod.written.as_ref().is_none_or(|(before, at)| *before != said.progress && at.elapsed() >= WRITE_EVERY);
            let mut written = pod.written.clone();
            if is_due && said.progress.total_steps > 0 {
                let job = jobs.get(&pod.job);
                let job = job.as_ref().and_then(|job| job.0.as_ref().ok());
                if let Some(job) = job
                    && write(&client, job, &said.progress).await
                {
                    written = Some((said.progress.clone(), Instant::now()));
                }
            }
            if let Some(known) = live.lock().get_mut(&uid) {
                known.written = written;
            }
        }
    }
}

/// Writes a job's progress; false if that failed, which the next time mends.
pub async fn write(client: &Client, job: &FineTuneJob, progress: &Progress) -> bool {
    let summary = format!("{}/{}", progress.step, progress.total_steps);
    let progress = Progress { summary, ..progress.clone() };
    let status = json!({"progress": progress});
    match apply_status::<FineTuneJob, _>(client, &job.metadata, &status, MANAGER).await {
        Ok(()) => true,
        Err(error) => {
            tracing::warn!(%error, "cannot write a job's progress");
            false
        }
    }
}

/// The progress of a run that has published.
pub fn at_the_end(report: &TrainReport, before: Option<&Progress>) -> Progress {
    let before = before.cloned().unwrap_or_default();
    let steps = report.metrics.steps;
    Progress {
        summary: format!("{steps}/{steps}"),
        step: steps,
        total_steps: steps,
        loss: report.metrics.train_loss.or(before.loss),
        eval_loss: report.metrics.eval_loss.or(before.eval_loss),
        eta_seconds: Some(0),
        ..before
    }
}

/// The progress of a run that has not begun to train.
pub fn at_the_start(total_steps: u64) -> Progress {
    Progress { summary: format!("0/{total_steps}"), total_steps, ..Progress::default() }
}
