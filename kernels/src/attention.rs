//! Attention: a kernel for each size of a head.

use std::ffi::c_void;

use crate::{
    device::{Address, Grid},
    kernel::{Argument, Kernel, Launch},
};

/// `Row` of `attention.cu`: where a row's tokens lie.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Row {
    /// Its first token.
    pub start: i32,
    /// Its tokens.
    pub length: i32,
    /// The first token of its prefix.
    pub prefix_start: i32,
    /// The prefix's tokens; 0 without one.
    pub prefix_length: i32,
}

/// `Tile` of `attention.cu`: up to 64 queries of a row.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tile {
    /// Number of the row.
    pub row: i32,
    /// The first of its own tokens.
    pub first: i32,
}

/// Queries of a tile.
pub const QUERIES: usize = 64;
const WARPS: u32 = 4;

/// The tiles of some rows. The longest come first: they take the longest, and no card waits for one of them at the end.
pub fn tiles(rows: &[Row]) -> Vec<Tile> {
    let of_row = |(number, row): (usize, Row)| {
        let keys = move |first: i32| row.prefix_length + first;
        (0..row.length).step_by(QUERIES).map(move |first| (keys(first), Tile { row: number as i32, first }))
    };
    let mut tiles: Vec<(i32, Tile)> = rows.iter().copied().enumerate().flat_map(of_row).collect();
    tiles.sort_by_key(|(keys, tile)| (-keys, tile.row, tile.first));
    tiles.into_iter().map(|(_, tile)| tile).collect()
}

/// `Attention` of `attention.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Attention {
    /// [`Row`]s.
    pub rows: Address,
    /// [`Tile`]s.
    pub tiles: Address,
    /// Elements from a token's queries to the next one's.
    pub q_stride: i64,
    /// Elements from a token's keys, or values, to the next one's.
    pub kv_stride: i64,
    /// Elements from a token's results to the next one's.
    pub y_stride: i64,
    /// All tokens.
    pub tokens: i64,
    /// Query heads of a key-value head.
    pub group: i32,
    /// Tokens that one sees, itself included; 0: all.
    pub window: i32,
    /// Of the scores.
    pub scale: f32,
    /// Of the scores; 0: they are not capped.
    pub cap: f32,
}

// SAFETY: two pointers, four integers of 64 bits and four numbers of 32.
unsafe impl Argument for Attention {}

/// The forward pass.
#[derive(Clone, Copy, Debug)]
pub struct AttentionForward {
    /// bf16 [tokens, heads, head_dim].
    pub y: Address,
    /// f32 [heads, tokens].
    pub log_sums: Address,
    /// bf16 [tokens, heads, head_dim].
    pub q: Address,
    /// bf16 [tokens, kv_heads, head_dim].
    pub k: Address,
    /// The same.
    pub v: Address,
    /// The rest.
    pub attention: Attention,
    /// Elements of a head: one of [`HEAD_DIMS`].
    pub head_dim: usize,
}

/// The sizes of heads that have a kernel.
pub const HEAD_DIMS: [usize; 5] = [64, 80, 96, 128, 256];

impl AttentionForward {
    /// The launch of so many tiles.
    pub fn grid(&self, tiles: usize, heads: usize) -> Grid {
        let (keys, stride) = (if self.head_dim > 128 { 32 } else { 64 }, self.head_dim + 8);
        Grid {
            blocks: [tiles as u32, heads as u32, 1],
            threads: 32 * WARPS,
            shared_bytes: (2 * stride * (QUERIES + 4 * keys)) as u32,
        }
    }
}

impl Launch for AttentionForward {
    fn kernel(&self) -> Kernel {
        macro_rules! kernel {
            ($name:ident) => {
                Kernel {
                    name: stringify!($name),
                    file: "attention",
                    #[cfg(feature = "emulation")]
                    emulated: crate::emulated!($name),
                }
            };
        }
        match self.head_dim {
            64 => kernel!(attention_64),
            80 => kernel!(attention_80),
            96 => kernel!(attention_96),
            128 => kernel!(attention_128),
            256 => kernel!(attention_256),
            other => panic!("no attention kernel for a head_dim of {other}"),
        }
    }

    fn arguments(&self) -> Vec<(*const c_void, usize)> {
        fn argument<T: Argument>(value: &T) -> (*const c_void, usize) {
            ((value as *const T).cast(), size_of::<T>())
        }
        vec![
            argument(&self.y),
            argument(&self.log_sums),
            argument(&self.q),
            argument(&self.k),
            argument(&self.v),
            argument(&self.attention),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_cover_each_row_and_the_longest_come_first() {
        let row = |length, prefix_length| Row { start: 0, length, prefix_start: 0, prefix_length };
        let found = tiles(&[row(65, 0), row(3, 200), row(64, 0)]);
        let expected = [(1, 0), (0, 64), (0, 0), (2, 0)].map(|(row, first)| Tile { row, first });
        assert_eq!(found, expected);
    }
}
