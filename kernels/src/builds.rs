//! The builds of a kernel for the CPU, as the emulation's compiler leaves them.

use std::ffi::{c_char, c_void};

/// A kernel's build for the CPU, with the sizes of its arguments.
#[repr(C)]
#[derive(Debug)]
pub struct Entry {
    name: *const c_char,
    run: unsafe extern "C" fn(*mut *mut c_void),
    pub(crate) arguments: u32,
    pub(crate) sizes: [u32; 24],
}

// SAFETY: it is constant.
unsafe impl Sync for Entry {}

/// Both builds of a kernel.
#[derive(Clone, Copy, Debug)]
pub struct Builds {
    /// Without checks.
    pub fast: &'static Entry,
    /// Reports every access.
    pub checked: &'static Entry,
}
