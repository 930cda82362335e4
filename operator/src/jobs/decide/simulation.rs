//! The state machine against a simulated cluster that does its worst: pods end in any way, the spec changes, the operator
//! is killed between any two writes, and its caches lag behind, each of them by itself.

use std::collections::BTreeMap;

use proptest::prelude::*;
use serde_json::json;
use tunesmith_crds::{AdapterVersionPhase, FineTuneRunStatus, names, run::Outcome};

use super::*;
use crate::{
    fixtures::{at, ended, failed, job, observed, passed, train_report, trainer_defaults, trainer_job, version},
    jobs::status::status,
    run::Work,
    runs::{
        active,
        advance::Step,
        build::{attempt_name, check_name, new_run},
        copied, with_conditions,
    },
    workload::{Cause, JobState, Pods, Stage, TrainerJob},
};

/// What happens between two reconciles.
#[derive(Clone, Debug)]
enum Event {
    /// Nothing but time.
    Wait,
    /// The active Job ends, in one of several ways.
    End(u8),
    /// The active Job's pods get so far.
    Advance(u8),
    /// Jobs that are being deleted are gone.
    Collect,
    /// Jobs that are over are gone: somebody cleaned up.
    Forget,
    /// Versions get a verdict.
    Verify(u8),
    /// The user changes the spec, or changes it back.
    ChangeSpec(u64),
    /// The user sets the one gate to this eval loss, in tenths; what is trained has 1.5.
    ChangeGate(u8),
    /// The user suspends or resumes.
    Suspend(bool),
    /// The user changes backoffLimit.
    Limit(i32),
    /// The user deletes the newest version.
    DeleteVersion,
    /// The user wants the versions somewhere else, or back where they were.
    Move(bool),
    /// GpuClasses go or come.
    Classes(bool),
}

/// One turn: an event, then a reconcile that sees records and Jobs of so many turns ago, and is killed after `writes`.
#[derive(Clone, Debug)]
struct Turn {
    event: Event,
    records_lag: usize,
    jobs_lag: usize,
    writes: usize,
}

fn turns() -> impl Strategy<Value = Vec<Turn>> {
    let event = prop_oneof![
        2 => Just(Event::Wait),
        6 => (0..9_u8).prop_map(Event::End),
        2 => (0..5_u8).prop_map(Event::Advance),
        4 => Just(Event::Collect),
        1 => Just(Event::Forget),
        3 => (0..4_u8).prop_map(Event::Verify),
        1 => (0..3_u64).prop_map(Event::ChangeSpec),
        1 => (10..20_u8).prop_map(Event::ChangeGate),
        1 => any::<bool>().prop_map(Event::Suspend),
        1 => (0..4).prop_map(Event::Limit),
        1 => Just(Event::DeleteVersion),
        1 => any::<bool>().prop_map(Event::Classes),
        1 => any::<bool>().prop_map(Event::Move),
    ];
    let lag = || prop_oneof![4 => Just(0_usize), 1 => Just(1), 1 => Just(2)];
    let writes = prop_oneof![4 => Just(usize::MAX), 1 => 0..4_usize];
    let turn = (event, lag(), lag(), writes);
    let turn = turn.prop_map(|(event, records_lag, jobs_lag, writes)| Turn { event, records_lag, jobs_lag, writes });
    prop::collection::vec(turn, 1..60)
}

/// A Job of the simulated cluster.
#[derive(Clone, Debug)]
struct SimulatedJob {
    job: TrainerJob,
    /// UID of the run that it belongs to.
    owner: String,
}

type Records = BTreeMap<u32, Run>;
type Jobs = BTreeMap<String, SimulatedJob>;

struct World {
    /// What the API server has of job, runs and versions.
    observed: Observed,
    jobs: Jobs,
    now: i64,
    created: u32,
}

impl World {
    fn new() -> Self {
        Self { observed: observed(job(json!({}))), jobs: Jobs::new(), now: 0, created: 0 }
    }

    fn active_training(&self) -> Vec<&SimulatedJob> {
        let trains =
            |job: &&SimulatedJob| job.job.stage != Stage::Preflight && matches!(job.job.state, JobState::Active { .. });
        self.jobs.values().filter(trains).collect()
    }

    fn happen(&mut self, event: &Event) {
        self.now += 400;
        let now = self.now;
        match event {
            Event::Wait => {}
            Event::End(how) => self.end(*how),
            Event::Advance(how) => {
                let pods = match how {
                    0 => Pods::Missing,
                    1 => Pods::Unschedulable("no node".into()),
                    2 => Pods::Starting("pulls".into()),
                    3 => Pods::Running { address: None, since: Some(at(now)) },
                    _ => Pods::Over,
                };
                for SimulatedJob { job, .. } in self.jobs.values_mut().filter(|job| !job.job.suspended) {
                    if let JobState::Active { .. } = job.state {
                        job.state = JobState::Active { pods: pods.clone(), last_failure: None };
                    }
                }
            }
            Event::Collect => self.jobs.retain(|_, job| !job.job.deleting),
            Event::Forget => self.jobs.retain(|_, job| !matches!(job.job.state, JobState::Ended(_))),
            Event::Verify(how) => {
                let phases = [
                    AdapterVersionPhase::Verifying,
                    AdapterVersionPhase::Available,
                    AdapterVersionPhase::Rejected,
                    AdapterVersionPhase::Missing,
                ];
                for version in &mut self.observed.versions {
                    let status = version.status.get_or_insert_default();
                    if matches!(status.phase, None | Some(AdapterVersionPhase::Verifying)) {
                        status.phase = Some(phases[usize::from(*how)]);
                    }
                }
            }
            Event::ChangeSpec(seed) => self.observed.job.spec.training.seed = *seed,
            Event::ChangeGate(tenths) => {
                let gate = json!({"metric": "eval_loss", "max": f64::from(*tenths) / 10.0});
                self.observed.job.spec.evaluation = serde_json::from_value(json!({"gates": [gate]})).unwrap();
            }
            Event::Suspend(suspend) => self.observed.job.spec.suspend = *suspend,
            Event::Limit(limit) => self.observed.job.spec.backoff_limit = *limit,
            Event::Move(away) => {
                let uri = if *away { "s3://elsewhere" } else { "s3://adapters" };
                self.observed.job.spec.output.uri = uri.parse().unwrap();
            }
            Event::DeleteVersion => drop(self.observed.versions.pop()),
            Event::Classes(there) => {
                self.observed.offers.classes = if *there { vec![crate::fixtures::cpu()] } else { Vec::new() };
            }
        }
    }

    /// The active Jobs end. A training that publishes leaves its version in the store for good.
    fn end(&mut self, how: u8) {
        let now = self.now;
        let runs = &self.observed.runs;
        for SimulatedJob { job, owner } in self.jobs.values_mut() {
            if job.suspended || !matches!(job.state, JobState::Active { .. }) {
                continue;
            }
            let run = runs.values().find(|run| run.object.uid == *owner);
            let settled = run.and_then(|run| run.record.settled.as_ref());
            let cause = match (how, job.stage) {
                (0..=2, Stage::Preflight) => passed(),
                (0..=2, _) => {
                    let mut report = train_report(settled.map_or(1, |settled| settled.version));
                    if let Some(run) = run {
                        let folder = run.spec.job_spec.output.uri.join("support");
                        report.uri = folder.join(&format!("v{}", report.version));
                    }
                    Cause::done(Outcome::Trained(report))
                }
                (3, _) => failed("crashed"),
                (4, _) => Cause::Disrupted { message: "preempted".into() },
                (5, _) => Cause::InputsChanged { message: "other data".into() },
                (6, Stage::Train | Stage::Copy) => Cause::VersionTaken { message: "another run has it".into() },
                (6 | 7, _) => Cause::StoreUnavailable { message: "no answer".into() },
                _ => Cause::Final { message: "bad data".into() },
            };
            let mut over = ended(job.clone(), cause);
            if let JobState::Ended(ending) = &mut over.state {
                ending.finished.0 = at(now);
                ending.started = Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(at(now - 100)));
            }
            *job = over;
        }
    }

    /// What the operator observes, with records and Jobs as its caches have them.
    fn view(&self, records: &Records, jobs: &Jobs) -> Observed {
        let runs = records.iter().map(|(number, run)| {
            let work = self.work(run, jobs);
            (*number, Run { work, ..run.clone() })
        });
        Observed { runs: runs.collect(), ..self.observed.clone() }
    }

    fn work(&self, run: &Run, cached: &Jobs) -> Work {
        let Some(attempt) = active(&run.record) else { return Work::None };
        let is_check = run.record.check.as_ref().is_some_and(|check| check.cause.is_none());
        let name = if is_check { check_name(run, attempt.number) } else { attempt_name(run, attempt.number) };
        let counts = |there: &&SimulatedJob| match &attempt.job_uid {
            Some(uid) => there.job.uid == *uid,
            None => there.owner == run.object.uid,
        };
        // What the cache lacks is asked of the API server.
        let there = cached.get(&name).filter(counts).or_else(|| self.jobs.get(&name).filter(counts));
        match (there, &attempt.job_uid) {
            (Some(there), _) => crate::fixtures::there(there.job.clone()),
            (None, Some(_)) => Work::Gone,
            (None, None) => Work::None,
        }
    }

    /// Carries a decision out as the operator does, until it is killed after so many writes; false if it was.
    fn carry_out(&mut self, view: &Observed, decision: &Decision, mut writes: usize) -> bool {
        let mut may_write = || {
            let may = writes > 0;
            writes = writes.saturating_sub(1);
            may
        };
        for (number, advance) in &decision.advances {
            let seen = &view.runs[number];
            let Some(there) = self.observed.runs.get_mut(number) else { return true };
            let is_current = there.object.resource_version == seen.object.resource_version;
            let record = with_conditions(advance.record.clone(), at(self.now));
            let changed = record != seen.record;
            if changed {
                if !is_current {
                    return true;
                }
                if !may_write() {
                    return false;
                }
                self.created += 1;
                there.object.resource_version = self.created.to_string();
                there.record = record;
            }
            for step in &advance.steps {
                if !changed && !is_current && matches!(step, Step::CreateCheck | Step::CreateAttempt(_)) {
                    return true;
                }
                if !may_write() {
                    return false;
                }
                self.apply(seen, &advance.record, step);
            }
        }
        if let Some((number, trigger)) = decision.start {
            if !may_write() {
                return false;
            }
            self.created += 1;
            let created = self.created;
            let run = new_run(&self.observed.job, number, trigger, &trainer_defaults());
            self.observed.runs.entry(number).or_insert_with(|| {
                let mut fresh = crate::fixtures::run(&self.observed.job, number);
                fresh.object.uid = format!("uid-run-{created}");
                fresh.spec = run.spec;
                fresh
            });
        }
        for gone in &decision.forget {
            let newest = self.observed.runs.keys().last().copied();
            self.observed.runs.retain(|number, run| Some(*number) == newest || run.object.uid != gone.uid);
            self.jobs.retain(|_, job| job.owner != gone.uid);
        }
        true
    }

    /// Does what the API server would.
    fn apply(&mut self, run: &Run, record: &FineTuneRunStatus, step: &Step) {
        self.created += 1;
        let uid = format!("uid-{}", self.created);
        match step {
            Step::CreateCheck => {
                let name = check_name(run, record.check.as_ref().expect("a check that is on record").number);
                let job = TrainerJob { uid, ..trainer_job(&name, Stage::Preflight) };
                self.jobs.entry(name).or_insert(SimulatedJob { job, owner: run.object.uid.clone() });
            }
            Step::CreateAttempt(_) => {
                let attempt = record.attempts.last().expect("an attempt that is on record");
                assert_eq!(attempt.cause, None, "an attempt that is over is begun");
                assert!(record.settled.is_some(), "an attempt before its inputs are settled");
                let name = attempt_name(run, attempt.number);
                let stage = if copied(record).is_some() { Stage::Copy } else { Stage::Train };
                let job = TrainerJob { uid, suspended: true, ..trainer_job(&name, stage) };
                self.jobs.entry(name).or_insert(SimulatedJob { job, owner: run.object.uid.clone() });
            }
            Step::Admit { uid, .. } => {
                for job in self.jobs.values_mut().filter(|job| job.job.uid == *uid) {
                    job.job.suspended = false;
                }
            }
            Step::DeleteJob { uid, .. } => {
                for job in self.jobs.values_mut().filter(|job| job.job.uid == *uid) {
                    job.job.deleting = true;
                }
            }
            Step::CreateVersion => {
                let report = record.published.as_ref().expect("a version that was published");
                let settled = record.settled.as_ref().expect("a version of settled inputs");
                let name = names::adapter_version("support", report.version);
                let mut made = version(report.version, &settled.input_digest, None);
                made.spec.source.run = run.number();
                made.spec.artifact.uri = report.uri.clone();
                match self.observed.version(&name) {
                    None => self.observed.versions.push(made),
                    Some(there) => assert_eq!(there.spec.source, made.spec.source, "two runs share {name}"),
                }
            }
        }
    }

    fn reconcile(&mut self, records: &Records, jobs: &Jobs, writes: usize) -> (Observed, Decision, bool) {
        let view = self.view(records, jobs);
        let decision = decide(&view, at(self.now));
        let finished = self.carry_out(&view, &decision, writes);
        if finished {
            self.observed.job.status = Some(status(&view, &decision, &decision.state, at(self.now)));
        }
        (view, decision, finished)
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1024))]

    #[test]
    fn whatever_happens_runs_stay_sound(turns in turns()) {
        let mut world = World::new();
        let mut past = vec![(world.observed.runs.clone(), world.jobs.clone())];
        let (mut records_seen, mut jobs_seen, mut killed) = (0, 0, false);
        for turn in turns {
            world.happen(&turn.event);
            past.push((world.observed.runs.clone(), world.jobs.clone()));
            // A cache may lag, but never goes back; an operator that has just started lists anew.
            let back = |lag: usize| past.len().saturating_sub(1 + if killed { 0 } else { lag });
            records_seen = back(turn.records_lag).max(records_seen);
            jobs_seen = back(turn.jobs_lag).max(jobs_seen);
            let (records, jobs) = (past[records_seen].0.clone(), past[jobs_seen].1.clone());
            let (view, decision, finished) = world.reconcile(&records, &jobs, turn.writes);

            if decision.state.phase == Phase::Succeeded {
                let run = view.current().expect("success without a run");
                let (_, advance) = decision.advances.iter().find(|(number, _)| *number == run.number()).unwrap();
                let name = advance.record.adapter_version.as_ref().expect("success without a version");
                let version = view.version(name).expect("success without a record");
                let phase = version.status.as_ref().and_then(|status| status.phase);
                prop_assert_eq!(phase, Some(AdapterVersionPhase::Available));
                let wanted = view.job.spec.output.uri.join("support");
                prop_assert_eq!(&version.spec.artifact.uri, &wanted.join(&format!("v{}", version.spec.version)));
                let gates = view.job.spec.evaluation.judge(&version.spec.metrics);
                prop_assert!(gates.iter().all(|gate| gate.passed), "success with a failed gate: {:?}", gates);
            }
            for (number, advance) in &decision.advances {
                let begins = advance.steps.iter().any(|step| matches!(step, Step::CreateAttempt(_)));
                let limit = view.job.spec.backoff_limit.unsigned_abs();
                prop_assert!(!begins || advance.record.failures <= limit, "an attempt after too many failures");
                prop_assert!(!begins || !view.job.spec.suspend, "an attempt of a suspended job");
                prop_assert!(!begins || Some(number) == view.runs.keys().last(), "an attempt of an older run");
            }
            let active = world.active_training();
            prop_assert!(active.len() <= 1, "two trainings at once: {:?}", active);
            for job in active {
                let run = world.observed.runs.values().find(|run| run.object.uid == job.owner);
                prop_assert!(run.is_some_and(|run| !run.record.is_done()), "a Job of a run that is over: {:?}", job);
            }
            killed = !finished;
        }
    }

    #[test]
    fn a_job_that_is_left_alone_comes_to_an_end(turns in turns()) {
        let mut world = World::new();
        for turn in turns {
            world.happen(&turn.event);
            let (records, jobs) = (world.observed.runs.clone(), world.jobs.clone());
            world.reconcile(&records, &jobs, turn.writes);
        }
        world.happen(&Event::Suspend(false));
        world.happen(&Event::Classes(true));
        let mut phase = Phase::Pending;
        for _ in 0..16 {
            for event in [Event::Collect, Event::End(0), Event::Verify(1)] {
                world.happen(&event);
                let (records, jobs) = (world.observed.runs.clone(), world.jobs.clone());
                phase = world.reconcile(&records, &jobs, usize::MAX).1.state.phase;
            }
        }
        prop_assert!(matches!(phase, Phase::Succeeded | Phase::Failed), "{phase:?}: {:?}", world.observed.runs);
        for run in world.observed.runs.values() {
            let recorded = run.record.published.is_none() || run.record.adapter_version.is_some();
            prop_assert!(recorded, "a version that was published is nowhere on record: {:?}", run);
        }
    }
}
