"""The paper's Tables VI, VII and IX, this project's figures beside them: sizes, operations, memory.

    python bench.py paper

Counted from shapes, but for the memory of finetuning where there is a GPU. Times of Tables VI and VII are
measured by bench.py train and decode; Tables III and IV are bench.py memory's, VIII is bench.py scores'.
"""
from functools import partial

import torch

from benches.common import PAPER, table
from benches.memory import account
from benches.train import shapes_of_rank, training_step
from checkpoint import random_model
from common.device import find_device, peak_memory, stored_bytes
from lowrank import attach_lora
from model import count_parameters, flops_per_token
from quant import quantize
from recompute import use_recompute

TARGETS = {"llama2-7b": ("q", "v"), "llama2-13b": ("q", "k", "v")}
FINETUNED = 512  # tokens of a finetuning step
DEFAULTS = {}

def row(of, what, quantity, value, paper, how="exact"):
    return dict(table=of, what=what, quantity=quantity, value=value, paper=paper, how=how)

def table_vi():
    """Tables VI and VII: sizes, and how many times fewer operations than at full rank a training step of 256
    tokens and an answer of 200 have."""
    rows = []
    for line, (size, *hours, seconds) in PAPER["VI"].items():
        name, rank = line.split()
        _, full, _, waited = PAPER["VI"][f"{name} 0"]
        dense, model = shapes_of_rank(name), shapes_of_rank(name, int(rank))
        training, answer = (flops_per_token(dense, tokens, learns) / flops_per_token(model, tokens, learns)
                            for tokens, learns in ((256, True), (200, False)))
        add = partial(row, "VI", f"{name} full" if rank == "0" else f"{name} r{rank}")
        parameters = count_parameters(model)
        quantize(model, 8)
        rows += [add("parameters, M", parameters / 1e6, size),
                 add("MB at 8 bit", stored_bytes(model) / 1e6, size),
                 add("training speed", training, [full / h for h in hours], "counted"),
                 add("inference speed", answer, waited / seconds, "counted")]
    parameters = count_parameters(shapes_of_rank("llama2-7b", 512, 512))
    return [*rows, row("VI", "llama2-7b r512, W^E too", "parameters, M", parameters / 1e6, 1320)]

def finetuning_peak(name, r, bits, device):
    """Peak bytes of a LoRA step on a GPU, batch 1."""
    model = random_model(name, bits=bits, device=device.torch_device)
    attach_lora(model, r, targets=TARGETS[name])
    use_recompute(model.train(), "block")
    torch.cuda.reset_peak_memory_stats()
    step = training_step(model, device, 1, FINETUNED, as_it_is=True)
    for _ in range(2):
        step(torch.bfloat16)
    return peak_memory(device.torch_device)

def table_ix(device):
    rows = []
    for line, (learn, memory, size, _) in PAPER["IX"].items():
        name, r, bits = line.split()
        r, bits, model = int(r), int(bits), shapes_of_rank(name).bfloat16()
        if bits < 16:
            quantize(model, bits)
        stored = stored_bytes(model)
        attach_lora(model, r, targets=TARGETS[name])
        learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
        if device.torch_device.type == "cuda":
            peak, how = finetuning_peak(name, r, bits, device), "measured"
        else:
            sizes = account(model, 1, FINETUNED, "block", optimizer_bytes=4)
            working = max(sizes.pop("block"), sizes.pop("loss"))
            peak, how = sum(sizes.values()) + working, "counted"
        add = partial(row, "IX", f"{name} r{r} {bits} bit")
        rows += [add("trainable parameters, M", learned / 1e6, learn), add("model GB", stored / 1e9, size),
                 add(f"finetuning GB, 1 x {FINETUNED}", peak / 1e9, memory, how)]
    return rows

def bench(args):
    device = find_device("float32")
    return device, table_vi() + table_ix(device)

def report(rows):
    """A table for each of the paper's, its numbers in brackets."""
    tables = {}
    for r in rows:
        title = f"Table {r['table']}"
        line = tables.setdefault(title, {}).setdefault(r["what"], {title: r["what"]})
        paper = r["paper"] if isinstance(r["paper"], list) else [r["paper"]]
        star = "*" if r["how"] == "counted" else ""
        beside = "" if r["paper"] is None else f" ({' / '.join(f'{p:.4g}' for p in paper)})"
        line[r["quantity"]] = f"{r['value']:.4g}{star}{beside}"
    note = "In brackets the paper's. Speeds are over full rank. * counted from operations or bytes, not run."
    return "\n\n".join([*(table(lines.values()) for lines in tables.values()), note])
