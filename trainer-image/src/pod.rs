//! A pod's frame: a spec from a file, a report to a file, and an exit code.

use std::{
    fs,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
};

use serde::de::DeserializeOwned;
use tunesmith_crds::{
    RunReport, RunSpec,
    names::exit_code,
    run::{InspectSpec, Outcome, SCHEMA_VERSION, VerifySpec},
};

use crate::error::Error;

/// A spec with a version.
pub trait Spec: DeserializeOwned {
    /// The version that it was written in.
    fn schema_version(&self) -> u32;
}

impl Spec for RunSpec {
    fn schema_version(&self) -> u32 {
        self.schema_version
    }
}

impl Spec for VerifySpec {
    fn schema_version(&self) -> u32 {
        self.schema_version
    }
}

impl Spec for InspectSpec {
    fn schema_version(&self) -> u32 {
        self.schema_version
    }
}

/// Reads a spec.
///
/// # Errors
/// The file is missing, or is no spec of this version.
pub fn read_spec<T: Spec>(path: &Path) -> Result<T, Error> {
    let text = fs::read(path).map_err(|source| Error::File { path: path.to_owned(), source })?;
    parse_spec(&text, path)
}

/// A spec from the content of a file.
pub(crate) fn parse_spec<T: Spec>(text: &[u8], path: &Path) -> Result<T, Error> {
    let advice = "operator and trainer must be of one release";
    // The version first: a spec of another one may have other fields.
    let version =
        serde_json::from_slice::<serde_json::Value>(text).ok().and_then(|json| json["schemaVersion"].as_u64());
    if let Some(version) = version.filter(|&version| version != u64::from(SCHEMA_VERSION)) {
        let message =
            format!("{} has schemaVersion {version}, this trainer reads {SCHEMA_VERSION}: {advice}", path.display());
        return Err(Error::Spec(message));
    }
    serde_json::from_slice(text).map_err(|error| Error::Spec(format!("{}: {error}; {advice}", path.display())))
}

/// Does the work. A panic is an error like another.
///
/// # Errors
/// The work fails, or panics.
pub(crate) fn caught<T>(work: impl FnOnce() -> Result<T, Error>) -> Result<T, Error> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
        Err(Error::Internal(text.unwrap_or("panic").to_owned()))
    })
}

/// Does the work, leaves its report at `path`, and tells the exit code. A panic is reported like an error.
pub fn report_to(path: &Path, work: impl FnOnce() -> Result<Outcome, Error>) -> i32 {
    let (outcome, code) = match caught(work) {
        Ok(outcome @ Outcome::Preempted { .. }) => (outcome, exit_code::PREEMPTED),
        Ok(outcome) => (outcome, 0),
        Err(error) => {
            tracing::error!("{error}");
            (Outcome::Failed { message: error.to_string() }, error.exit_code())
        }
    };
    if let Err(error) = fs::write(path, RunReport::new(outcome).to_termination_message()) {
        tracing::error!(path = %path.display(), %error, "the report can't be written");
    }
    code
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(work: impl FnOnce() -> Result<Outcome, Error>) -> (i32, Outcome) {
        let file = tempfile::NamedTempFile::new().unwrap();
        let code = report_to(file.path(), work);
        let text = fs::read_to_string(file.path()).unwrap();
        (code, RunReport::from_termination_message(&text).unwrap().outcome)
    }

    #[test]
    fn the_report_and_the_exit_code_say_the_same() {
        let preempted = Outcome::Preempted { step: 7 };
        assert_eq!(report(|| Ok(preempted.clone())), (exit_code::PREEMPTED, preempted));
        let failed = Outcome::Failed { message: "no rows".into() };
        assert_eq!(report(|| Err(Error::Input("no rows".into()))), (exit_code::BAD_INPUT, failed));
    }

    #[test]
    fn a_panic_leaves_a_report_and_is_tried_again() {
        let (code, outcome) = report(|| panic!("index {} of 3", 5));
        assert_eq!(code, 1);
        assert_eq!(outcome, Outcome::Failed { message: "internal error: index 5 of 3; please report it".into() });
    }

    #[test]
    fn a_spec_of_another_release_is_refused_by_its_version() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), r#"{"schemaVersion": 9, "shape": "new"}"#).unwrap();
        let error = read_spec::<RunSpec>(file.path()).unwrap_err();
        assert_eq!(error.exit_code(), exit_code::BAD_SPEC);
        assert!(error.to_string().contains("schemaVersion 9, this trainer reads 1"), "{error}");
    }
}
