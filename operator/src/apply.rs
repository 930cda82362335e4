//! Brings changes to the cluster, in order.

use std::fmt::Debug;

use k8s_openapi::{NamespaceResourceScope, api::batch::v1::Job};
use kube::{
    Api, Client, Resource, ResourceExt,
    api::{DeleteParams, ObjectMeta, Patch, PatchParams, PostParams, Preconditions},
    core::DeserializeGuard,
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::json;
use tunesmith_crds::{AdapterVersion, FineTuneRun, FineTuneRunStatus, conditions::reason};

use crate::{
    admission::Refusal,
    labels::OPERATOR,
    run::{Object, Run},
};

/// One change to the cluster.
#[derive(Clone, Debug, PartialEq)]
pub enum Change {
    /// Create the record of a run.
    CreateRun(Box<FineTuneRun>),
    /// Create a Job.
    CreateJob(Box<Job>),
    /// Create an AdapterVersion.
    CreateVersion(Box<AdapterVersion>),
    /// Let a suspended Job begin.
    Admit {
        /// Its name.
        name: String,
        /// Its UID: another Job of this name is left alone.
        uid: String,
    },
    /// Delete a Job; it stays until its pods are gone.
    DeleteJob {
        /// Its name.
        name: String,
        /// Its UID: another Job of this name is left alone.
        uid: String,
    },
    /// Delete the record of a run, and with it all that was made for it.
    DeleteRun {
        /// Its name.
        name: String,
        /// Its UID.
        uid: String,
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
    /// An object could not be changed.
    #[error("cannot change {name}: {source}")]
    Patch {
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
    match change {
        Change::CreateRun(object) => {
            let same_job = |there: &FineTuneRun, ours: &FineTuneRun| there.spec.job.uid == ours.spec.job.uid;
            return create(&Api::namespaced(client.clone(), namespace), &*object, same_job).await;
        }
        Change::CreateJob(object) => return create(&jobs(), &*object, same_owner).await,
        Change::CreateVersion(object) => {
            let same_source = |there: &AdapterVersion, ours: &AdapterVersion| there.spec.source == ours.spec.source;
            return create(&Api::namespaced(client.clone(), namespace), &*object, same_source).await;
        }
        Change::Admit { name, uid } => admit(&jobs(), &name, &uid).await?,
        Change::DeleteJob { name, uid } => {
            delete(&jobs(), &name, &DeleteParams::foreground().preconditions(only(uid))).await?;
        }
        Change::DeleteRun { name, uid } => {
            let runs = Api::<FineTuneRun>::namespaced(client.clone(), namespace);
            delete(&runs, &name, &DeleteParams::background().preconditions(only(uid))).await?;
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
            Ok(Some(Refusal { reason: reason::PENDING, message, is_final: false }))
        }
        kube::Error::Api(status) => match Refusal::of_creation(&format!("{kind} {name}"), status) {
            Some(refusal) => Ok(Some(refusal)),
            None => Err(failed(error)),
        },
        _ => Err(failed(error)),
    }
}

/// Of the same owner, and here to stay.
fn same_owner<K: Resource<DynamicType = ()>>(there: &K, ours: &K) -> bool {
    let owner = |object: &K| object.owner_references().first().map(|owner| owner.uid.clone());
    there.meta().deletion_timestamp.is_none() && owner(there) == owner(ours)
}

/// Lets a Job begin. One that is gone, or is another by now, needs it no more.
async fn admit(jobs: &Api<Job>, name: &str, uid: &str) -> Result<(), ApplyError> {
    let patch = Patch::Merge(json!({"metadata": {"uid": uid}, "spec": {"suspend": false}}));
    let params = PatchParams { field_manager: Some(OPERATOR.into()), ..Default::default() };
    match jobs.patch(name, &params, &patch).await {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(status)) if status.is_not_found() || status.is_conflict() => Ok(()),
        Err(source) => Err(ApplyError::Patch { name: name.into(), source }),
    }
}

fn only(uid: String) -> Preconditions {
    Preconditions { uid: Some(uid), resource_version: None }
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

/// Writes an object's status by server-side apply, as the manager of the fields that are in it; the version that it has then.
///
/// # Errors
/// If the API server fails.
pub async fn apply_status<K, S>(
    client: &Client,
    object: &ObjectMeta,
    status: &S,
    manager: &str,
) -> Result<Option<String>, kube::Error>
where
    K: Resource<Scope = NamespaceResourceScope, DynamicType = ()> + Clone + Debug + DeserializeOwned,
    S: Serialize,
{
    // The answer may be an object that can't be read.
    let name = object.name.as_deref().unwrap_or_default();
    let api = Api::<DeserializeGuard<K>>::namespaced(client.clone(), object.namespace.as_deref().unwrap_or_default());
    // The UID keeps the status off an object of the same name that came after this one.
    let patch = json!({
        "apiVersion": K::api_version(&()),
        "kind": K::kind(&()),
        "metadata": {"name": name, "uid": object.uid},
        "status": status,
    });
    let written = api.patch_status(name, &PatchParams::apply(manager).force(), &Patch::Apply(patch)).await?;
    Ok(written.resource_version())
}

/// Writes the record of a run, if it is still as it was read: false if it is not.
///
/// # Errors
/// If the API server fails.
pub async fn write_record(client: &Client, run: &Run, record: FineTuneRunStatus) -> Result<bool, kube::Error> {
    let Object { namespace, name, uid, resource_version } = run.object.clone();
    let api = Api::<FineTuneRun>::namespaced(client.clone(), &namespace);
    let mut object = FineTuneRun::new(&name, run.spec.clone());
    object.metadata.uid = Some(uid);
    object.metadata.resource_version = Some(resource_version);
    object.status = Some(record);
    let params = PostParams { field_manager: Some(OPERATOR.into()), ..Default::default() };
    match api.replace_status(&name, &params, &object).await {
        Ok(_) => Ok(true),
        Err(kube::Error::Api(status)) if status.is_conflict() || status.is_not_found() => Ok(false),
        Err(error) => Err(error),
    }
}

/// Whether the record of a run is still as it was read.
///
/// # Errors
/// If the API server fails.
pub async fn is_unchanged(client: &Client, run: &Run) -> Result<bool, kube::Error> {
    let api = Api::<FineTuneRun>::namespaced(client.clone(), &run.object.namespace);
    let there = api.get_metadata_opt(&run.object.name).await?;
    Ok(there.is_some_and(|there| there.metadata.resource_version.as_ref() == Some(&run.object.resource_version)))
}

#[cfg(test)]
mod tests {
    use serde_json::Value;
    use tunesmith_crds::{FineTuneJob, FineTuneJobStatus, fine_tune_run::Trigger};

    use super::*;
    use crate::{
        fixtures::{job, run, trainer_defaults},
        mock::{ApiServer, api_server},
        runs::build::new_run,
    };

    fn owned_job(uid: &str) -> Value {
        json!({
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {
                "name": "j-1-1",
                "ownerReferences": [{"apiVersion": "v1", "kind": "FineTuneRun", "name": "j-1", "uid": uid}],
            },
        })
    }

    fn creation() -> Vec<Change> {
        vec![Change::CreateJob(Box::new(serde_json::from_value(owned_job("ours")).unwrap()))]
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
            server.answer(200, owned_job("ours")).await;
        });
        assert_eq!(result.await.unwrap(), None);
    }

    #[tokio::test]
    async fn a_job_of_another_owner_is_waited_for() {
        let result = played(creation(), move |mut server| async move {
            server.refuse(409, "AlreadyExists", "exists").await;
            server.answer(200, owned_job("another's")).await;
        });
        let refusal = result.await.unwrap().unwrap();
        assert!(refusal.message.contains("Job j-1-1 is there already"), "{}", refusal.message);
    }

    #[tokio::test]
    async fn a_record_is_written_only_over_the_version_that_was_read() {
        for (code, written) in [(200, true), (409, false)] {
            let (client, mut server) = api_server();
            let run = run(&job(json!({})), 1);
            let object = new_run(&job(json!({})), 1, Trigger::Generation, &trainer_defaults());
            let server = tokio::spawn(async move {
                let call = match code {
                    200 => server.answer(200, serde_json::to_value(object).unwrap()).await,
                    _ => server.refuse(code, "Conflict", "the object has been modified").await,
                };
                assert!(
                    call.line.starts_with("PUT /apis/tunesmith.dev/v1alpha1/namespaces/team/finetuneruns/j-1/status"),
                    "{}",
                    call.line
                );
                assert_eq!(call.body["metadata"]["resourceVersion"], "1");
                assert_eq!(call.body["metadata"]["uid"], "uid-run-1");
            });
            assert_eq!(write_record(&client, &run, FineTuneRunStatus::default()).await.unwrap(), written);
            server.await.unwrap();
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
            let call = server.answer(200, owned_job("ours")).await;
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
        apply_status::<FineTuneJob, _>(&client, &job(json!({})).metadata, &status, OPERATOR).await.unwrap();
        server.await.unwrap();
    }
}
