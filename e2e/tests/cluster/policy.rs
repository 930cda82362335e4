//! What the chart keeps the operator's ServiceAccount and the trainer's pods from.

use anyhow::{Context, Result};
use k8s_openapi::{
    api::{
        core::v1::{Namespace, Pod},
        networking::v1::NetworkPolicy,
    },
    apimachinery::pkg::apis::meta::v1::LabelSelector,
};
use kube::{
    Api, ResourceExt,
    api::{DeleteParams, ListParams, PostParams},
};
use serde_json::json;
use tunesmith_crds::FineTuneJobPhase;
use tunesmith_e2e::{repository, run, run_with_input};

use crate::{
    tenant::{Tenant, message},
    testbed::OPERATOR_NAMESPACE,
};

#[tokio::test(flavor = "multi_thread")]
async fn the_operators_account_touches_its_own_objects_alone() -> Result<()> {
    let team = Tenant::new("account").await?;
    let job = json!({
        "metadata": {"name": "foreign"},
        "spec": {"suspend": true, "template": {"spec": {
            "restartPolicy": "Never", "containers": [{"name": "c", "image": "none"}],
        }}},
    });
    let jobs = team.api::<k8s_openapi::api::batch::v1::Job>();
    jobs.create(&PostParams::default(), &serde_json::from_value(job)?).await?;

    let account = format!("--as=system:serviceaccount:{OPERATOR_NAMESPACE}:tunesmith-operator");
    let answer = |arguments: &[&str]| -> Result<String> {
        let namespace = ["-n", &team.namespace, &account];
        let output = team.cluster.kubectl().args(namespace).args(arguments).output()?;
        Ok(String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned())
    };
    let own = "metadata: {labels: {app.kubernetes.io/managed-by: tunesmith-operator}}";
    for (arguments, words) in [
        (
            &["create", "job", "new", "--image=none"][..],
            "denied request: the operator works on objects with its own label",
        ),
        (&["delete", "job", "foreign"], "denied request: the operator works on objects with its own label"),
        (&["patch", "job", "foreign", "--type=merge", "-p", own], "denied request: the operator makes no object"),
    ] {
        let answer = answer(arguments)?;
        assert!(answer.contains(words), "{arguments:?}: {answer}");
    }
    jobs.delete("foreign", &DeleteParams::background()).await?;
    Ok(())
}

/// The labels that a selector asks for, as a list call takes them.
fn labels(selector: &LabelSelector) -> ListParams {
    let labels: Vec<_> = selector.match_labels.iter().flatten().map(|(key, value)| format!("{key}={value}")).collect();
    ListParams::default().labels(&labels.join(","))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_without_credentials_asks_no_node_for_its_own_and_a_network_policy_forbids_it() -> Result<()> {
    let team = Tenant::new("nobody").await?;
    team.apply(&team.job("nobody", json!({"output": {"secretRef": null}}))).await?;
    let job = team.until_phase("nobody", FineTuneJobPhase::Failed).await?;
    assert!(message(&job).contains("nothing says who asks: set AWS_ACCESS_KEY_ID"), "{}", message(&job));

    let chart = repository().join("charts/tunesmith");
    let policy = run(team
        .cluster
        .helm()
        .args(["template", "tunesmith"])
        .arg(chart)
        .args(["--namespace", OPERATOR_NAMESPACE, "--show-only", "templates/networkpolicy.yaml"])
        .args(["--set", &format!("networkPolicy.namespaces={{{}}}", team.namespace)]))?;
    run_with_input(team.cluster.kubectl().args(["apply", "-f", "-"]), &policy)?;
    let policy: NetworkPolicy = team.api().get("tunesmith-trainer").await?;
    let spec = policy.spec.context("a spec")?;
    let selected = team.api::<Pod>().list(&labels(&spec.pod_selector.context("a selector")?)).await?;
    let all = team.pods("nobody", None).await?;
    assert!(!all.is_empty());
    assert_eq!(
        selected.iter().map(ResourceExt::name_any).collect::<Vec<_>>(),
        all.iter().map(ResourceExt::name_any).collect::<Vec<_>>()
    );

    // Whoever may come in is the operator.
    let ingress = spec.ingress.unwrap_or_default();
    let peers: Vec<_> = ingress.iter().flat_map(|rule| rule.from.iter().flatten()).collect();
    let [peer] = peers[..] else { panic!("{peers:?}") };
    let namespaces = Api::<Namespace>::all(team.client.clone());
    let namespaces = namespaces.list(&labels(peer.namespace_selector.as_ref().context("namespaces")?)).await?;
    assert_eq!(namespaces.iter().map(ResourceExt::name_any).collect::<Vec<_>>(), [OPERATOR_NAMESPACE]);
    let operators = Api::<Pod>::namespaced(team.client.clone(), OPERATOR_NAMESPACE);
    let operators = operators.list(&labels(peer.pod_selector.as_ref().context("pods")?)).await?;
    assert!(operators.iter().count() > 0, "the operator's own pod is not let in");
    Ok(())
}
