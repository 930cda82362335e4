//! `verify`: compares a version's files with its manifest, and both with the record.

use tunesmith_crds::{
    adapter_version::Artifact,
    run::{Verdict, VerifyReport},
};

use crate::{
    digest,
    publish::{MANIFEST, Manifest},
    store::{Location, StoreError},
};

/// Reads every file of the artifact in `folder` and compares digests.
///
/// # Errors
/// The store fails. A file that is gone or differs is a verdict, not an error.
pub fn verify(artifact: &Artifact, folder: &Location) -> Result<VerifyReport, StoreError> {
    let report = |verdict, message| Ok(VerifyReport { verdict, message });
    let object = folder.join(MANIFEST);
    let Some(bytes) = object.read_if_exists()? else {
        return report(Verdict::Missing, format!("{} is gone", object.uri()));
    };
    let found = digest::of_bytes(&bytes);
    if found != artifact.manifest_digest {
        let expected = &artifact.manifest_digest;
        return report(Verdict::Corrupt, format!("{} has digest {found}, recorded is {expected}", object.uri()));
    }
    let manifest = match Manifest::parse(&bytes) {
        Ok(manifest) => manifest,
        Err(problem) => return report(Verdict::Corrupt, format!("{}: {problem}", object.uri())),
    };
    for file in &manifest.files {
        let object = folder.join(&file.path);
        match object.digest() {
            Err(StoreError::Missing { .. }) => {
                return report(Verdict::Missing, format!("{} is gone", object.uri()));
            }
            found => {
                let found = found?;
                if (&found.sha256, found.size) != (&file.sha256, file.size) {
                    let (size, expected) = (found.size, file.size);
                    let message = format!("{} is not what was published ({size} bytes, {expected} then)", object.uri());
                    return report(Verdict::Corrupt, message);
                }
            }
        }
    }
    report(Verdict::Intact, String::new())
}
