//! Buffers on a device, fresh random numbers, and how far results may be from a reference in f64.

use std::{
    cell::{Cell, RefCell},
    sync::{
        OnceLock,
        atomic::{AtomicBool, Ordering},
    },
};

use half::bf16;
use tunesmith_kernels::{Address, Device, Error, Gemm, Grid, Launch, Stream, emulator::Emulator};

/// Two orders of blocks, warps and lanes, and the one without any disorder: each result must be the same in all.
pub const SEEDS: [u64; 3] = [0, 1, 4];

/// Makes a device for one check. The seed is that of an order, if the device has any say in it.
pub type Make = fn(seed: u64) -> Result<Box<dyn Device>, Error>;

/// Where checks run; without one, under the emulation.
static ELSEWHERE: OnceLock<Make> = OnceLock::new();

/// Runs the checks of this process on another device than the emulation. A later call has no effect.
pub fn stand_on(make: Make) {
    // The first one stays.
    let _ = ELSEWHERE.set(make);
}

/// Whether new memory stays as it is.
static UNFILLED: AtomicBool = AtomicBool::new(false);

/// Leaves new memory as it is: for a tool that finds what nobody has written.
pub fn leave_unfilled() {
    UNFILLED.store(true, Ordering::Relaxed);
}

/// What a bench stands on.
enum Ground {
    Emulation(Box<Emulator>),
    Device(Box<dyn Device>),
}

/// What a device answers, or the end of the check in its words.
fn done<T>(answer: Result<T, Error>) -> T {
    answer.unwrap_or_else(|error| panic!("{error}"))
}

/// A device with what a check has put there.
pub struct Bench {
    ground: Ground,
    addresses: RefCell<Vec<Address>>,
    random: Cell<u64>,
}

impl Bench {
    pub fn new(seed: u64) -> Self {
        let ground = match ELSEWHERE.get() {
            Some(make) => Ground::Device(done(make(seed))),
            None => Ground::Emulation(Box::new(Emulator::checked(seed))),
        };
        Self { ground, addresses: RefCell::default(), random: Cell::new(0x9e37_79b9_7f4a_7c15) }
    }

    pub fn device(&self) -> &dyn Device {
        match &self.ground {
            Ground::Emulation(emulator) => emulator.as_ref(),
            Ground::Device(device) => device.as_ref(),
        }
    }

    /// What only the emulation can tell.
    pub fn emulator(&self) -> Option<&Emulator> {
        match &self.ground {
            Ground::Emulation(emulator) => Some(emulator),
            Ground::Device(_) => None,
        }
    }

    /// Whether new memory holds 0xff, so that what has been written differs. The emulation knows without that.
    pub fn fills(&self) -> bool {
        self.emulator().is_none() && !UNFILLED.load(Ordering::Relaxed)
    }

    /// A number in [−1, 1), the same in each bench.
    pub fn random(&self) -> f32 {
        let mut state = self.random.get();
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        self.random.set(state);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    pub fn randoms(&self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.random()).collect()
    }

    /// Random numbers that bf16 has.
    pub fn bf16s(&self, count: usize) -> Vec<f32> {
        self.randoms(count).into_iter().map(|x| bf16::from_f32(x).to_f32()).collect()
    }

    /// Memory that nobody has written. The emulation knows; elsewhere floats of it are NaN.
    pub fn empty<T>(&self, name: &str, count: usize) -> Buffer<'_, T> {
        let bytes = count * size_of::<T>();
        let at = self.keep(self.device().allocate(bytes, name));
        if self.fills() {
            // SAFETY: it has just been allocated with so many bytes.
            done(unsafe { self.device().fill(Stream::Main, at, 0xff, bytes) });
        }
        Buffer { bench: self, at, count, kind: std::marker::PhantomData }
    }

    /// Memory of which a check touches little. Under the emulation nothing else exists.
    pub fn sparse(&self, name: &str, bytes: usize) -> Address {
        self.keep(match &self.ground {
            Ground::Emulation(emulator) => emulator.allocate_sparse(bytes, name),
            Ground::Device(device) => device.allocate(bytes, name),
        })
    }

    fn keep(&self, memory: Result<Address, Error>) -> Address {
        let at = done(memory);
        self.addresses.borrow_mut().push(at);
        at
    }

    /// Under the emulation, runs these blocks of later launches alone; elsewhere all of them run.
    pub fn only_blocks(&self, first: u64, count: u64) {
        if let Some(emulator) = self.emulator() {
            emulator.only_blocks(first, count);
        }
    }

    /// Memory with these values.
    pub fn put<T: Copy>(&self, name: &str, values: &[T]) -> Buffer<'_, T> {
        let buffer = self.empty(name, values.len());
        self.upload(buffer.at, values);
        buffer
    }

    /// The same, rounded to bf16.
    pub fn put_bf16(&self, name: &str, values: &[f32]) -> Buffer<'_, bf16> {
        let rounded: Vec<bf16> = values.iter().map(|x| bf16::from_f32(*x)).collect();
        self.put(name, &rounded)
    }

    /// Copies to the device, and waits for it.
    pub fn upload<T: Copy>(&self, to: Address, values: &[T]) {
        // SAFETY: the values outlive the synchronization.
        done(unsafe { self.device().upload(Stream::Main, to, values.as_ptr().cast(), size_of_val(values)) });
        done(self.device().synchronize());
    }

    /// Copies from the device.
    pub fn download<T: Copy + Default>(&self, from: Address, count: usize) -> Vec<T> {
        let mut values = vec![T::default(); count];
        // SAFETY: the vector outlives the synchronization.
        done(unsafe { self.device().download(Stream::Main, from, values.as_mut_ptr().cast(), count * size_of::<T>()) });
        done(self.device().synchronize());
        values
    }

    /// Launches, and waits for it.
    pub fn run(&self, launch: &dyn Launch, grid: Grid) {
        // SAFETY: the buffers are as large as the checks say; the emulation looks at every access.
        done(unsafe { self.device().launch(Stream::Main, launch, grid) });
        done(self.device().synchronize());
    }

    /// Multiplies matrices, and waits for it.
    pub fn multiply(&self, gemm: &Gemm) -> Result<(), Error> {
        // SAFETY: as above.
        unsafe { self.device().multiply(gemm) }?;
        self.device().synchronize()
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        for at in self.addresses.take() {
            // A check that has failed has said so.
            let _ = self.device().release(at);
        }
    }
}

/// Values on the device.
pub struct Buffer<'a, T> {
    bench: &'a Bench,
    pub at: Address,
    pub count: usize,
    kind: std::marker::PhantomData<T>,
}

impl<T: Copy + Default> Buffer<'_, T> {
    /// The values, all of which must have been written.
    pub fn get(&self) -> Vec<T> {
        if let Some(emulator) = self.bench.emulator() {
            let unwritten = done(emulator.unwritten(self.at, self.count * size_of::<T>()));
            assert_eq!(unwritten, 0, "bytes that nobody has written");
        }
        self.bench.download(self.at, self.count)
    }
}

impl Buffer<'_, bf16> {
    /// The values, widened.
    pub fn floats(&self) -> Vec<f32> {
        self.get().into_iter().map(bf16::to_f32).collect()
    }
}

/// How many blocks of `per_block` it takes.
pub fn blocks(count: usize, per_block: usize) -> u32 {
    u32::try_from(count.div_ceil(per_block)).unwrap()
}

/// Holds results against a reference: within `relative` of each value, and `absolute` near zero.
pub fn assert_close(what: &str, ours: &[f32], reference: &[f64], relative: f64, absolute: f64) {
    assert_eq!(ours.len(), reference.len(), "{what}");
    for (i, (a, b)) in ours.iter().zip(reference).enumerate() {
        let off = (f64::from(*a) - b).abs();
        assert!(off <= relative * b.abs() + absolute, "{what}: {a} instead of {b} at {i}");
    }
}

/// Half a step of bf16, of a value.
pub const BF16: f64 = 1.0 / 256.0;
