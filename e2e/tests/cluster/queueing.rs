//! A job that must wait says for what.

use anyhow::Result;
use k8s_openapi::api::{
    admissionregistration::v1::{ValidatingAdmissionPolicy, ValidatingAdmissionPolicyBinding},
    core::v1::ResourceQuota,
};
use kube::{
    Api,
    api::{DeleteParams, Patch, PatchParams, PostParams},
};
use serde_json::json;
use tunesmith_crds::{FineTuneJob, FineTuneJobPhase, GpuClass, conditions};

use crate::tenant::{Tenant, condition, message, phase_of};

/// Whether the job waits in the queue and says `words`.
fn waits_for(job: &FineTuneJob, words: &str) -> bool {
    phase_of(job) == Some(FineTuneJobPhase::Queued)
        && message(job).contains(words)
        && condition(job, conditions::QUOTA_RESERVED).map(|(status, ..)| status) == Some("False")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_without_quota_waits_says_so_and_runs_once_there_is_some() -> Result<()> {
    let team = Tenant::new("quota").await?;
    team.cluster.set_node_capacity("nvidia.com/gpu", 4).await?;
    // The name sorts last, so that no other test is given this class.
    let class: GpuClass = serde_json::from_value(json!({
        "apiVersion": "tunesmith.dev/v1alpha1", "kind": "GpuClass", "metadata": {"name": "zz-test-gpu"},
        "spec": {"resourceName": "nvidia.com/gpu", "memory": "24Gi", "methods": [{"method": "LoRA", "gpus": 1}]},
    }))?;
    let apply = PatchParams::apply("admin").force();
    Api::<GpuClass>::all(team.client.clone()).patch("zz-test-gpu", &apply, &Patch::Apply(&class)).await?;
    let mut quota: ResourceQuota = serde_json::from_value(json!({
        "apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "team-gpus"},
        "spec": {"hard": {"requests.nvidia.com/gpu": "0"}},
    }))?;
    team.api::<ResourceQuota>().create(&PostParams::default(), &quota).await?;

    team.apply(&team.job("patient", json!({"resources": {"gpuClass": "zz-test-gpu"}}))).await?;
    let words = "needs 1 nvidia.com/gpu, 0 of 0 free in ResourceQuota team-gpus";
    team.until("patient", "waiting for quota", |job| waits_for(job, words)).await?;
    assert!(team.versions().await?.is_empty());

    quota.spec = serde_json::from_value(json!({"hard": {"requests.nvidia.com/gpu": "1"}}))?;
    team.api::<ResourceQuota>().patch("team-gpus", &apply, &Patch::Apply(&quota)).await?;
    let job = team.until_phase("patient", FineTuneJobPhase::Succeeded).await?;
    let plan = job.status.and_then(|status| status.plan).expect("a plan");
    assert_eq!((plan.gpu_class.as_str(), plan.pods, plan.gpus_per_pod), ("zz-test-gpu", 1, 1));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_a_policy_refuses_is_tried_again_and_names_the_policy() -> Result<()> {
    let team = Tenant::new("policy").await?;
    let name = format!("no-training-{}", team.namespace);
    let policy: ValidatingAdmissionPolicy = serde_json::from_value(json!({
        "metadata": {"name": name},
        "spec": {
            "failurePolicy": "Fail",
            "matchConstraints": {"resourceRules": [
                {"apiGroups": ["batch"], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["jobs"]},
            ]},
            "validations": [{
                "expression": "!has(object.metadata.labels) || object.metadata.labels['tunesmith.dev/stage'] != 'train'",
                "message": "no training before midnight",
            }],
        },
    }))?;
    let binding: ValidatingAdmissionPolicyBinding = serde_json::from_value(json!({
        "metadata": {"name": name},
        "spec": {
            "policyName": name,
            "validationActions": ["Deny"],
            "matchResources": {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": team.namespace}}},
        },
    }))?;
    let policies = Api::<ValidatingAdmissionPolicy>::all(team.client.clone());
    let bindings = Api::<ValidatingAdmissionPolicyBinding>::all(team.client.clone());
    policies.create(&PostParams::default(), &policy).await?;
    bindings.create(&PostParams::default(), &binding).await?;
    // The API server takes a moment to learn of a new policy.
    tokio::time::sleep(std::time::Duration::from_secs(3)).await;

    team.apply(&team.job("refused", json!({}))).await?;
    team.until("refused", "refused by the policy", |job| waits_for(job, "no training before midnight")).await?;
    bindings.delete(&name, &DeleteParams::default()).await?;
    policies.delete(&name, &DeleteParams::default()).await?;
    team.until_phase("refused", FineTuneJobPhase::Succeeded).await?;
    Ok(())
}
