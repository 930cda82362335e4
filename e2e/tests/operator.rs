//! The operator alone, against a real API server: nodes, kubelets and trainers are played.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result};
use kube::{Resource, ResourceExt};
use tunesmith_crds::{AdapterVersionPhase, FineTuneJobPhase, conditions::reason};
use tunesmith_e2e::{
    operator_bench::{Killed, killed_behind_each_write},
    programs_folder, repository,
};

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_that_is_killed_behind_each_write_leaves_one_version_and_no_orphan() -> Result<()> {
    let operator = programs_folder().join("tunesmith-operator");
    let Killed { writes, job, runs, versions, jobs, pods } =
        killed_behind_each_write(operator, repository().join("charts/tunesmith")).await?;
    for write in &writes {
        println!("{} {}", write.method, write.path);
    }

    let mut created: BTreeMap<(&str, String), usize> = BTreeMap::new();
    for write in writes.iter().filter(|write| write.method == "POST" && !write.path.contains("/events")) {
        let object: serde_json::Value = serde_json::from_str(&write.body)?;
        let name = object["metadata"]["name"].as_str().unwrap_or_default().to_owned();
        *created.entry((&write.path, name)).or_default() += 1;
    }
    assert!(created.values().all(|times| *times == 1), "created twice: {created:#?}");

    let status = job.status.clone().context("the job has a status")?;
    assert_eq!(status.phase, Some(FineTuneJobPhase::Succeeded), "{status:#?}");
    let [run] = &runs[..] else { panic!("{} runs", runs.len()) };
    let record = run.status.clone().context("the run has a record")?;
    assert_eq!(record.reason.as_deref(), Some(reason::PUBLISHED));
    assert_eq!((record.last_attempt, record.failures, record.check_failures), (1, 0, 0), "{record:#?}");
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
