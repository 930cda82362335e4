"""Chat templates: our text, tokens and masks against those of transformers, with templates that TRL ships of well-known
models and those of examples/chat-templates. Each line of output is a check; exits 1 if one fails.

usage: templates.py ENCODE_BINARY TOKENIZER_FOLDER WORK

TOKENIZER_FOLDER holds any byte-level tokenizer. Each template's own special tokens are added to it, which
tokenizer_config.json alone says, so that the adding is compared too.
"""

import json
import re
import shutil
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

from transformers import AutoTokenizer

DAY = "2026-11-27"
ENDS = {
    "gemma": ("<bos>", "<eos>", ["<end_of_turn>"]),
    "gemma3": ("<bos>", "<eos>", ["<end_of_turn>"]),
    "deepseek_r1_distill": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", []),
    "llama3": ("<|begin_of_text|>", "<|eot_id|>", []),
    "llama3_1": ("<|begin_of_text|>", "<|eot_id|>", []),
    "llama3_2": ("<|begin_of_text|>", "<|eot_id|>", []),
    "phi3": ("<s>", "<|endoftext|>", ["<|end|>"]),
    "phi3_5": ("<s>", "<|endoftext|>", ["<|end|>"]),
}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather of a place.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Tromsø", "days": 2}}}]


failed = []


def compare(what, good, found):
    print(f"ok   {what}" if good else f"FAIL {what}: {found}", flush=True)
    if not good:
        failed.append(what)


def turns(*said):
    return [{"role": role, "content": content} for role, content in said]


ROWS = {
    "one": {"messages": turns(("user", "How much is 2+2?"), ("assistant", "It is 4."))},
    "several": {
        "messages": turns(("user", "a"), ("assistant", "b"), ("user", " c\n"), ("assistant", "d e"), ("user", "f"), ("assistant", "<b> & \"é\""))
    },
    "system": {"messages": turns(("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello!"))},
    "thinking": {"messages": turns(("user", "a"), ("assistant", "<think>\nhm\n</think>\n\nb"))},
    "thought": {
        "messages": turns(("user", "a"), ("assistant", "b"), ("user", "c"))
        + [{"role": "assistant", "reasoning_content": "because", "content": "d"}]
    },
    "tools": {
        "tools": [TOOL],
        "messages": turns(("user", "Is it warm in Tromsø?"))
        + [{"role": "assistant", "content": "", "tool_calls": CALL}]
        + turns(("tool", '{"degrees": -3}'), ("assistant", "No, it has 3 below zero.")),
    },
    "first": {"messages": turns(("assistant", "Welcome!"), ("user", "Hi"), ("assistant", "Hello!"))},
}


def templates():
    shipped = files("trl") / "chat_templates"
    names = ["qwen2_5", "qwen3", "qwen3_instruct_2507", "llama3", "llama3_1", "llama3_2", "phi3", "phi3_5", "gemma", "gemma3"]
    for name in [*names, "deepseek_r1_distill", "qwen3_5_think", "qwen3_5_nothink", "nemotron_3_nano"]:
        yield name, name, (shipped / f"{name}.jinja").read_text()
        training = shipped / f"{name}_training.jinja"
        if training.is_file():
            yield f"{name}_training", name, training.read_text()
    ours = Path(__file__).parent / "../../examples/chat-templates"
    for path in sorted(ours.glob("*.jinja")):
        family = {"deepseek-r1": "deepseek_r1_distill", "qwen3": "qwen3", "phi3.5": "phi3_5", "gemma3": "gemma3"}.get(path.stem, path.stem)
        yield f"examples/{path.name}", family, path.read_text()


def write_folder(base, folder, family, template):
    """The tokenizer's folder with the template and its special tokens."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in ["tokenizer.json", "tokenizer_config.json"]:
        shutil.copy(base / name, folder / name)
    (folder / "chat_template.jinja").write_text(template)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    bos, eos, others = ENDS.get(family, ("<|endoftext|>", "<|im_end|>", []))
    markers = re.findall(r"<\|[a-z_]+\|>|</?(?:start_of_turn|end_of_turn|think|tool_call|tool_response)>|<｜[^｜<>]+｜>", template)
    config |= {"bos_token": bos, "eos_token": eos, "extra_special_tokens": sorted({*markers, *others} - {bos, eos})}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    stops = [tokenizer.convert_tokens_to_ids(token) for token in [eos, *others]]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    return tokenizer


def reference(tokenizer, row, mask):
    out = tokenizer.apply_chat_template(
        row["messages"],
        tools=row.get("tools"),
        return_dict=True,
        return_assistant_tokens_mask=mask,
        date_string="27 Nov 2026",
    )
    return out["input_ids"], out.get("assistant_masks")


def words(turn):
    """What a turn says: its reasoning, its answer and the functions that it calls."""
    parts = [turn.get("reasoning_content", ""), *re.split("</?think>", turn["content"])]
    parts += [call["function"]["name"] for call in turn.get("tool_calls", [])]
    return [part.strip() for part in parts if part.strip()]


def is_lost(tokenizer, row, tokens, mask):
    """Whether the template leaves words out, of what is to be learned or of what the model is to see."""
    text = tokenizer.decode(tokens)
    learned = text if mask is None else tokenizer.decode([token for token, m in zip(tokens, mask) if m])
    written = {"assistant": learned}
    lost = [w for turn in row["messages"] for w in words(turn) if w not in written.get(turn["role"], text) and json.dumps(w)[1:-1] not in text]
    return lost or any(tool["function"]["name"] not in text for tool in row.get("tools", []))


def learned_words(tokenizer, tokens, mask):
    """The learned tokens without white space: we leave out that behind a turn's end, transformers does not."""
    return [(i, token) for i, (token, m) in enumerate(zip(tokens, mask)) if m and tokenizer.decode([token]).strip()]


def check(name, folder, tokenizer, ours, marked):
    for (kind, row), line in zip(ROWS.items(), ours):
        label = f"{name} {kind}"
        try:
            tokens, mask = reference(tokenizer, row, marked)
        except Exception as error:  # The template refuses it.
            compare(f"{label}: refused as by transformers ({str(error)[:40]!r})", "error" in line, line)
            continue
        if "error" in line:
            compare(f"{label}: refused, as words are lost", is_lost(tokenizer, row, tokens, mask), line["error"][:160])
            continue
        compare(f"{label}: nothing is lost", not is_lost(tokenizer, row, tokens, mask), tokenizer.decode(tokens))
        # Behind a turn that the template does not end, we put the end token.
        own = line["tokens"][: len(tokens)]
        compare(f"{label}: tokens", own == tokens and len(line["tokens"]) <= len(tokens) + 1, (own, tokens))
        if marked:
            expected, found = (learned_words(tokenizer, tokens, m) for m in (mask, line["trained"][: len(tokens)]))
            compare(f"{label}: mask", expected == found, (expected, found))
        else:
            learned = tokenizer.decode([t for t, m in zip(line["tokens"], line["trained"]) if m])
            said = [w for turn in row["messages"] if turn["role"] == "assistant" for w in words(turn)]
            others = [w for turn in row["messages"] if turn["role"] == "user" for w in words(turn) if len(w) > 3]
            compare(f"{label}: learned", all(w in learned for w in said) and not any(w in learned for w in others), learned)


def main():
    encode, base, work = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    rows = work / "rows.jsonl"
    work.mkdir(parents=True, exist_ok=True)
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS.values()))
    for name, family, template in templates():
        folder = work / name.replace("/", "-")
        tokenizer = write_folder(base, folder, family, template)
        out = subprocess.run([encode, folder, rows, DAY], capture_output=True, text=True)
        if out.returncode:
            compare(name, False, out.stderr)
            continue
        ours = [json.loads(line) for line in out.stdout.splitlines()]
        check(name, folder, tokenizer, ours, "{%- generation" in template or "{% generation" in template)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
