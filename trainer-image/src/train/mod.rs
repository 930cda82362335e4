//! One run, from inputs to a published version. [`train`] is its table of contents; [`Run`] is the loop.

mod checkpoint;
mod recall;
mod schedule;
#[cfg(test)]
mod tests;

use std::{
    ops::ControlFlow::{self, Break, Continue},
    path::Path,
    time::Instant,
};

use chrono::NaiveDate;
use tunesmith_crds::{
    Method, RunSpec,
    adapter_version::Execution,
    evaluation::{Metrics, failure, perplexity},
    fine_tune_job::{OnNonFinite, Progress as Numbers, Training},
    run::{Outcome, TrainReport, TrainStage, TrainTask},
};
use tunesmith_engine::{Error as EngineError, IGNORE, LossSum, MicroBatch, NUMERICS_VERSION, Schedule, Trainer};

pub use self::{checkpoint::Checkpoints, schedule::schedule};
use crate::{
    data::{
        batches::{in_order, micro_batch},
        template::TemplateDate,
    },
    error::Error,
    history::{self, EvalPoint, History, TrainPoint, Window},
    inputs::{Inputs, day_of},
    method,
    model::Keep,
    progress::Progress,
    publish::{Claim, Manifest, Trained, publish, published},
    stop::Stop,
    store::{Role, Stores},
};

/// A run that has skipped so many steps in a row has diverged. (The description of `onNonFinite` says this number.)
const MAX_SKIPPED_IN_A_ROW: u64 = 10;

/// What a run works with.
#[derive(Clone, Copy)]
pub struct Context<'a> {
    /// Where URIs lead.
    pub stores: &'a Stores,
    /// A folder for downloads.
    pub work: &'a Path,
    /// Who watches.
    pub progress: &'a Progress,
    /// Whether to end early.
    pub stop: &'a Stop,
}

/// Trains what `spec` asks for and publishes it.
///
/// # Errors
/// Inputs, numbers or the store fail; the message says what to do.
pub fn train(spec: &RunSpec, context: Context<'_>) -> Result<Outcome, Error> {
    let task = spec.train.as_ref().ok_or_else(|| Error::Spec("the run spec has no train part".into()))?;
    let method = spec.method.as_ref().ok_or_else(|| Error::Spec("the run spec names no method".into()))?;
    let adapter = context.stores.open(Role::Output, &spec.adapter_uri())?;
    let version = adapter.join(&format!("v{}", task.version));
    let checkpoints = Checkpoints::new(&adapter, &task.input_digest, &spec.training);
    if let Some(report) = published(&version, &task.input_digest)? {
        context.progress.note(&format!("{} is published already, from the same inputs", version.uri()));
        clear(&checkpoints, spec, &report);
        return Ok(Outcome::Trained(report));
    }
    Claim::of(spec, task).check(&version)?;

    context.progress.stage(TrainStage::Loading);
    let day = day_of_run(task, &checkpoints)?;
    let inputs = Inputs::load(spec, context.stores, context.work, day, Keep::Whole)?;
    check_digests(task, &inputs)?;
    let mut run = Run::set_up(spec, method, &inputs, &checkpoints, context)?;
    if run.resume()?.is_break() {
        return Ok(Outcome::Preempted { step: run.history.step });
    }
    context.stop.hold_off();

    context.progress.stage(TrainStage::Training);
    if run.steps_to_the_end()?.is_break() {
        run.checkpoint()?;
        return Ok(Outcome::Preempted { step: run.history.step });
    }
    run.checkpoint()?;
    let published_step = run.load_best()?;
    if run.measure_recall(published_step)?.is_break() {
        return Ok(Outcome::Preempted { step: run.history.step });
    }
    if published_step == run.history.step {
        // For the sake of the recall. The best weights must not be taken for the last ones.
        run.checkpoint()?;
    }

    context.progress.stage(TrainStage::Publishing);
    let trained = Trained {
        spec,
        task,
        method,
        weights: run.trainer.weight_tensors(),
        epochs: inputs.batches.epoch(run.history.step),
        manifest: Manifest::new(
            spec,
            task,
            method,
            inputs.dataset.clone(),
            (run.metrics(), run.history.execution.clone()),
        ),
        history: &run.history,
        total_steps: inputs.batches.total_steps(),
        model: &inputs.model.folder,
    };
    let report = publish(&version, trained)?;
    clear(&checkpoints, spec, &report);
    Ok(Outcome::Trained(report))
}

/// Deletes the checkpoints of a version, unless a gate failed: a new version for other gates goes on from there.
pub fn clear(checkpoints: &Checkpoints, spec: &RunSpec, published: &TrainReport) {
    if failure(&spec.evaluation.judge(&published.metrics)).is_none() {
        checkpoints.clear();
    }
}

/// The day that a chat template writes: that of the checkpoint that the run goes on from, or else that of its preflight.
fn day_of_run(task: &TrainTask, checkpoints: &Checkpoints) -> Result<NaiveDate, Error> {
    let resumed = checkpoints.execution()?.and_then(|execution| execution.template_date);
    match resumed.as_ref().or(task.template_date.as_ref()) {
        Some(day) => day_of("templateDate", day),
        None => Ok(TemplateDate::today().date()),
    }
}

fn check_digests(task: &TrainTask, inputs: &Inputs) -> Result<(), Error> {
    let pairs = [
        ("base model", &task.base_digest, &inputs.model.digest),
        ("dataset", &task.dataset_digest, &inputs.dataset.digest),
    ];
    if task.numerics_version != 0 && task.numerics_version != NUMERICS_VERSION {
        return Err(Error::InputsChanged(format!(
            "the inputs were checked by a trainer whose arithmetic has version {}, and this one has {NUMERICS_VERSION}",
            task.numerics_version
        )));
    }
    match pairs.into_iter().find(|(_, checked, found)| checked != found) {
        None => Ok(()),
        Some((what, checked, found)) => Err(Error::InputsChanged(format!(
            "the {what} has changed since it was checked ({checked} then, {found} now): leave the files alone while a run \
             lasts"
        ))),
    }
}

/// What came of a step.
enum Update {
    /// Nothing: the run is to end.
    Stopped,
    /// The weights are other ones.
    Done { loss: LossSum, grad_norm: f64 },
    /// The weights are the same: the loss or the gradient of these rows is NaN or infinite.
    NonFinite { what: &'static str, rows: Vec<usize> },
}

/// The training loop.
struct Run<'a> {
    training: &'a Training,
    inputs: &'a Inputs,
    trainer: Trainer,
    schedule: Schedule,
    checkpoints: &'a Checkpoints,
    history: History,
    /// The step of the newest checkpoint.
    saved: Option<u64>,
    /// What this process has done, to tell its speed: tokens, steps and seconds.
    here: (u64, u64, f64),
    progress: &'a Progress,
    stop: &'a Stop,
}

impl<'a> Run<'a> {
    fn set_up(
        spec: &'a RunSpec,
        method: &Method,
        inputs: &'a Inputs,
        checkpoints: &'a Checkpoints,
        context: Context<'a>,
    ) -> Result<Self, Error> {
        let training = &spec.training;
        let model = method::load(&inputs.model.folder, method)?;
        let options = method::trainer_options(method, training);
        Ok(Self {
            training,
            inputs,
            trainer: Trainer::new(model, &options)?,
            schedule: schedule(training, inputs.batches.total_steps())?,
            checkpoints,
            history: History::default(),
            saved: None,
            here: (0, 0, 0.0),
            progress: context.progress,
            stop: context.stop,
        })
    }

    /// Goes back to the newest whole checkpoint: weights, optimizer, dropout, position in the data and the curve. On
    /// the way there the base model is asked, if it has not been. Stopped then, there is nothing to save.
    fn resume(&mut self) -> Result<ControlFlow<()>, Error> {
        let state = self.checkpoints.newest()?.map(|(state, history)| {
            self.progress.note(&format!("resuming after step {}", history.step));
            self.saved = Some(history.step);
            self.history = history;
            state
        });
        self.history.execution = self.execution();
        // Before the first step nothing is changed: until its state is restored, this is the base model.
        if self.measure_recall(0)?.is_break() {
            return Ok(Break(()));
        }
        if let Some(state) = state {
            self.trainer.restore(&state)?;
        }
        Ok(Continue(()))
    }

    /// How this attempt is executed.
    fn execution(&self) -> Execution {
        let template_date = self.inputs.template_date.map(|date| date.to_string());
        Execution { device: "cpu".into(), world_size: 1, template_date }
    }

    /// Steps and evaluations until all are done or of no more use, or until the run is stopped.
    fn steps_to_the_end(&mut self) -> Result<ControlFlow<()>, Error> {
        loop {
            self.show();
            if self.is_evaluation_due() {
                if self.evaluate()?.is_break() {
                    return Ok(Break(()));
                }
                self.show();
            }
            if self.is_checkpoint_due() {
                self.checkpoint()?;
            }
            if self.is_over() {
                return Ok(Continue(()));
            }
            if self.step()?.is_break() {
                return Ok(Break(()));
            }
        }
    }

    /// Before the first step, after the last, and every `evalSteps`; not twice, if the run was resumed after one.
    fn is_evaluation_due(&self) -> bool {
        let (step, total) = (self.history.step, self.inputs.batches.total_steps());
        let due = step == 0 || step == total || self.training.eval_steps.is_some_and(|n| step.is_multiple_of(n));
        due && !self.history.is_evaluated()
    }

    /// Every `saveSteps`, and where no evaluation was better.
    fn is_checkpoint_due(&self) -> bool {
        let step = self.history.step;
        step > 0 && (step.is_multiple_of(self.training.save_steps) || self.best_step() == Some(step))
    }

    /// After the last step, or when `earlyStoppingPatience` is at its end.
    fn is_over(&self) -> bool {
        let threshold = self.training.early_stopping_threshold.unwrap_or_default();
        let count = self.history.evals_without_improvement(threshold);
        let is_patience_over = self.training.early_stopping_patience.is_some_and(|patience| count >= patience);
        is_patience_over || self.history.step >= self.inputs.batches.total_steps()
    }

    /// The step whose weights are published instead of the last, with `loadBestModelAtEnd`.
    fn best_step(&self) -> Option<u64> {
        self.checkpoints.best(&self.history)
    }

    /// One optimizer step. Stopped between two micro-batches, it leaves no trace: the step begins anew on resume.
    fn step(&mut self) -> Result<ControlFlow<()>, Error> {
        let started = Instant::now();
        let step = self.history.step;
        let micro_batches = self.inputs.batches.step(step);
        let batches = micro_batches.iter().map(|rows| micro_batch(&self.inputs.train, rows.iter().copied()));
        let batches: Vec<MicroBatch> = batches.collect::<Result<_, _>>()?;
        let tokens: usize = batches.iter().map(|batch| batch.tokens.len()).sum();
        let learning_rate = self.schedule.learning_rate(step);
        let (loss, grad_norm) = match self.update(&micro_batches, &batches, learning_rate)? {
            Update::Stopped => return Ok(Break(())),
            Update::Done { loss, grad_norm } => {
                self.history.skipped_in_a_row = 0;
                (loss, Some(grad_norm))
            }
            Update::NonFinite { what, rows } => {
                self.skip(what, &rows)?;
                (LossSum::default(), None)
            }
        };

        let seconds = started.elapsed().as_secs_f64();
        self.here = (self.here.0 + tokens as u64, self.here.1 + 1, self.here.2 + seconds);
        let history = &mut self.history;
        history.step += 1;
        history.micro_step += micro_batches.len() as u64;
        history.tokens += tokens as u64;
        history.train_seconds += seconds;
        history.window.sum += loss.sum;
        history.window.tokens += loss.tokens as u64;
        if history.step.is_multiple_of(self.training.logging_steps) || history.step == self.inputs.batches.total_steps()
        {
            self.log(grad_norm, learning_rate);
        }
        Ok(Continue(()))
    }

    /// Forward, backward and the optimizer.
    fn update(
        &mut self,
        micro_batches: &[Vec<usize>],
        batches: &[MicroBatch],
        learning_rate: f64,
    ) -> Result<Update, Error> {
        // Divided by the trained tokens of the whole batch, not averaged over micro-batches of different weight.
        let trained = batches.iter().flat_map(|batch| &batch.targets).filter(|&&target| target != IGNORE).count();
        let scale = 1.0 / trained as f32;
        let (mut loss, mut bad_rows) = (LossSum::default(), Vec::new());
        for (rows, batch) in micro_batches.iter().zip(batches) {
            if self.stop.is_requested() {
                return Ok(Update::Stopped);
            }
            let part = self.trainer.accumulate(batch, scale)?;
            if !part.sum.is_finite() {
                bad_rows.extend(rows);
            }
            loss.sum += part.sum;
            loss.tokens += part.tokens;
        }
        if !bad_rows.is_empty() {
            return Ok(Update::NonFinite { what: "loss", rows: bad_rows });
        }
        let clip = (self.training.max_grad_norm > 0.0).then_some(self.training.max_grad_norm);
        match self.trainer.step(learning_rate, clip) {
            Ok(stats) => Ok(Update::Done { loss, grad_norm: stats.grad_norm }),
            Err(EngineError::NonFinite { .. }) => {
                Ok(Update::NonFinite { what: "gradient", rows: micro_batches.concat() })
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Leaves the update of a step out, if the job allows it: weights and optimizer stay as they were before it.
    fn skip(&mut self, what: &str, rows: &[usize]) -> Result<(), Error> {
        let history = &mut self.history;
        history.skipped_steps += 1;
        history.skipped_in_a_row += 1;
        let (step, skipped, in_a_row) = (history.step + 1, history.skipped_steps, history.skipped_in_a_row);
        let rows = self.inputs.train.describe(rows)?;
        let problem = format!("step {step}: the {what} is not a number (NaN or infinite) on {rows}");
        let advice = "lower training.learningRate, or look at these rows";
        match self.training.on_non_finite {
            OnNonFinite::Stop => return Err(Error::Input(format!("{problem}; {advice}"))),
            OnNonFinite::Skip if in_a_row >= MAX_SKIPPED_IN_A_ROW => {
                return Err(Error::Input(format!("{problem}, the {in_a_row}th such step in a row; {advice}")));
            }
            OnNonFinite::Skip => {}
        }
        self.progress.note(&format!("{problem}: its update is left out, as of {skipped} steps so far"));
        self.trainer.clear_gradients();
        Ok(())
    }

    fn log(&mut self, grad_norm: Option<f64>, learning_rate: f64) {
        let window = std::mem::take(&mut self.history.window);
        if window.tokens == 0 {
            return; // Every step since the last entry was skipped.
        }
        let History { step, tokens, skipped_steps, .. } = self.history;
        let epoch = history::round(self.inputs.batches.epoch(step));
        let seconds = history::round(self.history.train_seconds);
        let (loss, grad_norm) = (window.mean(), grad_norm.map(history::round));
        self.history.logs.push(TrainPoint { step, epoch, loss, grad_norm, learning_rate, tokens, seconds });
        let (total_steps, tokens_per_second) = (self.inputs.batches.total_steps(), self.tokens_per_second());
        tracing::info!(
            step,
            total_steps,
            epoch,
            loss,
            grad_norm,
            learning_rate,
            tokens_per_second,
            skipped_steps,
            "trained"
        );
    }

    /// Measures the loss on the held-out rows.
    fn evaluate(&mut self) -> Result<ControlFlow<()>, Error> {
        self.progress.stage(TrainStage::Evaluating);
        let budget = self.training.max_length as usize * self.training.per_device_train_batch_size as usize;
        let mut loss = LossSum::default();
        for rows in in_order(self.inputs.eval.lengths(), budget) {
            if self.stop.is_requested() {
                return Ok(Break(()));
            }
            let part = self.trainer.evaluate(&micro_batch(&self.inputs.eval, rows)?)?;
            loss.sum += part.sum;
            loss.tokens += part.tokens;
        }
        let step = self.history.step;
        let epoch = history::round(self.inputs.batches.epoch(step));
        let seconds = history::round(self.history.train_seconds);
        let loss = Window { sum: loss.sum, tokens: loss.tokens as u64 }.mean();
        if !loss.is_finite() {
            return Err(Error::Input(format!("step {step}: the eval loss is {loss}; lower training.learningRate")));
        }
        self.history.evals.push(EvalPoint { step, epoch, loss, seconds });
        self.progress.note(&format!("eval loss after step {step}: {loss:.4}"));
        self.progress.stage(TrainStage::Training);
        Ok(Continue(()))
    }

    /// Makes what was done so far safe, unless it is.
    fn checkpoint(&mut self) -> Result<(), Error> {
        let step = self.history.step;
        if self.saved != Some(step) {
            // Where the last whole step ended; a step that was stopped half-way may have gone further.
            self.checkpoints.save(&self.trainer.state_tensors(), &self.history)?;
            self.saved = Some(step);
        }
        Ok(())
    }

    /// Goes back to the weights to publish, if these are not the last ones, and tells their step. The curve stays.
    fn load_best(&mut self) -> Result<u64, Error> {
        let last = self.history.step;
        let best = self.best_step().unwrap_or(last);
        if best != last {
            self.trainer.restore(&self.checkpoints.state(best)?)?;
            self.progress.note(&format!("step {best} had the lowest eval loss: its weights are published"));
        }
        Ok(best)
    }

    fn show(&self) {
        let (step, total_steps) = (self.history.step, self.inputs.batches.total_steps());
        let (_, steps, seconds) = self.here;
        let eta = seconds / steps.max(1) as f64 * (total_steps - step) as f64;
        self.progress.update(Numbers {
            summary: String::new(),
            step,
            total_steps,
            epoch: history::round(self.inputs.batches.epoch(step)),
            skipped_steps: self.history.skipped_steps,
            loss: self.history.train_loss(),
            eval_loss: self.history.eval_loss(),
            tokens_per_second: self.tokens_per_second(),
            eta_seconds: (steps > 0).then_some(eta.ceil() as u64),
        });
    }

    fn tokens_per_second(&self) -> Option<f64> {
        let (tokens, steps, seconds) = self.here;
        (steps > 0).then(|| (tokens as f64 / seconds.max(1e-9) * 10.0).round() / 10.0)
    }

    fn metrics(&self) -> Metrics {
        let best = self.history.best().filter(|_| self.training.load_best_model_at_end);
        let eval_loss = best.map_or(self.history.eval_loss(), |best| Some(best.loss));
        let probe = self.inputs.exam.as_ref().map(|exam| exam.digest.clone());
        let recall = |step| self.history.recall(step, probe.as_deref()?);
        Metrics {
            base_eval_loss: self.history.base_eval_loss(),
            eval_loss,
            base_perplexity: self.history.base_eval_loss().and_then(perplexity),
            perplexity: eval_loss.and_then(perplexity),
            base_recall: recall(0),
            recall: recall(best.map_or(self.history.step, |best| best.step)),
            probe_digest: probe.clone(),
            train_loss: self.history.train_loss(),
            steps: self.history.step,
            best_step: best.map(|best| best.step),
            skipped_steps: self.history.skipped_steps,
            tokens: self.history.tokens,
            train_seconds: (self.history.train_seconds * 10.0).round() / 10.0,
        }
    }
}
