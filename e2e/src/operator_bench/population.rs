//! What the cluster holds: nodes, namespaces, and FineTuneJobs with all that belongs to them.
//!
//! Two jobs are taken on their way by the operator itself, one to its end and one into training; all others are copies of
//! these with names and UIDs of their own, so that they look as the operator leaves them.

use std::time::Duration;

use anyhow::{Context, Result};
use futures::{StreamExt, TryStreamExt, stream};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{Namespace, Node};
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, ApiResource, DynamicObject, ListParams, Patch, PatchParams, PostParams, TypeMeta};
use kube::{Client, Resource, ResourceExt};
use serde_json::{Value, json};
use tunesmith_crds::names::{GROUP, JOB_LABEL};
use tunesmith_crds::{AdapterVersion, FineTuneJob, FineTuneRun};

use super::etcd::Etcd;
use super::kubelet::ready;
use super::watch::Jobs;
use crate::network::Network;
use crate::paths::sha256;

/// Writers at once.
const AT_ONCE: usize = 64;
const NAMESPACES: u32 = 20;
const PATIENCE: Duration = Duration::from_secs(120);
/// A pod is asked for its progress every few seconds.
const SOON: Duration = Duration::from_secs(15);
/// Images that a node lists: they make up most of its size.
const IMAGES: usize = 50;

/// The namespace of a job of this number.
pub(crate) fn namespace(number: u32) -> String {
    format!("team-{:02}", number % NAMESPACES)
}

/// Name of a finished job.
pub(crate) fn finished(number: u32) -> String {
    format!("finished-{number:05}")
}

/// Name of a job that trains.
pub(crate) fn active(number: u32) -> String {
    format!("active-{number:05}")
}

/// Creates namespaces and nodes; the names of the nodes.
pub(crate) async fn ground(client: &Client, nodes: u32) -> Result<Vec<String>> {
    let namespaces = Api::<Namespace>::all(client.clone());
    for number in 0..NAMESPACES {
        let namespace = serde_json::from_value(json!({"metadata": {"name": namespace(number)}}))?;
        namespaces.create(&PostParams::default(), &namespace).await?;
    }
    let api = Api::<Node>::all(client.clone());
    let names: Vec<String> = (0..nodes).map(|number| format!("node-{number:03}")).collect();
    let creations = stream::iter(&names).map(|name| {
        let api = api.clone();
        async move {
            let node = node(name);
            api.create(&PostParams::default(), &serde_json::from_value(node.clone())?).await?;
            let patch = Patch::Merge(json!({"status": node["status"]}));
            api.patch_status(name, &PatchParams::default(), &patch).await?;
            anyhow::Ok(())
        }
    });
    creations.buffer_unordered(AT_ONCE).try_collect::<()>().await.context("cannot make the nodes")?;
    Ok(names)
}

fn node(name: &str) -> Value {
    let image = |number: usize| {
        let tag = format!("registry.example.com/team/image-{number}@sha256:{}", "0".repeat(64));
        json!({"names": [tag, format!("registry.example.com/team/image-{number}:v1.2.3")], "sizeBytes": 123_456_789})
    };
    let resources = json!({
        "cpu": "64", "memory": "512Gi", "pods": "110", "ephemeral-storage": "900Gi", "nvidia.com/gpu": "8",
    });
    json!({
        "metadata": {"name": name, "labels": {
            "kubernetes.io/arch": "amd64", "kubernetes.io/os": "linux", "kubernetes.io/hostname": name,
            "nvidia.com/gpu.memory": "81559", "nvidia.com/gpu.product": "NVIDIA-A100-SXM4-80GB",
        }},
        "status": {
            "capacity": resources, "allocatable": resources, "conditions": [ready(Timestamp::now())],
            "images": (0..IMAGES).map(image).collect::<Vec<Value>>(),
        },
    })
}

/// A new job, as its user writes it.
pub(crate) async fn submit(client: &Client, namespace: &str, name: &str) -> Result<()> {
    let jobs = Api::<FineTuneJob>::namespaced(client.clone(), namespace);
    let job = serde_json::from_value(json!({
        "apiVersion": "tunesmith.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": name},
        "spec": {
            "baseModel": {"uri": "s3://models/smollm2-135m-instruct"},
            "dataset": {
                "train": {"uri": "s3://datasets/telecom-support/train.jsonl"},
                "eval": {"uri": "s3://datasets/telecom-support/eval.jsonl"},
            },
            "method": "LoRA",
            "lora": {"rank": 16, "alpha": 32, "dropout": 0, "targetModules": ["all-linear"]},
            "training": {"perDeviceTrainBatchSize": 8, "learningRate": 0.001, "maxLength": 512},
            "resources": {"gpuClass": "cpu", "memory": "3Gi"},
            "output": {"adapterName": name, "uri": "s3://adapters", "secretRef": {"name": "s3-credentials"}},
        },
    }))?;
    jobs.create(&PostParams::default(), &job).await.with_context(|| format!("cannot create {namespace}/{name}"))?;
    Ok(())
}

/// The two jobs that all others are copies of.
pub(crate) struct Originals {
    finished: Vec<Original>,
    active: Vec<Original>,
}

/// Takes two jobs on their way; the operator must be running.
pub(crate) async fn originals(client: &Client, jobs: &Jobs) -> Result<Originals> {
    let namespace = namespace(0);
    let (done, trains) = (finished(0), active(0));
    submit(client, &namespace, &done).await?;
    submit(client, &namespace, &trains).await?;
    jobs.until_phase(&[(namespace.clone(), done.clone())], "Succeeded", PATIENCE).await?;
    jobs.until_phase(&[(namespace.clone(), trains.clone())], "Running", PATIENCE).await?;
    if let Err(late) = jobs.until_message(&(namespace.clone(), trains.clone()), "trains", SOON).await {
        eprintln!("  its status should tell that it trains: {late}");
    }
    // Progress is written after the stage.
    tokio::time::sleep(Duration::from_secs(5)).await;
    let of = async |name: &str, goes_on: bool| -> Result<Vec<Original>> {
        let mut all = vec![Original::read::<FineTuneJob>(client, &namespace, name).await?];
        all.extend(Original::labelled::<FineTuneRun>(client, &namespace, name).await?);
        if goes_on {
            all.extend(Original::labelled::<Job>(client, &namespace, name).await?);
            // The check is over, and its Job was removed by a TTL.
            all.retain(|original| !original.object.name_any().contains("-preflight-"));
        }
        all.extend(Original::labelled::<AdapterVersion>(client, &namespace, name).await?);
        Ok(all)
    };
    Ok(Originals { finished: of(&done, false).await?, active: of(&trains, true).await? })
}

/// Originals, the namespace of their copies, and what is another word there.
type Copied<'a> = (&'a Vec<Original>, String, Vec<(String, String)>);

/// Fills the cluster up to so many jobs that have ended, and so many that train.
///
/// Tunesmith's own objects go to etcd, byte for byte as they lie there of the originals. Jobs go through the API server, and the Job
/// controller makes the pods.
pub(crate) async fn fill(
    client: &Client,
    network: &Network,
    originals: &Originals,
    finished_jobs: u32,
    active_jobs: u32,
) -> Result<()> {
    let ended = (1..finished_jobs).map(|number| (&originals.finished, finished(0), finished(number), number));
    let train = (1..active_jobs).map(|number| (&originals.active, active(0), active(number), number));
    let copies = train.chain(ended).map(|(of, old, new, number)| {
        let kinds = (0_u32..).zip(of.iter());
        let uids: Vec<(String, String)> = kinds.map(|(kind, original)| (original.uid(), uid(&new, kind))).collect();
        (of, namespace(number), [vec![(old, new)], uids].concat())
    });
    let copies: Vec<Copied<'_>> = copies.collect();
    let mut etcd = Etcd::of(network);
    // Owners first: the garbage collector deletes what has none.
    for owners in [true, false] {
        for (of, namespace, renames) in &copies {
            let wanted =
                |original: &&Original| original.is_ours() && (original.resource.kind == "FineTuneJob") == owners;
            for original in of.iter().filter(wanted) {
                etcd.put(&original.resource, &original.stored(namespace, renames)?)?;
            }
        }
        etcd.flush()?;
    }
    let others = copies.into_iter().flat_map(|(of, namespace, renames)| {
        let others = of.iter().filter(|original| !original.is_ours());
        others.map(move |original| (original, namespace.clone(), renames.clone()))
    });
    let creations = stream::iter(others).map(|(original, namespace, renames)| async move {
        let api = Api::<DynamicObject>::namespaced_with(client.clone(), &namespace, &original.resource);
        api.create(&PostParams::default(), &original.copy(&renames)?)
            .await
            .map(|job| (original, namespace, renames, job))
            .context("cannot create an object")
    });
    let made: Vec<_> = creations.buffer_unordered(AT_ONCE).try_collect().await?;
    // The API server gives each Job a UID of its own: the records are to name it.
    for (original, namespace, mut renames, job) in made.into_iter().filter(|(original, ..)| original.is_job()) {
        for (old, new) in &mut renames {
            if *old == original.uid() {
                *new = job.uid().unwrap_or_default();
            }
        }
        for record in originals.active.iter().filter(|other| other.is_ours()) {
            etcd.put(&record.resource, &record.stored(&namespace, &renames)?)?;
        }
    }
    etcd.flush()
}

/// A UID of an object of a job.
fn uid(job: &str, kind: u32) -> String {
    let digest = sha256([job.as_bytes(), kind.to_string().as_bytes()]);
    format!("{}-{}-4{}-8{}-{}", &digest[..8], &digest[8..12], &digest[13..16], &digest[17..20], &digest[20..32])
}

/// An object to copy.
struct Original {
    resource: ApiResource,
    object: DynamicObject,
}

impl Original {
    async fn read<K: Resource<DynamicType = ()>>(client: &Client, namespace: &str, name: &str) -> Result<Self> {
        let resource = ApiResource::erase::<K>(&());
        let api = Api::<DynamicObject>::namespaced_with(client.clone(), namespace, &resource);
        Ok(Self { object: api.get(name).await?, resource })
    }

    async fn labelled<K: Resource<DynamicType = ()>>(client: &Client, namespace: &str, job: &str) -> Result<Vec<Self>> {
        let resource = ApiResource::erase::<K>(&());
        let api = Api::<DynamicObject>::namespaced_with(client.clone(), namespace, &resource);
        let found = api.list(&ListParams::default().labels(&format!("{JOB_LABEL}={job}"))).await?;
        Ok(found.items.into_iter().map(|object| Self { resource: resource.clone(), object }).collect())
    }

    fn uid(&self) -> String {
        self.object.uid().unwrap_or_default()
    }

    fn is_ours(&self) -> bool {
        self.resource.group == GROUP
    }

    fn is_job(&self) -> bool {
        self.resource.kind == "Job"
    }

    /// As the API server stores a copy of it.
    fn stored(&self, namespace: &str, renames: &[(String, String)]) -> Result<Value> {
        let mut object = self.object.clone();
        object.metadata.resource_version = None;
        object.metadata.namespace = Some(namespace.to_owned());
        object.types = Some(self.types());
        self.renamed(&object, renames)
    }

    /// As a copy of it is to be created: without what the API server and the Job controller have set.
    fn copy(&self, renames: &[(String, String)]) -> Result<DynamicObject> {
        let mut object = self.object.clone();
        let metadata = &mut object.metadata;
        (metadata.uid, metadata.resource_version, metadata.managed_fields) = (None, None, None);
        (metadata.creation_timestamp, metadata.generation, metadata.namespace) = (None, None, None);
        if let Some(data) = object.data.as_object_mut() {
            data.remove("status");
        }
        if self.is_job() {
            let spec = &mut object.data["spec"];
            spec.as_object_mut().and_then(|spec| spec.remove("selector"));
            let labels = spec["template"]["metadata"]["labels"].as_object_mut().context("the pods have labels")?;
            labels.retain(|name, _| !name.ends_with("controller-uid") && !name.ends_with("job-name"));
        }
        object.types = Some(self.types());
        Ok(serde_json::from_value(self.renamed(&object, renames)?)?)
    }

    fn types(&self) -> TypeMeta {
        TypeMeta { api_version: self.resource.api_version.clone(), kind: self.resource.kind.clone() }
    }

    fn renamed(&self, object: &DynamicObject, renames: &[(String, String)]) -> Result<Value> {
        let text = serde_json::to_string(object)?;
        let text = renames.iter().fold(text, |text, (old, new)| text.replace(old.as_str(), new));
        Ok(serde_json::from_str(&text)?)
    }
}
