//! Buffers on an emulated device, fresh random numbers, and how far results may be from a reference in f64.
#![allow(dead_code)]

use std::cell::RefCell;

use half::bf16;
use tunesmith_kernels::{Address, Device, Grid, Launch, emulator::Emulator};

/// Two orders of blocks, warps and lanes, and the one without any disorder: each result must be the same in all.
pub const SEEDS: [u64; 3] = [0, 1, 4];

/// A device with what a test has put there.
pub struct Bench {
    pub device: Emulator,
    random: RefCell<u64>,
}

impl Bench {
    pub fn new(seed: u64) -> Self {
        Self { device: Emulator::checked(seed), random: RefCell::new(0x9e37_79b9_7f4a_7c15) }
    }

    /// A number in [−1, 1), the same in each bench.
    pub fn random(&self) -> f32 {
        let mut state = self.random.borrow_mut();
        *state ^= *state << 13;
        *state ^= *state >> 7;
        *state ^= *state << 17;
        (*state >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    pub fn randoms(&self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.random()).collect()
    }

    /// Random numbers that bf16 has.
    pub fn bf16s(&self, count: usize) -> Vec<f32> {
        self.randoms(count).into_iter().map(|x| bf16::from_f32(x).to_f32()).collect()
    }

    /// Memory that nobody has written.
    pub fn empty<T>(&self, name: &str, count: usize) -> Buffer<'_, T> {
        let at = self.device.allocate(count * size_of::<T>(), name).unwrap();
        Buffer { bench: self, at, count, kind: std::marker::PhantomData }
    }

    /// Memory with these values.
    pub fn put<T: Copy>(&self, name: &str, values: &[T]) -> Buffer<'_, T> {
        let buffer = self.empty(name, values.len());
        // SAFETY: the values outlive the synchronization.
        unsafe { self.device.upload(buffer.at, values.as_ptr().cast(), size_of_val(values)) }.unwrap();
        self.device.synchronize().unwrap();
        buffer
    }

    /// The same, rounded to bf16.
    pub fn put_bf16(&self, name: &str, values: &[f32]) -> Buffer<'_, bf16> {
        let rounded: Vec<bf16> = values.iter().map(|x| bf16::from_f32(*x)).collect();
        self.put(name, &rounded)
    }

    /// Launches, and waits for it.
    pub fn run(&self, launch: &dyn Launch, grid: Grid) {
        // SAFETY: the checked build looks at every access.
        unsafe { self.device.launch(launch, grid) }.unwrap();
        self.device.synchronize().unwrap_or_else(|error| panic!("{error}"));
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
        let bytes = self.count * size_of::<T>();
        assert_eq!(self.bench.device.unwritten(self.at, bytes).unwrap(), 0, "bytes that nobody has written");
        let mut values = vec![T::default(); self.count];
        // SAFETY: the vector outlives the synchronization.
        unsafe { self.bench.device.download(self.at, values.as_mut_ptr().cast(), bytes) }.unwrap();
        self.bench.device.synchronize().unwrap();
        values
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
