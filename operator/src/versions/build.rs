//! The objects that verify a version.

use k8s_openapi::{
    api::batch::v1::{Job, JobSpec},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use kube::{Resource, ResourceExt};
use serde_json::json;
use tunesmith_crds::{
    AdapterVersion,
    names::{ADAPTER_LABEL, env_prefix},
    run::{SCHEMA_VERSION, VerifySpec},
};

use super::decide::Step;
use crate::{
    apply::Change,
    labels,
    workload::{
        Stage, TrainerDefaults, TrainerPod,
        pod::{KEPT_SECONDS, RETRIES, retry_policy},
    },
};

/// The changes that a step means.
pub fn build(step: &Step, version: &AdapterVersion, trainer: &TrainerDefaults) -> Vec<Change> {
    match step {
        Step::Start => vec![Change::CreateJob(Box::new(verify_job(version, trainer)))],
        Step::Remove { uid } => vec![Change::DeleteJob { name: verify_name(version), uid: uid.clone() }],
    }
}

/// Name of the Job that verifies a version.
pub fn verify_name(version: &AdapterVersion) -> String {
    format!("{}-verify", version.name_any())
}

fn verify_job(version: &AdapterVersion, trainer: &TrainerDefaults) -> Job {
    let artifact = &version.spec.artifact;
    let metadata = metadata(version);
    let task = VerifySpec { schema_version: SCHEMA_VERSION, artifact: artifact.clone() };
    let labels = metadata.labels.clone().unwrap_or_default();
    let pod = TrainerPod {
        secrets: artifact.secret_ref.iter().map(|secret| (env_prefix::OUTPUT, secret)).collect(),
        roles: artifact.role_arn.iter().map(|role| (env_prefix::OUTPUT, role.as_str())).collect(),
        service_account_name: artifact.service_account_name.as_deref(),
        ..TrainerPod::small(Stage::Verify, trainer, labels, json!(task).to_string())
    };
    Job {
        metadata,
        spec: Some(JobSpec {
            backoff_limit: Some(RETRIES),
            ttl_seconds_after_finished: Some(KEPT_SECONDS),
            pod_failure_policy: Some(retry_policy()),
            template: pod.template(),
            ..Default::default()
        }),
        status: None,
    }
}

/// They go with the version.
fn metadata(version: &AdapterVersion) -> ObjectMeta {
    let mut labels = labels::trainer(&version.name_any(), Stage::Verify);
    labels.insert(ADAPTER_LABEL.into(), version.spec.adapter_name.clone());
    ObjectMeta {
        name: Some(verify_name(version)),
        namespace: version.namespace(),
        labels: Some(labels),
        owner_references: version.controller_owner_ref(&()).map(|owner| vec![owner]),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures::{trainer_defaults, version};

    #[test]
    fn files_are_read_with_the_role_that_wrote_them() {
        let mut version = version(1, "sha256:x", None);
        version.spec.artifact.service_account_name = Some("tuner".into());
        version.spec.artifact.role_arn = Some("arn:aws:iam::123456789012:role/write".into());
        let pod = json!(verify_job(&version, &trainer_defaults()))["spec"]["template"]["spec"].clone();
        assert_eq!(pod["serviceAccountName"], "tuner");
        let role = json!({"name": "TUNESMITH_OUTPUT_AWS_ROLE_ARN", "value": "arn:aws:iam::123456789012:role/write"});
        assert!(pod["containers"][0]["env"].as_array().unwrap().contains(&role), "{pod}");
    }
}
