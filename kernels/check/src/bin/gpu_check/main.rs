//! All that is to be known about the kernels on a GPU, by one command: `gpu-check`. It names the card, holds every kernel against the
//! CPU, runs them under compute-sanitizer where that is there, and sets their times beside their floors.

mod floors;
mod sanitizer;

use std::{
    env,
    process::{Command, ExitCode},
    sync::OnceLock,
    time::Instant,
};

use clap::{Parser, Subcommand};
use tunesmith_kernel_checks::{checks, leave_unfilled, stand_on};
use tunesmith_kernels::{Device, Error, Gpu};

/// It works on 15 GB, and is too slow under a sanitizer.
const LARGE: &str = "quantize::weights_of_a_tensor_beyond_two_to_the_31_are_found";
/// Checks of products, which need cuBLASLt.
const PRODUCTS: &str = "gemm::";

/// Checks Tunesmith's kernels on a GPU.
///
/// cuBLASLt is looked for in $TUNESMITH_CUDA_LIBS, then where the system has its libraries; without it products are not run.
/// compute-sanitizer is looked for in the folder `sanitizer` beside this program, then in $PATH.
#[derive(Parser)]
struct Arguments {
    /// The GPU, by its number among those that the driver sees.
    #[arg(long, default_value_t = 0, global = true)]
    device: usize,
    /// One part alone. Without it: card, checks, sanitizer and floors.
    #[command(subcommand)]
    part: Option<Part>,
}

#[derive(Subcommand)]
enum Part {
    /// Names the card, the driver's and the library's state.
    Card,
    /// Holds every kernel against the CPU: each check in a process of its own.
    Checks {
        /// Those whose names hold this.
        #[arg(default_value = "")]
        filter: String,
    },
    /// Runs all checks under each tool of compute-sanitizer.
    Sanitizer,
    /// Sets the kernels' times beside their floors.
    Floors {
        /// Elements of a tensor.
        #[arg(long, default_value_t = 1 << 26)]
        elements: usize,
        /// How often each kernel is run; the median counts.
        #[arg(long, default_value_t = 20)]
        repeats: usize,
    },
    /// Runs checks in this process, until one fails.
    Run {
        /// Those whose names hold one of these.
        filters: Vec<String>,
        /// Leaves new memory as it is: for a tool that finds what nobody has written.
        #[arg(long)]
        unfilled: bool,
    },
}

/// The GPU that was asked for.
static DEVICE: OnceLock<usize> = OnceLock::new();

fn open() -> Result<Gpu, Error> {
    Gpu::open(DEVICE.get().copied().unwrap_or(0))
}

/// What stands in the way of products; none if they can be run.
fn without_products(gpu: &Gpu) -> Option<Error> {
    gpu.library_version().err()
}

fn card() -> Result<(), Error> {
    let gpu = open()?;
    println!("GPU: {} (sm_{})", gpu.name(), gpu.capability());
    println!("Memory: {:.1} GiB, {:.1} of it free", gib(gpu.memory()?.total), gib(gpu.memory()?.free));
    println!("Bandwidth by clock and bus: {:.2} TB/s", gpu.bandwidth()? / 1e12);
    match gpu.library_version() {
        Ok(version) => println!("cuBLASLt: version {version}"),
        Err(error) => println!("Products are not run: {error}"),
    }
    Ok(())
}

fn gib(bytes: usize) -> f64 {
    bytes as f64 / f64::from(1 << 30)
}

/// Runs checks in processes of their own: a kernel that fails leaves the GPU of its process unusable. How many failed.
fn all_checks(filter: &str) -> Result<usize, Error> {
    let no_products = without_products(&open()?);
    let (mut failed, program) = (0, env::current_exe().expect("this program"));
    for (name, _) in checks().filter(|(name, _)| name.contains(filter)) {
        if no_products.is_some() && name.starts_with(PRODUCTS) {
            println!("not run {name}");
            continue;
        }
        let start = Instant::now();
        let mut run = Command::new(&program);
        run.args(["run", &name, "--device", &DEVICE.get().copied().unwrap_or(0).to_string()]);
        let output = run.output().expect("this program runs");
        let seconds = start.elapsed().as_secs_f64();
        if output.status.success() {
            println!("ok      {name} ({seconds:.1} s)");
        } else {
            failed += 1;
            println!("FAILED  {name} ({seconds:.1} s)\n{}", String::from_utf8_lossy(&output.stderr));
        }
    }
    Ok(failed)
}

/// Runs checks here.
fn run(filters: &[String], unfilled: bool) -> Result<(), Error> {
    // It keeps the context for as long as this runs.
    let gpu = open()?;
    let no_products = without_products(&gpu);
    stand_on(|_| Ok(Box::new(open()?)));
    if unfilled {
        leave_unfilled();
    }
    let is_wanted = |name: &str| filters.is_empty() || filters.iter().any(|filter| name.contains(filter));
    for (name, check) in checks().filter(|(name, _)| is_wanted(name)) {
        let is_too_large = filters.is_empty() && name == LARGE;
        let lacks_products = no_products.is_some() && name.starts_with(PRODUCTS);
        if is_too_large || lacks_products {
            continue;
        }
        println!("{name}");
        check();
    }
    Ok(())
}

/// Everything. How much failed.
fn everything() -> Result<usize, Error> {
    card()?;
    println!("\nKernels against the CPU:");
    let mut failed = all_checks("")?;
    println!("\ncompute-sanitizer:");
    failed += sanitizer::run(DEVICE.get().copied().unwrap_or(0));
    println!("\nTimes and floors:");
    floors::print(&open()?, 1 << 26, 20)?;
    Ok(failed)
}

fn main() -> ExitCode {
    let Arguments { device, part } = Arguments::parse();
    DEVICE.get_or_init(|| device);
    let result = match part {
        None => everything(),
        Some(Part::Card) => card().map(|()| 0),
        Some(Part::Checks { filter }) => all_checks(&filter),
        Some(Part::Sanitizer) => open().map(|_| sanitizer::run(device)),
        Some(Part::Floors { elements, repeats }) => {
            open().and_then(|gpu| floors::print(&gpu, elements, repeats)).map(|()| 0)
        }
        Some(Part::Run { filters, unfilled }) => run(&filters, unfilled).map(|()| 0),
    };
    match result {
        Ok(0) => ExitCode::SUCCESS,
        Ok(failed) => {
            println!("\n{failed} failed");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("gpu-check: {error}");
            ExitCode::from(2)
        }
    }
}
