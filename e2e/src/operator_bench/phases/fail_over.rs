//! Two replicas: how long until the other one acts, and whether anything is done twice.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use k8s_openapi::jiff::Timestamp;
use rustix::process::Signal;
use tokio::time::{interval, sleep};

use super::super::Bench;
use super::super::audit::{Call, census};
use super::super::population::{namespace, submit};
use super::super::replica::Replica;
use super::super::watch::Key;

/// Jobs that are created around the leader's end.
const ARRIVALS: u32 = 20;
const ARRIVE_EVERY: Duration = Duration::from_millis(250);
/// The leader ends in the midst of them.
const BEFORE: Duration = Duration::from_millis(2600);
const PATIENCE: Duration = Duration::from_secs(180);
/// Jobs of one life: preflight, training, verification.
const JOBS_OF_A_LIFE: usize = 3;

/// How a leader ends.
#[derive(Clone, Copy, Debug)]
pub(crate) enum End {
    /// It is asked to.
    Term,
    /// It is not.
    Kill,
}

impl Bench {
    /// Ends the leader while jobs arrive; the replica that leads then.
    pub(crate) async fn fail_over(&mut self, mut leader: Replica, end: End) -> Result<Replica> {
        let (signal, prefix, acts, lease) = match end {
            End::Term => (Signal::TERM, "term", "term_acts", "term_lease"),
            End::Kill => (Signal::KILL, "kill", "kill_acts", "kill_lease"),
        };
        eprintln!("fail-over, by {prefix}");
        let mut standby = self.launcher.start().await?;
        standby.until_ready().await?;
        sleep(Duration::from_secs(5)).await;
        self.figures.raise("standby_rss", standby.memory()?.now);

        let keys: Vec<Key> = (0..ARRIVALS).map(|number| (namespace(number), format!("{prefix}-{number:03}"))).collect();
        let arrivals = {
            let (client, keys) = (self.client.clone(), keys.clone());
            tokio::spawn(async move {
                let mut turns = interval(ARRIVE_EVERY);
                for (namespace, name) in &keys {
                    turns.tick().await;
                    submit(&client, namespace, name).await?;
                }
                anyhow::Ok(())
            })
        };
        let from = Timestamp::now();
        sleep(BEFORE).await;
        self.remember_peak(&leader)?;
        let (ended, ended_at) = (Timestamp::now(), Instant::now());
        leader.signal(signal);
        leader.ended().await?;
        if matches!(end, End::Term) {
            self.figures.set("term_ended", ended_at.elapsed().as_secs_f64());
        }
        arrivals.await??;
        self.jobs.until_phase(&keys, "Succeeded", PATIENCE).await?;
        sleep(Duration::from_secs(6)).await;

        let calls = self.audit.since(from)?;
        let of_standby =
            |call: &&Call| call.credential == standby.credential && call.is_accepted() && call.begun > ended;
        let seconds = |call: &Call| call.ended.duration_since(ended).as_secs_f64();
        let taken = calls.iter().filter(of_standby).find(|call| call.is_of_lease() && call.is_write());
        let taken = taken.context("nobody took the lease")?;
        let acted = calls.iter().filter(of_standby).find(|call| call.is_work()).context("nobody acts")?;
        self.figures.set(lease, seconds(taken));
        self.figures.set(acts, seconds(acted));
        let late = |call: &&Call| call.credential == leader.credential && call.is_work() && call.begun > taken.ended;
        let late: Vec<&Call> = calls.iter().filter(late).collect();
        self.figures.raise("writes_without_lease", late.len() as f64);
        if !late.is_empty() {
            self.figures.note(format!("{prefix}: the old leader wrote on: {}", census(late.iter().copied())));
        }
        let created = |(namespace, name): &Key| {
            let ours = |call: &&Call| call.namespace == *namespace && call.is_about(name);
            calls.iter().filter(ours).filter(|call| is_creation(call) && call.resource == "jobs").count()
        };
        let superfluous: usize = keys.iter().map(|key| created(key).saturating_sub(JOBS_OF_A_LIFE)).sum();
        self.figures.raise("jobs_superfluous", superfluous as f64);
        Ok(standby)
    }

    /// Whether any Job or run was created twice, in all that was done.
    pub(crate) fn doubles(&mut self) -> Result<()> {
        let mut created: BTreeMap<(String, String, String), usize> = BTreeMap::new();
        for call in self.audit.since(Timestamp::UNIX_EPOCH)? {
            if is_creation(&call) && matches!(call.resource.as_str(), "jobs" | "finetuneruns" | "adapterversions") {
                *created.entry((call.resource, call.namespace, call.name)).or_default() += 1;
            }
        }
        let twice: Vec<_> = created.iter().filter(|(_, times)| **times > 1).collect();
        self.figures.set("jobs_twice", twice.len() as f64);
        if let Some((what, times)) = twice.first() {
            self.figures.note(format!("created {times} times: {what:?}"));
        }
        Ok(())
    }
}

fn is_creation(call: &Call) -> bool {
    call.verb == "create" && call.is_accepted()
}
