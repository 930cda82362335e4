//! What dies on the way: nothing is lost, nothing is done twice.

use anyhow::Result;
use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api,
    api::{DeleteParams, ListParams},
};
use serde_json::{Value, json};
use tunesmith_crds::{FineTuneJob, FineTuneJobPhase};

use crate::{
    tenant::{Tenant, phase_of, step_of},
    testbed::OPERATOR_NAMESPACE,
};

/// Long enough to be interrupted on any machine: its hundreds of checkpoints take longer than its steps. The operator
/// looks at a run every two seconds.
fn long() -> Value {
    json!({"training": {"maxSteps": 300, "saveSteps": 2, "perDeviceTrainBatchSize": 8}})
}

/// Ends the operator as a crash would.
async fn kill_operator(team: &Tenant) -> Result<()> {
    let pods: Api<Pod> = Api::namespaced(team.client.clone(), OPERATOR_NAMESPACE);
    pods.delete_collection(&DeleteParams::default().grace_period(0), &ListParams::default()).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_that_is_killed_at_any_point_leaves_one_job_and_one_version() -> Result<()> {
    let team = Tenant::new("operator").await?;
    team.apply(&team.job("steady", long())).await?;
    team.until("steady", "in preflight", |job| phase_of(job) == Some(FineTuneJobPhase::Preflight)).await?;
    kill_operator(&team).await?;
    team.until_step("steady", 10).await?;
    kill_operator(&team).await?;
    let job = team.until_phase("steady", FineTuneJobPhase::Succeeded).await?;
    kill_operator(&team).await?;
    assert_eq!(team.training_jobs("steady").await?.len(), 1);
    assert_eq!(team.versions().await?, ["steady-v1"]);
    assert_eq!(job.status.and_then(|status| status.run).map(|run| (run.number, run.attempt)), Some((1, 1)));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_training_resumes_from_its_checkpoint_and_gives_the_same_weights() -> Result<()> {
    let team = Tenant::new("trainer").await?;
    team.apply(&team.job("undisturbed", long())).await?;
    team.apply(&team.job("killed", long())).await?;
    // The first time with notice, so that it checkpoints; the second time without. A pod that has notice goes on for a
    // while, so each attempt is waited for by its number.
    let mut step = 0;
    for (attempt, grace) in [(1, None), (2, Some(0))] {
        let is_far_enough = |job: &FineTuneJob| {
            let status = job.status.as_ref();
            let attempted = status.and_then(|status| status.run.as_ref()).map(|run| run.attempt);
            attempted == Some(attempt) && step_of(job) >= step + 10
        };
        let job = team.until_running("killed", &format!("10 steps on in attempt {attempt}"), is_far_enough).await?;
        step = step_of(&job);
        let params = DeleteParams { grace_period_seconds: grace, ..DeleteParams::default() };
        team.api::<Pod>().delete(&team.training_pod("killed").await?, &params).await?;
    }
    let job = team.until_phase("killed", FineTuneJobPhase::Succeeded).await?;
    let run = job.status.and_then(|status| status.run).expect("a run");
    assert_eq!((run.attempt, run.failures), (3, 0), "a deleted pod is no failure");
    team.until_phase("undisturbed", FineTuneJobPhase::Succeeded).await?;
    assert_eq!(team.weights("killed", 1).await?, team.weights("undisturbed", 1).await?);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_suspended_job_gives_up_its_pods_and_goes_on_later() -> Result<()> {
    let team = Tenant::new("suspend").await?;
    let mut manifest = team.job("paused", long());
    team.apply(&manifest).await?;
    team.until_step("paused", 10).await?;
    manifest["spec"]["suspend"] = true.into();
    team.apply(&manifest).await?;
    team.until_phase("paused", FineTuneJobPhase::Suspended).await?;
    team.until_no_pod_runs("paused").await?;
    manifest["spec"]["suspend"] = false.into();
    team.apply(&manifest).await?;
    let job = team.until_phase("paused", FineTuneJobPhase::Succeeded).await?;
    assert_eq!(job.status.and_then(|status| status.run).map(|run| (run.number, run.failures)), Some((1, 0)));
    Ok(())
}
