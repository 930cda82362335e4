//! `cargo bench -p tunesmith-engine`: LoRA r = 8 on q and v of SmolLM2-135M, 2 rows of 256 tokens, f32, all tokens
//! trained; this engine and PEFT in turn, each in processes of its own. Prints a table and writes
//! `target/bench/trainer.json`. `TUNESMITH_MODEL` names a model folder (random weights without), `TUNESMITH_PYTHON` a
//! Python that has peft (by default the oracle's; without one, ours alone is measured).
//!
//! For one of ours alone, operation by operation: `TUNESMITH_BENCH_CHILD=keep` (or `qlora`, or a file of micro-batches)
//! with `TUNESMITH_BENCH_PROFILE=1`.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use tunesmith_engine::cpu::profile;
use tunesmith_engine::{
    FourBitCode, IGNORE, LoraOptions, MicroBatch, Model, ModelConfig, Quantization, Recompute, Trainer, TrainerOptions,
};

const ROWS: usize = 2;
const LENGTH: usize = 256;
/// Steps of one process; the first warms up.
const STEPS: usize = 5;
/// Processes of each side, in turn.
const ROUNDS: usize = 2;

/// What a measured process prints.
#[derive(Deserialize, Serialize)]
struct Measured {
    seconds: Vec<f64>,
    cpu_seconds: Vec<f64>,
    peak_rss_bytes: u64,
    losses: Vec<f64>,
    threads: usize,
}

#[derive(Serialize)]
struct Figures {
    tokens_per_second: f64,
    /// Of all threads, for one step. Tells two sides apart even where other processes take turns on the machine.
    cpu_seconds_per_step: f64,
    peak_rss_bytes: u64,
    threads: usize,
    first_loss: f64,
}

#[derive(Serialize)]
struct Report {
    model: String,
    gemm_gflops: f64,
    gemm_ceiling_tokens_per_second: f64,
    tunesmith: Figures,
    #[serde(skip_serializing_if = "Option::is_none")]
    tunesmith_recompute: Option<Figures>,
    /// LoRA over nf4, scales quantized too; needs a model folder.
    #[serde(skip_serializing_if = "Option::is_none")]
    tunesmith_qlora: Option<Figures>,
    #[serde(skip_serializing_if = "Option::is_none")]
    peft: Option<Figures>,
    #[serde(skip_serializing_if = "Option::is_none")]
    speed_ratio: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cpu_time_ratio: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    memory_ratio: Option<f64>,
    /// Rows of the example data, of differing length, which PEFT pads; needs a model folder and Python.
    #[serde(skip_serializing_if = "Option::is_none")]
    telecom: Option<Telecom>,
}

#[derive(Serialize)]
struct Telecom {
    tunesmith: Figures,
    peft: Figures,
    speed_ratio: f64,
}

/// What a measured process works on.
enum Work {
    /// Rows of one length, with or without recomputation.
    Rows(Recompute),
    /// The same over an nf4 base.
    Qlora,
    /// Micro-batches of a file.
    File(PathBuf),
}

const CHILD: &str = "TUNESMITH_BENCH_CHILD";

fn main() {
    let work = match std::env::var(CHILD).as_deref() {
        Err(_) => return compare(),
        Ok("keep") => Work::Rows(Recompute::None),
        Ok("recompute") => Work::Rows(Recompute::Full),
        Ok("qlora") => Work::Qlora,
        Ok(path) => Work::File(path.into()),
    };
    println!("{}", serde_json::to_string(&measure(&work)).expect("plain numbers"));
}

fn config() -> ModelConfig {
    let config = serde_json::json!({
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100_000.0,
        "tie_word_embeddings": true,
    });
    ModelConfig::parse(&config.to_string()).expect("SmolLM2's configuration")
}

/// The model to measure with: that of the environment, or the one that `make oracle` left.
fn model_dir() -> Option<PathBuf> {
    let given = std::env::var_os("TUNESMITH_MODEL").map(PathBuf::from);
    given.or_else(|| cache("oracle/smollm2").filter(|dir| dir.join("model.safetensors").exists()))
}

fn batch(step: usize) -> MicroBatch {
    let mut batch = MicroBatch::default();
    for row in 0..ROWS {
        let token = |i: usize| ((7919 * (row * (LENGTH + 1) + i) + 31 * step) % 4000 + 20) as u32;
        batch.tokens.extend((0..LENGTH).map(token));
        batch.targets.extend((1..=LENGTH).map(token));
        batch.row_lengths.push(LENGTH);
    }
    batch
}

fn measure(work: &Work) -> Measured {
    let nf4 = Quantization::FourBit { code: FourBitCode::Nf4, double_quant: true };
    let model = match (work, model_dir()) {
        (Work::Qlora, Some(dir)) => Model::load_quantized(&dir, nf4).expect("a model folder"),
        (_, Some(dir)) => Model::load(&dir).expect("a model folder"),
        (_, None) => Model::random(config(), 1),
    };
    let batches: Vec<MicroBatch> = match work {
        Work::File(path) => {
            let text = std::fs::read(path).expect("the micro-batches");
            serde_json::from_slice(&text).expect("micro-batches")
        }
        _ => (0..STEPS).map(batch).collect(),
    };
    // Queries and values, as is the default.
    let lora = LoraOptions { rank: 8, alpha: 32.0, ..LoraOptions::default() };
    let recompute = if let Work::Rows(recompute) = work { *recompute } else { Recompute::None };
    let options = TrainerOptions { recompute, ..lora.into() };
    let mut trainer = Trainer::new(model, &options).expect("valid options");
    let (mut seconds, mut cpu_seconds, mut losses) = (Vec::new(), Vec::new(), Vec::new());
    for batch in &batches {
        let trained = batch.targets.iter().filter(|target| **target != IGNORE).count();
        let (start, start_cpu) = (Instant::now(), cpu_time());
        let loss = trainer.accumulate(batch, 1.0 / trained as f32).expect("a valid batch");
        trainer.step(2e-4, Some(1.0)).expect("finite gradients");
        seconds.push(start.elapsed().as_secs_f64());
        cpu_seconds.push(cpu_time() - start_cpu);
        losses.push(loss.sum / loss.tokens as f64);
        if seconds.len() == 1 && std::env::var_os("TUNESMITH_BENCH_PROFILE").is_some() {
            profile::start();
        }
    }
    let peak = if profile::totals().is_empty() { 0.0 } else { profile::peak_gflops() };
    for (name, total) in profile::totals() {
        let share = 100.0 * total.seconds / seconds[1..].iter().sum::<f64>();
        let speed = 1e-9 * total.flops / total.seconds;
        eprintln!(
            "{name:<28}{:>8.3} s{share:>7.1} %{speed:>8.0} GFLOP/s{:>6.0} %",
            total.seconds,
            100.0 * speed / peak
        );
    }
    let threads = rayon::current_num_threads();
    Measured { seconds, cpu_seconds, peak_rss_bytes: peak_rss(), losses, threads }
}

/// Seconds that all threads of this process have computed so far (Linux counts in hundredths).
fn cpu_time() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // After the program's name, which may hold spaces, the 12th and 13th fields are user and system time.
    let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
    fields.skip(11).take(2).filter_map(|ticks| ticks.parse::<f64>().ok()).sum::<f64>() / 100.0
}

/// VmHWM of this process.
fn peak_rss() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}

fn compare() {
    let python = std::env::var_os("TUNESMITH_PYTHON").map(PathBuf::from).or_else(oracle_python);
    let model = model_dir();
    let (mut ours, mut lean, mut quantized, mut theirs) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        ours.push(child("keep"));
        if let Some(python) = &python {
            theirs.extend(peft(python));
        }
        lean.push(child("recompute"));
        if model.is_some() {
            quantized.push(child("qlora"));
        }
    }
    let gemm_gflops = profile::peak_gflops();
    let config = config();
    let matrices = config.num_hidden_layers
        * config.hidden_size
        * (2 * config.query_size() + 2 * config.key_value_size() + 3 * config.intermediate_size)
        + config.vocab_size * config.hidden_size;
    let tunesmith = figures(&ours).expect("ours was measured");
    let peft = figures(&theirs);
    let telecom = python.as_ref().zip(model.as_ref()).and_then(|(python, model)| telecom(python, model));
    let report = Report {
        model: model_dir().map_or("random weights".into(), |dir| dir.display().to_string()),
        gemm_gflops,
        gemm_ceiling_tokens_per_second: gemm_gflops * 1e9 / (4 * matrices) as f64,
        speed_ratio: peft.as_ref().map(|peft| tunesmith.tokens_per_second / peft.tokens_per_second),
        cpu_time_ratio: peft.as_ref().map(|peft| peft.cpu_seconds_per_step / tunesmith.cpu_seconds_per_step),
        memory_ratio: peft.as_ref().map(|peft| tunesmith.peak_rss_bytes as f64 / peft.peak_rss_bytes as f64),
        tunesmith,
        tunesmith_recompute: figures(&lean),
        tunesmith_qlora: figures(&quantized),
        peft,
        telecom,
    };
    print(&report);
    let target = std::env::var_os("CARGO_TARGET_DIR").map(PathBuf::from);
    let target = target.unwrap_or(Path::new(env!("CARGO_MANIFEST_DIR")).join("../target"));
    let folder = target.join("bench");
    let json = serde_json::to_string_pretty(&report).expect("plain numbers");
    std::fs::create_dir_all(&folder)
        .and_then(|()| std::fs::write(folder.join("trainer.json"), json + "\n"))
        .unwrap_or_else(|e| eprintln!("{}: {e}", folder.display()));
}

fn print(report: &Report) {
    println!("\nLoRA r=8 q,v, SmolLM2-135M ({}), {ROWS}×{LENGTH} tokens, f32", report.model);
    println!("{:<34}{:>10}{:>12}{:>12}{:>9}{:>12}", "", "tokens/s", "CPU s/step", "peak RSS", "threads", "first loss");
    let rows = [
        ("tunesmith", Some(&report.tunesmith)),
        ("tunesmith, gradient checkpointing", report.tunesmith_recompute.as_ref()),
        ("tunesmith, QLoRA nf4", report.tunesmith_qlora.as_ref()),
        ("PEFT", report.peft.as_ref()),
    ];
    for (name, figures) in rows {
        if let Some(f) = figures {
            let gib = f.peak_rss_bytes as f64 / f64::from(1 << 30);
            println!(
                "{name:<34}{:>10.1}{:>12.2}{gib:>8.2} GiB{:>9}{:>12.4}",
                f.tokens_per_second, f.cpu_seconds_per_step, f.threads, f.first_loss
            );
        }
    }
    match (report.speed_ratio, report.cpu_time_ratio, report.memory_ratio) {
        (Some(speed), Some(cpu), Some(memory)) => {
            println!("{speed:.2}× PEFT's speed ({cpu:.2}× by CPU time), {memory:.2}× its memory")
        }
        _ => println!("PEFT was not measured: no Python, or one without peft (make oracle installs one)"),
    }
    if let Some(qlora) = &report.tunesmith_qlora {
        println!(
            "QLoRA nf4 takes {:.2}× LoRA's time a step and {:.2}× its memory",
            report.tunesmith.tokens_per_second / qlora.tokens_per_second,
            qlora.peak_rss_bytes as f64 / report.tunesmith.peak_rss_bytes as f64
        );
    }
    if let Some(Telecom { tunesmith, peft, speed_ratio }) = &report.telecom {
        println!(
            "telecom rows, 8 a step: {:.1} tokens/s, PEFT with padding {:.1}: {speed_ratio:.2}×",
            tunesmith.tokens_per_second, peft.tokens_per_second
        );
    }
    println!(
        "products alone: {:.0} GFLOP/s, a ceiling of {:.0} tokens/s; reached {:.0} %",
        report.gemm_gflops,
        report.gemm_ceiling_tokens_per_second,
        100.0 * report.tunesmith.tokens_per_second / report.gemm_ceiling_tokens_per_second
    );
}

/// The fastest step of all rounds (other processes only ever slow one down) and the largest memory.
fn figures(rounds: &[Measured]) -> Option<Figures> {
    let steps = rounds.iter().flat_map(|round| &round.seconds[1..]);
    let best = steps.copied().reduce(f64::min)?;
    let cpu = rounds.iter().flat_map(|round| &round.cpu_seconds[1..]).copied().reduce(f64::min)?;
    Some(summary(rounds, (ROWS * LENGTH) as f64 / best, cpu))
}

fn summary(rounds: &[Measured], tokens_per_second: f64, cpu_seconds_per_step: f64) -> Figures {
    Figures {
        tokens_per_second,
        cpu_seconds_per_step,
        peak_rss_bytes: rounds.iter().map(|round| round.peak_rss_bytes).max().unwrap_or(0),
        threads: rounds[0].threads,
        first_loss: rounds[0].losses[0],
    }
}

/// The example data's rows on both sides. Steps differ in size, so that all but the first count together.
fn telecom(python: &Path, model: &Path) -> Option<Telecom> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let file = std::env::temp_dir().join(format!("tunesmith-bench-{}.json", std::process::id()));
    let script = || {
        let mut command = Command::new(python);
        command.args(["-W", "ignore"]).arg(here.join("benches/telecom.py"));
        command
    };
    let data = here.join("../examples/telecom-support/train.jsonl");
    let prepared = script().arg("prepare").arg(model).arg(data).arg(STEPS.to_string()).arg(&file).output().ok()?;
    prepared.status.success().then_some(())?;
    let batches: Vec<MicroBatch> = serde_json::from_slice(&std::fs::read(&file).ok()?).ok()?;
    let tokens: usize = batches[1..].iter().map(|batch| batch.tokens.len()).sum();
    let figures = |measured: Measured| {
        let total = |steps: &[f64]| steps[1..].iter().sum::<f64>();
        let cpu = total(&measured.cpu_seconds) / (STEPS - 1) as f64;
        summary(std::slice::from_ref(&measured), tokens as f64 / total(&measured.seconds), cpu)
    };
    let tunesmith = figures(child(&file.display().to_string()));
    let peft = parse(script().arg("train").arg(model).arg(&file)).map(figures);
    let _ = std::fs::remove_file(&file);
    let peft = peft?;
    Some(Telecom { speed_ratio: tunesmith.tokens_per_second / peft.tokens_per_second, tunesmith, peft })
}

fn child(mode: &str) -> Measured {
    let mut command = Command::new(std::env::current_exe().expect("this program has a path"));
    parse(command.env(CHILD, mode)).expect("the engine runs")
}

fn oracle_python() -> Option<PathBuf> {
    cache("oracle/venv/bin/python").filter(|python| python.exists())
}

/// A path in the cache of this project.
fn cache(path: &str) -> Option<PathBuf> {
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let cache = cache.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")))?;
    Some(cache.join("tunesmith").join(path))
}

fn peft(python: &Path) -> Option<Measured> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/reference.py");
    let mut command = Command::new(python);
    command.args(["-W", "ignore"]).arg(script).arg(STEPS.to_string()).args(model_dir());
    parse(&mut command)
}

/// Runs a process and reads the last line that it prints.
fn parse(command: &mut Command) -> Option<Measured> {
    let output = command.output().ok().filter(|output| output.status.success())?;
    let text = String::from_utf8(output.stdout).ok()?;
    serde_json::from_str(text.lines().last()?).ok()
}
