//! Kernels by their names, and their arguments with the widths that the sources declare.

use std::ffi::c_void;

use crate::memory::Address;

/// What a kernel takes by value.
///
/// # Safety
/// The type must have the size and alignment of the kernel's parameter.
pub unsafe trait Argument {}

// SAFETY: `int`, `unsigned`, `long long`, `float` and a pointer are of these widths on every device.
unsafe impl Argument for i32 {}
// SAFETY: as above.
unsafe impl Argument for u32 {}
// SAFETY: as above.
unsafe impl Argument for i64 {}
// SAFETY: as above.
unsafe impl Argument for u64 {}
// SAFETY: as above.
unsafe impl Argument for f32 {}
// SAFETY: as above.
unsafe impl Argument for f64 {}
// SAFETY: as above.
unsafe impl Argument for Address {}

/// A kernel.
#[derive(Clone, Copy, Debug)]
pub struct Kernel {
    /// Its name in the source.
    pub name: &'static str,
    /// The source, without `.cu`.
    pub file: &'static str,
    /// Its builds for the CPU.
    #[cfg(feature = "emulation")]
    pub emulated: crate::builds::Builds,
}

/// A kernel with its arguments.
pub trait Launch {
    /// The kernel.
    fn kernel(&self) -> Kernel;

    /// Where each argument lies, and its size, in the kernel's order.
    fn arguments(&self) -> Vec<(*const c_void, usize)>;
}

/// Holds the sizes of arguments against those that a build of the kernel declares.
#[cfg(any(feature = "emulation", feature = "cuda"))]
pub(crate) fn check_arguments(
    kernel: &'static str,
    arguments: &[(*const c_void, usize)],
    declared: impl Iterator<Item = usize>,
) -> Result<(), crate::error::Error> {
    let (ours, declared): (Vec<usize>, Vec<usize>) =
        (arguments.iter().map(|argument| argument.1).collect(), declared.collect());
    if ours == declared { Ok(()) } else { Err(crate::error::Error::Arguments { kernel, ours, declared }) }
}

/// Declares kernels: each is a struct of its arguments, in the order of the source.
macro_rules! kernels {
    ($file:literal: $($(#[$doc:meta])* $type:ident = $name:ident { $($field:ident: $kind:ty,)* })*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug)]
        #[allow(missing_docs)]
        pub struct $type {
            $(pub $field: $kind,)*
        }

        impl $crate::kernel::Launch for $type {
            fn kernel(&self) -> $crate::kernel::Kernel {
                $crate::kernel::Kernel {
                    name: stringify!($name),
                    file: $file,
                    #[cfg(feature = "emulation")]
                    emulated: $crate::emulated!($name),
                }
            }

            fn arguments(&self) -> Vec<(*const std::ffi::c_void, usize)> {
                fn argument<T: $crate::kernel::Argument>(value: &T) -> (*const std::ffi::c_void, usize) {
                    ((value as *const T).cast(), size_of::<T>())
                }
                vec![$(argument(&self.$field)),*]
            }
        }
    )*};
}

/// The builds of a kernel for the CPU.
#[cfg(feature = "emulation")]
#[macro_export]
macro_rules! emulated {
    ($name:ident) => {{
        unsafe extern "C" {
            #[link_name = concat!("emu_fast_", stringify!($name))]
            static FAST: $crate::builds::Entry;
            #[link_name = concat!("emu_checked_", stringify!($name))]
            static CHECKED: $crate::builds::Entry;
        }
        // SAFETY: both are constants of the kernels' builds.
        unsafe { $crate::builds::Builds { fast: &FAST, checked: &CHECKED } }
    }};
}
