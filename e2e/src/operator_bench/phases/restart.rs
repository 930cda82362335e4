//! A start on ten thousand jobs: the first one, whose statuses it may have to write anew, and one that finds them as they
//! should be but for a few that were changed meanwhile.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use k8s_openapi::jiff::Timestamp;
use tokio::time::sleep;

use super::super::Bench;
use super::super::audit::{Call, at_once, census};
use super::super::population::{active, finished, namespace};
use super::super::replica::Replica;
use super::super::watch::Key;

/// Nothing was reconciled for so long: nothing is left to be.
const QUIET: Duration = Duration::from_secs(4);
const PATIENCE: Duration = Duration::from_secs(300);
const POLL: Duration = Duration::from_millis(100);
/// Jobs that are changed while no operator runs.
const CHANGED: u32 = 100;

/// When a replica had reconciled everything once, and when it came to rest.
struct Start {
    all: Duration,
    quiet: Duration,
    ready: Duration,
    reconciles: u64,
}

impl Bench {
    pub(crate) async fn first_start(&mut self) -> Result<Replica> {
        eprintln!("the first start");
        let from = Timestamp::now();
        let mut replica = self.launcher.start().await?;
        let start = self.until_quiet(&mut replica).await?;
        self.figures.set("first_start_quiet", start.quiet.as_secs_f64());
        let calls = self.audit.since(from)?;
        self.figures.set("first_start_writes", calls.iter().filter(|call| call.is_work()).count() as f64);
        self.figures.note(format!("first start: {}", census(&calls)));
        self.remember_peak(&replica)?;
        // The bench's own watch may lag behind so many objects at once.
        let expected = (self.options.active as usize, self.options.finished as usize);
        let count = || (self.jobs.in_phase("Running"), self.jobs.in_phase("Succeeded"));
        let begun = Instant::now();
        while count() != expected {
            ensure!(begun.elapsed() < PATIENCE, "of jobs that run and that have ended there are {:?}", count());
            sleep(POLL).await;
        }
        Ok(replica)
    }

    pub(crate) async fn restart(&mut self, before: Replica) -> Result<Replica> {
        eprintln!("a restart");
        before.terminate().await?;
        let mut changed = Vec::new();
        for step in 0..CHANGED {
            let key = self.some_job(step * 97);
            self.change(&key).await?;
            changed.push(key);
        }
        // The bench's own watch has seen them, too.
        self.jobs.until(&changed, PATIENCE, |seen| seen.generation > seen.observed_generation).await?;
        let from = Timestamp::now();
        let mut replica = self.launcher.start().await?;
        let start = self.until_quiet(&mut replica).await?;
        let cpu = replica.cpu_seconds()?;
        self.jobs.until(&changed, PATIENCE, |seen| seen.caught_up.is_some()).await?;
        let seen = changed.iter().filter_map(|key| self.jobs.seen(key)?.caught_up).max();
        let seen = seen.map_or(Duration::ZERO, |at| at.saturating_duration_since(replica.begun));

        let calls = self.audit.since(from)?;
        let short = |call: &&Call| !matches!(call.verb.as_str(), "watch" | "list") && !call.is_of_lease();
        self.figures.set("restart_reconciled", start.all.max(seen).as_secs_f64());
        self.figures.set("restart_ready", start.ready.as_secs_f64());
        self.figures.set("restart_changes_seen", seen.as_secs_f64());
        self.figures.set("restart_reconciles", start.reconciles as f64);
        self.figures.set("restart_at_once", at_once(calls.iter().filter(short)) as f64);
        self.figures.set("restart_requests", calls.len() as f64);
        self.figures.set("restart_writes", calls.iter().filter(|call| call.is_work()).count() as f64);
        self.figures.set("restart_cpu", cpu);
        self.figures.note(format!("restart, quiet after {:.1} s: {}", start.quiet.as_secs_f64(), census(&calls)));
        self.remember_peak(&replica)?;
        Ok(replica)
    }

    /// A job of all, by a number that may be any.
    pub(crate) fn some_job(&self, number: u32) -> Key {
        let number = number % (self.options.finished + self.options.active);
        match number.checked_sub(self.options.active) {
            None => (namespace(number), active(number)),
            Some(number) => (namespace(number), finished(number)),
        }
    }

    pub(crate) fn remember_peak(&mut self, replica: &Replica) -> Result<()> {
        self.figures.raise("rss_peak", replica.memory()?.peak);
        Ok(())
    }

    /// Waits until a replica, just started, reconciles nothing any more.
    async fn until_quiet(&self, replica: &mut Replica) -> Result<Start> {
        let Self { options, .. } = self;
        replica.until_ready().await?;
        let ready = replica.begun.elapsed();
        let (mut all, mut last, mut changed) = (None, 0, Instant::now());
        loop {
            let counts = replica.reconciles()?;
            let of = |controller: &str| counts.get(controller).copied().unwrap_or(0);
            let sum = of("finetunejob") + of("adapterversion");
            if sum != last {
                (last, changed) = (sum, Instant::now());
            }
            let jobs = u64::from(options.finished + options.active);
            // Versions that have their verdict are left alone.
            if of("finetunejob") >= jobs {
                all.get_or_insert(changed);
            }
            let quiet = changed.duration_since(replica.begun);
            if last >= jobs && changed.elapsed() > QUIET {
                let all = all.map_or(quiet, |at| at.duration_since(replica.begun));
                return Ok(Start { all, quiet, ready, reconciles: last });
            }
            ensure!(replica.begun.elapsed() < PATIENCE, "{} still reconciles: {counts:?}", replica.name);
            sleep(POLL).await;
        }
    }
}
