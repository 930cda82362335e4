//! Products of matrices, plainly: the library's own order of sums is nobody's business.

use super::{Emulator, pointer};
use crate::{
    device::{Gemm, Matrix, Number},
    error::Error,
};

impl Emulator {
    /// Carries a product out.
    pub(super) fn carry_out_product(&self, Gemm { a, b, c, d, alpha }: Gemm) -> Result<(), Error> {
        let ([m, k], [_, n]) = (a.shape(), b.shape());
        let (left, right) = (self.read_matrix("a", a)?, self.read_matrix("b", b)?);
        let before = c.map(|c| self.read_matrix("c", c)).transpose()?;
        self.check_rows("d", d, false)?;
        let mut sums = vec![0f32; n];
        for i in 0..m {
            sums.fill(0.0);
            for l in 0..k {
                let factor = left[i * k + l];
                for (sum, value) in sums.iter_mut().zip(&right[l * n..]) {
                    *sum += factor * value;
                }
            }
            for (j, sum) in sums.iter().enumerate() {
                let value = alpha * sum + before.as_ref().map_or(0.0, |before| before[i * n + j]);
                let at = d.at.plus(((i * d.stride + j) * d.number.bytes()) as u64);
                // SAFETY: the row lies in one buffer.
                unsafe {
                    match d.number {
                        Number::F32 => pointer(at).cast::<f32>().write_unaligned(value),
                        Number::Bf16 => pointer(at).cast::<u16>().write_unaligned(bf16_of(value)),
                    }
                }
            }
        }
        for i in 0..m {
            let row = d.at.plus((i * d.stride * d.number.bytes()) as u64);
            // SAFETY: it marks the row in the shadow.
            unsafe { (self.functions().written)(pointer(row), n * d.number.bytes()) };
        }
        Ok(())
    }

    /// Whether each row of a matrix lies in one buffer, and was written if it is read.
    fn check_rows(&self, name: &str, matrix: Matrix, is_read: bool) -> Result<(), Error> {
        let bytes = matrix.columns * matrix.number.bytes();
        for row in 0..matrix.rows {
            let at = pointer(matrix.at.plus((row * matrix.stride * matrix.number.bytes()) as u64)).cast_const();
            // SAFETY: both look into the emulation's own tables.
            let (holds, unwritten) =
                unsafe { ((self.functions().holds)(at, bytes), (self.functions().unwritten)(at, bytes)) };
            if !holds {
                return Err(Error::Defect(format!("gemm: row {row} of {name} lies outside of a buffer")));
            }
            if is_read && unwritten > 0 {
                return Err(Error::Defect(format!("gemm: row {row} of {name} has bytes that nobody has written")));
            }
        }
        Ok(())
    }

    /// A matrix as it is meant, in row-major order.
    fn read_matrix(&self, name: &str, matrix: Matrix) -> Result<Vec<f32>, Error> {
        self.check_rows(name, matrix, true)?;
        let [rows, columns] = matrix.shape();
        let number = |row: usize, column: usize| {
            let (row, column) = if matrix.transposed { (column, row) } else { (row, column) };
            let at = pointer(matrix.at.plus(((row * matrix.stride + column) * matrix.number.bytes()) as u64));
            // SAFETY: the row lies in one buffer.
            unsafe {
                match matrix.number {
                    Number::F32 => at.cast::<f32>().read_unaligned(),
                    Number::Bf16 => f32::from_bits(u32::from(at.cast::<u16>().read_unaligned()) << 16),
                }
            }
        };
        Ok((0..rows).flat_map(|row| (0..columns).map(move |column| (row, column))).map(|(r, c)| number(r, c)).collect())
    }
}

/// To nearest, ties to even.
fn bf16_of(value: f32) -> u16 {
    let bits = value.to_bits();
    match value.is_nan() {
        true => 0x7fff,
        false => (bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16) as u16,
    }
}
