//! A team with a namespace of its own: what it applies, and what it sees.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use futures::TryStreamExt;
use k8s_openapi::api::{
    batch::v1::Job,
    core::v1::{Namespace, Pod, Secret},
};
use kube::{
    Api, Client, Resource, ResourceExt,
    api::{DeleteParams, ListParams, Patch, PatchParams, PostParams},
};
use object_store::{ObjectStore, ObjectStoreExt, PutPayload, path::Path as Key};
use serde_json::{Value, json};
use tunesmith_crds::{AdapterVersion, FineTuneJob, FineTuneJobPhase, adapter_version::ArtifactFile, names};
use tunesmith_e2e::{Cluster, S3};

use crate::testbed::{self, TINY_MODEL};

/// Long enough for a busy machine of two cores.
const PATIENCE: Duration = Duration::from_secs(600);

/// A team with a namespace, credentials and data of its own.
pub struct Tenant {
    pub cluster: Cluster,
    pub client: Client,
    pub s3: S3,
    pub namespace: String,
}

impl Tenant {
    /// A new team with 40 rows of data in `s3://datasets/<namespace>/train.jsonl`.
    pub async fn new(team: &str) -> Result<Self> {
        let cluster = tokio::task::spawn_blocking(testbed::cluster).await??;
        let (client, s3) = (cluster.client().await?, cluster.s3()?);
        // Another name each time: what an earlier run of the tests left can neither help nor harm.
        let started = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_secs();
        let namespace = format!("{team}-{started:x}");
        let tenant = Self { cluster, client, s3, namespace };
        tenant.create_namespace().await?;
        tenant.write("datasets", "train.jsonl", &rows(40).join("\n")).await?;
        Ok(tenant)
    }

    async fn create_namespace(&self) -> Result<()> {
        let namespace: Namespace = serde_json::from_value(json!({
            "metadata": {"name": self.namespace, "labels": {"pod-security.kubernetes.io/enforce": "restricted"}},
        }))?;
        Api::all(self.client.clone()).create(&PostParams::default(), &namespace).await?;
        let credentials: Secret = serde_json::from_value(json!({
            "metadata": {"name": "s3-credentials"},
            "stringData": self.s3.env().into_iter().collect::<std::collections::BTreeMap<_, _>>(),
        }))?;
        self.api::<Secret>().create(&PostParams::default(), &credentials).await?;
        Ok(())
    }

    /// Objects of the team's namespace.
    pub fn api<K>(&self) -> Api<K>
    where
        K: Resource<Scope = kube::core::NamespaceResourceScope>,
        K::DynamicType: Default,
    {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    /// Writes an object `bucket/<namespace>/<name>`.
    pub async fn write(&self, bucket: &str, name: &str, content: &str) -> Result<()> {
        let key = Key::from(format!("{}/{name}", self.namespace));
        self.s3.bucket(bucket)?.put(&key, PutPayload::from(content.as_bytes().to_vec())).await?;
        Ok(())
    }

    /// The keys below `adapters/<namespace>/`, without that prefix.
    pub async fn published(&self) -> Result<Vec<String>> {
        let store = self.s3.bucket("adapters")?;
        let prefix = Key::from(self.namespace.clone());
        let objects: Vec<_> = store.list(Some(&prefix)).try_collect().await?;
        let own = |key: &Key| key.to_string().trim_start_matches(&format!("{}/", self.namespace)).to_owned();
        Ok(objects.iter().map(|object| own(&object.location)).collect())
    }

    /// An object below `adapters/<namespace>/`.
    pub async fn read_published(&self, name: &str) -> Result<Vec<u8>> {
        let key = Key::from(format!("{}/{name}", self.namespace));
        let found = self.s3.bucket("adapters")?.get(&key).await.with_context(|| format!("no {key}"))?;
        Ok(found.bytes().await?.to_vec())
    }

    /// The files that the manifest of a published version lists.
    pub async fn files(&self, adapter: &str, version: u32) -> Result<Vec<ArtifactFile>> {
        let manifest = self.read_published(&format!("{adapter}/v{version}/manifest.json")).await?;
        let manifest: Value = serde_json::from_slice(&manifest)?;
        Ok(serde_json::from_value(manifest["files"].clone())?)
    }

    /// SHA-256 of the weights of a published version.
    pub async fn weights(&self, adapter: &str, version: u32) -> Result<String> {
        let files = self.files(adapter, version).await?;
        let weights = files.into_iter().find(|file| file.path == "adapter_model.safetensors");
        Ok(weights.context("no weights")?.sha256)
    }

    /// A job that tunes the tiny model in a few seconds, with `changes` merged into its spec.
    pub fn job(&self, name: &str, changes: Value) -> Value {
        let mut job = json!({
            "apiVersion": "tunesmith.dev/v1alpha1",
            "kind": "FineTuneJob",
            "metadata": {"name": name, "namespace": self.namespace},
            "spec": {
                "baseModel": {"uri": TINY_MODEL},
                "dataset": {"train": {"uri": format!("s3://datasets/{}/train.jsonl", self.namespace)}, "evalFraction": 0.1},
                "method": "LoRA",
                "training": {"maxSteps": 5, "learningRate": 0.01, "loggingSteps": 1, "maxLength": 128},
                "resources": {"gpuClass": "cpu", "cpu": "100m", "memory": "512Mi"},
                "output": {
                    "adapterName": name,
                    "uri": format!("s3://adapters/{}", self.namespace),
                    "secretRef": {"name": "s3-credentials"},
                },
            },
        });
        merge(&mut job["spec"], changes);
        job
    }

    /// Applies a manifest as `kubectl apply --server-side` does.
    pub async fn apply(&self, manifest: &Value) -> Result<FineTuneJob> {
        let name = manifest["metadata"]["name"].as_str().context("a manifest without a name")?;
        let params = PatchParams::apply("team").force().validation_strict();
        Ok(self.api().patch(name, &params, &Patch::Apply(manifest)).await?)
    }

    /// Deletes a job and waits until its pods are gone too.
    pub async fn delete_job(&self, name: &str) -> Result<()> {
        self.api::<FineTuneJob>().delete(name, &DeleteParams::default()).await?;
        self.until_pods(name, "gone", |pods| pods.is_empty()).await.map(drop)
    }

    /// Waits until the job's last pod has ended.
    pub async fn until_no_pod_runs(&self, name: &str) -> Result<()> {
        self.until_pods(name, "at an end", |pods| !pods.iter().any(runs)).await.map(drop)
    }

    /// Name of the pod that trains, once one does that is not being deleted.
    pub async fn training_pod(&self, name: &str) -> Result<String> {
        let trains = |pod: &Pod| runs_on(pod) && pod.labels().get(names::STAGE_LABEL).is_some_and(|it| it == "train");
        let pods = self.until_pods(name, "training", |pods| pods.iter().any(trains)).await?;
        Ok(pods.iter().find(|pod| trains(pod)).expect("as awaited").name_any())
    }

    /// The job's pods, once they are as `wanted`.
    async fn until_pods(&self, job: &str, what: &str, wanted: impl Fn(&[Pod]) -> bool) -> Result<Vec<Pod>> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let pods = self.pods(job, None).await?;
            if wanted(&pods) {
                return Ok(pods);
            }
            if Instant::now() > deadline {
                bail!("pods of {job} are not {what}");
            }
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
    }

    /// The job, once `wanted` holds of it; the error shows its status and its pods.
    pub async fn until(&self, name: &str, what: &str, wanted: impl Fn(&FineTuneJob) -> bool) -> Result<FineTuneJob> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let job = self.api::<FineTuneJob>().get(name).await?;
            if wanted(&job) {
                return Ok(job);
            }
            if Instant::now() > deadline {
                let status = serde_json::to_string_pretty(&job.status)?;
                let pods = self.cluster.kubectl().args(["get", "pods,jobs,events", "-n", &self.namespace]).output()?;
                bail!("{name}: not {what}\n{status}\n{}", String::from_utf8_lossy(&pods.stdout));
            }
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
    }

    /// The job, once it is in `phase`. A job that fails instead is an error at once.
    pub async fn until_phase(&self, name: &str, phase: FineTuneJobPhase) -> Result<FineTuneJob> {
        let is_there = |job: &FineTuneJob| observed(job) && (phase_of(job) == Some(phase) || has_ended(job));
        let job = self.until(name, &format!("{phase:?}"), is_there).await?;
        match phase_of(&job) == Some(phase) {
            true => Ok(job),
            false => bail!("{name} should be {phase:?}, and is {:?}: {}", phase_of(&job), message(&job)),
        }
    }

    /// The job, once it runs and has trained at least `step` steps.
    pub async fn until_step(&self, name: &str, step: u64) -> Result<FineTuneJob> {
        self.until_running(name, &format!("at step {step}"), |job| step_of(job) >= step).await
    }

    /// The job, once it runs and `is_there`. A job that has ended is an error at once.
    pub async fn until_running(
        &self,
        name: &str,
        what: &str,
        is_there: impl Fn(&FineTuneJob) -> bool,
    ) -> Result<FineTuneJob> {
        let is_there = |job: &FineTuneJob| phase_of(job) == Some(FineTuneJobPhase::Running) && is_there(job);
        let job = self.until(name, what, |job| is_there(job) || has_ended(job)).await?;
        match is_there(&job) {
            true => Ok(job),
            false => bail!("{name} should run, and is {:?}: {}", phase_of(&job), message(&job)),
        }
    }

    /// The job's pods, of one stage or of all.
    pub async fn pods(&self, job: &str, stage: Option<&str>) -> Result<Vec<Pod>> {
        Ok(self.api::<Pod>().list(&selector(job, stage)).await?.items)
    }

    /// The job's training Jobs, one an attempt.
    pub async fn training_jobs(&self, job: &str) -> Result<Vec<Job>> {
        Ok(self.api::<Job>().list(&selector(job, Some("train"))).await?.items)
    }

    /// The names of the team's AdapterVersions, sorted.
    pub async fn versions(&self) -> Result<Vec<String>> {
        let versions = self.api::<AdapterVersion>().list(&ListParams::default()).await?;
        let mut names: Vec<String> = versions.iter().map(ResourceExt::name_any).collect();
        names.sort();
        Ok(names)
    }
}

fn selector(job: &str, stage: Option<&str>) -> ListParams {
    let stage = stage.map(|stage| format!(",{}={stage}", names::STAGE_LABEL)).unwrap_or_default();
    ListParams::default().labels(&format!("{}={job}{stage}", names::JOB_LABEL))
}

/// Whether a pod's containers run.
fn runs(pod: &Pod) -> bool {
    pod.status.as_ref().and_then(|status| status.phase.as_deref()) == Some("Running")
}

/// Whether a pod runs, and is to go on running.
fn runs_on(pod: &Pod) -> bool {
    runs(pod) && pod.metadata.deletion_timestamp.is_none()
}

/// The job's phase.
pub fn phase_of(job: &FineTuneJob) -> Option<FineTuneJobPhase> {
    job.status.as_ref()?.phase
}

/// How many steps the job is known to have trained.
pub fn step_of(job: &FineTuneJob) -> u64 {
    job.status.as_ref().and_then(|status| status.progress.as_ref()).map_or(0, |progress| progress.step)
}

/// Whether nothing more is to be expected of the job's spec.
fn has_ended(job: &FineTuneJob) -> bool {
    matches!(phase_of(job), Some(FineTuneJobPhase::Failed | FineTuneJobPhase::Succeeded))
}

/// Whether the status is about the spec as it is.
pub fn observed(job: &FineTuneJob) -> bool {
    job.status.as_ref().is_some_and(|status| status.observed_generation == job.metadata.generation)
}

/// The job's message, or nothing.
pub fn message(job: &FineTuneJob) -> &str {
    job.status.as_ref().and_then(|status| status.message.as_deref()).unwrap_or_default()
}

/// `(status, reason, message)` of a condition.
pub fn condition<'a>(job: &'a FineTuneJob, kind: &str) -> Option<(&'a str, &'a str, &'a str)> {
    let condition = job.status.as_ref()?.conditions.iter().find(|condition| condition.type_ == kind)?;
    Some((&condition.status, &condition.reason, &condition.message))
}

/// Rows of questions and answers.
pub fn rows(count: usize) -> Vec<String> {
    let row = |n: usize| {
        json!({"messages": [
            {"role": "user", "content": format!("What is {n} and {n}?")},
            {"role": "assistant", "content": format!("It is {}.", n + n)},
        ]})
    };
    (0..count).map(|n| row(n).to_string()).collect()
}

/// Merges `changes` into `value` as a JSON merge patch does.
pub fn merge(value: &mut Value, changes: Value) {
    match (value, changes) {
        (Value::Object(old), Value::Object(new)) => {
            for (key, change) in new {
                match change {
                    Value::Null => drop(old.remove(&key)),
                    change => merge(old.entry(key).or_insert(Value::Null), change),
                }
            }
        }
        (old, new) => *old = new,
    }
}
