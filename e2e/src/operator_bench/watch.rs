//! The FineTuneJobs as a user's watch sees them: when each had its status.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use futures::{TryStreamExt, pin_mut};
use kube::api::{Api, ApiResource, DynamicObject};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Client, ResourceExt};
use tokio::time::sleep;
use tunesmith_crds::FineTuneJob;

const POLL: Duration = Duration::from_millis(50);

/// Namespace and name.
pub(crate) type Key = (String, String);

/// What was last seen of a job.
#[derive(Clone, Debug, Default)]
pub(crate) struct Seen {
    pub(crate) generation: i64,
    pub(crate) observed_generation: i64,
    /// When the status first told of the newest spec.
    pub(crate) caught_up: Option<Instant>,
    pub(crate) phase: String,
    pub(crate) message: String,
    /// What a job that lives as it is watched has told, in this order.
    pub(crate) told: Vec<String>,
}

/// All jobs.
#[derive(Clone, Default)]
pub(crate) struct Jobs(Arc<Mutex<HashMap<Key, Seen>>>);

impl Jobs {
    /// Watches from now on.
    pub(crate) fn start(client: Client) -> Self {
        let jobs = Self::default();
        tokio::spawn(jobs.clone().watch(client));
        jobs
    }

    async fn watch(self, client: Client) {
        let resource = ApiResource::erase::<FineTuneJob>(&());
        let api = Api::<DynamicObject>::all_with(client, &resource);
        let seen = watcher(api, watcher::Config::default()).default_backoff().applied_objects();
        pin_mut!(seen);
        loop {
            match seen.try_next().await {
                Ok(Some(job)) => self.take(&job),
                Ok(None) => return,
                Err(error) => eprintln!("  the watch on FineTuneJobs: {error}"),
            }
        }
    }

    fn take(&self, job: &DynamicObject) {
        let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
        let status = &job.data["status"];
        let mut all = self.all();
        let seen = all.entry((job.namespace().unwrap_or_default(), job.name_any())).or_default();
        let generation = job.metadata.generation.unwrap_or_default();
        if generation != seen.generation {
            (seen.generation, seen.caught_up) = (generation, None);
        }
        seen.observed_generation = status["observedGeneration"].as_i64().unwrap_or_default();
        if seen.observed_generation == generation {
            seen.caught_up.get_or_insert_with(Instant::now);
        }
        (seen.phase, seen.message) = (text(&status["phase"]), text(&status["message"]));
        if job.name_any().starts_with("life-") {
            let progress = text(&status["progress"]["summary"]);
            seen.told.push(format!("{}: {} ({progress})", seen.phase, seen.message));
        }
    }

    fn all(&self) -> MutexGuard<'_, HashMap<Key, Seen>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many jobs are in each of these phases.
    pub(crate) fn in_phase(&self, phase: &str) -> usize {
        self.all().values().filter(|seen| seen.phase == phase).count()
    }

    /// What was last seen of a job.
    pub(crate) fn seen(&self, key: &Key) -> Option<Seen> {
        self.all().get(key).cloned()
    }

    /// Waits until all of these satisfy `holds`; says which does not, after `limit`.
    pub(crate) async fn until(&self, keys: &[Key], limit: Duration, holds: impl Fn(&Seen) -> bool) -> Result<()> {
        let start = Instant::now();
        loop {
            let late = {
                let all = self.all();
                keys.iter()
                    .find(|key| !all.get(*key).is_some_and(&holds))
                    .map(|key| (key.clone(), all.get(key).cloned()))
            };
            match late {
                None => return Ok(()),
                Some((key, seen)) if start.elapsed() > limit => bail!("{key:?} is, after {limit:?}, still {seen:?}"),
                Some(_) => sleep(POLL).await,
            }
        }
    }

    pub(crate) async fn until_phase(&self, keys: &[Key], phase: &str, limit: Duration) -> Result<()> {
        self.until(keys, limit, |seen| seen.phase == phase).await
    }

    pub(crate) async fn until_message(&self, key: &Key, message: &str, limit: Duration) -> Result<()> {
        self.until(std::slice::from_ref(key), limit, |seen| seen.message == message).await
    }
}
