//! Matrices on the host, in buffers that are used again.
//!
//! A step needs the same buffers as the one before it. Getting them from the system each time would fault in every
//! page anew, so a dropped tensor's buffer goes back to its backend's [`Pool`].

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

/// A dense row-major matrix of f32.
pub struct Tensor {
    buffer: Vec<f32>,
    rows: usize,
    cols: usize,
    pool: Arc<Pool>,
}

/// Free buffers, each as long as it was allocated; the one that has been free for longest comes first.
#[derive(Default)]
pub(crate) struct Pool {
    free: Mutex<VecDeque<Vec<f32>>>,
}

impl Pool {
    /// A buffer of at least `len`, and at most half as much again: a layer's widths are further apart than that, the
    /// sizes of its batches mostly not.
    fn take(&self, len: usize) -> Vec<f32> {
        let mut free = self.free.lock().expect("no code panics while it holds the pool");
        let fits = |buffer: &Vec<f32>| buffer.len() >= len && buffer.len() <= len + len / 2;
        // Of equals the one that was freed last, which may still be in a cache.
        let best = (0..free.len()).rev().filter(|&i| fits(&free[i])).min_by_key(|&i| free[i].len());
        if let Some(buffer) = best.and_then(|best| free.remove(best)) {
            return buffer;
        }
        // Let go at least as much as is allocated, so that no more is ever held than was in use at once.
        let mut left = len;
        while let (true, Some(oldest)) = (left > 0, free.pop_front()) {
            left = left.saturating_sub(oldest.len());
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
            free.push_back(buffer);
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
    fn no_more_is_held_than_was_in_use_at_once() {
        let pool = Arc::new(Pool::default());
        let most = (1..200).map(|step| {
            // Batches of any size, of which two widths are in use together.
            let rows = 1 + step * 7919 % 199;
            drop((Tensor::stale(&pool, rows, 8), Tensor::stale(&pool, rows, 24)));
            pool.free.lock().unwrap().iter().map(Vec::len).sum::<usize>()
        });
        let most = most.max().unwrap();
        assert!(most <= 200 * 32 + 200 * 24 / 2, "{most} floats are held");
    }
}
