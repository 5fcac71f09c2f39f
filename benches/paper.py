"""The paper's Tables V, VI, VII and IX, this project's figures beside them, on the device at hand.

    python bench.py paper               sizes, speeds, memory (III, IV: bench.py memory; VIII: chance, scores)

What can't run here is counted, and a star says so. With random weights, a GPU measures GPT-2 at every rank
and the finetuning of Llama2-7B and 13B at 4, 8 and 16 bit; a CPU measures products and GPT-2 127M. Speeds are
over full rank, timed in turn in the same run.
"""
from functools import partial
from types import SimpleNamespace

import torch

from benches import train
from benches.common import PAPER, interleaved, table
from benches.memory import account, by_kind, meta_model
from checkpoint import random_model
from common.cli import refuse
from common.device import find_device, matmul_rate, peak_memory, stored_bytes
from common.generate import generate
from lowrank import attach_lora, replace_linears
from model import count_parameters, flops_per_token
from quant import quantize
from recompute import use_recompute

TARGETS = {"llama2-7b": ("q", "v"), "llama2-13b": ("q", "k", "v")}
FINETUNED = 512  # tokens of a finetuning step
DEFAULTS = dict(dtype="auto", tables=["V", "VI", "IX"])


def row(of, what, quantity, value, paper, how="exact"):
    return dict(table=of, what=what, quantity=quantity, value=value, paper=paper, how=how)


def table_v(device):
    """TFLOPS of a square product at each precision, int8 with sums of 32 bit."""
    rates = {d: matmul_rate(device.torch_device, getattr(torch, d)) for d in ("float32", "bfloat16", "float16")}
    a = torch.ones(2048, 2048, dtype=torch.int8, device=device.torch_device)
    rates["int8"] = 2 * 2048 ** 3 / interleaved({0: partial(torch._int_mm, a, a)}, 5)[0]
    return [row("V", d, "TFLOPS", rate / 1e12, PAPER["V"].get(d), "measured") for d, rate in rates.items()]


def answer(model, device):
    """100 tokens after 100 others, with the cache."""
    with device.autocast():
        list(generate(model.eval(), [list(range(100))], 100, temperature=0))


def speeds(name, shapes, device):
    """(seconds or operations of a training step's token, of an answer, GB of a step): each {rank: value}."""
    if device.torch_device.type != "cuda" and name != "gpt2":
        training = {rank: flops_per_token(m, train.DEFAULTS["seq_len"], True) for rank, m in shapes.items()}
        return training, {rank: flops_per_token(m, 200, False) for rank, m in shapes.items()}, {}
    flags = train.DEFAULTS | dict(model=name, ranks=list(shapes), dtypes=[str(device.dtype)[6:]])
    _, steps = train.bench(SimpleNamespace(**flags))
    models = {rank: train.gpt2_of_rank(name, rank, device) for rank in shapes}
    answers = interleaved({rank: partial(answer, model, device) for rank, model in models.items()}, 3)
    training = {r["rank"]: 1 / r["tokens_per_second"] for r in steps}
    return training, answers, {r["rank"]: r["peak_memory_bytes"] / 1e9 for r in steps}


def table_vi(device):
    """Tables VI and VII: sizes, and the times of a training step and of an answer over those at full rank."""
    rows = []
    for name, ranks in (("gpt2", (0, 192, 96, 48)), ("gpt2-xl", (0, 384, 192, 96))):
        shapes = {rank: train.shapes_of_rank(name, rank) for rank in ranks}
        training, answers, peaks = speeds(name, shapes, device)
        how, (_, full, _, waited) = "measured" if peaks else "counted", PAPER["VI"][f"{name} 0"]
        for rank, model in shapes.items():
            add = partial(row, "VI", f"{name} r{rank}" if rank else f"{name} full")
            size, *hours, seconds = PAPER["VI"][f"{name} {rank}"]
            rows.append(add("parameters, M", count_parameters(model) / 1e6, size))
            quantize(model, 8)
            rows.append(add("MB at 8 bit", stored_bytes(model) / 1e6, size))
            faster = training[0] / training[rank]
            rows.append(add("training speed", faster, [full / h for h in hours], how))
            rows.append(add("inference speed", answers[0] / answers[rank], waited / seconds, how))
            if peaks:
                rows.append(add("GB of a step of 4 x 256", peaks[rank], None, how))
    model = meta_model("llama2-7b")
    replace_linears(model, 512, embedding_rank=512)
    return [*rows, row("VI", "llama2-7b r512, W^E too", "parameters, M", count_parameters(model) / 1e6, 1320)]


def finetuning_peak(name, r, bits, device):
    """Peak bytes of a LoRA step on a GPU, batch 1."""
    model = random_model(name, bits=bits, device=device.torch_device)
    attach_lora(model, r, targets=TARGETS[name])
    use_recompute(model.train(), "block")
    torch.cuda.reset_peak_memory_stats()
    step = train.training_step(model, device, 1, FINETUNED, as_it_is=True)
    for _ in range(2):
        step(torch.bfloat16)
    return peak_memory(device.torch_device)


def table_ix(device):
    rows = []
    for line, (learn, memory, size, _) in PAPER["IX"].items():
        name, r, bits = line.split()
        r, bits, model = int(r), int(bits), meta_model(name).bfloat16()
        if bits < 16:
            quantize(model, bits)
        add, stored = partial(row, "IX", f"{name} r{r} {bits} bit"), stored_bytes(model)
        attach_lora(model, r, targets=TARGETS[name])
        learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
        rows.append(add("trainable parameters, M", learned / 1e6, learn))
        rows.append(add("model GB", stored / 1e9, size))
        if device.torch_device.type == "cuda":
            peak, how = finetuning_peak(name, r, bits, device), "measured"
        else:
            kinds = by_kind(account(model, 1, FINETUNED, torch.bfloat16, recompute="block"))
            peak, how = sum(kinds.values()), "counted"
        rows.append(add(f"finetuning GB, 1 x {FINETUNED}", peak / 1e9, memory, how))
    return rows


def bench(args):
    device, makers = find_device(args.dtype), {"V": table_v, "VI": table_vi, "IX": table_ix}
    for name in args.tables:
        refuse(name not in makers, f"--tables {name!r} is not among {', '.join(makers)}")
    return device, sum((makers[name](device) for name in args.tables), [])


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
