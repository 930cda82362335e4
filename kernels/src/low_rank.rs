//! The small products of LoRA: a kernel for each rank and each side of the factor.

use std::ffi::c_void;

use crate::{
    device::Grid,
    kernel::{Argument, Kernel, Launch},
    kernels::AddParts,
    memory::Address,
};

/// The rank that kernels know. An adapter of any other has rows or columns of zeros up to the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rank {
    /// Up to 16.
    R16 = 16,
    /// Up to 32.
    R32 = 32,
    /// Up to 48.
    R48 = 48,
    /// Up to 64.
    R64 = 64,
}

impl Rank {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::R16, Self::R32, Self::R48, Self::R64];

    /// The least that holds an adapter's rank; none beyond 64, where a library's products are as good.
    pub fn holding(rank: usize) -> Option<Self> {
        Self::ALL.into_iter().find(|known| rank <= known.get())
    }

    /// As a number.
    pub fn get(self) -> usize {
        self as usize
    }
}

/// Which factor of an adapter it is: bf16 without gaps, its gradient f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Factor {
    /// [rank, width].
    A,
    /// [width, rank].
    B,
}

/// `LowRank` of `low_rank.cu`: shapes of the matrix, bf16 [tokens, width], and of h, bf16 [tokens, rank].
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LowRank {
    /// Elements from a row of the matrix to the next: a multiple of 8.
    pub stride: i64,
    /// Elements from a row of h to the next: a multiple of 8.
    pub h_stride: i64,
    /// Rows of both: at least 1.
    pub tokens: i64,
    /// Columns of the matrix: a multiple of 8.
    pub width: i32,
    /// Of the product.
    pub scale: f32,
}

// SAFETY: three integers of 64 bits and two numbers of 32.
unsafe impl Argument for LowRank {}

/// Rows of a product that a block has: tokens, or for a gradient columns.
const ROWS: u64 = 128;
/// Columns, or for a gradient tokens, that are taken at a time.
const DEPTH: u64 = 64;
/// Tiles of which a part is worth a block.
const LEAST_TILES: u64 = 4;
const STAGES: u64 = 3;
const THREADS: u32 = 128;

/// How columns, or for a gradient tokens, are split over blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Split {
    /// How many parts there are.
    pub parts: u32,
    /// Columns or tokens of a part, but for the last: a multiple of 64.
    pub length: i32,
}

impl Split {
    /// For at most so many blocks in all, or one for each 128 rows of the product.
    fn new(rows: u64, length: u64, blocks: u64) -> Self {
        let tiles = length.div_ceil(DEPTH);
        let wanted = (blocks / rows.div_ceil(ROWS)).clamp(1, tiles.div_ceil(LEAST_TILES));
        let tiles_a_part = tiles.div_ceil(wanted);
        Self { parts: tiles.div_ceil(tiles_a_part) as u32, length: (tiles_a_part * DEPTH) as i32 }
    }
}

impl LowRank {
    /// Of [`LowRankDown`], on a card of so many multiprocessors: at most a block for each, because a part of a sum is written and read.
    pub fn split_down(&self, multiprocessors: u32) -> Split {
        Split::new(self.tokens as u64, self.width as u64, multiprocessors.into())
    }

    /// Of [`LowRankUp`]: four blocks for each multiprocessor, so that none idles while others end.
    pub fn split_up(&self, multiprocessors: u32) -> Split {
        Split::new(self.tokens as u64, self.width as u64, 4 * u64::from(multiprocessors))
    }

    /// Of [`LowRankGradient`]: at most a block for each multiprocessor.
    pub fn split_gradient(&self, multiprocessors: u32) -> Split {
        Split::new(self.width as u64, self.tokens as u64, multiprocessors.into())
    }
}

/// h = scale · matrix · factor: x·Aᵀ, or dy·B.
#[derive(Clone, Copy, Debug)]
pub struct LowRankDown {
    /// bf16 [tokens, rank].
    pub h: Address,
    /// f32 [parts, tokens, rank]; none for one part.
    pub parts: Address,
    /// bf16 [tokens, width].
    pub matrix: Address,
    /// bf16, by its side.
    pub factor: Address,
    /// The shapes.
    pub sizes: LowRank,
    /// Of the columns.
    pub split: Split,
    /// Of the factor.
    pub rank: Rank,
    /// Which factor it is.
    pub side: Factor,
}

/// The sum that follows a [`LowRankDown`] of several parts.
#[derive(Clone, Copy, Debug)]
pub struct LowRankSum {
    h: Address,
    parts: Address,
    sizes: LowRank,
    count: i32,
    rank: i32,
}

/// matrix += scale · h · factor: y += h·Bᵀ, or dx += dh·A.
#[derive(Clone, Copy, Debug)]
pub struct LowRankUp {
    /// bf16 [tokens, width], in place.
    pub matrix: Address,
    /// bf16 [tokens, rank].
    pub h: Address,
    /// bf16, by its side.
    pub factor: Address,
    /// The shapes.
    pub sizes: LowRank,
    /// Of the columns.
    pub split: Split,
    /// Of the factor.
    pub rank: Rank,
    /// Which factor it is.
    pub side: Factor,
}

/// d_factor += scale · hᵀ·matrix of A, or scale · matrixᵀ·h of B.
#[derive(Clone, Copy, Debug)]
pub struct LowRankGradient {
    /// f32, as the factor lies.
    pub d_factor: Address,
    /// f32 [parts, rank · width]; none for one part.
    pub parts: Address,
    /// bf16 [tokens, width].
    pub matrix: Address,
    /// bf16 [tokens, rank].
    pub h: Address,
    /// The shapes.
    pub sizes: LowRank,
    /// Of the tokens.
    pub split: Split,
    /// Of the factor.
    pub rank: Rank,
    /// Which factor it is.
    pub side: Factor,
}

/// Elements of a tile in shared memory, whose rows are 16 bytes apart from a multiple of 32.
fn tile(rows: u64, columns: u64) -> u64 {
    rows * (columns + 8)
}

fn grid(rows: u64, split: Split, tiles: [u64; 2]) -> Grid {
    let shared_bytes = (2 * STAGES * tiles.iter().sum::<u64>()) as u32;
    Grid { blocks: [rows.div_ceil(ROWS) as u32, split.parts, 1], threads: THREADS, shared_bytes }
}

/// Of the products that walk over columns.
fn grid_over_columns(sizes: &LowRank, split: Split, rank: Rank, side: Factor) -> Grid {
    let rank = rank.get() as u64;
    let of_factor = match side {
        Factor::A => tile(rank, DEPTH),
        Factor::B => tile(DEPTH, rank),
    };
    grid(sizes.tokens as u64, split, [tile(ROWS, DEPTH), of_factor])
}

/// Bytes of parts of so many sums.
fn parts_bytes(split: Split, sums: u64) -> u64 {
    if split.parts > 1 { 4 * u64::from(split.parts) * sums } else { 0 }
}

impl LowRankDown {
    /// The launch.
    pub fn grid(&self) -> Grid {
        grid_over_columns(&self.sizes, self.split, self.rank, self.side)
    }

    /// Bytes that `parts` must have.
    pub fn parts_bytes(&self) -> u64 {
        parts_bytes(self.split, self.sizes.tokens as u64 * self.rank.get() as u64)
    }

    /// The launch that must follow, if there are several parts.
    pub fn sum(&self) -> Option<(LowRankSum, Grid)> {
        let Self { h, parts, sizes, split, rank, .. } = *self;
        let threads = sizes.tokens as u64 * rank.get() as u64 / 8;
        let sum = LowRankSum { h, parts, sizes, count: split.parts as i32, rank: rank as i32 };
        (split.parts > 1).then(|| (sum, Grid::row(threads.div_ceil(THREADS.into()) as u32, THREADS)))
    }
}

impl LowRankUp {
    /// The launch.
    pub fn grid(&self) -> Grid {
        grid_over_columns(&self.sizes, self.split, self.rank, self.side)
    }
}

impl LowRankGradient {
    /// The launch.
    pub fn grid(&self) -> Grid {
        grid(self.sizes.width as u64, self.split, [tile(DEPTH, ROWS), tile(DEPTH, self.rank.get() as u64)])
    }

    /// Bytes that `parts` must have.
    pub fn parts_bytes(&self) -> u64 {
        parts_bytes(self.split, self.sizes.width as u64 * self.rank.get() as u64)
    }

    /// The launch that must follow, if there are several parts.
    pub fn sum(&self) -> Option<(AddParts, Grid)> {
        let width = self.sizes.width * self.rank as i32;
        let sum = AddParts { to: self.d_factor, parts: self.parts, count: self.split.parts as i32, width };
        (self.split.parts > 1).then(|| (sum, Grid::row((width as u32).div_ceil(256), 256)))
    }
}

/// A kernel of this file.
macro_rules! kernel {
    ($name:ident) => {
        Kernel {
            name: stringify!($name),
            file: "low_rank",
            #[cfg(feature = "emulation")]
            emulated: $crate::emulated!($name),
        }
    };
}

/// The kernel of a rank and a side.
macro_rules! kernel_of {
    ($launch:expr, $($rank:ident: $a:ident, $b:ident;)*) => {
        match ($launch.rank, $launch.side) {
            $((Rank::$rank, Factor::A) => kernel!($a), (Rank::$rank, Factor::B) => kernel!($b),)*
        }
    };
}

/// Where arguments lie, and their sizes.
macro_rules! arguments {
    ($($argument:expr),*) => {{
        fn argument<T: Argument>(value: &T) -> (*const c_void, usize) {
            ((value as *const T).cast(), size_of::<T>())
        }
        vec![$(argument(&$argument)),*]
    }};
}

impl Launch for LowRankDown {
    fn kernel(&self) -> Kernel {
        kernel_of!(self,
            R16: low_rank_down_a_16, low_rank_down_b_16;
            R32: low_rank_down_a_32, low_rank_down_b_32;
            R48: low_rank_down_a_48, low_rank_down_b_48;
            R64: low_rank_down_a_64, low_rank_down_b_64;)
    }

    fn arguments(&self) -> Vec<(*const c_void, usize)> {
        arguments![self.h, self.parts, self.matrix, self.factor, self.sizes, self.split.length]
    }
}

impl Launch for LowRankSum {
    fn kernel(&self) -> Kernel {
        kernel!(low_rank_sum)
    }

    fn arguments(&self) -> Vec<(*const c_void, usize)> {
        arguments![self.h, self.parts, self.sizes, self.count, self.rank]
    }
}

impl Launch for LowRankUp {
    fn kernel(&self) -> Kernel {
        kernel_of!(self,
            R16: low_rank_up_a_16, low_rank_up_b_16;
            R32: low_rank_up_a_32, low_rank_up_b_32;
            R48: low_rank_up_a_48, low_rank_up_b_48;
            R64: low_rank_up_a_64, low_rank_up_b_64;)
    }

    fn arguments(&self) -> Vec<(*const c_void, usize)> {
        arguments![self.matrix, self.h, self.factor, self.sizes, self.split.length]
    }
}

impl Launch for LowRankGradient {
    fn kernel(&self) -> Kernel {
        kernel_of!(self,
            R16: low_rank_gradient_a_16, low_rank_gradient_b_16;
            R32: low_rank_gradient_a_32, low_rank_gradient_b_32;
            R48: low_rank_gradient_a_48, low_rank_gradient_b_48;
            R64: low_rank_gradient_a_64, low_rank_gradient_b_64;)
    }

    fn arguments(&self) -> Vec<(*const c_void, usize)> {
        arguments![self.d_factor, self.parts, self.matrix, self.h, self.sizes, self.split.length]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sizes(tokens: i64, width: i32) -> LowRank {
        LowRank { stride: width.into(), h_stride: 64, tokens, width, scale: 1.0 }
    }

    #[test]
    fn few_tokens_are_split_into_parts_that_fill_a_card_once() {
        assert_eq!(sizes(4096, 4096).split_down(132), Split { parts: 4, length: 1024 });
        assert_eq!(sizes(1, 4096).split_down(132), Split { parts: 16, length: 256 });
        assert_eq!(sizes(20_000, 4096).split_down(132), Split { parts: 1, length: 4096 });
        assert_eq!(sizes(4096, 4096).split_up(132), Split { parts: 16, length: 256 });
        assert_eq!(sizes(4096, 1024).split_gradient(132), Split { parts: 16, length: 256 });
        assert_eq!(sizes(1, 8).split_gradient(132), Split { parts: 1, length: 64 });
    }

    #[test]
    fn the_last_part_is_never_empty() {
        for tokens in (1..3000).step_by(37) {
            for width in (8..3000).step_by(88) {
                let Split { parts, length } = sizes(tokens, width).split_down(132);
                let covered = i64::from(parts) * i64::from(length);
                assert!(covered >= i64::from(width) && covered - i64::from(length) < i64::from(width));
            }
        }
    }

    #[test]
    fn a_block_has_no_more_shared_memory_than_the_smallest_card_gives() {
        for (rank, side) in Rank::ALL.into_iter().flat_map(|rank| [(rank, Factor::A), (rank, Factor::B)]) {
            let (sizes, split) = (sizes(1, 8), Split { parts: 1, length: 64 });
            let [d_factor, parts, matrix, h] = [Address::NONE; 4];
            let gradient = LowRankGradient { d_factor, parts, matrix, h, sizes, split, rank, side };
            for grid in [grid_over_columns(&sizes, split, rank, side), gradient.grid()] {
                assert!(grid.shared_bytes <= 99 << 10, "{rank:?} {side:?}: {}", grid.shared_bytes);
            }
        }
    }

    #[test]
    fn a_rank_is_padded_to_the_next() {
        assert_eq!([1, 16, 17, 64].map(Rank::holding), [Rank::R16, Rank::R16, Rank::R32, Rank::R64].map(Some));
        assert_eq!(Rank::holding(65), None);
    }
}
