"""Finetuning smollm2-135m with LoRA: speed and memory against transformers + peft, in turn.

    python bench.py finetune

The same rows, batch, rank and dtype for all; tokens are counted without padding. peft's batches are what its
users have: rows in random order, padded to the longest, logits of all tokens. Ours are tasks.rows.Batch.
"""
import tempfile
from functools import partial
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from benches.common import DATA_DIR, Worker, installed, interleaved, table
from checkpoint import load_model
from common.cli import refuse
from common.device import find_device, peak_memory
from common.formats import export
from common.loss import head_loss
from common.optimizers import make_optimizers
from finetune import read_task
from lowrank import attach_lora
from recompute import use_recompute
from tasks.rows import Batch, encode, pick
from tasks.sets import draw

BATCHES = 6  # in a round
DEFAULTS = dict(base="smollm2-135m", bits=[16, 8, 4], rank=8, batch_size=16, rounds=3, dtype="auto")

def our_step(args, bits, rows, device):
    """step(i) trains on the i-th batch of our order; it returns the tokens of its rows."""
    model, _ = load_model(args.base, device.torch_device, device.dtype, bits)
    attach_lora(model, args.rank, 32, ["q", "k", "v"], 0.1)
    use_recompute(model, "sdpa").train()
    optimizer, = make_optimizers(model, 1e-3, 0.0)

    def step(i):
        batch = Batch(pick(rows, args.batch_size, 1, i), device=device.torch_device)
        with device.autocast():
            loss = head_loss(model.head, batch.hidden(model), batch.targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return batch.size
    return step

def pefts_step(args, folder, rows, device):
    import peft
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=device.dtype).to(device.torch_device)
    config = peft.LoraConfig(r=args.rank, lora_alpha=32, lora_dropout=0.1, task_type="CAUSAL_LM",
                             target_modules=["q_proj", "k_proj", "v_proj"])
    model = peft.get_peft_model(model, config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1)).tolist()

    def step(i):
        mine = [rows[k] for k in order[i * args.batch_size:(i + 1) * args.batch_size]]
        texts = [torch.tensor(r.ids, device=device.torch_device) for r in mine]
        ids, attention = pad_sequence(texts, True), pad_sequence([torch.ones_like(t) for t in texts], True)
        labels = ids.masked_fill(attention == 0, -100)
        for label, r in zip(labels, mine):
            label[:r.start] = -100
        model(input_ids=ids, attention_mask=attention, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return attention.sum().item()
    return step

def engine(args, name, bits, folder, rows):
    """For a Worker: a function that trains on all batches, and gives (their tokens, peak memory)."""
    torch.manual_seed(0)
    device = find_device(args.dtype)
    step = our_step(args, bits, rows, device) if name == "ours" else pefts_step(args, folder, rows, device)

    def train(_):
        tokens = sum(step(i) for i in range(BATCHES))
        if device.torch_device.type == "cuda":
            torch.cuda.synchronize()
        return tokens, peak_memory(device.torch_device)
    return train

def bench(args):
    device = find_device(args.dtype)
    args.dtype, keys = str(device.dtype)[6:], [("ours", bits) for bits in args.bits]
    if installed("peft"):
        keys.append(("peft", 16))
    model, tokenizer = load_model(args.base)
    task = "fpb" if (Path(DATA_DIR) / "fpb").is_dir() else "made-up"
    drawn = draw(read_task(task, DATA_DIR)[0], BATCHES * args.batch_size)
    refuse(len(drawn) < BATCHES * args.batch_size, f"{BATCHES} batches of --batch-size {args.batch_size} are "
           f"more than the {len(drawn)} rows of {task}")
    rows = [encode(tokenizer, example.prompt, example.answer, 512) for example in drawn]
    with tempfile.TemporaryDirectory() as folder:
        export(model, tokenizer, Path(folder) / "hf")
        workers = {key: Worker(engine, args, *key, Path(folder) / "hf", rows) for key in keys}
        found = interleaved({key: partial(workers[key].ask, None) for key in keys}, args.rounds)
    return device, [dict(engine=key[0], base=args.base, bits=key[1], rank=args.rank, dtype=args.dtype,
                         batch=args.batch_size, tokens=tokens, peak_memory_bytes=peak,
                         tokens_per_second=tokens / s) for key, (s, (tokens, peak)) in found.items()]

def report(rows):
    peer = [r["tokens_per_second"] for r in rows if r["engine"] == "peft"]
    return table(rows, first="engine bits rank dtype", columns={
        "tokens/s": ("tokens_per_second", "{:.0f}"),
        "over peft": lambda r: f"{r['tokens_per_second'] / peer[0]:.2f}x" if peer else None,
        "peak GB": ("peak_memory_bytes", "{:.2f}", 1e9)})
