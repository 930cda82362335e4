//! How far the training pods are: each is asked by itself, and writes into its job's `status.progress`, under a field
//! manager of its own. The controller hears of it only when a pod goes on to another stage.

mod pod;

use std::{
    collections::HashMap,
    hash::{DefaultHasher, Hash, Hasher},
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use futures::{StreamExt, stream};
use kube::{Client, api::ObjectMeta};
use serde_json::json;
use tokio::{sync::Semaphore, time::sleep};
use tunesmith_crds::{
    FineTuneJob, FineTuneJobPhase as Phase,
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
/// A pod that goes on for long is asked this often.
const SELDOM: Duration = Duration::from_secs(30);
/// A job's progress is written at most this often.
const WRITE_EVERY: Duration = Duration::from_secs(15);
/// Pods that are asked at once.
const AT_ONCE: usize = 16;
/// Writes at once: they wait, not what else the API server is to do.
const WRITES_AT_ONCE: usize = 4;

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

    /// The pod of this Job runs, and is asked from now on. What another replica may have written of it is on record.
    pub fn ask(&self, uid: &str, job: &FineTuneJob, address: IpAddr) {
        let mut pods = self.lock();
        if let Some(pod) = pods.get_mut(uid) {
            pod.address = address;
            return;
        }
        let status = job.status.as_ref();
        let was_running = status.is_some_and(|status| status.phase == Some(Phase::Running));
        let written = status.and_then(|status| status.progress.clone()).filter(|_| was_running);
        // Those that another replica has asked before are asked one after the other, not all at once.
        let wait = if was_running { spread(uid, SELDOM) } else { Duration::ZERO };
        let ObjectMeta { name, namespace, uid: job_uid, .. } = job.metadata.clone();
        let pod = Pod {
            job: ObjectMeta { name, namespace, uid: job_uid, ..Default::default() },
            address,
            said: None,
            written: written.map(|progress| (progress, Instant::now())),
            due: Instant::now() + wait,
            unanswered: 0,
        };
        pods.insert(uid.to_owned(), pod);
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
    let turns = Semaphore::new(WRITES_AT_ONCE);
    loop {
        sleep(TICK).await;
        let asked = stream::iter(live.due()).map(|(uid, pod)| ask(&client, &live, &caches, &turns, uid, pod));
        asked.buffer_unordered(AT_ONCE).collect::<()>().await;
    }
}

async fn ask(client: &Client, live: &Live, caches: &Caches, turns: &Semaphore, uid: String, pod: Pod) {
    let (namespace, name) =
        (pod.job.namespace.as_deref().unwrap_or_default(), pod.job.name.as_deref().unwrap_or_default());
    if !caches.jobs.has(namespace, name) {
        live.lock().remove(&uid);
        return;
    }
    let Some(said) = poll(pod.address).await else {
        let unanswered = pod.unanswered.saturating_add(1);
        let wait = SOON.saturating_mul(unanswered).min(SELDOM);
        return live.change(&uid, |pod| (pod.unanswered, pod.due) = (unanswered, Instant::now() + wait));
    };
    // Known first: whoever hears of it looks at once.
    live.change(&uid, |known| known.said = Some(said.clone()));
    if pod.said.as_ref().map(|before| before.stage) != Some(said.stage) {
        caches.job_queue.wake(namespace, name);
    }
    let said = LiveProgress { progress: with_summary(said.progress), ..said };
    let is_due =
        pod.written.as_ref().is_none_or(|(before, at)| *before != said.progress && at.elapsed() >= WRITE_EVERY);
    let is_written = is_due && said.progress.total_steps > 0 && {
        // Nobody closes it.
        let _turn = turns.acquire().await;
        write(client, &pod.job, &said.progress).await
    };
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
        TrainStage::Training => {
            said.progress.eta_seconds.map_or(SELDOM, |seconds| Duration::from_secs(seconds / 2).clamp(SOON, SELDOM))
        }
        // Its end is seen without asking.
        TrainStage::Publishing => SELDOM,
    }
}

/// Writes a job's progress; false if that failed, which the next time mends.
pub async fn write(client: &Client, job: &ObjectMeta, progress: &Progress) -> bool {
    let status = json!({"progress": with_summary(progress.clone())});
    match apply_status::<FineTuneJob, _>(client, job, &status, MANAGER).await {
        Ok(_) => true,
        Err(error) => {
            tracing::warn!(%error, "cannot write a job's progress");
            false
        }
    }
}

fn with_summary(progress: Progress) -> Progress {
    Progress { summary: format!("{}/{}", progress.step, progress.total_steps), ..progress }
}

/// A time below `most` that follows from a text.
fn spread(text: &str, most: Duration) -> Duration {
    let mut hasher = DefaultHasher::new();
    text.hash(&mut hasher);
    most.mul_f64((hasher.finish() % 1000) as f64 / 1000.0)
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
    fn a_pod_is_asked_seldom_and_soon_where_its_stage_ends() {
        let next = |stage, eta| next_question(&said(stage, eta)).as_secs();
        assert_eq!(next(TrainStage::Loading, None), 2);
        assert_eq!(next(TrainStage::Training, None), 30);
        assert_eq!(next(TrainStage::Training, Some(3600)), 30);
        assert_eq!(next(TrainStage::Training, Some(18)), 9);
        assert_eq!(next(TrainStage::Training, Some(0)), 2);
        assert_eq!(next(TrainStage::Publishing, None), 30);
    }

    #[test]
    fn a_replica_that_takes_over_asks_pods_in_turn_and_knows_what_was_written() {
        let mut job = crate::fixtures::job(json!({}));
        let (live, address) = (Live::default(), IpAddr::from([10, 0, 0, 1]));
        live.ask("new", &job, address);
        assert_eq!(live.due().len(), 1);
        let progress = with_summary(Progress { step: 3, total_steps: 9, ..Progress::default() });
        job.status = Some(tunesmith_crds::FineTuneJobStatus {
            phase: Some(Phase::Running),
            progress: Some(progress.clone()),
            ..Default::default()
        });
        (0..50).for_each(|number| live.ask(&number.to_string(), &job, address));
        assert!(live.due().len() < 10);
        assert_eq!(live.lock()["7"].written.as_ref().map(|(progress, _)| progress), Some(&progress));
    }
}
