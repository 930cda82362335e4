//! The figures of the bench by name, each with its aim: the one table of aims, what is printed, and what is written.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};

/// What a figure should be.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Aim {
    AtMost(f64),
    AtLeast(f64),
    /// It explains another.
    None,
}

/// A figure that the bench measures.
struct Kind {
    name: &'static str,
    what: &'static str,
    unit: &'static str,
    aim: Aim,
}

const fn kind(name: &'static str, what: &'static str, unit: &'static str, aim: Aim) -> Kind {
    Kind { name, what, unit, aim }
}

/// All figures, in the order in which they are told.
const KINDS: [Kind; 38] = [
    kind("rss_peak", "memory of the operator, at most", "MiB", Aim::AtMost(120.0)),
    kind("rss_settled", "memory of the operator, settled", "MiB", Aim::AtMost(120.0)),
    kind("first_start_quiet", "first start on these objects: until nothing is reconciled", "s", Aim::None),
    kind("first_start_writes", "first start: writes", "", Aim::None),
    kind("restart_reconciled", "restart: every job and version reconciled", "s", Aim::AtMost(20.0)),
    kind("restart_ready", "restart: /readyz", "s", Aim::None),
    kind("restart_changes_seen", "restart: changes made meanwhile have their status", "s", Aim::None),
    kind("restart_reconciles", "restart: reconciles", "", Aim::None),
    kind("restart_at_once", "restart: requests at once, besides lists and watches", "", Aim::AtMost(16.0)),
    kind("restart_requests", "restart: requests", "", Aim::None),
    kind("restart_writes", "restart: writes, besides the lease", "", Aim::None),
    kind("restart_cpu", "restart: CPU time", "s", Aim::None),
    kind("idle_cpu", "idle: of one core", "%", Aim::AtMost(1.0)),
    kind("idle_requests", "idle: requests to the API server", "/s", Aim::AtMost(1.0)),
    kind("idle_writes", "idle: writes, besides the lease", "", Aim::AtMost(0.0)),
    kind("idle_polls", "idle: questions to pods about their progress", "/s", Aim::None),
    kind("change_p50", "a change until its status: median", "s", Aim::None),
    kind("change_p99", "a change until its status: p99", "s", Aim::AtMost(1.0)),
    kind("training_cpu", "all active jobs train: of one core", "%", Aim::None),
    kind("training_requests", "all active jobs train: requests to the API server", "/s", Aim::None),
    kind("training_change_p99", "all active jobs train: a change until its status, p99", "s", Aim::AtMost(1.0)),
    kind("progress_interval", "progress of one job: shortest time between writes", "s", Aim::AtLeast(15.0)),
    kind("progress_writes", "all active jobs train: writes of progress", "/s", Aim::None),
    kind("life_writes", "a run's whole life: writes besides progress, at most", "", Aim::AtMost(20.0)),
    kind("life_writes_mean", "a run's whole life: writes besides progress, mean", "", Aim::None),
    kind("life_progress_writes", "a run's whole life: progress, which is written every 15 s at most", "", Aim::None),
    kind("life_events", "a run's whole life: of the other writes, events", "", Aim::None),
    kind("life_conflicts", "a run's whole life: writes that were refused", "", Aim::None),
    kind("life_reads", "a run's whole life: reads", "", Aim::None),
    kind("term_acts", "leader gets SIGTERM: the other one acts", "s", Aim::AtMost(2.0)),
    kind("term_lease", "leader gets SIGTERM: the other one holds the lease", "s", Aim::None),
    kind("term_ended", "leader gets SIGTERM: its process ends", "s", Aim::None),
    kind("kill_acts", "leader is killed: the other one acts", "s", Aim::AtMost(25.0)),
    kind("kill_lease", "leader is killed: the other one holds the lease", "s", Aim::None),
    kind("standby_rss", "memory of the replica that waits", "MiB", Aim::None),
    kind("jobs_twice", "Jobs and runs that were created twice", "", Aim::AtMost(0.0)),
    kind("jobs_superfluous", "fail-overs: Jobs beyond the three of a life", "", Aim::AtMost(0.0)),
    kind(
        "writes_without_lease",
        "fail-overs: writes of a replica after the other one had the lease",
        "",
        Aim::AtMost(0.0),
    ),
];

/// What was measured.
#[derive(Debug, Default)]
pub struct Figures {
    values: BTreeMap<&'static str, f64>,
    notes: Vec<String>,
}

impl Figures {
    pub(crate) fn set(&mut self, name: &'static str, value: f64) {
        debug_assert!(KINDS.iter().any(|kind| kind.name == name), "{name} is no figure");
        eprintln!("  {name} = {}", rounded(value));
        self.values.insert(name, value);
    }

    /// Keeps the highest.
    pub(crate) fn raise(&mut self, name: &'static str, value: f64) {
        let before = self.values.get(name).copied().unwrap_or(f64::MIN);
        self.values.insert(name, before.max(value));
    }

    /// Something that the reader of the figures should know.
    pub(crate) fn note(&mut self, note: impl Into<String>) {
        let note = note.into();
        eprintln!("  {note}");
        self.notes.push(note);
    }

    /// A table for people.
    pub fn table(&self) -> String {
        let mut lines = vec![format!("{:<72} {:>10}  {:<5} {:<10} met", "", "measured", "", "aim")];
        for kind in &KINDS {
            let measured = self.values.get(kind.name).map_or("-".into(), |value| rounded(*value));
            let aim = match kind.aim {
                Aim::AtMost(most) => format!("<= {most}"),
                Aim::AtLeast(least) => format!(">= {least}"),
                Aim::None => String::new(),
            };
            let met = match self.is_met(kind) {
                Some(true) => "yes",
                Some(false) => "NO",
                None => "",
            };
            lines.push(format!("{:<72} {measured:>10}  {:<5} {aim:<10} {met}", kind.what, kind.unit));
        }
        lines.extend(self.notes.iter().map(|note| format!("* {note}")));
        lines.join("\n")
    }

    /// Writes all figures by name, with what is known of the circumstances.
    pub(crate) fn write(&self, path: &Path, circumstances: Value) -> Result<()> {
        let figures: serde_json::Map<String, Value> = KINDS
            .iter()
            .map(|kind| {
                let (at_most, at_least) = match kind.aim {
                    Aim::AtMost(most) => (Some(most), None),
                    Aim::AtLeast(least) => (None, Some(least)),
                    Aim::None => (None, None),
                };
                let figure = json!({
                    "what": kind.what, "unit": kind.unit, "value": self.values.get(kind.name),
                    "atMost": at_most, "atLeast": at_least, "met": self.is_met(kind),
                });
                (kind.name.to_owned(), figure)
            })
            .collect();
        let report = json!({"circumstances": circumstances, "figures": figures, "notes": self.notes});
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
        }
        fs::write(path, format!("{report:#}\n")).with_context(|| format!("cannot write {}", path.display()))
    }

    fn is_met(&self, kind: &Kind) -> Option<bool> {
        let value = *self.values.get(kind.name)?;
        match kind.aim {
            Aim::AtMost(most) => Some(value <= most),
            Aim::AtLeast(least) => Some(value >= least),
            Aim::None => None,
        }
    }
}

fn rounded(value: f64) -> String {
    match value.abs() {
        0.0 => "0".into(),
        small if small < 10.0 => format!("{value:.3}").trim_end_matches('0').trim_end_matches('.').into(),
        _ => format!("{value:.1}").trim_end_matches(".0").into(),
    }
}

/// The value below which a `share` of `values` lies; the highest for a share of 1.
pub(crate) fn quantile(values: &mut [f64], share: f64) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let last = values.len().checked_sub(1)?;
    let rank = (share * values.len() as f64).ceil() as usize;
    values.get(rank.saturating_sub(1).min(last)).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_used_once() {
        let mut names: Vec<&str> = KINDS.iter().map(|kind| kind.name).collect();
        names.sort_unstable();
        let all = names.len();
        names.dedup();
        assert_eq!(names.len(), all);
    }

    #[test]
    fn an_aim_is_met_at_its_bound_and_missed_beyond() {
        let mut figures = Figures::default();
        figures.set("change_p99", 1.0);
        figures.set("progress_interval", 14.9);
        let json = |name: &str| figures.is_met(KINDS.iter().find(|kind| kind.name == name).unwrap());
        assert_eq!((json("change_p99"), json("progress_interval"), json("rss_peak")), (Some(true), Some(false), None));
    }

    #[test]
    fn the_99th_percentile_of_few_values_is_the_highest() {
        let mut values: Vec<f64> = (1..=50).map(f64::from).collect();
        assert_eq!(quantile(&mut values, 0.99), Some(50.0));
        assert_eq!(quantile(&mut values, 0.5), Some(25.0));
        assert_eq!(quantile(&mut [], 0.5), None);
    }
}
