//! Compares what nvcc made of each kernel with `kernels/resources.tsv`: registers, spills, and which instructions of the machine there
//! are. `make kernels` runs it; with `--write` it writes the table.

use std::{
    collections::BTreeMap,
    env, fs,
    path::Path,
    process::{Command, ExitCode},
};

use tunesmith_kernels::compiled::{FATBINS, Fatbin};

const HEADER: &str = "# What nvcc makes of each kernel: `make kernels` compares, `make kernels WRITE=1` writes it.\n\
                      # kernel\tarchitecture\tregisters\tspilled bytes\ttensor-core products\tldmatrix\tcp.async\tlocal memory\n";

/// What became of a kernel.
#[derive(Clone, Debug, Default)]
struct Resources {
    registers: u32,
    spilled: u32,
    /// Instructions: HMMA, LDSM, LDGSTS, and LDL or STL.
    products: u32,
    matrix_loads: u32,
    async_copies: u32,
    local: u32,
}

/// By kernel and architecture.
type Table = BTreeMap<(String, String), Resources>;

/// The number before a word of a line.
fn before(line: &str, words: &str) -> u32 {
    let number = line.split(words).next().and_then(|text| text.split_whitespace().next_back());
    number.and_then(|number| number.parse().ok()).unwrap_or(0)
}

/// What ptxas said: `Compiling entry function 'name' for 'sm_80'`, then the numbers.
fn add_log(log: &str, table: &mut Table) {
    let mut current = None;
    for line in log.lines() {
        if line.contains("Compiling entry function") {
            let mut quoted = line.split('\'').skip(1).step_by(2).map(str::to_owned);
            current = quoted.next().zip(quoted.next());
        }
        let Some(key) = &current else { continue };
        let kernel = table.entry(key.clone()).or_default();
        if line.contains("spill stores") {
            kernel.spilled = before(line, " bytes spill stores") + before(line, " bytes spill loads");
        }
        if line.contains("registers") {
            kernel.registers = before(line, " registers");
        }
    }
}

/// The machine's instructions: `arch = sm_80`, then `Function : name`, then its code.
fn add_code(code: &str, table: &mut Table) {
    let (mut architecture, mut name) = (String::new(), String::new());
    for line in code.lines() {
        if let Some(found) = line.strip_prefix("arch = ") {
            architecture = found.trim().to_owned();
        }
        if let Some((_, found)) = line.split_once("Function : ") {
            name = found.trim().to_owned();
        }
        let Some(kernel) = table.get_mut(&(name.clone(), architecture.clone())) else { continue };
        let has = |instruction: &str| u32::from(line.contains(instruction));
        kernel.products += has("HMMA.");
        kernel.matrix_loads += has("LDSM");
        kernel.async_copies += has("LDGSTS");
        kernel.local += has("LDL") + has("STL");
    }
}

fn disassembled(fatbin: &Fatbin) -> Result<String, String> {
    let home = env::var_os("CUDA_HOME").ok_or("CUDA_HOME is not set: run it by kernels/with-nvcc.sh")?;
    let file = env::temp_dir().join(format!("tunesmith-{}.fatbin", std::process::id()));
    fs::write(&file, fatbin.image).map_err(|error| format!("{}: {error}", file.display()))?;
    let output = Command::new(Path::new(&home).join("bin/cuobjdump")).arg("-sass").arg(&file).output();
    // It is temporary.
    let _ = fs::remove_file(file);
    let output = output.map_err(|error| format!("cuobjdump: {error}"))?;
    match output.status.success() {
        true => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
        false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
    }
}

fn table() -> Result<String, String> {
    let mut text = HEADER.to_owned();
    for fatbin in FATBINS {
        let mut table = Table::new();
        add_log(fatbin.log, &mut table);
        add_code(&disassembled(fatbin)?, &mut table);
        for ((name, architecture), resources) in table {
            let Resources { registers, spilled, products, matrix_loads, async_copies, local } = resources;
            if spilled + local > 0 {
                return Err(format!("{name} spills on {architecture}"));
            }
            text += &format!(
                "{name}\t{architecture}\t{registers}\t{spilled}\t{products}\t{matrix_loads}\t{async_copies}\t{local}\n"
            );
        }
    }
    Ok(text)
}

fn main() -> ExitCode {
    let kept = Path::new(env!("CARGO_MANIFEST_DIR")).join("resources.tsv");
    let found = match table() {
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
    let missing = |text: &str, other: &str| -> Vec<String> {
        text.lines().filter(|line| !other.lines().any(|found| found == *line)).map(str::to_owned).collect()
    };
    let (new, gone) = (missing(&found, &expected), missing(&expected, &found));
    new.iter().for_each(|line| println!("not in resources.tsv: {line}"));
    gone.iter().for_each(|line| println!("only in resources.tsv: {line}"));
    if new.is_empty() && gone.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
