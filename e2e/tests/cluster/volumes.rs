//! Models and data in volumes of the team.

use anyhow::Result;
use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim};
use kube::{
    Api,
    api::{DeleteParams, PostParams},
};
use serde_json::json;
use tunesmith_crds::{AdapterVersion, FineTuneJobPhase};

use crate::{
    tenant::{Tenant, message, rows},
    testbed::{TINY_MODEL, tiny_model},
};

#[tokio::test(flavor = "multi_thread")]
async fn a_base_model_and_data_are_read_from_claims() -> Result<()> {
    let team = Tenant::new("volumes").await?;
    let folder = tempfile::Builder::new().permissions(std::os::unix::fs::PermissionsExt::from_mode(0o755)).tempdir()?;
    for file in std::fs::read_dir(tiny_model()?)? {
        let file = file?;
        std::fs::create_dir_all(folder.path().join("tiny"))?;
        std::fs::copy(file.path(), folder.path().join("tiny").join(file.file_name()))?;
    }
    std::fs::write(folder.path().join("train.jsonl"), rows(40).join("\n"))?;

    let from_claim = json!({
        "baseModel": {"uri": "pvc://team-files/tiny"},
        "dataset": {"train": {"uri": "pvc://team-files/train.jsonl"}},
    });
    team.apply(&team.job("bot", from_claim)).await?;
    // Until there is such a claim, the job says what it waits for.
    team.until("bot", "waiting for the claim", |job| message(job).contains("team-files")).await?;

    let (size, mode) = (json!({"storage": "1Gi"}), json!(["ReadOnlyMany"]));
    let volume: PersistentVolume = serde_json::from_value(json!({
        "metadata": {"name": team.namespace},
        "spec": {
            "capacity": size, "accessModes": mode, "storageClassName": "", "persistentVolumeReclaimPolicy": "Retain",
            "hostPath": {"path": folder.path(), "type": "Directory"},
            "claimRef": {"namespace": team.namespace, "name": "team-files"},
        },
    }))?;
    let claim: PersistentVolumeClaim = serde_json::from_value(json!({
        "metadata": {"name": "team-files"},
        "spec": {"accessModes": mode, "storageClassName": "", "resources": {"requests": size}},
    }))?;
    let volumes: Api<PersistentVolume> = Api::all(team.client.clone());
    volumes.create(&PostParams::default(), &volume).await?;
    team.api().create(&PostParams::default(), &claim).await?;
    team.until_phase("bot", FineTuneJobPhase::Succeeded).await?;

    // The same files are the same model, wherever they lie.
    team.apply(&team.job("other", json!({"baseModel": {"uri": TINY_MODEL}}))).await?;
    team.until_phase("other", FineTuneJobPhase::Succeeded).await?;
    let base = async |name: &str| anyhow::Ok(team.api::<AdapterVersion>().get(name).await?.spec.base_model);
    let (claimed, stored) = (base("bot-v1").await?, base("other-v1").await?);
    assert_eq!(claimed.digest, stored.digest);
    assert_eq!(claimed.uri.to_string(), "pvc://team-files/tiny");
    volumes.delete(&team.namespace, &DeleteParams::default()).await?;
    Ok(())
}
