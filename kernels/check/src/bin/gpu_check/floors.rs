//! The kernels' times beside their floors: what a card would need if it did nothing but move the bytes that must move, or nothing but
//! multiply.

use std::time::Instant;

use tunesmith_kernels::{
    Address, Device, Error, Gemm, Gpu, Grid, Launch, Matrix, Number, Stream,
    attention::{Attention, AttentionForward, AttentionKeys, AttentionQueries, Row, tiles},
    kernels::{
        AdamW, AdamW8BitBf16, AdamWF32, AddParts, Code, CrossEntropyBf16, Dequantize4Bit, Dequantize8Bit, DropOut,
        Embedding, EmbeddingBackward, Gated, GatedBackward, Neftune, NormRope, NormRopeBackward, Quantize4BitBf16,
        Quantize8BitBf16, RmsNorm, RmsNormBackward, Rope, Scales, SquaresBf16, SquaresF32, StepState,
    },
    low_rank::{Factor, LowRank, LowRankDown, LowRankGradient, LowRankUp, Rank},
};

/// A card's ceilings: bytes a second, and dense bf16 FLOPs a second with f32 sums; from NVIDIA's data sheets.
const CARDS: [(&str, f64, f64); 9] = [
    ("H200", 4.8e12, 989e12),
    ("H100 PCIe", 2.0e12, 756e12),
    ("H100 NVL", 3.9e12, 835e12),
    ("H100", 3.35e12, 989e12),
    ("A100-SXM4-40GB", 1.555e12, 312e12),
    ("A100", 2.04e12, 312e12),
    ("L40S", 0.864e12, 362e12),
    ("RTX 4090", 1.01e12, 165e12),
    ("RTX 3090", 0.936e12, 71e12),
];

/// Elements of a row.
const WIDTH: usize = 4096;
/// Words of a vocabulary.
const WORDS: usize = 32_768;
/// Heads of a token, of queries and of keys and values; and their size.
const HEADS: [usize; 2] = [32, 8];
const HEAD_DIM: usize = 128;
/// What memory is filled with: a small number, in bf16 and in f32.
const SMALL: u8 = 0x3c;

/// Something to be timed.
struct Case {
    name: &'static str,
    /// That must move through the card's memory.
    bytes: f64,
    flops: f64,
    work: Work,
}

enum Work {
    Launch(Box<dyn Launch>, Grid),
    Product(Gemm),
}

/// Memory for cases.
struct Ground<'a> {
    gpu: &'a Gpu,
}

impl Ground<'_> {
    /// Small numbers.
    fn memory(&self, bytes: usize) -> Result<Address, Error> {
        let at = self.gpu.allocate(bytes, "measurements")?;
        // SAFETY: it has just been allocated with so many bytes.
        unsafe { self.gpu.fill(Stream::Main, at, SMALL, bytes) }?;
        Ok(at)
    }

    /// As much several times.
    fn tensors(&self, bytes: usize) -> Result<[Address; 5], Error> {
        let mut all = [Address::NONE; 5];
        for at in &mut all {
            *at = self.memory(bytes)?;
        }
        Ok(all)
    }

    fn put<T: Copy>(&self, values: &[T]) -> Result<Address, Error> {
        let at = self.memory(size_of_val(values))?;
        // SAFETY: the values outlive the synchronization.
        unsafe { self.gpu.upload(Stream::Main, at, values.as_ptr().cast(), size_of_val(values)) }?;
        self.gpu.synchronize()?;
        Ok(at)
    }
}

fn blocks(count: usize, per_block: usize) -> u32 {
    count.div_ceil(per_block) as u32
}

/// Kernels that go over tensors of so many elements.
fn elementwise(ground: &Ground<'_>, count: usize) -> Result<Vec<Case>, Error> {
    let (n, count64, rows, width) = (count as f64, count as i64, count / WIDTH, WIDTH as i32);
    let [x, y, z, m, v] = ground.tensors(4 * count)?;
    let [vector, scales, more_scales, ..] = ground.tensors(4 * count.div_ceil(64).max(WIDTH))?;
    let code = ground.put(&[Code::new(std::array::from_fn(|i| i as f32 / 7.5 - 1.0))])?;
    let maps: Vec<f32> = (0..512).map(|i| (i % 256) as f32 / 128.0 - 1.0).collect();
    let maps = ground.put(&maps)?;
    let lengths = ground.put(&vec![WIDTH as i32; rows])?;
    let state = ground.put(&[StepState { norm: 1.0, factor: 1.0, finite: 1 }])?;
    let step = AdamW { decay: 1.0, beta2: 0.999, new1: 0.1, new2: 0.001, correction2: 1.0, step_size: 1e-5, eps: 1e-8 };
    let a_row_each = Grid::row(rows as u32, 256).with_shared(4 * 8);
    let of = |per_thread: usize| Grid::row(blocks(count, 256 * per_thread), 256);
    let per_block = 1 << 16;
    let sums = Grid::row(blocks(count, per_block), 256).with_shared(8 * 8);
    let norm = RmsNorm {
        y,
        scales: vector,
        sum: Address::NONE,
        x,
        residual: Address::NONE,
        weight: m,
        width,
        eps: 1e-5,
        offset: 0.0,
    };
    let backward =
        RmsNormBackward { dx: y, dy: z, d_residual: Address::NONE, x, weight: m, scales: vector, width, offset: 0.0 };
    let plain = Scales { absmax: scales, nested: Address::NONE, map: Address::NONE, mean: Address::NONE };
    let case = |name, per_element: f64, launch: Box<dyn Launch>, grid| Case {
        name,
        bytes: per_element * n,
        flops: 0.0,
        work: Work::Launch(launch, grid),
    };
    Ok(vec![
        case("rms_norm", 4.0, Box::new(norm), a_row_each),
        case("rms_norm with a residual", 8.0, Box::new(RmsNorm { residual: z, sum: v, ..norm }), a_row_each),
        case("rms_norm_backward", 6.0, Box::new(backward), a_row_each),
        case(
            "rms_norm_backward with a residual",
            8.0,
            Box::new(RmsNormBackward { d_residual: v, ..backward }),
            a_row_each,
        ),
        case("gated", 6.0, Box::new(Gated { y, gate: x, up: z, count: count64, activation: 0 }), of(8)),
        case(
            "gated_backward",
            10.0,
            Box::new(GatedBackward { d_gate: y, d_up: v, dy: z, gate: x, up: m, count: count64, activation: 0 }),
            of(8),
        ),
        case(
            "quantize_4bit_bf16",
            2.5625,
            Box::new(Quantize4BitBf16 { codes: y, absmax: scales, weights: x, code, count: count64 }),
            of(8).with_shared(size_of::<Code>() as u32),
        ),
        case(
            "dequantize_4bit",
            2.5625,
            Box::new(Dequantize4Bit { weights: y, codes: x, scales: plain, code, count: count64 }),
            of(16).with_shared(4 * (16 + 256)),
        ),
        case(
            "quantize_8bit_bf16",
            3.0,
            Box::new(Quantize8BitBf16 { codes: y, absmax: vector, weights: x, width }),
            a_row_each,
        ),
        case(
            "dequantize_8bit",
            3.0,
            Box::new(Dequantize8Bit { weights: y, codes: x, absmax: vector, width }),
            Grid { blocks: [blocks(WIDTH, 256), rows as u32, 1], threads: 256, shared_bytes: 0 },
        ),
        case(
            "drop_out",
            4.0,
            Box::new(DropOut { y, x, count: count64, threshold: 1 << 30, scale: 1.25, key: 7 }),
            of(8),
        ),
        case("neftune", 4.0, Box::new(Neftune { x, lengths, width, alpha: 5.0, key: 7 }), Grid::row(rows as u32, 256)),
        case(
            "squares_f32",
            4.0,
            Box::new(SquaresF32 { parts: scales, gradient: x, count: count64, per_block: per_block as i32 }),
            sums,
        ),
        case(
            "squares_bf16",
            2.0,
            Box::new(SquaresBf16 { parts: scales, gradient: x, count: count64, per_block: per_block as i32 }),
            sums,
        ),
        case(
            "adamw_f32",
            30.0,
            Box::new(AdamWF32 { parameters: x, compute: y, gradient: z, m, v, state, step, count: count64 }),
            of(1),
        ),
        case(
            "adamw_8bit_bf16",
            16.0,
            Box::new(AdamW8BitBf16 {
                parameters: x,
                compute: y,
                gradient: z,
                m,
                m_absmax: scales,
                v,
                v_absmax: more_scales,
                maps,
                state,
                step,
                count: count64,
            }),
            of(1).with_shared(4 * (512 + 8)),
        ),
    ])
}

/// Kernels that know tokens, heads and words.
fn of_tokens(ground: &Ground<'_>, count: usize) -> Result<Vec<Case>, Error> {
    let (n, tokens) = (count as f64, count / WIDTH);
    let (x, y, z) =
        (ground.memory(2 * count.next_multiple_of(WORDS))?, ground.memory(2 * count)?, ground.memory(4 * count)?);
    let [angles, scales, losses, ..] = ground.tensors(4 * tokens * HEADS[0].max(HEAD_DIM))?;
    let each = |limit: usize| ground.put(&(0..=limit as i32).collect::<Vec<i32>>());
    let (order, targets) = (each(tokens)?, ground.put(&vec![1i32; count.div_ceil(WORDS)])?);
    let rope =
        Rope { cos: angles, sin: angles, heads: HEADS[0] as i32, head_dim: HEAD_DIM as i32, half: HEAD_DIM as i32 / 2 };
    let (stride, tokens64) = (WIDTH as i64, tokens as i64);
    let turn = NormRope {
        y,
        scales,
        x,
        weight: Address::NONE,
        rope,
        tokens: tokens64,
        y_stride: stride,
        x_stride: stride,
        eps: 1e-6,
        offset: 0.0,
    };
    let turn_back = NormRopeBackward {
        dx: y,
        dy: z,
        x,
        weight: angles,
        scales,
        rope,
        tokens: tokens64,
        dx_stride: stride,
        dy_stride: stride,
        x_stride: stride,
        offset: 0.0,
    };
    let heads = Grid::row(blocks(tokens * HEADS[0], 8), 256).with_shared((8 * HEAD_DIM * 4) as u32);
    let words = count.div_ceil(WORDS);
    let loss = CrossEntropyBf16 {
        logits: x,
        losses,
        targets,
        vocabulary: WORDS as i32,
        stride: WORDS as i64,
        scale: 1.0,
        cap: 0.0,
        wants_gradient: 1,
    };
    let rows = Embedding { y, table: x, tokens: order, width: WIDTH as i32, scale: 1.0 };
    let rows_backward =
        EmbeddingBackward { d_table: z, dy: x, words: order, starts: order, order, width: WIDTH as i32, scale: 1.0 };
    let by_word = Grid { blocks: [tokens as u32, blocks(WIDTH, 128), 1], threads: 128, shared_bytes: 0 };
    let case = |name, bytes: f64, launch: Box<dyn Launch>, grid| Case {
        name,
        bytes,
        flops: 0.0,
        work: Work::Launch(launch, grid),
    };
    Ok(vec![
        case("norm_rope", 4.0 * n, Box::new(turn), heads),
        case("norm_rope_backward", 6.0 * n, Box::new(turn_back), heads),
        case(
            "cross_entropy_bf16",
            4.0 * (words * WORDS) as f64,
            Box::new(loss),
            Grid::row(words as u32, 512).with_shared(4 * 16),
        ),
        case("embedding", 4.0 * n, Box::new(rows), Grid::row(tokens as u32, 128)),
        case("embedding_backward", 10.0 * n, Box::new(rows_backward), by_word),
    ])
}

/// Attention of one row of so many tokens.
fn attention(ground: &Ground<'_>, tokens: usize) -> Result<Vec<Case>, Error> {
    let [heads, kv_heads] = HEADS;
    let bytes = |heads: usize| 2 * tokens * heads * HEAD_DIM;
    let [q, dy, y, ..] = ground.tensors(bytes(heads))?;
    let [k, v, dk, dv, _] = ground.tensors(bytes(kv_heads))?;
    let [log_sums, delta, ..] = ground.tensors(4 * tokens * heads)?;
    let rows = [Row { length: tokens as i32, first_follower: 1, ..Row::default() }];
    let tiles = tiles(&rows);
    let (stride, kv_stride) = ((heads * HEAD_DIM) as i64, (kv_heads * HEAD_DIM) as i64);
    let attention = Attention {
        rows: ground.put(&rows)?,
        tiles: ground.put(&tiles)?,
        q_stride: stride,
        kv_stride,
        y_stride: stride,
        tokens: tokens as i64,
        group: (heads / kv_heads) as i32,
        window: 0,
        scale: 0.1,
        cap: 0.0,
    };
    let head_dim = HEAD_DIM as i32;
    let forward = AttentionForward { y, log_sums, q, k, v, attention, head_dim };
    let queries = AttentionQueries { dq: y, dy, q, k, v, log_sums, delta, attention, head_dim };
    let keys = AttentionKeys { dk, dv, dy, q, k, v, log_sums, delta, attention, head_dim, values: false };
    // Pairs of a query and a key that it sees, of all heads; two FLOPs an element of a product.
    let pairs = (tokens * (tokens + 1) / 2 * heads) as f64;
    let case = |name, read_and_written: usize, products: f64, launch: Box<dyn Launch>, grid| Case {
        name,
        bytes: read_and_written as f64,
        flops: 2.0 * products * HEAD_DIM as f64 * pairs,
        work: Work::Launch(launch, grid),
    };
    let (of_q, of_kv) = (bytes(heads), 2 * bytes(kv_heads));
    Ok(vec![
        case("attention_128", 2 * of_q + of_kv, 2.0, Box::new(forward), forward.grid(tiles.len(), heads)),
        case("attention_queries_128", 3 * of_q + of_kv, 3.0, Box::new(queries), queries.grid(tiles.len(), heads)),
        case("attention_keys_128", 2 * of_q + 2 * of_kv, 4.0, Box::new(keys), keys.grid(tiles.len(), kv_heads)),
    ])
}

/// LoRA's small products, at rank 16.
fn low_rank(ground: &Ground<'_>, count: usize) -> Result<Vec<Case>, Error> {
    let (tokens, rank, side) = (count / WIDTH, Rank::R16, Factor::A);
    let (matrix, factor) = (ground.memory(2 * count)?, ground.memory(2 * WIDTH * rank.get())?);
    let (h, d_factor) = (ground.memory(2 * tokens * rank.get())?, ground.memory(4 * WIDTH * rank.get())?);
    let sizes = LowRank {
        stride: WIDTH as i64,
        h_stride: rank.get() as i64,
        tokens: tokens as i64,
        width: WIDTH as i32,
        scale: 1.0,
    };
    let multiprocessors = ground.gpu.multiprocessors()?;
    let split = sizes.split_down(multiprocessors);
    let mut down = LowRankDown { h, parts: Address::NONE, matrix, factor, sizes, split, rank, side };
    down.parts = ground.memory(down.parts_bytes() as usize)?;
    let split = sizes.split_up(multiprocessors);
    let up = LowRankUp { matrix, h, factor, sizes, split, rank, side: Factor::B };
    let split = sizes.split_gradient(multiprocessors);
    let mut gradient = LowRankGradient { d_factor, parts: Address::NONE, matrix, h, sizes, split, rank, side };
    gradient.parts = ground.memory(gradient.parts_bytes() as usize)?;
    let case = |name, per_element: f64, launch: Box<dyn Launch>, grid| Case {
        name,
        bytes: per_element * count as f64,
        flops: (2 * count * rank.get()) as f64,
        work: Work::Launch(launch, grid),
    };
    // Without the sums of parts, which are small.
    Ok(vec![
        case("low_rank_down_a_16", 2.0, Box::new(down), down.grid()),
        case("low_rank_up_b_16", 4.0, Box::new(up), up.grid()),
        case("low_rank_gradient_a_16", 2.0, Box::new(gradient), gradient.grid()),
    ])
}

/// Products of activations by a weight.
fn products(ground: &Ground<'_>, count: usize) -> Result<Vec<Case>, Error> {
    let rows = count / WIDTH;
    let (a, b, d) = (ground.memory(2 * count)?, ground.memory(2 * WIDTH * WIDTH)?, ground.memory(2 * count)?);
    let matrix = |at, rows| Matrix::new(at, rows, WIDTH, Number::Bf16);
    let gemm = Gemm { a: matrix(a, rows), b: matrix(b, WIDTH).transpose(), c: None, d: matrix(d, rows), alpha: 1.0 };
    let flops = 2.0 * (count * WIDTH) as f64;
    let bytes = (4 * count + 2 * WIDTH * WIDTH) as f64;
    let by_weight = Case { name: "product by a weight", bytes, flops, work: Work::Product(gemm) };
    let by_transpose = Gemm { b: matrix(b, WIDTH), ..gemm };
    Ok(vec![by_weight, Case { name: "product by its transpose", bytes, flops, work: Work::Product(by_transpose) }])
}

/// The median of some times of a case, in seconds, after three that do not count.
fn time(gpu: &Gpu, work: &Work, repeats: usize) -> Result<f64, Error> {
    let once = || {
        gpu.time(|| match work {
            // SAFETY: the ground's memory is as large as the cases say.
            Work::Launch(launch, grid) => unsafe { gpu.launch(Stream::Main, launch.as_ref(), *grid) },
            // SAFETY: as above.
            Work::Product(gemm) => unsafe { gpu.multiply(gemm) },
        })
    };
    for _ in 0..3 {
        once()?;
    }
    let mut times = (0..repeats.max(1)).map(|_| once()).collect::<Result<Vec<f64>, Error>>()?;
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}

/// What a launch costs the host, in seconds.
fn launch_cost(ground: &Ground<'_>) -> Result<f64, Error> {
    const LAUNCHES: u32 = 1000;
    let (to, parts) = (ground.memory(32)?, ground.memory(32)?);
    let launch = AddParts { to, parts, count: 1, width: 8 };
    let start = Instant::now();
    for _ in 0..LAUNCHES {
        // SAFETY: both hold eight floats.
        unsafe { ground.gpu.launch(Stream::Main, &launch, Grid::row(1, 256)) }?;
    }
    ground.gpu.synchronize()?;
    Ok(start.elapsed().as_secs_f64() / f64::from(LAUNCHES))
}

/// Prints a table, for tensors of so many elements.
pub(crate) fn print(gpu: &Gpu, elements: usize, repeats: usize) -> Result<(), Error> {
    // Whole rows, and at least one.
    let elements = elements.next_multiple_of(WIDTH);
    let known = CARDS.iter().find(|(name, ..)| gpu.name().contains(name));
    let (bandwidth, flops) = known.map_or((gpu.bandwidth()?, None), |(_, bytes, flops)| (*bytes, Some(*flops)));
    let ceiling = flops.map_or_else(|| "unknown".into(), |flops| format!("{:.0} TFLOP/s", flops / 1e12));
    println!("{}: {:.2} TB/s, {ceiling}; tensors of {elements} elements", gpu.name(), bandwidth / 1e12);
    let ground = Ground { gpu };
    let mut cases = elementwise(&ground, elements)?;
    cases.extend(of_tokens(&ground, elements)?);
    cases.extend(attention(&ground, (elements / (4 * WIDTH)).clamp(1, WIDTH))?);
    cases.extend(low_rank(&ground, elements)?);
    match gpu.library_version() {
        Ok(_) => cases.extend(products(&ground, elements)?),
        Err(error) => println!("Products are not run: {error}"),
    }
    println!("| kernel | MB | GFLOP | floor, µs | median, µs | floor / median |\n|---|---|---|---|---|---|");
    for Case { name, bytes, flops: multiplied, work } in &cases {
        let floor = flops.map_or(0.0, |flops| multiplied / flops).max(bytes / bandwidth);
        let median = time(gpu, work, repeats)?;
        let (mb, gflop) = (bytes / 1e6, multiplied / 1e9);
        println!(
            "| {name} | {mb:.1} | {gflop:.1} | {:.1} | {:.1} | {:.0} % |",
            floor * 1e6,
            median * 1e6,
            100.0 * floor / median
        );
    }
    println!("A launch costs the host {:.1} µs.", launch_cost(&ground)? * 1e6);
    for chosen in gpu.chosen() {
        println!("cuBLASLt {}: {} by {:x?}", chosen.version, chosen.product, chosen.algorithm);
    }
    Ok(())
}
