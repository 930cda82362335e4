//! The Jobs as the cluster gets them, for each of the shipped GpuClasses.

use std::sync::Arc;

use k8s_openapi::api::core::v1::Node;
use serde_json::{Value, json};
use tunesmith_crds::names::RUN_SPEC_ANNOTATION;

use super::*;

use crate::{
    fixtures::{class, cpu, job, observed_checked, observed_published, preflight_report, trainer_defaults},
    plan::{Devices, Offers},
    runs::decide::advance,
};

fn offers(nodes: &[(&str, u32)]) -> Offers {
    let a100 = json!({
        "resourceName": "nvidia.com/gpu",
        "memory": "80Gi",
        "methods": [{"method": "Full", "gpus": 4}],
        "nodeSelectorTerms": [{"matchExpressions": [{"key": "nvidia.com/gpu.memory", "operator": "Gt", "values": ["80000"]}]}],
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
        "runtimeClassName": "nvidia",
    });
    let consumer = json!({
        "resourceName": "nvidia.com/gpu",
        "memory": "24Gi",
        "methods": [{"method": "LoRA", "gpus": 1}, {"method": "QLoRA", "gpus": 1}],
    });
    let node = |(name, gpus): &(&str, u32)| -> Node {
        serde_json::from_value(json!({
            "metadata": {"name": name, "labels": {"nvidia.com/gpu.memory": "81920"}},
            "status": {"allocatable": {"nvidia.com/gpu": gpus.to_string()}},
        }))
        .unwrap()
    };
    Offers {
        classes: vec![class("a100-80gb", a100), class("consumer-24gb", consumer), cpu()],
        nodes: nodes.iter().map(node).map(Arc::new).collect(),
        devices: Devices { cuda: true },
    }
}

/// The Job of the first attempt of `job` on such a cluster.
fn first_attempt(job: &FineTuneJob, offers: &Offers) -> Job {
    let mut observed = observed_checked(job.clone(), |_| {});
    observed.offers = offers.clone();
    built(&observed)
}

fn built(observed: &crate::observed::Observed) -> Job {
    let run = &observed.runs[&1];
    let advance = advance(run, observed, crate::fixtures::at(10_000));
    let changes =
        advance.steps.iter().flat_map(|step| build(step, &observed.job, run, &advance.record, &trainer_defaults()));
    let [Change::CreateJob(job)] = &changes.collect::<Vec<_>>()[..] else { panic!() };
    (**job).clone()
}

/// What the pods of a Job work on.
fn task_of(job: &Job) -> RunSpec {
    let pod = job.spec.as_ref().unwrap().template.metadata.as_ref().unwrap();
    serde_json::from_str(&pod.annotations.as_ref().unwrap()[RUN_SPEC_ANNOTATION]).unwrap()
}

/// The first training Job of `job` on such a cluster, as JSON.
fn training(job: &FineTuneJob, offers: &Offers) -> Value {
    serde_json::to_value(first_attempt(job, offers)).unwrap()
}

/// The first preflight Job of `job`.
fn preflight(job: &FineTuneJob) -> Value {
    let observed = crate::fixtures::observed_run(job.clone(), |_| {});
    serde_json::to_value(built(&observed)).unwrap()
}

fn pod_of(job: &Value) -> &Value {
    &job["spec"]["template"]["spec"]
}

fn full() -> FineTuneJob {
    job(json!({"method": "Full"}))
}

#[test]
fn full_asks_for_one_pod_with_4_a100s_where_a_node_has_4() {
    let built = training(&full(), &offers(&[("small", 2), ("large", 8)]));
    assert_eq!((&built["spec"]["completions"], &built["spec"]["parallelism"]), (&json!(1), &json!(1)));
    assert_eq!(built["spec"]["completionMode"], Value::Null);
    let resources = &pod_of(&built)["containers"][0]["resources"];
    assert_eq!(resources["limits"]["nvidia.com/gpu"], "4");
    assert_eq!(resources["requests"]["nvidia.com/gpu"], "4");
    let terms = &pod_of(&built)["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"];
    assert_eq!(terms["nodeSelectorTerms"][0]["matchExpressions"][0]["key"], "nvidia.com/gpu.memory");
    assert_eq!(pod_of(&built)["tolerations"][0]["key"], "nvidia.com/gpu");
    assert_eq!(pod_of(&built)["runtimeClassName"], "nvidia");
}

#[test]
fn full_asks_for_4_pods_with_an_a100_each_where_nodes_have_fewer() {
    let built = training(&full(), &offers(&[("small", 2), ("smaller", 1)]));
    assert_eq!((&built["spec"]["completions"], &built["spec"]["parallelism"]), (&json!(4), &json!(4)));
    assert_eq!(built["spec"]["completionMode"], "Indexed");
    assert_eq!(built["spec"]["podReplacementPolicy"], "Failed");
    assert_eq!(pod_of(&built)["containers"][0]["resources"]["limits"]["nvidia.com/gpu"], "1");
}

#[test]
fn lora_asks_for_one_consumer_gpu() {
    let built = training(&job(json!({})), &offers(&[]));
    assert_eq!(built["spec"]["completions"], 1);
    assert_eq!(pod_of(&built)["containers"][0]["resources"]["limits"]["nvidia.com/gpu"], "1");
    assert_eq!(pod_of(&built)["affinity"], Value::Null);
}

#[test]
fn a_class_of_cpus_asks_for_cpu_and_memory_alone() {
    let resources = json!({"gpuClass": "cpu", "cpu": "500m", "memory": "3Gi"});
    let built = training(&job(json!({"resources": resources})), &offers(&[]));
    let void = json!([{"name": "NVIDIA_VISIBLE_DEVICES", "value": "void"}]);
    assert_eq!(pod_of(&built)["containers"][0]["env"], void, "a node's default runtime may show it GPUs");
    assert_eq!(
        pod_of(&built)["containers"][0]["resources"],
        json!({"limits": {"memory": "3Gi"}, "requests": {"cpu": "500m", "memory": "3Gi"}})
    );
}

#[test]
fn limits_that_quotas_count_are_set_where_the_job_names_them() {
    let limited = |resources: Value| training(&job(json!({"resources": resources})), &offers(&[]));
    let of = |resources| pod_of(&limited(resources))["containers"][0]["resources"].clone();
    let storage = json!({"gpuClass": "cpu", "memory": "3Gi", "cpuLimit": "2", "ephemeralStorage": "20Gi"});
    assert_eq!(
        of(storage),
        json!({
            "limits": {"cpu": "2", "ephemeral-storage": "20Gi", "memory": "3Gi"},
            "requests": {"cpu": "2", "ephemeral-storage": "20Gi", "memory": "3Gi"},
        })
    );
    let both = of(json!({"gpuClass": "cpu", "memory": "3Gi", "cpu": "500m", "cpuLimit": "2"}));
    assert_eq!((&both["requests"]["cpu"], &both["limits"]["cpu"]), (&json!("500m"), &json!("2")));
}

#[test]
fn a_training_job_is_one_attempt_with_a_name_that_follows_from_its_numbers() {
    let built = training(&job(json!({"activeDeadlineSeconds": 60})), &offers(&[]));
    assert_eq!(built["metadata"]["name"], "j-1-1");
    assert_eq!(built["metadata"]["namespace"], "team");
    assert_eq!((&built["spec"]["backoffLimit"], &built["spec"]["suspend"]), (&json!(0), &json!(true)));
    // It counts from when a node has the pod: waiting for quota costs nothing.
    assert_eq!(
        (&built["spec"]["activeDeadlineSeconds"], &pod_of(&built)["activeDeadlineSeconds"]),
        (&Value::Null, &json!(60))
    );
    assert_eq!(pod_of(&built)["terminationGracePeriodSeconds"], 120);
    assert_eq!(pod_of(&built)["nodeSelector"], json!({"kubernetes.io/arch": "amd64"}));
    let owner = &built["metadata"]["ownerReferences"][0];
    assert_eq!(
        (&owner["kind"], &owner["uid"], &owner["controller"]),
        (&json!("FineTuneRun"), &json!("uid-run-1"), &json!(true))
    );
    let labels = &built["spec"]["template"]["metadata"]["labels"];
    for (label, value) in [
        (names::JOB_LABEL, "j"),
        (names::RUN_LABEL, "1"),
        (names::ATTEMPT_LABEL, "1"),
        (names::STAGE_LABEL, "train"),
        ("app.kubernetes.io/managed-by", "tunesmith-operator"),
    ] {
        assert_eq!(labels[label], value, "{label}");
    }
}

#[test]
fn every_pod_meets_the_restricted_pod_security_standard_and_has_no_token() {
    for built in [&preflight(&job(json!({}))), &training(&job(json!({})), &offers(&[]))] {
        let pod = pod_of(built);
        assert_eq!(pod["automountServiceAccountToken"], false);
        assert_eq!(pod["enableServiceLinks"], false);
        assert_eq!(pod["restartPolicy"], "Never");
        assert_eq!(pod["securityContext"]["runAsNonRoot"], true);
        assert_eq!(pod["securityContext"]["runAsUser"], 65532);
        assert_eq!(pod["securityContext"]["seccompProfile"]["type"], "RuntimeDefault");
        let container = &pod["containers"][0];
        assert_eq!(
            container["securityContext"],
            json!({
                "allowPrivilegeEscalation": false,
                "readOnlyRootFilesystem": true,
                "capabilities": {"drop": ["ALL"]},
            })
        );
        assert_eq!(container["terminationMessagePath"], names::REPORT_PATH);
        assert_eq!(container["volumeMounts"][0]["mountPath"], "/etc/tunesmith");
        assert_eq!(container["volumeMounts"][1]["mountPath"], names::WORK_DIR);
        for volume in &pod["volumes"].as_array().unwrap()[1..] {
            assert!(volume["emptyDir"]["sizeLimit"].is_string(), "{volume}");
        }
    }
}

#[test]
fn secrets_reach_the_pod_by_reference_with_one_prefix_a_role() {
    let own = job(json!({"dataset": {
        "train": {"uri": "s3://data/t.jsonl"}, "evalFraction": 0.1, "secretRef": {"name": "data-key"},
    }}));
    let built = training(&own, &offers(&[]));
    let from = |prefix: &str, name: &str| json!({"prefix": prefix, "secretRef": {"name": name}});
    assert_eq!(
        pod_of(&built)["containers"][0]["envFrom"],
        json!([from(env_prefix::MODEL, "s3"), from(env_prefix::DATASET, "data-key"), from(env_prefix::OUTPUT, "s3"),])
    );
}

/// The Job that copies a version, which is read with `secret` and `account`.
fn copying(output: Value, secret: Value, account: Value) -> Value {
    let mut observed = observed_checked(job(json!({"output": output})), |run| {
        crate::fixtures::settle(run, 4, "sha256:x");
        let mut copied = json!(crate::fixtures::version(3, "sha256:x", None).spec.artifact);
        (copied["secretRef"], copied["serviceAccountName"]) = (secret, account);
        run.record.settled.as_mut().unwrap().copy_of = Some(serde_json::from_value(copied).unwrap());
    });
    observed.offers = offers(&[]);
    serde_json::to_value(built(&observed)).unwrap()
}

#[test]
fn a_copy_is_a_small_pod_with_the_credentials_of_both_sides() {
    let output = json!({"adapterName": "support", "uri": "s3://new", "secretRef": {"name": "new"}});
    let built = copying(output.clone(), json!({"name": "old"}), json!("old"));
    let (pod, container) = (pod_of(&built), &pod_of(&built)["containers"][0]);
    assert_eq!((&container["args"], &built["metadata"]["name"]), (&json!(["copy"]), &json!("j-1-1")));
    assert_eq!((&container["resources"]["limits"], &pod["affinity"]), (&json!({"memory": "2Gi"}), &Value::Null));
    assert_eq!(
        container["envFrom"],
        json!([
            {"prefix": "TUNESMITH_OUTPUT_", "secretRef": {"name": "new"}},
            // The old one may be gone; then the copy says so, and the run trains.
            {"prefix": "TUNESMITH_COPIED_", "secretRef": {"name": "old", "optional": true}},
        ])
    );
    assert_eq!(pod["serviceAccountName"], "old");
    let mut with_account = output;
    with_account["serviceAccountName"] = json!("new");
    assert_eq!(pod_of(&copying(with_account, Value::Null, json!("old")))["serviceAccountName"], "new");
    let task: Value = serde_json::from_str(
        built["spec"]["template"]["metadata"]["annotations"][RUN_SPEC_ANNOTATION].as_str().unwrap(),
    )
    .unwrap();
    assert_eq!(task["train"]["copyOf"]["uri"], "s3://adapters/support/v3");
}

#[test]
fn roles_reach_the_pod_by_its_environment_and_stand_for_those_that_name_no_identity() {
    let arn = |name: &str| format!("arn:aws:iam::123456789012:role/{name}");
    let environment = |spec: Value| {
        let mut spec = spec;
        spec["output"] = json!({"adapterName": "support", "uri": "s3://adapters", "serviceAccountName": "tuner",
            "roleArn": arn("write"), "secretRef": {"name": "s3"}});
        let built = training(&job(spec), &offers(&[]));
        let container = pod_of(&built)["containers"][0].clone();
        let variables = container["env"].as_array().unwrap().iter();
        let roles: Vec<_> =
            variables.filter(|variable| variable["name"] != "NVIDIA_VISIBLE_DEVICES").cloned().collect();
        let secrets = container["envFrom"].as_array().unwrap().iter();
        (roles, secrets.map(|secret| secret["prefix"].as_str().unwrap().to_owned()).collect::<Vec<_>>())
    };
    let variable = |prefix: &str, name: &str| json!({"name": format!("{prefix}AWS_ROLE_ARN"), "value": arn(name)});
    let all = [env_prefix::MODEL, env_prefix::DATASET, env_prefix::OUTPUT];
    assert_eq!(
        environment(json!({})),
        (all.map(|prefix| variable(prefix, "write")).into(), all.map(str::to_owned).into())
    );
    let own = json!({
        "baseModel": {"uri": "s3://models/m", "roleArn": arn("models")},
        "dataset": {"train": {"uri": "s3://data/t.jsonl"}, "evalFraction": 0.1, "secretRef": {"name": "data-key"}},
    });
    let roles = vec![variable(env_prefix::MODEL, "models"), variable(env_prefix::OUTPUT, "write")];
    let secrets = [env_prefix::DATASET, env_prefix::OUTPUT].map(str::to_owned).into();
    assert_eq!(environment(own), (roles, secrets));
    let without = training(&job(json!({})), &offers(&[])).to_string();
    assert!(!without.contains("AWS_ROLE_ARN"));
    let output = json!({"adapterName": "support", "uri": "s3://adapters", "serviceAccountName": "tuner", "roleArn": arn("write")});
    let version = recorded(job(json!({"output": output})), |_| {});
    assert_eq!(version.spec.artifact.role_arn, Some(arn("write")), "for whoever reads it");
}

#[test]
fn azure_gives_its_token_to_a_pod_with_a_service_account() {
    let labels = |output: Value| {
        let built = training(&job(json!({"output": output})), &offers(&[]));
        built["spec"]["template"]["metadata"]["labels"]["azure.workload.identity/use"].clone()
    };
    let output = json!({"adapterName": "support", "uri": "az://adapters", "secretRef": {"name": "account"}});
    assert_eq!(labels(output.clone()), Value::Null);
    let mut with_account = output;
    with_account["serviceAccountName"] = json!("tuner");
    assert_eq!(labels(with_account), "true");
}

#[test]
fn claims_are_mounted_read_only_each_once() {
    let own = job(json!({
        "baseModel": {"uri": "pvc://models.team/llama"},
        "dataset": {"train": {"uri": "pvc://data/t.jsonl"}, "eval": {"uri": "pvc://data/e.jsonl"}},
    }));
    let built = training(&own, &offers(&[]));
    let pod = pod_of(&built);
    let mounts = |what: &Value, from: usize| what.as_array().unwrap()[from..].to_vec();
    let volume = |name: &str, claim: &str| json!({"name": name, "persistentVolumeClaim": {"claimName": claim, "readOnly": true}});
    assert_eq!(mounts(&pod["volumes"], 3), [volume("claim-0", "data"), volume("claim-1", "models.team")]);
    let mount = |name: &str, path: &str| json!({"name": name, "mountPath": path, "readOnly": true});
    assert_eq!(
        mounts(&pod["containers"][0]["volumeMounts"], 3),
        [mount("claim-0", "/claims/data"), mount("claim-1", "/claims/models.team")]
    );
}

#[test]
fn a_preflight_is_a_small_pod_that_is_tried_once() {
    let built = preflight(&job(json!({})));
    assert_eq!((&built["metadata"]["name"], &built["spec"]["backoffLimit"]), (&json!("j-1-preflight-1"), &json!(0)));
    let pod = pod_of(&built);
    assert_eq!((&pod["affinity"], &pod["containers"][0]["args"]), (&Value::Null, &json!(["preflight"])));
    assert_eq!(built["spec"]["suspend"], Value::Null);
}

#[test]
fn a_check_asks_for_what_the_admin_gives_checks_whatever_the_training_needs() {
    let mut trainer = trainer_defaults();
    let of = |trainer: &TrainerDefaults| {
        let run = crate::fixtures::run(&job(json!({})), 1);
        let job = check_job(&job(json!({"resources": {"memory": "64Gi"}})), &run, 1, trainer);
        json!(job.spec.unwrap().template.spec.unwrap().containers[0].resources)
    };
    assert_eq!(of(&trainer), json!({"limits": {"memory": "2Gi"}, "requests": {"cpu": "100m", "memory": "2Gi"}}));
    (trainer.checks.cpu_limit, trainer.checks.ephemeral_storage) = (Some("1".into()), Some("4Gi".into()));
    assert_eq!(
        of(&trainer),
        json!({
            "limits": {"cpu": "1", "ephemeral-storage": "4Gi", "memory": "2Gi"},
            "requests": {"cpu": "100m", "ephemeral-storage": "4Gi", "memory": "2Gi"},
        })
    );
}

#[test]
fn what_an_attempt_works_on_follows_from_the_record() {
    let job = job(json!({}));
    let built = first_attempt(&job, &Offers { classes: vec![cpu()], ..Offers::default() });
    assert_eq!(built.metadata.name.as_deref(), Some("j-1-1"));
    let spec = task_of(&built);
    let task = spec.train.clone().unwrap();
    assert_eq!((task.version, task.trainer_image.as_str(), task.numerics_version), (1, "trainer:1", 1));
    assert_eq!(
        (spec.training.bf16, spec.training.global_batch_size),
        (Some(false), Some(job.spec.training.global_batch()))
    );
    let method = spec.method.clone().unwrap();
    assert_eq!(task.input_digest, tunesmith_crds::input_digest(&spec, &method, &preflight_report()));
}

#[test]
fn a_run_keeps_its_image_and_the_spec_that_it_serves() {
    let mut observed = observed_checked(job(json!({})), |run| run.spec.image = "trainer:0".into());
    observed.job.spec.backoff_limit = 9;
    let built = built(&observed);
    let pod = built.spec.unwrap().template.spec.unwrap();
    assert_eq!(pod.containers[0].image.as_deref(), Some("trainer:0"));
}

#[test]
fn attempts_run_the_very_image_that_checked() {
    for (image, ran, pinned) in [
        ("reg.io:5000/t/trainer:0", Some("reg.io:5000/t/trainer@sha256:1"), "reg.io:5000/t/trainer@sha256:1"),
        ("reg.io/trainer:0", Some("docker-pullable://reg.io/trainer@sha256:1"), "reg.io/trainer@sha256:1"),
        ("trainer:0", Some("docker.io/library/trainer@sha256:1"), "trainer@sha256:1"),
        ("reg.io/trainer@sha256:1", Some("reg.io/trainer@sha256:1"), "reg.io/trainer@sha256:1"),
        // Loaded into the node's store, or pulled from elsewhere: no registry has it by this name.
        ("trainer:0", Some("sha256:1"), "trainer:0"),
        ("trainer:0", Some("docker.io/library/import-2026-11-28@sha256:1"), "trainer:0"),
        ("trainer:0", None, "trainer:0"),
    ] {
        let observed = observed_checked(job(json!({})), |run| {
            run.spec.image = image.into();
            run.record.check.as_mut().unwrap().image_id = ran.map(Into::into);
        });
        let built = built(&observed);
        let spec = task_of(&built);
        let pod = built.spec.unwrap().template.spec.unwrap();
        assert_eq!(pod.containers[0].image.as_deref(), Some(pinned));
        assert_eq!(spec.train.unwrap().trainer_image, pinned, "on record with the version");
    }
}

/// The AdapterVersion of a run that has published.
fn recorded(job: FineTuneJob, change: impl FnOnce(&mut crate::observed::Observed)) -> AdapterVersion {
    let mut observed = observed_published(job);
    change(&mut observed);
    let run = &observed.runs[&1];
    let [Change::CreateVersion(built)] =
        &build(&Step::CreateVersion, &observed.job, run, &run.record, &trainer_defaults())[..]
    else {
        panic!()
    };
    (**built).clone()
}

#[test]
fn a_version_records_what_made_it_and_has_no_owner() {
    let built = recorded(job(json!({})), |_| {});
    assert_eq!(built.metadata.name.as_deref(), Some("support-v1"));
    assert_eq!(built.metadata.owner_references, None);
    assert_eq!(built.spec.artifact.size_bytes, 42);
    assert_eq!(built.spec.artifact.secret_ref.as_ref().unwrap().name, "s3");
    assert_eq!((built.spec.source.uid.as_str(), built.spec.source.input_digest.as_str()), ("uid-j", "sha256:x"));
    assert_eq!(built.spec.hyperparameters["lora"]["rank"], 8);
    assert_eq!(built.spec.hyperparameters["training"]["seed"], 42);
    assert_eq!(built.spec.gates, []);
}

#[test]
fn a_version_records_what_the_gates_of_its_own_run_say() {
    let gated = |max: f64| job(json!({"evaluation": {"gates": [{"metric": "eval_loss", "max": max}]}}));
    let built = recorded(gated(1.2), |observed| observed.job = gated(9.0));
    let [gate] = &built.spec.gates[..] else { panic!("{:?}", built.spec.gates) };
    assert_eq!((gate.value, gate.max, gate.passed), (Some(1.5), Some(1.2), false));
}
