//! What the operator does, in numbers for Prometheus. Labels are bounded: controllers, outcomes and phases, never names.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{
        counter::Counter,
        family::Family,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::Registry,
};
use tunesmith_crds::{FineTuneJob, FineTuneJobPhase as Phase};

use crate::cache::Index;

/// Every phase, so that one without jobs shows as 0.
const PHASES: [Phase; 9] = [
    Phase::Pending,
    Phase::Preflight,
    Phase::Queued,
    Phase::Starting,
    Phase::Running,
    Phase::Publishing,
    Phase::Succeeded,
    Phase::Failed,
    Phase::Suspended,
];

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ReconcileLabels {
    controller: &'static str,
    outcome: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ControllerLabel {
    controller: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct PhaseLabel {
    phase: String,
}

/// The operator's metrics; clones count together.
#[derive(Clone)]
pub struct Metrics {
    registry: Arc<Registry>,
    reconciles: Family<ReconcileLabels, Counter>,
    durations: Family<ControllerLabel, Histogram>,
    jobs: Family<PhaseLabel, Gauge>,
    all_jobs: Arc<Mutex<Vec<Arc<Index<FineTuneJob>>>>>,
}

impl Default for Metrics {
    fn default() -> Self {
        let reconciles = Family::default();
        let durations: Family<ControllerLabel, Histogram> =
            Family::new_with_constructor(|| Histogram::new(exponential_buckets(0.002, 2.0, 14)));
        let jobs = Family::default();
        let mut registry = Registry::with_prefix("tunesmith");
        registry.register("reconciles", "Reconciles by controller and outcome", reconciles.clone());
        registry.register("reconcile_duration_seconds", "Time that reconciles take", durations.clone());
        registry.register("jobs", "FineTuneJobs by phase", jobs.clone());
        Self { registry: Arc::new(registry), reconciles, durations, jobs, all_jobs: Arc::default() }
    }
}

impl Metrics {
    /// Counts a reconcile.
    pub fn count(&self, controller: &'static str, outcome: &'static str) {
        self.reconciles.get_or_create(&ReconcileLabels { controller, outcome }).inc();
    }

    /// Times a reconcile, until the value is dropped.
    pub fn time(&self, controller: &'static str) -> Timer {
        let histogram = self.durations.get_or_create(&ControllerLabel { controller }).clone();
        Timer { histogram, start: Instant::now() }
    }

    /// Counts the jobs of a scope's cache by phase, whenever the metrics are read.
    pub fn watch_jobs(&self, jobs: Arc<Index<FineTuneJob>>) {
        self.all_jobs.lock().unwrap_or_else(PoisonError::into_inner).push(jobs);
    }

    /// All metrics in the OpenMetrics text format.
    pub fn text(&self) -> String {
        let scopes = self.all_jobs.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let jobs: Vec<_> = scopes.iter().flat_map(|jobs| jobs.notes()).collect();
        for phase in PHASES {
            let count = jobs.iter().filter(|(_, job)| job.phase == phase).count();
            self.jobs.get_or_create(&PhaseLabel { phase: format!("{phase:?}") }).set(count as i64);
        }
        let mut text = String::new();
        // Writing to a String cannot fail.
        let _ = encode(&mut text, &self.registry);
        text
    }
}

/// Records the time from its creation until it is dropped.
pub struct Timer {
    histogram: Histogram,
    start: Instant,
}

impl Drop for Timer {
    fn drop(&mut self) {
        self.histogram.observe(self.start.elapsed().as_secs_f64());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reconciles_and_phases_are_counted() {
        let metrics = Metrics::default();
        metrics.count("finetunejob", "ok");
        drop(metrics.time("finetunejob"));
        let text = metrics.text();
        assert!(text.contains(r#"tunesmith_reconciles_total{controller="finetunejob",outcome="ok"} 1"#), "{text}");
        assert!(text.contains(r#"tunesmith_reconcile_duration_seconds_count{controller="finetunejob"} 1"#), "{text}");
        assert!(text.contains(r#"tunesmith_jobs{phase="Queued"} 0"#), "{text}");
    }
}
