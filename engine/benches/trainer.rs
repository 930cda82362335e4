//! `cargo bench -p tunesmith-engine`: LoRA r = 8 on q and v of SmolLM2-135M, 2 rows of 256 tokens, all tokens trained, in
//! f32 and in bf16; this engine and PEFT in turn, each in processes of its own. Prints a table and writes
//! `target/bench/trainer.json`. `TUNESMITH_MODEL` names a model folder (random weights without), `TUNESMITH_PYTHON` a
//! Python that has peft (by default the oracle's; without one, ours alone is measured).
//!
//! For one of ours alone, operation by operation: `TUNESMITH_BENCH_CHILD=f32` (or another [`WORKS`], or a file of
//! micro-batches) with `TUNESMITH_BENCH_PROFILE=1`.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use tunesmith_engine::cpu::profile;
use tunesmith_engine::{
    FourBitCode, IGNORE, LoraOptions, MicroBatch, Model, ModelConfig, Precision, Quantization, Recompute, Trainer,
    TrainerOptions,
};

const ROWS: usize = 2;
const LENGTH: usize = 256;
/// Steps of one process; the first warms up, and torch's next ones are slower, too.
const STEPS: usize = 10;
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
    /// From the start of the process to the end of the first step.
    #[serde(default)]
    first_step_after_seconds: Option<f64>,
}

#[derive(Serialize)]
struct Figures {
    tokens_per_second: f64,
    /// Of all threads, for one step. Tells two sides apart even where other processes take turns on the machine.
    cpu_seconds_per_step: f64,
    peak_rss_bytes: u64,
    threads: usize,
    first_loss: f64,
    /// From the start of the process, loading a model folder, to the end of the first step.
    #[serde(skip_serializing_if = "Option::is_none")]
    start_to_first_step_seconds: Option<f64>,
}

#[derive(Serialize)]
struct Report {
    model: String,
    gemm_gflops: f64,
    gemm_ceiling_tokens_per_second: f64,
    tunesmith: Figures,
    tunesmith_recompute: Figures,
    tunesmith_bf16: Figures,
    /// LoRA over nf4, scales quantized too; needs a model folder.
    #[serde(skip_serializing_if = "Option::is_none")]
    tunesmith_qlora: Option<Figures>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tunesmith_qlora_bf16: Option<Figures>,
    #[serde(skip_serializing_if = "Option::is_none")]
    peft: Option<Figures>,
    #[serde(skip_serializing_if = "Option::is_none")]
    peft_bf16: Option<Figures>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ratio: Option<Ratio>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ratio_bf16: Option<Ratio>,
    /// Largest difference of a step's loss in bf16 and in f32, relative.
    bf16_loss_difference: f64,
    /// Step time and memory of QLoRA in those of LoRA, both in f32.
    #[serde(skip_serializing_if = "Option::is_none")]
    qlora_time_ratio: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    qlora_memory_ratio: Option<f64>,
    /// Rows of the example data, of differing length, which PEFT pads; needs a model folder and Python.
    #[serde(skip_serializing_if = "Option::is_none")]
    telecom: Option<Telecom>,
    #[serde(skip_serializing_if = "Option::is_none")]
    telecom_bf16: Option<Telecom>,
}

/// This engine in units of PEFT.
#[derive(Clone, Copy, Serialize)]
struct Ratio {
    speed: f64,
    cpu_time: f64,
    memory: f64,
}

impl Ratio {
    fn new(ours: &Figures, theirs: &Figures) -> Self {
        Ratio {
            speed: ours.tokens_per_second / theirs.tokens_per_second,
            cpu_time: theirs.cpu_seconds_per_step / ours.cpu_seconds_per_step,
            memory: ours.peak_rss_bytes as f64 / theirs.peak_rss_bytes as f64,
        }
    }
}

#[derive(Serialize)]
struct Telecom {
    tunesmith: Figures,
    peft: Figures,
    speed_ratio: f64,
}

/// What a measured process works on.
#[derive(Clone, Copy)]
struct Work {
    name: &'static str,
    precision: Precision,
    recompute: Recompute,
    nf4: bool,
}

const F32: Work = Work { name: "f32", precision: Precision::F32, recompute: Recompute::None, nf4: false };
const RECOMPUTE: Work = Work { name: "recompute", recompute: Recompute::Full, ..F32 };
const BF16: Work = Work { name: "bf16", precision: Precision::Bf16, ..F32 };
const QLORA: Work = Work { name: "qlora", nf4: true, ..F32 };
const QLORA_BF16: Work = Work { name: "qlora-bf16", nf4: true, ..BF16 };
const WORKS: [Work; 5] = [F32, RECOMPUTE, BF16, QLORA, QLORA_BF16];

/// With it in the environment, this program measures a work of this name.
const CHILD: &str = "TUNESMITH_BENCH_CHILD";

/// Micro-batches to take instead of rows of one length.
const BATCHES: &str = "TUNESMITH_BENCH_BATCHES";

fn main() {
    let Ok(name) = std::env::var(CHILD) else { return compare() };
    let work = WORKS.into_iter().find(|work| work.name == name);
    let work = work.unwrap_or_else(|| panic!("{CHILD} is one of {}", WORKS.map(|work| work.name).join(", ")));
    println!("{}", serde_json::to_string(&measure(work)).expect("plain numbers"));
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

fn measure(work: Work) -> Measured {
    let nf4 = Quantization::FourBit { code: FourBitCode::Nf4, double_quant: true };
    let model = match model_dir() {
        Some(dir) if work.nf4 => Model::load_quantized(&dir, nf4).expect("a model folder"),
        Some(dir) => Model::load(&dir).expect("a model folder"),
        None => Model::random(config(), 1),
    };
    let batches: Vec<MicroBatch> = match std::env::var_os(BATCHES) {
        Some(path) => {
            let text = std::fs::read(path).expect("the micro-batches");
            serde_json::from_slice(&text).expect("micro-batches")
        }
        None => (0..STEPS).map(batch).collect(),
    };
    // Queries and values, as is the default.
    let lora = LoraOptions { rank: 8, alpha: 32.0, ..LoraOptions::default() };
    let options = TrainerOptions { recompute: work.recompute, precision: work.precision, ..lora.into() };
    let mut trainer = Trainer::new(model, &options).expect("valid options");
    let (mut seconds, mut cpu_seconds, mut losses) = (Vec::new(), Vec::new(), Vec::new());
    let mut first_step_after_seconds = None;
    for batch in &batches {
        let trained = batch.targets.iter().filter(|target| **target != IGNORE).count();
        let (start, start_cpu) = (Instant::now(), cpu_time());
        let loss = trainer.accumulate(batch, 1.0 / trained as f32).expect("a valid batch");
        trainer.step(2e-4, Some(1.0)).expect("finite gradients");
        seconds.push(start.elapsed().as_secs_f64());
        cpu_seconds.push(cpu_time() - start_cpu);
        losses.push(loss.sum / loss.tokens as f64);
        first_step_after_seconds = first_step_after_seconds.or_else(age);
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
    Measured { seconds, cpu_seconds, peak_rss_bytes: peak_rss(), losses, threads, first_step_after_seconds }
}

/// Of this process's status what follows the program's name, which may hold spaces; times in hundredths of a second.
fn status() -> Vec<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
    fields.map(|field| field.parse().unwrap_or(0.0)).collect()
}

/// Seconds that all threads of this process have computed so far, for themselves and in the system.
fn cpu_time() -> f64 {
    status().iter().skip(11).take(2).sum::<f64>() / 100.0
}

/// Seconds since this process began.
fn age() -> Option<f64> {
    let uptime = std::fs::read_to_string("/proc/uptime").ok()?;
    let uptime: f64 = uptime.split_whitespace().next()?.parse().ok()?;
    Some(uptime - status().get(19)? / 100.0)
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
    let works: Vec<Work> = WORKS.into_iter().filter(|work| model.is_some() || !work.nf4).collect();
    let mut ours: Vec<Vec<Measured>> = works.iter().map(|_| Vec::new()).collect();
    let mut theirs = [Vec::new(), Vec::new()];
    for _ in 0..ROUNDS {
        for (work, ours) in works.iter().zip(&mut ours) {
            ours.push(child(*work, None));
        }
        if let Some(python) = &python {
            for (dtype, theirs) in DTYPES.into_iter().zip(&mut theirs).filter(|(dtype, _)| torch_computes_in(dtype)) {
                theirs.extend(peft(python, dtype));
            }
        }
    }
    let gemm_gflops = profile::peak_gflops();
    let config = config();
    let matrices = config.num_hidden_layers
        * config.hidden_size
        * (2 * config.query_size() + 2 * config.key_value_size() + 3 * config.intermediate_size)
        + config.vocab_size * config.hidden_size;
    let rounds_of =
        |work: Work| works.iter().zip(&ours).find(|(known, _)| known.name == work.name).map(|(_, ours)| ours);
    let measured = |work: Work| rounds_of(work).and_then(|rounds| figures(rounds));
    let always = |work: Work| measured(work).expect("ours was measured");
    let (tunesmith, tunesmith_bf16) = (always(F32), always(BF16));
    let [peft, peft_bf16] = theirs.map(|rounds| figures(&rounds));
    let tunesmith_qlora = measured(QLORA);
    let losses = |work: Work| &rounds_of(work).expect("ours was measured")[0].losses;
    let report = Report {
        model: model.as_ref().map_or("random weights".into(), |dir| dir.display().to_string()),
        gemm_gflops,
        gemm_ceiling_tokens_per_second: gemm_gflops * 1e9 / (4 * matrices) as f64,
        tunesmith_recompute: always(RECOMPUTE),
        tunesmith_qlora_bf16: measured(QLORA_BF16),
        ratio: peft.as_ref().map(|peft| Ratio::new(&tunesmith, peft)),
        ratio_bf16: peft_bf16.as_ref().map(|peft| Ratio::new(&tunesmith_bf16, peft)),
        bf16_loss_difference: relative_difference(losses(BF16), losses(F32)),
        qlora_time_ratio: tunesmith_qlora.as_ref().map(|qlora| tunesmith.tokens_per_second / qlora.tokens_per_second),
        qlora_memory_ratio: tunesmith_qlora
            .as_ref()
            .map(|qlora| qlora.peak_rss_bytes as f64 / tunesmith.peak_rss_bytes as f64),
        telecom: telecom(&python, &model, F32),
        telecom_bf16: telecom(&python, &model, BF16),
        tunesmith,
        tunesmith_bf16,
        tunesmith_qlora,
        peft,
        peft_bf16,
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

fn relative_difference(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| (a / b - 1.0).abs()).fold(0.0, f64::max)
}

fn print(report: &Report) {
    println!("\nLoRA r=8 q,v, SmolLM2-135M ({}), {ROWS}×{LENGTH} tokens", report.model);
    println!(
        "{:<34}{:>10}{:>12}{:>12}{:>9}{:>12}{:>12}",
        "", "tokens/s", "CPU s/step", "peak RSS", "threads", "first loss", "first step"
    );
    let rows = [
        ("tunesmith, f32", Some(&report.tunesmith)),
        ("tunesmith, gradient checkpointing", Some(&report.tunesmith_recompute)),
        ("tunesmith, QLoRA nf4", report.tunesmith_qlora.as_ref()),
        ("PEFT, f32", report.peft.as_ref()),
        ("tunesmith, bf16", Some(&report.tunesmith_bf16)),
        ("tunesmith, QLoRA nf4, bf16", report.tunesmith_qlora_bf16.as_ref()),
        ("PEFT, bf16", report.peft_bf16.as_ref()),
    ];
    for (name, figures) in rows {
        if let Some(f) = figures {
            let gib = f.peak_rss_bytes as f64 / f64::from(1 << 30);
            let first = f.start_to_first_step_seconds.unwrap_or(f64::NAN);
            println!(
                "{name:<34}{:>10.1}{:>12.2}{gib:>8.2} GiB{:>9}{:>12.4}{first:>10.2} s",
                f.tokens_per_second, f.cpu_seconds_per_step, f.threads, f.first_loss
            );
        }
    }
    for (name, ratio) in [("f32", report.ratio), ("bf16", report.ratio_bf16)] {
        match ratio {
            Some(Ratio { speed, cpu_time, memory }) => {
                println!("{name}: {speed:.2}× PEFT's speed ({cpu_time:.2}× by CPU time), {memory:.2}× its memory")
            }
            None if name == "bf16" && !torch_computes_in(DTYPES[1]) => {
                println!(
                    "{name}: PEFT was not measured: without instructions for bf16, torch takes half a minute a step"
                )
            }
            None => {
                println!("{name}: PEFT was not measured: no Python, or one without peft (make oracle installs one)")
            }
        }
    }
    println!("bf16: losses within {:.2} % of those in f32", 100.0 * report.bf16_loss_difference);
    if let (Some(time), Some(memory)) = (report.qlora_time_ratio, report.qlora_memory_ratio) {
        println!("QLoRA nf4 takes {time:.2}× LoRA's time a step and {memory:.2}× its memory, both in f32");
    }
    for (name, telecom) in [("f32", &report.telecom), ("bf16", &report.telecom_bf16)] {
        if let Some(Telecom { tunesmith, peft, speed_ratio }) = telecom {
            println!(
                "telecom rows, 8 a step, {name}: {:.1} tokens/s, PEFT with padding {:.1}: {speed_ratio:.2}×",
                tunesmith.tokens_per_second, peft.tokens_per_second
            );
        }
    }
    println!(
        "products alone, f32: {:.0} GFLOP/s, a ceiling of {:.0} tokens/s; reached {:.0} %",
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
        start_to_first_step_seconds: rounds.iter().filter_map(|round| round.first_step_after_seconds).reduce(f64::min),
    }
}

/// The example data's rows on both sides. Steps differ in size, so that all but the first count together.
fn telecom(python: &Option<PathBuf>, model: &Option<PathBuf>, work: Work) -> Option<Telecom> {
    let (python, model) = (python.as_ref()?, model.as_ref()?);
    torch_computes_in(dtype(work)).then_some(())?;
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
    let tunesmith = figures(child(work, Some(&file)));
    let peft = parse(script().arg("train").arg(model).arg(&file).arg(dtype(work))).map(figures);
    let _ = std::fs::remove_file(&file);
    let peft = peft?;
    Some(Telecom { speed_ratio: tunesmith.tokens_per_second / peft.tokens_per_second, tunesmith, peft })
}

/// torch's names of the precisions.
const DTYPES: [&str; 2] = ["float32", "bfloat16"];

fn dtype(work: Work) -> &'static str {
    DTYPES[usize::from(work.precision == Precision::Bf16)]
}

/// Whether this CPU has instructions for a precision. Torch computes in bf16 without them, too, but only to have it done.
fn torch_computes_in(dtype: &str) -> bool {
    #[cfg(target_arch = "x86_64")]
    let bf16 = std::arch::is_x86_feature_detected!("avx512bf16");
    #[cfg(not(target_arch = "x86_64"))]
    let bf16 = true;
    dtype == DTYPES[0] || bf16
}

fn child(work: Work, batches: Option<&Path>) -> Measured {
    eprintln!("measures tunesmith, {}", work.name);
    let mut command = Command::new(std::env::current_exe().expect("this program has a path"));
    command.env(CHILD, work.name).envs(batches.map(|batches| (BATCHES, batches)));
    parse(&mut command).expect("the engine runs")
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

fn peft(python: &Path, dtype: &str) -> Option<Measured> {
    eprintln!("measures PEFT, {dtype}");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/reference.py");
    let mut command = Command::new(python);
    command.args(["-W", "ignore"]).arg(script).arg(STEPS.to_string()).arg(dtype).args(model_dir());
    parse(&mut command)
}

/// Runs a process and reads the last line that it prints.
fn parse(command: &mut Command) -> Option<Measured> {
    let output = command.output().ok().filter(|output| output.status.success())?;
    let text = String::from_utf8(output.stdout).ok()?;
    serde_json::from_str(text.lines().last()?).ok()
}
