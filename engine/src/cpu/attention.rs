//! Causal attention within each row, y = softmax(cap(scale · q·kᵀ)) · v per head, and its gradients; cap(s) = c·tanh(s/c)
//! where the scores are capped, and a token may see no more than a window of tokens.
//!
//! q [tokens, query heads · dim]; k, v [tokens, key-value heads · dim]; each key-value head serves a group of query
//! heads. A task is one row and query head. It takes [`BLOCK`] queries at a time against all keys they may see, so
//! scores take BLOCK · row memory, and the backward pass computes them again from the saved log-sums (after
//! FlashAttention; Dao et al., 2022). Tasks write [row, head, token, dim]; a last pass puts heads side by side.

use std::cell::RefCell;

use rayon::prelude::*;

use super::Rows;
use super::gemm::{Output, View, ViewMut, gemm_serial};
use super::simd::{dot, exp, max, sum, tanh, vectorize};
use crate::backend::{Attention, AttentionForward, Heads};

/// Queries that are taken at a time.
const BLOCK: usize = 64;

/// One row and query head.
#[derive(Clone, Copy)]
struct Task {
    start: usize,
    len: usize,
    head: usize,
    kv_head: usize,
}

/// Sizes that all tasks share.
#[derive(Clone, Copy)]
struct Layout {
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
            dim: heads.dim,
            q_width: heads.query * heads.dim,
            kv_width: heads.key_value * heads.dim,
            scale,
            softcap,
            window,
        }
    }

    /// The first token that token `i` of a row sees.
    #[inline(always)]
    fn first_seen(&self, i: usize) -> usize {
        self.window.map_or(0, |window| (i + 1).saturating_sub(window))
    }

    /// `len` of the task's queries (or of what is shaped like them), from the row's token `first` on.
    fn queries<'a>(&self, q: &'a [f32], task: Task, first: usize, len: usize) -> View<'a> {
        let from = (task.start + first) * self.q_width + task.head * self.dim;
        View::strided(&q[from..], len, self.dim, self.q_width)
    }

    /// `len` of the task's keys or values, from the row's token `first` on.
    fn keys<'a>(&self, k: &'a [f32], task: Task, first: usize, len: usize) -> View<'a> {
        let from = (task.start + first) * self.kv_width + task.kv_head * self.dim;
        View::strided(&k[from..], len, self.dim, self.kv_width)
    }
}

fn tasks(heads: Heads, rows: &Rows) -> Vec<Task> {
    let group = heads.query / heads.key_value;
    let row = |(&start, &len): (&usize, &usize)| {
        (0..heads.query).map(move |head| Task { start, len, head, kv_head: head / group })
    };
    rows.starts.iter().zip(&rows.lengths).flat_map(row).collect()
}

/// Cuts a buffer [row, head, token, width] into the parts of its tasks.
fn split<'a>(mut buffer: &'a mut [f32], tasks: &[Task], width: usize) -> Vec<&'a mut [f32]> {
    tasks
        .iter()
        .map(|task| {
            let (part, rest) = std::mem::take(&mut buffer).split_at_mut(task.len * width);
            buffer = rest;
            part
        })
        .collect()
}

/// Puts heads side by side: y [tokens, heads · dim] from [row, head, token, dim], adding up `group` heads for each
/// head of y.
fn join_heads(parts: &[f32], rows: &Rows, heads: usize, group: usize, dim: usize, y: &mut [f32]) {
    let width = heads * dim;
    y.par_chunks_mut(width).zip(&rows.row_of).zip(&rows.positions).for_each(|((y, &row), &token)| {
        let (start, len) = (rows.starts[row], rows.lengths[row]);
        let row_part = &parts[start * width * group..][..len * width * group];
        for (head, y) in y.chunks_exact_mut(dim).enumerate() {
            let part = |member: usize| &row_part[((head * group + member) * len + token) * dim..][..dim];
            y.copy_from_slice(part(0));
            for member in 1..group {
                for (y, x) in y.iter_mut().zip(part(member)) {
                    *y += x;
                }
            }
        }
    });
}

thread_local! {
    static SCORES: RefCell<[Vec<f32>; 2]> = const { RefCell::new([Vec::new(), Vec::new()]) };
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
    let outputs = split(parts, &tasks, heads.dim).into_par_iter().zip(split(log_sums, &tasks, 1));
    tasks.par_iter().zip(outputs).with_max_len(1).for_each(|(&task, (part, log_sums))| {
        SCORES.with_borrow_mut(|[scores, _]| forward_task(layout, task, qkv, scores, part, log_sums));
    });
    join_heads(parts, rows, heads.query, 1, heads.dim, y);
}

fn forward_task(
    layout: Layout,
    task: Task,
    [q, k, v]: [&[f32]; 3],
    scores: &mut Vec<f32>,
    part: &mut [f32],
    log_sums: &mut [f32],
) {
    let dim = layout.dim;
    for first in (0..task.len).step_by(BLOCK) {
        let len = BLOCK.min(task.len - first);
        let from = layout.first_seen(first);
        let seen = first + len - from;
        grow(scores, len * seen);
        let q = layout.queries(q, task, first, len);
        let s = ViewMut::new(scores, len, seen);
        gemm_serial(s, Output::Set, layout.scale, q, layout.keys(k, task, from, seen).t());
        vectorize(
            #[inline(always)]
            || {
                for (i, s) in scores.chunks_exact_mut(seen).take(len).enumerate() {
                    let s = unmasked(s, layout.first_seen(first + i) - from, first + i + 1 - from);
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
                    log_sums[first + i] = largest + total.ln();
                }
            },
        );
        let part = ViewMut::new(&mut part[first * dim..], len, dim);
        let p = View::new(scores, len, seen);
        gemm_serial(part, Output::Set, 1.0, p, layout.keys(v, task, from, seen));
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

/// dq, dk and dv; `parts` are scratch, each as large as q.
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
        let part = &forward.log_sums[*from..*from + task.len];
        *from += task.len;
        Some(part)
    });
    let [q_parts, k_parts, v_parts] = parts;
    let outputs = split(q_parts, &tasks, heads.dim)
        .into_iter()
        .zip(split(k_parts, &tasks, heads.dim))
        .zip(split(v_parts, &tasks, heads.dim));
    let all: Vec<_> = tasks.iter().zip(log_sums).zip(outputs).collect();
    all.into_par_iter().with_max_len(1).for_each(|((&task, log_sums), ((dq, dk), dv))| {
        SCORES.with_borrow_mut(|scratch| {
            backward_task(layout, task, forward, log_sums, dy, scratch, [dq, dk, dv]);
        });
    });
    let group = heads.query / heads.key_value;
    join_heads(q_parts, rows, heads.query, 1, heads.dim, dq);
    join_heads(k_parts, rows, heads.key_value, group, heads.dim, dk);
    join_heads(v_parts, rows, heads.key_value, group, heads.dim, dv);
}

fn backward_task(
    layout: Layout,
    task: Task,
    f: &AttentionForward<'_, [f32]>,
    log_sums: &[f32],
    dy: &[f32],
    [p, ds]: &mut [Vec<f32>; 2],
    [dq, dk, dv]: [&mut [f32]; 3],
) {
    let dim = layout.dim;
    dk.fill(0.0);
    dv.fill(0.0);
    for first in (0..task.len).step_by(BLOCK) {
        let len = BLOCK.min(task.len - first);
        let from = layout.first_seen(first);
        let seen = first + len - from;
        grow(p, len * seen);
        grow(ds, len * seen);
        let q = layout.queries(f.q, task, first, len);
        let d_out = layout.queries(dy, task, first, len);
        let k = layout.keys(f.k, task, from, seen);
        let v = layout.keys(f.v, task, from, seen);
        gemm_serial(ViewMut::new(p, len, seen), Output::Set, layout.scale, q, k.t());
        gemm_serial(ViewMut::new(ds, len, seen), Output::Set, 1.0, d_out, v.t());
        vectorize(
            #[inline(always)]
            || {
                let blocks = p.chunks_exact_mut(seen).zip(ds.chunks_exact_mut(seen)).take(len);
                for (i, (p, ds)) in blocks.enumerate() {
                    let at = (task.start + first + i) * layout.q_width + task.head * dim;
                    let delta = dot(&dy[at..at + dim], &f.out[at..at + dim]);
                    let (low, high) = (layout.first_seen(first + i) - from, first + i + 1 - from);
                    let (p, ds) = (unmasked(p, low, high), unmasked(ds, low, high));
                    match layout.softcap {
                        None => {
                            for (p, ds) in p.iter_mut().zip(ds) {
                                *p = exp(*p - log_sums[first + i]);
                                *ds = *p * (*ds - delta) * layout.scale;
                            }
                        }
                        Some(cap) => {
                            for (p, ds) in p.iter_mut().zip(ds) {
                                let t = tanh(*p / cap);
                                *p = exp(cap * t - log_sums[first + i]);
                                *ds = *p * (*ds - delta) * (1.0 - t * t) * layout.scale;
                            }
                        }
                    }
                }
            },
        );
        let (p, ds) = (View::new(p, len, seen), View::new(ds, len, seen));
        gemm_serial(ViewMut::new(&mut dq[first * dim..], len, dim), Output::Set, 1.0, ds, k);
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
    let group = heads.query / heads.key_value;
    let outputs = y.par_chunks_mut(heads.dim).zip(q.par_chunks(heads.dim)).enumerate();
    outputs.for_each(|(i, (y, q))| {
        let (token, head) = (i / heads.query, i % heads.query);
        let at = |j: usize| j * layout.kv_width + head / group * heads.dim;
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
