//! Matrices on the host, in buffers that are used again.
//!
//! A step needs the same buffers as the one before it. Getting them from the system each time would fault in every
//! page anew, so a dropped tensor's buffer goes back to its backend's [`Pool`].

use std::sync::{Arc, Mutex};

/// A dense row-major matrix of f32.
pub struct Tensor {
    buffer: Vec<f32>,
    rows: usize,
    cols: usize,
    pool: Arc<Pool>,
}

/// Free buffers, each as long as it was allocated.
#[derive(Default)]
pub(crate) struct Pool {
    free: Mutex<Vec<Vec<f32>>>,
}

/// A buffer may be this many times longer than what is put into it.
const MAX_SLACK: usize = 4;

impl Pool {
    fn take(&self, len: usize) -> Vec<f32> {
        let mut free = self.free.lock().expect("no code panics while it holds the pool");
        let fits = |buffer: &Vec<f32>| buffer.len() >= len && buffer.len() <= len * MAX_SLACK;
        let best = (0..free.len()).filter(|&i| fits(&free[i])).min_by_key(|&i| free[i].len());
        if let Some(best) = best {
            return free.swap_remove(best);
        }
        // Nothing fits: let the next smaller buffer go, so that growing batches do not leave a trail behind.
        let outgrown = |buffer: &Vec<f32>| buffer.len() < len && buffer.len() * MAX_SLACK >= len;
        let next = (0..free.len()).filter(|&i| outgrown(&free[i])).max_by_key(|&i| free[i].len());
        if let Some(next) = next {
            free.swap_remove(next);
        }
        drop(free);
        vec![0.0; len]
    }
}

impl Tensor {
    /// A matrix whose values are left from an earlier use; the caller writes all of them.
    pub(crate) fn stale(pool: &Arc<Pool>, rows: usize, cols: usize) -> Self {
        Tensor { buffer: pool.take(rows * cols), rows, cols, pool: pool.clone() }
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// All values, row-major.
    pub fn values(&self) -> &[f32] {
        &self.buffer[..self.rows * self.cols]
    }

    /// All values, row-major.
    pub fn values_mut(&mut self) -> &mut [f32] {
        &mut self.buffer[..self.rows * self.cols]
    }

    /// The values of row `i`.
    pub(crate) fn row(&self, i: usize) -> &[f32] {
        &self.values()[i * self.cols..][..self.cols]
    }
}

impl Drop for Tensor {
    fn drop(&mut self) {
        let buffer = std::mem::take(&mut self.buffer);
        if let Ok(mut free) = self.pool.free.lock() {
            free.push(buffer);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dropped_buffer_is_used_again() {
        let pool = Arc::new(Pool::default());
        let address = {
            let t = Tensor::stale(&pool, 10, 10);
            t.values().as_ptr()
        };
        assert_eq!(Tensor::stale(&pool, 9, 11).values().as_ptr(), address);
    }

    #[test]
    fn growing_batches_leave_no_trail() {
        let pool = Arc::new(Pool::default());
        for rows in 1..200 {
            drop((Tensor::stale(&pool, rows, 8), Tensor::stale(&pool, rows, 8)));
        }
        let held: usize = pool.free.lock().unwrap().iter().map(Vec::len).sum();
        assert!(held < 2 * 200 * 8 * 4 / 3 + 64, "{held} floats are held");
    }
}
