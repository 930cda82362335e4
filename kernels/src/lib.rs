//! Tunesmith's CUDA kernels, and the seam through which they are launched: on a GPU, or on the CPU under an emulation that checks
//! every access of memory.
//!
//! `cuda/` has the kernels' sources, the same for both. [`kernels`] has their names and arguments; a [`Device`] runs them.

#[macro_use]
mod kernel;
pub mod attention;
mod device;
#[cfg(feature = "emulation")]
pub mod emulator;
pub mod kernels;

pub use device::{Address, Device, Error, Gemm, Grid, Matrix, Number};
pub use kernel::{Argument, Kernel, Launch};
