//! `copy`: publishes what was trained from the same inputs before, and lies somewhere else, as a version of this run.

use std::io;

use tunesmith_crds::{
    RunSpec,
    adapter_version::{Artifact, ArtifactFile},
    run::TrainReport,
};

use crate::{
    digest,
    error::Error,
    layout::MANIFEST,
    publish::{Claim, Manifest, PublishError, published, seal},
    store::{Location, Role, StoreError, Stores},
};

/// Copies the files of the task's other version, as they stream by, and compares each with that version's manifest.
///
/// # Errors
/// The other version can't be read or is no longer what was published, the new one is another run's, or a store fails.
/// Without a manifest nothing is published.
pub fn copy(spec: &RunSpec, stores: &Stores) -> Result<TrainReport, Error> {
    let task = spec.train.as_ref().filter(|task| task.copy_of.is_some());
    let (Some(task), Some(method)) = (task, &spec.method) else {
        return Err(Error::Spec("the run spec names nothing to copy: it is not for `copy`".into()));
    };
    let folder = stores.open(Role::Output, &spec.adapter_uri().join(&format!("v{}", task.version)))?;
    Claim::of(spec, task).lay(&folder)?;
    if let Some(report) = published(&folder, &task.input_digest)? {
        return Ok(report);
    }
    let Some(artifact) = &task.copy_of else { return Err(Error::Internal("nothing to copy".into())) };
    let from = stores.open(Role::Copied, &artifact.uri)?;
    let Manifest { files, dataset, metrics, source, .. } = manifest_of(artifact, &from)?;
    for file in &files {
        copy_file(file, &from, &folder)?;
    }
    let mut manifest = Manifest::new(spec, task, method, dataset, (metrics, source.execution));
    manifest.files = files;
    Ok(seal(&folder, manifest, &task.input_digest)?)
}

/// The manifest of the other version, if it is the one on record.
fn manifest_of(artifact: &Artifact, folder: &Location) -> Result<Manifest, Error> {
    let object = folder.join(MANIFEST);
    let bytes = object.read()?;
    if digest::of_bytes(&bytes) != artifact.manifest_digest {
        return Err(not_as_published(&object));
    }
    let manifest = Manifest::parse(&bytes);
    manifest.map_err(|problem| PublishError::Manifest { uri: object.uri().clone(), problem }.into())
}

fn copy_file(file: &ArtifactFile, from: &Location, to: &Location) -> Result<(), Error> {
    let (from, mut unread) = (from.join(&file.path), None);
    let written = to.join(&file.path).stream_in(|mut writer| match from.read_into(&mut writer) {
        Ok(_) => Ok(()),
        // The side that is written.
        Err(StoreError::Disk { source, .. }) => Err(source),
        Err(error) => {
            unread = Some(error);
            Err(io::Error::other("the other side ended early"))
        }
    });
    if let Some(error) = unread {
        return Err(error.into());
    }
    let written = written?;
    match (&written.sha256, written.size) == (&file.sha256, file.size) {
        true => Ok(()),
        false => Err(not_as_published(&from)),
    }
}

fn not_as_published(object: &Location) -> Error {
    Error::Input(format!("{} is no longer what was published", object.uri()))
}

#[cfg(test)]
mod tests {
    use tunesmith_crds::names::exit_code;

    use super::*;
    use crate::{
        publish::fixtures::{bench, spec, task},
        verify::verify,
    };

    #[test]
    fn a_version_is_copied_with_its_measurements_and_says_where_it_is_from() {
        let bench = bench();
        let new = spec("s3://new", task(2, Some(bench.artifact.clone())));
        let report = copy(&new, &bench.stores).unwrap();
        assert_eq!((report.version, report.uri.to_string().as_str()), (2, "s3://new/support/v2"));
        assert_eq!((report.metrics.eval_loss, report.file_count), (Some(1.5), 2));
        let folder = bench.stores.open(Role::Output, &report.uri).unwrap();
        let manifest = Manifest::parse(&folder.join(MANIFEST).read().unwrap()).unwrap();
        assert_eq!(manifest.source.copied_from, Some(bench.artifact.uri.clone()));
        let artifact =
            Artifact { uri: report.uri.clone(), manifest_digest: report.manifest_digest.clone(), ..bench.artifact };
        let verdict = verify(&artifact, &folder).unwrap();
        assert_eq!(verdict.message, "");
        // Once more, as an attempt after one whose words were lost.
        assert_eq!(copy(&new, &bench.stores).unwrap(), report);
    }

    #[test]
    fn what_is_gone_or_other_than_published_is_not_copied() {
        for (name, content, words) in [
            ("README.md", Some("other"), "s3://old/support/v1/README.md is no longer what was published"),
            (MANIFEST, Some("{}"), "s3://old/support/v1/manifest.json is no longer what was published"),
            ("README.md", None, "s3://old/support/v1/README.md"),
            (MANIFEST, None, "s3://old/support/v1/manifest.json"),
        ] {
            let bench = bench();
            let object = bench.stores.open(Role::Output, &bench.artifact.uri).unwrap().join(name);
            match content {
                Some(content) => object.write(content).unwrap(),
                None => object.delete().unwrap(),
            }
            let error = copy(&spec("s3://new", task(2, Some(bench.artifact.clone()))), &bench.stores).unwrap_err();
            assert!(error.to_string().contains(words), "{error}");
            let manifest = bench.stores.open(Role::Output, &"s3://new/support/v2/manifest.json".parse().unwrap());
            assert_eq!(manifest.unwrap().read_if_exists().unwrap(), None, "half a copy is visible");
        }
    }

    #[test]
    fn a_folder_that_another_run_has_is_left_alone() {
        let bench = bench();
        let copied = Some(bench.artifact.clone());
        let other = spec("s3://new", task(2, copied.clone()));
        copy(&other, &bench.stores).unwrap();
        let mut ours = spec("s3://new", task(2, copied));
        ours.job.uid = "another".into();
        assert_eq!(copy(&ours, &bench.stores).unwrap_err().exit_code(), exit_code::VERSION_TAKEN);
    }

    #[test]
    fn a_task_that_names_nothing_to_copy_is_refused() {
        let bench = bench();
        let error = copy(&spec("s3://new", task(2, None)), &bench.stores).unwrap_err();
        assert_eq!(error.exit_code(), exit_code::BAD_SPEC);
    }
}
