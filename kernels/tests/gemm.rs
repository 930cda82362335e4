//! Products that the emulation refuses: of bytes that nobody has written, and outside of buffers.

use tunesmith_kernels::{Address, Device, Gemm, Matrix, Number, emulator::Emulator};

const M: usize = 5;
const K: usize = 19;
const N: usize = 33;

#[test]
fn products_of_unwritten_bytes_and_outside_of_buffers_are_refused() {
    let device = Emulator::checked(0);
    let zeros = [0u8; 2 * K * N];
    let memory = |name: &str, bytes: usize| device.allocate(bytes, name).unwrap();
    let put = |name: &str, bytes: usize| {
        let at = memory(name, bytes);
        // SAFETY: the zeros outlive the synchronization.
        unsafe { device.upload(at, zeros.as_ptr(), bytes) }.unwrap();
        device.synchronize().unwrap();
        at
    };
    let sound = Gemm {
        a: Matrix::new(put("a", 2 * M * K), M, K, Number::Bf16),
        b: Matrix::new(put("b", 2 * K * N), K, N, Number::Bf16),
        c: None,
        d: Matrix::new(memory("d", 4 * M * N), M, N, Number::F32),
        alpha: 1.0,
    };
    // SAFETY: the checked build looks at every row.
    let multiply = |gemm: &Gemm| unsafe { device.multiply(gemm) }.and_then(|()| device.synchronize());
    let unwritten = memory("unwritten", 2 * M * K);
    for (gemm, words) in [
        (Gemm { a: Matrix { at: unwritten, ..sound.a }, ..sound }, "row 0 of a has bytes that nobody has written"),
        (Gemm { c: Some(sound.d), ..sound }, "row 0 of c has bytes that nobody has written"),
        (Gemm { d: Matrix { stride: N + 9, ..sound.d }, ..sound }, "of d lies outside of a buffer"),
        (Gemm { d: Matrix { at: Address(8), ..sound.d }, ..sound }, "row 0 of d lies outside of a buffer"),
    ] {
        let error = multiply(&gemm).unwrap_err().to_string();
        assert!(error.contains(words), "{words}: {error}");
    }
    multiply(&sound).unwrap();
}
