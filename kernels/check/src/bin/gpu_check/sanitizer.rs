//! The checks under NVIDIA's compute-sanitizer: what the emulation's checker finds, found on the GPU itself.

use std::{
    env,
    path::PathBuf,
    process::{Command, Stdio},
    time::Instant,
};

const TOOLS: [&str; 4] = ["memcheck", "racecheck", "initcheck", "synccheck"];
/// What it exits with if it has found something.
const FOUND: i32 = 99;

/// The program: beside this one, or wherever $PATH has it.
fn program() -> Option<PathBuf> {
    let beside = env::current_exe().ok()?.parent()?.join("sanitizer/compute-sanitizer");
    let in_path = env::var_os("PATH").unwrap_or_default();
    let in_path = env::split_paths(&in_path).map(|folder| folder.join("compute-sanitizer")).collect::<Vec<_>>();
    [beside].into_iter().chain(in_path).find(|program| program.is_file())
}

/// Runs all checks under each tool. How many found something.
pub(crate) fn run(device: usize) -> usize {
    let Some(program) = program() else {
        println!("not run: it is neither beside this program nor in $PATH");
        return 0;
    };
    let checks = env::current_exe().expect("this program");
    let mut failed = 0;
    for tool in TOOLS {
        let start = Instant::now();
        let mut sanitizer = Command::new(&program);
        // Calls that the driver refuses are among what is checked, and how we learn how many arguments a kernel has.
        sanitizer
            .args(["--tool", tool, "--error-exitcode", &FOUND.to_string(), "--report-api-errors", "no"])
            .arg(&checks);
        sanitizer.args(["run", "--device", &device.to_string()]);
        if tool == "initcheck" {
            sanitizer.arg("--unfilled");
        }
        let output = sanitizer.stdin(Stdio::null()).output();
        let seconds = start.elapsed().as_secs_f64();
        match output {
            Ok(output) if output.status.success() => println!("ok      {tool} ({seconds:.0} s)"),
            Ok(output) => {
                failed += 1;
                let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
                let lines: Vec<&str> = said.lines().filter(|line| line.starts_with("=========")).take(60).collect();
                println!("FAILED  {tool} ({seconds:.0} s), {}\n{}", output.status, lines.join("\n"));
            }
            Err(error) => {
                failed += 1;
                println!("FAILED  {tool}: {}: {error}", program.display());
            }
        }
    }
    failed
}
