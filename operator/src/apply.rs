//! Brings changes to the cluster, in order.

use std::fmt::Debug;

use k8s_openapi::{
    NamespaceResourceScope,
    api::{batch::v1::Job, core::v1::ConfigMap},
};
use kube::{
    Api, Client, Resource, ResourceExt,
    api::{DeleteParams, Patch, PatchParams, PostParams, Preconditions},
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::json;
use tunesmith_crds::{AdapterVersion, conditions::reason, names::RUN_LABEL};

use crate::{labels::OPERATOR, refusal::Refusal};

/// One change to the cluster.
#[derive(Clone, Debug, PartialEq)]
pub enum Change {
    /// Create a ConfigMap.
    CreateConfigMap(Box<ConfigMap>),
    /// Create a Job.
    CreateJob(Box<Job>),
    /// Create an AdapterVersion.
    CreateVersion(Box<AdapterVersion>),
    /// Annotate a Job.
    AnnotateJob {
        /// Its name.
        name: String,
        /// The annotation.
        key: &'static str,
        /// Its value.
        value: String,
    },
    /// Annotate a ConfigMap.
    AnnotateConfigMap {
        /// Its name.
        name: String,
        /// The annotation.
        key: &'static str,
        /// Its value.
        value: String,
    },
    /// Delete a Job; it stays until its pods are gone.
    DeleteJob {
        /// Its name.
        name: String,
        /// Its UID: another Job of this name is left alone.
        uid: String,
    },
    /// Delete a ConfigMap.
    DeleteConfigMap {
        /// Its name.
        name: String,
        /// Its UID, unless any of that name is to go.
        uid: Option<String>,
    },
}

/// A change that failed.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// An object could not be created.
    #[error("cannot create {kind} {name}: {source}")]
    Create {
        /// Its kind.
        kind: String,
        /// Its name.
        name: String,
        /// Why.
        source: kube::Error,
    },
    /// An object could not be annotated.
    #[error("cannot annotate {name}: {source}")]
    Annotate {
        /// Its name.
        name: String,
        /// Why.
        source: kube::Error,
    },
    /// An object could not be deleted.
    #[error("cannot delete {name}: {source}")]
    Delete {
        /// Its name.
        name: String,
        /// Why.
        source: kube::Error,
    },
}

/// Makes the changes in order, until the cluster refuses one: then the refusal is returned. An object that is there
/// already, and is the same owner's, counts as created.
///
/// # Errors
/// If the API server fails.
pub async fn apply(client: &Client, namespace: &str, changes: Vec<Change>) -> Result<Option<Refusal>, ApplyError> {
    for change in changes {
        if let Some(refusal) = apply_one(client, namespace, change).await? {
            return Ok(Some(refusal));
        }
    }
    Ok(None)
}

async fn apply_one(client: &Client, namespace: &str, change: Change) -> Result<Option<Refusal>, ApplyError> {
    let jobs = || Api::<Job>::namespaced(client.clone(), namespace);
    let config_maps = || Api::<ConfigMap>::namespaced(client.clone(), namespace);
    match change {
        Change::CreateConfigMap(object) => return create(&config_maps(), &*object, same_run).await,
        Change::CreateJob(object) => return create(&jobs(), &*object, same_run).await,
        Change::CreateVersion(object) => {
            let same_source = |there: &AdapterVersion, ours: &AdapterVersion| there.spec.source == ours.spec.source;
            return create(&Api::namespaced(client.clone(), namespace), &*object, same_source).await;
        }
        Change::AnnotateJob { name, key, value } => annotate(&jobs(), &name, key, &value).await?,
        Change::AnnotateConfigMap { name, key, value } => annotate(&config_maps(), &name, key, &value).await?,
        Change::DeleteJob { name, uid } => {
            let params = DeleteParams::foreground().preconditions(only(Some(uid)));
            delete(&jobs(), &name, &params).await?;
        }
        Change::DeleteConfigMap { name, uid } => {
            delete(&config_maps(), &name, &DeleteParams::default().preconditions(only(uid))).await?;
        }
    }
    Ok(None)
}

/// Creates an object. If one of its name is there, `is_ours` tells whether that is the one.
async fn create<K>(api: &Api<K>, object: &K, is_ours: fn(&K, &K) -> bool) -> Result<Option<Refusal>, ApplyError>
where
    K: Resource<DynamicType = ()> + Clone + Debug + Serialize + DeserializeOwned,
{
    let (kind, name) = (K::kind(&()).into_owned(), object.name_any());
    let error =
        match api.create(&PostParams { field_manager: Some(OPERATOR.into()), ..Default::default() }, object).await {
            Ok(_) => return Ok(None),
            Err(error) => error,
        };
    let failed = |source| ApplyError::Create { kind: kind.clone(), name: name.clone(), source };
    match &error {
        kube::Error::Api(status) if status.is_already_exists() => {
            let there = api.get_opt(&name).await.map_err(failed)?;
            if there.is_some_and(|there| is_ours(&there, object)) {
                return Ok(None);
            }
            let message = format!("{kind} {name} is there already and is not this job's: waits for it to go");
            Ok(Some(Refusal { reason: reason::PENDING, message }))
        }
        kube::Error::Api(status) => match Refusal::of_creation(&format!("{kind} {name}"), status) {
            Some(refusal) => Ok(Some(refusal)),
            None => Err(failed(error)),
        },
        _ => Err(failed(error)),
    }
}

/// Of the same owner and run, and here to stay.
fn same_run<K: Resource<DynamicType = ()>>(there: &K, ours: &K) -> bool {
    let owner = |object: &K| object.owner_references().first().map(|owner| owner.uid.clone());
    let run = |object: &K| object.labels().get(RUN_LABEL).cloned();
    there.meta().deletion_timestamp.is_none() && owner(there) == owner(ours) && run(there) == run(ours)
}

async fn annotate<K>(api: &Api<K>, name: &str, key: &str, value: &str) -> Result<(), ApplyError>
where
    K: Resource<Scope = NamespaceResourceScope> + Clone + Debug + DeserializeOwned,
{
    let patch = Patch::Merge(json!({"metadata": {"annotations": {key: value}}}));
    let params = PatchParams { field_manager: Some(OPERATOR.into()), ..Default::default() };
    match api.patch(name, &params, &patch).await {
        Ok(_) => Ok(()),
        Err(source) => Err(ApplyError::Annotate { name: name.into(), source }),
    }
}

fn only(uid: Option<String>) -> Preconditions {
    Preconditions { uid, resource_version: None }
}

/// What is gone, or is another object by now, counts as deleted.
async fn delete<K>(api: &Api<K>, name: &str, params: &DeleteParams) -> Result<(), ApplyError>
where
    K: Resource<Scope = NamespaceResourceScope> + Clone + Debug + DeserializeOwned,
{
    match api.delete(name, params).await {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(status)) if status.is_not_found() || status.is_conflict() => Ok(()),
        Err(source) => Err(ApplyError::Delete { name: name.into(), source }),
    }
}

/// Writes an object's status by server-side apply.
///
/// # Errors
/// If the API server fails.
pub async fn apply_status<K, S>(client: &Client, object: &K, status: &S) -> Result<(), kube::Error>
where
    K: Resource<Scope = NamespaceResourceScope, DynamicType = ()> + Clone + Debug + DeserializeOwned,
    S: Serialize,
{
    let api = Api::<K>::namespaced(client.clone(), &object.namespace().unwrap_or_default());
    // The UID keeps the status off an object of the same name that came after this one.
    let patch = json!({
        "apiVersion": K::api_version(&()),
        "kind": K::kind(&()),
        "metadata": {"name": object.name_any(), "uid": object.uid()},
        "status": status,
    });
    api.patch_status(&object.name_any(), &PatchParams::apply(OPERATOR).force(), &Patch::Apply(patch)).await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::Value;
    use tunesmith_crds::FineTuneJobStatus;

    use super::*;
    use crate::{
        fixtures::job,
        mock::{ApiServer, api_server},
    };

    fn owned_job(uid: &str, run: &str) -> Value {
        json!({
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {
                "name": "j-1-1",
                "labels": {RUN_LABEL: run},
                "ownerReferences": [{"apiVersion": "v1", "kind": "FineTuneJob", "name": "j", "uid": uid}],
            },
        })
    }

    fn creation() -> Vec<Change> {
        vec![Change::CreateJob(Box::new(serde_json::from_value(owned_job("ours", "1")).unwrap()))]
    }

    /// Applies changes while `scenario` plays the API server.
    async fn played<F>(
        changes: Vec<Change>,
        scenario: impl FnOnce(ApiServer) -> F,
    ) -> Result<Option<Refusal>, ApplyError>
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let (client, server) = api_server();
        let server = tokio::spawn(scenario(server));
        let result = apply(&client, "team", changes).await;
        server.await.unwrap();
        result
    }

    #[tokio::test]
    async fn a_job_that_is_there_already_and_ours_counts_as_created() {
        let result = played(creation(), |mut server| async move {
            let call = server.refuse(409, "AlreadyExists", "exists").await;
            assert!(call.line.starts_with("POST /apis/batch/v1/namespaces/team/jobs?"), "{}", call.line);
            server.answer(200, owned_job("ours", "1")).await;
        });
        assert_eq!(result.await.unwrap(), None);
    }

    #[tokio::test]
    async fn a_job_of_another_owner_or_run_is_waited_for() {
        for (uid, run) in [("another's", "1"), ("ours", "2")] {
            let result = played(creation(), move |mut server| async move {
                server.refuse(409, "AlreadyExists", "exists").await;
                server.answer(200, owned_job(uid, run)).await;
            });
            let refusal = result.await.unwrap().unwrap();
            assert!(refusal.message.contains("Job j-1-1 is there already"), "{}", refusal.message);
        }
    }

    #[tokio::test]
    async fn a_refused_creation_ends_the_list_and_is_named() {
        let changes = [creation(), creation()].concat();
        let result = played(changes, |mut server| async move {
            server.refuse(403, "Forbidden", "jobs.batch \"j-1-1\" is forbidden: exceeded quota: team").await;
        });
        assert_eq!(result.await.unwrap().unwrap().reason, reason::QUOTA_EXCEEDED);
    }

    #[tokio::test]
    async fn an_api_server_that_fails_is_an_error_and_no_refusal() {
        let result = played(creation(), |mut server| async move {
            server.refuse(503, "ServiceUnavailable", "etcd is down").await;
        });
        assert!(result.await.unwrap_err().to_string().starts_with("cannot create Job j-1-1"));
    }

    #[tokio::test]
    async fn a_job_is_deleted_with_its_pods_and_only_if_it_is_the_one_that_was_meant() {
        let changes = vec![Change::DeleteJob { name: "j-1-1".into(), uid: "u".into() }; 2];
        let result = played(changes, |mut server| async move {
            let call = server.answer(200, owned_job("ours", "1")).await;
            assert_eq!(call.line, "DELETE /apis/batch/v1/namespaces/team/jobs/j-1-1?");
            assert_eq!(call.body["propagationPolicy"], "Foreground");
            assert_eq!(call.body["preconditions"]["uid"], "u");
            server.refuse(404, "NotFound", "gone").await;
        });
        assert_eq!(result.await.unwrap(), None);
    }

    #[tokio::test]
    async fn a_status_is_applied_for_one_uid_under_one_field_manager() {
        let (client, mut server) = api_server();
        let server = tokio::spawn(async move {
            let call = server.answer(200, serde_json::to_value(job(json!({}))).unwrap()).await;
            assert_eq!(
                call.line,
                "PATCH /apis/tunesmith.dev/v1alpha1/namespaces/team/finetunejobs/j/status?&force=true&fieldManager=tunesmith-operator"
            );
            assert_eq!(call.body["metadata"], json!({"name": "j", "uid": "uid-j"}));
            assert_eq!(call.body["status"]["message"], "hello");
        });
        let status = FineTuneJobStatus { message: Some("hello".into()), ..Default::default() };
        apply_status(&client, &job(json!({})), &status).await.unwrap();
        server.await.unwrap();
    }
}
