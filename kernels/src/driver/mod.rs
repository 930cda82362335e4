//! A GPU by NVIDIA's driver, which is looked for when a GPU is opened and not before: the program starts without it.

mod functions;
mod products;

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    ffi::{c_int, c_uint, c_void},
};

use cudarc::driver::{
    DriverError,
    result::{self, stream::StreamKind},
    sys::{self, CUdevice_attribute_enum as Attribute, CUresult},
};

use self::{functions::Function, products::Products};
use crate::{
    device::{Chosen, Device, Gemm, Grid, Stream},
    error::Error,
    kernel::Launch,
    memory::{Address, Memory},
};

/// The CUDA version of the compiler: an older driver does not load what it makes.
const NEEDED_CUDA: i32 = 13000;
/// Ampere: the first with tensor cores for bf16, and with cp.async.
const NEEDED_CAPABILITY: i32 = 80;
/// Failures of work that was asked for before.
const LATE: [CUresult; 8] = [
    CUresult::CUDA_ERROR_ILLEGAL_ADDRESS,
    CUresult::CUDA_ERROR_LAUNCH_FAILED,
    CUresult::CUDA_ERROR_LAUNCH_TIMEOUT,
    CUresult::CUDA_ERROR_MISALIGNED_ADDRESS,
    CUresult::CUDA_ERROR_ILLEGAL_INSTRUCTION,
    CUresult::CUDA_ERROR_INVALID_ADDRESS_SPACE,
    CUresult::CUDA_ERROR_INVALID_PC,
    CUresult::CUDA_ERROR_HARDWARE_STACK_ERROR,
];

/// A GPU. It belongs to one thread of the host.
pub struct Gpu {
    name: String,
    /// 10 · major + minor.
    capability: i32,
    device: sys::CUdevice,
    context: sys::CUcontext,
    streams: [sys::CUstream; 2],
    pool: sys::CUmemoryPool,
    shared_limit: u32,
    modules: RefCell<HashMap<&'static str, sys::CUmodule>>,
    functions: RefCell<HashMap<&'static str, Function>>,
    products: RefCell<Option<Products>>,
    /// Algorithms that are to be used again.
    fixed: RefCell<Vec<Chosen>>,
    buffers: RefCell<HashMap<Address, usize>>,
    used: Cell<usize>,
    peak: Cell<usize>,
    failure: RefCell<Option<Error>>,
}

impl Gpu {
    /// The GPUs that the driver sees.
    ///
    /// # Errors
    /// There is no driver, or it is too old.
    pub fn count() -> Result<usize, Error> {
        // SAFETY: it only asks the loader. Anything else would panic without the library.
        if !unsafe { sys::is_culib_present() } {
            return Err(Error::NoDriver);
        }
        let mut found = 0;
        // SAFETY: it writes a number, and may be called before anything else.
        unsafe { sys::cuDriverGetVersion(&mut found) }
            .result()
            .map_err(|error| failed("the driver's version", error))?;
        if found < NEEDED_CUDA {
            return Err(Error::DriverTooOld { found, needed: NEEDED_CUDA });
        }
        match result::init().and_then(|()| result::device::get_count()) {
            Ok(count) => Ok(count as usize),
            Err(DriverError(CUresult::CUDA_ERROR_NO_DEVICE)) => Ok(0),
            Err(error) => Err(failed("the driver's start", error)),
        }
    }

    /// Opens a GPU by its number among those that the driver sees.
    ///
    /// # Errors
    /// There is no driver, no such GPU, or one that can't run the kernels.
    pub fn open(ordinal: usize) -> Result<Self, Error> {
        let count = Self::count()?;
        if ordinal >= count {
            return Err(Error::NoGpu { ordinal, count });
        }
        let of = |during: &'static str| move |error| failed(during, error);
        let device = result::device::get(ordinal as c_int).map_err(of("the GPU's handle"))?;
        let attribute = |attribute| {
            // SAFETY: the handle is the driver's.
            unsafe { result::device::get_attribute(device, attribute) }.map_err(of("an attribute of the GPU"))
        };
        let name = result::device::get_name(device).map_err(of("the GPU's name"))?;
        let capability = 10 * attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?
            + attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        if capability < NEEDED_CAPABILITY {
            return Err(Error::UnsupportedGpu { name, capability });
        }
        let shared_limit = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? as u32;
        // SAFETY: the handle is the driver's; what is retained and made is given back when the GPU is dropped.
        let context = unsafe { result::primary_ctx::retain(device) }.map_err(of("a context on the GPU"))?;
        // SAFETY: it has just been retained.
        unsafe { result::ctx::set_current(context) }.map_err(of("a context on the GPU"))?;
        let stream = || result::stream::create(StreamKind::NonBlocking).map_err(of("a stream"));
        let streams = [stream()?, stream()?];
        // SAFETY: as above.
        let pool = unsafe { result::device::get_mem_pool(device) }.map_err(of("the GPU's pool of memory"))?;
        // Memory that was released is not given back to the system: the next step wants it again.
        let mut keep = u64::MAX;
        let threshold = sys::CUmemPool_attribute_enum::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        // SAFETY: this attribute is a number of 64 bits.
        unsafe { result::mem_pool::set_attribute(pool, threshold, (&raw mut keep).cast()) }
            .map_err(of("the GPU's pool of memory"))?;
        let (modules, functions, products, fixed, buffers, used, peak, failure) = Default::default();
        Ok(Self {
            name,
            capability,
            device,
            context,
            streams,
            pool,
            shared_limit,
            modules,
            functions,
            products,
            fixed,
            buffers,
            used,
            peak,
            failure,
        })
    }

    /// The card.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its compute capability: 10 · major + minor.
    pub fn capability(&self) -> i32 {
        self.capability
    }

    fn attribute(&self, attribute: Attribute) -> Result<i32, Error> {
        // SAFETY: the handle is the driver's.
        unsafe { result::device::get_attribute(self.device, attribute) }
            .map_err(|error| self.failed("an attribute of the GPU", error))
    }

    /// How many multiprocessors it has.
    ///
    /// # Errors
    /// The driver refuses.
    pub fn multiprocessors(&self) -> Result<u32, Error> {
        Ok(self.attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as u32)
    }

    /// Bytes a second that its memory moves at most, by clock and width.
    ///
    /// # Errors
    /// The driver refuses.
    pub fn bandwidth(&self) -> Result<f64, Error> {
        let kilohertz = f64::from(self.attribute(Attribute::CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE)?);
        let bits = f64::from(self.attribute(Attribute::CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH)?);
        // Two transfers a clock.
        Ok(2.0 * kilohertz * 1e3 * bits / 8.0)
    }

    /// Seconds that the main stream takes for what is asked for meanwhile.
    ///
    /// # Errors
    /// Something has failed.
    pub fn time(&self, work: impl FnOnce() -> Result<(), Error>) -> Result<f64, Error> {
        self.check()?;
        let event = || {
            result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT).map_err(|error| self.failed("an event", error))
        };
        let (start, end) = (event()?, event()?);
        let record = |event| {
            // SAFETY: event and stream are of this context.
            unsafe { result::event::record(event, self.stream(Stream::Main)) }
                .map_err(|error| self.failed("an event", error))
        };
        record(start)?;
        work()?;
        record(end)?;
        self.finish(Stream::Main)?;
        // SAFETY: both have been reached.
        let milliseconds =
            unsafe { result::event::elapsed(start, end) }.map_err(|error| self.failed("an event", error));
        for event in [start, end] {
            // SAFETY: nobody uses it any more; one that is left costs nothing.
            let _ = unsafe { result::event::destroy(event) };
        }
        Ok(f64::from(milliseconds?) / 1e3)
    }

    /// The version of cuBLASLt, as it gives it.
    ///
    /// # Errors
    /// It can't be used.
    pub fn library_version(&self) -> Result<usize, Error> {
        self.with_products(|products| Ok(products.version()))
    }

    fn stream(&self, stream: Stream) -> sys::CUstream {
        self.streams[stream as usize]
    }

    /// What failed before; and makes the GPU the one that this thread speaks to.
    fn check(&self) -> Result<(), Error> {
        if let Some(failure) = &*self.failure.borrow() {
            return Err(failure.clone());
        }
        // SAFETY: the context is retained as long as this lives.
        unsafe { result::ctx::set_current(self.context) }.map_err(|error| self.failed("the GPU's context", error))
    }

    /// Keeps a failure: the device is not used any more.
    fn failed(&self, during: &str, error: DriverError) -> Error {
        let error = failed(during, error);
        self.failure.replace(Some(error.clone()));
        error
    }

    fn with_products<T>(&self, work: impl FnOnce(&mut Products) -> Result<T, Error>) -> Result<T, Error> {
        self.check()?;
        let mut products = self.products.borrow_mut();
        if products.is_none() {
            *products = Some(Products::open(|bytes| self.allocate(bytes, "workspace of products"))?);
        }
        work(products.as_mut().expect("it was opened"))
    }
}

/// A failure in words.
fn failed(during: &str, error: DriverError) -> Error {
    let code = error.error_name().map_or_else(|_| format!("{:?}", error.0), |name| name.to_string_lossy().into_owned());
    let mut text =
        error.error_string().map_or_else(|_| "no explanation".into(), |text| text.to_string_lossy().into_owned());
    if LATE.contains(&error.0) {
        text += "; a kernel before may be the cause: CUDA_LAUNCH_BLOCKING=1 shows which";
    }
    Error::Driver { during: during.to_owned(), code, text }
}

impl Device for Gpu {
    fn allocate(&self, bytes: usize, name: &str) -> Result<Address, Error> {
        self.check()?;
        // No driver gives nothing.
        // SAFETY: the stream is of this context.
        match unsafe { result::malloc_async(self.stream(Stream::Main), bytes.max(1)) } {
            Ok(at) => {
                self.buffers.borrow_mut().insert(Address(at), bytes);
                self.used.set(self.used.get() + bytes);
                self.peak.set(self.peak.get().max(self.used.get()));
                Ok(Address(at))
            }
            Err(DriverError(CUresult::CUDA_ERROR_OUT_OF_MEMORY)) => {
                Err(Error::Memory { bytes, name: name.to_owned(), memory: self.memory()? })
            }
            Err(error) => Err(self.failed(&format!("memory for {name}"), error)),
        }
    }

    fn release(&self, at: Address) -> Result<(), Error> {
        self.check()?;
        let Some(bytes) = self.buffers.borrow_mut().remove(&at) else { return Ok(()) };
        self.used.set(self.used.get() - bytes);
        // SAFETY: it was allocated, and is not known any more.
        unsafe { result::free_async(at.0, self.stream(Stream::Main)) }
            .map_err(|error| self.failed("release of memory", error))
    }

    fn memory(&self) -> Result<Memory, Error> {
        self.check()?;
        let (free, total) = result::mem_get_info().map_err(|error| self.failed("the GPU's memory", error))?;
        let of_pool = |attribute| {
            let mut bytes = 0u64;
            // SAFETY: these attributes are numbers of 64 bits.
            unsafe { result::mem_pool::get_attribute(self.pool, attribute, (&raw mut bytes).cast()) }
                .map_err(|error| self.failed("the GPU's pool of memory", error))?;
            Ok(bytes as usize)
        };
        // What the pool keeps is ours.
        let reserved = of_pool(sys::CUmemPool_attribute_enum::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT)?;
        let taken = of_pool(sys::CUmemPool_attribute_enum::CU_MEMPOOL_ATTR_USED_MEM_CURRENT)?;
        let free = free + reserved.saturating_sub(taken);
        Ok(Memory { total, free, used: self.used.get(), peak: self.peak.get() })
    }

    fn allocate_host(&self, bytes: usize) -> Result<*mut u8, Error> {
        self.check()?;
        // SAFETY: whoever asks gives it back.
        let at = unsafe { result::malloc_host(bytes.max(1), 0) };
        // The device goes on without it.
        Ok(at.map_err(|error| failed("page-locked memory of the host", error))?.cast())
    }

    unsafe fn release_host(&self, at: *mut u8, _: usize) {
        // SAFETY: the caller promises that it is of `allocate_host`. What the driver does not take is lost, no more.
        let _ = unsafe { result::free_host(at.cast()) };
    }

    unsafe fn upload(&self, on: Stream, to: Address, from: *const u8, bytes: usize) -> Result<(), Error> {
        self.check()?;
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: the caller promises that both are there.
        unsafe { sys::cuMemcpyHtoDAsync_v2(to.0, from.cast(), bytes, self.stream(on)) }
            .result()
            .map_err(|error| self.failed("a copy to the GPU", error))
    }

    unsafe fn download(&self, on: Stream, from: Address, to: *mut u8, bytes: usize) -> Result<(), Error> {
        self.check()?;
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: the caller promises that both are there.
        unsafe { sys::cuMemcpyDtoHAsync_v2(to.cast(), from.0, bytes, self.stream(on)) }
            .result()
            .map_err(|error| self.failed("a copy from the GPU", error))
    }

    unsafe fn fill(&self, on: Stream, at: Address, byte: u8, bytes: usize) -> Result<(), Error> {
        self.check()?;
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: the caller promises that the memory is there.
        unsafe { result::memset_d8_async(at.0, byte, bytes, self.stream(on)) }
            .map_err(|error| self.failed("a fill", error))
    }

    unsafe fn launch(&self, on: Stream, launch: &dyn Launch, grid: Grid) -> Result<(), Error> {
        self.check()?;
        let (kernel, arguments) = (launch.kernel(), launch.arguments());
        let function = self.function(kernel, &arguments, grid.shared_bytes)?;
        let mut pointers: Vec<*mut c_void> = arguments.iter().map(|(at, _)| at.cast_mut()).collect();
        let [x, y, z] = grid.blocks.map(|blocks| blocks as c_uint);
        // SAFETY: the driver copies arguments of the sizes that were checked; the caller promises the rest.
        unsafe {
            result::launch_kernel(
                function.handle,
                (x, y, z),
                (grid.threads, 1, 1),
                grid.shared_bytes,
                self.stream(on),
                &mut pointers,
            )
        }
        .map_err(|error| self.failed(&format!("launch of {}", kernel.name), error))
    }

    unsafe fn multiply(&self, gemm: &Gemm) -> Result<(), Error> {
        gemm.check()?;
        let stream = self.stream(Stream::Main);
        self.with_products(|products| {
            // SAFETY: the caller promises that the matrices are there.
            unsafe { products.multiply(gemm, &self.fixed.borrow(), stream) }
        })
    }

    fn chosen(&self) -> Vec<Chosen> {
        self.products.borrow().as_ref().map_or_else(Vec::new, Products::chosen)
    }

    fn fix(&self, chosen: Vec<Chosen>) {
        self.fixed.replace(chosen);
    }

    fn wait(&self, on: Stream, other: Stream) -> Result<(), Error> {
        self.check()?;
        let of = |error| self.failed("an event", error);
        let event = result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING).map_err(of)?;
        // SAFETY: events and streams are of this context; an event that is destroyed is still waited for.
        unsafe {
            result::event::record(event, self.stream(other))
                .and_then(|()| {
                    let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
                    result::stream::wait_event(self.stream(on), event, flags)
                })
                .and_then(|()| result::event::destroy(event))
        }
        .map_err(of)
    }

    fn finish(&self, stream: Stream) -> Result<(), Error> {
        self.check()?;
        // SAFETY: the stream is of this context.
        unsafe { result::stream::synchronize(self.stream(stream)) }
            .map_err(|error| self.failed("work of the GPU", error))
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        // A context that has failed refuses all this, and goes with the process.
        // SAFETY: nothing of it is used any more, and it is given back in the opposite order.
        unsafe {
            let _ = result::ctx::set_current(self.context);
            self.products.replace(None);
            for stream in self.streams {
                let _ = result::stream::synchronize(stream);
            }
            for address in self.buffers.take().into_keys() {
                let _ = result::free_async(address.0, self.stream(Stream::Main));
            }
            for module in self.modules.take().into_values() {
                let _ = result::module::unload(module);
            }
            for stream in self.streams {
                let _ = result::stream::synchronize(stream);
                let _ = result::stream::destroy(stream);
            }
            let _ = result::primary_ctx::release(self.device);
        }
    }
}
