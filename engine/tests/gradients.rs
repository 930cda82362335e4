//! Every operation of the CPU backend against candle: its output, and its gradients against candle's autograd.
//!
//! candle's fused rms_norm, rope and softmax have no backward pass, so all is composed of plain operations here.

mod numbers;

use candle_core::{D, DType, Device, Tensor as Candle, Var};
use tunesmith_engine::Activation;
use tunesmith_engine::backend::{
    AdaptedForward, Attention, AttentionForward, Backend, CrossEntropyGrads, Dropout, Heads, InputGrad, LoraGrads,
    LoraRef, RmsNorm, Row, WeightRef,
};
use tunesmith_engine::config::{Rope, RopeScaling};
use tunesmith_engine::cpu::{Cpu, Tensor};
use tunesmith_engine::host_tensor::HostTensor;

use numbers::numbers;

/// The same matrix for the engine and, as a variable, for candle.
fn pair(cpu: &Cpu, rows: usize, cols: usize, seed: u64) -> (Tensor, Var) {
    let values = numbers(rows * cols, seed);
    let var = Var::from_slice(&values, (rows, cols), &Device::Cpu).unwrap();
    (cpu.upload(&values, rows, cols), var)
}

fn values(x: &Candle) -> Vec<f32> {
    x.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// ‖ours − theirs‖ ≤ 10⁻⁵ · ‖theirs‖.
fn same(what: &str, ours: &[f32], theirs: &[f32]) {
    assert_eq!(ours.len(), theirs.len(), "{what}");
    let norm = |x: &[f32]| x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
    let difference: Vec<f32> = ours.iter().zip(theirs).map(|(a, b)| a - b).collect();
    assert!(norm(theirs) > 0.0, "{what} is zero: nothing would be compared");
    let relative = norm(&difference) / norm(theirs);
    assert!(relative < 1e-5, "{what} differs by {relative:.1e}");
}

/// The gradients of Σ y·dy by each variable.
fn autograd<const N: usize>(y: &Candle, dy: &Tensor, variables: [&Var; N]) -> [Vec<f32>; N] {
    let dy = Candle::from_slice(dy.values(), y.shape(), &Device::Cpu).unwrap();
    let grads = (y * dy).unwrap().sum_all().unwrap().backward().unwrap();
    variables.map(|v| values(grads.get(v).expect("candle has a backward for all of these")))
}

fn rms_norm(x: &Candle, w: &Candle, norm: RmsNorm) -> Candle {
    let mean = x.sqr().unwrap().mean_keepdim(D::Minus1).unwrap();
    let root = (mean + f64::from(norm.eps)).unwrap().sqrt().unwrap();
    x.broadcast_div(&root).unwrap().broadcast_mul(&(w + f64::from(norm.offset)).unwrap()).unwrap()
}

#[test]
fn rms_norm_and_its_gradients() {
    let cpu = Cpu::default();
    for (rows, n, offset) in [(5, 7, 0.0), (33, 64, 1.0), (1, 576, 0.0), (40, 130, 1.0)] {
        let norm = RmsNorm { eps: 1e-3, offset };
        let ((x, cx), (w, cw)) = (pair(&cpu, rows, n, 1), pair(&cpu, 1, n, 2));
        let (dy, _) = pair(&cpu, rows, n, 3);
        let theirs = rms_norm(&cx, &cw, norm);
        same("y", cpu.rms_norm(&x, &w, norm).values(), &values(&theirs));
        let ((mut dx, start), (mut dw, start_w)) = (pair(&cpu, rows, n, 4), pair(&cpu, 1, n, 5));
        cpu.rms_norm_backward(&x, &w, norm, &dy, &mut dx, Some(&mut dw));
        let [ex, ew] = autograd(&theirs, &dy, [&cx, &cw]);
        let plus = |a: &[f32], b: &Candle| a.iter().zip(values(b)).map(|(a, b)| a + b).collect::<Vec<f32>>();
        same("dx", dx.values(), &plus(&ex, &start));
        same("dw", dw.values(), &plus(&ew, &start_w));
    }
}

#[test]
fn a_norm_of_heads_is_a_norm_of_shorter_rows() {
    let cpu = Cpu::default();
    let norm = RmsNorm { eps: 1e-5, offset: 0.0 };
    let ((x, _), (w, _)) = (pair(&cpu, 6, 32, 1), pair(&cpu, 1, 8, 2));
    let short = cpu.upload(x.values(), 24, 8);
    assert_eq!(cpu.rms_norm(&x, &w, norm).values(), cpu.rms_norm(&short, &w, norm).values());
}

#[test]
fn linear_and_its_gradients() {
    let cpu = Cpu::default();
    let (tokens, input, output) = (19, 30, 70);
    let ((x, cx), (w, cw)) = (pair(&cpu, tokens, input, 1), pair(&cpu, output, input, 2));
    let frozen = cpu.weight(HostTensor::new(w.values().to_vec(), vec![output, input]));
    let (dy, _) = pair(&cpu, tokens, output, 3);
    let theirs = cx.matmul(&cw.t().unwrap()).unwrap();
    let [ex, ew] = autograd(&theirs, &dy, [&cx, &cw]);
    let twice = |x: &[f32]| x.iter().map(|x| 2.0 * x).collect::<Vec<_>>();
    for weight in [WeightRef::Frozen(&frozen), WeightRef::Trained(&w)] {
        let mut y = cpu.linear(&x, weight);
        same("y", y.values(), &values(&theirs));
        cpu.linear_add(&x, weight, &mut y);
        same("y + y", y.values(), &values(&(&theirs * 2.0).unwrap()));

        let mut dx = cpu.linear_backward(&dy, weight);
        same("dx", dx.values(), &ex);
        cpu.linear_backward_add(&dy, weight, &mut dx);
        same("dx + dx", dx.values(), &twice(&ex));
    }
    let mut dw = cpu.zeros(output, input);
    cpu.linear_weight_backward(&x, &dy, &mut dw);
    same("dW", dw.values(), &ew);
    cpu.linear_weight_backward(&x, &dy, &mut dw);
    same("dW + dW", dw.values(), &twice(&ew));
}

#[test]
fn one_row_goes_through_the_linear_layer_as_many_do() {
    let cpu = Cpu::default();
    let ((x, cx), (w, cw)) = (pair(&cpu, 1, 45, 1), pair(&cpu, 130, 45, 2));
    let theirs = values(&cx.matmul(&cw.t().unwrap()).unwrap());
    same("y", cpu.linear(&x, WeightRef::Trained(&w)).values(), &theirs);
}

#[test]
fn a_bf16_weight_computes_as_its_rounded_values_do() {
    let cpu = Cpu::default();
    // Odd sizes, so that panels and groups of columns have ragged ends.
    for (tokens, input, output) in [(1, 45, 130), (7, 33, 21), (50, 700, 77)] {
        let ((x, _), (w, _)) = (pair(&cpu, tokens, input, 1), pair(&cpu, output, input, 2));
        let (dy, _) = pair(&cpu, tokens, output, 3);
        let weight = cpu.bf16_weight(&w);
        let rounded = cpu.weight_values(&weight);
        assert!(rounded.values().iter().zip(w.values()).all(|(r, w)| (r - w).abs() <= w.abs() / 256.0));
        assert_ne!(rounded.values(), w.values());
        let (stored, wide) = (WeightRef::Frozen(&weight), WeightRef::Trained(&rounded));
        assert_eq!(cpu.linear(&x, stored).values(), cpu.linear(&x, wide).values());
        assert_eq!(cpu.linear_backward(&dy, stored).values(), cpu.linear_backward(&dy, wide).values());
        let tokens = [3, 0, output as u32 - 1];
        assert_eq!(cpu.embedding(stored, &tokens, 2.0).values(), cpu.embedding(wide, &tokens, 2.0).values());
    }
}

#[test]
fn biases_columns_and_their_gradients() {
    let cpu = Cpu::default();
    let ((x, cx), (bias, cb)) = (pair(&cpu, 9, 70, 1), pair(&cpu, 1, 70, 2));
    let (dy, _) = pair(&cpu, 9, 70, 3);
    let theirs = cx.broadcast_add(&cb).unwrap();
    let mut y = cpu.copy(&x);
    cpu.add_bias(&mut y, &bias);
    same("y", y.values(), &values(&theirs));
    let [expected] = autograd(&theirs, &dy, [&cb]);
    let mut d_bias = cpu.zeros(1, 70);
    cpu.bias_backward(&dy, &mut d_bias);
    same("d bias", d_bias.values(), &expected);
    let parts = [(0, 20), (20, 1), (21, 49)].map(|(from, count)| cpu.columns(&x, from, count));
    assert_eq!(parts[1].values(), values(&cx.narrow(1, 20, 1).unwrap()));
    assert_eq!(cpu.join_columns(&parts.each_ref()).values(), x.values());
}

#[test]
fn dora_and_its_gradients() {
    let cpu = Cpu::default();
    let (tokens, input, output, rank, scale) = (13, 40, 70, 4, 0.5);
    let ((_, cx), (w, cw)) = (pair(&cpu, tokens, input, 1), pair(&cpu, output, input, 2));
    let ((a, ca), (b, cb)) = (pair(&cpu, rank, input, 3), pair(&cpu, output, rank, 4));
    let ((magnitude, cm), (dy, _)) = (pair(&cpu, 1, output, 5), pair(&cpu, tokens, output, 6));
    let lora = LoraRef { a: &a, b: &b, scale: scale as f32, dropout: None };
    let factors = cpu.dora_factors(WeightRef::Trained(&w), &lora, &magnitude);
    let adapted = (cw.as_tensor() + (cb.matmul(&ca).unwrap() * scale).unwrap()).unwrap();
    let norms = adapted.sqr().unwrap().sum(1).unwrap().sqrt().unwrap().detach();
    let expected = cm.broadcast_div(&norms.unsqueeze(0).unwrap()).unwrap();
    same("factors", factors.values(), &values(&expected));

    let y = cpu.upload(&values(&cx.matmul(&adapted.t().unwrap()).unwrap()), tokens, output);
    let theirs = cx.matmul(&adapted.t().unwrap()).unwrap().detach().broadcast_mul(&expected).unwrap();
    same("y", cpu.scale_columns(&y, &factors).values(), &values(&theirs));
    let [expected] = autograd(&theirs, &dy, [&cm]);
    let mut d_magnitude = cpu.zeros(1, output);
    cpu.dora_backward(&y, &dy, &factors, &magnitude, &mut d_magnitude);
    same("d magnitude", d_magnitude.values(), &expected);
}

#[test]
fn neftune_noise_is_bounded_by_a_rows_length_and_drawn_anew_by_key() {
    let cpu = Cpu::default();
    let rows = cpu.rows(&[4, 12].map(Row::new), 0, &[]);
    let noise = |key| {
        let mut x = cpu.zeros(16, 30);
        cpu.neftune(&mut x, &rows, 5.0, key);
        x.values().to_vec()
    };
    let largest = |x: &[f32]| x.iter().fold(0f32, |a, b| a.max(b.abs()));
    let x = noise(1);
    for (part, n) in [(&x[..4 * 30], 4), (&x[4 * 30..], 12)] {
        let bound = 5.0 / (n as f32 * 30.0).sqrt();
        assert!(largest(part) <= bound && largest(part) > 0.9 * bound);
        assert!((part.iter().sum::<f32>() / part.len() as f32).abs() < 0.2 * bound);
    }
    assert_ne!(x, noise(2));
    assert_eq!(x, noise(1));
}

#[test]
fn the_embeddings_gradient_adds_up_where_a_token_repeats() {
    let cpu = Cpu::default();
    let (dx, _) = pair(&cpu, 3, 4, 1);
    let mut d_table = cpu.zeros(5, 4);
    cpu.embedding_backward(&dx, &[2, 0, 2], 3.0, Some(0), &mut d_table);
    let dx = dx.values();
    let expected: Vec<f32> = (0..4).map(|i| 3.0 * dx[i] + 3.0 * dx[8 + i]).collect();
    same("a token that repeats", &d_table.values()[8..12], &expected);
    assert_eq!(d_table.values()[..8], [0.0; 8], "neither the padding nor a token that is not there");
}

#[test]
fn lora_and_its_gradients() {
    // Small ranks have kernels of their own.
    [6, 16, 40].into_iter().for_each(check_lora);
}

fn check_lora(rank: usize) {
    let cpu = Cpu::default();
    let (tokens, input, output, scale) = (23, 40, 50, 1.5);
    let (x, cx) = pair(&cpu, tokens, input, 1);
    let (a, ca) = pair(&cpu, rank, input, 2);
    let (b, cb) = pair(&cpu, output, rank, 3);
    let (dy, _) = pair(&cpu, tokens, output, 4);
    let product = cx.matmul(&ca.t().unwrap()).unwrap().matmul(&cb.t().unwrap()).unwrap();
    let (w, cw) = pair(&cpu, output, input, 5);
    let theirs = (cx.matmul(&cw.t().unwrap()).unwrap() + (product * scale).unwrap()).unwrap();
    let w = WeightRef::Trained(&w);

    let lora = LoraRef { a: &a, b: &b, scale: scale as f32, dropout: None };
    let (y, hidden) = cpu.adapted_linear(&x, w, &lora, None);
    same("y", y.values(), &values(&theirs));
    let (y, _) = cpu.adapted_linear(&x, w, &lora, Some(y));
    same("y + y", y.values(), &values(&theirs).iter().map(|y| 2.0 * y).collect::<Vec<_>>());

    let [mut d_a, mut d_b] = [(rank, input), (output, rank)].map(|(rows, cols)| cpu.zeros(rows, cols));
    let mut backward = |d_x| {
        let grads = LoraGrads { a: &mut d_a, b: &mut d_b };
        cpu.adapted_linear_backward(AdaptedForward { x: &x, hidden: &hidden }, w, &lora, &dy, grads, d_x)
    };
    let d_x = backward(InputGrad::Fresh).unwrap();
    assert!(backward(InputGrad::None).is_none());
    let [ex, ea, eb] = autograd(&theirs, &dy, [&cx, &ca, &cb]);
    same("dx", d_x.values(), &ex);
    same("dA + dA", d_a.values(), &ea.iter().map(|x| 2.0 * x).collect::<Vec<_>>());
    same("dB + dB", d_b.values(), &eb.iter().map(|x| 2.0 * x).collect::<Vec<_>>());
}

#[test]
fn dropout_has_the_same_mask_forward_and_backward() {
    let cpu = Cpu::default();
    let (tokens, width) = (9, 16);
    // With A and B the identity, y = scale · dropout(x), and the gradient of x is the mask's factor.
    let mut identity = vec![0.0; width * width];
    (0..width).for_each(|i| identity[i * width + i] = 1.0);
    let (a, b) = (cpu.upload(&identity, width, width), cpu.upload(&identity, width, width));
    let (x, cx) = pair(&cpu, tokens, width, 1);
    let (dy, cdy) = pair(&cpu, tokens, width, 2);
    let lora = LoraRef { a: &a, b: &b, scale: 2.0, dropout: Some(Dropout { p: 0.4, key: 11 }) };
    let w = cpu.zeros(width, width);
    let w = WeightRef::Trained(&w);
    let (y, hidden) = cpu.adapted_linear(&x, w, &lora, None);
    let factor: Vec<f32> = y.values().iter().zip(values(&cx)).map(|(y, x)| y / x).collect();
    assert!(factor.contains(&0.0) && factor.iter().any(|f| (f - 2.0 / 0.6).abs() < 1e-5));

    let (mut d_a, mut d_b) = (cpu.zeros(width, width), cpu.zeros(width, width));
    let (forward, grads) = (AdaptedForward { x: &x, hidden: &hidden }, LoraGrads { a: &mut d_a, b: &mut d_b });
    let d_x = cpu.adapted_linear_backward(forward, w, &lora, &dy, grads, InputGrad::Fresh).unwrap();
    let product = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).collect::<Vec<_>>();
    same("dx", d_x.values(), &product(&values(&cdy), &factor));
    let dropped = Candle::from_slice(y.values(), (tokens, width), &Device::Cpu).unwrap();
    let expected = cdy.t().unwrap().matmul(&dropped).unwrap();
    same("dA", d_a.values(), &values(&expected));
    same("dB", d_b.values(), &values(&expected));
}

/// Rotates [tokens, heads · dim] as transformers does, with the positions of these rows.
fn rope(x: &Candle, dim: usize, lengths: &[usize], frequencies: &[f32]) -> Candle {
    let (tokens, width) = x.dims2().unwrap();
    let positions = lengths.iter().flat_map(|&len| 0..len);
    let angles: Vec<f32> = positions.flat_map(|p| frequencies.iter().map(move |f| p as f32 * f)).collect();
    let angles = Candle::from_vec(angles, (tokens, 1, dim / 2), &Device::Cpu).unwrap();
    let (cos, sin) = (angles.cos().unwrap(), angles.sin().unwrap());
    let x = x.reshape((tokens, width / dim, dim)).unwrap();
    let (a, b) = (x.narrow(2, 0, dim / 2).unwrap(), x.narrow(2, dim / 2, dim / 2).unwrap());
    let times = |x: &Candle, y: &Candle| x.broadcast_mul(y).unwrap();
    let first = (times(&a, &cos) - times(&b, &sin)).unwrap();
    let second = (times(&b, &cos) + times(&a, &sin)).unwrap();
    Candle::cat(&[first, second], 2).unwrap().reshape((tokens, width)).unwrap()
}

#[test]
fn rope_and_its_gradient() {
    let cpu = Cpu::default();
    let (dim, lengths) = (8, [5, 1, 9]);
    let rope_of = |theta| Rope { theta, dim, scaling: RopeScaling::None, attention_factor: 1.0 };
    let rows = cpu.rows(&lengths.map(Row::new), 0, &[rope_of(77.0), rope_of(500.0)]);
    let ((mut x, cx), (mut dy, _)) = (pair(&cpu, 15, 24, 1), pair(&cpu, 15, 24, 2));
    let theirs = rope(&cx, dim, &lengths, &rope_of(500.0).frequencies(9));
    let [expected] = autograd(&theirs, &dy, [&cx]);
    cpu.rope(&mut x, dim, &rows, 1);
    same("y", x.values(), &values(&theirs));
    cpu.rope_backward(&mut dy, dim, &rows, 1);
    same("dx", dy.values(), &expected);
}

/// Attention of one row as the papers write it.
fn attention_of_row(q: &Candle, k: &Candle, v: &Candle, attention: Attention) -> Candle {
    let (tokens, heads) = (q.dim(0).unwrap(), attention.heads);
    let window = attention.window.unwrap_or(tokens);
    let sees = |i: usize, j: usize| j <= i && i - j < window;
    let hidden: Vec<f32> =
        (0..tokens * tokens).map(|at| if sees(at / tokens, at % tokens) { 0.0 } else { -1e9 }).collect();
    let mask = Candle::from_vec(hidden, (tokens, tokens), &Device::Cpu).unwrap();
    let outputs: Vec<Candle> = (0..heads.query)
        .map(|head| {
            let of = |x: &Candle, head: usize| x.narrow(1, head * heads.dim, heads.dim).unwrap();
            let kv = head / (heads.query / heads.key_value);
            let scores = of(q, head).matmul(&of(k, kv).t().unwrap()).unwrap();
            let scores = (scores * f64::from(attention.scale)).unwrap();
            let scores = match attention.softcap.map(f64::from) {
                None => scores,
                Some(cap) => ((scores / cap).unwrap().tanh().unwrap() * cap).unwrap(),
            };
            let scores = (scores + &mask).unwrap();
            let largest = scores.max_keepdim(1).unwrap().detach();
            let weights = scores.broadcast_sub(&largest).unwrap().exp().unwrap();
            let sums = weights.sum_keepdim(1).unwrap();
            weights.broadcast_div(&sums).unwrap().matmul(&of(v, kv)).unwrap()
        })
        .collect();
    Candle::cat(&outputs, 1).unwrap()
}

#[test]
fn attention_and_its_gradients_in_packed_rows() {
    let cpu = Cpu::default();
    // Rows shorter and longer than a block of queries, one of one token, and two that go on after another.
    let lengths = [3, 70, 1, 130, 90];
    let prefixes = [None, None, Some(1), None, Some(1)];
    let tokens = lengths.iter().sum();
    let starts = [0, 3, 73, 74, 204];
    let layout = lengths.into_iter().zip(prefixes).map(|(len, prefix)| Row { len, prefix });
    let layout: Vec<Row> = layout.collect();
    for (query, key_value, softcap, window) in
        [(4, 2, None, None), (2, 2, Some(0.5), None), (3, 1, None, Some(20)), (2, 1, Some(0.7), Some(65))]
    {
        let heads = Heads { query, key_value, dim: 16 };
        let attention = Attention { heads, scale: 0.4, softcap, window };
        let (q, cq) = pair(&cpu, tokens, query * 16, 1);
        let (k, ck) = pair(&cpu, tokens, key_value * 16, 2);
        let (v, cv) = pair(&cpu, tokens, key_value * 16, 3);
        let (dy, _) = pair(&cpu, tokens, query * 16, 4);
        let theirs: Vec<Candle> = (0..layout.len())
            .map(|row| {
                let whole = |x: &Candle| {
                    let part = |row: usize| x.narrow(0, starts[row], lengths[row]).unwrap();
                    let parts: Vec<Candle> = prefixes[row].into_iter().chain([row]).map(part).collect();
                    Candle::cat(&parts, 0).unwrap()
                };
                let y = attention_of_row(&whole(&cq), &whole(&ck), &whole(&cv), attention);
                y.narrow(0, y.dim(0).unwrap() - lengths[row], lengths[row]).unwrap()
            })
            .collect();
        let theirs = Candle::cat(&theirs, 0).unwrap();
        let rows = cpu.rows(&layout, 0, &[]);
        let (y, log_sums) = cpu.attention(&q, &k, &v, attention, &rows);
        same("y", y.values(), &values(&theirs));
        let forward = AttentionForward { q: &q, k: &k, v: &v, log_sums: &log_sums };
        let [dq, dk, dv] = cpu.attention_backward(forward, &dy, attention, &rows);
        let [eq, ek, ev] = autograd(&theirs, &dy, [&cq, &ck, &cv]);
        same("dq", dq.values(), &eq);
        same("dk", dk.values(), &ek);
        same("dv", dv.values(), &ev);
    }
}

#[test]
fn attention_over_a_cache_is_the_end_of_attention_over_the_row() {
    let cpu = Cpu::default();
    let heads = Heads { query: 4, key_value: 2, dim: 8 };
    for (softcap, window) in [(None, None), (Some(0.5), Some(5))] {
        let attention = Attention { heads, scale: 0.3, softcap, window };
        let ((q, _), (k, _), (v, _)) = (pair(&cpu, 12, 32, 1), pair(&cpu, 12, 16, 2), pair(&cpu, 12, 16, 3));
        let (whole, _) = cpu.attention(&q, &k, &v, attention, &cpu.rows(&[Row::new(12)], 0, &[]));
        let mut caches = [cpu.zeros(20, 16), cpu.zeros(20, 16)];
        cpu.write_rows(&mut caches[0], &k, 0);
        cpu.write_rows(&mut caches[1], &v, 0);
        let last = cpu.upload(&q.values()[9 * 32..], 3, 32);
        let y = cpu.attention_cached(&last, &caches[0], &caches[1], attention, 9);
        same("y", y.values(), &whole.values()[9 * 32..]);
    }
}

#[test]
fn gated_products_and_their_gradients() {
    let cpu = Cpu::default();
    let (gate, cg) = pair(&cpu, 11, 37, 1);
    let (up, cu) = pair(&cpu, 11, 37, 2);
    let (dy, _) = pair(&cpu, 11, 37, 3);
    let sigmoid = (cg.neg().unwrap().exp().unwrap() + 1.0).unwrap().recip().unwrap();
    for (activation, theirs) in
        [(Activation::Silu, (cg.as_tensor() * sigmoid).unwrap()), (Activation::GeluTanh, cg.gelu().unwrap())]
    {
        let theirs = (theirs * cu.as_tensor()).unwrap();
        same("y", cpu.gated(activation, &gate, &up).values(), &values(&theirs));
        let [d_gate, d_up] = cpu.gated_backward(activation, cpu.copy(&gate), cpu.copy(&up), cpu.copy(&dy));
        let [eg, eu] = autograd(&theirs, &dy, [&cg, &cu]);
        same("d gate", d_gate.values(), &eg);
        same("d up", d_up.values(), &eu);
    }
}

#[test]
fn cross_entropy_and_its_gradients_over_several_chunks_of_the_vocabulary() {
    let cpu = Cpu::default();
    for (vocabulary, softcap) in [(5, None), (2048, None), (5000, None), (5000, Some(0.8))] {
        let (tokens, hidden) = (7, 12);
        let ((x, cx), (w, cw)) = (pair(&cpu, tokens, hidden, 1), pair(&cpu, vocabulary, hidden, 2));
        let weight = cpu.weight(HostTensor::new(w.values().to_vec(), vec![vocabulary, hidden]));
        let last = vocabulary as u32 - 1;
        let targets = [0, last, 1, last / 2, last, 3, 2];
        let logits = cx.matmul(&cw.t().unwrap()).unwrap();
        let logits = match softcap {
            None => logits,
            Some(cap) => ((logits / cap).unwrap().tanh().unwrap() * cap).unwrap(),
        };
        let log_sums = logits.exp().unwrap().sum_keepdim(1).unwrap().log().unwrap();
        let indices = Candle::from_slice(&targets, (tokens, 1), &Device::Cpu).unwrap();
        let theirs = (log_sums - logits.gather(&indices, 1).unwrap()).unwrap();

        let cap = softcap.map(|cap| cap as f32);
        let frozen = WeightRef::Frozen(&weight);
        let (losses, none) = cpu.linear_cross_entropy(&x, frozen, &targets, cap, None);
        assert!(none.is_none());
        same("losses", &losses, &values(&theirs));
        let mut dw = cpu.zeros(vocabulary, hidden);
        let grads = CrossEntropyGrads { scale: 0.25, weight: Some(&mut dw) };
        let (again, dx) = cpu.linear_cross_entropy(&x, frozen, &targets, cap, Some(grads));
        assert_eq!(losses, again);
        let dy = cpu.upload(&[0.25; 7], tokens, 1);
        let [ex, ew] = autograd(&theirs, &dy, [&cx, &cw]);
        same("dx", dx.unwrap().values(), &ex);
        same("dW", dw.values(), &ew);
    }
}

#[test]
fn cross_entropy_survives_logits_that_overflow_exp() {
    let cpu = Cpu::default();
    let x = cpu.upload(&[1000.0, -1000.0], 2, 1);
    let table: Vec<f32> = (0..3000).map(|i| i as f32 / 3000.0).collect();
    let weight = cpu.weight(HostTensor::new(table, vec![3000, 1]));
    let grads = CrossEntropyGrads { scale: 1.0, weight: None };
    let (losses, dx) = cpu.linear_cross_entropy(&x, WeightRef::Frozen(&weight), &[2999, 0], None, Some(grads));
    // ln Σ e^(−i/3) = −ln(1 − e^(−1/3)), from either end.
    let expected = -(1.0 - (-1.0f64 / 3.0).exp()).ln();
    assert!(losses.iter().all(|&loss| (f64::from(loss) - expected).abs() < 1e-3), "{losses:?}");
    assert!(dx.unwrap().values().iter().all(|dx| dx.is_finite()));
}

#[test]
fn gathering_and_scattering_rows() {
    let cpu = Cpu::default();
    let x = cpu.upload(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 3, 2);
    assert_eq!(cpu.gather_rows(&x, &[2, 0]).values(), [5.0, 6.0, 1.0, 2.0]);
    assert_eq!(cpu.scatter_rows(&x, &[3, 0, 1], 4).values(), [3.0, 4.0, 5.0, 6.0, 0.0, 0.0, 1.0, 2.0]);
}
