//! A new release of the chart, while a job trains. It takes the longest of all tests, and its name lets it begin early.

use std::time::Duration;

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api, ResourceExt,
    api::ListParams,
    runtime::wait::{Condition, await_condition},
};
use serde_json::json;
use tokio::{task::spawn_blocking, time::timeout};
use tunesmith_crds::{FineTuneJob, FineTuneJobPhase, GpuClass};

use crate::{
    tenant::{Tenant, message, phase_of},
    testbed::{OPERATOR_NAMESPACE, release},
};

/// Other classes than those of the first release, and another option of the operator.
const NEXT_RELEASE: &[&str] = &[
    r#"gpuClasses.zz-upgrade-changed={"methods": [{"method": "LoRA", "gpus": 0}, {"method": "QLoRA", "gpus": 0}]}"#,
    r#"gpuClasses.zz-upgrade-added={"methods": [{"method": "LoRA", "gpus": 0}]}"#,
    r#"trainer.checks.cpuLimit="2""#,
];

/// The operator looks for unused classes once a minute while it leads.
const LONGER_THAN_CLASSES_TAKE: Duration = Duration::from_secs(240);

async fn until_class(team: &Tenant, name: &str, wanted: impl Condition<GpuClass>) -> Result<()> {
    let classes = Api::<GpuClass>::all(team.client.clone());
    let awaited = timeout(LONGER_THAN_CLASSES_TAKE, await_condition(classes, name, wanted));
    awaited.await.with_context(|| format!("GpuClass {name} is not as wanted"))??;
    Ok(())
}

fn is_there(class: Option<&GpuClass>) -> bool {
    class.is_some()
}

async fn uids(pods: Api<Pod>) -> Result<Vec<Option<String>>> {
    Ok(pods.list(&ListParams::default()).await?.iter().map(ResourceExt::uid).collect())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upgrade_disturbs_no_training_and_keeps_the_classes_that_are_in_use() -> Result<()> {
    let team = Tenant::new("upgrade").await?;
    let operators = || uids(Api::namespaced(team.client.clone(), OPERATOR_NAMESPACE));
    for class in ["zz-upgrade-used", "zz-upgrade-unused", "zz-upgrade-changed"] {
        until_class(&team, class, is_there).await.context("before the upgrade")?;
    }
    let long = json!({
        "training": {"maxSteps": 1000, "saveSteps": 2, "perDeviceTrainBatchSize": 8},
        "resources": {"gpuClass": "zz-upgrade-used"},
    });
    team.apply(&team.job("steady", long)).await?;
    team.until_step("steady", 2).await?;
    let training = team.pods("steady", Some("train")).await?;
    let before = operators().await?;

    let cluster = team.cluster.clone();
    spawn_blocking(move || release(&cluster, NEXT_RELEASE)).await??;
    let job = team.api::<FineTuneJob>().get("steady").await?;
    assert_eq!(phase_of(&job), Some(FineTuneJobPhase::Running), "it must outlast the upgrade: {}", message(&job));
    assert!(operators().await?.iter().any(|uid| !before.contains(uid)), "the operator was not replaced");
    until_class(&team, "zz-upgrade-added", is_there).await?;
    until_class(&team, "zz-upgrade-changed", |class: Option<&GpuClass>| {
        class.is_some_and(|class| class.spec.methods.len() == 2)
    })
    .await?;

    let job = team.until_phase("steady", FineTuneJobPhase::Succeeded).await?;
    assert_eq!(job.status.and_then(|status| status.run).map(|run| (run.number, run.attempt)), Some((1, 1)));
    assert_eq!(team.training_jobs("steady").await?.len(), 1);
    let uid_of = |pods: &[Pod]| pods.iter().map(ResourceExt::uid).collect::<Vec<_>>();
    assert_eq!(uid_of(&team.pods("steady", Some("train")).await?), uid_of(&training), "the pod was not restarted");
    assert_eq!(team.versions().await?, ["steady-v1"]);

    // The values name neither class any more. The job asks for one of them as long as it is there.
    until_class(&team, "zz-upgrade-unused", |class: Option<&GpuClass>| class.is_none()).await?;
    let classes = Api::<GpuClass>::all(team.client.clone());
    assert!(classes.get_opt("zz-upgrade-used").await?.is_some(), "a class in use was deleted");
    team.delete_job("steady").await?;
    until_class(&team, "zz-upgrade-used", |class: Option<&GpuClass>| class.is_none()).await?;
    Ok(())
}
