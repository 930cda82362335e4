//! The trainer as a pod runs it: a process of its own, which is told to stop, or killed.

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    net::{TcpListener, TcpStream},
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use serde_json::json;
use tempfile::TempDir;
use tunesmith_crds::{
    FineTuneJob, RunReport, RunSpec,
    digest::input_digest,
    names::exit_code,
    run::{Outcome, PreflightReport, TrainTask},
};

#[allow(dead_code, missing_docs)]
#[path = "../examples/tiny_model.rs"]
mod tiny_model;

/// Far longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long a process may live that was told to stop and has nothing to save.
const PROMPT: Duration = Duration::from_secs(5);

/// A model, data, and folders for results and downloads.
struct Bench {
    folder: TempDir,
}

impl Bench {
    fn new() -> Self {
        let bench = Self { folder: tempfile::tempdir().unwrap() };
        tiny_model::write(&bench.path("model")).unwrap();
        let row = |i: usize| {
            let completion = format!("answer number {}", i % 3);
            format!("{}\n", json!({"prompt": "what? ".repeat(1 + i % 4), "completion": completion}))
        };
        fs::write(bench.path("rows.jsonl"), (0..20).map(row).collect::<String>()).unwrap();
        bench
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A run of 80 steps with a checkpoint every 3 and an evaluation every 4.
    fn spec(&self, model: &str) -> RunSpec {
        let uri = |name: &str| format!("file://{}", self.path(name).display());
        let job: FineTuneJob = serde_json::from_value(json!({
            "apiVersion": "tunesmith.dev/v1alpha1", "kind": "FineTuneJob",
            "metadata": {"name": "support", "namespace": "telecom"},
            "spec": {
                "baseModel": {"uri": model},
                "dataset": {"train": {"uri": uri("rows.jsonl")}, "evalFraction": 0.2},
                "method": "LoRA",
                "lora": {"rank": 2, "dropout": 0.1, "targetModules": ["all-linear"]},
                "training": {"maxSteps": 80, "learningRate": 0.01, "loggingSteps": 1, "saveSteps": 3, "evalSteps": 4,
                             "loadBestModelAtEnd": true, "gradientAccumulationSteps": 2},
                "output": {"adapterName": "support", "uri": uri("adapters")},
            },
        }))
        .unwrap();
        RunSpec::preflight(&job, 1)
    }

    fn with_task(spec: RunSpec, report: PreflightReport) -> RunSpec {
        let method = spec.method.clone().unwrap();
        let task = TrainTask {
            version: 1,
            input_digest: input_digest(&spec, &method, &report),
            base_digest: report.base_digest,
            dataset_digest: report.dataset.digest,
            template_date: None,
            numerics_version: report.numerics_version,
            copy_of: None,
            trainer_image: "registry.example.com/tunesmith/tunesmith-trainer:v0.1.0".into(),
            cluster: String::new(),
        };
        spec.with_training(method, task)
    }

    /// The spec after its preflight.
    fn checked(&self) -> RunSpec {
        let spec = self.spec(&format!("file://{}", self.path("model").display()));
        let (status, report) = self.start("preflight", &spec, &[]).end();
        assert!(status.success(), "{report:?}");
        let Some(Outcome::Preflight(report)) = report else { panic!("{report:?}") };
        Self::with_task(spec, report)
    }

    fn start(&self, subcommand: &str, spec: &RunSpec, environment: &[(&str, String)]) -> Process {
        let (run_spec, report) = (self.path("run.json"), self.path("report.json"));
        fs::write(&run_spec, serde_json::to_vec(spec).unwrap()).unwrap();
        fs::write(&report, "").unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_tunesmith-trainer"));
        command.arg(subcommand).arg("--run-spec").arg(run_spec).arg("--report").arg(&report);
        command.arg("--work-dir").arg(self.path("work"));
        if subcommand == "train" {
            command.args(["--listen", "127.0.0.1:0"]);
        }
        command.envs(environment.iter().cloned()).stdout(Stdio::null()).stderr(Stdio::null());
        Process { child: command.spawn().unwrap(), report }
    }

    fn published(&self, file: &str) -> Vec<u8> {
        fs::read(self.path("adapters/support/v1").join(file)).unwrap()
    }

    /// The highest step of which there is a checkpoint, whole or not.
    fn newest_checkpoint(&self) -> u64 {
        let list = |folder: &Path| fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
        let steps =
            list(&self.path("adapters/support/checkpoints")).flat_map(|inputs| list(&inputs).collect::<Vec<_>>());
        let step = |folder: PathBuf| folder.file_name()?.to_str()?.strip_prefix("step-")?.parse().ok();
        steps.filter_map(step).max().unwrap_or(0)
    }

    fn until_checkpoint(&self, step: u64) {
        let deadline = Instant::now() + PATIENCE;
        while self.newest_checkpoint() < step {
            assert!(Instant::now() < deadline, "no checkpoint of step {step} or later");
            thread::sleep(Duration::from_millis(1));
        }
    }
}

struct Process {
    child: Child,
    report: PathBuf,
}

impl Process {
    fn terminate(&self) {
        let status = Command::new("kill").args(["-TERM", &self.child.id().to_string()]).status().unwrap();
        assert!(status.success());
    }

    /// Waits, and reads the report if there is one.
    fn end(mut self) -> (ExitStatus, Option<Outcome>) {
        let status = self.child.wait().unwrap();
        let report = fs::read_to_string(&self.report).unwrap();
        (status, RunReport::from_termination_message(&report).ok().map(|report| report.outcome))
    }
}

/// A failed test leaves no process behind.
impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill().and_then(|()| self.child.wait());
    }
}

/// xorshift64* (Vigna, 2016).
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32) % limit
    }
}

#[test]
fn a_run_that_is_killed_again_and_again_ends_with_the_same_bytes() {
    let bench = Bench::new();
    let spec = bench.checked();
    let (status, report) = bench.start("train", &spec, &[]).end();
    assert!(status.success(), "{report:?}");
    let files = ["adapter_model.safetensors", "adapter_config.json", "trainer_state.json", "loss_curve.svg"];
    let whole = files.map(|file| bench.published(file));
    fs::remove_dir_all(bench.path("adapters")).unwrap();

    // Anywhere in a step, an evaluation or the writing of a checkpoint; later and later in the run.
    let mut random = Random(u64::from(std::process::id()) << 1 | 1);
    for kill in 0..5 {
        let mut process = bench.start("train", &spec, &[]);
        bench.until_checkpoint(1 + 10 * kill + random.below(10));
        thread::sleep(Duration::from_micros(random.below(20_000)));
        process.child.kill().unwrap();
        let (status, _) = process.end();
        assert_eq!(status.signal(), Some(9), "kill {kill} came too late");
    }
    let (status, report) = bench.start("train", &spec, &[]).end();
    assert!(status.success(), "{report:?}");
    for (file, whole) in files.into_iter().zip(whole) {
        assert!(bench.published(file) == whole, "{file} differs");
    }
}

#[test]
fn a_run_that_is_told_to_stop_leaves_a_checkpoint_and_says_so() {
    let bench = Bench::new();
    let spec = bench.checked();
    let process = bench.start("train", &spec, &[]);
    bench.until_checkpoint(3);
    process.terminate();
    let (status, report) = process.end();
    assert_eq!(status.code(), Some(exit_code::PREEMPTED));
    let Some(Outcome::Preempted { step }) = report else { panic!("{report:?}") };
    assert_eq!(bench.newest_checkpoint(), step);
}

/// A store that lists a model, begins to send a file, and then stands still. Sends a message when it does.
fn stalling_store() -> (String, mpsc::Receiver<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let (stalls, stalled) = mpsc::channel();
    thread::spawn(move || {
        // Held, so that no connection is closed.
        let mut connections = Vec::new();
        for connection in listener.incoming() {
            let mut connection = connection.unwrap();
            if answer(&mut connection) {
                stalls.send(()).unwrap();
            }
            connections.push(connection);
        }
    });
    (endpoint, stalled)
}

/// Answers one request: a list in full, a file in part. Tells whether it was a file.
fn answer(connection: &mut TcpStream) -> bool {
    let mut lines = BufReader::new(connection.try_clone().unwrap()).lines().map_while(Result::ok);
    let request = lines.next().unwrap_or_default();
    for _ in lines.take_while(|line| !line.is_empty()) {}
    if request.contains("list-type=2") {
        let object = |name: &str| {
            format!(
                "<Contents><Key>tiny/{name}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>\
                 <ETag>\"0\"</ETag><Size>1000000</Size></Contents>"
            )
        };
        let files = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"].map(object);
        let body = format!("<ListBucketResult><IsTruncated>false</IsTruncated>{}</ListBucketResult>", files.concat());
        write!(connection, "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}", body.len())
            .unwrap();
        return false;
    }
    let headers = "Content-Length: 1000000\r\nETag: \"0\"\r\nLast-Modified: Thu, 01 Jan 2026 00:00:00 GMT";
    write!(connection, "HTTP/1.1 200 OK\r\n{headers}\r\n\r\n{{").unwrap();
    true
}

#[test]
fn a_pod_that_is_told_to_stop_in_the_middle_of_a_download_ends_at_once() {
    let bench = Bench::new();
    let digest = || format!("sha256:{}", "0".repeat(64));
    let task = TrainTask {
        version: 1,
        input_digest: digest(),
        base_digest: digest(),
        dataset_digest: digest(),
        trainer_image: "tunesmith-trainer:dev".into(),
        template_date: Some("2026-11-27".into()),
        numerics_version: 0,
        copy_of: None,
        cluster: String::new(),
    };
    let preflight = bench.spec("s3://models/tiny");
    let method = preflight.method.clone().unwrap();
    for (subcommand, spec) in [("train", preflight.clone().with_training(method, task)), ("preflight", preflight)] {
        let (endpoint, stalled) = stalling_store();
        let secrets = [("ENDPOINT_URL", endpoint.as_str()), ("ACCESS_KEY_ID", "k"), ("SECRET_ACCESS_KEY", "s")];
        let names = secrets.map(|(name, _)| format!("TUNESMITH_MODEL_AWS_{name}"));
        let environment: Vec<_> =
            names.iter().zip(secrets).map(|(name, (_, value))| (name.as_str(), value.to_owned())).collect();
        let process = bench.start(subcommand, &spec, &environment);
        stalled.recv_timeout(PATIENCE).unwrap();
        let told = Instant::now();
        process.terminate();
        let (status, _) = process.end();
        assert_eq!(status.code(), Some(exit_code::PREEMPTED), "{subcommand}");
        assert!(told.elapsed() < PROMPT, "{subcommand} took {:?}", told.elapsed());
    }
}

/// Runs a subcommand for people on a manifest, in an environment with nothing but `variables`.
fn check_manifest(bench: &Bench, variables: &[(&str, &str)]) -> (Option<i32>, String) {
    let uri = |name: &str| format!("file://{}", bench.path(name).display());
    let manifest = json!({
        "apiVersion": "tunesmith.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": "support"},
        "spec": {
            "baseModel": {"uri": "s3://models/tiny"},
            "dataset": {"train": {"uri": uri("rows.jsonl")}, "evalFraction": 0.2},
            "output": {"adapterName": "support", "uri": uri("adapters")},
        },
    });
    fs::write(bench.path("job.json"), manifest.to_string()).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_tunesmith-trainer"));
    command.arg("check").arg(bench.path("job.json")).arg("--work-dir").arg(bench.path("work"));
    command.arg("--store").arg(bench.path("store")).env_clear().envs(variables.iter().copied());
    let output = command.stdin(Stdio::null()).output().unwrap();
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn no_value_of_the_environment_makes_a_panic_and_each_is_named_without_its_secret() {
    let bench = Bench::new();
    let sound = [
        ("AWS_ENDPOINT_URL", "http://127.0.0.1:9"),
        ("AWS_ACCESS_KEY_ID", "k3y"),
        ("AWS_SECRET_ACCESS_KEY", "s3cr3t"),
        ("RUST_BACKTRACE", "0"),
    ];
    for (name, value) in [
        ("AWS_ENDPOINT_URL", "host:9000"),
        ("AWS_ENDPOINT_URL", "http://"),
        ("AWS_ENDPOINT_URL_S3", "host"),
        ("AWS_REGION", "eu central\n1"),
        ("AWS_ACCESS_KEY_ID", "k3y\nk3y"),
        ("AWS_SESSION_TOKEN", "t0k\u{f6}n"),
        ("AWS_TIMEOUT", "soon"),
        ("AWS_CA_BUNDLE", "/absent"),
        ("HTTPS_PROXY", "http://me:pa55@"),
        ("SSL_CERT_FILE", "/absent"),
        ("RUST_LOG", "trainer=loud"),
    ] {
        let variables: Vec<_> =
            sound.iter().copied().filter(|(other, _)| *other != name).chain([(name, value)]).collect();
        let (code, text) = check_manifest(&bench, &variables);
        assert_eq!(code, Some(exit_code::BAD_SPEC), "{name}: {text}");
        assert!(text.contains(name) && !text.contains("panicked"), "{name}: {text}");
        assert!(["k3y", "s3cr3t", "t0k", "pa55"].iter().all(|secret| !text.contains(secret)), "{name}: {text}");
    }
    let (code, text) = check_manifest(&bench, &[("AWS_PROFILE", "work")]);
    assert_eq!(code, Some(exit_code::BAD_INPUT), "{text}");
    assert!(text.contains("AWS_PROFILE is not read here"), "{text}");
}

#[test]
fn an_error_of_a_file_brings_no_backtrace() {
    let bench = Bench::new();
    fs::write(bench.path("bad.gguf"), [&b"GGUF"[..], &[0xff; 100]].concat()).unwrap();
    for model in ["bad.gguf", "model"] {
        let convert = Command::new(env!("CARGO_BIN_EXE_tunesmith-trainer"))
            .args(["convert".as_ref(), bench.path(model).as_os_str(), "--out".as_ref(), bench.path("out").as_os_str()])
            .env("RUST_BACKTRACE", "1")
            .output()
            .unwrap();
        let error = String::from_utf8(convert.stderr).unwrap();
        assert_eq!((convert.status.code(), error.lines().count()), (Some(exit_code::BAD_INPUT), 1), "{error}");
        assert!(error.contains(model) && (model == "bad.gguf" || !error.contains("download it again")), "{error}");
    }
}

#[test]
fn a_setting_of_the_command_line_that_can_not_be_is_named() {
    for (option, value) in
        [("--temperature", "nan"), ("--top-p", "0"), ("--top-p", "1.1"), ("--repetition-penalty", "0")]
    {
        let generate = Command::new(env!("CARGO_BIN_EXE_tunesmith-trainer"))
            .args(["generate", "--model", "/nowhere", "--prompt", "a", option, value])
            .output()
            .unwrap();
        let error = String::from_utf8(generate.stderr).unwrap();
        assert_eq!(generate.status.code(), Some(exit_code::BAD_SPEC), "{error}");
        assert!(error.contains(&format!("invalid value '{value}' for '{option}")), "{error}");
    }
}
