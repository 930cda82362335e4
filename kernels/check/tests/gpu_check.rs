//! The program `gpu-check` on a driver that has no GPU (`fake/cuda.cc`): it does there all that it does on a card, and says in words
//! what stands in the way.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

use tunesmith_kernels::compiled::FOLDER;

/// Whether it exited with 0, and what it said.
struct Outcome {
    is_success: bool,
    said: String,
}

/// Runs a program of the host, which must succeed.
fn run(command: &mut Command) {
    let output = command.output().unwrap_or_else(|error| panic!("{}: {error}", command.get_program().display()));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// A folder with libcuda.so.1, and one with libcublasLt.so.13.
fn libraries() -> &'static [PathBuf; 2] {
    static LIBRARIES: OnceLock<[PathBuf; 2]> = OnceLock::new();
    LIBRARIES.get_or_init(|| {
        let out = Path::new(env!("CARGO_TARGET_TMPDIR"));
        let sources = Path::new(env!("CARGO_MANIFEST_DIR"));
        let [driver, products] = ["driver", "products"].map(|name| out.join(name));
        let compiler = env::var_os("CXX").unwrap_or_else(|| "c++".into());
        for folder in [&driver, &products] {
            fs::create_dir_all(folder).unwrap();
        }
        let shared = |name: &str, to: PathBuf| {
            let mut command = Command::new(&compiler);
            command
                .args(["-std=c++17", "-O2", "-shared", "-fPIC", "-march=x86-64-v3", "-I"])
                .arg(sources.join("../emu"));
            command.arg(sources.join("tests/fake").join(name)).arg("-o").arg(to);
            command
        };
        // The emulation's fast build is inside, whole, for kernels are looked up by their names.
        let archive = format!("{FOLDER}/libtunesmith_kernels_fast.a");
        let whole = ["-Wl,--whole-archive", &archive, "-Wl,--no-whole-archive", "-ldl"];
        run(shared("cuda.cc", driver.join("libcuda.so.1")).args(whole));
        run(shared("cublaslt.cc", products.join("libcublasLt.so.13")).arg("-Wl,-soname,libcublasLt.so.13"));
        [driver, products]
    })
}

/// Runs gpu-check on the fake driver with a fault, or without the driver.
fn gpu_check(arguments: &[&str], variables: &[(&str, &str)], has_driver: bool) -> Outcome {
    let [driver, _] = libraries();
    let mut command = Command::new(env!("CARGO_BIN_EXE_gpu-check"));
    command.args(arguments).env_remove("LD_LIBRARY_PATH").env_remove("TUNESMITH_CUDA_LIBS").env("PATH", "");
    if has_driver {
        command.env("LD_LIBRARY_PATH", driver);
    }
    let output = command.envs(variables.iter().copied()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    Outcome { is_success: output.status.success(), said: said.into_owned() }
}

/// Where the library of products is.
fn products() -> [(&'static str, &'static str); 1] {
    [("TUNESMITH_CUDA_LIBS", libraries()[1].to_str().unwrap())]
}

#[test]
fn every_check_passes_by_way_of_the_driver() {
    let Outcome { is_success, said } = gpu_check(&["run"], &products(), true);
    assert!(is_success, "{said}");
    for name in ["norm::", "attention::", "gemm::", "quantize::four_bits"] {
        assert!(said.contains(name), "{name}: {said}");
    }
}

#[test]
fn checks_can_do_without_filled_memory() {
    let Outcome { is_success, said } = gpu_check(&["run", "low_rank::", "norm::", "--unfilled"], &products(), true);
    assert!(is_success, "{said}");
}

#[test]
fn checks_run_in_processes_of_their_own_and_a_failure_is_counted() {
    let Outcome { is_success, said } = gpu_check(&["checks", "norm::"], &products(), true);
    assert!(is_success && said.contains("ok      norm::backward_is_that_of_f64"), "{said}");
    let Outcome { is_success, said } = gpu_check(&["checks", "norm::"], &[("FAKE_CUDA", "crash")], true);
    assert!(!is_success && said.contains("FAILED  norm::backward_is_that_of_f64"), "{said}");
    assert!(said.contains("2 failed"), "{said}");
}

#[test]
fn times_stand_beside_floors() {
    let Outcome { is_success, said } =
        gpu_check(&["floors", "--elements", "40000", "--repeats", "1"], &products(), true);
    assert!(is_success, "{said}");
    assert!(said.contains("Fake H100: 3.35 TB/s, 989 TFLOP/s; tensors of 40960 elements"), "{said}");
    for name in [
        "rms_norm",
        "attention_keys_128",
        "low_rank_up_b_16",
        "embedding_backward",
        "product by a weight",
        "cuBLASLt 130002: 10×4096/4096",
    ] {
        assert!(said.contains(name), "{name}: {said}");
    }
}

#[test]
fn whatever_stands_in_the_way_is_said_in_words() {
    let card = |fault: &str| gpu_check(&["card"], &[("FAKE_CUDA", fault)], true).said;
    let norm = |fault: &str| gpu_check(&["run", "norm::forward"], &[("FAKE_CUDA", fault)], true).said;
    let attention = |fault: &str| gpu_check(&["run", "attention::heads_of_each"], &[("FAKE_CUDA", fault)], true).said;
    let without_driver = gpu_check(&["card"], &[], false).said;
    let no_such_gpu = gpu_check(&["card", "--device", "3"], &[], true).said;
    let small = [("FAKE_CUDA", "small"), products()[0]];
    let old_library = [("FAKE_CUBLASLT", "120400"), products()[0]];
    for (said, words) in [
        (without_driver, "no CUDA driver: libcuda.so.1 is not there. Install NVIDIA's driver"),
        (
            card("old"),
            "the driver is too old: it supports CUDA 12.4, and the kernels need 13.0. Install a driver of branch 580",
        ),
        (card("none"), "no GPU 0: the driver sees 0. Ask for one (nvidia.com/gpu)"),
        (no_such_gpu, "no GPU 3: the driver sees 1"),
        (card("ancient"), "GPU Fake V100 (sm_70) has no bf16 tensor cores: sm_80 (Ampere) or later is needed"),
        (norm("unknown"), "loading of rms_norm: CUDA_ERROR_NO_BINARY_FOR_GPU (no kernel image is available"),
        (
            gpu_check(&["card"], &small, true).said,
            "out of memory: 33554432 bytes for workspace of products; 0 bytes are in use by this program, 1048576 of 1048576 are free",
        ),
        (
            norm("crash"),
            "work of the GPU: CUDA_ERROR_ILLEGAL_ADDRESS (an illegal memory access was encountered; a kernel before may be",
        ),
        (
            norm("short"),
            "rms_norm: arguments of [8, 8, 8, 8, 8, 8, 4, 4, 4] bytes; the kernel declares [8, 8, 8, 8, 8, 8, 4, 4]",
        ),
        (attention("narrow"), "attention_64 wants 46080 bytes of shared memory for a block; this GPU gives 32768"),
        (
            gpu_check(&["card"], &[], true).said,
            "Products are not run: cuBLASLt can't be used: libcublasLt.so.13 is not there",
        ),
        (
            gpu_check(&["card"], &[("TUNESMITH_CUDA_LIBS", "/nowhere")], true).said,
            "/nowhere/libcublasLt.so.13: cannot open",
        ),
        (gpu_check(&["card"], &old_library, true).said, "it is of version 12, and 13 is needed"),
        (gpu_check(&["card"], &products(), true).said, "cuBLASLt: version 130002"),
    ] {
        assert!(said.contains(words), "{words}: {said}");
    }
}
