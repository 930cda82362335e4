"""Writes trainer-image/tests/fixtures/gguf: for each family that GGUF knows a tiny random model with a small tokenizer,
as llama.cpp's converter lays it out (by the `gguf` package's names), the logits of transformers, and what the tokenizer's
own library makes of some texts; and one tensor of each type with its values.

usage: gguf_files.py [FOLDER]
"""

import json
import random
import sys
import tempfile
from pathlib import Path

import gguf
import numpy as np
import sentencepiece
import tokenizers
import torch
import transformers
from safetensors.torch import save_file
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX as QWEN2

ROOT = Path(__file__).parents[2]
DATA = ROOT / "examples/telecom-support/train.jsonl"
# As tiktoken's cl100k_base, of which Llama 3's is a copy.
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
SIZES = dict(
    vocab_size=320,
    hidden_size=16,
    intermediate_size=32,
    num_attention_heads=2,
    num_key_value_heads=1,
    num_hidden_layers=2,
    max_position_embeddings=128,
    rms_norm_eps=1e-5,
    initializer_range=0.3,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
TEXTS = [
    "Your SIM card, No. 48213, won't work abroad: what's the price?",
    "  two spaces, a\ttab\n\nand  lines \r\n with 1234567 numbers   ",
    "Grüße aus Köln — naïve café, e\u0301, 东京, 🙂 and don't/DON'T HTMLParser iOS17",
    "<|end|> \n<|user|>\n next turn",
    "",
]


def rope(**parameters):
    return dict(rope_parameters=dict(rope_theta=500.0, **parameters))


LLAMA3_ROPE = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)
GEMMA = dict(head_dim=8, query_pre_attn_scalar=8, tie_word_embeddings=True)
# Configuration, its options, GGUF's architecture, and the tokenizer.
FAMILIES = {
    "llama": (
        transformers.LlamaConfig,
        dict(tie_word_embeddings=False, rope_parameters=dict(rope_theta=500000.0, **LLAMA3_ROPE)),
        "LLAMA",
        "llama-bpe",
    ),
    "mistral": (
        transformers.MistralConfig,
        dict(sliding_window=None, tie_word_embeddings=False, head_dim=12, **rope(rope_type="linear", factor=2.0)),
        "LLAMA",
        "spm",
    ),
    "qwen2": (transformers.Qwen2Config, dict(tie_word_embeddings=True), "QWEN2", "qwen2"),
    "qwen3": (transformers.Qwen3Config, dict(head_dim=12, tie_word_embeddings=False), "QWEN3", "qwen2"),
    "phi3": (
        transformers.Phi3Config,
        dict(sliding_window=9, tie_word_embeddings=False, **rope(rope_type="default", partial_rotary_factor=0.5)),
        "PHI3",
        "spm",
    ),
    "gemma2": (
        transformers.Gemma2Config,
        dict(sliding_window=6, attn_logit_softcapping=2.0, final_logit_softcapping=3.0, **GEMMA),
        "GEMMA2",
        "spm without a space in front",
    ),
    "gemma3": (
        transformers.Gemma3TextConfig,
        dict(sliding_window=6, **GEMMA, **{"num_hidden_layers": 7}),
        "GEMMA3",
        "spm without a space in front",
    ),
}
CHAT = ["<|user|>", "<|end|>"]


def lines():
    rows = [json.loads(line)["messages"] for line in DATA.read_text().splitlines()[:400]]
    return [message["content"] for messages in rows for message in messages]


class Spm:
    """A SentencePiece model with bytes, and two tokens for chats behind it."""

    def __init__(self, adds_space):
        with tempfile.TemporaryDirectory() as folder:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(lines()),
                model_prefix=f"{folder}/m",
                vocab_size=SIZES["vocab_size"] - len(CHAT),
                model_type="bpe",
                byte_fallback=True,
                pad_id=0,
                bos_id=1,
                eos_id=2,
                unk_id=3,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                add_dummy_prefix=adds_space,
                character_coverage=0.99,
                minloglevel=2,
            )
            self.model = sentencepiece.SentencePieceProcessor(model_file=f"{folder}/m.model")
        self.adds_space = adds_space

    def write(self, writer):
        pieces = range(self.model.get_piece_size())
        kinds = gguf.TokenType
        kind = lambda i: (
            kinds.UNKNOWN if self.model.is_unknown(i)
            else kinds.CONTROL if self.model.is_control(i)
            else kinds.BYTE if self.model.is_byte(i)
            else kinds.NORMAL
        )
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list([self.model.id_to_piece(i) for i in pieces] + CHAT)
        writer.add_token_scores([self.model.get_score(i) for i in pieces] + [-1000.0] * len(CHAT))
        writer.add_token_types([kind(i) for i in pieces] + [kinds.CONTROL] * len(CHAT))
        writer.add_unk_token_id(3)
        writer.add_add_space_prefix(self.adds_space)

    def ids(self, text, strips):
        """SentencePiece knows nothing of the chat's tokens: what is between them is encoded apart."""
        ids, rest = [], text
        while rest:
            at, token = min(((rest.find(token), token) for token in CHAT if token in rest), default=(len(rest), None))
            ids += self.model.encode(rest[:at])
            rest = rest[at + len(token or "") :]
            if token is not None:
                ids.append(self.model.get_piece_size() + CHAT.index(token))
                rest = rest.lstrip() if strips else rest
        return ids


class ByteLevel:
    """A byte-level BPE tokenizer, trained by the `tokenizers` library."""

    def __init__(self, name, pattern):
        pre = tokenizers.pre_tokenizers
        self.name, self.tokenizer = name, tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=name == "llama-bpe"))
        self.tokenizer.normalizer = tokenizers.normalizers.NFC() if name == "qwen2" else None
        split = pre.Split(tokenizers.Regex(pattern), behavior="isolated")
        self.tokenizer.pre_tokenizer = pre.Sequence([split, pre.ByteLevel(add_prefix_space=False, use_regex=False)])
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=SIZES["vocab_size"],
            special_tokens=["<pad>", "<s>", "</s>", *CHAT],
            initial_alphabet=pre.ByteLevel.alphabet(),
            show_progress=False,
        )
        self.tokenizer.train_from_iterator(lines(), trainer)

    def write(self, writer):
        model = json.loads(self.tokenizer.to_str())["model"]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.name)
        tokens = sorted(model["vocab"], key=model["vocab"].get)
        writer.add_token_list(tokens)
        writer.add_token_types([gguf.TokenType.CONTROL if i < 5 else gguf.TokenType.NORMAL for i in range(len(tokens))])
        writer.add_token_merges([" ".join(merge) for merge in model["merges"]])

    def ids(self, text, _):
        return self.tokenizer.encode(text, add_special_tokens=False).ids


def permuted(rows, heads):
    split = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2).reshape(rows.shape))


def write_sizes(writer, config, architecture):
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope["rope_theta"])
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if architecture != "QWEN2":
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if architecture in ["LLAMA", "PHI3"]:
        writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "llama3":
        # transformers' own computation of the frequencies, and what divides the unscaled ones.
        scaled, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
        plain = rope["rope_theta"] ** -(torch.arange(0, head_dim, 2).float() / head_dim)
        writer.add_tensor("rope_freqs.weight", (plain / scaled).numpy().astype(np.float32))
    if architecture in ["PHI3", "GEMMA2", "GEMMA3"]:
        writer.add_sliding_window(config.sliding_window)
    if architecture == "GEMMA2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def write_family(out, name):
    kind, options, architecture, tokenizer = FAMILIES[name]
    torch.manual_seed(len(name))
    config = kind(**{**SIZES, **options})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(-0.5, 0.5) if "gemma" in name else parameter.uniform_(0.5, 1.5)
    tokenizer = {
        "spm": lambda: Spm(True),
        "spm without a space in front": lambda: Spm(False),
        "qwen2": lambda: ByteLevel("qwen2", QWEN2),
        "llama-bpe": lambda: ByteLevel("llama-bpe", LLAMA3),
    }[tokenizer]()

    writer = gguf.GGUFWriter(out / f"{name}.gguf", architecture.lower())
    write_sizes(writer, config, architecture)
    tokenizer.write(writer)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture], config.num_hidden_layers)
    for own, values in model.state_dict().items():
        if own == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = values.float().numpy()
        if architecture == "LLAMA" and "q_proj" in own:
            values = permuted(values, config.num_attention_heads)
        if architecture == "LLAMA" and "k_proj" in own:
            values = permuted(values, config.num_key_value_heads)
        if "gemma" in name and own.endswith("norm.weight"):
            values = values + 1
        writer.add_tensor(names.get_name(own, try_suffixes=(".weight", ".bias")), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    rng = random.Random(name)
    tokens = [rng.randrange(config.vocab_size) for _ in range(24)]
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0]
    save_file({"logits": logits.contiguous()}, out / f"{name}.safetensors")
    texts = [{"text": text, "ids": tokenizer.ids(text, name == "phi3")} for text in TEXTS]
    expected = {"tokens": tokens, "texts": texts}
    (out / f"{name}.json").write_text(json.dumps(expected, separators=(",", ":"), ensure_ascii=False) + "\n")


def write_types(out):
    """A tensor of each type: two rows of 256 values, of random bytes with moderate scales."""
    rng = np.random.default_rng(1)
    writer = gguf.GGUFWriter(out / "types.gguf", "none")
    expected = {}
    for kind in ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "F16", "BF16", "F32"]:
        kind = gguf.GGMLQuantizationType[kind]
        if kind.name[0] == "Q" and kind.name[-1] == "K":
            # There is no quantizer for these: any bytes are codes, and the scales must be numbers.
            size, bytes_of_block = gguf.GGML_QUANT_SIZES[kind]
            blocks = rng.integers(0, 256, (2 * 256 // size, bytes_of_block), dtype=np.uint8)
            halves = {"Q2_K": [-4, -2], "Q3_K": [-2], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [-2]}[kind.name]
            for at in halves:
                at %= bytes_of_block
                scales = rng.uniform(0.001, 0.1, len(blocks)).astype(np.float16)
                blocks[:, at : at + 2] = scales.view(np.uint8).reshape(-1, 2)
            data = blocks.reshape(2, -1)
        else:
            data = gguf.quants.quantize(rng.standard_normal((2, 256)).astype(np.float32), kind)
        writer.add_tensor(kind.name, data, raw_dtype=kind)
        expected[kind.name] = torch.from_numpy(gguf.quants.dequantize(data, kind).astype(np.float32).copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    save_file(expected, out / "types.safetensors")


def main():
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "trainer-image/tests/fixtures/gguf"
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for name in FAMILIES:
        write_family(out, name)
    write_types(out)


if __name__ == "__main__":
    main()
