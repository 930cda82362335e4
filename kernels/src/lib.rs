//! Tunesmith's CUDA kernels, and the seam through which they are launched: on a GPU, or on the CPU under an emulation that checks
//! every access of memory.
//!
//! `cuda/` has the kernels' sources, the same for both. [`kernels`] has their names and arguments; a [`Device`] runs them.

#[macro_use]
mod kernel;
pub mod attention;
#[cfg(feature = "emulation")]
pub mod builds;
#[cfg(feature = "cuda")]
#[doc(hidden)]
pub mod compiled;
mod device;
#[cfg(feature = "cuda")]
mod driver;
#[cfg(feature = "emulation")]
pub mod emulator;
mod error;
pub mod kernels;
pub mod low_rank;
mod memory;

pub use device::{Chosen, Device, Gemm, Grid, Matrix, Number, Stream};
#[cfg(feature = "cuda")]
pub use driver::Gpu;
pub use error::Error;
pub use kernel::{Argument, Kernel, Launch};
pub use memory::{Address, Memory};
