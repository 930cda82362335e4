"""Training with torch, transformers and PEFT, as plainly as can be: what the engine is compared with.

A micro-batch is a list of rows; a row is (tokens, targets), targets already shifted, IGNORE where nothing is trained.
"""

import json

import torch
import torch.nn.functional as F
import transformers

IGNORE = 2**32 - 1  # tunesmith_engine::IGNORE


def load(model_dir, **options):
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, **options)
    return model.eval()


def padded(rows):
    """Right-padded tokens, attention mask and targets, as a default collator makes them."""
    longest = max(len(tokens) for tokens, _ in rows)
    ids, mask, targets = (torch.zeros(len(rows), longest, dtype=torch.long) for _ in range(3))
    targets.fill_(-100)
    for i, (row_tokens, row_targets) in enumerate(rows):
        ids[i, : len(row_tokens)] = torch.tensor(row_tokens)
        mask[i, : len(row_tokens)] = 1
        targets[i, : len(row_targets)] = torch.tensor([-100 if t == IGNORE else t for t in row_targets])
    return ids, mask, targets


def loss_sum(model, rows):
    ids, mask, targets = padded(rows)
    logits = model(input_ids=ids, attention_mask=mask).logits
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")


def trained_tokens(micro_batches):
    return sum(t != IGNORE for rows in micro_batches for _, targets in rows for t in targets)


def gradients(model, micro_batches):
    """Gradients of the mean loss over all trained tokens, by PEFT's file names, and that loss."""
    model.zero_grad()
    tokens = trained_tokens(micro_batches)
    total = 0.0
    for rows in micro_batches:
        loss = loss_sum(model, rows)
        (loss / tokens).backward()
        total += loss.item()
    named = {n.replace(".default", ""): p.grad for n, p in model.named_parameters() if p.requires_grad}
    return named, total / tokens


def train(model, run, steps):
    """Losses and gradient norms of a run (see `run_json`)."""
    optim, schedule = run["optim"], run["schedule"]
    params = [p for p in model.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(
        params,
        lr=schedule["peak"],
        betas=(optim["beta1"], optim["beta2"]),
        eps=optim["eps"],
        weight_decay=optim["weight_decay"],
    )
    scheduler = transformers.get_scheduler(schedule["kind"], adamw, schedule["warmup"], len(steps))
    losses, norms = [], []
    for micro_batches in steps:
        losses.append(gradients(model, micro_batches)[1])
        norms.append(torch.nn.utils.clip_grad_norm_(params, run["max_grad_norm"]).item())
        adamw.step()
        scheduler.step()
    return losses, norms


def run_json(lora_config, optim, schedule, max_grad_norm, steps):
    """What engine/tests/oracle/run.rs reads."""
    targets = lora_config.target_modules
    return {
        "lora": {
            "rank": lora_config.r,
            "alpha": lora_config.lora_alpha,
            "dropout": 0.0,
            "target_modules": targets if isinstance(targets, str) else sorted(targets),
            "use_rslora": lora_config.use_rslora,
            "use_dora": lora_config.use_dora,
            "bias": lora_config.bias,
            "modules_to_save": lora_config.modules_to_save or [],
            "rank_pattern": lora_config.rank_pattern,
            "alpha_pattern": lora_config.alpha_pattern,
            "seed": 0,
        },
        "optim": optim,
        "schedule": schedule,
        "max_grad_norm": max_grad_norm,
        "steps": [[packed(rows) for rows in micro_batches] for micro_batches in steps],
    }


def packed(rows):
    return {
        "tokens": [t for tokens, _ in rows for t in tokens],
        "targets": [t for _, targets in rows for t in targets],
        "row_lengths": [len(tokens) for tokens, _ in rows],
    }


def write_json(path, value):
    path.write_text(json.dumps(value, separators=(",", ":")) + "\n")
