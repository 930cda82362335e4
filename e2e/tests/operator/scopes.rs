//! An operator that serves some namespaces only.

use anyhow::Result;
use k8s_openapi::api::batch::v1::Job;
use kube::{Api, api::ListParams};
use tunesmith_crds::{FineTuneJob, FineTuneRun};
use tunesmith_e2e::operator_bench::Stage;

use crate::stage;

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_of_two_namespaces_serves_them_and_may_not_look_elsewhere() -> Result<()> {
    let mut stage = stage("tunesmith-scopes", 3).await?;
    let [red, blue, other] = [0, 1, 2].map(Stage::namespace);
    for namespace in [&red, &blue, &other] {
        stage.submit(namespace, "bot").await?;
    }
    stage.upgrade(&[&format!("watchNamespaces={{{red},{blue}}}")]).await?;
    stage.start_operator().await?;
    for namespace in [&red, &blue] {
        stage.until_phase(namespace, "bot", "Succeeded").await?;
    }
    let foreign: FineTuneJob = Api::namespaced(stage.client(), &other).get("bot").await?;
    let phase = foreign.status.and_then(|status| status.phase);
    assert_eq!(phase, None, "it was served");
    assert!(
        Api::<FineTuneRun>::namespaced(stage.client(), &other).list(&ListParams::default()).await?.items.is_empty()
    );
    assert!(Api::<Job>::namespaced(stage.client(), &other).list(&ListParams::default()).await?.items.is_empty());

    let account = format!("--as={}", Stage::OPERATOR);
    let may = |verb: &str, resource: &str, scope: &[&str]| -> Result<bool> {
        let words = ["auth", "can-i", verb].into_iter().chain(resource.split(' ')).chain([account.as_str()]);
        let answer = stage.kubectl().args(words).args(scope).output()?;
        Ok(String::from_utf8_lossy(&answer.stdout).trim() == "yes")
    };
    for (verb, resource) in [
        ("list", "finetunejobs"),
        ("watch", "finetuneruns"),
        ("create", "finetuneruns"),
        ("patch", "finetunejobs --subresource=status"),
        ("create", "jobs.batch"),
        ("list", "pods"),
        ("list", "resourcequotas"),
        ("create", "events.events.k8s.io"),
    ] {
        for namespace in [&red, &blue] {
            assert!(may(verb, resource, &["-n", namespace])?, "{verb} {resource} in {namespace}");
        }
        for scope in [&["-n", other.as_str()][..], &["-n", "kube-system"], &["--all-namespaces"]] {
            assert!(!may(verb, resource, scope)?, "may {verb} {resource} with {scope:?}");
        }
    }
    assert!(may("list", "nodes", &[])? && may("patch", "gpuclasses", &[])?);
    for verb in ["get", "list", "watch"] {
        assert!(!may(verb, "secrets", &["-n", &red])?, "may {verb} Secrets");
    }
    // It needs no right that it lacks.
    let log = stage.log()?;
    assert!(!log.to_lowercase().contains("forbidden"), "{log}");
    Ok(())
}
