//! Follows the job to its end.

use std::io::IsTerminal;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use kube::Api;
use tokio::time::sleep;
use tunesmith_crds::fine_tune_job::Progress;
use tunesmith_crds::{AdapterVersion, FineTuneJob, FineTuneJobPhase, FineTuneJobStatus};
use tunesmith_e2e::{Step, human};

use crate::job::{NAME, NAMESPACE};
use crate::target::Target;

const POLL: Duration = Duration::from_secs(1);

/// Shows how far the job is until it has succeeded, and returns what it made.
///
/// # Errors
/// The job's own message, when it has failed or is suspended.
pub(crate) async fn to_version(target: &Target) -> Result<AdapterVersion> {
    let client = target.client().await?;
    let jobs: Api<FineTuneJob> = Api::namespaced(client.clone(), NAMESPACE);
    let step = Step::without_spinner("adapter");
    let mut view = View::new();
    let name = loop {
        let job = jobs.get(NAME).await.context("the job cannot be read")?;
        let status = job.status.filter(|status| status.observed_generation == job.metadata.generation);
        if let Some(status) = status {
            view.show(&status);
            let message = status.message.unwrap_or_default();
            match status.phase {
                Some(FineTuneJobPhase::Succeeded) => break status.latest_version.context("a job without a version")?,
                Some(FineTuneJobPhase::Failed) => bail!(
                    "The job has failed: {message}\nTo try again: kubectl delete finetunejob {NAME} -n {NAMESPACE}"
                ),
                Some(FineTuneJobPhase::Suspended) => bail!("The job is suspended: {message}"),
                _ => {}
            }
        }
        sleep(POLL).await;
    };
    view.end();
    step.done();
    Api::<AdapterVersion>::namespaced(client, NAMESPACE).get(&name).await.with_context(|| format!("no version {name}"))
}

/// A progress bar on a terminal; else a line for each phase and each tenth of the way.
struct View {
    bar: ProgressBar,
    phase: Option<FineTuneJobPhase>,
    tenths: u64,
}

impl View {
    fn new() -> Self {
        let style = ProgressStyle::with_template("  {bar:30} {pos}/{len} {msg}").expect("a valid template");
        let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr()).with_style(style);
        Self { bar, phase: None, tenths: 0 }
    }

    fn show(&mut self, status: &FineTuneJobStatus) {
        if let Some(phase) = status.phase.filter(|phase| self.phase != Some(*phase)) {
            self.phase = Some(phase);
            self.line(format!("  {phase:?}: {}", status.message.as_deref().unwrap_or_default()));
        }
        let Some(progress) = status.progress.as_ref().filter(|progress| progress.total_steps > 0) else { return };
        self.bar.set_length(progress.total_steps);
        self.bar.set_position(progress.step);
        self.bar.set_message(describe(progress));
        let tenths = 10 * progress.step / progress.total_steps;
        if tenths > self.tenths && !std::io::stderr().is_terminal() {
            self.line(format!("  step {}/{}: {}", progress.step, progress.total_steps, describe(progress)));
        }
        self.tenths = tenths;
    }

    fn line(&self, text: String) {
        self.bar.suspend(|| eprintln!("{text}"));
    }

    fn end(self) {
        self.bar.finish_and_clear();
    }
}

/// "loss 1.234 · 210 tokens/s · 2 min 5 s left", with what is known.
fn describe(progress: &Progress) -> String {
    let parts = [
        progress.loss.map(|loss| format!("loss {loss:.3}")),
        progress.tokens_per_second.map(|speed| format!("{speed:.0} tokens/s")),
        progress.eta_seconds.map(|seconds| format!("{} left", human(Duration::from_secs(seconds)))),
    ];
    parts.into_iter().flatten().collect::<Vec<_>>().join(" · ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_says_what_is_known() {
        let mut progress = Progress { loss: Some(1.2345), ..Progress::default() };
        assert_eq!(describe(&progress), "loss 1.234");
        progress.tokens_per_second = Some(210.4);
        progress.eta_seconds = Some(125);
        assert_eq!(describe(&progress), "loss 1.234 · 210 tokens/s · 2 min 5 s left");
    }
}
