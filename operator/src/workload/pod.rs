//! The pod of a trainer Job: restricted Pod Security, no Kubernetes token, a read-only root, credentials from the
//! tenant's Secrets by reference.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::{
    api::batch::v1::{
        PodFailurePolicy, PodFailurePolicyOnExitCodesRequirement, PodFailurePolicyOnPodConditionsPattern,
        PodFailurePolicyRule,
    },
    api::core::v1::{
        Affinity, Capabilities, Container, ContainerPort, DownwardAPIVolumeFile, DownwardAPIVolumeSource,
        EmptyDirVolumeSource, EnvFromSource, EnvVar, ObjectFieldSelector, PersistentVolumeClaimVolumeSource,
        PodSecurityContext, PodSpec, PodTemplateSpec, ResourceRequirements, SeccompProfile, SecretEnvSource,
        SecurityContext, Toleration, Volume, VolumeMount,
    },
    apimachinery::pkg::{api::resource::Quantity, apis::meta::v1::ObjectMeta},
};
use tunesmith_crds::{
    fine_tune_job::SecretRef,
    names::{
        CLAIMS_DIR, REPORT_PATH, ROLE_ARN, RUN_SPEC_ANNOTATION, RUN_SPEC_PATH, TRAINER_PORT, WORK_DIR, env_prefix,
        exit_code,
    },
};

use super::Stage;

/// What a pod that only checks may write to its working folder.
const CHECK_WORK_LIMIT: &str = "64Gi";
/// Name of the trainer's container: sidecars may stand beside it.
pub const CONTAINER: &str = "trainer";
/// Time to end after SIGTERM for a pod that has nothing to save, in seconds.
const CHECK_GRACE_SECONDS: i64 = 30;
/// User and group of the image.
const NON_ROOT: i64 = 65532;
/// CPU of a pod that only checks.
const CHECK_CPU: &str = "100m";

/// What all trainer pods have in common.
#[derive(Clone, Debug)]
pub struct TrainerDefaults {
    /// Reference of the image.
    pub image: String,
    /// When the kubelet pulls it: Always, IfNotPresent or Never.
    pub pull_policy: String,
    /// Architecture that it was built for, as nodes are labelled: amd64 or arm64.
    pub arch: String,
    /// Name of this cluster, for the claims that runs lay on versions in a shared store; may be empty.
    pub cluster: String,
    /// Resources of pods that only check: a preflight reads headers and rows, a verification files as they go by.
    pub checks: CheckResources,
}

/// Resources of pods that only check, as quantities.
#[derive(Clone, Debug)]
pub struct CheckResources {
    /// Memory, requested and at most.
    pub memory: String,
    /// CPU at most, for namespaces whose quota counts that.
    pub cpu_limit: Option<String>,
    /// Storage of the node, requested and at most, for namespaces whose quota counts that.
    pub ephemeral_storage: Option<String>,
}

/// What differs between the pods of trainer Jobs.
pub struct TrainerPod<'a> {
    /// The subcommand.
    pub stage: Stage,
    /// What it has in common with the others.
    pub trainer: &'a TrainerDefaults,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// What it works on, as JSON: an annotation, which the kubelet shows it as a file. So the Job has all that it needs, and
    /// nobody can change it or take it away.
    pub task: String,
    /// Secrets whose keys become environment variables with this prefix.
    pub secrets: Vec<(&'static str, &'a SecretRef)>,
    /// ARNs of the IAM roles that it assumes, by the prefix of what each is for.
    pub roles: Vec<(&'static str, &'a str)>,
    /// PersistentVolumeClaims that it reads.
    pub claims: BTreeSet<&'a str>,
    /// ServiceAccount whose cloud identity it uses.
    pub service_account_name: Option<&'a str>,
    /// Requests and limits.
    pub resources: ResourceRequirements,
    /// Most that it may write to its working folder, as a quantity.
    pub work_limit: String,
    /// Where it may run.
    pub affinity: Option<Affinity>,
    /// Taints that it tolerates.
    pub tolerations: Vec<Toleration>,
    /// Its RuntimeClass.
    pub runtime_class_name: Option<String>,
    /// Time for a checkpoint after SIGTERM, in seconds.
    pub grace_seconds: i64,
    /// Seconds that it may run once a node has it.
    pub deadline: Option<i64>,
}

impl<'a> TrainerPod<'a> {
    /// A small pod that runs anywhere, without credentials yet: it checks, verifies or copies.
    pub fn small(stage: Stage, trainer: &'a TrainerDefaults, labels: BTreeMap<String, String>, task: String) -> Self {
        Self {
            stage,
            trainer,
            labels,
            task,
            secrets: Vec::new(),
            roles: Vec::new(),
            claims: BTreeSet::new(),
            service_account_name: None,
            resources: trainer.checks.requirements(),
            work_limit: CHECK_WORK_LIMIT.into(),
            affinity: None,
            tolerations: Vec::new(),
            runtime_class_name: None,
            grace_seconds: CHECK_GRACE_SECONDS,
            deadline: None,
        }
    }
}

impl TrainerPod<'_> {
    /// The template of a Job.
    pub fn template(self) -> PodTemplateSpec {
        let container = self.container();
        let mut volumes = vec![task_volume(), empty_dir("work", &self.work_limit), empty_dir("tmp", "1Gi")];
        volumes.extend(self.claims.iter().enumerate().map(|(number, claim)| claim_volume(number, claim)));
        PodTemplateSpec {
            metadata: Some(ObjectMeta {
                labels: Some(with_azure_identity(self.labels, self.service_account_name)),
                annotations: Some([(RUN_SPEC_ANNOTATION.to_owned(), self.task)].into()),
                ..Default::default()
            }),
            spec: Some(PodSpec {
                containers: vec![container],
                volumes: Some(volumes),
                restart_policy: Some("Never".into()),
                termination_grace_period_seconds: Some(self.grace_seconds),
                active_deadline_seconds: self.deadline,
                node_selector: Some([("kubernetes.io/arch".into(), self.trainer.arch.clone())].into()),
                service_account_name: self.service_account_name.map(Into::into),
                automount_service_account_token: Some(false),
                enable_service_links: Some(false),
                security_context: Some(PodSecurityContext {
                    run_as_non_root: Some(true),
                    run_as_user: Some(NON_ROOT),
                    run_as_group: Some(NON_ROOT),
                    fs_group: Some(NON_ROOT),
                    seccomp_profile: Some(SeccompProfile { type_: "RuntimeDefault".into(), localhost_profile: None }),
                    ..Default::default()
                }),
                affinity: self.affinity,
                tolerations: (!self.tolerations.is_empty()).then_some(self.tolerations),
                runtime_class_name: self.runtime_class_name,
                ..Default::default()
            }),
        }
    }

    /// Whether it asks for anything but CPU, memory and storage.
    fn has_gpus(&self) -> bool {
        let limits = self.resources.limits.iter().flatten();
        limits.into_iter().any(|(resource, _)| resource.contains('/'))
    }

    fn container(&self) -> Container {
        let env_from = self.secrets.iter().map(|(prefix, secret)| EnvFromSource {
            prefix: Some((*prefix).into()),
            secret_ref: Some(SecretEnvSource {
                name: secret.name.clone(),
                // Without it a copy says that it can't read, and the run trains.
                optional: (*prefix == env_prefix::COPIED).then_some(true),
            }),
            config_map_ref: None,
        });
        let roles = self.roles.iter().map(|(prefix, role)| EnvVar {
            name: format!("{prefix}{ROLE_ARN}"),
            value: Some((*role).into()),
            value_from: None,
        });
        let env: Vec<EnvVar> = (!self.has_gpus()).then(no_gpus).into_iter().chain(roles).collect();
        let mut volume_mounts = vec![
            VolumeMount { read_only: Some(true), ..mount("run", task_path().0) },
            mount("work", WORK_DIR),
            mount("tmp", "/tmp"),
        ];
        volume_mounts.extend(self.claims.iter().enumerate().map(|(number, claim)| VolumeMount {
            read_only: Some(true),
            ..mount(&claim_volume_name(number), &format!("{CLAIMS_DIR}/{claim}"))
        }));
        Container {
            name: CONTAINER.into(),
            image: Some(self.trainer.image.clone()),
            image_pull_policy: Some(self.trainer.pull_policy.clone()),
            args: Some(vec![self.stage.name().into()]),
            env_from: Some(env_from.collect()),
            env: (!env.is_empty()).then_some(env),
            ports: Some(vec![ContainerPort {
                name: Some("http".into()),
                container_port: i32::from(TRAINER_PORT),
                ..Default::default()
            }]),
            resources: Some(self.resources.clone()),
            volume_mounts: Some(volume_mounts),
            working_dir: Some(WORK_DIR.into()),
            termination_message_path: Some(REPORT_PATH.into()),
            termination_message_policy: Some("File".into()),
            security_context: Some(SecurityContext {
                allow_privilege_escalation: Some(false),
                read_only_root_filesystem: Some(true),
                capabilities: Some(Capabilities { drop: Some(vec!["ALL".into()]), add: None }),
                ..Default::default()
            }),
            ..Default::default()
        }
    }
}

/// AKS gives the token of a ServiceAccount's Azure identity to pods with this label only; nobody else reads it.
fn with_azure_identity(mut labels: BTreeMap<String, String>, account: Option<&str>) -> BTreeMap<String, String> {
    labels.extend(account.map(|_| ("azure.workload.identity/use".into(), "true".into())));
    labels
}

impl CheckResources {
    /// The same in Kubernetes' words.
    pub fn requirements(&self) -> ResourceRequirements {
        let both = [("memory", Some(&self.memory)), ("ephemeral-storage", self.ephemeral_storage.as_ref())];
        let both = both.map(|(name, quantity)| (name, quantity.cloned()));
        let named = |all: &[(&str, Option<String>)]| -> BTreeMap<String, Quantity> {
            let given =
                all.iter().filter_map(|(name, quantity)| Some(((*name).to_owned(), Quantity(quantity.clone()?))));
            given.collect()
        };
        let (mut requests, mut limits) = (named(&both), named(&both));
        requests.extend(named(&[("cpu", Some(CHECK_CPU.into()))]));
        limits.extend(named(&[("cpu", self.cpu_limit.clone())]));
        ResourceRequirements { requests: Some(requests), limits: Some(limits), claims: None }
    }
}

/// Failed pods that are followed by another one before the Job fails.
pub const RETRIES: i32 = 3;

/// A Job that is over stays for so long, for whoever wants to see its log.
pub const KEPT_SECONDS: i32 = 300;

/// How the Job controller retries a pod that only checks.
pub fn retry_policy() -> PodFailurePolicy {
    let on_exit = |action: &str, codes: &[i32]| PodFailurePolicyRule {
        action: action.into(),
        on_exit_codes: Some(PodFailurePolicyOnExitCodesRequirement {
            operator: "In".into(),
            values: codes.to_vec(),
            container_name: None,
        }),
        ..Default::default()
    };
    let disrupted =
        PodFailurePolicyOnPodConditionsPattern { type_: "DisruptionTarget".into(), status: Some("True".into()) };
    PodFailurePolicy {
        rules: vec![
            on_exit("FailJob", &[exit_code::BAD_SPEC, exit_code::BAD_INPUT]),
            on_exit("Ignore", &[exit_code::PREEMPTED]),
            PodFailurePolicyRule {
                action: "Ignore".into(),
                on_pod_conditions: Some(vec![disrupted]),
                ..Default::default()
            },
        ],
    }
}

/// Where NVIDIA's runtime is the node's default, a pod that asks for no GPU would see them all.
fn no_gpus() -> EnvVar {
    EnvVar { name: "NVIDIA_VISIBLE_DEVICES".into(), value: Some("void".into()), value_from: None }
}

/// Folder and name of the file with the task.
fn task_path() -> (&'static str, &'static str) {
    RUN_SPEC_PATH.rsplit_once('/').unwrap_or(("", RUN_SPEC_PATH))
}

fn task_volume() -> Volume {
    let field = ObjectFieldSelector {
        field_path: format!("metadata.annotations['{RUN_SPEC_ANNOTATION}']"),
        ..Default::default()
    };
    let file = DownwardAPIVolumeFile { path: task_path().1.into(), field_ref: Some(field), ..Default::default() };
    Volume {
        name: "run".into(),
        downward_api: Some(DownwardAPIVolumeSource { items: Some(vec![file]), ..Default::default() }),
        ..Default::default()
    }
}

/// A claim's name may be longer than a volume's, and have dots.
fn claim_volume_name(number: usize) -> String {
    format!("claim-{number}")
}

fn claim_volume(number: usize, claim: &str) -> Volume {
    Volume {
        name: claim_volume_name(number),
        persistent_volume_claim: Some(PersistentVolumeClaimVolumeSource {
            claim_name: claim.into(),
            read_only: Some(true),
        }),
        ..Default::default()
    }
}

fn empty_dir(name: &str, limit: &str) -> Volume {
    Volume {
        name: name.into(),
        empty_dir: Some(EmptyDirVolumeSource {
            size_limit: Some(Quantity(limit.into())),
            medium: None,
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn mount(name: &str, path: &str) -> VolumeMount {
    VolumeMount { name: name.into(), mount_path: path.into(), ..Default::default() }
}
