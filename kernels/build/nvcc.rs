//! Compiles the kernels for GPUs: a fatbin for each source, what ptxas said of it, and the sizes of each kernel's arguments.

use std::{
    collections::BTreeMap,
    env, fs,
    hash::{DefaultHasher, Hash, Hasher},
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use crate::sources;

/// A100 (and RTX 3090); RTX 4090 and L40S; H100 and H200. Then PTX, from which a driver makes code for later cards.
const TARGETS: [(&str, &str); 5] = [
    ("compute_80", "sm_80"),
    ("compute_89", "sm_89"),
    ("compute_90", "sm_90"),
    ("compute_80", "compute_80"),
    ("compute_90", "compute_90"),
];
/// A multiplication and an addition are two roundings unless the source says fma, as on the host.
const FLAGS: [&str; 6] = ["-std=c++17", "-O3", "-fmad=false", "-fatbin", "-Xptxas", "-v"];

/// Compiles what has changed, and writes `compiled.rs`, the table of all.
pub(crate) fn compile(cuda: &Path) {
    println!("cargo::rerun-if-env-changed=CUDA_HOME");
    let Some(home) = env::var_os("CUDA_HOME").map(PathBuf::from) else {
        return println!(
            "cargo::error=the feature cuda needs nvcc: set CUDA_HOME, or run `make kernels`, which installs it"
        );
    };
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    let sources = sources(cuda, "cu");
    let (next, problems) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let jobs = env::var("NUM_JOBS").ok().and_then(|jobs| jobs.parse().ok()).unwrap_or(1);
    thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(|| {
                while let Some(source) = sources.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if let Err(problem) = compile_source(&home, cuda, source, &out) {
                        problems.lock().expect("no thread panics").push(problem);
                    }
                }
            });
        }
    });
    let problems = problems.into_inner().expect("no thread panics");
    if !problems.is_empty() {
        return problems.iter().flat_map(|problem| problem.lines()).for_each(|line| println!("cargo::error={line}"));
    }

    let (mut fatbins, mut sizes) = (String::new(), BTreeMap::new());
    for source in &sources {
        let name = stem(source);
        fatbins += &format!(
            "    Fatbin {{ file: {name:?}, image: image!(\"{name}.fatbin\"), log: include_str!(concat!(env!(\"OUT_DIR\"), \"/{name}.log\")) }},\n"
        );
        sizes.extend(argument_sizes(&fs::read_to_string(out.join(format!("{name}.elf"))).expect("it was written")));
    }
    let sizes: String = sizes.iter().map(|(kernel, sizes)| format!("    ({kernel:?}, &{sizes:?}),\n")).collect();
    let table = format!(
        "/// By file.\npub static FATBINS: &[Fatbin] = &[\n{fatbins}];\n\
         /// The sizes of each kernel's arguments.\nstatic SIZES: &[(&str, &[usize])] = &[\n{sizes}];\n"
    );
    fs::write(out.join("compiled.rs"), table).expect("the build's folder");
}

fn stem(source: &Path) -> String {
    source.file_stem().unwrap_or_default().to_string_lossy().into_owned()
}

/// Compiles a source, unless that was done with the same text, headers and flags.
fn compile_source(home: &Path, cuda: &Path, source: &Path, out: &Path) -> Result<(), String> {
    let file = |extension: &str| out.join(format!("{}.{extension}", stem(source)));
    let mut hasher = DefaultHasher::new();
    (home, TARGETS, FLAGS).hash(&mut hasher);
    for text in sources(cuda, "cuh").iter().map(PathBuf::as_path).chain([source]) {
        fs::read(text).map_err(|error| format!("{}: {error}", text.display()))?.hash(&mut hasher);
    }
    let stamp = hasher.finish().to_string();
    if fs::read_to_string(file("stamp")).is_ok_and(|before| before == stamp) {
        return Ok(());
    }
    let mut nvcc = Command::new(home.join("bin/nvcc"));
    nvcc.args(FLAGS).arg("-I").arg(cuda);
    for (compute, code) in TARGETS {
        nvcc.arg("-gencode").arg(format!("arch={compute},code={code}"));
    }
    let log = run(nvcc.arg("-o").arg(file("fatbin")).arg(source))?;
    let elf = run(Command::new(home.join("bin/cuobjdump")).arg("-elf").arg(file("fatbin")))?;
    // What is looked for is short beside the code.
    let described: Vec<&str> =
        elf.lines().filter(|line| line.starts_with(".nv.info.") || line.contains("Ordinal :")).collect();
    for (extension, text) in [("log", log), ("elf", described.join("\n")), ("stamp", stamp)] {
        fs::write(file(extension), text).map_err(|error| error.to_string())?;
    }
    Ok(())
}

/// What a program says, or why it failed.
fn run(command: &mut Command) -> Result<String, String> {
    let output = command.output().map_err(|error| format!("{}: {error}", command.get_program().display()))?;
    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    if output.status.success() { Ok(said.into_owned()) } else { Err(said.into_owned()) }
}

/// The sizes of arguments, in their order, from the descriptions of cubins: the heading `.nv.info.<kernel>`, then a line
/// `Value: Index : 0x0 Ordinal : 0x1 Offset : 0x8 Size : 0x4` each.
fn argument_sizes(described: &str) -> BTreeMap<String, Vec<usize>> {
    let mut kernels: BTreeMap<String, BTreeMap<usize, usize>> = BTreeMap::new();
    let mut kernel = String::new();
    for line in described.lines() {
        if let Some(name) = line.strip_prefix(".nv.info.") {
            kernel = name.trim().to_owned();
            continue;
        }
        let number = |name: &str| {
            let (_, rest) = line.split_once(name)?;
            let word = rest.trim_start_matches([' ', ':', '\t']).split_whitespace().next()?;
            usize::from_str_radix(word.trim_start_matches("0x"), 16).ok()
        };
        if let (Some(ordinal), Some(size)) = (number("Ordinal"), number("Size")) {
            let before = kernels.entry(kernel.clone()).or_default().insert(ordinal, size);
            assert!(before.is_none_or(|before| before == size), "{kernel}: argument {ordinal} differs between cards");
        }
    }
    kernels.into_iter().map(|(kernel, sizes)| (kernel, sizes.into_values().collect())).collect()
}
