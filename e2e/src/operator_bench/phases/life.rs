//! What a whole run costs: from its FineTuneJob's creation to Succeeded.

use std::time::Duration;

use anyhow::Result;
use k8s_openapi::jiff::Timestamp;
use tokio::time::{interval, sleep};

use super::super::Bench;
use super::super::audit::{Call, census};
use super::super::population::{namespace, submit};
use super::super::watch::Key;

const LIVES: u32 = 20;
const PATIENCE: Duration = Duration::from_secs(240);
/// A life is over when its last writes are: those that clean up.
const AFTERWARDS: Duration = Duration::from_secs(6);

impl Bench {
    pub(crate) async fn lives(&mut self) -> Result<()> {
        eprintln!("{LIVES} whole lives");
        let from = Timestamp::now();
        let keys: Vec<Key> = (0..LIVES).map(|number| (namespace(number), format!("life-{number:03}"))).collect();
        let mut turns = interval(Duration::from_millis(500));
        for (namespace, name) in &keys {
            turns.tick().await;
            submit(&self.client, namespace, name).await?;
        }
        self.jobs.until_phase(&keys, "Succeeded", PATIENCE).await?;
        sleep(AFTERWARDS).await;
        let calls = self.audit.since(from)?;
        let lives: Vec<Vec<&Call>> = keys
            .iter()
            .map(|(namespace, name)| {
                calls.iter().filter(|call| call.namespace == *namespace && call.is_about(name)).collect()
            })
            .collect();
        let told = self.jobs.seen(&keys[0]).map(|seen| seen.told).unwrap_or_default();
        self.figures.note(format!("statuses of one life: {}", told.join(" | ")));
        let count = |counts: fn(&Call) -> bool| -> Vec<f64> {
            lives.iter().map(|calls| calls.iter().filter(|call| counts(call)).count() as f64).collect()
        };
        let mean = |counts: Vec<f64>| counts.iter().sum::<f64>() / f64::from(LIVES);
        // Progress has a limit of its own.
        let writes = count(|call| call.is_work() && !call.is_progress());
        self.figures.set("life_writes", writes.iter().copied().fold(0.0, f64::max));
        self.figures.set("life_writes_mean", mean(writes));
        self.figures.set("life_progress_writes", mean(count(Call::is_progress)));
        self.figures.set("life_events", mean(count(|call| call.is_work() && call.resource == "events")));
        self.figures.set("life_conflicts", mean(count(|call| call.is_work() && !call.is_accepted())));
        self.figures.set("life_reads", mean(count(|call| !call.is_write())));
        if let Some(life) = lives.first() {
            self.figures.note(format!("one life: {}", census(life.iter().copied())));
        }
        Ok(())
    }
}
