//! The GpuClasses of the chart's values. Helm can't install objects of a kind whose definition comes with the same chart, so
//! it hands them over as a file, and the operator applies them. A class of its own that the file names no more goes as soon
//! as nobody uses it; classes that others made are left alone.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use kube::{
    Api, Client, ResourceExt,
    api::{DeleteParams, ListParams, ObjectMeta, Patch, PatchParams},
};
use tokio::time::sleep;
use tunesmith_crds::{FineTuneJob, FineTuneRun, GpuClass, GpuClassSpec};

use crate::{
    cache::Guarded,
    context::scoped,
    labels::{MANAGED_BY, OPERATOR},
};

/// Classes that others change back, or that somebody still uses, are looked at this often.
const EVERY: Duration = Duration::from_secs(60);
/// Wait after an error.
const AGAIN: Duration = Duration::from_secs(5);

/// Why the file of classes can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ClassesError {
    /// It can't be read.
    #[error("GPU_CLASSES: {}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It holds something else.
    #[error("GPU_CLASSES: {} holds no GpuClasses by their names: {problem}", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
}

/// The classes of the chart's values.
#[derive(Clone, Debug, Default)]
pub struct Classes(BTreeMap<String, GpuClassSpec>);

impl Classes {
    /// Reads them from a file: specs by their names.
    ///
    /// # Errors
    /// The file can't be read, or holds something else.
    pub fn read(path: &Path) -> Result<Self, ClassesError> {
        let text = fs::read_to_string(path).map_err(|source| ClassesError::File { path: path.into(), source })?;
        if text.trim().is_empty() {
            return Ok(Self::default());
        }
        let classes = serde_saphyr::from_str(&text);
        let problem =
            |error: serde_saphyr::Error| ClassesError::Content { path: path.into(), problem: error.to_string() };
        classes.map(Self).map_err(problem)
    }

    /// Applies them once; resolves when the API server has taken each of them, or will never do so.
    pub async fn apply(&self, client: &Client) {
        while let Err(error) = self.apply_once(client).await {
            tracing::warn!(%error, "cannot apply the chart's GpuClasses");
            sleep(AGAIN).await;
        }
    }

    /// Keeps them as they are in the file, and deletes those that it names no more, for as long as it is polled.
    pub async fn keep(&self, client: &Client, scopes: &[Option<String>]) {
        loop {
            sleep(EVERY).await;
            let kept = async {
                self.apply_once(client).await?;
                self.delete_unused(client, scopes).await
            };
            if let Err(error) = kept.await {
                tracing::warn!(%error, "cannot keep the chart's GpuClasses");
            }
        }
    }

    async fn apply_once(&self, client: &Client) -> Result<(), kube::Error> {
        let api = Api::<Guarded<GpuClass>>::all(client.clone());
        let there = api.list(&ListParams::default()).await?;
        for (name, spec) in &self.0 {
            let is_as_wanted = |class: &Guarded<GpuClass>| {
                class.name_any() == *name && is_own(class) && class.0.as_ref().is_ok_and(|class| class.spec == *spec)
            };
            if there.iter().any(is_as_wanted) {
                continue;
            }
            let labels = [(MANAGED_BY.to_owned(), OPERATOR.to_owned())].into();
            let mut class = GpuClass::new(name, spec.clone());
            class.metadata = ObjectMeta { labels: Some(labels), ..class.metadata };
            let params = PatchParams::apply(OPERATOR).force();
            match api.patch(name, &params, &Patch::Apply(&class)).await {
                Ok(_) => tracing::info!(class = name, "applied a GpuClass of the chart's"),
                // The others are none the worse for it.
                Err(kube::Error::Api(status)) if status.code == 422 => {
                    tracing::error!(class = name, "gpuClasses.{name} in the chart's values: {}", status.message);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    async fn delete_unused(&self, client: &Client, scopes: &[Option<String>]) -> Result<(), kube::Error> {
        let api = Api::<Guarded<GpuClass>>::all(client.clone());
        let there = api.list(&ListParams::default()).await?;
        let surplus = there.iter().filter(|class| is_own(class) && !self.0.contains_key(&class.name_any()));
        let surplus: BTreeSet<String> = surplus.map(|class| class.name_any()).collect();
        if surplus.is_empty() {
            return Ok(());
        }
        let used = used(client, scopes).await?;
        for name in surplus.difference(&used) {
            tracing::info!(class = name, "deletes a GpuClass that the chart names no more");
            match api.delete(name, &DeleteParams::default()).await {
                Err(kube::Error::Api(status)) if status.is_not_found() => {}
                deleted => drop(deleted?),
            }
        }
        Ok(())
    }
}

/// Classes that runs are planned onto which are not over, or that jobs ask for by name.
async fn used(client: &Client, scopes: &[Option<String>]) -> Result<BTreeSet<String>, kube::Error> {
    let mut used = BTreeSet::new();
    for scope in scopes {
        let runs = scoped::<Guarded<FineTuneRun>>(client, scope.as_deref()).list(&ListParams::default()).await?;
        let runs = runs.iter().filter_map(|run| run.0.as_ref().ok()?.status.as_ref());
        used.extend(runs.filter(|run| !run.is_done()).filter_map(|run| Some(run.plan.as_ref()?.gpu_class.clone())));
        let jobs = scoped::<Guarded<FineTuneJob>>(client, scope.as_deref()).list(&ListParams::default()).await?;
        used.extend(jobs.iter().filter_map(|job| job.0.as_ref().ok()?.spec.resources.gpu_class.clone()));
    }
    Ok(used)
}

/// Whether the operator has applied a class.
fn is_own(class: &Guarded<GpuClass>) -> bool {
    class.labels().get(MANAGED_BY).is_some_and(|manager| manager == OPERATOR)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::{fixtures::job, mock::api_server};

    const FILE: &str = "cpu:\n  methods:\n    - {method: LoRA, gpus: 0}\n";

    fn classes(text: &str) -> Result<Classes, ClassesError> {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), text).unwrap();
        Classes::read(file.path())
    }

    fn class(name: &str, manager: Option<&str>) -> Value {
        let labels = manager.map(|manager| json!({MANAGED_BY: manager}));
        let spec = json!({"methods": [{"method": "LoRA", "gpus": 0}]});
        json!({"apiVersion": "tunesmith.dev/v1alpha1", "kind": "GpuClass", "metadata": {"name": name, "labels": labels}, "spec": spec})
    }

    fn list(items: &[Value]) -> Value {
        json!({"apiVersion": "v1", "kind": "List", "metadata": {}, "items": items})
    }

    #[test]
    fn an_empty_file_has_no_classes_and_a_wrong_one_says_what_is_wrong() {
        assert!(classes("\n").unwrap().0.is_empty());
        assert_eq!(classes(FILE).unwrap().0.keys().collect::<Vec<_>>(), ["cpu"]);
        let error = classes("cpu: {methods: [{method: LoRa, gpus: 0}]}").unwrap_err().to_string();
        assert!(error.contains("LoRa"), "{error}");
    }

    #[tokio::test]
    async fn classes_are_applied_unless_they_are_there_already() {
        for (there, calls) in [(vec![class("cpu", Some(OPERATOR))], 0), (vec![class("cpu", None)], 1), (vec![], 1)] {
            let (client, mut server) = api_server();
            let server = tokio::spawn(async move {
                server.answer(200, list(&there)).await;
                for _ in 0..calls {
                    let call = server.answer(200, class("cpu", Some(OPERATOR))).await;
                    assert!(
                        call.line.starts_with("PATCH /apis/tunesmith.dev/v1alpha1/gpuclasses/cpu?"),
                        "{}",
                        call.line
                    );
                    assert_eq!(call.body["metadata"]["labels"][MANAGED_BY], OPERATOR);
                }
            });
            classes(FILE).unwrap().apply_once(&client).await.unwrap();
            server.await.unwrap();
        }
    }

    #[tokio::test]
    async fn a_class_that_is_in_use_or_anothers_stays() {
        let (client, mut server) = api_server();
        let server = tokio::spawn(async move {
            let own = ["used", "unused", "cpu"].map(|name| class(name, Some(OPERATOR)));
            server.answer(200, list(&[&own[..], &[class("anothers", None)]].concat())).await;
            server.answer(200, list(&[])).await;
            let job = job(json!({"resources": {"gpuClass": "used"}}));
            server.answer(200, list(&[serde_json::to_value(job).unwrap()])).await;
            let call = server.answer(200, class("unused", Some(OPERATOR))).await;
            assert!(call.line.starts_with("DELETE /apis/tunesmith.dev/v1alpha1/gpuclasses/unused"), "{}", call.line);
        });
        classes(FILE).unwrap().delete_unused(&client, &[None]).await.unwrap();
        server.await.unwrap();
    }
}
