//! How far a run is: for whoever watches `/progress`, `/metrics`, a terminal, or the logs.

mod server;

use std::{
    io::{self, IsTerminal, Write},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use indicatif::{ProgressBar, ProgressStyle};
pub use server::serve;
use tunesmith_crds::{
    fine_tune_job::Progress as Numbers,
    run::{LiveProgress, TrainStage},
};

/// The progress of this process; clones show the same one.
#[derive(Clone)]
pub struct Progress {
    live: Arc<Mutex<LiveProgress>>,
    /// None where nobody watches a terminal: then every step is a log line instead.
    bar: Option<ProgressBar>,
}

impl Progress {
    /// Progress that a terminal shows as a bar, if standard error is one.
    pub fn new() -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new_spinner();
            bar.enable_steady_tick(Duration::from_millis(120));
            bar
        });
        Self { live: Arc::default(), bar }
    }

    /// What `/progress` answers now.
    pub fn live(&self) -> LiveProgress {
        self.lock().clone()
    }

    /// Another stage begins.
    pub fn stage(&self, stage: TrainStage) {
        self.lock().stage = stage;
        self.message(match stage {
            TrainStage::Loading => "loading model and data",
            TrainStage::Training => "training",
            TrainStage::Evaluating => "evaluating",
            TrainStage::Publishing => "publishing",
        });
    }

    /// Says in a few words what goes on.
    pub fn message(&self, message: &str) {
        match &self.bar {
            Some(bar) => bar.set_message(message.to_owned()),
            None => tracing::info!("{message}"),
        }
    }

    /// New numbers after a step or an evaluation.
    pub fn update(&self, numbers: Numbers) {
        if let Some(bar) = &self.bar {
            if bar.length() != Some(numbers.total_steps) {
                bar.set_length(numbers.total_steps);
                bar.set_style(style());
            }
            bar.set_position(numbers.step);
            bar.set_message(describe(&numbers));
        }
        let summary = format!("{}/{}", numbers.step, numbers.total_steps);
        self.lock().progress = Numbers { summary, ..numbers };
    }

    /// A line that stays: above the bar, or in the logs.
    pub fn note(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| drop(writeln!(io::stderr(), "{line}"))),
            None => tracing::info!("{line}"),
        }
    }

    /// Lines on standard output: what was asked for, not how it goes.
    pub fn page(&self, page: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| drop(writeln!(io::stdout(), "{page}"))),
            // A reader that is gone misses nothing.
            None => drop(writeln!(io::stdout(), "{page}")),
        }
    }

    /// Removes the bar.
    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }

    fn lock(&self) -> MutexGuard<'_, LiveProgress> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for Progress {
    fn default() -> Self {
        Self::new()
    }
}

fn style() -> ProgressStyle {
    ProgressStyle::with_template("{bar:30} step {pos}/{len}  {msg}")
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("━╸ ")
}

fn describe(numbers: &Numbers) -> String {
    let part = |name: &str, value: Option<f64>, decimals: usize| match value {
        Some(value) => format!("{name} {value:.decimals$}  "),
        None => String::new(),
    };
    let eta = numbers.eta_seconds.map_or(String::new(), |s| format!("{}:{:02} left", s / 60, s % 60));
    [
        part("loss", numbers.loss, 4),
        part("eval", numbers.eval_loss, 4),
        part("tokens/s", numbers.tokens_per_second, 0),
        eta,
    ]
    .concat()
}
