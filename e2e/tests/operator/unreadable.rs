//! Objects that a later or a damaged definition has let in, and that this operator can't read.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use kube::{
    Api, Client, CustomResourceExt, Resource, ResourceExt,
    api::{ApiResource, DynamicObject, Patch, PatchParams, PostParams},
    core::NamespaceResourceScope,
};
use serde_json::{Value, json};
use tunesmith_crds::{
    AdapterVersion, FineTuneJob, FineTuneRun, GpuClass,
    conditions::{self, reason},
    names::JOB_LABEL,
};
use tunesmith_e2e::{operator_bench::Stage, run};

use crate::stage;

/// A word that no release knows.
const ODD: &str = "Telepathy";

/// Lets the API server take any word in a field of a kind.
fn loosen<K: CustomResourceExt>(stage: &Stage, field: &str) -> Result<()> {
    let path = format!("/spec/versions/0/schema/openAPIV3Schema/properties/spec/properties/{field}/enum");
    let patch = json!([{"op": "remove", "path": path}]).to_string();
    run(stage.kubectl().args(["patch", "crd", K::crd_name(), "--type=json", "-p", &patch]))?;
    Ok(())
}

/// Creates an object as it stands, once the API server has heard of the looser definition.
async fn create(api: Api<DynamicObject>, object: Value) -> Result<DynamicObject> {
    let object: DynamicObject = serde_json::from_value(object)?;
    let begun = Instant::now();
    loop {
        match api.create(&PostParams::default(), &object).await {
            Ok(created) => return Ok(created),
            Err(kube::Error::Api(status)) if status.code == 422 && begun.elapsed() < Duration::from_secs(20) => {
                tokio::time::sleep(Duration::from_millis(300)).await;
            }
            Err(error) => bail!("{error}"),
        }
    }
}

fn api<K>(client: &Client, namespace: &str) -> Api<DynamicObject>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope>,
{
    Api::namespaced_with(client.clone(), namespace, &ApiResource::erase::<K>(&()))
}

/// `(phase, status of Stalled, its reason, its message)`.
async fn told<K>(client: &Client, namespace: &str, name: &str) -> Result<(String, String, String, String)>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope>,
{
    let object = api::<K>(client, namespace).get(name).await?;
    let status = &object.data["status"];
    let conditions = status["conditions"].as_array().with_context(|| format!("{name} has no conditions"))?;
    let stalled = conditions.iter().find(|condition| condition["type"] == conditions::STALLED).context("Stalled")?;
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    Ok((text(&status["phase"]), text(&stalled["status"]), text(&stalled["reason"]), text(&stalled["message"])))
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_operator_cannot_read_stops_nobody_else() -> Result<()> {
    let mut stage = stage("tunesmith-odd", 4).await?;
    let (client, namespace) = (stage.client(), Stage::namespace(0));
    loosen::<FineTuneJob>(&stage, "method")?;
    loosen::<FineTuneRun>(&stage, "trigger")?;
    loosen::<AdapterVersion>(&stage, "method")?;
    loosen::<GpuClass>(&stage, "methods/items/properties/method")?;

    for name in ["good", "haunted"] {
        stage.submit(&namespace, name).await?;
    }
    let good: FineTuneJob = Api::namespaced(client.clone(), &namespace).get("good").await?;
    let haunted: FineTuneJob = Api::namespaced(client.clone(), &namespace).get("haunted").await?;
    let types = |kind: &str| json!({"apiVersion": "tunesmith.dev/v1alpha1", "kind": kind});
    let mut odd = types("FineTuneJob");
    (odd["metadata"], odd["spec"]) = (json!({"name": "odd"}), json!(good.spec));
    (odd["spec"]["method"], odd["spec"]["output"]["adapterName"]) = (json!(ODD), json!("odd"));
    create(api::<FineTuneJob>(&client, &namespace), odd).await?;
    let mut class = types("GpuClass");
    (class["metadata"], class["spec"]) = (json!({"name": "odd"}), json!({"methods": [{"method": ODD, "gpus": 0}]}));
    create(Api::all_with(client.clone(), &ApiResource::erase::<GpuClass>(&())), class).await?;
    let mut run = types("FineTuneRun");
    run["metadata"] = json!({
        "name": "haunted-1", "labels": {JOB_LABEL: "haunted"}, "ownerReferences": [haunted.controller_owner_ref(&())],
    });
    run["spec"] = json!({
        "job": {"name": "haunted", "uid": haunted.uid(), "generation": 1}, "number": 1, "trigger": ODD,
        "image": "trainer:0", "jobSpec": haunted.spec,
    });
    create(api::<FineTuneRun>(&client, &namespace), run).await?;
    let mut version = types("AdapterVersion");
    version["metadata"] = json!({"name": "good-v7"});
    version["spec"] = version_of("good", 7);
    create(api::<AdapterVersion>(&client, &namespace), version).await?;

    stage.start_operator().await?;
    stage.until_phase(&namespace, "good", "Succeeded").await?;
    for name in ["odd", "haunted"] {
        stage.until_phase(&namespace, name, "Failed").await?;
    }
    let (_, stalled, why, words) = told::<FineTuneJob>(&client, &namespace, "odd").await?;
    assert_eq!((stalled.as_str(), why.as_str()), ("True", reason::UNREADABLE));
    assert!(words.contains(ODD) && words.contains("mend its spec, or delete it"), "{words}");
    let (_, stalled, why, words) = told::<FineTuneJob>(&client, &namespace, "haunted").await?;
    assert_eq!((stalled.as_str(), why.as_str()), ("True", reason::UNREADABLE));
    assert!(words.contains("haunted-1") && words.contains("delete it"), "{words}");
    let (_, stalled, why, words) = told::<AdapterVersion>(&client, &namespace, "good-v7").await?;
    assert_eq!((stalled.as_str(), why.as_str()), ("True", reason::UNREADABLE));
    assert!(words.contains(ODD), "{words}");

    // The messages say what helps.
    let mend = Patch::Merge(json!({"spec": {"method": "LoRA"}}));
    api::<FineTuneJob>(&client, &namespace).patch("odd", &PatchParams::default(), &mend).await?;
    api::<FineTuneRun>(&client, &namespace).delete("haunted-1", &Default::default()).await?;
    for name in ["odd", "haunted"] {
        stage.until_phase(&namespace, name, "Succeeded").await?;
    }
    Ok(())
}

/// The spec of a version whose method nobody knows.
fn version_of(adapter: &str, version: u32) -> Value {
    let digest = format!("sha256:{}", "0".repeat(64));
    let uri = format!("s3://adapters/{adapter}/v{version}");
    json!({
        "adapterName": adapter, "version": version, "method": ODD, "hyperparameters": {},
        "artifact": {
            "type": "LoraAdapter", "uri": uri, "manifestUri": format!("{uri}/manifest.json"),
            "manifestDigest": digest, "fileCount": 1, "sizeBytes": 1,
        },
        "baseModel": {"uri": "s3://models/m", "digest": digest},
        "dataset": {"digest": digest, "rows": 1, "tokens": 1},
        "source": {
            "job": adapter, "uid": "u", "generation": 1, "run": 1, "inputDigest": digest, "trainerImage": "trainer:0",
        },
        "metrics": {"steps": 1, "tokens": 1, "trainSeconds": 1.0},
    })
}
