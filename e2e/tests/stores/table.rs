//! What each kind of store has to do.

use std::{fs, process::Command, thread};

use anyhow::{Context, Result, ensure};
use serde_json::json;
use tokio::runtime::Runtime;
use tunesmith_crds::{
    adapter_version::{Artifact, ArtifactType},
    names::exit_code,
    run::Verdict,
};
use tunesmith_e2e::{programs_folder, run as run_program};
use tunesmith_trainer::{
    publish::Manifest,
    store::{Created, Location, Role, StoreError, Stores},
    verify::verify,
};

use crate::server::{BUCKETS, Server, Variables};

type Case = fn(&Bench) -> Result<()>;

/// Every case, by what it shows.
const CASES: [(&str, Case); 7] = [
    ("objects are written, listed, matched, read and deleted", objects),
    ("one of many that create the same object wins", claims),
    ("large objects go up in parts and come down in ranges", large_objects),
    ("a bucket that is not there is bad input", no_bucket),
    ("each identity that the store accepts reads", identities),
    ("an identity that the store refuses is bad input, and is not shown", refusals),
    ("a run publishes, a second one finds it, and the version is verified", a_run),
];

/// Runs all cases against a server.
pub fn run(server: &Server) -> Result<()> {
    let runtime = Runtime::new()?;
    let bench = Bench { server, stores: stores(&runtime, &server.variables), runtime };
    for (name, case) in CASES {
        case(&bench).with_context(|| format!("{}: {name}", server.scheme()))?;
        println!("{}: {name}", server.scheme());
    }
    Ok(())
}

struct Bench<'a> {
    server: &'a Server,
    stores: Stores,
    runtime: Runtime,
}

/// Stores with these keys in the output's Secret.
fn stores(runtime: &Runtime, variables: &Variables) -> Stores {
    let prefixed = [Role::Model, Role::Dataset, Role::Output].into_iter().flat_map(|role| {
        variables.iter().map(move |(name, value)| (format!("{}{name}", role.env_prefix()), value.clone()))
    });
    Stores::from_variables(runtime.handle().clone(), prefixed)
}

impl Bench<'_> {
    fn at(&self, place: &str) -> Result<Location> {
        self.of(&self.stores, place)
    }

    fn of(&self, stores: &Stores, place: &str) -> Result<Location> {
        Ok(stores.open(Role::Output, &format!("{}://{place}", self.server.scheme()).parse()?)?)
    }

    fn expand(&self, pattern: &str) -> Result<Vec<String>> {
        let uri = format!("{}://{pattern}", self.server.scheme()).parse()?;
        Ok(self.stores.expand(Role::Dataset, &uri)?.into_iter().map(|object| object.name).collect())
    }
}

fn objects(bench: &Bench) -> Result<()> {
    let names = ["50%20off.jsonl", "a b.jsonl", "a+b&c.jsonl", "q?x=1#y.jsonl", "sub/c.jsonl", "列.jsonl"];
    let folder = bench.at("datasets/in")?;
    ensure!(folder.list()?.is_empty(), "an empty folder lists {:?}", folder.list()?);
    for name in names {
        folder.join(name).write(name)?;
    }
    bench.at("datasets/other.jsonl")?.write("other")?;
    bench.at("datasets/input")?.write("its name begins as the folder's")?;
    ensure!(folder.list()? == names, "{:?}", folder.list()?);
    for name in names {
        let object = folder.join(name);
        ensure!(object.read()? == name, "{name}");
        ensure!(object.read_range(1..3)? == name.as_bytes()[1..3], "{name}");
    }
    let flat: Vec<_> = names.into_iter().filter(|name| !name.contains('/')).collect();
    ensure!(bench.expand("datasets/in/*.jsonl")? == flat);
    ensure!(bench.expand("datasets/in/**/c.*")? == ["sub/c.jsonl"]);
    ensure!(bench.expand("datasets/*.jsonl")? == ["other.jsonl"]);

    folder.join("a b.jsonl").write("overwritten")?;
    ensure!(folder.join("a b.jsonl").read()? == "overwritten");
    folder.join("a b.jsonl").delete()?;
    folder.join("a b.jsonl").delete()?;
    ensure!(folder.join("a b.jsonl").read_if_exists()?.is_none());
    let gone = folder.join("a b.jsonl").digest().err().context("it is there")?;
    ensure!(matches!(gone, StoreError::Missing { .. }) && gone.exit_code() == exit_code::BAD_INPUT, "{gone}");
    let target = tempfile::tempdir()?;
    let error = folder.download(&target.path().join("x")).err().context("a folder came down")?;
    ensure!(matches!(error, StoreError::Folder { .. }), "{error}");
    Ok(())
}

fn claims(bench: &Bench) -> Result<()> {
    let claim = bench.at("adapters/claims/v1/claim.json")?;
    let created: Vec<_> = thread::scope(|scope| {
        let racers: Vec<_> = (0..8)
            .map(|racer| {
                let claim = claim.clone();
                scope.spawn(move || (racer, claim.create(format!("racer {racer}"))))
            })
            .collect();
        racers.into_iter().filter_map(|racer| racer.join().ok()).collect()
    });
    let mut winners = Vec::new();
    for (racer, created) in created {
        if created? == Created::New {
            winners.push(racer);
        }
    }
    ensure!(winners.len() == 1, "{winners:?} won");
    ensure!(claim.read()? == format!("racer {}", winners[0]));
    ensure!(claim.create("late")? == Created::Exists);
    Ok(())
}

fn large_objects(bench: &Bench) -> Result<()> {
    let bytes: Vec<u8> = (0..20u32 << 20).map(|i| (i ^ (i >> 11)) as u8).collect();
    let whole = bench.at("adapters/large/whole")?;
    whole.write(bytes.clone())?;
    let streamed = bench.at("adapters/large/streamed")?;
    let written = streamed.stream_in(|to| bytes.chunks(100_000).try_for_each(|chunk| to.write_all(chunk)))?;
    ensure!(written.size == bytes.len() as u64);
    for object in [&whole, &streamed] {
        let digest = object.digest()?;
        ensure!((&digest.sha256, digest.size) == (&written.sha256, written.size), "{:?}", object);
        let range = 9_000_000..9_000_100;
        ensure!(object.read_range(range.start as u64..range.end as u64)? == bytes[range]);
    }
    ensure!(bench.at("adapters/large")?.list()? == ["streamed", "whole"], "an upload's parts are listed");
    Ok(())
}

fn no_bucket(bench: &Bench) -> Result<()> {
    let object = bench.at("absent-bucket/folder/object")?;
    for error in [object.read().err(), object.list().err(), object.create("x").err(), object.write("x").err()] {
        let error = error.context("a bucket that is not there was used")?;
        ensure!(error.exit_code() == exit_code::BAD_INPUT, "{error}");
        ensure!(error.to_string().contains("://absent-bucket/folder/object (output)"), "{error}");
    }
    Ok(())
}

fn identities(bench: &Bench) -> Result<()> {
    for (variables, bucket) in &bench.server.identities {
        let object = bench.of(&stores(&bench.runtime, variables), &format!("{bucket}/who"))?;
        object.write("me").with_context(|| format!("{:?}", variables.last()))?;
        ensure!(object.read()? == "me" && object.create("x")? == Created::Exists);
        let listed = object.list().with_context(|| format!("{:?}", variables.last()))?;
        ensure!(listed.is_empty(), "{listed:?}");
        // Azurite knows no batch under a shared access signature, and the client deletes in batches.
        bench.at(&format!("{bucket}/who"))?.delete()?;
    }
    Ok(())
}

fn refusals(bench: &Bench) -> Result<()> {
    bench.at("models/secret.txt")?.write("x")?;
    for (variables, words, secret) in &bench.server.refused {
        let object = bench.of(&stores(&bench.runtime, variables), "models/secret.txt")?;
        for error in [object.read().err(), object.list().err(), object.create("x").err(), object.write("x").err()] {
            let error = error.with_context(|| format!("{words}: not refused"))?;
            ensure!(matches!(error, StoreError::Refused { .. }), "{error}");
            ensure!(error.exit_code() == exit_code::BAD_INPUT, "{error}");
            ensure!(error.to_string().contains(words) && !error.to_string().contains(secret), "{error}");
        }
    }
    bench.at("models/secret.txt")?.delete()?;
    Ok(())
}

fn a_run(bench: &Bench) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let model = folder.path().join("model");
    run_program(Command::new(programs_folder().join("examples/tiny_model")).arg(&model))?;
    for file in fs::read_dir(&model)? {
        let file = file?;
        let name = file.file_name().to_string_lossy().into_owned();
        bench.at(&format!("{}/tiny/{name}", BUCKETS[0]))?.write(fs::read(file.path())?)?;
    }
    for part in 0..2 {
        let row = |i: usize| format!("{}\n", json!({"prompt": format!("what is {i}?"), "completion": "a number"}));
        let rows: String = (0..10).map(|i| row(10 * part + i)).collect();
        bench.at(&format!("datasets/run/part-{part}.jsonl"))?.write(rows)?;
    }
    let scheme = bench.server.scheme();
    let job = json!({
        "apiVersion": "tunesmith.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": "support"},
        "spec": {
            "baseModel": {"uri": format!("{scheme}://models/tiny")},
            "dataset": {"train": {"uri": format!("{scheme}://datasets/run/part-*.jsonl")}, "evalFraction": 0.2},
            "method": "LoRA", "lora": {"rank": 2},
            "training": {"maxSteps": 4, "saveSteps": 2, "loggingSteps": 1},
            "output": {"adapterName": "support", "uri": format!("{scheme}://adapters/team")},
        },
    });
    fs::write(folder.path().join("job.json"), job.to_string())?;
    let trainer = |arguments: &[&str]| {
        let mut command = Command::new(programs_folder().join("tunesmith-trainer"));
        command.args(arguments).arg("--work-dir").arg(folder.path().join("work")).current_dir(folder.path());
        // Nothing of the machine's own environment names a store.
        command.env_clear().envs(bench.server.variables.iter().map(|(name, value)| (name, value)));
        command
    };
    run_program(&mut trainer(&["run", "job.json"]))?;
    let version = bench.at("adapters/team/support/v1")?;
    let bytes = version.join("manifest.json").read()?;
    let manifest = Manifest::parse(&bytes).map_err(anyhow::Error::msg)?;
    let present = version.list()?;
    for name in ["claim.json", "manifest.json", "adapter_model.safetensors"] {
        ensure!(present.iter().any(|found| found == name), "no {name}: {present:?}");
    }
    run_program(&mut trainer(&["run", "job.json"]))?;
    ensure!(version.join("manifest.json").read()? == bytes, "a second run published again");
    ensure!(bench.at("adapters/team/support/v2")?.list()?.is_empty(), "a second run trained again");

    let report = manifest.report(version.uri(), &bytes);
    let artifact = Artifact {
        kind: ArtifactType::LoraAdapter,
        uri: version.uri().clone(),
        manifest_uri: version.join("manifest.json").uri().clone(),
        manifest_digest: report.manifest_digest,
        file_count: report.file_count,
        size_bytes: report.size_bytes,
        secret_ref: None,
        service_account_name: None,
        role_arn: None,
    };
    ensure!(verify(&artifact, &version)?.verdict == Verdict::Intact);
    let adapter = format!("{scheme}://adapters/team/support/v1");
    let model = format!("{scheme}://models/tiny");
    let answer =
        ["generate", "--model", &model, "--adapter", &adapter, "--max-new-tokens", "2", "--prompt", "what is 3?"];
    run_program(&mut trainer(&answer))?;
    let weights = version.join("adapter_model.safetensors");
    weights.write("damaged")?;
    ensure!(verify(&artifact, &version)?.verdict == Verdict::Corrupt);
    weights.delete()?;
    ensure!(verify(&artifact, &version)?.verdict == Verdict::Missing);
    Ok(())
}
