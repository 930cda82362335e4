"""The example data as users have it: rows of differing length, of which only the assistant's words are trained.

usage: telecom.py prepare MODEL DATA.jsonl STEPS OUT.json    micro-batches of 8 rows, as engine::MicroBatch reads them
       telecom.py train MODEL BATCHES.json float32|bfloat16  times PEFT with padded rows; prints one line of JSON
       telecom.py lesson MODEL TRAIN.jsonl EVAL.jsonl STEPS ADAPTER
                                                             PEFT's whole lesson in bf16, with its loss and its adapter
"""

import json
import random
import resource
import sys
import time

import torch
import transformers

ROWS = 8
IGNORE = 2**32 - 1


def rows_of(model, data, line_breaks=False):
    """Tokens and targets of each row; `line_breaks` trains what the template puts behind the assistant's end tokens."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    render = lambda messages, **more: tokenizer.apply_chat_template(messages, return_dict=False, **more)
    rows = []
    for line in open(data).read().splitlines():
        messages = json.loads(line)["messages"]
        tokens = render(messages)
        trained = [False] * len(tokens)
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                start = len(render(messages[:i], add_generation_prompt=True))
                end = len(render(messages[: i + 1])) - (not line_breaks)
                trained[start:end] = [True] * (end - start)
        rows.append((tokens, [t if on else IGNORE for t, on in zip(tokens[1:], trained[1:])] + [IGNORE]))
    return rows


def prepare(model, data, steps, out):
    rows = rows_of(model, data)
    random.Random(7).shuffle(rows)
    batches = []
    for step in range(steps):
        batch = rows[step * ROWS : (step + 1) * ROWS]
        batches.append(
            {
                "tokens": [t for tokens, _ in batch for t in tokens],
                "targets": [t for _, targets in batch for t in targets],
                "row_lengths": [len(tokens) for tokens, _ in batch],
            }
        )
    json.dump(batches, open(out, "w"))


def unpacked(batch):
    rows, at = [], 0
    for length in batch["row_lengths"]:
        rows.append((batch["tokens"][at : at + length], batch["targets"][at : at + length]))
        at += length
    return rows


def padded(rows):
    longest = max(len(tokens) for tokens, _ in rows)
    shape = (len(rows), longest)
    ids, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, -100)
    for i, (tokens, targets) in enumerate(rows):
        ids[i, : len(tokens)] = torch.tensor(tokens)
        mask[i, : len(tokens)] = 1
        labels[i, : len(tokens)] = torch.tensor([-100 if t == IGNORE else t for t in targets])
    return ids, mask, labels


def loss_of(model, rows, reduction="mean"):
    ids, mask, labels = padded(rows)
    logits = model(input_ids=ids, attention_mask=mask).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction=reduction)


def train(model, path, dtype):
    import peft

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
    lora = peft.LoraConfig(r=8, lora_alpha=32, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, lora).train()
    params = [p for p in model.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(params, lr=2e-4)
    times, cpu, losses = [], [], []
    for batch in json.load(open(path)):
        start, start_cpu = time.perf_counter(), time.process_time()
        loss = loss_of(model, unpacked(batch))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        adamw.step()
        adamw.zero_grad()
        times.append(time.perf_counter() - start)
        cpu.append(time.process_time() - start_cpu)
        losses.append(loss.item())
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    figures = {"seconds": times, "cpu_seconds": cpu, "peak_rss_bytes": rss, "losses": losses}
    print(json.dumps(figures | {"threads": torch.get_num_threads()}))


def lesson(model_dir, train_path, eval_path, steps, out):
    import peft

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)
    lora = peft.LoraConfig(
        r=32, lora_alpha=64, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(model, lora).train()
    params = [p for p in model.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(params, lr=1e-3, weight_decay=0.0)
    schedule = transformers.get_cosine_schedule_with_warmup(adamw, 0, steps)
    rows, order, start = rows_of(model_dir, train_path), [], time.perf_counter()
    for step in range(steps):
        if len(order) < ROWS:
            order = random.Random(step).sample(range(len(rows)), len(rows))
        batch, order = order[:ROWS], order[ROWS:]
        loss = loss_of(model, [rows[i] for i in batch])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        adamw.step()
        schedule.step()
        adamw.zero_grad()
        if step % 20 == 0 or step + 1 == steps:
            print(f"step {step + 1}: loss {loss.item():.3f}, {time.perf_counter() - start:.0f} s", flush=True)
    model.eval().save_pretrained(out)
    for name, line_breaks in [("the assistant's words", False), ("and the line breaks behind them", True)]:
        held_out, total, tokens = rows_of(model_dir, eval_path, line_breaks), 0.0, 0
        with torch.no_grad():
            for i in range(0, len(held_out), ROWS):
                batch = held_out[i : i + ROWS]
                total += loss_of(model, batch, "sum").item()
                tokens += sum(t != IGNORE for _, targets in batch for t in targets)
        print(f"eval loss {total / tokens:.4f} over {tokens} tokens: {name}")


match sys.argv[1:]:
    case ["prepare", model, data, steps, out]:
        prepare(model, data, int(steps), out)
    case ["train", model, batches, dtype]:
        train(model, batches, dtype)
    case ["lesson", model, train_data, eval_data, steps, out]:
        lesson(model, train_data, eval_data, int(steps), out)
    case _:
        sys.exit(__doc__)
