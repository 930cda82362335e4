//! LoRA's small products against f64: each rank, both factors, odd numbers of tokens and columns, and matrices that lie within wider ones, where
//! nobody has written what is beside them, and nobody may read or write it.

use half::bf16;
use tunesmith_kernels::{
    Address,
    low_rank::{Factor, LowRank, LowRankDown, LowRankGradient, LowRankUp, Rank, Split},
};

use crate::bench::{BF16, Bench, SEEDS, assert_close};

listed![
    products_of_each_rank_are_those_of_f64,
    parts_are_added_in_their_order,
    one_part_walks_over_all,
    nothing_beyond_the_end_is_multiplied,
    gradients_of_micro_batches_are_summed_and_scaled,
    a_scale_of_zero_adds_nothing,
    tokens_beyond_two_to_the_31_elements_are_found,
    an_adapter_may_have_some_columns_of_a_wider_h,
];

/// Columns on either side of a matrix that belong to others.
const BESIDE: usize = 8;
const SIDES: [Factor; 2] = [Factor::A, Factor::B];

/// A matrix of bf16 within a wider one. Of its memory, what is touched exists.
struct Within<'a> {
    bench: &'a Bench,
    at: Address,
    rows: usize,
    width: usize,
    /// Columns of the wider one.
    stride: usize,
}

impl<'a> Within<'a> {
    fn empty(bench: &'a Bench, name: &str, [rows, width, stride]: [usize; 3]) -> Self {
        let at = match bench.emulator() {
            Some(_) => bench.sparse(name, 2 * rows * stride),
            None => bench.empty::<bf16>(name, rows * stride).at,
        };
        Self { bench, at, rows, width, stride }
    }

    fn put(bench: &'a Bench, name: &str, values: &[f32], [rows, width, stride]: [usize; 3]) -> Self {
        let matrix = Self::empty(bench, name, [rows, width, stride]);
        let rounded: Vec<bf16> = values.iter().map(|x| bf16::from_f32(*x)).collect();
        for (row, values) in rounded.chunks(width).enumerate() {
            bench.upload(matrix.place(row, BESIDE), values);
        }
        matrix
    }

    /// Of an element of the wider matrix.
    fn place(&self, row: usize, column: usize) -> Address {
        self.at.plus(2 * (row * self.stride + column) as u64)
    }

    /// Its own first element.
    fn first(&self) -> Address {
        self.place(0, BESIDE)
    }

    /// Whether nobody has written these columns, as far as the device can tell.
    fn is_untouched(&self, row: usize, column: usize, count: usize) -> bool {
        let at = self.place(row, column);
        match self.bench.emulator() {
            Some(emulator) => emulator.unwritten(at, 2 * count).unwrap() == 2 * count,
            None if !self.bench.fills() => true,
            None => self.bench.download::<u8>(at, 2 * count).iter().all(|byte| *byte == 0xff),
        }
    }

    /// The values, all of which must have been written, and nothing beside them.
    fn floats(&self) -> Vec<f32> {
        let row = |row: usize| {
            if let Some(emulator) = self.bench.emulator() {
                let unwritten = emulator.unwritten(self.place(row, BESIDE), 2 * self.width).unwrap();
                assert_eq!(unwritten, 0, "bytes of row {row} that nobody has written");
            }
            for column in [0, BESIDE + self.width] {
                assert!(self.is_untouched(row, column, BESIDE), "what is beside row {row} is written");
            }
            self.bench.download::<bf16>(self.place(row, BESIDE), self.width)
        };
        (0..self.rows).flat_map(row).map(bf16::to_f32).collect()
    }
}

/// Of a problem.
#[derive(Clone, Copy, Debug)]
struct Case {
    tokens: usize,
    width: usize,
    rank: Rank,
    side: Factor,
    scale: f32,
    /// Columns between two rows of a matrix, or of h.
    gap: usize,
    /// Of the card that the work is split for.
    multiprocessors: u32,
}

impl Case {
    fn of(tokens: usize, width: usize, rank: Rank, side: Factor) -> Self {
        Self { tokens, width, rank, side, scale: 0.37, gap: 2 * BESIDE, multiprocessors: 132 }
    }

    fn sizes(&self) -> LowRank {
        let [stride, h_stride] = [self.width, self.rank.get()].map(|width| (width + self.gap) as i64);
        LowRank { stride, h_stride, tokens: self.tokens as i64, width: self.width as i32, scale: self.scale }
    }

    fn matrix_shape(&self) -> [usize; 3] {
        [self.tokens, self.width, self.width + self.gap]
    }

    fn h_shape(&self) -> [usize; 3] {
        [self.tokens, self.rank.get(), self.rank.get() + self.gap]
    }

    /// The place of an element in the factor.
    fn place(&self, rank: usize, column: usize) -> usize {
        match self.side {
            Factor::A => rank * self.width + column,
            Factor::B => column * self.rank.get() + rank,
        }
    }

    fn factor_len(&self) -> usize {
        self.rank.get() * self.width
    }

    /// Calls with each token, rank and column.
    fn each(&self, mut product: impl FnMut(usize, usize, usize)) {
        for token in 0..self.tokens {
            for rank in 0..self.rank.get() {
                (0..self.width).for_each(|column| product(token, rank, column));
            }
        }
    }

    /// h, from whatever was there.
    fn down(&self, bench: &Bench, matrix: &[f32], factor: &[f32]) -> Vec<f32> {
        let (on_device, rank) = (Within::put(bench, "matrix", matrix, self.matrix_shape()), self.rank.get());
        let h = Within::empty(bench, "h", self.h_shape());
        let sizes = self.sizes();
        let mut down = LowRankDown {
            h: h.first(),
            parts: Address::NONE,
            matrix: on_device.first(),
            factor: bench.put_bf16("factor", factor).at,
            sizes,
            split: sizes.split_down(self.multiprocessors),
            rank: self.rank,
            side: self.side,
        };
        let parts = bench.empty::<u8>("parts", down.parts_bytes() as usize);
        down.parts = parts.at;
        bench.run(&down, down.grid());
        if let Some((sum, grid)) = down.sum() {
            bench.run(&sum, grid);
        }
        let mut expected = vec![0.0; self.tokens * rank];
        self.each(|token, r, column| {
            let product = f64::from(matrix[token * self.width + column]) * f64::from(factor[self.place(r, column)]);
            expected[token * rank + r] += f64::from(self.scale) * product;
        });
        let found = h.floats();
        assert_close(&format!("h of {self:?}"), &found, &expected, BF16, 2e-5);
        found
    }

    /// The matrix, with the product added.
    fn up(&self, bench: &Bench, matrix: &[f32], h: &[f32], factor: &[f32]) -> Vec<f32> {
        let (on_device, rank) = (Within::put(bench, "matrix", matrix, self.matrix_shape()), self.rank.get());
        let h_at = Within::put(bench, "h", h, self.h_shape());
        let sizes = self.sizes();
        let up = LowRankUp {
            matrix: on_device.first(),
            h: h_at.first(),
            factor: bench.put_bf16("factor", factor).at,
            sizes,
            split: sizes.split_up(self.multiprocessors),
            rank: self.rank,
            side: self.side,
        };
        bench.run(&up, up.grid());
        let mut expected: Vec<f64> = matrix.iter().map(|x| f64::from(*x)).collect();
        self.each(|token, r, column| {
            let product = f64::from(h[token * rank + r]) * f64::from(factor[self.place(r, column)]);
            expected[token * self.width + column] += f64::from(self.scale) * product;
        });
        let found = on_device.floats();
        assert_close(&format!("matrix of {self:?}"), &found, &expected, BF16, 2e-5);
        found
    }

    /// The gradient, with the product added.
    fn gradient(&self, bench: &Bench, before: &[f32], matrix: &[f32], h: &[f32]) -> Vec<f32> {
        let (on_device, rank) = (Within::put(bench, "matrix", matrix, self.matrix_shape()), self.rank.get());
        let (h_at, d_factor) = (Within::put(bench, "h", h, self.h_shape()), bench.put("d_factor", before));
        let sizes = self.sizes();
        let mut gradient = LowRankGradient {
            d_factor: d_factor.at,
            parts: Address::NONE,
            matrix: on_device.first(),
            h: h_at.first(),
            sizes,
            split: sizes.split_gradient(self.multiprocessors),
            rank: self.rank,
            side: self.side,
        };
        let parts = bench.empty::<u8>("parts", gradient.parts_bytes() as usize);
        gradient.parts = parts.at;
        bench.run(&gradient, gradient.grid());
        if let Some((sum, grid)) = gradient.sum() {
            bench.run(&sum, grid);
        }
        let mut expected: Vec<f64> = before.iter().map(|x| f64::from(*x)).collect();
        self.each(|token, r, column| {
            let product = f64::from(matrix[token * self.width + column]) * f64::from(h[token * rank + r]);
            expected[self.place(r, column)] += f64::from(self.scale) * product;
        });
        let found = d_factor.get();
        assert_close(&format!("d_factor of {self:?}"), &found, &expected, 1e-5, 2e-5);
        found
    }

    /// All three products, whose bits must not depend on the order of blocks, warps and lanes.
    fn check(&self, seeds: &[u64]) {
        let all = |seed: &u64| {
            let bench = Bench::new(*seed);
            let matrix = bench.bf16s(self.tokens * self.width);
            let (h, factor) = (bench.bf16s(self.tokens * self.rank.get()), bench.bf16s(self.factor_len()));
            let before = bench.randoms(self.factor_len());
            let results = (
                self.down(&bench, &matrix, &factor),
                self.up(&bench, &matrix, &h, &factor),
                self.gradient(&bench, &before, &matrix, &h),
            );
            if let Some(emulator) = bench.emulator() {
                let loads = emulator.take_statistics().unwrap();
                assert!(loads.matrix_loads > 0);
                assert_eq!(loads.matrix_load_phases, loads.matrix_loads, "rows of one matrix lie in one bank");
            }
            results
        };
        let results: Vec<_> = seeds.iter().map(all).collect();
        assert!(results.windows(2).all(|pair| pair[0] == pair[1]), "another order, other bits: {self:?}");
    }
}

fn products_of_each_rank_are_those_of_f64() {
    for (rank, side) in Rank::ALL.into_iter().flat_map(|rank| SIDES.map(|side| (rank, side))) {
        for (tokens, width) in [(1, 72), (7, 264), (64, 8), (130, 136)] {
            Case::of(tokens, width, rank, side).check(&SEEDS[..2]);
        }
    }
}

fn parts_are_added_in_their_order() {
    for (rank, side) in [Rank::R16, Rank::R48].into_iter().flat_map(|rank| SIDES.map(|side| (rank, side))) {
        // Five parts of the columns, of which the last has 8; then four of the tokens.
        for (tokens, width) in [(3, 1032), (773, 40)] {
            let case = Case::of(tokens, width, rank, side);
            let sizes = case.sizes();
            assert!(sizes.split_down(132).parts > 1 || sizes.split_gradient(132).parts > 1);
            case.check(&SEEDS);
        }
    }
}

fn one_part_walks_over_all() {
    for side in SIDES {
        let case = Case { multiprocessors: 1, ..Case::of(330, 392, Rank::R32, side) };
        let sizes = case.sizes();
        assert_eq!([sizes.split_down(1), sizes.split_up(1), sizes.split_gradient(1)].map(|split| split.parts), [1; 3]);
        case.check(&SEEDS);
    }
}

fn nothing_beyond_the_end_is_multiplied() {
    // Whole tiles in each direction: all the products of m16n8k16 that there are, and no more.
    const SIDE: usize = 128;
    for side in SIDES {
        let case = Case { multiprocessors: 1, ..Case::of(SIDE, SIDE, Rank::R16, side) };
        let bench = Bench::new(0);
        let Some(emulator) = bench.emulator() else { return };
        let (matrix, h) = (bench.bf16s(SIDE * SIDE), bench.bf16s(SIDE * 16));
        let (factor, before) = (bench.bf16s(16 * SIDE), bench.randoms(16 * SIDE));
        let multiplied = || emulator.take_statistics().unwrap().multiplications as usize;
        multiplied();
        case.down(&bench, &matrix, &factor);
        assert_eq!(multiplied(), SIDE * SIDE * 16 / (16 * 8 * 16), "down");
        case.up(&bench, &matrix, &h, &factor);
        assert_eq!(multiplied(), SIDE * SIDE * 16 / (16 * 8 * 16), "up");
        case.gradient(&bench, &before, &matrix, &h);
        assert_eq!(multiplied(), SIDE * SIDE * 16 / (16 * 8 * 16), "gradient");
    }
}

fn gradients_of_micro_batches_are_summed_and_scaled() {
    for (tokens, scale) in [(20, -2.5), (300, 0.125)] {
        let case = Case { scale, ..Case::of(tokens, 24, Rank::R16, Factor::B) };
        let bench = Bench::new(1);
        let [first, second] = [0; 2].map(|_| (bench.bf16s(tokens * 24), bench.bf16s(tokens * 16)));
        let sum = case.gradient(&bench, &vec![0.0; 24 * 16], &first.0, &first.1);
        // It is compared with f64, from this sum on.
        let both = case.gradient(&bench, &sum, &second.0, &second.1);
        assert_ne!(sum, both);
    }
}

fn a_scale_of_zero_adds_nothing() {
    for side in SIDES {
        let case = Case { scale: 0.0, ..Case::of(40, 72, Rank::R16, side) };
        let bench = Bench::new(4);
        let (matrix, h) = (bench.bf16s(40 * 72), bench.bf16s(40 * 16));
        let (factor, before) = (bench.bf16s(16 * 72), bench.randoms(16 * 72));
        assert_eq!(case.up(&bench, &matrix, &h, &factor), matrix);
        assert_eq!(case.gradient(&bench, &before, &matrix, &h), before);
        assert!(case.down(&bench, &matrix, &factor).iter().all(|x| *x == 0.0));
    }
}

fn tokens_beyond_two_to_the_31_elements_are_found() {
    if Bench::new(1).emulator().is_none() {
        return; // no device has so much memory
    }
    for side in SIDES {
        // The second tile of tokens is 2³² elements behind the first, and the end of a tile more than 2³¹ behind its beginning.
        Case { gap: 1 << 25, ..Case::of(130, 16, Rank::R16, side) }.check(&[1]);
    }
}

/// Three adapters on one input have their factors A one below the other, and h side by side: x is read once.
fn an_adapter_may_have_some_columns_of_a_wider_h() {
    let (tokens, width) = (10, 16);
    let bench = Bench::new(1);
    let (y, h) = (bench.bf16s(tokens * width), bench.bf16s(tokens * 48));
    let factor = bench.bf16s(width * 16);
    let (on_device, h_at) = (bench.put_bf16("y", &y), bench.put_bf16("h", &h));
    let sizes = LowRank { stride: width as i64, h_stride: 48, tokens: tokens as i64, width: width as i32, scale: 2.0 };
    let up = LowRankUp {
        matrix: on_device.at,
        h: h_at.at.plus(2 * 16),
        factor: bench.put_bf16("factor", &factor).at,
        sizes,
        split: Split { parts: 1, length: 64 },
        rank: Rank::R16,
        side: Factor::B,
    };
    bench.run(&up, up.grid());
    let element = |(i, y): (usize, &f32)| {
        let (row, column) = (i / width, i % width);
        let product = |r: usize| f64::from(h[row * 48 + 16 + r]) * f64::from(factor[column * 16 + r]);
        f64::from(*y) + 2.0 * (0..16).map(product).sum::<f64>()
    };
    let expected: Vec<f64> = y.iter().enumerate().map(element).collect();
    assert_close("y", &on_device.floats(), &expected, BF16, 1e-5);
}
