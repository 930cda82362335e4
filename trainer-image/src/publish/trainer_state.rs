//! `trainer_state.json` as transformers' Trainer writes it, which reads it back with `TrainerState(**json)`: a key
//! that it does not know is an error there.

use serde_json::json;

use super::Trained;

pub(super) fn render(trained: &Trained<'_>) -> String {
    let (history, training) = (trained.history, &trained.spec.training);
    let train = history.logs.iter().map(|log| {
        let mut entry =
            json!({"epoch": log.epoch, "learning_rate": log.learning_rate, "loss": log.loss, "step": log.step});
        if let Some(grad_norm) = log.grad_norm {
            entry["grad_norm"] = json!(grad_norm);
        }
        (log.step, entry)
    });
    let eval = history
        .evals
        .iter()
        .map(|eval| (eval.step, json!({"epoch": eval.epoch, "eval_loss": eval.loss, "step": eval.step})));
    let mut log: Vec<_> = train.chain(eval).collect();
    log.sort_by_key(|(step, _)| *step);
    let log: Vec<_> = log.into_iter().map(|(_, entry)| entry).collect();
    let is_best_looked_for = training.load_best_model_at_end || training.early_stopping_patience.is_some();
    let best = history.best().filter(|_| is_best_looked_for);
    let mut callbacks = json!({});
    if let Some(patience) = training.early_stopping_patience {
        let threshold = training.early_stopping_threshold.unwrap_or_default();
        callbacks["EarlyStoppingCallback"] = json!({
            "args": {"early_stopping_patience": patience, "early_stopping_threshold": threshold},
            "attributes": {"early_stopping_patience_counter": history.evals_without_improvement(threshold)},
        });
    }
    let state = json!({
        "best_global_step": best.map(|eval| eval.step),
        "best_metric": best.map(|eval| eval.loss),
        "best_model_checkpoint": null,
        "epoch": trained.epochs,
        "eval_steps": training.eval_steps.unwrap_or(history.step),
        "global_step": history.step,
        "is_hyper_param_search": false,
        "is_local_process_zero": true,
        "is_world_process_zero": true,
        "log_history": log,
        "logging_steps": training.logging_steps,
        "max_steps": trained.total_steps,
        "num_input_tokens_seen": history.tokens,
        "num_train_epochs": trained.epochs.ceil() as u64,
        "save_steps": training.save_steps,
        "stateful_callbacks": callbacks,
        "total_flos": 0.0,
        "train_batch_size": training.per_device_train_batch_size,
        "trial_name": null,
        "trial_params": null,
    });
    format!("{state:#}\n")
}
