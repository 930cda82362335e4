//! `README.md`: the model card, with the front matter that Hugging Face tools read.

use tunesmith_crds::{
    Method,
    evaluation::{GateResult, Metrics},
    fine_tune_job::Lora,
};

use super::Trained;

use crate::method::lora_of;

pub(super) fn render(trained: &Trained<'_>) -> String {
    let Trained { spec, task, method, history, manifest, .. } = trained;
    let (name, version, base) = (&spec.adapter_name, task.version, spec.base_model.model_name().0);
    let training = &spec.training;
    let Metrics { steps, tokens, train_seconds, best_step, skipped_steps, eval_loss, .. } = manifest.metrics;
    let loss = |loss: Option<f64>| loss.map_or("not measured".to_owned(), |loss| format!("{loss:.4}"));
    let place = match spec.job.namespace.as_str() {
        "" => String::new(),
        namespace => format!("{namespace}/"),
    };
    let weights = match best_step {
        Some(step) => format!("of step {step}, with the lowest eval loss"),
        None => "of the last step".to_owned(),
    };
    let skipped = match skipped_steps {
        0 => String::new(),
        steps => format!(" ({steps} left out: NaN or infinite)"),
    };
    format!(
        "---
base_model: {base}
library_name: {library}
pipeline_tag: text-generation
tags: [{tags}]
---

# {name} v{version}

{what} `{base}`, fine-tuned by the FineTuneJob `{job}` with Tunesmith. `manifest.json` lists every file with its digest,
and all that the result depends on. The tokenizer's files are the base model's.

| loss (nats a token) | |
|---|---|
| evaluation, base model | {before} |
| evaluation, this version | {after} |
| training, last logged steps | {train} |

{other_metrics}{gates}![Loss curve](loss_curve.svg)

`tensorboard --logdir .` shows the same curve, with learning rate, gradient norm and speed.

## Training

| | |
|---|---|
{options}| steps, epochs | {steps}{skipped}, {epochs:.2} |
| weights | {weights} |
| batch | {batch} rows a step |
| learning rate | {rate}, {schedule:?} |
| tokens | {tokens} in {train_seconds:.0} s |

## Lineage

| | |
|---|---|
| base model | `{base}` `{base_digest}` |
| training data | `{train_uri}` |
| evaluation data | {eval_uri} |
| dataset digest | `{dataset_digest}` |
| all inputs | `{input_digest}` |
| job | `{place}{job}`, generation {generation}, run {run} |
| trainer | `{image}` |

## Use

```python
{usage}
```
",
        job = spec.job.name,
        before = loss(history.base_eval_loss()),
        after = loss(eval_loss),
        train = loss(history.train_loss()),
        other_metrics = other_metrics(&manifest.metrics),
        gates = gates(&manifest.gates),
        library = if lora_of(method).is_some() { "peft" } else { "transformers" },
        tags = tags(method),
        what = match method {
            Method::Full => "All weights of",
            Method::LoRA { .. } => "A LoRA adapter for",
            Method::QLoRA { .. } => "A LoRA adapter, trained on quantized weights, for",
        },
        options = options(method),
        usage = if lora_of(method).is_some() { USE_ADAPTER } else { USE_MODEL },
        epochs = trained.epochs,
        batch = training.global_batch(),
        rate = training.learning_rate,
        schedule = training.lr_scheduler_type,
        base_digest = task.base_digest,
        dataset_digest = task.dataset_digest,
        input_digest = task.input_digest,
        train_uri = spec.dataset.train.uri,
        eval_uri = match &spec.dataset.eval {
            Some(eval) => format!("`{}`", eval.uri),
            None => "held out of the training data".to_owned(),
        },
        generation = spec.job.generation,
        run = spec.job.run,
        image = task.trainer_image,
    )
}

const USE_ADAPTER: &str = "from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(\"path/to/base/model\")
model = PeftModel.from_pretrained(model, \"path/to/this/folder\")";
const USE_MODEL: &str = "from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(\"path/to/this/folder\")";

fn tags(method: &Method) -> &'static str {
    match method {
        Method::Full => "transformers, tunesmith",
        Method::LoRA { .. } => "lora, transformers, tunesmith",
        Method::QLoRA { .. } => "lora, qlora, transformers, tunesmith",
    }
}

/// The method's options, as rows of a table.
fn options(method: &Method) -> String {
    let lora = |lora: &Lora| {
        let Lora { rank, alpha, dropout, target_modules, target_modules_regex, .. } = lora;
        let targets = target_modules_regex.clone().unwrap_or_else(|| target_modules.join(", "));
        let others = [(lora.use_rslora, "rsLoRA"), (lora.use_dora, "DoRA")].into_iter().filter(|(used, _)| *used);
        let names: String = others.map(|(_, name)| format!("| scaling | {name} |\n")).collect();
        format!("| rank, alpha, dropout | {rank}, {alpha}, {dropout} |\n| target modules | {targets} |\n{names}")
    };
    match method {
        Method::Full => "| trained | every weight |\n".into(),
        Method::LoRA { lora: options } => lora(options),
        Method::QLoRA { lora: options, quantization } => {
            format!("{}| base model in | {} bits, {:?} |\n", lora(options), quantization.bits, quantization.kind)
        }
    }
}

/// What else was measured, as a table.
fn other_metrics(metrics: &Metrics) -> String {
    let rows = [
        ("perplexity", metrics.base_perplexity, metrics.perplexity),
        ("recall on the probe", metrics.base_recall, metrics.recall),
    ];
    let row = |(name, before, after): (&str, Option<f64>, Option<f64>)| {
        let text = |value: Option<f64>| value.map_or("not measured".to_owned(), |value| format!("{value:.2}"));
        (before.or(after).is_some()).then(|| format!("| {name} | {} | {} |\n", text(before), text(after)))
    };
    let rows: String = rows.into_iter().filter_map(row).collect();
    match rows.is_empty() {
        true => rows,
        false => format!("| | base model | this version |\n|---|---|---|\n{rows}\n"),
    }
}

/// What the version was held to.
fn gates(results: &[GateResult]) -> String {
    let line = |result: &GateResult| {
        format!("- {}: {}\n", if result.passed { "passed" } else { "**failed**" }, result.describe())
    };
    match results.is_empty() {
        true => String::new(),
        false => format!("Gates:\n\n{}\n", results.iter().map(line).collect::<String>()),
    }
}
