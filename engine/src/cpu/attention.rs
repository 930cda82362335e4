//! Causal attention within each row, y = softmax(cap(scale · q·kᵀ)) · v per head, and its gradients; cap(s) = c·tanh(s/c)
//! where the scores are capped, and a token may see no more than a window of tokens. A row may go on after another one,
//! its prefix, whose tokens it sees too.
//!
//! q [tokens, query heads · dim]; k, v [tokens, key-value heads · dim]; each key-value head serves a group of query
//! heads. A task is one row and such a group. It takes a few tokens' queries at a time, those of all heads of the group
//! as one matrix, against all keys they may see: so the keys are packed once for the group, scores take little memory,
//! and the backward pass computes them again from the saved log-sums (after FlashAttention; Dao et al., 2022). Tasks
//! write [row, head, token, dim]; a last pass puts heads side by side.

use std::cell::RefCell;

use rayon::prelude::*;

use super::Rows;
use super::gemm::{Output, gemm_serial};
use super::simd::{dot, exp, max, sum, tanh, vectorize};
use crate::backend::{Attention, AttentionForward, Heads};
use crate::cpu::view::{View, ViewMut};

/// Queries that are taken at a time, of all heads of a group together: enough that packing keys weighs little, and of few
/// tokens, as scores that the mask hides are computed for nothing.
const QUERIES: usize = 96;
/// Bounds of the number of tokens.
const TOKENS: [usize; 2] = [16, 64];

/// One row and group of query heads.
#[derive(Clone, Copy)]
struct Task {
    start: usize,
    len: usize,
    /// The prefix of the row: where it starts, and its length, zero without one.
    prefix: (usize, usize),
    kv_head: usize,
}

impl Task {
    /// The tokens whose keys it sees, those of the prefix first.
    fn keys(self) -> usize {
        self.prefix.1 + self.len
    }
}

/// Sizes that all tasks share.
#[derive(Clone, Copy)]
struct Layout {
    /// Query heads of a key-value head.
    group: usize,
    dim: usize,
    q_width: usize,
    kv_width: usize,
    scale: f32,
    softcap: Option<f32>,
    window: Option<usize>,
}

impl Layout {
    fn new(attention: Attention) -> Self {
        let Attention { heads, scale, softcap, window } = attention;
        Layout {
            group: heads.query / heads.key_value,
            dim: heads.dim,
            q_width: heads.query * heads.dim,
            kv_width: heads.key_value * heads.dim,
            scale,
            softcap,
            window,
        }
    }

    /// The first token that the token at a position sees.
    #[inline(always)]
    fn first_seen(&self, position: usize) -> usize {
        self.window.map_or(0, |window| (position + 1).saturating_sub(window))
    }

    /// Tokens whose queries are taken at a time.
    fn block(&self) -> usize {
        (QUERIES / self.group).clamp(TOKENS[0], TOKENS[1])
    }

    /// Where the head `member` of the task's group begins in the row's own token `token`.
    #[inline(always)]
    fn query(&self, task: Task, member: usize, token: usize) -> usize {
        (task.start + token) * self.q_width + (task.kv_head * self.group + member) * self.dim
    }

    /// The queries (or what is shaped like them) of the group's heads, one head after the other, of `len` of the row's own
    /// tokens from `first` on; copied to `scratch`.
    fn queries<'a>(&self, q: &[f32], task: Task, first: usize, len: usize, scratch: &'a mut Vec<f32>) -> View<'a> {
        scratch.clear();
        for member in 0..self.group {
            for token in first..first + len {
                scratch.extend_from_slice(&q[self.query(task, member, token)..][..self.dim]);
            }
        }
        View::new(scratch, self.group * len, self.dim)
    }

    /// Puts what [`Layout::queries`] took to its place in the task's part [head, token, dim].
    fn put_back(&self, block: &[f32], task: Task, first: usize, len: usize, part: &mut [f32]) {
        for (member, rows) in block.chunks_exact(len * self.dim).take(self.group).enumerate() {
            part[(member * task.len + first) * self.dim..][..len * self.dim].copy_from_slice(rows);
        }
    }

    /// The task's keys or values by position: in place, or copied to `scratch` behind those of the prefix.
    fn keys<'a>(&self, k: &'a [f32], task: Task, scratch: &'a mut Vec<f32>) -> Keys<'a> {
        let of_head = |token: usize| &k[token * self.kv_width + task.kv_head * self.dim..];
        let (start, len) = task.prefix;
        if len == 0 {
            return Keys { values: of_head(task.start), stride: self.kv_width, dim: self.dim };
        }
        scratch.clear();
        for token in (start..start + len).chain(task.start..task.start + task.len) {
            scratch.extend_from_slice(&of_head(token)[..self.dim]);
        }
        Keys { values: scratch, stride: self.dim, dim: self.dim }
    }
}

/// Keys or values of one head, by position in the row.
#[derive(Clone, Copy)]
struct Keys<'a> {
    values: &'a [f32],
    stride: usize,
    dim: usize,
}

impl<'a> Keys<'a> {
    /// `len` of them, from a position on.
    fn from(self, position: usize, len: usize) -> View<'a> {
        View::strided(&self.values[position * self.stride..], len, self.dim, self.stride)
    }
}

fn tasks(heads: Heads, rows: &Rows) -> Vec<Task> {
    let row = |row: usize| {
        let (start, len) = (rows.starts[row], rows.lengths[row]);
        let prefix = rows.prefixes[row].map_or((0, 0), |prefix| (rows.starts[prefix], rows.lengths[prefix]));
        (0..heads.key_value).map(move |kv_head| Task { start, len, prefix, kv_head })
    };
    (0..rows.starts.len()).flat_map(row).collect()
}

/// Cuts a buffer [task, token, width] into the parts of its tasks, which have so many tokens.
fn split<'a>(
    mut buffer: &'a mut [f32],
    tasks: &[Task],
    tokens: impl Fn(&Task) -> usize,
    width: usize,
) -> Vec<&'a mut [f32]> {
    let part = |task: &Task| {
        let (part, rest) = std::mem::take(&mut buffer).split_at_mut(tokens(task) * width);
        buffer = rest;
        part
    };
    tasks.iter().map(part).collect()
}

/// Puts heads side by side: y [tokens, heads · dim] from [row, head, token, dim].
fn join_heads(parts: &[f32], rows: &Rows, heads: usize, dim: usize, y: &mut [f32]) {
    let width = heads * dim;
    y.par_chunks_mut(width).zip(&rows.row_of).enumerate().for_each(|(token, (y, &row))| {
        let (start, len) = (rows.starts[row], rows.lengths[row]);
        let parts = &parts[start * width..];
        for (head, y) in y.chunks_exact_mut(dim).enumerate() {
            y.copy_from_slice(&parts[(head * len + token - start) * dim..][..dim]);
        }
    });
}

/// Puts the heads of keys or values side by side: y [tokens, heads · dim] from [row, head, position, dim], adding up all
/// rows that see a token.
fn join_key_heads(parts: &[f32], rows: &Rows, heads: usize, dim: usize, y: &mut [f32]) {
    let width = heads * dim;
    y.par_chunks_mut(width).zip(&rows.row_of).enumerate().for_each(|(token, (y, &row))| {
        let position = rows.key_lengths[row] - rows.lengths[row] + token - rows.starts[row];
        y.fill(0.0);
        for seen_by in std::iter::once(row).chain(rows.followers[row].iter().copied()) {
            let len = rows.key_lengths[seen_by];
            let parts = &parts[rows.key_starts[seen_by] * width..];
            for (head, y) in y.chunks_exact_mut(dim).enumerate() {
                let part = &parts[(head * len + position) * dim..][..dim];
                y.iter_mut().zip(part).for_each(|(y, x)| *y += x);
            }
        }
    });
}

/// What a thread needs for a task.
#[derive(Default)]
struct Scratch {
    scores: Vec<f32>,
    d_scores: Vec<f32>,
    keys: Vec<f32>,
    values: Vec<f32>,
    queries: Vec<f32>,
    d_out: Vec<f32>,
    out: Vec<f32>,
    /// Derivatives of capped scores.
    slopes: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// y and log_sums, which is laid out [row, head, token]; `parts` is scratch as large as y.
pub(super) fn forward(
    qkv: [&[f32]; 3],
    attention: Attention,
    rows: &Rows,
    parts: &mut [f32],
    y: &mut [f32],
    log_sums: &mut [f32],
) {
    let (layout, heads) = (Layout::new(attention), attention.heads);
    let tasks = tasks(heads, rows);
    let split = |buffer, width| split(buffer, &tasks, |task| task.len, layout.group * width);
    let outputs = split(parts, heads.dim).into_par_iter().zip(split(log_sums, 1));
    tasks.par_iter().zip(outputs).with_max_len(1).for_each(|(&task, (part, log_sums))| {
        SCRATCH.with_borrow_mut(|scratch| forward_task(layout, task, qkv, scratch, part, log_sums));
    });
    join_heads(parts, rows, heads.query, heads.dim, y);
}

fn forward_task(
    layout: Layout,
    task: Task,
    [q, k, v]: [&[f32]; 3],
    scratch: &mut Scratch,
    part: &mut [f32],
    log_sums: &mut [f32],
) {
    let dim = layout.dim;
    let Scratch { scores, keys, values, queries, out, .. } = scratch;
    let (k, v) = (layout.keys(k, task, keys), layout.keys(v, task, values));
    let block = layout.block();
    for first in (0..task.len).step_by(block) {
        let len = block.min(task.len - first);
        let position = task.prefix.1 + first;
        let from = layout.first_seen(position);
        let seen = position + len - from;
        let rows = layout.group * len;
        grow(scores, rows * seen);
        grow(out, rows * dim);
        let q = layout.queries(q, task, first, len, queries);
        let s = ViewMut::new(scores, rows, seen);
        gemm_serial(s, Output::Set, layout.scale, q, k.from(from, seen).t());
        vectorize(
            #[inline(always)]
            || {
                for (row, s) in scores.chunks_exact_mut(seen).take(rows).enumerate() {
                    let (member, i) = (row / len, row % len);
                    let s = unmasked(s, layout.first_seen(position + i) - from, position + i + 1 - from);
                    if let Some(cap) = layout.softcap {
                        s.iter_mut().for_each(|x| *x = cap * tanh(*x / cap));
                    }
                    let largest = max(s);
                    for x in s.iter_mut() {
                        *x = exp(*x - largest);
                    }
                    let total = sum(s.len(), |j| s[j]);
                    for x in s.iter_mut() {
                        *x *= 1.0 / total;
                    }
                    log_sums[member * task.len + first + i] = largest + total.ln();
                }
            },
        );
        let y = ViewMut::new(out, rows, dim);
        gemm_serial(y, Output::Set, 1.0, View::new(scores, rows, seen), v.from(from, seen));
        layout.put_back(out, task, first, len, part);
    }
}

/// The scores that a query has, from its first to its last key; all others become zero.
#[inline(always)]
fn unmasked(scores: &mut [f32], from: usize, to: usize) -> &mut [f32] {
    let (before, rest) = scores.split_at_mut(from);
    let (seen, after) = rest.split_at_mut(to - from);
    before.fill(0.0);
    after.fill(0.0);
    seen
}

/// dq, dk and dv; `parts` are scratch: the first as large as q, the others with as many rows as [`Rows::keys`] says.
pub(super) fn backward(
    forward: &AttentionForward<'_, [f32]>,
    dy: &[f32],
    attention: Attention,
    rows: &Rows,
    parts: [&mut [f32]; 3],
    [dq, dk, dv]: [&mut [f32]; 3],
) {
    let (layout, heads) = (Layout::new(attention), attention.heads);
    let tasks = tasks(heads, rows);
    let log_sums = tasks.iter().scan(0, |from, task| {
        let len = layout.group * task.len;
        let part = &forward.log_sums[*from..*from + len];
        *from += len;
        Some(part)
    });
    let [q_parts, k_parts, v_parts] = parts;
    let keys = |buffer| split(buffer, &tasks, |task| task.keys(), heads.dim);
    let outputs = split(q_parts, &tasks, |task| task.len, layout.group * heads.dim).into_iter();
    let outputs = outputs.zip(keys(k_parts)).zip(keys(v_parts));
    let all: Vec<_> = tasks.iter().zip(log_sums).zip(outputs).collect();
    all.into_par_iter().with_max_len(1).for_each(|((&task, log_sums), ((dq, dk), dv))| {
        SCRATCH.with_borrow_mut(|scratch| {
            backward_task(layout, task, forward, log_sums, dy, scratch, [dq, dk, dv]);
        });
    });
    join_heads(q_parts, rows, heads.query, heads.dim, dq);
    join_key_heads(k_parts, rows, heads.key_value, heads.dim, dk);
    join_key_heads(v_parts, rows, heads.key_value, heads.dim, dv);
}

fn backward_task(
    layout: Layout,
    task: Task,
    f: &AttentionForward<'_, [f32]>,
    log_sums: &[f32],
    dy: &[f32],
    scratch: &mut Scratch,
    [dq, dk, dv]: [&mut [f32]; 3],
) {
    let dim = layout.dim;
    let Scratch { scores: p, d_scores: ds, keys, values, queries, d_out, out: dq_block, slopes } = scratch;
    let (keys, values) = (layout.keys(f.k, task, keys), layout.keys(f.v, task, values));
    dk.fill(0.0);
    dv.fill(0.0);
    let block = layout.block();
    for first in (0..task.len).step_by(block) {
        let len = block.min(task.len - first);
        let position = task.prefix.1 + first;
        let from = layout.first_seen(position);
        let seen = position + len - from;
        let rows = layout.group * len;
        grow(p, rows * seen);
        grow(ds, rows * seen);
        grow(dq_block, rows * dim);
        let q = layout.queries(f.q, task, first, len, queries);
        let d_out = layout.queries(dy, task, first, len, d_out);
        let k = keys.from(from, seen);
        gemm_serial(ViewMut::new(p, rows, seen), Output::Set, layout.scale, q, k.t());
        gemm_serial(ViewMut::new(ds, rows, seen), Output::Set, 1.0, d_out, values.from(from, seen).t());
        vectorize(
            #[inline(always)]
            || {
                let blocks = p.chunks_exact_mut(seen).zip(ds.chunks_exact_mut(seen)).take(rows);
                for (row, (p, ds)) in blocks.enumerate() {
                    let (member, i) = (row / len, row % len);
                    let log_sum = log_sums[member * task.len + first + i];
                    let (low, high) = (layout.first_seen(position + i) - from, position + i + 1 - from);
                    let (p, ds) = (unmasked(p, low, high), unmasked(ds, low, high));
                    if let Some(cap) = layout.softcap {
                        slopes.clear();
                        for p in p.iter_mut() {
                            let t = tanh(*p / cap);
                            slopes.push(1.0 - t * t);
                            *p = cap * t;
                        }
                    }
                    p.iter_mut().for_each(|p| *p = exp(*p - log_sum));
                    // dy · y, from what is here, so that y need not be kept.
                    let delta = dot(p, ds);
                    for (p, ds) in p.iter().zip(ds.iter_mut()) {
                        *ds = *p * (*ds - delta) * layout.scale;
                    }
                    if layout.softcap.is_some() {
                        ds.iter_mut().zip(&*slopes).for_each(|(ds, slope)| *ds *= slope);
                    }
                }
            },
        );
        let (p, ds) = (View::new(p, rows, seen), View::new(ds, rows, seen));
        gemm_serial(ViewMut::new(dq_block, rows, dim), Output::Set, 1.0, ds, k);
        layout.put_back(dq_block, task, first, len, dq);
        gemm_serial(ViewMut::new(&mut dk[from * dim..], seen, dim), Output::Add, 1.0, ds.t(), q);
        gemm_serial(ViewMut::new(&mut dv[from * dim..], seen, dim), Output::Add, 1.0, p.t(), d_out);
    }
}

fn grow(buffer: &mut Vec<f32>, len: usize) {
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
}

/// Attention of the last tokens of one row over all keys and values up to each: q [new, query heads · dim], the caches
/// [≥ past + new, key-value heads · dim].
pub(super) fn cached(q: &[f32], keys: &[f32], values: &[f32], attention: Attention, past: usize, y: &mut [f32]) {
    let (layout, heads) = (Layout::new(attention), attention.heads);
    let outputs = y.par_chunks_mut(heads.dim).zip(q.par_chunks(heads.dim)).enumerate();
    outputs.for_each(|(i, (y, q))| {
        let (token, head) = (i / heads.query, i % heads.query);
        let at = |j: usize| j * layout.kv_width + head / layout.group * heads.dim;
        let seen = layout.first_seen(past + token)..past + token + 1;
        vectorize(
            #[inline(always)]
            || {
                let score = |j: usize| layout.scale * dot(q, &keys[at(j)..][..heads.dim]);
                let mut scores: Vec<f32> = seen.clone().map(score).collect();
                if let Some(cap) = layout.softcap {
                    scores.iter_mut().for_each(|s| *s = cap * tanh(*s / cap));
                }
                let largest = max(&scores);
                scores.iter_mut().for_each(|s| *s = exp(*s - largest));
                let total: f32 = scores.iter().sum();
                y.fill(0.0);
                for (j, score) in seen.clone().zip(&scores) {
                    let v = &values[at(j)..][..heads.dim];
                    for (y, v) in y.iter_mut().zip(v) {
                        *y += score / total * v;
                    }
                }
            },
        );
    });
}
