//! One run, from inputs to a published version. [`train`] is its table of contents; [`Run`] is the loop.

mod checkpoint;
mod history;
mod recall;
mod stop;
#[cfg(test)]
mod tests;

use std::{
    ops::ControlFlow::{self, Break, Continue},
    path::Path,
    time::Instant,
};

use tunesmith_crds::{
    Method, RunSpec,
    adapter_version::Metrics,
    evaluation::perplexity,
    fine_tune_job::{Lora, LrScheduler, Progress as Numbers, Training},
    run::{Outcome, TrainStage, TrainTask},
};
use tunesmith_engine::{
    Error as EngineError, IGNORE, LoraOptions, LossSum, MicroBatch, Model, Optimizer, Recompute, Schedule,
    ScheduleKind, TargetModules, Trainer, TrainerOptions, Warmup,
};

use self::checkpoint::Checkpoints;
pub use self::{
    history::{EvalPoint, History, RecallPoint, TrainPoint, Window},
    stop::Stop,
};
use crate::{
    data::batches::{in_order, micro_batch},
    error::Error,
    inputs::Inputs,
    progress::Progress,
    publish::{Manifest, Trained, publish, published},
    store::{Role, Stores},
};

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
    let lora = lora_of(spec.method.as_ref())?;
    let adapter = context.stores.open(Role::Output, &spec.adapter_uri())?;
    let version = adapter.join(&format!("v{}", task.version));
    if let Some(report) = published(&version, &task.input_digest)? {
        context.progress.note(&format!("{} is published already, from the same inputs", version.uri()));
        return Ok(Outcome::Trained(report));
    }

    context.progress.stage(TrainStage::Loading);
    let inputs = Inputs::load(spec, context.stores, context.work)?;
    check_digests(task, &inputs)?;
    let checkpoints = adapter.join(&format!("checkpoints/{}", checkpoint_folder(&task.input_digest)));
    let checkpoints = Checkpoints::new(checkpoints, spec.training.save_total_limit);
    let mut run = Run::set_up(spec, lora, &inputs, checkpoints, context)?;
    if run.resume()?.is_break() {
        return Ok(Outcome::Preempted { step: run.history.step });
    }

    context.progress.stage(TrainStage::Training);
    if run.steps_to_the_end()?.is_break() || run.measure_recall(run.history.step)?.is_break() {
        run.checkpoint()?;
        return Ok(Outcome::Preempted { step: run.history.step });
    }
    run.checkpoint()?;

    context.progress.stage(TrainStage::Publishing);
    let method = Method::LoRA { lora: lora.clone() };
    let trained = Trained {
        spec,
        task,
        lora,
        adapter: run.trainer.weights(),
        epochs: inputs.batches.epoch(run.history.step),
        manifest: Manifest::new(spec, task, &method, inputs.dataset.clone(), run.metrics()),
        history: &run.history,
    };
    Ok(Outcome::Trained(publish(&version, trained)?))
}

/// The options of LoRA, which is what this release trains.
///
/// # Errors
/// The method is another one.
pub fn lora_of(method: Option<&Method>) -> Result<&Lora, Error> {
    match method {
        Some(Method::LoRA { lora }) => Ok(lora),
        Some(other) => Err(Error::Spec(format!(
            "method {:?} is not in this release, which trains LoRA on CPUs: set spec.method to LoRA",
            other.name()
        ))),
        None => Err(Error::Spec("the run spec names no method".into())),
    }
}

/// The same options in the engine's words. The seed of the run decides A's first values and dropout.
pub fn lora_options(lora: &Lora, training: &Training) -> LoraOptions {
    LoraOptions {
        rank: lora.rank as usize,
        alpha: lora.alpha,
        dropout: lora.dropout,
        target_modules: match lora.target_modules.as_slice() {
            [all] if all == "all-linear" => TargetModules::Pattern(all.clone()),
            names => TargetModules::Names(names.to_vec()),
        },
        use_rslora: lora.use_rslora,
        seed: training.seed,
        ..LoraOptions::default()
    }
}

fn check_digests(task: &TrainTask, inputs: &Inputs) -> Result<(), Error> {
    let pairs = [
        ("base model", &task.base_digest, &inputs.model.digest),
        ("dataset", &task.dataset_digest, &inputs.dataset.digest),
    ];
    match pairs.into_iter().find(|(_, checked, found)| checked != found) {
        None => Ok(()),
        Some((what, checked, found)) => Err(Error::Input(format!(
            "the {what} has changed since it was checked ({checked} then, {found} now): \
             change the job, so that a new run begins, and leave the files alone while it lasts"
        ))),
    }
}

/// Name of the folder of one set of inputs' checkpoints.
fn checkpoint_folder(input_digest: &str) -> &str {
    let hex = input_digest.strip_prefix("sha256:").unwrap_or(input_digest);
    hex.get(..16).unwrap_or(hex)
}

fn schedule(training: &Training, total_steps: u64) -> Schedule {
    let kind = match training.lr_scheduler_type {
        LrScheduler::Linear => ScheduleKind::Linear,
        LrScheduler::Cosine => ScheduleKind::Cosine,
        LrScheduler::Constant => ScheduleKind::ConstantWithWarmup,
    };
    let warmup = match training.warmup_steps {
        Some(steps) => Warmup::Steps(steps),
        None => Warmup::Ratio(training.warmup_ratio),
    };
    Schedule::new(kind, training.learning_rate, warmup, total_steps)
}

/// The training loop.
struct Run<'a> {
    training: &'a Training,
    inputs: &'a Inputs,
    trainer: Trainer,
    schedule: Schedule,
    checkpoints: Checkpoints,
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
        lora: &Lora,
        inputs: &'a Inputs,
        checkpoints: Checkpoints,
        context: Context<'a>,
    ) -> Result<Self, Error> {
        let training = &spec.training;
        let options = TrainerOptions {
            optimizer: Optimizer { weight_decay: training.weight_decay, ..Optimizer::default() },
            recompute: if training.gradient_checkpointing { Recompute::Full } else { Recompute::None },
            ..lora_options(lora, training).into()
        };
        let model = Model::load(&inputs.model.folder)?;
        Ok(Self {
            training,
            inputs,
            trainer: Trainer::new(model, &options)?,
            schedule: schedule(training, inputs.batches.total_steps()),
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
        // Before the first step nothing is changed: until its state is restored, this is the base model.
        if self.measure_recall(0)?.is_break() {
            return Ok(Break(()));
        }
        if let Some(state) = state {
            self.trainer.restore(&state)?;
        }
        Ok(Continue(()))
    }

    /// Steps and evaluations until all are done, or until the run is stopped.
    fn steps_to_the_end(&mut self) -> Result<ControlFlow<()>, Error> {
        let total = self.inputs.batches.total_steps();
        self.show();
        loop {
            if self.is_evaluation_due() && self.evaluate()?.is_break() {
                return Ok(Break(()));
            }
            self.show();
            if self.history.step >= total {
                return Ok(Continue(()));
            }
            if self.step()?.is_break() {
                return Ok(Break(()));
            }
            if self.history.step.is_multiple_of(self.training.save_steps) {
                self.checkpoint()?;
            }
        }
    }

    /// Before the first step, after the last, and every `evalSteps`; not twice, if the run was resumed after one.
    fn is_evaluation_due(&self) -> bool {
        let (step, total) = (self.history.step, self.inputs.batches.total_steps());
        let due = step == 0 || step == total || self.training.eval_steps.is_some_and(|n| step.is_multiple_of(n));
        due && !self.history.is_evaluated()
    }

    /// One optimizer step. Stopped between two micro-batches, it leaves no trace: the step begins anew on resume.
    fn step(&mut self) -> Result<ControlFlow<()>, Error> {
        let started = Instant::now();
        let step = self.history.step;
        let micro_batches = self.inputs.batches.step(step);
        let batches = micro_batches.iter().map(|rows| micro_batch(&self.inputs.train, rows.iter().copied()));
        let batches: Vec<MicroBatch> = batches.collect::<Result<_, _>>()?;
        let trained = batches.iter().flat_map(|batch| &batch.targets).filter(|&&target| target != IGNORE).count();
        let tokens: usize = batches.iter().map(|batch| batch.tokens.len()).sum();

        // Divided by the trained tokens of the whole batch, not averaged over micro-batches of different weight.
        let scale = 1.0 / trained as f32;
        let mut loss = LossSum::default();
        for (rows, batch) in micro_batches.iter().zip(&batches) {
            if self.stop.is_requested() {
                return Ok(Break(()));
            }
            let part = self.trainer.accumulate(batch, scale)?;
            if !part.sum.is_finite() {
                return Err(self.diverged(step, rows, "loss"));
            }
            loss.sum += part.sum;
            loss.tokens += part.tokens;
        }
        let learning_rate = self.schedule.learning_rate(step);
        let clip = (self.training.max_grad_norm > 0.0).then_some(self.training.max_grad_norm);
        let stats = self.trainer.step(learning_rate, clip).map_err(|error| match error {
            EngineError::NonFinite { .. } => self.diverged(step, &micro_batches.concat(), "gradient"),
            other => other.into(),
        })?;

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
            self.log(stats.grad_norm, learning_rate);
        }
        Ok(Continue(()))
    }

    fn log(&mut self, grad_norm: f64, learning_rate: f64) {
        let step = self.history.step;
        let epoch = history::round(self.inputs.batches.epoch(step));
        let loss = std::mem::take(&mut self.history.window).mean();
        let grad_norm = history::round(grad_norm);
        self.history.logs.push(TrainPoint { step, epoch, loss, grad_norm, learning_rate });
        let (total_steps, tokens_per_second) = (self.inputs.batches.total_steps(), self.tokens_per_second());
        tracing::info!(step, total_steps, epoch, loss, grad_norm, learning_rate, tokens_per_second, "trained");
    }

    /// Measures the loss on the held-out rows.
    fn evaluate(&mut self) -> Result<ControlFlow<()>, Error> {
        self.progress.message("evaluating");
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
        let loss = Window { sum: loss.sum, tokens: loss.tokens as u64 }.mean();
        if !loss.is_finite() {
            return Err(Error::Input(format!("step {step}: the eval loss is {loss}; lower training.learningRate")));
        }
        self.history.evals.push(EvalPoint { step, epoch, loss });
        self.progress.note(&format!("eval loss after step {step}: {loss:.4}"));
        Ok(Continue(()))
    }

    /// Makes what was done so far safe, unless it is.
    fn checkpoint(&mut self) -> Result<(), Error> {
        let step = self.history.step;
        if self.saved != Some(step) {
            // Where the last whole step ended; a step that was stopped half-way may have gone further.
            let state = tunesmith_engine::TrainState { micro_step: self.history.micro_step, ..self.trainer.state() };
            self.checkpoints.save(&state, &self.history)?;
            self.saved = Some(step);
        }
        Ok(())
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
        let probe = self.inputs.exam.as_ref().map(|exam| exam.digest.clone());
        let recall = |step| self.history.recall(step, probe.as_deref()?);
        Metrics {
            base_eval_loss: self.history.base_eval_loss(),
            eval_loss: self.history.eval_loss(),
            base_perplexity: self.history.base_eval_loss().and_then(perplexity),
            perplexity: self.history.eval_loss().and_then(perplexity),
            base_recall: recall(0),
            recall: recall(self.history.step),
            probe_digest: probe.clone(),
            train_loss: self.history.train_loss(),
            steps: self.history.step,
            tokens: self.history.tokens,
            train_seconds: (self.history.train_seconds * 10.0).round() / 10.0,
        }
    }

    fn diverged(&self, step: u64, rows: &[usize], what: &str) -> Error {
        let rows = match self.inputs.train.describe(rows) {
            Ok(rows) => rows,
            Err(error) => return error.into(),
        };
        Error::Input(format!(
            "step {}: the {what} is not a number (NaN or infinite) on {rows}; lower training.learningRate, or look at \
             these rows",
            step + 1
        ))
    }
}
