//! What runs kernels: memory, and streams of copies, launches and products.

use crate::{
    error::Error,
    kernel::Launch,
    memory::{Address, Memory},
};

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
    /// Whether its matrices fit each other.
    ///
    /// # Errors
    /// They do not.
    pub fn check(&self) -> Result<(), Error> {
        let ([m, k], [of_b, n]) = (self.a.shape(), self.b.shape());
        let is_like_d =
            |matrix: &Matrix| matrix.shape() == [m, n] && matrix.number == self.d.number && !matrix.transposed;
        Err(Error::Shapes(match () {
            () if k != of_b => format!("[{m}, {k}] by [{of_b}, {n}]"),
            () if self.a.number != Number::Bf16 || self.b.number != Number::Bf16 => {
                "factors that are not of bf16".into()
            }
            () if !is_like_d(&self.d) => format!("d of {:?} instead of [{m}, {n}]", self.d.shape()),
            () if !self.c.iter().all(is_like_d) => "c is not as d is".into(),
            () => return Ok(()),
        }))
    }
}

/// An algorithm that a library has chosen for a product.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chosen {
    /// The library's version.
    pub version: usize,
    /// Shapes, strides, numbers and alignments.
    pub product: String,
    /// The library's own description, of no meaning to others.
    pub algorithm: [u64; 8],
}

/// A queue of a device. What is asked for on one is done in its order; two know nothing of each other but by [`Device::wait`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stream {
    /// Computes.
    Main,
    /// Copies beside it.
    Copies,
}

impl Stream {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Main, Self::Copies];
}

/// A GPU, or its emulation. Copies, launches and products are done in the order of their stream, at the latest when the host waits
/// for it; the host's buffers must stay as they are until then. A device that has failed once fails from then on.
pub trait Device {
    /// Memory of the device, for what is asked for later on the main stream; it is not cleared. Another stream waits for the main one
    /// before it uses it.
    ///
    /// # Errors
    /// There is no room.
    fn allocate(&self, bytes: usize, name: &str) -> Result<Address, Error>;

    /// Gives memory back, once all that was asked for on the main stream before is done.
    ///
    /// # Errors
    /// Something that was asked for before has failed.
    fn release(&self, at: Address) -> Result<(), Error>;

    /// How much memory there is.
    ///
    /// # Errors
    /// Something that was asked for before has failed.
    fn memory(&self) -> Result<Memory, Error>;

    /// Memory of the host that is copied without a detour (page-locked).
    ///
    /// # Errors
    /// There is no room.
    fn allocate_host(&self, bytes: usize) -> Result<*mut u8, Error>;

    /// Gives the host's memory back.
    ///
    /// # Safety
    /// It is of [`Device::allocate_host`], and no copy waits for it.
    unsafe fn release_host(&self, at: *mut u8, bytes: usize);

    /// Copies to the device.
    ///
    /// # Safety
    /// `from` must stay readable until the host has waited for the stream, and the device's memory must have room.
    ///
    /// # Errors
    /// Something that was asked for before has failed.
    unsafe fn upload(&self, on: Stream, to: Address, from: *const u8, bytes: usize) -> Result<(), Error>;

    /// Copies from the device.
    ///
    /// # Safety
    /// `to` must stay writable until the host has waited for the stream, and the device's memory must hold so many bytes.
    ///
    /// # Errors
    /// Something that was asked for before has failed.
    unsafe fn download(&self, on: Stream, from: Address, to: *mut u8, bytes: usize) -> Result<(), Error>;

    /// Fills memory with a byte.
    ///
    /// # Safety
    /// The device's memory must hold so many bytes.
    ///
    /// # Errors
    /// Something that was asked for before has failed.
    unsafe fn fill(&self, on: Stream, at: Address, byte: u8, bytes: usize) -> Result<(), Error>;

    /// Launches a kernel.
    ///
    /// # Safety
    /// The addresses among its arguments must reach as far as the kernel goes.
    ///
    /// # Errors
    /// The launch is impossible, or something that was asked for before has failed.
    unsafe fn launch(&self, on: Stream, launch: &dyn Launch, grid: Grid) -> Result<(), Error>;

    /// Multiplies matrices, on the main stream.
    ///
    /// # Safety
    /// The addresses must reach as far as the matrices go.
    ///
    /// # Errors
    /// Shapes that do not fit, or something that was asked for before has failed.
    unsafe fn multiply(&self, gemm: &Gemm) -> Result<(), Error>;

    /// The algorithms that products have been given so far, where a library chooses them.
    fn chosen(&self) -> Vec<Chosen> {
        Vec::new()
    }

    /// Gives products of the same shapes these algorithms again, if the library is of the same version: for the same bits.
    fn fix(&self, _: Vec<Chosen>) {}

    /// What is asked for on a stream from now on comes after all that was asked for on the other.
    ///
    /// # Errors
    /// Something that was asked for before has failed.
    fn wait(&self, on: Stream, other: Stream) -> Result<(), Error>;

    /// Lets the host wait until all that was asked for on a stream is done.
    ///
    /// # Errors
    /// Something has failed.
    fn finish(&self, stream: Stream) -> Result<(), Error>;

    /// Lets the host wait until all that was asked for is done.
    ///
    /// # Errors
    /// Something has failed.
    fn synchronize(&self) -> Result<(), Error> {
        Stream::ALL.into_iter().try_for_each(|stream| self.finish(stream))
    }
}
