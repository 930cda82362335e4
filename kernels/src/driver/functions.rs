//! Kernels as the driver knows them: loaded when they are first used, and held against our arguments.

use std::ffi::{CString, c_int, c_void};

use cudarc::driver::{
    DriverError, result,
    sys::{self, CUfunction_attribute_enum as FunctionAttribute, CUresult},
};

use super::Gpu;
use crate::{
    compiled::{FATBINS, sizes},
    error::Error,
    kernel::{Kernel, check_arguments},
};

/// Shared memory of a block for which nobody has to ask.
const PLAIN_SHARED_BYTES: u32 = 48 << 10;
/// A kernel that has been loaded.
#[derive(Clone, Copy)]
pub(super) struct Function {
    pub(super) handle: sys::CUfunction,
    /// Shared memory that a block may have by now.
    shared_bytes: u32,
}

impl Gpu {
    /// A kernel, loaded and held against our arguments when it is first used, with so much shared memory for a block.
    pub(super) fn function(
        &self,
        kernel: Kernel,
        arguments: &[(*const c_void, usize)],
        shared: u32,
    ) -> Result<Function, Error> {
        if shared > self.shared_limit {
            return Err(Error::SharedMemory { kernel: kernel.name, wanted: shared, limit: self.shared_limit });
        }
        let known = self.functions.borrow().get(kernel.name).copied();
        let mut function = match known {
            Some(known) => known,
            None => {
                let handle = self.load(kernel)?;
                check_arguments(kernel.name, arguments, sizes(kernel.name).unwrap_or_default().iter().copied())?;
                check_arguments(kernel.name, arguments, self.declared_sizes(kernel.name, handle)?.into_iter())?;
                Function { handle, shared_bytes: PLAIN_SHARED_BYTES }
            }
        };
        if shared > function.shared_bytes {
            let attribute = FunctionAttribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the kernel is loaded.
            unsafe { result::function::set_function_attribute(function.handle, attribute, shared as c_int) }
                .map_err(|error| self.failed(&format!("shared memory of {}", kernel.name), error))?;
            function.shared_bytes = shared;
        }
        self.functions.borrow_mut().insert(kernel.name, function);
        Ok(function)
    }

    fn load(&self, kernel: Kernel) -> Result<sys::CUfunction, Error> {
        let during = || format!("loading of {}", kernel.name);
        let known = self.modules.borrow().get(kernel.file).copied();
        let module = match known {
            Some(known) => known,
            None => {
                let fatbin = FATBINS.iter().find(|fatbin| fatbin.file == kernel.file);
                let Some(fatbin) = fatbin else {
                    return Err(Error::Defect(format!("{}: {}.cu was not compiled", kernel.name, kernel.file)));
                };
                // SAFETY: the image is a fatbin, and stays.
                let module = unsafe { result::module::load_data(fatbin.image.as_ptr().cast()) };
                let module = module.map_err(|error| self.failed(&during(), error))?;
                self.modules.borrow_mut().insert(kernel.file, module);
                module
            }
        };
        let name = CString::new(kernel.name).unwrap_or_default();
        // SAFETY: the module is loaded, and stays.
        unsafe { result::module::get_function(module, name) }.map_err(|error| self.failed(&during(), error))
    }

    /// The sizes of arguments that the driver finds in a kernel.
    fn declared_sizes(&self, name: &str, function: sys::CUfunction) -> Result<Vec<usize>, Error> {
        let mut sizes = Vec::new();
        loop {
            let (mut offset, mut size) = (0, 0);
            // SAFETY: it writes two numbers; behind the last argument it refuses.
            match unsafe { sys::cuFuncGetParamInfo(function, sizes.len(), &mut offset, &mut size) }.result() {
                Ok(()) => sizes.push(size),
                Err(DriverError(CUresult::CUDA_ERROR_INVALID_VALUE)) => return Ok(sizes),
                Err(error) => return Err(self.failed(&format!("arguments of {name}"), error)),
            }
        }
    }
}
