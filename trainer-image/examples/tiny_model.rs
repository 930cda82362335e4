//! Writes a tiny Llama with random weights (about 110 KB), a byte-level tokenizer and a chat template, in the Hugging
//! Face layout: `cargo run -p tunesmith-trainer --example tiny_model -- FOLDER`. For tests that need a model, not
//! sense.

use std::{collections::BTreeMap, error::Error, fs, io, path::Path};

use safetensors::{Dtype, tensor::TensorView};
use serde_json::json;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;

const HIDDEN: usize = 32;
const FEED_FORWARD: usize = 64;
const LAYERS: usize = 2;
const HEADS: usize = 4;
const KEY_VALUE_HEADS: usize = 2;
const HEAD_DIM: usize = HIDDEN / HEADS;
const SPECIAL_TOKENS: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];
const CHAT_TEMPLATE: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + \
    message['content'] + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}\
    {{ '<|im_start|>assistant\n' }}{% endif %}";

fn main() -> Result<(), Box<dyn Error>> {
    let folder = std::env::args().nth(1).ok_or("usage: tiny_model FOLDER")?;
    Ok(write(Path::new(&folder))?)
}

/// Writes the model's files into `folder`.
pub fn write(folder: &Path) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    let mut alphabet: Vec<char> = ByteLevel::alphabet().into_iter().collect();
    alphabet.sort_unstable();
    let tokens: Vec<String> =
        SPECIAL_TOKENS.iter().map(|token| token.to_string()).chain(alphabet.iter().map(char::to_string)).collect();
    let write = |name: &str, value: serde_json::Value| fs::write(folder.join(name), format!("{value:#}\n"));
    write(
        "config.json",
        json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
            "hidden_size": HIDDEN, "intermediate_size": FEED_FORWARD, "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS, "num_key_value_heads": KEY_VALUE_HEADS, "vocab_size": tokens.len(),
            "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
            "tie_word_embeddings": true, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float32",
        }),
    )?;
    write("tokenizer.json", tokenizer(&tokens))?;
    write(
        "tokenizer_config.json",
        json!({
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>",
            "pad_token": "<|im_end|>", "clean_up_tokenization_spaces": false, "chat_template": CHAT_TEMPLATE,
        }),
    )?;
    fs::write(folder.join("model.safetensors"), weights(tokens.len()))
}

/// Byte-level BPE without merges: every byte is a token.
fn tokenizer(tokens: &[String]) -> serde_json::Value {
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let added = SPECIAL_TOKENS.iter().enumerate().map(|(id, token)| {
        json!({"id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    });
    let vocabulary: BTreeMap<&String, usize> = tokens.iter().enumerate().map(|(id, token)| (token, id)).collect();
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added.collect::<Vec<_>>(),
        "normalizer": null, "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                  "vocab": vocabulary, "merges": []},
    })
}

fn weights(vocabulary: usize) -> Vec<u8> {
    let (query, key_value) = (HEADS * HEAD_DIM, KEY_VALUE_HEADS * HEAD_DIM);
    let mut shapes = vec![
        ("model.embed_tokens.weight".to_owned(), vec![vocabulary, HIDDEN]),
        ("model.norm.weight".to_owned(), vec![HIDDEN]),
    ];
    for layer in 0..LAYERS {
        let parts = [
            ("input_layernorm", vec![HIDDEN]),
            ("post_attention_layernorm", vec![HIDDEN]),
            ("self_attn.q_proj", vec![query, HIDDEN]),
            ("self_attn.k_proj", vec![key_value, HIDDEN]),
            ("self_attn.v_proj", vec![key_value, HIDDEN]),
            ("self_attn.o_proj", vec![HIDDEN, query]),
            ("mlp.gate_proj", vec![FEED_FORWARD, HIDDEN]),
            ("mlp.up_proj", vec![FEED_FORWARD, HIDDEN]),
            ("mlp.down_proj", vec![HIDDEN, FEED_FORWARD]),
        ];
        shapes.extend(parts.map(|(part, shape)| (format!("model.layers.{layer}.{part}.weight"), shape)));
    }
    let mut random = Random(42);
    let tensors: Vec<_> = shapes
        .into_iter()
        .map(|(name, shape)| {
            let values = (0..shape.iter().product()).map(|_| match shape[..] {
                // Norms near 1; matrices with a variance of 1 / in.
                [_] => 1.0 + 0.1 * random.next(),
                _ => (3.0 / shape[1] as f32).sqrt() * random.next(),
            });
            (name, values.flat_map(f32::to_le_bytes).collect::<Vec<u8>>(), shape.clone())
        })
        .collect();
    let views = tensors.iter().map(|(name, bytes, shape)| {
        (name, TensorView::new(Dtype::F32, shape.clone(), bytes).expect("four bytes an element"))
    });
    safetensors::serialize(views, None).expect("names and shapes fit")
}

/// xorshift64* (Vigna, 2016), as numbers in [-1, 1).
struct Random(u64);

impl Random {
    fn next(&mut self) -> f32 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 40) as f32 / (1u32 << 23) as f32 - 1.0
    }
}
