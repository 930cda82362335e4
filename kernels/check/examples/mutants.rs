//! Changes the kernels in one place at a time, and runs their checks: one must fail. `make kernel-mutants` runs it.
//!
//! Barriers, waits and commits are taken out. Waits and bounds are shifted by one; a `min` or a `max` loses one side. A mutant that
//! survives is a check that is missing, or is explained in `survivors.txt`: a line `file: before => after` below a line `# why`.
//!
//! `kernels/build.rs` makes a shared library of the changed sources, so that the checks are linked once. All of it lies in the folder
//! `mutants` of the target directory.

use std::{
    collections::BTreeMap,
    env, fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use tunesmith_kernel_checks::checks;

/// What a place in a line may become.
const CHANGES: [(&str, &str); 13] = [
    ("__syncthreads();", ";"),
    ("__syncwarp();", ";"),
    ("copy_async_commit();", ";"),
    ("copy_async_wait<0>();", ";"),
    ("copy_async_wait<0>();", "copy_async_wait<1>();"),
    ("copy_async_wait<1>();", ";"),
    ("copy_async_wait<1>();", "copy_async_wait<2>();"),
    (" < ", " <= "),
    (" <= ", " < "),
    (" > ", " >= "),
    (" >= ", " > "),
    (" + 1", ""),
    (" - 1", ""),
];

/// A source with one change.
struct Mutant {
    file: String,
    line: usize,
    /// The file, the line's text, and what it becomes.
    name: String,
    source: String,
}

/// What a line may become.
fn changes(line: &str) -> Vec<String> {
    let code = line.split("//").next().unwrap_or_default();
    // Neither the preprocessor's lines nor the sizes of tiles are bounds.
    if code.starts_with('#') || code.contains("constexpr") {
        return Vec::new();
    }
    let shifted = CHANGES.iter().flat_map(|(from, to)| {
        let is_whole = move |end: usize| !from.ends_with('1') || code[end..].starts_with([' ', ')', ';']);
        let places = code.match_indices(from).map(move |(at, _)| (at, at + from.len()));
        places.filter(move |(_, end)| is_whole(*end)).map(move |(at, end)| (at..end, (*to).to_owned()))
    });
    let one_sided = ["min(", "max("].iter().flat_map(|call| {
        let is_name = |at: usize| !code[..at].ends_with(|before: char| before.is_alphanumeric() || before == '_');
        let places = code.match_indices(call).map(|(at, _)| at).filter(move |at| is_name(*at));
        places.filter_map(move |at| Some((at, sides(&code[at + call.len()..])?))).flat_map(
            move |(at, (sides, length))| sides.map(|side| (at..at + call.len() + length, format!("({})", side.trim()))),
        )
    });
    shifted.chain(one_sided).map(|(place, to)| format!("{}{to}{}", &line[..place.start], &line[place.end..])).collect()
}

/// The two arguments of a call behind its bracket, and how long they are with the closing one. None if the call goes on in the next line.
fn sides(text: &str) -> Option<([&str; 2], usize)> {
    let (mut depth, mut comma) = (0, None);
    for (at, letter) in text.char_indices() {
        match letter {
            '(' | '[' => depth += 1,
            ',' if depth == 0 => comma = Some(at),
            ')' if depth == 0 => return comma.map(|comma| ([&text[..comma], &text[comma + 1..at]], at + 1)),
            ')' | ']' => depth -= 1,
            _ => {}
        }
    }
    None
}

/// The kernels' sources by name. The emulation has what is in ptx.cuh by itself.
fn read(folder: &Path) -> BTreeMap<String, String> {
    let files = fs::read_dir(folder).expect("the kernels' folder").map(|entry| entry.expect("a file").path());
    let named = |path: PathBuf| {
        (
            path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            fs::read_to_string(path).expect("a source"),
        )
    };
    files.map(named).collect()
}

fn mutants(file: &str, text: &str) -> Vec<Mutant> {
    let lines: Vec<&str> = text.lines().collect();
    let of_line = |(number, line): (usize, &&str)| {
        let mutant = |after: String| {
            let mut changed = lines.clone();
            changed[number] = &after;
            let name = format!("{file}: {} => {}", lines[number].trim(), after.trim());
            Mutant { file: file.to_owned(), line: number + 1, name, source: changed.join("\n") + "\n" }
        };
        changes(line).into_iter().map(mutant).collect::<Vec<_>>()
    };
    lines.iter().enumerate().flat_map(of_line).collect()
}

/// Whether a source is a file, or includes it.
fn includes(sources: &BTreeMap<String, String>, source: &str, file: &str) -> bool {
    let names = sources[source].lines().filter_map(|line| line.strip_prefix("#include \"")?.strip_suffix('"'));
    source == file || names.filter(|name| sources.contains_key(*name)).any(|name| includes(sources, name, file))
}

/// The program with the checks, and the kernels that it runs.
struct Bench {
    folder: PathBuf,
    program: PathBuf,
    /// How long each check takes where the kernels are sound, the shortest first.
    checks: Vec<(Duration, String)>,
}

/// What became of a mutant.
#[derive(PartialEq)]
enum Fate {
    /// It is no program.
    Broken,
    Caught,
    TimedOut,
    Survives,
}

impl Bench {
    fn new(folder: PathBuf) -> Self {
        let bench = Self { folder, program: PathBuf::new(), checks: Vec::new() };
        let mut cargo =
            bench.cargo(&["test", "--no-run", "--package", "tunesmith-kernel-checks", "--test", "emulated"]);
        let said = cargo.stderr(Stdio::piped()).output().expect("cargo");
        let said = String::from_utf8_lossy(&said.stderr);
        // Executable tests/emulated.rs (path)
        let program = said.rsplit_once('(').and_then(|(_, path)| path.trim_end().strip_suffix(')'));
        let program = program.unwrap_or_else(|| panic!("no program with the checks: {said}")).into();
        let bench = Self { program, ..bench };
        assert!(bench.compile(), "the kernels do not compile");
        let timed = |(name, _): (String, _)| {
            let started = Instant::now();
            assert!(bench.run(&name, Duration::from_secs(600)) == Fate::Survives, "{name} fails without a change");
            (started.elapsed(), name)
        };
        let mut checks: Vec<_> = checks().map(timed).collect();
        checks.sort();
        Self { checks, ..bench }
    }

    fn sources(&self) -> PathBuf {
        self.folder.join("cuda")
    }

    fn cargo(&self, arguments: &[&str]) -> Command {
        let mut cargo = Command::new(env!("CARGO"));
        cargo.args(arguments).env("CARGO_TARGET_DIR", &self.folder).env("TUNESMITH_KERNELS", self.sources());
        cargo.stdout(Stdio::null()).stderr(Stdio::null());
        cargo
    }

    /// Runs `kernels/build.rs`, and little else.
    fn compile(&self) -> bool {
        let mut cargo = self.cargo(&["check", "--package", "tunesmith-kernels", "--features", "emulation"]);
        cargo.status().expect("cargo").success()
    }

    fn run(&self, check: &str, limit: Duration) -> Fate {
        let mut program = Command::new(&self.program);
        program.args(["--exact", check]).env("LD_LIBRARY_PATH", &self.folder);
        let mut running = program.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("the checks");
        let started = Instant::now();
        loop {
            match running.try_wait().expect("the checks") {
                Some(status) if status.success() => return Fate::Survives,
                Some(_) => return Fate::Caught,
                None if started.elapsed() < limit => sleep(Duration::from_millis(5)),
                None => {
                    running.kill().and_then(|()| running.wait()).expect("an end of the checks");
                    return Fate::TimedOut;
                }
            }
        }
    }

    /// The fate of a changed source, by the checks of these modules.
    fn fate(&self, mutant: &Mutant, modules: &[&str]) -> Fate {
        let path = self.sources().join(&mutant.file);
        let sound = fs::read(&path).expect("a source");
        fs::write(&path, &mutant.source).expect("a source");
        let is_of = |name: &str| name.split_once("::").is_some_and(|(module, _)| modules.contains(&module));
        let runs = self.checks.iter().filter(|(_, name)| is_of(name));
        let fate = match self.compile() {
            false => Fate::Broken,
            true => runs
                .map(|(took, name)| self.run(name, 10 * *took + Duration::from_secs(10)))
                .find(|fate| *fate != Fate::Survives)
                .unwrap_or(Fate::Survives),
        };
        fs::write(&path, sound).expect("a source");
        fate
    }
}

fn main() -> ExitCode {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let target = env::var_os("CARGO_TARGET_DIR").map_or_else(|| here.join("../../target"), PathBuf::from);
    let target = std::path::absolute(target).expect("the target directory");
    let only: Vec<String> = env::args().skip(1).collect();
    let is_chosen = |name: &str| only.is_empty() || only.iter().any(|start| name.starts_with(start));
    let sources = read(&here.join("../cuda"));
    fs::create_dir_all(target.join("mutants/cuda")).expect("a folder for sources");
    for (file, text) in &sources {
        fs::write(target.join("mutants/cuda").join(file), text).expect("a source");
    }
    let bench = Bench::new(target.join("mutants"));

    let text = fs::read_to_string(here.join("survivors.txt")).unwrap_or_default();
    let mut explained: BTreeMap<&str, bool> = BTreeMap::new();
    let mut problems = 0;
    let mut problem = |what: &str, name: &str| {
        println!("{what}: {name}");
        problems += 1;
    };
    let mut why = "";
    for line in text.lines() {
        match line {
            _ if line.is_empty() || line.starts_with('#') => why = line,
            _ if why.is_empty() => problem("explained by nothing", line),
            _ if is_chosen(line) => drop(explained.insert(line, false)),
            _ => {}
        }
    }

    let chosen = sources.iter().filter(|(file, _)| is_chosen(file) && *file != "ptx.cuh");
    let all: Vec<Mutant> = chosen.flat_map(|(file, text)| mutants(file, text)).collect();
    let (mut caught, mut timed_out, mut broken, mut known) = (0, 0, 0, 0);
    for (number, mutant) in all.iter().enumerate() {
        eprint!("\r{number} of {}", all.len());
        let kernels =
            sources.keys().filter(|source| source.ends_with(".cu") && includes(&sources, source, &mutant.file));
        // attention_backward.cu is checked by attention.
        let is_for = |module: &str| kernels.clone().any(|kernel| kernel.starts_with(module));
        let modules: Vec<String> = checks().filter_map(|(name, _)| Some(name.split_once("::")?.0.to_owned())).collect();
        let modules: Vec<&str> = modules.iter().map(String::as_str).filter(|module| is_for(module)).collect();
        match bench.fate(mutant, &modules) {
            Fate::Broken => broken += 1,
            Fate::Caught => caught += 1,
            Fate::TimedOut => timed_out += 1,
            Fate::Survives => match explained.get_mut(mutant.name.as_str()) {
                Some(is_met) => {
                    *is_met = true;
                    known += 1;
                }
                None => problem(&format!("survives, line {}", mutant.line), &mutant.name),
            },
        }
    }
    eprint!("\r");
    for (name, _) in explained.iter().filter(|(_, is_met)| !**is_met) {
        problem("explained, but caught or gone", name);
    }
    println!(
        "{} mutants: {caught} caught, {timed_out} more by their time, {broken} no programs, {known} explained",
        all.len()
    );
    if problems == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
