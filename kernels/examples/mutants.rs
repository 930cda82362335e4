//! Changes the kernels in one place at a time, and runs their tests: each must fail. `make kernel-mutants` runs it.
//!
//! Taken out: barriers, waits and commits. Shifted by one: bounds. A mutant that survives is a test that is missing, or is explained in
//! `kernels/tests/survivors.txt`, a line each: file, the line's text, the change.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// A source with one change.
struct Mutant {
    file: String,
    line: usize,
    /// The line's text, and what it becomes.
    before: String,
    after: String,
    source: String,
}

/// What a line may become.
fn changes(line: &str) -> Vec<String> {
    let code = line.split("//").next().unwrap_or_default();
    let mut changed = Vec::new();
    for call in ["__syncthreads();", "__syncwarp();", "copy_async_commit();"] {
        if code.contains(call) {
            changed.push(line.replacen(call, ";", 1));
        }
    }
    if let Some(start) = code.find("copy_async_wait<") {
        let end = code[start..].find(';').map_or(code.len(), |end| start + end + 1);
        changed.push(format!("{};{}", &line[..start], &line[end..]));
    }
    let is_loop = code.trim_start().starts_with("for (") && !code.contains("k < ") && !code.contains("distance");
    let is_bound = is_loop || code.contains("if (") && !code.contains("if (threadIdx.x == 0)");
    if is_bound && !code.contains("#") {
        for (from, to) in [(" < ", " <= "), (" >= ", " > "), (" <= ", " < ")] {
            // A template's bracket has no spaces.
            if let Some(at) = code.find(from) {
                changed.push(format!("{}{to}{}", &line[..at], &line[at + from.len()..]));
            }
        }
    }
    changed
}

fn mutants(folder: &Path, only: Option<&str>) -> Vec<Mutant> {
    let files = fs::read_dir(folder).expect("the kernels' folder").filter_map(|entry| Some(entry.ok()?.path()));
    let mut files: Vec<PathBuf> = files.filter(|path| path.extension().is_some_and(|end| end == "cu")).collect();
    files.sort();
    let mut all = Vec::new();
    for path in files {
        let file = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if only.is_some_and(|only| !file.starts_with(only)) {
            continue;
        }
        let text = fs::read_to_string(&path).expect("a source");
        let lines: Vec<&str> = text.lines().collect();
        for (number, line) in lines.iter().enumerate() {
            for after in changes(line) {
                let mut changed: Vec<&str> = lines.clone();
                changed[number] = &after;
                let (before, source) = (line.trim().to_owned(), changed.join("\n") + "\n");
                all.push(Mutant { file: file.clone(), line: number + 1, before, after: after.trim().into(), source });
            }
        }
    }
    all
}

/// What became of a mutant.
#[derive(PartialEq)]
enum Fate {
    /// It is no program.
    Broken,
    Caught,
    Survives,
}

/// What the tests of a kernel's file say of this folder of sources.
fn fate(sources: &Path, file: &str) -> Fate {
    // Several files of attention have one module of checks.
    let checks = if file.starts_with("attention") { "attention" } else { file.trim_end_matches(".cu") };
    let test = |more: &[&str]| {
        let mut cargo = Command::new(env!("CARGO"));
        cargo.args(["test", "--quiet", "--package", "tunesmith-kernel-checks", "--test", "emulated"]);
        cargo.args(more).env("TUNESMITH_KERNELS", sources).stdout(Stdio::null()).stderr(Stdio::null());
        cargo.status().expect("cargo").success()
    };
    match () {
        () if !test(&["--no-run"]) => Fate::Broken,
        () if test(&["--", &format!("{checks}::")]) => Fate::Survives,
        () => Fate::Caught,
    }
}

fn main() {
    let crate_folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    let (original, survivors) = (crate_folder.join("cuda"), crate_folder.join("tests/survivors.txt"));
    let explained = fs::read_to_string(survivors).unwrap_or_default();
    let explained: BTreeSet<&str> = explained.lines().filter(|line| !line.starts_with('#')).collect();
    let sources = std::env::temp_dir().join(format!("tunesmith-mutants-{}", std::process::id()));
    let only = std::env::args().nth(1);
    let mutants = mutants(&original, only.as_deref());
    let (mut caught, mut known, mut unexplained) = (0, 0, Vec::new());
    fs::create_dir_all(&sources).expect("a folder for sources");
    for entry in fs::read_dir(&original).expect("the kernels' folder").filter_map(Result::ok) {
        fs::copy(entry.path(), sources.join(entry.file_name())).expect("a copy of a source");
    }
    for Mutant { file, line, before, after, source } in &mutants {
        let path = sources.join(file);
        let sound = fs::read(&path).expect("a source");
        fs::write(&path, source).expect("a source");
        let name = format!("{file}: {before} => {after}");
        let fate = fate(&sources, file);
        if fate != Fate::Survives {
            caught += u32::from(fate == Fate::Caught);
        } else if explained.contains(name.as_str()) {
            known += 1;
        } else {
            println!("survives, line {line}: {name}");
            unexplained.push(name);
        }
        fs::write(&path, sound).expect("a source");
    }
    // It is temporary.
    let _ = fs::remove_dir_all(&sources);
    println!("{} mutants: {caught} caught, {known} explained, {} survive", mutants.len(), unexplained.len());
    std::process::exit(i32::from(!unexplained.is_empty()));
}
