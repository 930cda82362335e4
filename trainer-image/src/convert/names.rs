//! What GGUF calls the tensors of a block, and how it orders the rows of queries and keys.

/// Divisors of the rotary frequencies of long rows and of short ones.
pub(super) const LONGROPE_FACTORS: [&str; 2] = ["rope_factors_long.weight", "rope_factors_short.weight"];

/// Divisors of the rotary frequencies, which Llama 3.1 and its successors have.
pub(super) const ROPE_FACTORS: &str = "rope_freqs.weight";

/// The tensors that become part of `config.json`.
pub(super) const CONFIGURING: [&str; 3] = [LONGROPE_FACTORS[0], LONGROPE_FACTORS[1], ROPE_FACTORS];

/// Linear layers of a block, as GGUF and Hugging Face call them.
pub(super) const LINEAR: [(&str, &str); 9] = [
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_qkv", "self_attn.qkv_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    // Gate and up in one.
    ("ffn_up", "mlp.gate_up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

/// Rows in Hugging Face's order from GGUF's. GGUF pairs the features of a head that rotate together,
/// [heads, dim/2, 2]; Hugging Face keeps them in halves, [heads, 2, dim/2].
pub(super) fn unpermute(values: &[f32], heads: usize, head_dim: usize) -> Vec<f32> {
    reorder(values, heads, head_dim, |row, half| (row % half) * 2 + row / half)
}

/// Rows in GGUF's order from Hugging Face's.
pub(super) fn permute(values: &[f32], heads: usize, head_dim: usize) -> Vec<f32> {
    reorder(values, heads, head_dim, |row, half| (row % 2) * half + row / 2)
}

fn reorder(values: &[f32], heads: usize, head_dim: usize, source: impl Fn(usize, usize) -> usize) -> Vec<f32> {
    let columns = values.len() / (heads * head_dim);
    let mut out = Vec::with_capacity(values.len());
    for head in 0..heads {
        for row in 0..head_dim {
            let from = head * head_dim + source(row, head_dim / 2);
            out.extend_from_slice(&values[from * columns..][..columns]);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_that_gguf_pairs_are_laid_out_in_halves() {
        // Two heads of four features, one column; GGUF order is 0, 2, 1, 3 of each head.
        let gguf = [0.0, 2.0, 1.0, 3.0, 10.0, 12.0, 11.0, 13.0];
        let halves = [0.0, 1.0, 2.0, 3.0, 10.0, 11.0, 12.0, 13.0];
        assert_eq!(unpermute(&gguf, 2, 4), halves);
        assert_eq!(permute(&halves, 2, 4), gguf);
    }
}
