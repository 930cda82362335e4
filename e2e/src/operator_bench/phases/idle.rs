//! An operator on whose jobs nothing happens, and one whose active jobs all train.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use anyhow::Result;
use k8s_openapi::jiff::Timestamp;
use tokio::time::sleep;

use super::super::Bench;
use super::super::audit::{Call, census};
use super::super::replica::Replica;

/// How long all active jobs train.
const TRAINING: Duration = Duration::from_secs(65);

impl Bench {
    pub(crate) async fn idle(&mut self, replica: &Replica) -> Result<()> {
        eprintln!("idle");
        let (cpu, asked, from, start) =
            (replica.cpu_seconds()?, self.trainers.asked(), Timestamp::now(), Instant::now());
        sleep(self.options.idle).await;
        let seconds = start.elapsed().as_secs_f64();
        let calls = self.audit.since(from)?;
        self.figures.set("rss_settled", replica.memory()?.now);
        self.figures.set("idle_cpu", (replica.cpu_seconds()? - cpu) / seconds * 100.0);
        self.figures.set("idle_requests", calls.len() as f64 / seconds);
        self.figures.set("idle_writes", calls.iter().filter(|call| call.is_work()).count() as f64);
        self.figures.set("idle_polls", (self.trainers.asked() - asked) as f64 / seconds);
        self.figures.note(format!("idle for {seconds:.0} s: {}", census(&calls)));
        Ok(())
    }

    pub(crate) async fn training(&mut self, replica: &Replica) -> Result<()> {
        eprintln!("all active jobs train");
        self.trainers.go(true);
        // The first write comes at once; what counts is how it goes on.
        let (cpu, from, start) = (replica.cpu_seconds()?, Timestamp::now(), Instant::now());
        let changes = self.changes(None, "training_change_p99").await;
        sleep(TRAINING.saturating_sub(start.elapsed())).await;
        let seconds = start.elapsed().as_secs_f64();
        self.trainers.go(false);
        let calls = self.audit.since(from)?;
        let progress: Vec<&Call> = calls.iter().filter(|call| call.is_progress()).collect();
        self.figures.set("training_cpu", (replica.cpu_seconds()? - cpu) / seconds * 100.0);
        self.figures.set("training_requests", calls.len() as f64 / seconds);
        self.figures.set("progress_writes", progress.len() as f64 / seconds);
        if let Some(interval) = shortest_interval(&progress) {
            self.figures.set("progress_interval", interval);
        }
        self.figures.note(format!("training for {seconds:.0} s: {}", census(&calls)));
        self.remember_peak(replica)?;
        changes
    }
}

/// The shortest time between two writes about the same object, in seconds.
fn shortest_interval(calls: &[&Call]) -> Option<f64> {
    let mut last: HashMap<(&str, &str), Timestamp> = HashMap::new();
    let mut calls = calls.to_vec();
    calls.sort_by_key(|call| call.begun);
    let intervals = calls.iter().filter_map(|call| {
        let before = last.insert((&call.namespace, &call.name), call.begun)?;
        Some(call.begun.duration_since(before).as_secs_f64())
    });
    intervals.min_by(f64::total_cmp)
}
