//! A device's memory: addresses, and how much there is.

/// An address in a device's memory, which the host can't read.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Address(pub u64);

impl Address {
    /// No memory: for an argument that a kernel may go without.
    pub const NONE: Self = Self(0);

    /// So many bytes further on.
    #[must_use]
    pub fn plus(self, bytes: u64) -> Self {
        Self(self.0 + bytes)
    }
}

/// Memory of a device, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// The device's.
    pub total: usize,
    /// Of it, what nobody holds; others may share the device.
    pub free: usize,
    /// What is allocated now.
    pub used: usize,
    /// The most that has been allocated at once.
    pub peak: usize,
}
