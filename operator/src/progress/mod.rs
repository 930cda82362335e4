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
use kube::{Client, api::ObjectMeta};
use serde_json::json;
use tokio::time::sleep;
use tunesmith_crds::{
    FineTuneJob,
    fine_tune_job::Progress,
    run::{LiveProgress, TrainReport, TrainStage},
};

use self::pod::poll;
use crate::{apply::apply_status, cache::Caches};

/// Manager of the field.
const MANAGER: &str = "tunesmith-progress";
/// Pods that are due are looked for this often.
const TICK: Duration = Duration::from_secs(1);
/// A pod is asked this often while its stage may end at any time.
const SOON: Duration = Duration::from_secs(2);
/// A job's progress is written at most this often, and a pod that goes on like this is asked as often.
const WRITE_EVERY: Duration = Duration::from_secs(15);
/// Pods that are asked at once.
const AT_ONCE: usize = 16;

/// What the running training pods say of themselves, by the UIDs of their Jobs.
#[derive(Clone, Default)]
pub struct Live(Arc<Mutex<HashMap<String, Pod>>>);

/// A running training pod.
#[derive(Clone)]
struct Pod {
    /// Namespace, name and UID of the FineTuneJob.
    job: ObjectMeta,
    address: IpAddr,
    said: Option<LiveProgress>,
    written: Option<(Progress, Instant)>,
    /// When to ask it next.
    due: Instant,
    /// Questions that it has not answered since it last did.
    unanswered: u32,
}

impl Live {
    /// What the pod of this Job said last.
    pub fn of(&self, uid: &str) -> Option<LiveProgress> {
        self.lock().get(uid)?.said.clone()
    }

    /// The pod of this Job runs, and is asked from now on.
    pub fn ask(&self, uid: &str, job: &FineTuneJob, address: IpAddr) {
        let ObjectMeta { name, namespace, uid: job_uid, .. } = job.metadata.clone();
        let job = ObjectMeta { name, namespace, uid: job_uid, ..Default::default() };
        let mut pods = self.lock();
        let pod = pods.entry(uid.to_owned());
        let new = Pod { job, address, said: None, written: None, due: Instant::now(), unanswered: 0 };
        pod.or_insert(new).address = address;
    }

    /// The pods of a job run no more, but for the one of this Job.
    pub fn only(&self, job: &FineTuneJob, uid: Option<&str>) {
        self.lock().retain(|known, pod| Some(known.as_str()) == uid || pod.job.uid != job.metadata.uid);
    }

    /// The pods that are to be asked now.
    fn due(&self) -> Vec<(String, Pod)> {
        let now = Instant::now();
        self.lock().iter().filter(|(_, pod)| pod.due <= now).map(|(uid, pod)| (uid.clone(), pod.clone())).collect()
    }

    fn change(&self, uid: &str, change: impl FnOnce(&mut Pod)) {
        if let Some(pod) = self.lock().get_mut(uid) {
            change(pod);
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Pod>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Asks all pods again and again. A job whose pod goes on to another stage is looked at.
pub async fn run(client: Client, live: Live, caches: Caches) {
    loop {
        sleep(TICK).await;
        let asked = stream::iter(live.due()).map(|(uid, pod)| ask(&client, &live, &caches, uid, pod));
        asked.buffer_unordered(AT_ONCE).collect::<()>().await;
    }
}

async fn ask(client: &Client, live: &Live, caches: &Caches, uid: String, pod: Pod) {
    let (namespace, name) =
        (pod.job.namespace.as_deref().unwrap_or_default(), pod.job.name.as_deref().unwrap_or_default());
    if !caches.jobs.has(namespace, name) {
        live.lock().remove(&uid);
        return;
    }
    let Some(said) = poll(pod.address).await else {
        let unanswered = pod.unanswered.saturating_add(1);
        let wait = SOON.saturating_mul(unanswered).min(WRITE_EVERY);
        return live.change(&uid, |pod| (pod.unanswered, pod.due) = (unanswered, Instant::now() + wait));
    };
    // Known first: whoever hears of it looks at once.
    live.change(&uid, |known| known.said = Some(said.clone()));
    if pod.said.as_ref().map(|before| before.stage) != Some(said.stage) {
        caches.job_queue.wake(namespace, name);
    }
    let is_due =
        pod.written.as_ref().is_none_or(|(before, at)| *before != said.progress && at.elapsed() >= WRITE_EVERY);
    let is_written = is_due && said.progress.total_steps > 0 && write(client, &pod.job, &said.progress).await;
    live.change(&uid, |known| {
        (known.unanswered, known.due) = (0, Instant::now() + next_question(&said));
        if is_written {
            known.written = Some((said.progress, Instant::now()));
        }
    });
}

/// When a pod is asked again: soon, where it is about to go on to another stage.
fn next_question(said: &LiveProgress) -> Duration {
    match said.stage {
        TrainStage::Loading | TrainStage::Evaluating => SOON,
        TrainStage::Training => said
            .progress
            .eta_seconds
            .map_or(WRITE_EVERY, |seconds| Duration::from_secs(seconds).clamp(SOON, WRITE_EVERY)),
        // Its end is seen without asking.
        TrainStage::Publishing => WRITE_EVERY,
    }
}

/// Writes a job's progress; false if that failed, which the next time mends.
pub async fn write(client: &Client, job: &ObjectMeta, progress: &Progress) -> bool {
    let summary = format!("{}/{}", progress.step, progress.total_steps);
    let progress = Progress { summary, ..progress.clone() };
    let status = json!({"progress": progress});
    match apply_status::<FineTuneJob, _>(client, job, &status, MANAGER).await {
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

#[cfg(test)]
mod tests {
    use super::*;

    fn said(stage: TrainStage, eta_seconds: Option<u64>) -> LiveProgress {
        LiveProgress { stage, progress: Progress { eta_seconds, ..Progress::default() } }
    }

    #[test]
    fn a_pod_is_asked_as_often_as_its_progress_is_written_and_soon_where_its_stage_ends() {
        let next = |stage, eta| next_question(&said(stage, eta)).as_secs();
        assert_eq!(next(TrainStage::Loading, None), 2);
        assert_eq!(next(TrainStage::Training, None), 15);
        assert_eq!(next(TrainStage::Training, Some(3600)), 15);
        assert_eq!(next(TrainStage::Training, Some(9)), 9);
        assert_eq!(next(TrainStage::Training, Some(0)), 2);
        assert_eq!(next(TrainStage::Publishing, None), 15);
    }
}
