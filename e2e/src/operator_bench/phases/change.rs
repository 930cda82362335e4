//! How long a change of a job's spec takes until the status tells of it.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use kube::api::{Api, Patch, PatchParams};
use serde_json::json;
use tokio::time::interval;
use tunesmith_crds::FineTuneJob;

use super::super::Bench;
use super::super::figures::quantile;
use super::super::watch::Key;

const CHANGES: u32 = 200;
/// Between two changes.
const EVERY: Duration = Duration::from_millis(100);
const PATIENCE: Duration = Duration::from_secs(30);

impl Bench {
    /// Changes jobs, one after the other, and sees when the status of each tells of it: from before the change is sent until
    /// a watch has brought the status.
    pub(crate) async fn changes(&mut self, median: Option<&'static str>, p99: &'static str) -> Result<()> {
        eprintln!("{CHANGES} changes");
        let mut changes = Vec::new();
        let mut turns = interval(EVERY);
        for step in 0..CHANGES {
            turns.tick().await;
            let key = self.some_job(1 + step * 49);
            let begun = Instant::now();
            let generation = self.change(&key).await?;
            changes.push((key, generation, begun));
        }
        let keys: Vec<Key> = changes.iter().map(|(key, ..)| key.clone()).collect();
        tokio::time::sleep(Duration::from_secs(1)).await;
        self.jobs.until(&keys, PATIENCE, |seen| seen.caught_up.is_some()).await?;
        let mut times: Vec<f64> = changes
            .iter()
            .filter_map(|(key, generation, begun)| {
                let seen = self.jobs.seen(key).filter(|seen| seen.generation == *generation)?;
                Some(seen.caught_up?.saturating_duration_since(*begun).as_secs_f64())
            })
            .collect();
        let of = |share, times: &mut [f64]| quantile(times, share).context("no change was seen");
        if let Some(median) = median {
            self.figures.set(median, of(0.5, &mut times)?);
        }
        self.figures.set(p99, of(0.99, &mut times)?);
        Ok(())
    }

    /// Changes a job's spec without starting another run; the new generation.
    pub(crate) async fn change(&self, (namespace, name): &Key) -> Result<i64> {
        let jobs = Api::<FineTuneJob>::namespaced(self.client.clone(), namespace);
        let limit = self.jobs.seen(&(namespace.clone(), name.clone())).map_or(1, |seen| seen.generation) % 50;
        let patch = Patch::Merge(json!({"spec": {"runHistoryLimit": 20 + limit}}));
        let changed = jobs.patch(name, &PatchParams::default(), &patch).await?;
        changed.metadata.generation.context("it has a generation")
    }
}
