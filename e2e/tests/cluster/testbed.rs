//! The cluster that the tests share: up once, with the operator installed and a tiny model to train.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result};
use object_store::{ObjectStoreExt, PutPayload, path::Path as Key};
use tunesmith_e2e::{Cluster, Images, S3, Step, Toolchain, programs_folder, repository, run};

/// Runs beside a demo's cluster.
const NAME: &str = "tunesmith-e2e";
const SUBNET: u8 = 1;
/// Namespace of the operator.
pub const OPERATOR_NAMESPACE: &str = "tunesmith-system";
/// A random model of two small blocks, with a tokenizer and a chat template.
pub const TINY_MODEL: &str = "s3://models/tiny";

/// GpuClasses of the first release, for the test that upgrades it. Their names sort last, so that no other test is given one.
const UPGRADE_CLASSES: &[&str] = &[
    r#"gpuClasses.zz-upgrade-used={"methods": [{"method": "LoRA", "gpus": 0}]}"#,
    r#"gpuClasses.zz-upgrade-unused={"methods": [{"method": "LoRA", "gpus": 0}]}"#,
    r#"gpuClasses.zz-upgrade-changed={"methods": [{"method": "LoRA", "gpus": 0}]}"#,
];

/// The shared cluster. The first caller brings it up, the others wait.
pub fn cluster() -> Result<Cluster> {
    static UP: Mutex<bool> = Mutex::new(false);
    let mut up = UP.lock().unwrap_or_else(PoisonError::into_inner);
    let cluster = Cluster::new(NAME, SUBNET)?;
    if !*up {
        bring_up(&cluster).context("the tests' cluster")?;
        *up = true;
    }
    Ok(cluster)
}

fn bring_up(cluster: &Cluster) -> Result<()> {
    Toolchain::new()?.install()?;
    let images = Images::build()?;
    cluster.up()?;
    cluster.load(&[&images.operator, &images.trainer])?;

    let step = Step::start("tunesmith, by its chart");
    release(cluster, UPGRADE_CLASSES)?;
    step.done();

    let step = Step::start("a tiny model in S3");
    let folder = tiny_model()?;
    upload_blocking(&cluster.s3()?, "models", "tiny", &folder)?;
    step.done();
    Ok(())
}

/// Installs the chart, or upgrades its release, with these values beside those that all tests need.
pub fn release(cluster: &Cluster, values: &[&str]) -> Result<()> {
    let images = Images::last_built()?.context("no images: they are built before the cluster comes up")?;
    run(cluster
        .helm()
        .args(["upgrade", "--install", "tunesmith"])
        .arg(repository().join("charts/tunesmith"))
        .args(["--namespace", OPERATOR_NAMESPACE, "--create-namespace", "--wait", "--timeout", "3m"])
        .args(["--set", &format!("operator.image={}", images.operator.reference)])
        .args(["--set", &format!("trainer.image={}", images.trainer.reference)])
        // Extended resources play the part of GPUs: what waits for them is real, what computes is a CPU.
        .args(["--set", "trainer.devices={cpu,cuda}"])
        .args(values.iter().flat_map(|value| ["--set-json", value])))?;
    Ok(())
}

/// Writes the tiny model with the trainer's own example program.
pub fn tiny_model() -> Result<PathBuf> {
    let folder = std::env::temp_dir().join("tunesmith-tiny-model");
    run(Command::new(programs_folder().join("examples/tiny_model")).arg(&folder))?;
    Ok(folder)
}

/// Copies a folder's files to `bucket/prefix/`.
pub async fn upload(s3: &S3, bucket: &str, prefix: &str, folder: &Path) -> Result<()> {
    let store = s3.bucket(bucket)?;
    let files = std::fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    for path in files.filter_map(|entry| entry.ok()).map(|entry| entry.path()).filter(|path| path.is_file()) {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        store.put(&Key::from(format!("{prefix}/{name}")), PutPayload::from(std::fs::read(&path)?)).await?;
    }
    Ok(())
}

/// [`upload`] from code that runs in no async runtime, or in one that must not be blocked for long.
fn upload_blocking(s3: &S3, bucket: &str, prefix: &str, folder: &Path) -> Result<()> {
    std::thread::scope(|scope| {
        let work = scope.spawn(|| tokio::runtime::Runtime::new()?.block_on(upload(s3, bucket, prefix, folder)));
        work.join().unwrap_or_else(|_| anyhow::bail!("the upload panicked"))
    })
}
