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

/// What a number of a matrix is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Number {
    /// bfloat16.
    Bf16,
    /// 32 bits.
    F32,
}

impl Number {
    /// Its bytes.
    pub fn bytes(self) -> usize {
        match self {
            Self::Bf16 => 2,
            Self::F32 => 4,
        }
    }
}

/// A matrix in row-major order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Matrix {
    /// Its first number.
    pub at: Address,
    /// Rows as it is stored.
    pub rows: usize,
    /// Columns as it is stored.
    pub columns: usize,
    /// Numbers from a row to the next.
    pub stride: usize,
    /// What they are.
    pub number: Number,
    /// Whether its transpose is meant.
    pub transposed: bool,
}

impl Matrix {
    /// A matrix without gaps.
    pub fn new(at: Address, rows: usize, columns: usize, number: Number) -> Self {
        Self { at, rows, columns, stride: columns, number, transposed: false }
    }

    /// Its transpose.
    #[must_use]
    pub fn transpose(self) -> Self {
        Self { transposed: !self.transposed, ..self }
    }

    /// Rows and columns as it is meant.
    pub fn shape(self) -> [usize; 2] {
        if self.transposed { [self.columns, self.rows] } else { [self.rows, self.columns] }
    }
}

/// d = alpha · a·b + c: a and b of bf16, sums of f32, c and d of either. c may be absent, or lie where d does.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Gemm {
    /// [m, k].
    pub a: Matrix,
    /// [k, n].
    pub b: Matrix,
    /// [m, n], of d's numbers.
    pub c: Option<Matrix>,
    /// [m, n], not transposed.
    pub d: Matrix,
    /// Of the product.
    pub alpha: f32,
}

impl Gemm {
    /// What is wrong with its shapes.
    pub(crate) fn problem(&self) -> Option<String> {
        let ([m, k], [of_b, n]) = (self.a.shape(), self.b.shape());
        let is_like_d =
            |matrix: &Matrix| matrix.shape() == [m, n] && matrix.number == self.d.number && !matrix.transposed;
        match () {
            () if k != of_b => Some(format!("a product of [{m}, {k}] and [{of_b}, {n}]")),
            () if self.a.number != Number::Bf16 || self.b.number != Number::Bf16 => {
                Some("factors that are not of bf16".into())
            }
            () if !is_like_d(&self.d) => Some(format!("d of {:?} for a product of [{m}, {n}]", self.d.shape())),
            () if !self.c.iter().all(is_like_d) => Some("c is not as d is".into()),
            () => None,
        }
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

    /// Multiplies matrices.
    ///
    /// # Safety
    /// The addresses must reach as far as the matrices go.
    ///
    /// # Errors
    /// Shapes that do not fit, or something that was asked for before has failed.
    unsafe fn multiply(&self, gemm: &Gemm) -> Result<(), Error>;

    /// Waits until all that was asked for is done.
    ///
    /// # Errors
    /// Something has failed.
    fn synchronize(&self) -> Result<(), Error>;
}
