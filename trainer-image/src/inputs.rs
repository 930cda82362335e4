//! What a run reads: the base model and the data, brought here, checked and encoded.

use std::path::Path;

use chrono::NaiveDate;
use tunesmith_crds::{
    Method, RunSpec, Uri,
    adapter_version::{ArtifactFile, DatasetRecord},
};
use tunesmith_engine::Quantization;

use crate::{
    data::{
        DataFile, Encoder, Overview, RowOptions, Rows,
        batches::Batches,
        probe::constant_system,
        template::TemplateDate,
        vocabulary::{Vocabulary, VocabularyError},
    },
    digest,
    error::Error,
    exam::{Exam, Settings},
    generate::Voice,
    hub,
    method::engine_quantization,
    model::{Keep, ModelFolder},
    store::{Object, Role, Stores},
};

/// A run's inputs.
pub struct Inputs {
    /// The base model.
    pub model: ModelFolder,
    /// Rows to train on.
    pub train: Rows,
    /// Rows to evaluate on.
    pub eval: Rows,
    /// What there is to say of both.
    pub overview: Overview,
    /// The data, for the record. Its digest covers both kinds of rows.
    pub dataset: DatasetRecord,
    /// The order of training.
    pub batches: Batches,
    /// The questions of the recall gate, if there is one.
    pub exam: Option<Exam>,
    /// The day that the chat template wrote, where it wrote one and the job pins none.
    pub template_date: Option<NaiveDate>,
}

impl Inputs {
    /// Fetches and checks everything; what has to be downloaded goes under `work`, and of the weights so much stays. A chat
    /// template that writes the date writes that of the job, or else `day`.
    ///
    /// # Errors
    /// Model or data is missing or can't be used.
    pub fn load(spec: &RunSpec, stores: &Stores, work: &Path, day: NaiveDate, keep: Keep) -> Result<Self, Error> {
        let model = ModelFolder::bring(&spec.base_model, stores, &work.join("model"), keep)?;
        if let Some(pin) = spec.base_digest_pin.as_ref().filter(|pin| **pin != model.digest) {
            let (uri, found) = (&spec.base_model, &model.digest);
            return Err(Error::Input(format!(
                "baseModel.digest is {pin}, but {uri} has digest {found}: another model lies there now; \
                 correct the digest or the URI"
            )));
        }
        check_method(spec.method.as_ref(), model.config.stored_as)?;
        let dataset = &spec.dataset;
        let options = RowOptions::new(dataset).map_err(Error::Spec)?;
        let date = match dataset.template_date.as_deref() {
            Some(pinned) => TemplateDate::Pinned(day_of("dataset.templateDate", pinned)?),
            None => TemplateDate::OfRun(day),
        };
        let vocabulary = Vocabulary::load_on(&model.folder, dataset.chat_template.as_deref(), date);
        let vocabulary = vocabulary.map_err(|error| match error {
            VocabularyError::Template(_) => Error::Spec(error.to_string()),
            VocabularyError::Folder(_) => Error::Input(format!("{} (base model): {error}", spec.base_model)),
        })?;
        let encoder = Encoder {
            vocabulary,
            max_length: spec.training.max_length as usize,
            overflow: spec.training.overflow,
            assistant_only: dataset.assistant_only_loss,
        };
        let load = |uri: &Uri, purpose: &str| -> Result<_, Error> {
            let (files, digests) = fetch(stores, uri, &work.join("data"), purpose)?;
            Ok((Rows::load(&files, &options, &encoder, work)?, files, digests))
        };
        let (rows, train_files, mut files) = load(&dataset.train.uri, "train")?;
        let (train, eval) = match (&dataset.eval, dataset.eval_fraction) {
            (Some(eval), _) => {
                let (eval, _, eval_digests) = load(&eval.uri, "eval")?;
                files.extend(eval_digests);
                (rows, eval)
            }
            (None, fraction) => rows.hold_out(fraction.unwrap_or(0.0), spec.training.seed)?,
        };
        [&train, &eval].into_iter().try_for_each(|rows| check_fits(&model, rows))?;
        let mut overview = Overview::new(&train, &eval, &encoder.vocabulary)?;
        model.warnings.iter().for_each(|warning| overview.notes.remark(warning));
        overview.log();
        let (rows, tokens) = (overview.train.rows, overview.train.tokens);
        let template_date = encoder.vocabulary.date_of_run();
        let skipped_rows = overview.train.skipped_rows + overview.eval.skipped_rows;
        let voice = Voice::new(encoder.vocabulary);
        let exam = load_exam(spec, stores, work, (&train_files, &options), (&model, voice))?;
        Ok(Self {
            batches: Batches::new(train.lengths(), &spec.training),
            dataset: DatasetRecord { digest: digest::of_files(&files), rows, tokens, skipped_rows },
            overview,
            model,
            train,
            eval,
            exam,
            template_date,
        })
    }
}

/// The day in a field.
///
/// # Errors
/// The calendar has no such day.
pub fn day_of(field: &str, text: &str) -> Result<NaiveDate, Error> {
    text.parse().map_err(|_| Error::Spec(format!("{field} is {text:?}; expected a day such as 2026-11-27")))
}

/// The probe, asked as its gate says; `train` are the files of training rows, and how they are read.
fn load_exam(
    spec: &RunSpec,
    stores: &Stores,
    work: &Path,
    (train, options): (&[DataFile], &RowOptions),
    (model, voice): (&ModelFolder, Voice),
) -> Result<Option<Exam>, Error> {
    let Some(probe) = spec.evaluation.probe() else { return Ok(None) };
    let (probe_file, digest) = fetch_probe(stores, &probe.uri, work)?;
    let system = match &probe.system {
        Some(system) => Some(system.clone()),
        None => constant_system(train, options)?,
    };
    let context = model.config.max_position_embeddings;
    let settings = Settings { system: system.as_deref(), max_new_tokens: probe.max_new_tokens, context };
    Ok(Some(Exam::load(&probe_file, &digest, voice, settings)?))
}

/// Brings a probe here. It is one file.
pub(crate) fn fetch_probe(stores: &Stores, uri: &Uri, work: &Path) -> Result<(DataFile, ArtifactFile), Error> {
    let object = Object { location: stores.open(Role::Dataset, uri)?, name: uri.file_name().to_owned() };
    fetch_object(object, &work.join("data"), "probe".into())
}

/// Brings the files of a URI here. Their digests go by what they are for and their order, so that renaming changes
/// nothing.
fn fetch(stores: &Stores, uri: &Uri, work: &Path, purpose: &str) -> Result<(Vec<DataFile>, Vec<ArtifactFile>), Error> {
    let known_as = |number: usize, all: usize| match all {
        1 => purpose.to_owned(),
        _ => format!("{purpose}/{number:08}"),
    };
    if matches!(uri, Uri::HubDataset { .. }) {
        let files = hub::dataset::fetch(uri, stores, work)?;
        let all = files.len();
        let renamed = files
            .into_iter()
            .enumerate()
            .map(|(number, (file, digest))| (file, ArtifactFile { path: known_as(number, all), ..digest }));
        return Ok(renamed.collect());
    }
    let objects = stores.expand(Role::Dataset, uri)?;
    let names: Vec<String> = (0..objects.len()).map(|number| known_as(number, objects.len())).collect();
    objects.into_iter().zip(names).map(|(object, known_as)| fetch_object(object, work, known_as)).collect()
}

/// Brings an object into the folder `work`, unless it is on a disk already.
fn fetch_object(object: Object, work: &Path, known_as: String) -> Result<(DataFile, ArtifactFile), Error> {
    let Object { location, name } = object;
    let (path, file) = match location.on_disk() {
        Some(path) => (path.to_owned(), location.digest_on_disk(path, &name)?),
        None => {
            // Not by its name, which a disk may be unable to hold.
            let path = work.join(format!("{}.rows", known_as.replace('/', "-")));
            let file = location.download(&path)?;
            (path, file)
        }
    };
    Ok((DataFile { path, name }, ArtifactFile { path: known_as, ..file }))
}

/// A base that is stored in few bits can't be trained but with adapters over these.
fn check_method(method: Option<&Method>, stored: Option<Quantization>) -> Result<(), Error> {
    let (Some(method), Some(stored)) = (method, stored) else { return Ok(()) };
    match method {
        Method::QLoRA { quantization, .. } if engine_quantization(quantization).is_like(stored) => Ok(()),
        _ => {
            let (name, bits) = (stored.name(), if stored == Quantization::Int8 { 8 } else { 4 });
            Err(Error::Spec(format!(
                "the base model is stored as {name} (quantization_config in its config.json): set method QLoRA with \
                 quantization.bits {bits} and type {name}, or name the model as it was before"
            )))
        }
    }
}

/// Checks that the model knows every token and reads as many at once.
fn check_fits(model: &ModelFolder, rows: &Rows) -> Result<(), Error> {
    let (context, vocabulary) = (model.config.max_position_embeddings, model.config.vocab_size);
    let too_long = rows.lengths().iter().position(|&length| length as usize > context);
    if let Some(row) = too_long {
        return Err(Error::Spec(format!(
            "{} has {} tokens, but the model reads at most {context} (max_position_embeddings): set training.maxLength \
             to {context} or less",
            rows.describe(&[row])?,
            rows.lengths()[row]
        )));
    }
    let token = rows.largest_token();
    if token as usize >= vocabulary {
        return Err(Error::Input(format!(
            "the tokenizer gives token {token}, but the model knows {vocabulary} (vocab_size): tokenizer.json belongs to \
             another model"
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use tunesmith_engine::FourBitCode;

    use super::*;

    #[test]
    fn a_base_in_few_bits_is_for_qlora_of_the_same_kind() {
        let nf4 = Some(Quantization::FourBit { code: FourBitCode::Nf4, double_quant: true });
        let qlora = |bits: u8, kind: &str| -> Method {
            let quantization = json!({"bits": bits, "type": kind});
            Method::QLoRA {
                lora: serde_json::from_value(json!({})).unwrap(),
                quantization: serde_json::from_value(quantization).unwrap(),
            }
        };
        for fits in [Some(qlora(4, "nf4")), None] {
            check_method(fits.as_ref(), nf4).unwrap();
        }
        check_method(Some(&Method::Full), None).unwrap();
        for other in [Method::Full, qlora(4, "fp4"), qlora(8, "int8")] {
            let error = check_method(Some(&other), nf4).unwrap_err().to_string();
            assert!(error.contains("stored as nf4") && error.contains("quantization.bits 4 and type nf4"), "{error}");
        }
    }
}
