//! A run whose operator is killed behind each of its writes, before it has the answer.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result};
use kube::{Resource, ResourceExt};
use serde_json::Value;
use tunesmith_crds::{
    AdapterVersionPhase, FineTuneJobPhase,
    conditions::reason,
    names::{ATTEMPT_LABEL, STAGE_LABEL},
};
use tunesmith_e2e::{
    operator_bench::{Killed, Write, killed_behind_each_write},
    programs_folder, repository,
};

/// What the operator created, by kind and, for Jobs, stage.
fn created(writes: &[Write]) -> Result<BTreeMap<String, usize>> {
    let mut created = BTreeMap::new();
    for write in writes.iter().filter(|write| write.method == "POST" && !write.path.contains("/events")) {
        let object: Value = serde_json::from_str(&write.body)?;
        let stage = object["metadata"]["labels"][STAGE_LABEL].as_str().unwrap_or_default();
        let kind = write.path.rsplit('/').next().unwrap_or_default();
        *created.entry(format!("{kind} {stage}").trim().to_owned()).or_default() += 1;
    }
    Ok(created)
}

/// Each object stands on a record that was written before it: whoever takes over knows of it.
fn assert_that_records_come_first(writes: &[Write]) -> Result<()> {
    let mut record = Value::Null;
    for write in writes {
        let object: Value = serde_json::from_str(&write.body).unwrap_or_default();
        let (kind, name) = (write.path.rsplit('/').next().unwrap_or_default(), &object["metadata"]["name"]);
        let labels = &object["metadata"]["labels"];
        match (write.method.as_str(), kind, labels[STAGE_LABEL].as_str()) {
            ("PUT", "status", _) if write.path.contains("/finetuneruns/") => record = object["status"].clone(),
            ("POST", "jobs", Some("preflight")) => {
                let number = name.as_str().and_then(|name| name.rsplit('-').next()).context("a name")?;
                assert_eq!(record["check"]["number"].to_string(), number, "{name} stands on no record: {record:#}");
            }
            ("POST", "jobs", Some("train")) => {
                let attempt = labels[ATTEMPT_LABEL].as_str().context("an attempt")?;
                assert_eq!(record["lastAttempt"].to_string(), attempt, "{name} stands on no record: {record:#}");
            }
            ("POST", "adapterversions", _) => {
                assert_eq!(&record["adapterVersion"], name, "{name} stands on no record: {record:#}");
            }
            _ => {}
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_that_is_killed_behind_each_write_leaves_one_version_and_no_orphan() -> Result<()> {
    let operator = programs_folder().join("tunesmith-operator");
    let Killed { writes, job, runs, versions, jobs, pods } =
        killed_behind_each_write(operator, repository().join("charts/tunesmith")).await?;
    for write in &writes {
        println!("{} {}", write.method, write.path);
    }

    // The first attempt fails, and the second publishes.
    let expected =
        [("adapterversions", 1), ("finetuneruns", 1), ("jobs preflight", 1), ("jobs train", 2), ("jobs verify", 1)];
    assert_eq!(created(&writes)?, expected.map(|(kind, times)| (kind.to_owned(), times)).into());
    assert_that_records_come_first(&writes)?;

    let status = job.status.clone().context("the job has a status")?;
    assert_eq!(status.phase, Some(FineTuneJobPhase::Succeeded), "{status:#?}");
    let [run] = &runs[..] else { panic!("{} runs", runs.len()) };
    let record = run.status.clone().context("the run has a record")?;
    assert_eq!(record.reason.as_deref(), Some(reason::PUBLISHED));
    assert_eq!((record.last_attempt, record.failures, record.check_failures), (2, 1, 0), "{record:#?}");
    let [version] = &versions[..] else { panic!("{} versions", versions.len()) };
    assert_eq!(version.name_any(), "killed-000-v1");
    let phase = version.status.as_ref().and_then(|status| status.phase);
    assert_eq!(phase, Some(AdapterVersionPhase::Available));

    // Whatever is left belongs to something that is there.
    let there: BTreeSet<String> =
        [job.uid(), run.uid(), version.uid()].into_iter().chain(jobs.iter().map(|job| job.uid())).flatten().collect();
    let objects = jobs.iter().map(|job| job.meta()).chain(pods.iter().map(|pod| pod.meta())).chain([run.meta()]);
    for object in objects {
        let owners = object.owner_references.iter().flatten();
        assert!(owners.clone().count() > 0, "{:?} has no owner", object.name);
        assert!(owners.clone().all(|owner| there.contains(&owner.uid)), "{:?} is an orphan", object.name);
    }
    Ok(())
}
