//! The job and what it stands on: a namespace under the strictest rules, and a Secret with the keys to the store.

use std::collections::BTreeMap;

use anyhow::Result;
use serde_json::json;
use tunesmith_e2e::{Step, repository, run, run_with_input};

use crate::target::Target;

/// The tenant's namespace, as the example's manifests have it.
pub(crate) const NAMESPACE: &str = "telecom";
/// The job's name.
pub(crate) const NAME: &str = "telecom-support";

/// `kubectl apply -f examples/telecom-support/finetunejob.yaml`.
pub(crate) fn apply(target: &Target) -> Result<()> {
    let step = Step::start("namespace telecom with its Secret");
    let keys: BTreeMap<_, _> = target.s3.env().into_iter().collect();
    let objects = json!({"apiVersion": "v1", "kind": "List", "items": [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {
            "name": NAMESPACE,
            "labels": {"pod-security.kubernetes.io/enforce": "restricted"},
        }},
        {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s3-credentials", "namespace": NAMESPACE},
            "stringData": keys},
    ]});
    // Server-side: a client-side apply would write the keys into an annotation too.
    run_with_input(target.kubectl().args(["apply", "--server-side", "--filename=-"]), &objects.to_string())?;
    step.done();

    let example = repository().join("examples").join(NAME).join("finetunejob.yaml");
    let step = Step::start("kubectl apply -f examples/telecom-support/finetunejob.yaml");
    run(target.kubectl().args(["apply", "--filename"]).arg(example))?;
    step.done();
    Ok(())
}
