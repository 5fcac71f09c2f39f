"""The paper's Tables V, VI, VII and IX, this project's figures beside them, on the device at hand.

    python bench.py paper               sizes, speeds, memory (III, IV: bench.py memory; VIII: finetune)

What can't run here is counted, and a star says so. A GPU measures all of it, with random weights: times and
memory of GPT-2 at every rank, finetuning and generation of Llama2-7B and 13B at 4, 8 and 16 bit. A CPU
measures products and GPT-2 127M. Speeds are over full rank, timed in turn in the same run.
"""
from functools import partial

import torch

from benches.common import PAPER, interleaved, own_columns
from benches.memory import account, by_kind, meta_model
from benches.train import gpt2_of_rank, peak_of_one, shapes_of_rank, training_step
from checkpoint import random_model
from common.cli import refuse
from common.device import find_device, matmul_rate, peak_memory, stored_bytes
from common.generate import generate
from common.loss import head_loss
from lowrank import attach_lora, replace_linears
from model import count_parameters, flops_per_token
from quant import quantize
from recompute import use_recompute

TARGETS = {"llama2-7b": ("q", "v"), "llama2-13b": ("q", "k", "v")}
FINETUNED = 512  # tokens of a finetuning step
DEFAULTS = dict(dtype="auto", batch_size=4, seq_len=256, rounds=3, tables="V,VI,IX")


def row(of, what, quantity, value, paper, how):
    return dict(table=of, what=what, quantity=quantity, value=value, paper=paper, how=how)


def table_v(device):
    """TFLOPS of a square product at each precision, int8 with sums of 32 bit."""
    rates = {d: matmul_rate(device, getattr(torch, d)) for d in ("float32", "bfloat16", "float16")}
    a = torch.ones(2048, 2048, dtype=torch.int8, device=device)
    rates["int8"] = 2 * 2048 ** 3 / interleaved({0: partial(torch._int_mm, a, a)}, 5)[0]
    return [row("V", d, "TFLOPS", rate / 1e12, PAPER["V"].get(d), "measured") for d, rate in rates.items()]


def answer(model, device):
    """100 tokens after 100 others, with the cache."""
    with device.autocast():
        list(generate(model.eval(), [list(range(100))], 100, temperature=0))


def table_vi(device, batch, length, rounds):
    """Tables VI and VII: sizes, and the times of a training step and of an answer over those at full rank,
    measured where the model can be trained here."""
    rows = []
    for name, ranks in (("gpt2", (0, 192, 96, 48)), ("gpt2-xl", (0, 384, 192, 96))):
        shapes = {rank: shapes_of_rank(name, rank) for rank in ranks}
        how = "measured" if device.torch_device.type == "cuda" or name == "gpt2" else "counted"
        if how == "measured":
            models = {rank: gpt2_of_rank(name, rank, device) for rank in ranks}
            steps = {rank: training_step(models[rank], device, batch, length) for rank in ranks}
            training = interleaved({rank: partial(steps[rank], device.dtype) for rank in ranks}, rounds)
            del steps
            answers = interleaved({rank: partial(answer, models[rank], device) for rank in ranks}, rounds)
            del models
        else:
            training = {rank: flops_per_token(shapes[rank], length, training=True) for rank in ranks}
            answers = {rank: flops_per_token(shapes[rank], 200, training=False) for rank in ranks}
        full = PAPER["VI"][f"{name} 0"]
        for rank, model in shapes.items():
            add = partial(row, "VI", f"{name} r{rank}" if rank else f"{name} full")
            size, *hours, seconds = PAPER["VI"][f"{name} {rank}"]
            paper = [full[1] / h for h in hours]
            rows.append(add("parameters, M", count_parameters(model) / 1e6, size, "exact"))
            quantize(model, 8)
            rows.append(add("MB at 8 bit", stored_bytes(model) / 1e6, size, "exact"))
            rows.append(add("training speed", training[0] / training[rank], paper, how))
            rows.append(add("inference speed", answers[0] / answers[rank], full[3] / seconds, how))
            if how == "measured":
                peak = peak_of_one(name, rank, str(device.dtype)[6:], batch, length)
                rows.append(add(f"GB of a step of {batch} x {length}", peak / 1e9, None, how))
    model = meta_model("llama2-7b")
    replace_linears(model, 512, embedding_rank=512)
    count = count_parameters(model) / 1e6
    return [*rows, row("VI", "llama2-7b r512, W^E too", "parameters, M", count, 1320, "exact")]


def finetuning_step(name, bits, r, device):
    """Peak bytes of a LoRA step on one GPU, batch 1; and the model."""
    model = random_model(name, bits=bits, device=device, dtype=torch.bfloat16)
    attach_lora(model, r, targets=TARGETS[name])
    use_recompute(model.train(), "block")
    torch.cuda.reset_peak_memory_stats()
    tokens = torch.randint(model.config.vocab_size, (1, FINETUNED + 1), device=device)
    for _ in range(2):
        with torch.autocast("cuda", torch.bfloat16):
            loss = head_loss(model.head, model.hidden(tokens[:, :-1]), tokens[:, 1:])
        loss.backward()
    return peak_memory(device), model


def table_ix(device):
    rows = []
    for line, (learn, memory, size, seconds) in PAPER["IX"].items():
        name, r, bits = line.split()
        r, bits, model = int(r), int(bits), meta_model(name).bfloat16()
        if bits < 16:
            quantize(model, bits)
        stored = stored_bytes(model) if bits < 16 else 2 * count_parameters(model)
        attach_lora(model, r, targets=TARGETS[name])
        learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
        add = partial(row, "IX", f"{name} r{r} {bits} bit")
        rows.append(add("trainable parameters, M", learned / 1e6, learn, "exact"))
        rows.append(add("model GB", stored / 1e9, size, "exact"))
        if device.torch_device.type == "cuda":
            peak, model = finetuning_step(name, bits, r, device.torch_device)
            rows.append(add(f"finetuning GB, 1 x {FINETUNED}", peak / 1e9, memory, "measured"))
            took = interleaved({0: partial(answer, model, device)}, 1)[0]
            rows.append(add("seconds of 100 + 100 tokens", took, seconds, "measured"))
        else:
            kinds = by_kind(account(model, 1, FINETUNED, torch.bfloat16, recompute="block"))
            rows.append(add(f"finetuning GB, 1 x {FINETUNED}", sum(kinds.values()) / 1e9, memory, "counted"))
    return rows


def bench(args):
    device = find_device(args.dtype)
    torch.manual_seed(0)
    tables = {"V": partial(table_v, device.torch_device), "IX": partial(table_ix, device),
              "VI": partial(table_vi, device, args.batch_size, args.seq_len, args.rounds)}
    for name in args.tables:
        refuse(name not in tables, f"--tables {name!r} is not among {', '.join(tables)}")
    return device, [row for name in args.tables for row in tables[name]()]


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
    texts = []
    for lines in tables.values():
        empty = dict.fromkeys(title for line in lines.values() for title in line)
        texts.append(own_columns([empty | line for line in lines.values()]))
    note = "In brackets the paper's. Speeds are over full rank. * counted from operations or bytes, not run."
    return "\n\n".join([*texts, note])
