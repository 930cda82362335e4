//! The functions of the emulation's two builds, as `emu/host.h` has them.

use std::ffi::{c_char, c_int, c_void};

use super::Statistics;
use crate::builds::Entry;

/// A launch.
#[repr(C)]
pub(super) struct LaunchConfig {
    pub(super) grid: [u32; 3],
    pub(super) block: [u32; 3],
    pub(super) shared_bytes: u32,
    pub(super) shared_limit: u32,
    pub(super) seed: u64,
    pub(super) first_block: u64,
    pub(super) blocks: u64,
}

/// The functions of a build.
pub(super) struct Functions {
    pub(super) launch: unsafe extern "C" fn(*const Entry, *const LaunchConfig, *mut *mut c_void) -> c_int,
    pub(super) error: unsafe extern "C" fn() -> *const c_char,
    pub(super) allocate: unsafe extern "C" fn(usize, *const c_char, bool) -> *mut c_void,
    pub(super) release: unsafe extern "C" fn(*mut c_void),
    pub(super) written: unsafe extern "C" fn(*mut c_void, usize),
    pub(super) unwritten: unsafe extern "C" fn(*const c_void, usize) -> usize,
    pub(super) holds: unsafe extern "C" fn(*const c_void, usize) -> bool,
    pub(super) take_statistics: unsafe extern "C" fn() -> Statistics,
}

macro_rules! functions {
    ($constant:ident, $prefix:literal) => {
        pub(super) static $constant: Functions = {
            unsafe extern "C" {
                #[link_name = concat!($prefix, "launch")]
                fn launch(entry: *const Entry, config: *const LaunchConfig, arguments: *mut *mut c_void) -> c_int;
                #[link_name = concat!($prefix, "error")]
                fn error() -> *const c_char;
                #[link_name = concat!($prefix, "allocate")]
                fn allocate(bytes: usize, name: *const c_char, sparse: bool) -> *mut c_void;
                #[link_name = concat!($prefix, "release")]
                fn release(memory: *mut c_void);
                #[link_name = concat!($prefix, "written")]
                fn written(at: *mut c_void, bytes: usize);
                #[link_name = concat!($prefix, "unwritten")]
                fn unwritten(at: *const c_void, bytes: usize) -> usize;
                #[link_name = concat!($prefix, "holds")]
                fn holds(at: *const c_void, bytes: usize) -> bool;
                #[link_name = concat!($prefix, "take_statistics")]
                fn take_statistics() -> Statistics;
            }
            Functions { launch, error, allocate, release, written, unwritten, holds, take_statistics }
        };
    };
}
functions!(FAST, "emu_fast_");
functions!(CHECKED, "emu_checked_");
