//! Attention: a kernel for each size of a head.

use std::ffi::c_void;

use crate::{
    device::Grid,
    kernel::{Argument, Kernel, Launch},
    memory::Address,
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
    /// Number of the first row that goes on after this one; the others follow it.
    pub first_follower: i32,
    /// Rows that go on after this one.
    pub followers: i32,
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
    /// Elements of a head.
    pub head_dim: i32,
}

/// The sizes of heads that have kernels for tensor cores; others, up to [`LARGEST_HEAD`], have plain ones.
pub const HEAD_DIMS: [usize; 5] = [64, 80, 96, 128, 256];
/// The most elements of a head.
pub const LARGEST_HEAD: usize = 512;

/// The products of `dy` and `y`, for the backward pass.
#[derive(Clone, Copy, Debug)]
pub struct AttentionDelta {
    /// f32 [heads, tokens].
    pub delta: Address,
    /// bf16 [tokens, heads, head_dim].
    pub dy: Address,
    /// The same.
    pub y: Address,
    /// Elements from a token's results to the next one's.
    pub y_stride: i64,
    /// All tokens.
    pub tokens: i64,
    /// Query heads.
    pub heads: i32,
    /// Elements of a head.
    pub head_dim: i32,
}

/// The gradient by the queries.
#[derive(Clone, Copy, Debug)]
pub struct AttentionQueries {
    /// bf16, as `q` lies.
    pub dq: Address,
    /// bf16 [tokens, heads, head_dim].
    pub dy: Address,
    /// As in the forward pass.
    pub q: Address,
    /// As in the forward pass.
    pub k: Address,
    /// As in the forward pass.
    pub v: Address,
    /// Of the forward pass.
    pub log_sums: Address,
    /// Of [`AttentionDelta`].
    pub delta: Address,
    /// The rest.
    pub attention: Attention,
    /// Elements of a head.
    pub head_dim: i32,
}

/// The gradients by keys and values; for a head of 256 two launches, of which each computes one.
#[derive(Clone, Copy, Debug)]
pub struct AttentionKeys {
    /// bf16, as `k` lies.
    pub dk: Address,
    /// bf16, as `v` lies.
    pub dv: Address,
    /// bf16 [tokens, heads, head_dim].
    pub dy: Address,
    /// As in the forward pass.
    pub q: Address,
    /// As in the forward pass.
    pub k: Address,
    /// As in the forward pass.
    pub v: Address,
    /// Of the forward pass.
    pub log_sums: Address,
    /// Of [`AttentionDelta`].
    pub delta: Address,
    /// The rest.
    pub attention: Attention,
    /// Elements of a head.
    pub head_dim: i32,
    /// Of a head of 256, the values' launch.
    pub values: bool,
}

/// Bytes of shared memory for 64 rows of each of so many tensors that stay, and twice `rows` of two that come in turn.
fn shared_bytes(head_dim: i32, stay: u32, rows: u32) -> u32 {
    match usize::try_from(head_dim) {
        Ok(known) if HEAD_DIMS.contains(&known) => 2 * (head_dim as u32 + 8) * (64 * stay + 4 * rows),
        _ => 0,
    }
}

fn tile_grid(tiles: usize, heads: usize, shared_bytes: u32) -> Grid {
    Grid { blocks: [tiles as u32, heads as u32, 1], threads: 32 * WARPS, shared_bytes }
}

impl AttentionForward {
    /// The launch over tiles of queries.
    pub fn grid(&self, tiles: usize, heads: usize) -> Grid {
        tile_grid(tiles, heads, shared_bytes(self.head_dim, 1, if self.head_dim > 128 { 32 } else { 64 }))
    }
}

/// Rows that a backward pass takes at a time.
fn backward_rows(head_dim: i32) -> u32 {
    match head_dim {
        ..=96 => 64,
        97..=128 => 32,
        _ => 16,
    }
}

impl AttentionDelta {
    /// The launch over all heads of all tokens.
    pub fn grid(&self) -> Grid {
        let all = (self.tokens as u64 * self.heads as u64).div_ceil(u64::from(WARPS));
        Grid::row(all as u32, 32 * WARPS)
    }
}

impl AttentionQueries {
    /// The launch over tiles of queries.
    pub fn grid(&self, tiles: usize, heads: usize) -> Grid {
        tile_grid(tiles, heads, shared_bytes(self.head_dim, 2, backward_rows(self.head_dim)))
    }
}

impl AttentionKeys {
    /// The launches: one, or one for the keys and one for the values.
    pub fn passes(self) -> Vec<Self> {
        let both = [false, true].map(|values| Self { values, ..self });
        both[..if self.head_dim == 256 { 2 } else { 1 }].to_vec()
    }

    /// The launch over tiles of keys.
    pub fn grid(&self, tiles: usize, kv_heads: usize) -> Grid {
        tile_grid(tiles, kv_heads, shared_bytes(self.head_dim, 2, backward_rows(self.head_dim)))
    }
}

/// The kernel of a head's size, else the plain one.
macro_rules! kernel_of {
    ($plain:ident, $file:literal, $launch:expr, $($head_dim:pat => $name:ident),*) => {
        match $launch {
            $($head_dim => kernel_of!($file, $name),)*
            _ => kernel_of!("attention_plain", $plain),
        }
    };
    ($file:literal, $name:ident) => {
        Kernel {
            name: stringify!($name),
            file: $file,
            #[cfg(feature = "emulation")]
            emulated: crate::emulated!($name),
        }
    };
}

/// Where arguments lie, and their sizes; a plain kernel takes the head's size too.
macro_rules! arguments {
    ($head_dim:expr, $($argument:expr),* $(,)?) => {{
        fn argument<T: Argument>(value: &T) -> (*const c_void, usize) {
            ((value as *const T).cast(), size_of::<T>())
        }
        let is_plain = !HEAD_DIMS.iter().any(|known| *known as i32 == $head_dim);
        let mut all = vec![$(argument(&$argument)),*];
        all.extend(is_plain.then(|| argument(&$head_dim)));
        all
    }};
}

impl Launch for AttentionForward {
    fn kernel(&self) -> Kernel {
        kernel_of!(attention_plain, "attention", self.head_dim, 64 => attention_64, 80 => attention_80, 96 => attention_96,
            128 => attention_128, 256 => attention_256)
    }

    fn arguments(&self) -> Vec<(*const c_void, usize)> {
        arguments![self.head_dim, self.y, self.log_sums, self.q, self.k, self.v, self.attention]
    }
}

impl Launch for AttentionDelta {
    fn kernel(&self) -> Kernel {
        kernel_of!(attention_plain_delta, "attention_backward", self.head_dim, 64 => attention_delta_64, 80 => attention_delta_80,
            96 => attention_delta_96, 128 => attention_delta_128, 256 => attention_delta_256)
    }

    fn arguments(&self) -> Vec<(*const c_void, usize)> {
        arguments![self.head_dim, self.delta, self.dy, self.y, self.y_stride, self.tokens, self.heads]
    }
}

impl Launch for AttentionQueries {
    fn kernel(&self) -> Kernel {
        kernel_of!(attention_plain_queries, "attention_backward", self.head_dim, 64 => attention_queries_64, 80 => attention_queries_80,
            96 => attention_queries_96, 128 => attention_queries_128, 256 => attention_queries_256)
    }

    fn arguments(&self) -> Vec<(*const c_void, usize)> {
        let Self { dq, dy, q, k, v, log_sums, delta, attention, .. } = self;
        arguments![self.head_dim, *dq, *dy, *q, *k, *v, *log_sums, *delta, *attention]
    }
}

impl Launch for AttentionKeys {
    fn kernel(&self) -> Kernel {
        kernel_of!(attention_plain_keys, "attention_backward", (self.head_dim, self.values), (64, _) => attention_keys_64,
            (80, _) => attention_keys_80, (96, _) => attention_keys_96, (128, _) => attention_keys_128,
            (256, false) => attention_keys_256, (256, true) => attention_values_256)
    }

    fn arguments(&self) -> Vec<(*const c_void, usize)> {
        let Self { dk, dv, dy, q, k, v, log_sums, delta, attention, .. } = self;
        arguments![self.head_dim, *dk, *dv, *dy, *q, *k, *v, *log_sums, *delta, *attention]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_cover_each_row_and_the_longest_come_first() {
        let row = |length, prefix_length| Row { length, prefix_length, ..Row::default() };
        let found = tiles(&[row(65, 0), row(3, 200), row(64, 0)]);
        let expected = [(1, 0), (0, 64), (0, 0), (2, 0)].map(|(row, first)| Tile { row, first });
        assert_eq!(found, expected);
    }
}
