//! Recall of the base model and of the tuned one: measured once each, and kept in the history.

use std::ops::ControlFlow::{self, Break, Continue};

use tunesmith_crds::run::TrainStage;

use super::Run;
use crate::{error::Error, history::RecallPoint};

impl Run<'_> {
    /// Asks the model as it is now the probe's questions, if there are any; `step` says how many steps made it. What the
    /// history has of this step and probe is not asked again.
    pub(super) fn measure_recall(&mut self, step: u64) -> Result<ControlFlow<()>, Error> {
        let Some(exam) = &self.inputs.exam else { return Ok(Continue(())) };
        if self.history.recall(step, &exam.digest).is_some() {
            return Ok(Continue(()));
        }
        self.show();
        self.progress.stage(TrainStage::Evaluating);
        let Continue(score) = exam.sit(self.trainer.model(), self.progress, self.stop, |_| ())? else {
            return Ok(Break(()));
        };
        let recall = score.recall();
        self.history.recalls.push(RecallPoint { step, probe: exam.digest.clone(), recall });
        // Worth a checkpoint, even where this step has one.
        self.saved = None;
        let (right, questions) = (score.right, score.questions);
        self.progress.note(&format!("recall after step {step}: {recall:.4} ({right} of {questions} questions)"));
        Ok(Continue(()))
    }
}
