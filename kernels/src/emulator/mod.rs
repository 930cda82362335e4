//! The CPU as a GPU: blocks run one after the other, and their threads are fibers.
//!
//! The checked build reports races, whatever order the threads ran in; memory that is read and was never written, or does not exist;
//! addresses that are not aligned; lanes and threads that miss each other; copies that nobody waited for; and integers that
//! overflow. A launch or a copy waits in its stream's queue until the host waits for it: a host that reads too early reads poison, and
//! a stream that should have waited for the other finds it too late or too early, by the seed.

mod product;
mod runtime;

use std::{
    cell::{Cell, RefCell},
    collections::{HashMap, VecDeque},
    ffi::{CStr, CString, c_void},
};

use crate::{
    builds::Entry,
    device::{Device, Gemm, Grid, Stream},
    error::Error,
    kernel::{Launch, check_arguments},
    memory::{Address, Memory},
};

use self::runtime::{CHECKED, FAST, Functions, LaunchConfig};

/// Memory of a card of which nothing else is said.
const DEFAULT_MEMORY: usize = 24 << 30;

/// What the host's memory holds until a copy from the device has been done.
pub const POISON: u8 = 0xff;

/// Which build runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Build {
    Fast,
    Checked,
}

/// Blocks of a grid, by their linear numbers.
#[derive(Clone, Copy, Debug)]
struct Blocks {
    first: u64,
    count: u64,
}

/// Shared memory that a card gives a block, in bytes.
pub mod shared_limit {
    /// A100.
    pub const SM_80: u32 = 163 << 10;
    /// RTX 3090, RTX 4090, L40S.
    pub const SM_86: u32 = 99 << 10;
    /// H100, H200.
    pub const SM_90: u32 = 227 << 10;
}

/// Sums over launches.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Accesses of memory; 0 in the fast build.
    pub accesses: u64,
    /// Products of m16n8k16.
    pub multiplications: u64,
    /// 8×8 matrices that ldmatrix has read.
    pub matrix_loads: u64,
    /// Phases that took: as many as matrices, if no two rows lie in one bank.
    pub matrix_load_phases: u64,
}

/// A device under emulation. It belongs to one thread of the host.
pub struct Emulator {
    build: Build,
    seed: u64,
    shared_limit: u32,
    blocks: Cell<Option<Blocks>>,
    queues: RefCell<[Queue; 2]>,
    buffers: RefCell<HashMap<Address, usize>>,
    memory: Cell<Memory>,
    random: Cell<u64>,
    failure: RefCell<Option<Error>>,
}

/// What a stream has to do.
#[derive(Default)]
struct Queue {
    work: VecDeque<Work>,
    /// How much was ever asked for, and how much of it is done.
    asked: u64,
    done: u64,
}

/// What waits for the host to synchronize.
enum Work {
    Upload {
        to: Address,
        from: *const u8,
        bytes: usize,
    },
    Download {
        from: Address,
        to: *mut u8,
        bytes: usize,
    },
    Fill {
        at: Address,
        byte: u8,
        bytes: usize,
    },
    Release(Address),
    /// Until the other stream has done so much.
    Wait {
        other: Stream,
        until: u64,
    },
    Launch {
        entry: &'static Entry,
        config: LaunchConfig,
        arguments: Vec<Vec<u64>>,
    },
    Multiply(Gemm),
}

impl Emulator {
    /// Checks every access. Seed 0 runs all in order; any other shuffles blocks, warps and lanes, and when copies land.
    pub fn checked(seed: u64) -> Self {
        Self::new(Build::Checked, seed)
    }

    /// Checks nothing but the launch, and is about four times as fast.
    pub fn fast() -> Self {
        Self::new(Build::Fast, 0)
    }

    fn new(build: Build, seed: u64) -> Self {
        let (blocks, queues, buffers, failure) = Default::default();
        let memory = Cell::new(Memory { total: DEFAULT_MEMORY, ..Memory::default() });
        let random = Cell::new(seed);
        Self { build, seed, shared_limit: shared_limit::SM_86, blocks, queues, buffers, memory, random, failure }
    }

    /// The same card with so much memory.
    #[must_use]
    pub fn with_memory(self, bytes: usize) -> Self {
        self.memory.set(Memory { total: bytes, ..self.memory.get() });
        self
    }

    /// The same card with so much shared memory for a block; see [`shared_limit`].
    #[must_use]
    pub fn with_shared_limit(mut self, bytes: u32) -> Self {
        self.shared_limit = bytes;
        self
    }

    /// Of later launches, runs these blocks alone: where only a part of the memory exists.
    pub fn only_blocks(&self, first: u64, count: u64) {
        self.blocks.set(Some(Blocks { first, count }));
    }

    /// Memory of which only what is touched exists, for tests of addresses beyond 2³¹.
    ///
    /// # Errors
    /// There is no room.
    pub fn allocate_sparse(&self, bytes: usize, name: &str) -> Result<Address, Error> {
        self.allocate_as(bytes, name, true)
    }

    /// How many of these bytes nobody has written; 0 in the fast build.
    ///
    /// # Errors
    /// What was asked for before has failed.
    pub fn unwritten(&self, at: Address, bytes: usize) -> Result<usize, Error> {
        self.synchronize()?;
        // SAFETY: it looks into the shadow alone.
        Ok(unsafe { (self.functions().unwritten)(pointer(at).cast_const(), bytes) })
    }

    /// Sums over the launches of this thread since the last call.
    ///
    /// # Errors
    /// What was asked for before has failed.
    pub fn take_statistics(&self) -> Result<Statistics, Error> {
        self.synchronize()?;
        // SAFETY: it reads numbers.
        Ok(unsafe { (self.functions().take_statistics)() })
    }

    fn functions(&self) -> &'static Functions {
        match self.build {
            Build::Fast => &FAST,
            Build::Checked => &CHECKED,
        }
    }

    /// What failed before, or Ok.
    fn check(&self) -> Result<(), Error> {
        self.failure.borrow().clone().map_or(Ok(()), Err)
    }

    fn allocate_as(&self, bytes: usize, name: &str, sparse: bool) -> Result<Address, Error> {
        self.check()?;
        let memory = self.memory.get();
        let free = memory.total.saturating_sub(memory.used);
        let refused = || Error::Memory { bytes, name: name.to_owned(), memory: Memory { free, ..memory } };
        // Sparse memory is more than there is.
        if !sparse && bytes > free {
            return Err(refused());
        }
        let text = CString::new(name).unwrap_or_default();
        // SAFETY: the name ends in a zero, and is copied.
        let at = unsafe { (self.functions().allocate)(bytes, text.as_ptr(), sparse) };
        if at.is_null() {
            return Err(refused());
        }
        let counted = if sparse { 0 } else { bytes };
        let used = memory.used + counted;
        self.memory.set(Memory { used, peak: memory.peak.max(used), ..memory });
        self.buffers.borrow_mut().insert(Address(at as u64), counted);
        Ok(Address(at as u64))
    }

    fn ask(&self, on: Stream, work: Work) -> Result<(), Error> {
        self.check()?;
        let queue = &mut self.queues.borrow_mut()[on as usize];
        queue.asked += 1;
        queue.work.push_back(work);
        Ok(())
    }

    /// The next work of a stream, unless it waits for the other one.
    fn next(&self, stream: Stream) -> Option<Work> {
        let mut queues = self.queues.borrow_mut();
        if let Some(&Work::Wait { other, until }) = queues[stream as usize].work.front()
            && queues[other as usize].done < until
        {
            return None;
        }
        queues[stream as usize].work.pop_front()
    }

    /// Which stream goes on, of the one that the host waits for and the other: the latter as late as possible for seed 0, as early for
    /// seed 1, at random for others.
    fn turns(&self, awaited: Stream) -> [Stream; 2] {
        let other = if awaited == Stream::Main { Stream::Copies } else { Stream::Main };
        let is_late = match self.seed {
            0 | 1 => self.seed == 0,
            _ => {
                // An LCG of Knuth's.
                let next = self.random.get().wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                self.random.set(next);
                next >> 63 == 0
            }
        };
        if is_late { [awaited, other] } else { [other, awaited] }
    }

    /// Whether a copy by the host stays within one buffer.
    fn check_copy(&self, what: &str, at: Address, bytes: usize) -> Result<(), Error> {
        // SAFETY: it looks into the emulation's own tables.
        if bytes == 0 || unsafe { (self.functions().holds)(pointer(at).cast_const(), bytes) } {
            return Ok(());
        }
        Err(Error::Defect(format!("{what} of {bytes} bytes lies outside of a buffer")))
    }

    fn carry_out(&self, work: Work) -> Result<(), Error> {
        let functions = self.functions();
        match work {
            Work::Wait { .. } => Ok(()),
            Work::Release(at) => {
                // SAFETY: memory that is not there is left alone.
                unsafe { (functions.release)(pointer(at)) };
                Ok(())
            }
            Work::Fill { at, byte, bytes } => {
                self.check_copy("a fill", at, bytes)?;
                // SAFETY: it lies in a buffer.
                unsafe {
                    std::ptr::write_bytes(pointer(at).cast::<u8>(), byte, bytes);
                    (functions.written)(pointer(at), bytes);
                }
                Ok(())
            }
            Work::Upload { to, from, bytes } => {
                self.check_copy("a copy to the device", to, bytes)?;
                // SAFETY: one side lies in a buffer, and whoever asked for it has promised the other.
                unsafe {
                    std::ptr::copy_nonoverlapping(from, pointer(to).cast(), bytes);
                    (functions.written)(pointer(to), bytes);
                }
                Ok(())
            }
            Work::Download { from, to, bytes } => {
                self.check_copy("a copy from the device", from, bytes)?;
                // SAFETY: as above.
                unsafe { std::ptr::copy_nonoverlapping(pointer(from).cast(), to, bytes) };
                Ok(())
            }
            Work::Multiply(gemm) => self.carry_out_product(gemm),
            Work::Launch { entry, config, mut arguments } => {
                let mut pointers: Vec<*mut c_void> =
                    arguments.iter_mut().map(|argument| argument.as_mut_ptr().cast()).collect();
                // SAFETY: each pointer is that of an argument of the size that the kernel declares.
                match unsafe { (functions.launch)(entry, &config, pointers.as_mut_ptr()) } {
                    0 => Ok(()),
                    // SAFETY: the message lies in this thread, and is copied at once.
                    _ => Err(Error::Defect(
                        unsafe { CStr::from_ptr((functions.error)()) }.to_string_lossy().into_owned(),
                    )),
                }
            }
        }
    }
}

fn pointer(address: Address) -> *mut c_void {
    address.0 as *mut c_void
}

impl Device for Emulator {
    fn allocate(&self, bytes: usize, name: &str) -> Result<Address, Error> {
        self.allocate_as(bytes, name, false)
    }

    fn release(&self, at: Address) -> Result<(), Error> {
        if let Some(bytes) = self.buffers.borrow_mut().remove(&at) {
            let memory = self.memory.get();
            self.memory.set(Memory { used: memory.used - bytes, ..memory });
        }
        self.ask(Stream::Main, Work::Release(at))
    }

    fn memory(&self) -> Result<Memory, Error> {
        self.check()?;
        let memory = self.memory.get();
        Ok(Memory { free: memory.total.saturating_sub(memory.used), ..memory })
    }

    fn allocate_host(&self, bytes: usize) -> Result<*mut u8, Error> {
        Ok(Box::into_raw(vec![POISON; bytes].into_boxed_slice()).cast())
    }

    unsafe fn release_host(&self, at: *mut u8, bytes: usize) {
        // SAFETY: the caller promises that it is the box of `allocate_host`.
        drop(unsafe { Box::from_raw(std::ptr::slice_from_raw_parts_mut(at, bytes)) });
    }

    unsafe fn upload(&self, on: Stream, to: Address, from: *const u8, bytes: usize) -> Result<(), Error> {
        self.ask(on, Work::Upload { to, from, bytes })
    }

    unsafe fn download(&self, on: Stream, from: Address, to: *mut u8, bytes: usize) -> Result<(), Error> {
        // SAFETY: the caller promises that it can be written.
        unsafe { std::ptr::write_bytes(to, POISON, bytes) };
        self.ask(on, Work::Download { from, to, bytes })
    }

    unsafe fn fill(&self, on: Stream, at: Address, byte: u8, bytes: usize) -> Result<(), Error> {
        self.ask(on, Work::Fill { at, byte, bytes })
    }

    unsafe fn launch(&self, on: Stream, launch: &dyn Launch, grid: Grid) -> Result<(), Error> {
        let kernel = launch.kernel();
        let entry = match self.build {
            Build::Fast => kernel.emulated.fast,
            Build::Checked => kernel.emulated.checked,
        };
        let arguments = launch.arguments();
        check_arguments(
            kernel.name,
            &arguments,
            entry.sizes[..entry.arguments as usize].iter().map(|&size| size as usize),
        )?;
        #[cfg(feature = "cuda")]
        if let Some(sizes) = crate::compiled::sizes(kernel.name) {
            check_arguments(kernel.name, &arguments, sizes.iter().copied())?;
        }
        // Copied now, as a driver does.
        let copy = |(from, size): (*const c_void, usize)| {
            let mut words = vec![0u64; size.div_ceil(8)];
            // SAFETY: the argument is of this size, and the words have room for it.
            unsafe { std::ptr::copy_nonoverlapping(from.cast::<u8>(), words.as_mut_ptr().cast::<u8>(), size) };
            words
        };
        let blocks = self.blocks.get().unwrap_or(Blocks { first: 0, count: u64::MAX });
        let config = LaunchConfig {
            grid: grid.blocks,
            block: [grid.threads, 1, 1],
            shared_bytes: grid.shared_bytes,
            shared_limit: self.shared_limit,
            seed: self.seed,
            first_block: blocks.first,
            blocks: blocks.count,
        };
        let arguments = arguments.into_iter().map(copy).collect();
        self.ask(on, Work::Launch { entry, config, arguments })
    }

    unsafe fn multiply(&self, gemm: &Gemm) -> Result<(), Error> {
        gemm.check()?;
        self.ask(Stream::Main, Work::Multiply(*gemm))
    }

    fn wait(&self, on: Stream, other: Stream) -> Result<(), Error> {
        let until = self.queues.borrow()[other as usize].asked;
        self.ask(on, Work::Wait { other, until })
    }

    fn finish(&self, awaited: Stream) -> Result<(), Error> {
        self.check()?;
        while !self.queues.borrow()[awaited as usize].work.is_empty() {
            // Streams wait for what was asked for before, so that one of them can always go on.
            let turns = self.turns(awaited);
            let Some((stream, work)) = turns.into_iter().find_map(|stream| Some((stream, self.next(stream)?))) else {
                return Err(Error::Defect("both streams wait for each other".into()));
            };
            if let Err(error) = self.carry_out(work) {
                self.failure.replace(Some(error.clone()));
                return Err(error);
            }
            self.queues.borrow_mut()[stream as usize].done += 1;
        }
        Ok(())
    }
}

impl Drop for Emulator {
    fn drop(&mut self) {
        let queued = self.queues.take().into_iter().flat_map(|queue| queue.work);
        let released = queued.filter_map(|work| if let Work::Release(at) = work { Some(at) } else { None });
        for address in self.buffers.take().into_keys().chain(released) {
            // SAFETY: nothing runs any more.
            unsafe { (self.functions().release)(pointer(address)) };
        }
    }
}
