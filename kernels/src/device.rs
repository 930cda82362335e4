//! What runs kernels: memory, copies and launches on one stream.

use crate::kernel::Launch;

/// An address in a device's memory, which the host can't read.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Address(pub u64);

impl Address {
    /// No memory: for an argument that a kernel may go without.
    pub const NONE: Self = Self(0);

    /// So many bytes further on.
    #[must_use]
    pub fn plus(self, bytes: u64) -> Self {
        Self(self.0 + bytes)
    }
}

/// Blocks and threads of a launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grid {
    /// Blocks in each dimension.
    pub blocks: [u32; 3],
    /// Threads of a block.
    pub threads: u32,
    /// Shared memory of a block.
    pub shared_bytes: u32,
}

impl Grid {
    /// Blocks in a row, without shared memory.
    pub fn row(blocks: u32, threads: u32) -> Self {
        Self { blocks: [blocks, 1, 1], threads, shared_bytes: 0 }
    }

    /// The same with shared memory.
    #[must_use]
    pub fn with_shared(self, shared_bytes: u32) -> Self {
        Self { shared_bytes, ..self }
    }
}

/// A device that failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no room.
    #[error("out of memory: {bytes} bytes for {name}")]
    Memory {
        /// Bytes that were asked for.
        bytes: usize,
        /// What they are for.
        name: String,
    },
    /// The emulation has found a defect of a kernel, or of its launch.
    #[error("{0}")]
    Defect(String),
}

/// A GPU, or its emulation. Copies and launches are done in their order, at the latest when the host synchronizes; the host's
/// buffers must stay as they are until then.
pub trait Device {
    /// Memory of the device; it is not cleared.
    ///
    /// # Errors
    /// There is no room.
    fn allocate(&self, bytes: usize, name: &str) -> Result<Address, Error>;

    /// Gives memory back, once all that was asked for is done.
    ///
    /// # Errors
    /// Something that was asked for before has failed.
    fn release(&self, at: Address) -> Result<(), Error>;

    /// Copies to the device.
    ///
    /// # Safety
    /// `from` must stay readable until the host has synchronized, and the device's memory must have room.
    ///
    /// # Errors
    /// Something that was asked for before has failed.
    unsafe fn upload(&self, to: Address, from: *const u8, bytes: usize) -> Result<(), Error>;

    /// Copies from the device.
    ///
    /// # Safety
    /// `to` must stay writable until the host has synchronized, and the device's memory must hold so many bytes.
    ///
    /// # Errors
    /// Something that was asked for before has failed.
    unsafe fn download(&self, from: Address, to: *mut u8, bytes: usize) -> Result<(), Error>;

    /// Launches a kernel.
    ///
    /// # Safety
    /// The addresses among its arguments must reach as far as the kernel goes.
    ///
    /// # Errors
    /// The launch is impossible, or something that was asked for before has failed.
    unsafe fn launch(&self, launch: &dyn Launch, grid: Grid) -> Result<(), Error>;

    /// Waits until all that was asked for is done.
    ///
    /// # Errors
    /// Something has failed.
    fn synchronize(&self) -> Result<(), Error>;
}
