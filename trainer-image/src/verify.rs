//! `verify` compares a version's files with its manifest, and both with the record; `inspect` looks up those of many versions,
//! each with its size, and reads nothing but their manifests.

use tunesmith_crds::{
    adapter_version::{Artifact, ArtifactFile},
    run::{Finding, InspectReport, InspectSpec, Verdict, VerifyReport},
};

use crate::{
    digest,
    error::Error,
    layout::MANIFEST,
    publish::Manifest,
    store::{Location, Role, StoreError, Stores},
};

/// Versions with a fault that a report names: more would not fit it.
const MOST_FINDINGS: usize = 5;
/// Characters of a finding's message.
const LONGEST_MESSAGE: usize = 200;

/// Reads every file of the artifact in `folder` and compares digests.
///
/// # Errors
/// The store fails. A file that is gone or differs is a verdict, not an error.
pub fn verify(artifact: &Artifact, folder: &Location) -> Result<VerifyReport, StoreError> {
    let compare = |object: &Location, file: &ArtifactFile| {
        let found = object.digest()?;
        Ok((found.size, (&found.sha256, found.size) == (&file.sha256, file.size)))
    };
    let (verdict, message) = fault(artifact, folder, compare)?.unwrap_or((Verdict::Intact, String::new()));
    Ok(VerifyReport { verdict, message })
}

/// Looks up the files of versions in their order, until so many have a fault that the report is full.
///
/// # Errors
/// The store fails. A file that is gone or differs is a finding, not an error.
pub fn inspect(spec: &InspectSpec, stores: &Stores) -> Result<InspectReport, Error> {
    let look_up = |object: &Location, file: &ArtifactFile| {
        let size = object.size()?;
        Ok((size, size == file.size))
    };
    let mut report = InspectReport::default();
    for version in &spec.versions {
        let folder = stores.open(Role::Output, &version.artifact.uri)?;
        report.inspected += 1;
        if let Some((verdict, message)) = fault(&version.artifact, &folder, look_up)? {
            let message = message.chars().take(LONGEST_MESSAGE).collect();
            report.findings.push(Finding { name: version.name.clone(), verdict, message });
        }
        if report.findings.len() == MOST_FINDINGS {
            break;
        }
    }
    Ok(report)
}

/// What is wrong with an artifact, if anything is. `look` tells the size of a file, and whether it is the manifest's.
fn fault(
    artifact: &Artifact,
    folder: &Location,
    look: impl Fn(&Location, &ArtifactFile) -> Result<(u64, bool), StoreError>,
) -> Result<Option<(Verdict, String)>, StoreError> {
    let object = folder.join(MANIFEST);
    let Some(bytes) = object.read_if_exists()? else {
        return Ok(Some((Verdict::Missing, format!("{} is gone", object.uri()))));
    };
    let (found, expected) = (digest::of_bytes(&bytes), &artifact.manifest_digest);
    if found != *expected {
        let message = format!("{} has digest {found}, recorded is {expected}", object.uri());
        return Ok(Some((Verdict::Corrupt, message)));
    }
    let manifest = match Manifest::parse(&bytes) {
        Ok(manifest) => manifest,
        Err(problem) => return Ok(Some((Verdict::Corrupt, format!("{}: {problem}", object.uri())))),
    };
    for file in &manifest.files {
        let object = folder.join(&file.path);
        let (size, is_same) = match look(&object, file) {
            Err(StoreError::Missing { .. }) => {
                return Ok(Some((Verdict::Missing, format!("{} is gone", object.uri()))));
            }
            looked => looked?,
        };
        if !is_same {
            let expected = file.size;
            let message = format!("{} is not what was published ({size} bytes, {expected} then)", object.uri());
            return Ok(Some((Verdict::Corrupt, message)));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use tunesmith_crds::run::{Inspected, SCHEMA_VERSION};

    use super::*;
    use crate::publish::fixtures::{Bench, bench};

    /// The version, under several names.
    fn listed(bench: &Bench, names: &[&str]) -> InspectSpec {
        let listed = |name: &&str| Inspected { name: (*name).into(), artifact: bench.artifact.clone() };
        InspectSpec { schema_version: SCHEMA_VERSION, versions: names.iter().map(listed).collect() }
    }

    #[test]
    fn an_inspection_sees_what_is_gone_or_has_another_size_and_a_verification_sees_all() {
        for (name, content, inspected, verified) in [
            ("README.md", Some("card"), Verdict::Intact, Verdict::Intact),
            ("README.md", Some("CARD"), Verdict::Intact, Verdict::Corrupt),
            ("README.md", Some("longer"), Verdict::Corrupt, Verdict::Corrupt),
            ("README.md", None, Verdict::Missing, Verdict::Missing),
            (MANIFEST, Some("{}"), Verdict::Corrupt, Verdict::Corrupt),
            (MANIFEST, None, Verdict::Missing, Verdict::Missing),
        ] {
            let bench = bench();
            let folder = bench.stores.open(Role::Output, &bench.artifact.uri).unwrap();
            match content {
                Some(content) => folder.join(name).write(content).unwrap(),
                None => folder.join(name).delete().unwrap(),
            }
            let report = inspect(&listed(&bench, &["support-v1"]), &bench.stores).unwrap();
            let found = report.findings.first().map_or(Verdict::Intact, |finding| finding.verdict);
            assert_eq!((report.inspected, found), (1, inspected), "{name} {content:?}: {report:?}");
            assert!(report.findings.iter().all(|finding| finding.message.contains(name)), "{report:?}");
            assert_eq!(verify(&bench.artifact, &folder).unwrap().verdict, verified, "{name} {content:?}");
        }
    }

    #[test]
    fn a_report_that_is_full_says_how_far_it_got_and_fits() {
        let bench = bench();
        let folder = bench.stores.open(Role::Output, &bench.artifact.uri).unwrap();
        folder.join("README.md").delete().unwrap();
        let name = "n".repeat(253);
        let names: Vec<&str> = vec![&name; 20];
        let report = inspect(&listed(&bench, &names), &bench.stores).unwrap();
        assert_eq!((report.inspected as usize, report.findings.len()), (MOST_FINDINGS, MOST_FINDINGS));
        let long = Finding { message: "ü".repeat(LONGEST_MESSAGE), ..report.findings[0].clone() };
        let report = InspectReport { inspected: 200, findings: vec![long; MOST_FINDINGS] };
        let report = tunesmith_crds::RunReport::new(tunesmith_crds::run::Outcome::Inspected(report));
        assert!(report.to_termination_message().len() <= 4096, "{}", report.to_termination_message().len());
    }
}
