//! The state machine against a model of the cluster that does its worst: pods end in any way, the spec changes, the
//! operator is killed between two steps, and caches lag behind.

use proptest::prelude::*;
use serde_json::json;
use tunesmith_crds::AdapterVersionPhase;

use super::*;
use crate::{
    controller::status::status,
    fixtures::{at, ended, failed, job, observed, passed, task, trained, trainer_job, version},
    trainer::Stage,
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
    /// GpuClasses go or come.
    Classes(bool),
}

/// One turn: an event, then a reconcile that sees the world of `lag` turns ago and is killed after `steps` steps.
#[derive(Clone, Debug)]
struct Turn {
    event: Event,
    lag: usize,
    steps: usize,
}

fn turns() -> impl Strategy<Value = Vec<Turn>> {
    let event = prop_oneof![
        2 => Just(Event::Wait),
        6 => (0..6_u8).prop_map(Event::End),
        2 => (0..5_u8).prop_map(Event::Advance),
        4 => Just(Event::Collect),
        3 => (0..4_u8).prop_map(Event::Verify),
        1 => (0..3_u64).prop_map(Event::ChangeSpec),
        1 => (10..20_u8).prop_map(Event::ChangeGate),
        1 => any::<bool>().prop_map(Event::Suspend),
        1 => (0..4).prop_map(Event::Limit),
        1 => Just(Event::DeleteVersion),
        1 => any::<bool>().prop_map(Event::Classes),
    ];
    let lag = prop_oneof![4 => Just(0_usize), 1 => Just(1), 1 => Just(2)];
    let steps = prop_oneof![4 => Just(usize::MAX), 1 => 0..3_usize];
    let turn = (event, lag, steps).prop_map(|(event, lag, steps)| Turn { event, lag, steps });
    prop::collection::vec(turn, 1..60)
}

struct World {
    observed: Observed,
    now: i64,
    created: u32,
    /// Every version that was published, with the run and the inputs that it came from.
    published: Vec<(u32, u32, String)>,
}

impl World {
    fn new() -> Self {
        Self { observed: observed(job(json!({}))), now: 0, created: 0, published: Vec::new() }
    }

    fn active_training(&self) -> usize {
        let attempts = self.observed.runs.values().flat_map(|run| &run.attempts);
        attempts.filter(|attempt| attempt.is_active()).count()
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
                for job in self.jobs().filter(|job| job.is_active()) {
                    job.state = JobState::Active { pods: pods.clone(), last_failure: None };
                }
            }
            Event::Collect => {
                for run in self.observed.runs.values_mut() {
                    run.preflight.take_if(|job| job.deleting);
                    run.attempts.retain(|job| !job.deleting);
                }
            }
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
            Event::DeleteVersion => drop(self.observed.versions.pop()),
            Event::Classes(there) => {
                self.observed.offers.classes = if *there { vec![crate::fixtures::cpu()] } else { Vec::new() };
            }
        }
    }

    fn jobs(&mut self) -> impl Iterator<Item = &mut TrainerJob> {
        self.observed.runs.values_mut().flat_map(|run| run.preflight.iter_mut().chain(&mut run.attempts))
    }

    /// The active Job ends. A training that publishes leaves its version in the store for good.
    fn end(&mut self, how: u8) {
        let now = self.now;
        for run in self.observed.runs.values_mut() {
            let task = run.task.as_ref().and_then(|task| task.train.clone());
            for job in run.preflight.iter_mut().chain(&mut run.attempts).filter(|job| job.is_active()) {
                let cause = match (how, job.stage) {
                    (0..=2, Stage::Preflight) => passed(),
                    (0..=2, _) => match &task {
                        Some(task) => {
                            self.published.push((task.version, run.number, task.input_digest.clone()));
                            trained(task.version)
                        }
                        None => failed("nothing to work on"),
                    },
                    (3, _) => failed("crashed"),
                    (4, _) => Cause::Disrupted { message: "preempted".into() },
                    _ => Cause::Final { message: "bad data".into() },
                };
                let mut over = ended(job.clone(), cause);
                if let JobState::Ended { ending, recorded } = &mut over.state {
                    ending.finished.0 = at(now);
                    *recorded = false;
                }
                *job = over;
            }
        }
    }

    /// Does what the API server would; false ends the list of steps.
    fn apply(&mut self, step: &Step) -> bool {
        self.created += 1;
        let (created, now) = (self.created, self.now);
        let fresh = |name: String, stage, attempt| TrainerJob {
            uid: format!("uid-{created}"),
            created: at(now),
            ..trainer_job(&name, stage, attempt)
        };
        match step {
            Step::RecordEnding { job: name, ending: seen } => {
                for job in self.jobs().filter(|job| job.name == *name) {
                    if let JobState::Ended { ending, recorded } = &mut job.state {
                        (*ending, *recorded) = (seen.clone(), true);
                    }
                }
            }
            Step::CreateVersion { run, report } => {
                let name = names::adapter_version("support", report.version);
                let Some(run) = self.observed.runs.get(run) else { return false };
                let Some(task) = run.task.as_ref().and_then(|task| task.train.as_ref()) else { return false };
                let mut record = version(report.version, &task.input_digest, None);
                record.spec.source.run = run.number;
                match self.observed.version(&name) {
                    None => self.observed.versions.push(record),
                    Some(there) => assert_eq!(there.spec.source, record.spec.source, "two runs share {name}"),
                }
            }
            Step::SettleRun { run, version } => {
                let Some(run) = self.observed.runs.get_mut(run) else { return false };
                run.version = Some(version.clone());
            }
            Step::DeleteJob(Named { uid, .. }) => {
                for job in self.jobs().filter(|job| job.uid == *uid) {
                    job.deleting = true;
                }
            }
            Step::DeleteConfigMap(gone) => {
                let newest = self.observed.runs.keys().last().copied();
                for run in self.observed.runs.values_mut().filter(|run| run.config_maps.contains(gone)) {
                    assert_ne!(Some(run.number), newest, "{gone:?} belongs to the current run");
                    run.config_maps.retain(|other| other != gone);
                    if gone.name.ends_with("-run") { run.task = None } else { run.spec = None }
                }
                self.observed.runs.retain(|_, run| !run.config_maps.is_empty() || run.jobs().next().is_some());
            }
            Step::StartRun { run } => {
                let spec = Some(self.observed.job.spec.clone());
                self.observed.runs.entry(*run).or_insert_with(|| Run {
                    number: *run,
                    spec,
                    config_maps: vec![named(format!("j-{run}-preflight"), created)],
                    ..Run::default()
                });
            }
            Step::CreatePreflight { run: number } => {
                let run = self.observed.runs.get_mut(number).expect("a Job of a run that was not started");
                run.preflight.get_or_insert_with(|| fresh(format!("j-{number}-preflight"), Stage::Preflight, 0));
            }
            Step::ReserveVersion { run, version, input_digest, .. } => {
                let name = format!("support-v{version}-run");
                let owner =
                    self.observed.runs.values().find(|other| other.config_maps.iter().any(|map| map.name == name));
                match owner.map(|owner| owner.number) {
                    Some(owner) => return owner == *run,
                    None => {
                        let reserved = task(&self.observed.job, *run, *version, input_digest);
                        let run = self.observed.runs.get_mut(run).expect("a version for a run that was not started");
                        assert!(run.task.is_none(), "a run reserves two versions");
                        run.task = Some(reserved);
                        run.config_maps.push(named(name, created));
                    }
                }
            }
            Step::CreateAttempt { run: number, attempt, version, .. } => {
                let active = self.active_training();
                let run = self.observed.runs.get_mut(number).expect("an attempt of a run that was not started");
                if run.attempts.iter().any(|there| there.attempt == *attempt) {
                    return true;
                }
                assert_eq!(active, 0, "a second training Job");
                let task = run.task.as_ref().and_then(|task| task.train.as_ref());
                assert_eq!(task.map(|task| task.version), Some(*version), "an attempt without its version");
                run.attempts.push(fresh(format!("j-{number}-{attempt}"), Stage::Train, *attempt));
                run.attempts.sort_by_key(|attempt| attempt.attempt);
            }
        }
        true
    }
}

fn named(name: String, created: u32) -> Named {
    Named { name, uid: format!("uid-{created}") }
}

/// What a lagging cache shows: children as they were, the job and the versions that its runs led to as they are.
fn seen(past: &Observed, present: &Observed) -> Observed {
    let settled = past.runs.values().filter_map(|run| present.version(run.version.as_ref()?)).cloned();
    let mut versions = past.versions.clone();
    for version in settled {
        versions.retain(|other| other.metadata.name != version.metadata.name);
        versions.push(version);
    }
    Observed { job: present.job.clone(), versions, ..past.clone() }
}

proptest! {
    #[test]
    fn whatever_happens_runs_stay_sound(turns in turns()) {
        let mut world = World::new();
        let mut past = vec![world.observed.clone()];
        let (mut cached, mut killed) = (0, false);
        for turn in turns {
            world.happen(&turn.event);
            past.push(world.observed.clone());
            // A cache may lag, but never goes back; an operator that has just started lists anew.
            let lag = if killed { 0 } else { turn.lag };
            cached = past.len().saturating_sub(1 + lag).max(cached);
            let view = seen(&past[cached], &world.observed);
            let decision = decide(&view, at(world.now));

            if decision.state.phase == Phase::Succeeded {
                let run = view.current().expect("success without a run");
                let version = view.version(run.version.as_ref().expect("success without a version"));
                let version = version.expect("success without a record");
                let phase = version.status.as_ref().and_then(|status| status.phase);
                prop_assert_eq!(phase, Some(AdapterVersionPhase::Available));
                let gates = view.job.spec.evaluation.judge(&version.spec.metrics);
                prop_assert!(gates.iter().all(|gate| gate.passed), "success with a failed gate: {:?}", gates);
            }
            for step in decision.steps.iter().take(turn.steps) {
                if let Step::CreateAttempt { run, .. } = step {
                    let failures = view.runs[run].failures();
                    prop_assert!(failures <= view.job.spec.backoff_limit as u32, "attempt after {} failures", failures);
                    prop_assert!(!view.job.spec.suspend, "an attempt of a suspended job");
                }
                if !world.apply(step) {
                    break;
                }
            }
            prop_assert!(world.active_training() <= 1);
            killed = turn.steps < usize::MAX;
            if !killed {
                world.observed.job.status = Some(status(&view, &decision.state, at(world.now)));
            }
        }
    }

    #[test]
    fn a_job_that_is_left_alone_comes_to_an_end(turns in turns()) {
        let mut world = World::new();
        for turn in turns {
            world.happen(&turn.event);
            let decision = decide(&world.observed, at(world.now));
            decision.steps.iter().take(turn.steps).all(|step| world.apply(step));
            world.observed.job.status = Some(status(&world.observed, &decision.state, at(world.now)));
        }
        world.happen(&Event::Suspend(false));
        world.happen(&Event::Classes(true));
        let mut phase = Phase::Pending;
        for _ in 0..12 {
            for event in [Event::Collect, Event::End(0), Event::Verify(1)] {
                world.happen(&event);
                let decision = decide(&world.observed, at(world.now));
                decision.steps.iter().all(|step| world.apply(step));
                phase = decision.state.phase;
            }
        }
        prop_assert!(matches!(phase, Phase::Succeeded | Phase::Failed), "{phase:?}: {:?}", world.observed.runs);
    }
}
