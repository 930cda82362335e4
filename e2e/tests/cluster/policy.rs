//! What the operator's own ServiceAccount is kept from, by the chart's ValidatingAdmissionPolicy.

use anyhow::Result;
use kube::api::{DeleteParams, PostParams};
use serde_json::json;

use crate::{tenant::Tenant, testbed::OPERATOR_NAMESPACE};

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
