//! What nvcc made of the kernels.

/// Where the builds lie, those for the CPU too: for tests that link them.
pub const FOLDER: &str = env!("OUT_DIR");

/// The builds of a source for all cards.
#[derive(Debug)]
pub struct Fatbin {
    /// The source, without `.cu`.
    pub file: &'static str,
    /// What the driver loads.
    pub image: &'static [u8],
    /// What ptxas said of it.
    pub log: &'static str,
}

/// As a driver wants it.
#[repr(align(16))]
struct Aligned<Bytes: ?Sized>(Bytes);

macro_rules! image {
    ($file:literal) => {{
        static IMAGE: &Aligned<[u8]> = &Aligned(*include_bytes!(concat!(env!("OUT_DIR"), "/", $file)));
        &IMAGE.0
    }};
}

include!(concat!(env!("OUT_DIR"), "/compiled.rs"));

/// The sizes of a kernel's arguments, as its cubins declare them.
pub(crate) fn sizes(kernel: &str) -> Option<&'static [usize]> {
    SIZES.iter().find(|(name, _)| *name == kernel).map(|(_, sizes)| *sizes)
}
