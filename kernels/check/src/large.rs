//! Tensors of more than 2³² elements: the last blocks must find their numbers, as those of a small tensor do. Under the emulation only what
//! is touched exists; no card has memory for all of these.

use half::bf16;
use tunesmith_kernels::{
    Address, Grid, Launch,
    attention::{Attention, AttentionDelta, AttentionForward, AttentionKeys, AttentionQueries, Row, tiles},
    kernels::{
        AdamW, AdamW8BitBf16, AdamWBf16, CrossEntropyBf16, Dequantize8Bit, DropOut, Embedding, EmbeddingBackward,
        Gated, GatedBackward, NormRope, NormRopeBackward, Quantize8BitBf16, RmsNorm, RmsNormBackward, Rope, Sgd,
        SgdBf16, SquaresBf16, StepState,
    },
};

use crate::bench::{Bench, blocks};

listed![
    elements_of_long_tensors_are_found,
    rows_of_long_tensors_are_found,
    words_of_long_tables_are_found,
    tokens_far_apart_are_found,
];

/// A multiple of every block.
const MANY: usize = 5 << 30;
/// Elements that are looked at.
const TAIL: usize = 4096;

/// Numbers at the end of a tensor, of which only they exist.
struct End {
    base: Address,
    tail: Address,
}

/// A bench, and how large its tensors are: as large as their ends, or much larger.
struct Ends {
    bench: Bench,
    is_large: bool,
}

impl Ends {
    /// How much comes before the end, of something of which there is one in so many elements.
    fn before(&self, elements: usize) -> usize {
        if self.is_large { MANY / elements } else { 0 }
    }

    /// A tensor of one number in so many elements, with these at its end.
    fn put<T: Copy>(&self, name: &str, elements: usize, values: &[T]) -> End {
        let before = self.before(elements) * size_of::<T>();
        let base = self.bench.sparse(name, before + size_of_val(values));
        let tail = base.plus(before as u64);
        self.bench.upload(tail, values);
        End { base, tail }
    }

    /// The same of bf16, at random.
    fn random(&self, name: &str) -> End {
        let values: Vec<bf16> = self.bench.bf16s(TAIL).into_iter().map(bf16::from_f32).collect();
        self.put(name, 1, &values)
    }

    fn bytes(&self, end: &End, count: usize) -> Vec<u8> {
        self.bench.download(end.tail, count)
    }

    /// Runs the last of the blocks that there are for all elements, so many elements a block.
    fn run(&self, launch: &dyn Launch, per_block: usize, grid: impl Fn(u32) -> Grid) {
        let (all, last) = (blocks(self.before(1) + TAIL, per_block), blocks(TAIL, per_block));
        self.bench.only_blocks(u64::from(all - last), u64::from(last));
        self.bench.run(launch, grid(all));
    }

    fn count(&self) -> usize {
        self.before(1) + TAIL
    }
}

/// Holds what a check leaves at the end of large tensors against what it leaves of small ones.
fn hold(check: fn(&Ends) -> Vec<Vec<u8>>) {
    let of = |is_large| check(&Ends { bench: Bench::new(1), is_large });
    let small = of(false);
    if Bench::new(1).emulator().is_some() {
        assert_eq!(of(true), small);
    }
    assert!(small.iter().all(|bytes| bytes.iter().any(|byte| *byte != 0)), "nothing has been computed");
}

fn state(bench: &Bench) -> Address {
    bench.put("state", &[StepState { norm: 1.0, factor: 0.5, finite: 1 }]).at
}

fn elements_of_long_tensors_are_found() {
    hold(|ends| {
        let count = ends.count() as i64;
        let row = |all| Grid::row(all, 256);
        let [x, z, y, other] = ["x", "z", "y", "other"].map(|name| ends.random(name));
        ends.run(&Gated { y: y.base, gate: x.base, up: z.base, count, activation: 0 }, 2048, row);
        let mut found = vec![ends.bytes(&y, 2 * TAIL)];
        let backward = GatedBackward {
            d_gate: y.base,
            d_up: other.base,
            dy: z.base,
            gate: x.base,
            up: z.base,
            count,
            activation: 1,
        };
        ends.run(&backward, 2048, row);
        found.extend([&y, &other].map(|end| ends.bytes(end, 2 * TAIL)));
        // The bits are others at another index: whatever is kept is what it was.
        let kept = DropOut { y: y.base, x: x.base, count, threshold: 0, scale: 2.0, key: 5 };
        ends.run(&kept, 2048, row);
        found.push(ends.bytes(&y, 2 * TAIL));

        let per_block = 2048;
        let parts = ends.put("parts", per_block, &[0f64; TAIL / 2048]);
        let squares = SquaresBf16 { parts: parts.base, gradient: x.base, count, per_block: per_block as i32 };
        ends.run(&squares, per_block, |all| row(all).with_shared(8 * 8));
        found.push(ends.bytes(&parts, 8 * TAIL / 2048));
        found
    });
    hold(|ends| {
        let count = ends.count() as i64;
        let numbers = ends.bench.randoms(TAIL);
        let [parameters, m, v] = ["parameters", "m", "v"]
            .map(|name| ends.put(name, 1, &numbers.iter().map(|x| x.abs()).collect::<Vec<f32>>()));
        let (compute, gradient) = (ends.random("compute"), ends.random("gradient"));
        let step =
            AdamW { decay: 0.9, beta2: 0.999, new1: 0.1, new2: 0.001, correction2: 0.5, step_size: 0.01, eps: 1e-8 };
        let launch = AdamWBf16 {
            parameters: parameters.base,
            compute: compute.base,
            gradient: gradient.base,
            m: m.base,
            v: v.base,
            state: state(&ends.bench),
            step,
            count,
        };
        ends.run(&launch, 256, |all| Grid::row(all, 256));
        let mut found: Vec<_> = [&parameters, &m, &v].map(|end| ends.bytes(end, 4 * TAIL)).into();
        found.push(ends.bytes(&compute, 2 * TAIL));
        let sgd = SgdBf16 {
            parameters: parameters.base,
            compute: compute.base,
            gradient: gradient.base,
            momentum: m.base,
            state: state(&ends.bench),
            step: Sgd { lr: 0.1, decay: 0.01, kept: 0.9 },
            count,
        };
        ends.run(&sgd, 256, |all| Grid::row(all, 256));
        found.extend([&parameters, &m].map(|end| ends.bytes(end, 4 * TAIL)));

        let [m, v] = ["m", "v"].map(|name| ends.put(name, 1, &[200u8; TAIL]));
        let [m_absmax, v_absmax] = ["m_absmax", "v_absmax"].map(|name| ends.put(name, 256, &[0.5f32; TAIL / 256]));
        let map: Vec<f32> = (0..512).map(|i| (i % 256) as f32 / 255.0 - if i < 256 { 0.5 } else { 0.0 }).collect();
        let launch = AdamW8BitBf16 {
            parameters: parameters.base,
            compute: compute.base,
            gradient: gradient.base,
            m: m.base,
            m_absmax: m_absmax.base,
            v: v.base,
            v_absmax: v_absmax.base,
            maps: ends.bench.put("maps", &map).at,
            state: state(&ends.bench),
            step,
            count,
        };
        ends.run(&launch, 256, |all| Grid::row(all, 256).with_shared(4 * (512 + 8)));
        found.extend([&m, &v].map(|end| ends.bytes(end, TAIL)));
        found.extend([&m_absmax, &v_absmax].map(|end| ends.bytes(end, 4 * TAIL / 256)));
        found.push(ends.bytes(&parameters, 4 * TAIL));
        found
    });
}

fn rows_of_long_tensors_are_found() {
    const WIDTH: usize = 1024;
    const ROWS: usize = TAIL / WIDTH;
    hold(|ends| {
        let width = WIDTH as i32;
        let [x, residual, y, sum] = ["x", "residual", "y", "sum"].map(|name| ends.random(name));
        let scales = ends.put("scales", WIDTH, &[0f32; ROWS]);
        let weight = ends.bench.put("weight", &ends.bench.randoms(WIDTH)).at;
        let a_row_each = |all| Grid::row(all, 256).with_shared(4 * 8);
        let norm = RmsNorm {
            y: y.base,
            scales: scales.base,
            sum: sum.base,
            x: x.base,
            residual: residual.base,
            weight,
            width,
            eps: 1e-5,
            offset: 0.0,
        };
        ends.run(&norm, WIDTH, a_row_each);
        let mut found: Vec<_> = [&y, &sum].map(|end| ends.bytes(end, 2 * TAIL)).into();
        found.push(ends.bytes(&scales, 4 * ROWS));
        let backward = RmsNormBackward {
            dx: y.base,
            dy: residual.base,
            d_residual: sum.base,
            x: x.base,
            weight,
            scales: scales.base,
            width,
            offset: 0.0,
        };
        ends.run(&backward, WIDTH, a_row_each);
        found.push(ends.bytes(&y, 2 * TAIL));

        let codes = ends.put("codes", 1, &[1u8; TAIL]);
        let quantize = Quantize8BitBf16 { codes: codes.base, absmax: scales.base, weights: x.base, width };
        ends.run(&quantize, WIDTH, a_row_each);
        found.extend([ends.bytes(&codes, TAIL), ends.bytes(&scales, 4 * ROWS)]);
        // A grid's blocks go along a row first, and there may be no more than 65,535 rows of them.
        let losses = ends.put("losses", WIDTH, &[0f32; ROWS]);
        let loss = CrossEntropyBf16 {
            logits: x.base,
            losses: losses.base,
            targets: ends.put("targets", WIDTH, &[3i32, -1, 0, WIDTH as i32 - 1]).base,
            vocabulary: width,
            stride: WIDTH as i64,
            scale: 0.5,
            cap: 0.0,
            wants_gradient: 1,
        };
        ends.run(&loss, WIDTH, |all| Grid::row(all, 512).with_shared(4 * 16));
        found.extend([ends.bytes(&losses, 4 * ROWS), ends.bytes(&x, 2 * TAIL)]);
        found
    });
}

fn words_of_long_tables_are_found() {
    const WIDTH: usize = 1024;
    hold(|ends| {
        let (bench, width, words) = (&ends.bench, WIDTH as i32, (ends.count() / WIDTH) as i32);
        let (table, d_table) = (ends.random("table"), ends.put("d_table", 1, &[1f32; TAIL]));
        let y = bench.empty::<bf16>("y", 2 * WIDTH);
        let tokens = bench.put("tokens", &[words - 1, words - 4]).at;
        bench.run(&Embedding { y: y.at, table: table.base, tokens, width, scale: 2.0 }, Grid::row(2, 128));
        let launch = EmbeddingBackward {
            d_table: d_table.base,
            dy: y.at,
            words: tokens,
            starts: bench.put("starts", &[0, 1, 2]).at,
            order: bench.put("order", &[0, 1]).at,
            width,
            scale: 1.0,
        };
        bench.run(&launch, Grid { blocks: [2, blocks(WIDTH, 128), 1], threads: 128, shared_bytes: 0 });
        vec![bench.download(y.at, 2 * y.count), ends.bytes(&d_table, 4 * TAIL)]
    });
    // Rows of 8-bit codes: as many as a grid has at most, and wide.
    hold(|ends| {
        let rows = if ends.is_large { 65_535 } else { 1 };
        let (width, before) = (131_072usize, (rows - 1) * 131_072);
        let bench = &ends.bench;
        let [weights, codes, absmax] =
            [("weights", 2), ("codes", 1), ("absmax", 4)].map(|(name, bytes)| bench.sparse(name, rows * width * bytes));
        let last = |at: Address, bytes: usize| at.plus((before * bytes) as u64);
        let values: Vec<i8> = (0..width).map(|i| (i % 251) as i8).collect();
        bench.upload(last(codes, 1), &values);
        bench.upload(absmax.plus(4 * (rows as u64 - 1)), &[0.5f32]);
        let grid = Grid { blocks: [blocks(width, 256), rows as u32, 1], threads: 256, shared_bytes: 0 };
        let a_row = u64::from(grid.blocks[0]);
        bench.only_blocks(a_row * (rows as u64 - 1), a_row);
        bench.run(&Dequantize8Bit { weights, codes, absmax, width: width as i32 }, grid);
        vec![bench.download(last(weights, 2), 2 * width)]
    });
}

fn tokens_far_apart_are_found() {
    const TOKENS: usize = 64;
    const HEAD_DIM: usize = 64;
    hold(|ends| {
        let bench = &ends.bench;
        // Elements from a token to the next.
        let stride = if ends.is_large { 1 << 27 } else { HEAD_DIM };
        let spread = |name: &str| {
            let at = bench.sparse(name, 2 * ((TOKENS - 1) * stride + HEAD_DIM));
            for token in 0..TOKENS {
                let values: Vec<bf16> = bench.bf16s(HEAD_DIM).into_iter().map(bf16::from_f32).collect();
                bench.upload(at.plus((2 * token * stride) as u64), &values);
            }
            at
        };
        let gathered = |at: Address| -> Vec<u8> {
            (0..TOKENS)
                .flat_map(|token| bench.download::<u8>(at.plus((2 * token * stride) as u64), 2 * HEAD_DIM))
                .collect()
        };
        let [q, k, v, dy, y, dq] = ["q", "k", "v", "dy", "y", "dq"].map(spread);
        let stride64 = stride as i64;
        let angles = bench.put("angles", &bench.randoms(TOKENS * HEAD_DIM / 2)).at;
        let scales = bench.put("scales", &[1f32; TOKENS]).at;
        let rope = Rope { cos: angles, sin: angles, heads: 1, head_dim: HEAD_DIM as i32, half: HEAD_DIM as i32 / 2 };
        let grid = Grid::row(blocks(TOKENS, 8), 256).with_shared((8 * HEAD_DIM * 4) as u32);
        let (tokens, weight) = (TOKENS as i64, bench.put("weight", &bench.randoms(HEAD_DIM)).at);
        let turn = NormRope {
            y,
            scales,
            x: q,
            weight,
            rope,
            tokens,
            y_stride: stride64,
            x_stride: stride64,
            eps: 1e-6,
            offset: 0.0,
        };
        bench.run(&turn, grid);
        let mut found = vec![gathered(y)];
        let back = NormRopeBackward {
            dx: dq,
            dy,
            x: q,
            weight,
            scales,
            rope,
            tokens,
            dx_stride: stride64,
            dy_stride: stride64,
            x_stride: stride64,
            offset: 0.0,
        };
        bench.run(&back, grid);
        found.push(gathered(dq));

        let rows = [Row { length: TOKENS as i32, first_follower: 1, ..Row::default() }];
        let tiles = tiles(&rows);
        let (q_stride, kv_stride, y_stride) = (stride64, stride64, stride64);
        let (rows, tiles_at) = (bench.put("rows", &rows).at, bench.put("tiles", &tiles).at);
        let attention = Attention {
            rows,
            tiles: tiles_at,
            q_stride,
            kv_stride,
            y_stride,
            tokens,
            group: 1,
            window: 0,
            scale: 0.125,
            cap: 0.0,
        };
        let log_sums = bench.empty::<f32>("log_sums", TOKENS);
        let delta = bench.empty::<f32>("delta", TOKENS);
        let (log_sums, delta_at, head_dim) = (log_sums.at, delta.at, HEAD_DIM as i32);
        let forward = AttentionForward { y, log_sums, q, k, v, attention, head_dim };
        bench.run(&forward, forward.grid(tiles.len(), 1));
        found.push(gathered(y));
        let of_delta = AttentionDelta { delta: delta_at, dy, y, y_stride, tokens, heads: 1, head_dim };
        bench.run(&of_delta, of_delta.grid());
        let queries = AttentionQueries { dq, dy, q, k, v, log_sums, delta: delta_at, attention, head_dim };
        bench.run(&queries, queries.grid(tiles.len(), 1));
        found.push(gathered(dq));
        let [dk, dv] = ["dk", "dv"].map(spread);
        let keys = AttentionKeys { dk, dv, dy, q, k, v, log_sums, delta: delta_at, attention, head_dim, values: false };
        bench.run(&keys, keys.grid(tiles.len(), 1));
        found.extend([dk, dv].map(gathered));
        found
    });
}
