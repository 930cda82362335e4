"""The example data as users have it: rows of differing length, of which only the assistant's words are trained.

usage: telecom.py prepare MODEL DATA.jsonl STEPS OUT.json    micro-batches of 8 rows, as engine::MicroBatch reads them
       telecom.py train MODEL BATCHES.json float32|bfloat16  times PEFT with padded rows; prints one line of JSON
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


def prepare(model, data, steps, out):
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    render = lambda messages, **more: tokenizer.apply_chat_template(messages, return_dict=False, **more)
    lines = open(data).read().splitlines()
    random.Random(7).shuffle(lines)
    batches = []
    for step in range(steps):
        batch = {"tokens": [], "targets": [], "row_lengths": []}
        for line in lines[step * ROWS : (step + 1) * ROWS]:
            messages = json.loads(line)["messages"]
            tokens = render(messages)
            trained = [False] * len(tokens)
            for i, message in enumerate(messages):
                if message["role"] == "assistant":
                    start = len(render(messages[:i], add_generation_prompt=True))
                    # Up to the end token, without the line break behind it.
                    end = len(render(messages[: i + 1])) - 1
                    trained[start:end] = [True] * (end - start)
            targets = [t if on else IGNORE for t, on in zip(tokens[1:], trained[1:])] + [IGNORE]
            batch["tokens"] += tokens
            batch["targets"] += targets
            batch["row_lengths"].append(len(tokens))
        batches.append(batch)
    json.dump(batches, open(out, "w"))


def padded(batch):
    longest = max(batch["row_lengths"])
    shape = (len(batch["row_lengths"]), longest)
    ids, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    targets = torch.full(shape, -100)
    at = 0
    for i, length in enumerate(batch["row_lengths"]):
        ids[i, :length] = torch.tensor(batch["tokens"][at : at + length])
        mask[i, :length] = 1
        targets[i, :length] = torch.tensor([-100 if t == IGNORE else t for t in batch["targets"][at : at + length]])
        at += length
    return ids, mask, targets


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
        ids, mask, targets = padded(batch)
        logits = model(input_ids=ids, attention_mask=mask).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
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


if sys.argv[1] == "prepare":
    prepare(sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5])
else:
    train(sys.argv[2], sys.argv[3], sys.argv[4])
