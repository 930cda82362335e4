//! What is being done, and how long it took: one line a step.

use std::sync::LazyLock;
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

/// Keeps the spinners of steps that go on at once, and the lines between them, apart.
static SPINNERS: LazyLock<MultiProgress> = LazyLock::new(MultiProgress::new);

/// One step under way: a spinner on a terminal, and a line when it ends.
///
/// A step that is dropped before it said [`done`](Step::done) or [`skipped`](Step::skipped) has failed, and says so;
/// so `?` may leave a step at any point.
#[must_use = "a step ends with done() or skipped(); dropped, it has failed"]
pub struct Step {
    title: String,
    start: Instant,
    spinner: ProgressBar,
    ended: bool,
}

impl Step {
    /// Begins a step. `title` names the result, not the work: "etcd 3.7.3", "cluster up".
    pub fn start(title: impl Into<String>) -> Self {
        let step = Self::without_spinner(title);
        step.spinner.enable_steady_tick(Duration::from_millis(100));
        step
    }

    /// Begins a step that shows by itself how far it is.
    pub fn without_spinner(title: impl Into<String>) -> Self {
        let title = title.into();
        let spinner = SPINNERS
            .add(ProgressBar::no_length())
            .with_style(ProgressStyle::with_template("{spinner} {msg} ({elapsed})").expect("a valid template"))
            .with_message(title.clone());
        Self { title, start: Instant::now(), spinner, ended: false }
    }

    /// Says something about the work that is about to be done, such as that it takes long.
    pub fn note(&self, note: &str) {
        self.spinner.set_message(format!("{}, {note}", self.title));
        if self.spinner.is_hidden() {
            eprintln!("  {}, {note}", self.title);
        }
    }

    /// Ends a step that did its work.
    pub fn done(self) {
        self.end("✓", None);
    }

    /// Ends a step that found its work done; `reason` says what it found.
    pub fn skipped(self, reason: &str) {
        self.end("·", Some(reason));
    }

    fn end(mut self, mark: &str, reason: Option<&str>) {
        self.ended = true;
        self.spinner.finish_and_clear();
        match reason {
            Some(reason) => print(&format!("{mark} {}: {reason}", self.title)),
            None => print(&format!("{mark} {} ({})", self.title, human(self.start.elapsed()))),
        }
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        if !self.ended {
            self.spinner.finish_and_clear();
            print(&format!("✗ {} ({})", self.title, human(self.start.elapsed())));
        }
    }
}

fn print(line: &str) {
    SPINNERS.suspend(|| eprintln!("{line}"));
}

/// A duration as people say it: "0.4 s", "25 s", "9 min 20 s".
pub fn human(duration: Duration) -> String {
    let seconds = duration.as_secs_f64().round() as u64;
    match seconds {
        0..10 => format!("{:.1} s", duration.as_secs_f64()),
        10..60 => format!("{seconds} s"),
        _ => format!("{} min {} s", seconds / 60, seconds % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_read_as_people_say_them() {
        assert_eq!(human(Duration::from_millis(420)), "0.4 s");
        assert_eq!(human(Duration::from_secs(25)), "25 s");
        assert_eq!(human(Duration::from_secs(560)), "9 min 20 s");
    }
}
