//! The GpuClasses of the chart's values. Helm can't install objects of a kind whose definition comes with the same chart, so
//! it hands them over as a file, and the operator applies them. A class of its own that the file names no more goes as soon
//! as nobody uses it; classes that others made, another release of the chart among them, are left alone.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use kube::{
    Api, Client, ResourceExt,
    api::{DeleteParams, ObjectMeta, Patch, PatchParams},
};
use tokio::time::sleep;
use tunesmith_crds::{GpuClass, GpuClassSpec};

use crate::{
    cache::{Caches, Cluster, Guarded},
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

/// Annotation: the release of the chart whose values name a class, as namespace/name of its lease.
const RELEASE: &str = "tunesmith.dev/release";

/// The classes of the chart's values.
#[derive(Clone, Debug, Default)]
pub struct Classes {
    specs: BTreeMap<String, GpuClassSpec>,
    /// Whose they are.
    release: String,
}

impl Classes {
    /// Reads them from a file: specs by their names. They are this release's.
    ///
    /// # Errors
    /// The file can't be read, or holds something else.
    pub fn read(path: &Path, release: String) -> Result<Self, ClassesError> {
        let text = fs::read_to_string(path).map_err(|source| ClassesError::File { path: path.into(), source })?;
        if text.trim().is_empty() {
            return Ok(Self { release, ..Self::default() });
        }
        let classes = serde_saphyr::from_str(&text);
        let problem =
            |error: serde_saphyr::Error| ClassesError::Content { path: path.into(), problem: error.to_string() };
        classes.map(|specs| Self { specs, release }).map_err(problem)
    }

    /// Applies them once; resolves when the API server has taken each of them, or will never do so.
    pub async fn apply(&self, client: &Client, cluster: &Cluster) {
        cluster.listed().await;
        while let Err(error) = self.apply_once(client, cluster).await {
            tracing::warn!(%error, "cannot apply the chart's GpuClasses");
            sleep(AGAIN).await;
        }
    }

    /// Keeps them as they are in the file, and deletes those that it names no more, for as long as it is polled.
    pub async fn keep(&self, client: &Client, cluster: &Cluster, scopes: &[Caches]) {
        loop {
            sleep(EVERY).await;
            let kept = async {
                self.apply_once(client, cluster).await?;
                self.delete_unused(client, cluster, |name| scopes.iter().any(|caches| caches.uses_class(name))).await
            };
            if let Err(error) = kept.await {
                tracing::warn!(%error, "cannot keep the chart's GpuClasses");
            }
        }
    }

    async fn apply_once(&self, client: &Client, cluster: &Cluster) -> Result<(), kube::Error> {
        let api = Api::<Guarded<GpuClass>>::all(client.clone());
        let there = cluster.all_classes();
        for (name, spec) in &self.specs {
            let found = there.iter().find(|class| class.name_any() == *name);
            if found.is_some_and(|class| self.is_own(class) && class.spec == *spec) {
                continue;
            }
            if let Some(release) = found.and_then(|class| release_of(class)).filter(|release| *release != self.release)
            {
                tracing::warn!(
                    class = name,
                    release,
                    "a GpuClass of the chart's values is another release's, and stays"
                );
                continue;
            }
            let labels = [(MANAGED_BY.to_owned(), OPERATOR.to_owned())].into();
            let annotations = [(RELEASE.to_owned(), self.release.clone())].into();
            let mut class = GpuClass::new(name, spec.clone());
            class.metadata = ObjectMeta { labels: Some(labels), annotations: Some(annotations), ..class.metadata };
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

    async fn delete_unused(
        &self,
        client: &Client,
        cluster: &Cluster,
        is_used: impl Fn(&str) -> bool,
    ) -> Result<(), kube::Error> {
        let api = Api::<Guarded<GpuClass>>::all(client.clone());
        let there = cluster.all_classes();
        let surplus = there.iter().filter(|class| self.is_own(class)).map(|class| class.name_any());
        for name in surplus.filter(|name| !self.specs.contains_key(name) && !is_used(name)) {
            tracing::info!(class = name, "deletes a GpuClass that the chart names no more");
            match api.delete(&name, &DeleteParams::default()).await {
                Err(kube::Error::Api(status)) if status.is_not_found() => {}
                deleted => drop(deleted?),
            }
        }
        Ok(())
    }

    /// Whether this release has applied a class.
    fn is_own(&self, class: &GpuClass) -> bool {
        release_of(class) == Some(self.release.as_str())
    }
}

/// The release that has applied a class.
fn release_of(class: &GpuClass) -> Option<&str> {
    let is_ours = class.labels().get(MANAGED_BY).is_some_and(|manager| manager == OPERATOR);
    class.annotations().get(RELEASE).map(String::as_str).filter(|_| is_ours)
}

#[cfg(test)]
mod tests {
    use kube::runtime::watcher::Event;
    use serde_json::{Value, json};

    use super::*;
    use crate::mock::api_server;

    const FILE: &str = "cpu:\n  methods:\n    - {method: LoRA, gpus: 0}\n";

    fn classes(text: &str) -> Result<Classes, ClassesError> {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), text).unwrap();
        Classes::read(file.path(), "system/a".into())
    }

    fn class(name: &str, release: Option<&str>) -> Value {
        let labels = release.map(|_| json!({MANAGED_BY: OPERATOR}));
        let annotations = release.map(|release| json!({RELEASE: release}));
        let spec = json!({"methods": [{"method": "LoRA", "gpus": 0}]});
        json!({"apiVersion": "tunesmith.dev/v1alpha1", "kind": "GpuClass", 
            "metadata": {"name": name, "labels": labels, "annotations": annotations}, "spec": spec})
    }

    fn cluster(classes: &[Value]) -> Cluster {
        let cluster = Cluster::default();
        for class in classes {
            cluster.classes.take(Event::Apply(serde_json::from_str(&class.to_string()).unwrap()));
        }
        cluster
    }

    #[test]
    fn an_empty_file_has_no_classes_and_a_wrong_one_says_what_is_wrong() {
        assert!(classes("\n").unwrap().specs.is_empty());
        assert_eq!(classes(FILE).unwrap().specs.keys().collect::<Vec<_>>(), ["cpu"]);
        let error = classes("cpu: {methods: [{method: LoRa, gpus: 0}]}").unwrap_err().to_string();
        assert!(error.contains("LoRa"), "{error}");
    }

    #[tokio::test]
    async fn classes_are_applied_unless_they_are_there_already() {
        for (there, calls) in [
            (vec![class("cpu", Some("system/a"))], 0),
            (vec![class("cpu", None)], 1),
            (vec![], 1),
            // It would be applied back and forth.
            (vec![class("cpu", Some("system/b"))], 0),
        ] {
            let (client, mut server) = api_server();
            let server = tokio::spawn(async move {
                for _ in 0..calls {
                    let call = server.answer(200, class("cpu", Some("system/a"))).await;
                    assert!(
                        call.line.starts_with("PATCH /apis/tunesmith.dev/v1alpha1/gpuclasses/cpu?"),
                        "{}",
                        call.line
                    );
                    assert_eq!(call.body["metadata"]["labels"][MANAGED_BY], OPERATOR);
                    assert_eq!(call.body["metadata"]["annotations"][RELEASE], "system/a");
                }
            });
            classes(FILE).unwrap().apply_once(&client, &cluster(&there)).await.unwrap();
            server.await.unwrap();
        }
    }

    #[tokio::test]
    async fn a_class_that_is_in_use_or_anothers_stays() {
        let (client, mut server) = api_server();
        let server = tokio::spawn(async move {
            let call = server.answer(200, class("unused", Some("system/a"))).await;
            assert!(call.line.starts_with("DELETE /apis/tunesmith.dev/v1alpha1/gpuclasses/unused"), "{}", call.line);
        });
        let own = ["used", "unused", "cpu"].map(|name| class(name, Some("system/a")));
        let cluster =
            cluster(&[&own[..], &[class("anothers", None), class("another-releases", Some("system/b"))]].concat());
        classes(FILE).unwrap().delete_unused(&client, &cluster, |name| name == "used").await.unwrap();
        server.await.unwrap();
    }
}
