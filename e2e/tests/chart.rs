//! The chart: it lints, refuses wrong values, and grants the operator nothing that it should not have.

use std::process::Command;

use anyhow::{Context, Result};
use serde_json::Value;
use tunesmith_e2e::{Toolchain, repository, run};

fn helm(arguments: &[&str]) -> Result<String> {
    let tools = Toolchain::new()?;
    tools.install()?;
    let chart = repository().join("charts/tunesmith");
    run(Command::new(tools.program("helm")).args(&arguments[..1]).arg("tunesmith").arg(chart).args(&arguments[1..]))
}

/// The objects that the chart makes of these flags.
fn template(flags: &[&str]) -> Result<Vec<Value>> {
    let text = helm(&[&["template"], flags].concat())?;
    let objects: Vec<Value> = serde_saphyr::from_multiple(&text)?;
    Ok(objects.into_iter().filter(|object| !object.is_null()).collect())
}

fn find<'a>(objects: &'a [Value], kind: &str) -> Vec<&'a Value> {
    objects.iter().filter(|object| object["kind"] == kind).collect()
}

#[test]
fn the_chart_lints() -> Result<()> {
    let tools = Toolchain::new()?;
    tools.install()?;
    run(Command::new(tools.program("helm")).args(["lint", "--strict"]).arg(repository().join("charts/tunesmith")))?;
    Ok(())
}

#[test]
fn the_operator_may_not_touch_secrets() -> Result<()> {
    let objects = template(&[])?;
    let roles = [find(&objects, "ClusterRole"), find(&objects, "Role")].concat();
    assert!(roles.len() >= 4);
    for rule in roles.iter().flat_map(|role| role["rules"].as_array().into_iter().flatten()) {
        let list = |key: &str| rule[key].as_array().cloned().unwrap_or_default();
        for resource in list("resources") {
            assert!(resource != "secrets" && resource != "*", "{rule}");
        }
        assert!(!list("verbs").contains(&"*".into()), "{rule}");
    }
    Ok(())
}

#[test]
fn records_are_written_by_the_operator_alone_and_config_maps_not_even_by_it() -> Result<()> {
    let objects = template(&[])?;
    let roles = find(&objects, "ClusterRole");
    let verbs = |role: &Value, resource: &str| -> Vec<String> {
        let rules = role["rules"].as_array().into_iter().flatten();
        let about = rules.filter(|rule| rule["resources"].as_array().is_some_and(|all| all.contains(&resource.into())));
        about
            .flat_map(|rule| serde_json::from_value::<Vec<String>>(rule["verbs"].clone()).unwrap_or_default())
            .collect()
    };
    for role in roles {
        let name = role["metadata"]["name"].as_str().unwrap_or_default();
        let writes = ["create", "update", "patch", "delete", "deletecollection"];
        assert!(verbs(role, "configmaps").is_empty(), "{name} may do something with ConfigMaps");
        let records = [verbs(role, "finetuneruns"), verbs(role, "finetuneruns/status")].concat();
        let is_operator = name == "tunesmith-operator";
        assert!(is_operator || !records.iter().any(|verb| writes.contains(&verb.as_str())), "{name}: {records:?}");
    }
    Ok(())
}

#[test]
fn crds_are_kept_when_the_chart_goes_and_can_be_left_out() -> Result<()> {
    let objects = template(&[])?;
    let crds = find(&objects, "CustomResourceDefinition");
    assert_eq!(crds.len(), 4);
    for crd in crds {
        assert_eq!(crd["metadata"]["annotations"]["helm.sh/resource-policy"], "keep");
    }
    assert!(find(&template(&["--set", "crds.install=false"])?, "CustomResourceDefinition").is_empty());
    Ok(())
}

#[test]
fn the_default_classes_give_full_four_a100s_and_lora_one_consumer_gpu() -> Result<()> {
    let classes = |flags: &[&str]| -> Result<Value> {
        let objects = template(flags)?;
        let file = objects.iter().find_map(|object| object["data"]["gpu-classes.yaml"].as_str()).context("no file")?;
        Ok(serde_saphyr::from_str(file)?)
    };
    let defaults = classes(&[])?;
    let offers = |name: &str| -> Result<String> {
        Ok(defaults.get(name).with_context(|| format!("no class {name}"))?["methods"].to_string())
    };
    assert_eq!(offers("a100-80gb")?, r#"[{"gpus":4,"method":"Full"}]"#);
    assert_eq!(offers("consumer-24gb")?, r#"[{"gpus":1,"method":"LoRA"},{"gpus":1,"method":"QLoRA"}]"#);
    let cpu = ["Full", "LoRA", "QLoRA"].map(|method| format!(r#"{{"gpus":0,"method":"{method}"}}"#));
    assert_eq!(offers("cpu")?, format!("[{}]", cpu.join(",")));
    assert_eq!(classes(&["--set", "gpuClasses.cpu=null"])?.as_object().map(|classes| classes.len()), Some(2));
    let none = ["cpu", "a100-80gb", "consumer-24gb"].map(|name| format!("gpuClasses.{name}=null")).join(",");
    assert_eq!(classes(&["--set", &none])?, Value::Null);
    Ok(())
}

/// The resources about which a role's rules are.
fn resources(role: &Value) -> Vec<String> {
    let rules = role["rules"].as_array().into_iter().flatten();
    let lists = rules.flat_map(|rule| rule["resources"].as_array().cloned().unwrap_or_default());
    lists.filter_map(|resource| Some(resource.as_str()?.to_owned())).collect()
}

#[test]
fn listed_namespaces_are_all_that_the_operator_is_let_into() -> Result<()> {
    let name = "tunesmith-operator";
    let of_operator = |objects: &[Value], kind: &str| -> Vec<Value> {
        let own = find(objects, kind).into_iter().filter(|object| object["metadata"]["name"] == name);
        own.cloned().collect()
    };
    let objects = template(&["--set", "watchNamespaces={red,blue}"])?;
    assert_eq!(resources(&of_operator(&objects, "ClusterRole")[0]), ["gpuclasses", "nodes"]);
    for kind in ["Role", "RoleBinding"] {
        let places: Vec<_> =
            of_operator(&objects, kind).into_iter().map(|role| role["metadata"]["namespace"].clone()).collect();
        assert_eq!(places, ["red", "blue"]);
    }
    let env = find(&objects, "Deployment")[0]["spec"]["template"]["spec"]["containers"][0]["env"].to_string();
    assert!(env.contains(r#"{"name":"WATCH_NAMESPACES","value":"red,blue"}"#), "{env}");

    let everywhere = template(&[])?;
    assert!(of_operator(&everywhere, "Role").is_empty());
    let mut cluster_wide = resources(&of_operator(&everywhere, "ClusterRole")[0]);
    let mut both =
        [resources(&of_operator(&objects, "ClusterRole")[0]), resources(&of_operator(&objects, "Role")[0])].concat();
    (cluster_wide.sort(), both.sort());
    assert_eq!(cluster_wide, both);
    Ok(())
}

#[test]
fn trainer_pods_of_named_namespaces_get_a_network_policy() -> Result<()> {
    assert!(find(&template(&[])?, "NetworkPolicy").is_empty());
    let objects = template(&["--set", "networkPolicy.namespaces={red}"])?;
    let policy = find(&objects, "NetworkPolicy")[0];
    assert_eq!(policy["metadata"]["namespace"], "red");
    assert!(policy["spec"]["egress"].to_string().contains("169.254.169.254/32"));
    Ok(())
}

#[test]
fn the_operator_runs_restricted_with_the_images_it_is_given() -> Result<()> {
    let objects = template(&["--set", "operator.image=o:1,trainer.image=t:1,operator.replicas=2"])?;
    let deployment = &find(&objects, "Deployment")[0]["spec"];
    assert_eq!(deployment["replicas"], 2);
    let pod = &deployment["template"]["spec"];
    let container = &pod["containers"][0];
    assert_eq!(container["image"], "o:1");
    assert_eq!(pod["securityContext"]["runAsNonRoot"], true);
    assert_eq!(container["securityContext"]["readOnlyRootFilesystem"], true);
    assert_eq!(container["securityContext"]["allowPrivilegeEscalation"], false);
    assert!(container["env"].to_string().contains(r#"{"name":"TRAINER_IMAGE","value":"t:1"}"#));
    assert!(find(&objects, "ServiceMonitor").is_empty());
    assert_eq!(find(&template(&["--set", "metrics.serviceMonitor.enabled=true"])?, "ServiceMonitor").len(), 1);
    Ok(())
}

#[test]
fn wrong_values_are_refused_by_name() {
    for (flags, name) in [
        (["--set", "operator.replicas=0"], "replicas"),
        (["--set", "operatr.image=x"], "operatr"),
        (["--set", "trainer.imagePullPolicy=Sometimes"], "imagePullPolicy"),
        (["--set", "trainer.devices={tpu}"], "devices"),
        (["--set", "watchNamespaces={Red}"], "watchNamespaces"),
        (["--set", "gpuClasses.mine.methods[0].method=Auto"], "method"),
    ] {
        let error = template(&flags).expect_err(name).to_string();
        assert!(error.contains(name), "{error}");
    }
}
