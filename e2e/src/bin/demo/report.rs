//! What came out: the record, the files, the losses, and answers before and after.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use futures::TryStreamExt;
use kube::ResourceExt;
use object_store::path::Path as Key;
use object_store::{ObjectStore, ObjectStoreExt};
use tunesmith_crds::{AdapterVersion, Cloud, Uri};
use tunesmith_e2e::run;

use crate::inputs::Inputs;
use crate::target::Target;

/// What customers ask, in words that the training data does not have.
const QUESTIONS: [&str; 3] = [
    "If I signed up for Fjord 5 today, what amount would show on each bill?",
    "My allowance is empty and pages load like treacle. What rate have you dropped me to?",
    "I have a few gigs spare. What's their shelf life?",
];

/// Prints the version, its files, its losses, where the loss curve is, and the answers of both models.
pub(crate) async fn print(target: &Target, inputs: &Inputs, version: &AdapterVersion) -> Result<()> {
    let Uri::Bucket { cloud: Cloud::S3, bucket, key } = &version.spec.artifact.uri else {
        bail!("the demo publishes to S3")
    };
    let store = target.s3.bucket(bucket)?;

    println!("\nAdapterVersion {}", version.name_any());
    println!("{}", version.spec.artifact.uri);
    let mut objects: Vec<_> = store.list(Some(&Key::from(key.as_str()))).try_collect().await?;
    objects.sort_by(|a, b| a.location.cmp(&b.location));
    for object in objects {
        let name = object.location.as_ref().trim_start_matches(key.as_str()).trim_start_matches('/');
        println!("  {:>12} {name}", object.size);
    }

    let metrics = &version.spec.metrics;
    let loss = |value: Option<f64>| value.map_or("not measured".into(), |loss| format!("{loss:.3}"));
    println!("\nEval loss: {} before, {} after", loss(metrics.base_eval_loss), loss(metrics.eval_loss));

    let curve = Path::new("demo-output/loss_curve.svg");
    let content = store.get(&Key::from(format!("{key}/loss_curve.svg"))).await?.bytes().await?;
    fs::create_dir_all("demo-output").and_then(|()| fs::write(curve, content)).context("cannot write demo-output/")?;
    println!("Loss curve: {}", curve.display());

    for question in QUESTIONS {
        println!("\n“{question}”");
        println!("  base   {}", answer(target, inputs, None, question)?);
        println!("  tuned  {}", answer(target, inputs, Some(&version.spec.artifact.uri), question)?);
    }
    Ok(())
}

fn answer(target: &Target, inputs: &Inputs, adapter: Option<&Uri>, question: &str) -> Result<String> {
    let mut generate = target.trainer();
    generate.args(["generate", "--system", &inputs.system, "--prompt", question, "--model"]).arg(&inputs.model);
    if let Some(adapter) = adapter {
        generate.args(["--adapter", &adapter.to_string()]);
    }
    let written = run(&mut generate)?;
    Ok(written.trim().replace('\n', "\n         "))
}
