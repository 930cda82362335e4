//! `preflight`: reads and checks all inputs before anything expensive is asked for.

use tunesmith_crds::{RunSpec, run::PreflightReport};
use tunesmith_engine::NUMERICS_VERSION;

use crate::{
    data::{Overview, template::TemplateDate},
    error::Error,
    inputs::Inputs,
    layout::{CLAIM, MANIFEST},
    method::{lora_of, lora_parameters},
    model::Keep,
    store::{Location, Role, StoreError},
    train::{Context, schedule},
};

/// What a preflight found.
pub struct Preflight {
    /// For the operator.
    pub report: PreflightReport,
    /// For people.
    pub overview: Overview,
}

/// Checks model, data and output folder; of the weights so much stays under `context.work`.
///
/// # Errors
/// One of them can't be used; the message names it and says what to do.
pub fn preflight(spec: &RunSpec, context: Context<'_>, keep: Keep) -> Result<Preflight, Error> {
    let output = context.stores.open(Role::Output, &spec.adapter_uri())?;
    check_writable(&output)?;
    let highest_version = highest_version(&output)?;

    let inputs = Inputs::load(spec, context.stores, context.work, TemplateDate::today().date(), keep)?;
    schedule(&spec.training, inputs.batches.total_steps())?;
    // Auto becomes LoRA or QLoRA.
    let lora = spec.method.as_ref().map_or(Some(&spec.lora), lora_of);
    let lora_parameters = lora.map(|lora| lora_parameters(lora, &spec.training, &inputs.model.config)).transpose()?;
    let report = PreflightReport {
        probe_digest: inputs.exam.map(|exam| exam.digest),
        base_digest: inputs.model.digest,
        skipped_rows: inputs.dataset.skipped_rows,
        dataset: inputs.dataset,
        eval_rows: inputs.overview.eval.rows,
        truncated_rows: inputs.overview.train.truncated_rows,
        dropped_rows: inputs.overview.train.dropped_rows,
        warnings: inputs.overview.notes.summary(),
        template_date: inputs.template_date.map(|date| date.to_string()),
        total_steps: inputs.batches.total_steps(),
        model: inputs.model.shape,
        lora_parameters: lora_parameters.unwrap_or(0),
        numerics_version: NUMERICS_VERSION,
        highest_version,
    };
    Ok(Preflight { report, overview: inputs.overview })
}

/// A run that can't write would notice after its first hundred steps.
fn check_writable(output: &Location) -> Result<(), StoreError> {
    let probe = output.join(".tunesmith-preflight");
    probe.write("Written and deleted by a preflight, to see that it can be.\n")?;
    probe.delete()
}

/// The highest version in an adapter's folder that a run has published, or has claimed to; 0 if there is none.
pub fn highest_version(output: &Location) -> Result<u32, StoreError> {
    let version = |object: String| {
        let (folder, file) = object.split_once('/')?;
        (file == MANIFEST || file == CLAIM).then_some(folder.strip_prefix('v')?.parse().ok()?)
    };
    Ok(output.list()?.into_iter().filter_map(version).max().unwrap_or(0))
}
