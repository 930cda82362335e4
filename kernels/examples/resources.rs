//! Compiles the kernels by nvcc, and compares what became of each with `kernels/resources.tsv`: registers, spills, and which instructions
//! of the machine there are. `make kernels` runs it; with `--write` it writes the table.

use std::{
    collections::BTreeMap,
    env, fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

/// A100; RTX 4090 and L40S; H100 and H200. An RTX 3090 runs what is made for the A100.
const ARCHITECTURES: [&str; 3] = ["sm_80", "sm_89", "sm_90"];
const HEADER: &str = "# What nvcc makes of each kernel: `make kernels` compares, `kernels/compile.sh --write` writes it.\n\
                      # kernel\tarchitecture\tregisters\tspilled bytes\ttensor-core products\tldmatrix\tlocal memory\n";

/// What became of a kernel.
#[derive(Clone, Debug, Default)]
struct Resources {
    registers: u32,
    spilled: u32,
    /// Instructions: HMMA, LDSM, and LDL or STL.
    products: u32,
    matrix_loads: u32,
    local: u32,
}

/// Runs a program of the toolkit; what it said, or why it failed.
fn tool(name: &str, arguments: &[&str]) -> Result<String, String> {
    let home = env::var_os("CUDA_HOME").ok_or("CUDA_HOME is not set: run kernels/compile.sh")?;
    let program = Path::new(&home).join("bin").join(name);
    let output = Command::new(&program).args(arguments).output();
    let output = output.map_err(|error| format!("{}: {error}", program.display()))?;
    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    if output.status.success() { Ok(said.into_owned()) } else { Err(said.into_owned()) }
}

/// The number before a word of a line.
fn before(line: &str, words: &str) -> u32 {
    let number = line.split(words).next().and_then(|text| text.split_whitespace().next_back());
    number.and_then(|number| number.parse().ok()).unwrap_or(0)
}

/// Compiles a source for an architecture.
fn compile(source: &Path, architecture: &str, cubin: &Path) -> Result<BTreeMap<String, Resources>, String> {
    let folder = source.parent().unwrap_or(Path::new(".")).to_string_lossy();
    let (include, arch) = (format!("-I{folder}"), format!("-arch={architecture}"));
    let (from, to) = (source.to_string_lossy(), cubin.to_string_lossy());
    let log = tool(
        "nvcc",
        &["-std=c++17", "-O3", "-fmad=false", "-cubin", &arch, "-Xptxas", "-v", &include, "-o", &to, &from],
    )?;
    let mut kernels: BTreeMap<String, Resources> = BTreeMap::new();
    let mut current = String::new();
    for line in log.lines() {
        if let Some(name) = line.split('\'').nth(1).filter(|_| line.contains("Compiling entry function")) {
            current = name.to_owned();
        }
        let kernel = kernels.entry(current.clone()).or_default();
        if line.contains("spill stores") {
            kernel.spilled = before(line, " bytes spill stores") + before(line, " bytes spill loads");
        }
        if line.contains("registers") {
            kernel.registers = before(line, " registers");
        }
    }
    kernels.remove("");
    for line in tool("cuobjdump", &["-sass", &to])?.lines() {
        if let Some((_, name)) = line.split_once("Function : ") {
            current = name.trim().to_owned();
        }
        let Some(kernel) = kernels.get_mut(&current) else { continue };
        let has = |instruction: &str| u32::from(line.contains(instruction));
        kernel.products += has("HMMA.");
        kernel.matrix_loads += has("LDSM");
        kernel.local += has("LDL") + has("STL");
    }
    Ok(kernels)
}

fn table(folder: &Path) -> Result<String, String> {
    let files = fs::read_dir(folder).map_err(|error| error.to_string())?.filter_map(|entry| Some(entry.ok()?.path()));
    let mut files: Vec<PathBuf> = files.filter(|path| path.extension().is_some_and(|end| end == "cu")).collect();
    files.sort();
    let cubin = env::temp_dir().join(format!("tunesmith-{}.cubin", std::process::id()));
    let mut table = HEADER.to_owned();
    for (file, architecture) in files.iter().flat_map(|file| ARCHITECTURES.map(|architecture| (file, architecture))) {
        println!("{} for {architecture}", file.display());
        for (name, Resources { registers, spilled, products, matrix_loads, local }) in
            compile(file, architecture, &cubin)?
        {
            if spilled + local > 0 {
                return Err(format!("{name} spills on {architecture}"));
            }
            table += &format!("{name}\t{architecture}\t{registers}\t{spilled}\t{products}\t{matrix_loads}\t{local}\n");
        }
    }
    // It is temporary.
    let _ = fs::remove_file(cubin);
    Ok(table)
}

fn main() -> ExitCode {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    let kept = folder.join("resources.tsv");
    let found = match table(&folder.join("cuda")) {
        Ok(found) => found,
        Err(problem) => {
            eprintln!("{problem}");
            return ExitCode::FAILURE;
        }
    };
    if env::args().any(|argument| argument == "--write") {
        return match fs::write(&kept, found) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("{}: {error}", kept.display());
                ExitCode::FAILURE
            }
        };
    }
    let expected = fs::read_to_string(&kept).unwrap_or_default();
    let mut differs = false;
    for line in found.lines().filter(|line| !expected.lines().any(|kept| kept == *line)) {
        println!("not in resources.tsv: {line}");
        differs = true;
    }
    for line in expected.lines().filter(|line| !found.lines().any(|found| found == *line)) {
        println!("only in resources.tsv: {line}");
        differs = true;
    }
    if differs { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}
