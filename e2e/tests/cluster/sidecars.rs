//! Containers that an admission policy puts beside the trainer's, and that never end.

use std::time::Duration;

use anyhow::Result;
use k8s_openapi::api::admissionregistration::v1::{MutatingAdmissionPolicy, MutatingAdmissionPolicyBinding};
use kube::{
    Api,
    api::{DeleteParams, PostParams},
};
use serde_json::json;
use tunesmith_crds::{AdapterVersion, AdapterVersionPhase, FineTuneJobPhase};
use tunesmith_e2e::PAUSE;

use crate::tenant::{Tenant, message};

/// Puts a container that waits for SIGTERM first into every pod of the team, as service meshes do.
async fn inject_proxies(team: &Tenant) -> Result<()> {
    let proxy = format!(
        r#"[JSONPatch{{op: "add", path: "/spec/containers/0", value: Object.spec.containers{{
            name: "proxy", image: "{PAUSE}", imagePullPolicy: "Never",
            securityContext: Object.spec.containers.securityContext{{
                allowPrivilegeEscalation: false,
                capabilities: Object.spec.containers.securityContext.capabilities{{drop: ["ALL"]}}
            }}
        }}}}]"#
    );
    let name = &team.namespace;
    let policy: MutatingAdmissionPolicy = serde_json::from_value(json!({
        "metadata": {"name": name},
        "spec": {
            "failurePolicy": "Fail",
            "reinvocationPolicy": "Never",
            "matchConstraints": {"resourceRules": [
                {"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["pods"]},
            ]},
            "mutations": [{"patchType": "JSONPatch", "jsonPatch": {"expression": proxy}}],
        },
    }))?;
    let binding: MutatingAdmissionPolicyBinding = serde_json::from_value(json!({
        "metadata": {"name": name},
        "spec": {
            "policyName": name,
            "matchResources": {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": name}}},
        },
    }))?;
    Api::all(team.client.clone()).create(&PostParams::default(), &policy).await?;
    Api::all(team.client.clone()).create(&PostParams::default(), &binding).await?;
    // The API server takes a moment to learn of a new policy.
    tokio::time::sleep(Duration::from_secs(3)).await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sidecar_that_never_ends_keeps_no_job_from_its_end() -> Result<()> {
    let team = Tenant::new("sidecar").await?;
    inject_proxies(&team).await?;
    team.apply(&team.job("meshed", json!({"training": {"maxSteps": 20}}))).await?;
    team.apply(&team.job("doomed", json!({"baseModel": {"uri": "s3://models/no-such-model"}}))).await?;

    team.training_pod("meshed").await?;
    for pod in team.pods("meshed", None).await? {
        let containers = pod.spec.map(|spec| spec.containers).unwrap_or_default();
        let names: Vec<_> = containers.iter().map(|container| container.name.as_str()).collect();
        assert_eq!(names, ["proxy", "trainer"]);
    }
    let job = team.until_phase("meshed", FineTuneJobPhase::Succeeded).await?;
    let run = job.status.and_then(|status| status.run).expect("a run");
    assert_eq!((run.number, run.attempt, run.failures), (1, 1, 0));
    let version: AdapterVersion = team.api().get("meshed-v1").await?;
    assert_eq!(version.status.and_then(|status| status.phase), Some(AdapterVersionPhase::Available));
    let job = team.until_phase("doomed", FineTuneJobPhase::Failed).await?;
    assert!(message(&job).contains("no-such-model"), "the trainer's words are read: {}", message(&job));
    for job in ["meshed", "doomed"] {
        team.until_no_pod_runs(job).await?;
    }
    Api::<MutatingAdmissionPolicyBinding>::all(team.client.clone())
        .delete(&team.namespace, &DeleteParams::default())
        .await?;
    Api::<MutatingAdmissionPolicy>::all(team.client.clone()).delete(&team.namespace, &DeleteParams::default()).await?;
    Ok(())
}
