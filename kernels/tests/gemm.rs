//! Products that the emulation refuses: of bytes that nobody has written, and outside of buffers.

use tunesmith_kernels::{Address, Device, Error, Gemm, Matrix, Number, Stream, emulator::Emulator};

const M: usize = 5;
const K: usize = 19;
const N: usize = 33;

/// A product of zeros, changed, on a device of its own: one that has failed is not used again.
fn multiplied(change: impl Fn(&Emulator, &mut Gemm)) -> Result<(), Error> {
    let device = Emulator::checked(0);
    let zeros = [0u8; 2 * K * N];
    let put = |name: &str, bytes: usize| {
        let at = device.allocate(bytes, name)?;
        // SAFETY: the zeros outlive the synchronization.
        unsafe { device.upload(Stream::Main, at, zeros.as_ptr(), bytes) }?;
        Ok::<_, Error>(at)
    };
    let mut gemm = Gemm {
        a: Matrix::new(put("a", 2 * M * K)?, M, K, Number::Bf16),
        b: Matrix::new(put("b", 2 * K * N)?, K, N, Number::Bf16),
        c: None,
        d: Matrix::new(device.allocate(4 * M * N, "d")?, M, N, Number::F32),
        alpha: 1.0,
    };
    change(&device, &mut gemm);
    // SAFETY: the checked build looks at every row.
    unsafe { device.multiply(&gemm) }?;
    device.synchronize()
}

#[test]
fn products_of_unwritten_bytes_and_outside_of_buffers_are_refused() {
    let refused = |change: fn(&Emulator, &mut Gemm), words: &str| {
        let error = multiplied(change).unwrap_err().to_string();
        assert!(error.contains(words), "{words}: {error}");
    };
    let unwritten = |device: &Emulator, gemm: &mut Gemm| gemm.a.at = device.allocate(2 * M * K, "unwritten").unwrap();
    refused(unwritten, "row 0 of a has bytes that nobody has written");
    refused(|_, gemm| gemm.c = Some(gemm.d), "row 0 of c has bytes that nobody has written");
    refused(|_, gemm| gemm.d.stride = N + 9, "of d lies outside of a buffer");
    refused(|_, gemm| gemm.d.at = Address(8), "row 0 of d lies outside of a buffer");
    multiplied(|_, _| ()).unwrap();
}
