//! `run` and `check`: the same manifest without Kubernetes. Preflight, training and publishing happen in this process.

mod forecast;
mod manifest;
#[cfg(test)]
mod tests;

use std::path::Path;

use tunesmith_crds::{
    Cloud, FineTuneJob, FineTuneJobSpec, Method, RunSpec, Uri,
    digest::input_digest,
    evaluation::{GateResult, Metrics},
    fine_tune_job::MethodName,
    run::{Outcome, PreflightReport, TrainReport, TrainTask},
    uri::UriError,
};

use crate::{
    data::overview::Marking,
    error::Error,
    layout::MANIFEST,
    model::Keep,
    preflight::{Preflight, highest_version, preflight},
    publish::{Claim, PublishError, published},
    store::{Location, Role, StoreError, Stores},
    train::{Checkpoints, Context, clear, train},
};

/// How a run ended.
pub struct Ended {
    /// What came of it.
    pub outcome: Outcome,
    /// What the job's gates say of it; none if nothing was published.
    pub gates: Vec<GateResult>,
}

/// Reads the FineTuneJob in a manifest, and checks model, data and output folder. Shows the data on standard output, and says what the
/// run would take.
///
/// # Errors
/// What the API server or preflight would refuse.
pub fn check(manifest: &Path, context: Context<'_>) -> Result<(), Error> {
    let mut job = manifest::read(manifest)?;
    let (_, method, report) = prepare(&mut job, manifest, context)?;
    for line in forecast::lines(&job.spec, &method, &report) {
        context.progress.note(&line);
    }
    Ok(())
}

/// Reads the FineTuneJob in a manifest, trains it here, publishes the result and judges it.
///
/// # Errors
/// What the API server, preflight or training would refuse.
pub fn run(manifest: &Path, context: Context<'_>) -> Result<Ended, Error> {
    let job = manifest::read(manifest)?;
    let gates = job.spec.evaluation.clone();
    let outcome = publish(job, manifest, context)?;
    let gates = match &outcome {
        Outcome::Trained(report) => gates.judge(&report.metrics),
        _ => Vec::new(),
    };
    Ok(Ended { outcome, gates })
}

fn publish(mut job: FineTuneJob, manifest: &Path, context: Context<'_>) -> Result<Outcome, Error> {
    if job.spec.suspend {
        return Err(Error::Spec("spec.suspend is true: set it to false to run the job".into()));
    }
    let (spec, method, report) = prepare(&mut job, manifest, context)?;
    let digest = input_digest(&spec, &method, &report);
    let adapter = context.stores.open(Role::Output, &spec.adapter_uri())?;
    let suffices = |metrics: &Metrics| job.spec.evaluation.is_measured_by(metrics, report.probe_digest.as_deref());
    if let Some(report) = same_inputs(&adapter, &digest, suffices)? {
        context.progress.note(&format!("these inputs were trained before, as {}: nothing to do", report.uri));
        clear(&Checkpoints::new(&adapter, &digest, &spec.training), &spec, &report);
        return Ok(Outcome::Trained(report));
    }
    let mut task = TrainTask {
        version: report.highest_version + 1,
        input_digest: digest,
        base_digest: report.base_digest,
        dataset_digest: report.dataset.digest,
        template_date: report.template_date,
        numerics_version: report.numerics_version,
        copy_of: None,
        trainer_image: format!("tunesmith-trainer {} (standalone)", env!("CARGO_PKG_VERSION")),
        cluster: String::new(),
    };
    if is_unfinished(&adapter.join(&format!("v{}", report.highest_version)), &Claim::of(&spec, &task))? {
        task.version = report.highest_version;
    }
    train(&spec.with_training(method, task), context)
}

/// Whether a version's folder is claimed by this run, which ended before it had published.
fn is_unfinished(version: &Location, claim: &Claim) -> Result<bool, StoreError> {
    Ok(claim.holds(version)? && version.join(MANIFEST).read_if_exists()?.is_none())
}

/// What the operator would make of a job, and what its preflight finds.
fn prepare(
    job: &mut FineTuneJob,
    manifest: &Path,
    context: Context<'_>,
) -> Result<(RunSpec, Method, PreflightReport), Error> {
    let progress = context.progress;
    for (cloud, folder) in stand_ins(job, context.stores) {
        let (scheme, family) = (cloud.scheme(), variables(cloud));
        progress.note(&format!(
            "no store of {scheme}:// in the environment ({family}): {scheme}:// is {}",
            folder.display()
        ));
    }
    if let Some(note) = for_pods(&job.spec) {
        progress.note(&note);
    }
    stand_in(job, manifest.parent().unwrap_or(Path::new("")), context)?;
    // All is computed here, by one process on the CPU.
    let spec = RunSpec::preflight(job, 1).resolved(1, false);
    let found =
        preflight(&spec, context, Keep::Whole).map_err(|error| explain_missing_model(error, job, context.stores));
    let Preflight { report, overview } = found?;
    let method = method(job, &report)?;
    if job.spec.method == MethodName::Auto {
        progress.note(&format!("method Auto is {:?} here", method.name()));
    }
    let spec = RunSpec { method: Some(method.clone()), ..spec };
    progress.page(&overview.page(Marking::of_standard_output()));
    progress.note(&format!("{} steps", report.total_steps));
    Ok((spec, method, report))
}

/// A sentence about the identities that a job gives to its pods, and that nobody has here.
fn for_pods(spec: &FineTuneJobSpec) -> Option<String> {
    let fields = [
        ("baseModel.roleArn", &spec.base_model.role_arn),
        ("dataset.roleArn", &spec.dataset.role_arn),
        ("output.roleArn", &spec.output.role_arn),
        ("output.serviceAccountName", &spec.output.service_account_name),
    ];
    let given: Vec<&str> = fields.iter().filter(|(_, value)| value.is_some()).map(|(name, _)| *name).collect();
    (!given.is_empty())
        .then(|| format!("for the pods of a cluster alone: {}; the environment says who asks here", given.join(", ")))
}

/// The method with its options; Auto is the first that may be run.
fn method(job: &FineTuneJob, report: &PreflightReport) -> Result<Method, Error> {
    let stored_as = report.model.stored_as.as_ref();
    let method = job.spec.methods(stored_as)[0];
    job.spec.method_as(method, stored_as).ok_or_else(|| Error::Spec("method QLoRA needs quantization".into()))
}

/// The kinds of stores that a job names and a folder stands in for.
fn stand_ins<'a>(job: &FineTuneJob, stores: &'a Stores) -> Vec<(Cloud, &'a Path)> {
    let FineTuneJobSpec { base_model, dataset, evaluation, output, .. } = &job.spec;
    let probes = evaluation.gates.iter().filter_map(|gate| Some(&gate.probe.as_ref()?.uri));
    let rows = [Some(&dataset.train), dataset.eval.as_ref()].into_iter().flatten().map(|source| &source.uri);
    let uris: Vec<&Uri> = rows.chain(probes).chain([&base_model.uri, &output.uri]).collect();
    let named = Cloud::ALL.into_iter().filter(|cloud| uris.iter().any(|uri| uri.cloud() == Some(*cloud)));
    named.filter_map(|cloud| Some((cloud, stores.local_folder(cloud)?))).collect()
}

/// The variables that name a store.
fn variables(cloud: Cloud) -> &'static str {
    match cloud {
        Cloud::S3 => "AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
        Cloud::Google => "GOOGLE_SERVICE_ACCOUNT_KEY or GOOGLE_APPLICATION_CREDENTIALS",
        Cloud::Azure => "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
    }
}

/// Data files beside the manifest stand in for objects of the same name that the local store does not have.
fn stand_in(job: &mut FineTuneJob, beside: &Path, context: Context<'_>) -> Result<(), Error> {
    let FineTuneJobSpec { dataset, evaluation, .. } = &mut job.spec;
    let probes = evaluation.gates.iter_mut().filter_map(|gate| Some(&mut gate.probe.as_mut()?.uri));
    let rows = [Some(&mut dataset.train), dataset.eval.as_mut()];
    for uri in rows.into_iter().flatten().map(|source| &mut source.uri).chain(probes) {
        let is_far = uri.cloud().is_some_and(|cloud| context.stores.local_folder(cloud).is_none());
        if is_far || matches!(uri, Uri::HubDataset { .. }) || is_there(uri, context.stores)? {
            continue;
        }
        let path = beside.join(uri.file_name());
        let path = std::path::absolute(&path).map_err(|source| Error::File { path, source })?;
        let file: Uri =
            format!("file://{}", path.display()).parse().map_err(|error: UriError| Error::Spec(error.to_string()))?;
        if is_there(&file, context.stores)? {
            context.progress.note(&format!("{uri} is not there: {file} stands in"));
            *uri = file;
        }
    }
    Ok(())
}

/// Whether a URI means files of this machine that are there.
fn is_there(uri: &Uri, stores: &Stores) -> Result<bool, Error> {
    match stores.expand(Role::Dataset, uri) {
        Ok(objects) => Ok(objects.iter().all(|object| object.location.on_disk().is_some_and(Path::is_file))),
        Err(StoreError::NoMatch { .. }) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// A model that is not in the local store can be put there; the message says how.
fn explain_missing_model(error: Error, job: &FineTuneJob, stores: &Stores) -> Error {
    let uri = &job.spec.base_model.uri;
    let folder = uri.cloud().and_then(|cloud| Some((cloud, stores.local_folder(cloud)?)));
    match (&error, uri, folder) {
        (
            Error::Model(crate::model::ModelError::Empty { .. }),
            Uri::Bucket { bucket, key, .. },
            Some((cloud, folder)),
        ) => {
            let place = folder.join(bucket).join(key);
            Error::Input(format!(
                "{uri} (base model) is not in the local store: put the Hugging Face folder at {place}, e.g. \
                 `tunesmith-trainer convert MODEL.gguf --out {place}`; or set {} to use {}://",
                variables(cloud),
                cloud.scheme(),
                place = place.display()
            ))
        }
        _ => error,
    }
}

/// The newest version with these inputs whose recorded metrics suffice.
fn same_inputs(
    adapter: &Location,
    digest: &str,
    suffices: impl Fn(&Metrics) -> bool,
) -> Result<Option<TrainReport>, Error> {
    for version in (1..=highest_version(adapter)?).rev() {
        // Other inputs are what most versions have, and no conflict here.
        match published(&adapter.join(&format!("v{version}")), digest) {
            Ok(Some(report)) if suffices(&report.metrics) => return Ok(Some(report)),
            Ok(_) | Err(PublishError::Taken { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(None)
}

/// What a person reads at the end.
pub fn summary(ended: &Ended, stores: &Stores) -> Result<String, StoreError> {
    let report = match &ended.outcome {
        Outcome::Trained(report) => report,
        Outcome::Preempted { step } => {
            return Ok(format!("stopped after step {step}; run the same command again to go on"));
        }
        other => return Ok(format!("{other:?}")),
    };
    let folder = stores.open(Role::Output, &report.uri)?;
    let place = folder.on_disk().map_or(report.uri.to_string(), |path| path.display().to_string());
    let number = |value: Option<f64>| value.map_or("not measured".into(), |value| format!("{value:.4}"));
    let metrics = &report.metrics;
    let recall = match (metrics.base_recall, metrics.recall) {
        (None, None) => String::new(),
        (before, after) => format!("recall: {} before, {} after\n", number(before), number(after)),
    };
    let gate = |gate: &GateResult| {
        let verdict = if gate.passed { "passed" } else { "failed" };
        format!("\ngate {verdict}: {}", gate.describe())
    };
    Ok(format!(
        "version {}: {place}\neval loss: {} before, {} after {} steps\n{recall}loss curve: {place}/loss_curve.svg{}",
        report.version,
        number(metrics.base_eval_loss),
        number(metrics.eval_loss),
        metrics.steps,
        ended.gates.iter().map(gate).collect::<String>(),
    ))
}
