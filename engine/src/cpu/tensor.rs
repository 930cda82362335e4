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

/// Free buffers.
#[derive(Default)]
pub(crate) struct Pool(Mutex<Held>);

/// What a pool holds, in floats.
#[derive(Default)]
struct Held {
    /// Each as long as it was allocated; the one that has been free for longest comes first.
    free: VecDeque<Vec<f32>>,
    free_len: usize,
    used_len: usize,
    /// Most that was ever in use at once.
    peak: usize,
    /// Least that has been in use since then: what lasts, such as weights.
    floor: usize,
}

impl Pool {
    /// A buffer of at least `len`, and at most half as much again: a layer's widths are further apart than that, the
    /// sizes of its batches mostly not.
    fn take(&self, len: usize) -> Vec<f32> {
        let mut held = self.0.lock().expect("no code panics while it holds the pool");
        let Held { free, free_len, used_len, peak, floor } = &mut *held;
        let fits = |buffer: &Vec<f32>| buffer.len() >= len && buffer.len() <= len + len / 2;
        // Of equals the one that was freed last, which may still be in a cache.
        let best = (0..free.len()).rev().filter(|&i| fits(&free[i])).min_by_key(|&i| free[i].len());
        let found = best.and_then(|best| free.remove(best));
        *free_len -= found.as_ref().map_or(0, Vec::len);
        *used_len += found.as_ref().map_or(len, Vec::len);
        if *used_len > *peak {
            (*peak, *floor) = (*used_len, *used_len);
        }
        // Batches of many sizes must not leave ever more buffers behind; what one step needs again the next must stay.
        let most = *peak + (*peak - *floor) / 8;
        while let (true, Some(oldest)) = (*used_len + *free_len > most, free.front()) {
            *free_len -= oldest.len();
            free.pop_front();
        }
        drop(held);
        found.unwrap_or_else(|| vec![0.0; len])
    }

    fn give_back(&self, buffer: Vec<f32>) {
        if let Ok(mut held) = self.0.lock() {
            held.used_len -= buffer.len();
            held.floor = held.floor.min(held.used_len);
            held.free_len += buffer.len();
            held.free.push_back(buffer);
        }
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
        self.pool.give_back(std::mem::take(&mut self.buffer));
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
    fn little_more_is_held_than_was_in_use_at_once() {
        let pool = Arc::new(Pool::default());
        for step in 1..400 {
            // Batches of any size, of which two widths are in use together.
            let rows = 1 + step * 7919 % 199;
            let both = (Tensor::stale(&pool, rows, 8), Tensor::stale(&pool, rows, 24));
            let held = pool.0.lock().unwrap();
            let free: usize = held.free.iter().map(Vec::len).sum();
            assert_eq!((held.free_len, held.used_len), (free, both.0.buffer.len() + both.1.buffer.len()));
            assert!(held.free_len + held.used_len <= held.peak + held.peak / 8, "step {step}");
        }
    }

    #[test]
    fn a_step_like_the_one_before_it_allocates_nothing() {
        let pool = Arc::new(Pool::default());
        let step = || {
            let mut kept: Vec<Tensor> = Vec::new();
            let mut addresses = Vec::new();
            for width in [576, 8, 9, 1536, 192, 576, 1536].repeat(30) {
                let scratch = Tensor::stale(&pool, 16, 1536);
                kept.push(Tensor::stale(&pool, 16, width));
                addresses.extend([&scratch, &kept[kept.len() - 1]].map(|x| x.values().as_ptr() as usize));
            }
            while let Some(last) = kept.pop() {
                drop((Tensor::stale(&pool, 16, 600), last));
            }
            addresses.sort_unstable();
            addresses.dedup();
            addresses
        };
        let _ = step();
        assert_eq!(step(), step());
    }
}
