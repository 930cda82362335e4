//! What a device may fail by, in words that say what to do.

use crate::memory::Memory;

/// A device that failed.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Error {
    /// No program can reach a GPU here.
    #[error(
        "no CUDA driver: libcuda.so.1 is not there. Install NVIDIA's driver (in a container: its container toolkit, \
         and a GPU for the pod), or compute on the CPU"
    )]
    NoDriver,
    /// The driver can't load our kernels.
    #[error(
        "the driver is too old: it supports CUDA {}.{}, and the kernels need {}.{}. Install a driver of branch 580 or later",
        found / 1000, found % 1000 / 10, needed / 1000, needed % 1000 / 10
    )]
    DriverTooOld {
        /// The CUDA version of the driver, as 1000 · major + 10 · minor.
        found: i32,
        /// That of the kernels.
        needed: i32,
    },
    /// There is no such GPU.
    #[error(
        "no GPU {ordinal}: the driver sees {count}. Ask for one (nvidia.com/gpu), and look at CUDA_VISIBLE_DEVICES and \
         NVIDIA_VISIBLE_DEVICES"
    )]
    NoGpu {
        /// The GPU that was asked for.
        ordinal: usize,
        /// How many there are.
        count: usize,
    },
    /// The GPU is older than the kernels.
    #[error(
        "GPU {name} (sm_{capability}) has no bf16 tensor cores: sm_80 (Ampere) or later is needed, or compute on the CPU"
    )]
    UnsupportedGpu {
        /// The card.
        name: String,
        /// Its compute capability: 10 · major + minor.
        capability: i32,
    },
    /// There is no room.
    #[error("out of memory: {bytes} bytes for {name}; {} bytes are in use by this program, {} of {} are free", memory.used, memory.free, memory.total)]
    Memory {
        /// Bytes that were asked for.
        bytes: usize,
        /// What they are for.
        name: String,
        /// The device's memory then.
        memory: Memory,
    },
    /// A library of CUDA's can't be used.
    #[error("{name} can't be used: {reason}. Install CUDA's libraries, or name their folder in TUNESMITH_CUDA_LIBS")]
    Library {
        /// The library.
        name: &'static str,
        /// Why.
        reason: String,
    },
    /// Arguments that are not what the kernel declares.
    #[error("{kernel}: arguments of {ours:?} bytes; the kernel declares {declared:?}")]
    Arguments {
        /// The kernel.
        kernel: &'static str,
        /// Sizes of what was given.
        ours: Vec<usize>,
        /// Sizes in the kernel.
        declared: Vec<usize>,
    },
    /// A launch that the device can't do.
    #[error("{kernel} wants {wanted} bytes of shared memory for a block; this GPU gives {limit}")]
    SharedMemory {
        /// The kernel.
        kernel: &'static str,
        /// Of a block.
        wanted: u32,
        /// Of a block.
        limit: u32,
    },
    /// A product whose matrices do not fit each other.
    #[error("product: {0}")]
    Shapes(String),
    /// The driver refused, or what was asked for before has failed; then each later call says so again.
    #[error("{during}: {code} ({text})")]
    Driver {
        /// What was asked for when it showed. Work of the device may have failed before that.
        during: String,
        /// The driver's name for it.
        code: String,
        /// Its explanation.
        text: String,
    },
    /// The emulation has found a defect of a kernel, or of its launch.
    #[error("{0}")]
    Defect(String),
}
