"""Times PEFT on the work of benches/trainer.rs; prints one line of JSON.

usage: reference.py STEPS float32|bfloat16 [MODEL]     without MODEL, SmolLM2-135M's shape with random weights
"""

import json
import resource
import sys
import time

import peft
import torch
import transformers

ROWS, LENGTH = 2, 256
steps, dtype = int(sys.argv[1]), getattr(torch, sys.argv[2])
torch.manual_seed(0)

if len(sys.argv) > 3:
    model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[3], dtype=dtype)
else:
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            max_position_embeddings=8192,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
        )
    ).to(dtype)
lora = peft.LoraConfig(r=8, lora_alpha=32, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
model = peft.get_peft_model(model, lora).train()
params = [p for p in model.parameters() if p.requires_grad]
adamw = torch.optim.AdamW(params, lr=2e-4)

times, cpu, losses = [], [], []
for step in range(steps):
    # The tokens of benches/trainer.rs: each row predicts its own next token, and one more at its end.
    flat = [(7919 * i + 31 * step) % 4000 + 20 for i in range(ROWS * (LENGTH + 1))]
    ids = torch.tensor(flat).reshape(ROWS, LENGTH + 1)
    start, start_cpu = time.perf_counter(), time.process_time()
    logits = model(input_ids=ids[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(params, 1.0)
    adamw.step()
    adamw.zero_grad()
    times.append(time.perf_counter() - start)
    cpu.append(time.process_time() - start_cpu)
    losses.append(loss.item())
    if step == 0:
        # Since this process began: the 22nd field of its status, in hundredths of a second since the machine did.
        began = float(open("/proc/self/stat").read().rsplit(")", 1)[1].split()[19]) / 100
        first_step = float(open("/proc/uptime").read().split()[0]) - began

rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
figures = {"seconds": times, "cpu_seconds": cpu, "peak_rss_bytes": rss, "losses": losses}
print(json.dumps(figures | {"threads": torch.get_num_threads(), "first_step_after_seconds": first_step}))
