//! Builds the kernels: for the CPU where the emulation is wanted, and for GPUs.

#[path = "build/nvcc.rs"]
mod nvcc;

use std::{
    env, fs,
    path::{Path, PathBuf},
};

/// What the checked build has the compiler report.
const SANITIZERS: &str = "-fsanitize=thread,alignment,bounds,shift,signed-integer-overflow";

fn main() {
    for folder in ["build", "cuda", "emu", "tests/defects"] {
        println!("cargo::rerun-if-changed={folder}");
    }
    // Another folder of sources, for `make kernel-mutants`.
    println!("cargo::rerun-if-env-changed=TUNESMITH_KERNELS");
    let sources = env::var_os("TUNESMITH_KERNELS").map_or_else(|| PathBuf::from("cuda"), PathBuf::from);
    println!("cargo::rerun-if-changed={}", sources.display());
    if env::var_os("CARGO_FEATURE_EMULATION").is_some() {
        emulate("fast", &sources);
        emulate("checked", &sources);
    }
    if env::var_os("CARGO_FEATURE_CUDA").is_some() {
        nvcc::compile(&sources);
    }
}

/// The kernels and the runtime of the emulation; the checked ones report each access of memory.
fn emulate(build: &str, cuda: &Path) {
    let common = || {
        let mut compiler = cc::Build::new();
        compiler.cpp(true).std("c++17").include(cuda).include("emu").debug(true).warnings(true).extra_warnings(true);
        if build == "checked" {
            compiler.define("EMU_CHECKED", None);
        }
        if env::var("CARGO_CFG_TARGET_ARCH").as_deref() == Ok("x86_64") {
            compiler.flag("-march=x86-64-v3");
        }
        // A multiplication and an addition are two roundings unless the source says fma, on either side.
        compiler.flag("-ffp-contract=off").flag("-Wno-unknown-pragmas");
        compiler
    };
    let mut kernels = common();
    // A large frame touches its guard page before it touches the next stack.
    kernels.flag("-x").flag("c++").flag("-fstack-clash-protection");
    match build {
        // -O1 leaves the accesses as the source has them.
        "checked" => kernels.opt_level(1).flag(SANITIZERS),
        _ => kernels.opt_level(2),
    };
    for folder in [cuda, Path::new("tests/defects")] {
        kernels.files(sources(folder, "cu"));
    }
    kernels.compile(&format!("tunesmith_kernels_{build}"));
    // The runtime reports nothing of itself. It comes behind the kernels, which need it.
    common().opt_level(3).files(sources(Path::new("emu"), "cc")).compile(&format!("tunesmith_emulation_{build}"));
}

fn sources(folder: &Path, extension: &str) -> Vec<PathBuf> {
    let files = fs::read_dir(folder).into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path()));
    let mut files: Vec<_> = files.filter(|path| path.extension().is_some_and(|found| found == extension)).collect();
    files.sort();
    files
}
