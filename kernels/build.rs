//! Builds the kernels: for the CPU where the emulation is wanted, and for GPUs.

#[path = "build/nvcc.rs"]
mod nvcc;

use std::{
    collections::BTreeSet,
    env, fs,
    path::{Path, PathBuf},
};

/// What the checked build has the compiler report.
const SANITIZERS: &str = "-fsanitize=thread,alignment,bounds,shift,signed-integer-overflow";

fn main() {
    for folder in ["build", "cuda", "emu", "tests/defects"] {
        println!("cargo::rerun-if-changed={folder}");
    }
    println!("cargo::rerun-if-env-changed=TUNESMITH_KERNELS");
    if env::var_os("CARGO_FEATURE_EMULATION").is_some() {
        let cuda = Path::new("cuda");
        archive("fast", &emulated("fast", cuda));
        // Of `make kernel-mutants`: a folder of changed sources for the checked build.
        match env::var_os("TUNESMITH_KERNELS").map(PathBuf::from) {
            None => archive("checked", &emulated("checked", cuda)),
            Some(changed) => {
                println!("cargo::rerun-if-changed={}", changed.display());
                share("checked", &emulated("checked", &changed), &changed);
            }
        }
    }
    if env::var_os("CARGO_FEATURE_CUDA").is_some() {
        nvcc::compile(Path::new("cuda"));
    }
}

/// A compiler of the emulation. The checked build reports each access of memory.
fn compiler(build: &str, cuda: &Path) -> cc::Build {
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
}

/// The objects of the kernels and of the runtime that they need, which reports nothing of itself.
fn emulated(build: &str, cuda: &Path) -> Vec<PathBuf> {
    let mut kernels = compiler(build, cuda);
    // A large frame touches its guard page before it touches the next stack.
    kernels.flag("-x").flag("c++").flag("-fstack-clash-protection");
    match build {
        // -O1 leaves the accesses as the source has them.
        "checked" => kernels.opt_level(1).flag(SANITIZERS),
        _ => kernels.opt_level(2),
    };
    let of_kernels = [cuda, Path::new("tests/defects")].into_iter().flat_map(|folder| sources(folder, "cu"));
    let mut objects = objects(&kernels, build, cuda, of_kernels);
    let mut runtime = compiler(build, cuda);
    objects.extend(self::objects(runtime.opt_level(3), build, cuda, sources(Path::new("emu"), "cc")));
    objects
}

fn archive(build: &str, objects: &[PathBuf]) {
    compiler(build, Path::new("cuda")).objects(objects).compile(&format!("tunesmith_kernels_{build}"));
}

/// A shared library beside the sources' folder: a program that is linked runs the kernels as they are then.
fn share(build: &str, objects: &[PathBuf], cuda: &Path) {
    let (name, folder) = (format!("tunesmith_kernels_{build}"), cuda.parent().expect("a folder has a parent"));
    let mut linker = compiler(build, cuda).get_compiler().to_command();
    linker.args(objects).arg("-shared").arg("-o").arg(folder.join(format!("lib{name}.so")));
    assert!(linker.status().is_ok_and(|status| status.success()), "{linker:?}");
    println!("cargo::rustc-link-search=native={}", folder.display());
    println!("cargo::rustc-link-lib=dylib={name}");
}

/// The objects of sources. Beside each lies the text that it was made of: its source's, with all headers, and the compiler's flags. An
/// object whose text has not changed stays.
fn objects(compiler: &cc::Build, build: &str, cuda: &Path, sources: impl IntoIterator<Item = PathBuf>) -> Vec<PathBuf> {
    let folder = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it")).join(build);
    fs::create_dir_all(&folder).expect("a folder for objects");
    let flags = format!("{:?}", compiler.get_compiler().to_command());
    let object_of = |source: PathBuf| {
        let name = source.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let (object, made_of) = (folder.join(format!("{name}.o")), folder.join(format!("{name}.txt")));
        let mut text = flags.clone();
        add_text(&mut text, &source, &[cuda, Path::new("emu")], &mut BTreeSet::new());
        if fs::read_to_string(&made_of).ok().as_ref() != Some(&text) {
            let compiled = compiler.clone().out_dir(&folder).file(&source).compile_intermediates();
            fs::rename(&compiled[0], &object).expect("an object");
            fs::write(&made_of, text).expect("the text of an object");
        }
        object
    };
    sources.into_iter().map(object_of).collect()
}

/// Adds a file's text, then those of the headers of ours that it includes, each once.
fn add_text(text: &mut String, path: &Path, folders: &[&Path], seen: &mut BTreeSet<PathBuf>) {
    let Ok(own) = fs::read_to_string(path) else { return };
    if !seen.insert(path.to_owned()) {
        return;
    }
    text.push_str(&own);
    let included = own.lines().filter_map(|line| line.strip_prefix("#include \"")?.split('"').next());
    for (name, folder) in included.flat_map(|name| folders.iter().map(move |folder| (name, folder))) {
        add_text(text, &folder.join(name), folders, seen);
    }
}

fn sources(folder: &Path, extension: &str) -> Vec<PathBuf> {
    let files = fs::read_dir(folder).into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path()));
    let mut files: Vec<_> = files.filter(|path| path.extension().is_some_and(|found| found == extension)).collect();
    files.sort();
    files
}
