//! The Jobs as the cluster gets them, for each of the shipped GpuClasses.

use k8s_openapi::api::core::v1::Node;
use serde_json::{Value, json};

use super::*;
use crate::{
    fixtures::{
        attempt, class, cpu, ended, job, observed_checked, passed, preflight_report, task, train_report, trained,
        trainer_job,
    },
    plan::{Offers, plan},
};

fn image() -> Image {
    Image { name: "trainer:1".into(), pull_policy: "IfNotPresent".into() }
}

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
        nodes: nodes.iter().map(node).collect(),
    }
}

/// The first training Job of `job` on such a cluster, as JSON.
fn training(job: &FineTuneJob, offers: &Offers) -> Value {
    let planned = plan(&job.spec, offers, Some(&preflight_report()), None).unwrap();
    let step = Step::CreateAttempt { run: 1, attempt: 1, version: 3, planned: Box::new(planned), deadline: Some(60) };
    let observed = observed_checked(job.clone(), |_| {});
    let Some(Change::CreateJob(built)) = build(&step, &observed, &image()) else { panic!() };
    serde_json::to_value(built).unwrap()
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
    assert_eq!(
        built["metadata"]["annotations"][PLAN_ANNOTATION].as_str().map(|plan| plan.contains(r#""pods":4"#)),
        Some(true)
    );
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
    assert_eq!(
        pod_of(&built)["containers"][0]["resources"],
        json!({"limits": {"memory": "3Gi"}, "requests": {"cpu": "500m", "memory": "3Gi"}})
    );
}

#[test]
fn a_training_job_is_one_attempt_with_a_name_that_follows_from_its_numbers() {
    let built = training(&job(json!({})), &offers(&[]));
    assert_eq!(built["metadata"]["name"], "j-1-1");
    assert_eq!(built["metadata"]["namespace"], "team");
    assert_eq!((&built["spec"]["backoffLimit"], &built["spec"]["activeDeadlineSeconds"]), (&json!(0), &json!(60)));
    let owner = &built["metadata"]["ownerReferences"][0];
    assert_eq!(
        (&owner["kind"], &owner["uid"], &owner["controller"]),
        (&json!("FineTuneJob"), &json!("uid-j"), &json!(true))
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
    let observed = observed_checked(job(json!({})), |_| {});
    let Some(Change::CreateJob(preflight)) = build(&Step::CreatePreflight { run: 1 }, &observed, &image()) else {
        panic!()
    };
    let preflight = serde_json::to_value(preflight).unwrap();
    for built in [&preflight, &training(&job(json!({})), &offers(&[]))] {
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
fn a_preflight_is_a_small_pod_that_the_job_controller_retries() {
    let observed = observed_checked(job(json!({})), |_| {});
    let Some(Change::CreateJob(built)) = build(&Step::CreatePreflight { run: 2 }, &observed, &image()) else {
        panic!()
    };
    assert_eq!(built.metadata.name.as_deref(), Some("j-2-preflight"));
    let spec = built.spec.unwrap();
    assert_eq!(spec.backoff_limit, Some(1));
    let rules = spec.pod_failure_policy.unwrap().rules;
    assert_eq!(rules.iter().map(|rule| rule.action.as_str()).collect::<Vec<_>>(), ["FailJob", "Ignore", "Ignore"]);
    assert_eq!(rules[0].on_exit_codes.as_ref().unwrap().values, [2, 3]);
    let pod = spec.template.spec.unwrap();
    assert_eq!((pod.affinity, pod.containers[0].args.as_ref().unwrap()[0].as_str()), (None, "preflight"));
}

#[test]
fn a_reserved_version_is_an_immutable_config_map_named_after_it() {
    let job = job(json!({}));
    let observed = observed_checked(job.clone(), |_| {});
    let step = Step::ReserveVersion {
        run: 1,
        version: 3,
        method: tunesmith_crds::fine_tune_job::MethodName::LoRA,
        input_digest: "sha256:x".into(),
        preflight: preflight_report(),
        planned: Box::new(plan(&job.spec, &observed.offers, Some(&preflight_report()), None).unwrap()),
    };
    let Some(Change::CreateConfigMap(built)) = build(&step, &observed, &image()) else { panic!() };
    assert_eq!((built.metadata.name.as_deref(), built.immutable), (Some("support-v3-run"), Some(true)));
    let spec: RunSpec = serde_json::from_str(&built.data.unwrap()[RUN_SPEC_KEY]).unwrap();
    assert_eq!(spec, task(&job, 1, 3, "sha256:x"));
}

#[test]
fn a_run_keeps_the_spec_that_it_serves() {
    let job = job(json!({}));
    let observed = observed_checked(job.clone(), |_| {});
    let Some(Change::CreateConfigMap(built)) = build(&Step::StartRun { run: 1 }, &observed, &image()) else { panic!() };
    let data = built.data.unwrap();
    assert_eq!(serde_json::from_str::<tunesmith_crds::FineTuneJobSpec>(&data[SPEC_KEY]).unwrap(), job.spec);
    assert_eq!(serde_json::from_str::<RunSpec>(&data[RUN_SPEC_KEY]).unwrap(), RunSpec::preflight(&job, 1));
}

#[test]
fn a_version_records_what_made_it_and_has_no_owner() {
    let job = job(json!({}));
    let observed = observed_checked(job.clone(), |run| {
        run.task = Some(task(&job, 1, 1, "sha256:x"));
        run.preflight = Some(ended(trainer_job("j-1-preflight", Stage::Preflight, 0), passed()));
        run.attempts = vec![ended(attempt(1), trained(1))];
    });
    let step = Step::CreateVersion { run: 1, report: train_report(1) };
    let Some(Change::CreateVersion(built)) = build(&step, &observed, &image()) else { panic!() };
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
    // The job has other gates by now.
    let observed = observed_checked(gated(9.0), |run| run.task = Some(task(&gated(1.2), 1, 1, "sha256:x")));
    let step = Step::CreateVersion { run: 1, report: train_report(1) };
    let Some(Change::CreateVersion(built)) = build(&step, &observed, &image()) else { panic!() };
    let [gate] = &built.spec.gates[..] else { panic!("{:?}", built.spec.gates) };
    assert_eq!((gate.value, gate.max, gate.passed), (Some(1.5), Some(1.2), false));
}
