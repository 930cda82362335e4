//! Files that vanish from the store behind the operator's back.

use std::{
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result};
use k8s_openapi::api::apps::v1::Deployment;
use kube::{Api, runtime::wait::await_condition};
use object_store::{ObjectStoreExt, path::Path as Key};
use serde_json::json;
use tokio::time::timeout;
use tunesmith_crds::{AdapterVersion, AdapterVersionPhase as Phase, FineTuneJobPhase};
use tunesmith_e2e::programs_folder;

use crate::{tenant::Tenant, testbed::OPERATOR_NAMESPACE};

/// An operator for one namespace, which inspects as often as one may ask for; it ends with this value.
struct Inspector(Child);

impl Inspector {
    async fn start(team: &Tenant) -> Result<Self> {
        let operators: Api<Deployment> = Api::namespaced(team.client.clone(), OPERATOR_NAMESPACE);
        let shared = serde_json::to_value(operators.get("tunesmith-operator").await?)?;
        let environment =
            shared["spec"]["template"]["spec"]["containers"][0]["env"].as_array().context("its variables")?;
        let image = environment.iter().find(|variable| variable["name"] == "TRAINER_IMAGE");
        let operator = Command::new(programs_folder().join("tunesmith-operator"))
            .env("KUBECONFIG", team.cluster.kubeconfig())
            .env("TRAINER_IMAGE", image.and_then(|image| image["value"].as_str()).context("the trainer's image")?)
            .env("WATCH_NAMESPACES", &team.namespace)
            .env("INSPECT_EVERY", "1m")
            .env("LISTEN_ADDRESS", "127.0.0.1:0")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        Ok(Self(operator.context("cannot start an operator")?))
    }
}

impl Drop for Inspector {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_is_deleted_from_the_store_is_found_by_an_inspection() -> Result<()> {
    let team = Tenant::new("inspected").await?;
    for name in ["whole", "torn"] {
        team.apply(&team.job(name, json!({}))).await?;
    }
    for name in ["whole", "torn"] {
        team.until_phase(name, FineTuneJobPhase::Succeeded).await?;
    }
    let file = Key::from(format!("{}/torn/v1/adapter_model.safetensors", team.namespace));
    team.s3.bucket("adapters")?.delete(&file).await?;

    let _inspector = Inspector::start(&team).await?;
    let phase = |version: &AdapterVersion| version.status.as_ref().and_then(|status| status.phase);
    let is_missing = move |version: Option<&AdapterVersion>| version.and_then(phase) == Some(Phase::Missing);
    let missing = await_condition(team.api::<AdapterVersion>(), "torn-v1", is_missing);
    timeout(Duration::from_secs(300), missing).await.context("nobody noticed that a file is gone")??;
    let is_inspected = |version: Option<&AdapterVersion>| {
        version.is_some_and(|it| it.status.as_ref().is_some_and(|it| it.inspected_time.is_some()))
    };
    let inspected = await_condition(team.api::<AdapterVersion>(), "whole-v1", is_inspected);
    timeout(Duration::from_secs(60), inspected).await.context("the other version was not inspected")??;
    assert_eq!(phase(&team.api().get("whole-v1").await?), Some(Phase::Available));
    Ok(())
}
