"""The paper's Tables V, VI, VII and IX, this project's figures beside them, on the device at hand.

    python bench.py paper               sizes, speeds, memory (III, IV: bench.py memory; VIII: finetune)

What can't run here is counted, and a star says so. A GPU measures all of it, with random weights: times and
memory of GPT-2 at every rank, finetuning and generation of Llama2-7B and 13B at 4, 8 and 16 bit. A CPU
measures products and GPT-2 127M.
"""
import time

import torch

from benches.account import account, by_kind, meta_model
from benches.common import interleaved, table
from benches.train import gpt2_of_rank, peak_of_one, training_step
from checkpoint import random_model
from common.device import find_device, matmul_rate, peak_memory
from common.generate import generate
from common.loss import head_loss
from lowrank import attach_lora, replace_linears
from model import count_parameters, flops_per_token
from quant import quantize, stored_bytes
from recompute import use_recompute

PAPER_V = {"float32": 19.5, "float16": 312, "int8": 624, "int4": 1248}  # data sheet of an A100, TFLOPS
PAPER_VI = {  # parameters (as many bytes at 8 bit), GPU hours of methods 1 and 2, seconds of an answer
    ("gpt2", 0): (127.4e6, 138.7, 138.7, 0.06), ("gpt2", 192): (77.5e6, 121.0, 120.1, 0.05),
    ("gpt2", 96): (58.5e6, 117.2, 116.9, 0.05),
    ("gpt2", 48): (49.0e6, 116.4, 115.9, 0.05), ("gpt2-xl", 0): (1.56e9, 546.4, 546.4, 0.43),
    ("gpt2-xl", 384): (0.59e9, 416.3, 414.2, 0.23),
    ("gpt2-xl", 192): (0.34e9, 395.6, 401.9, 0.23), ("gpt2-xl", 96): (0.21e9, 399.6, 398.4, 0.23)}
TARGETS = {"llama2-7b": ("q", "v"), "llama2-13b": ("q", "k", "v")}
PAPER_IX = {  # (model, r, bits): trainable parameters, finetuning GB, model GB, seconds of generation
    ("llama2-7b", 8, 4): (4.2e6, 11.8, 5.1, 0.23), ("llama2-7b", 8, 8): (4.2e6, 14.2, 7.9, 0.13),
    ("llama2-7b", 8, 16): (4.2e6, 20.3, 13.4, 0.21),
    ("llama2-7b", 4, 16): (2.1e6, 20.3, 13.4, 0.21), ("llama2-7b", 16, 16): (8.4e6, 24.3, 13.4, 0.21),
    ("llama2-13b", 8, 4): (9.8e6, 17.7, 9.8, 0.78), ("llama2-13b", 8, 8): (9.8e6, 30.4, 15.5, 0.23),
    ("llama2-13b", 8, 16): (9.8e6, 32.7, 26.2, 0.39),
    ("llama2-13b", 4, 16): (4.9e6, 32.7, 26.2, 0.39), ("llama2-13b", 16, 16): (19.6e6, 33.0, 26.2, 0.39)}


def row(of, what, quantity, value, paper, how):
    return dict(table=of, what=what, quantity=quantity, value=value, paper=paper, how=how)


def int8_rate(device, n=2048):
    """Operations a second of an int8 product with 32-bit sums, by torch's own."""
    a = torch.ones(n, n, dtype=torch.int8, device=device)
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        torch._int_mm(a, a)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n ** 3 / best


def table_v(device):
    """TFLOPS of a square product at each precision."""
    rates = {"float32": matmul_rate(device, torch.float32), "bfloat16": matmul_rate(device, torch.bfloat16),
             "float16": matmul_rate(device, torch.float16),
             "int8": int8_rate(device)}
    return [row("V", name, "TFLOPS", rate / 1e12, PAPER_V.get(name), "measured")
            for name, rate in rates.items()]


def low_rank(name, rank):
    model = meta_model(name)
    if rank:
        replace_linears(model, rank)
    return model


def table_vi(device, batch, length, rounds):
    """Tables VI and VII: sizes, and the times of a training step and of an answer over those at full rank,
    measured where the model can be trained here."""
    rows, gpu = [], device.torch_device.type == "cuda"
    for name, ranks in (("gpt2", (0, 192, 96, 48)), ("gpt2-xl", (0, 384, 192, 96))):
        measured = gpu or name == "gpt2"
        training = {rank: flops_per_token(low_rank(name, rank), length, training=True) for rank in ranks}
        answers = {rank: flops_per_token(low_rank(name, rank), 200, training=False) for rank in ranks}
        if measured:
            models = {rank: gpt2_of_rank(name, rank, device) for rank in ranks}
            steps = {rank: training_step(model, device, batch, length) for rank, model in models.items()}
            training = interleaved({rank: lambda step=step: step(device.dtype)
                                    for rank, step in steps.items()}, rounds)
            del steps
            answers = interleaved({rank: lambda model=model: answer(model, device)
                                   for rank, model in models.items()}, rounds)
            del models
        how = "measured" if measured else "counted"
        for rank in ranks:
            what = f"{name} r{rank}" if rank else f"{name} full"
            numbers, *hours, seconds = PAPER_VI[name, rank]
            full = PAPER_VI[name, 0]
            model = low_rank(name, rank)
            rows.append(row("VI", what, "parameters, M", count_parameters(model) / 1e6, numbers / 1e6,
                            "exact"))
            quantize(model, 8)
            rows.append(row("VI", what, "MB at 8 bit", stored_bytes(model) / 1e6, numbers / 1e6, "exact"))
            rows.append(row("VI", what, "training speed", training[0] / training[rank],
                            [full[1] / h for h in hours], how))
            rows.append(row("VI", what, "inference speed", answers[0] / answers[rank], full[3] / seconds,
                            how))
            if measured:
                memory = peak_of_one(name, rank, str(device.dtype)[6:], batch, length)
                rows.append(row("VI", what, f"GB of a step of {batch} x {length}", memory / 1e9, None, how))
    model = meta_model("llama2-7b")
    replace_linears(model, 512, embedding_rank=512)
    return rows + [row("VI", "llama2-7b r512, W^E too", "parameters, M", count_parameters(model) / 1e6, 1320,
                       "exact")]


def finetuning_step(name, bits, r, device, length):
    """Peak bytes of a LoRA step on one GPU, batch 1."""
    model = random_model(name, bits=bits, device=device, dtype=torch.bfloat16)
    attach_lora(model, r, targets=TARGETS[name])
    use_recompute(model.train(), "block")
    torch.cuda.reset_peak_memory_stats()
    tokens = torch.randint(model.config.vocab_size, (1, length + 1), device=device)
    for _ in range(2):
        with torch.autocast("cuda", torch.bfloat16):
            loss = head_loss(model.head, model.hidden(tokens[:, :-1]), tokens[:, 1:])
        loss.backward()
    return peak_memory(device), model


def answer(model, device):
    """100 tokens after 100 others, with the cache."""
    prompt = torch.arange(100).tolist()
    with device.autocast():
        for _ in generate(model.eval(), [prompt], 100, temperature=0):
            pass


def seconds_of_answer(model, device):
    answer(model, device)  # a warm-up
    torch.cuda.synchronize()
    start = time.perf_counter()
    answer(model, device)
    torch.cuda.synchronize()
    return time.perf_counter() - start


def table_ix(device, length):
    rows = []
    for (name, r, bits), (numbers, memory, size, seconds) in PAPER_IX.items():
        what, model = f"{name} r{r} {bits} bit", meta_model(name).bfloat16()
        if bits < 16:
            quantize(model, bits)
        stored = stored_bytes(model) if bits < 16 else 2 * count_parameters(model)
        attach_lora(model, r, targets=TARGETS[name])
        learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
        rows.append(row("IX", what, "trainable parameters, M", learned / 1e6, numbers / 1e6, "exact"))
        rows.append(row("IX", what, "model GB", stored / 1e9, size, "exact"))
        if device.torch_device.type == "cuda":
            peak, model = finetuning_step(name, bits, r, device.torch_device, length)
            rows.append(row("IX", what, f"finetuning GB, 1 x {length}", peak / 1e9, memory, "measured"))
            rows.append(row("IX", what, "seconds of 100 + 100 tokens", seconds_of_answer(model, device),
                            seconds, "measured"))
            del model
        else:
            kinds = by_kind(account(model, 1, length, torch.bfloat16, recompute="block"))
            rows.append(row("IX", what, f"finetuning GB, 1 x {length}", sum(kinds.values()) / 1e9, memory,
                            "counted"))
    return rows


def bench(args):
    device = find_device(args.dtype)
    torch.manual_seed(0)
    rows = table_v(device.torch_device) + table_vi(device, args.batch_size, args.seq_len,
                                                   args.rounds) + table_ix(device, args.length)
    print(f"the paper's tables on {device.name}; its machine: 8 A100")
    return device, rows


def cell(r):
    if r is None:
        return ""
    star = "*" if r["how"] == "counted" else ""
    if r["paper"] is None:
        return f"{r['value']:.4g}{star}"
    paper = r["paper"] if isinstance(r["paper"], list) else [r["paper"]]
    return f"{r['value']:.4g}{star} ({' / '.join(f'{p:.4g}' for p in paper)})"


def report(rows):
    """A table for each of the paper's, its numbers in brackets."""
    tables = []
    for name in dict.fromkeys(r["table"] for r in rows):
        own = {(r["what"], r["quantity"]): r for r in rows if r["table"] == name}
        columns = {f"Table {name}": lambda what: what}
        for quantity in dict.fromkeys(quantity for _, quantity in own):
            columns[quantity] = lambda what, q=quantity, own=own: cell(own.get((what, q)))
        tables.append(table(list(dict.fromkeys(what for what, _ in own)), columns))
    note = "In brackets the paper's. Speeds are over full rank. * counted from operations or bytes, not run."
    return "\n\n".join([*tables, note])


def arguments(p):
    p.add_argument("--dtype", default="auto",
                   help="of training GPT-2: float32, bfloat16 or auto (default: %(default)s)")
    p.add_argument("--batch-size", type=int, default=4,
                   help="sequences of a training step (default: %(default)s)")
    p.add_argument("--seq-len", type=int, default=256, help="tokens of each (default: %(default)s)")
    p.add_argument("--length", type=int, default=512,
                   help="tokens of a finetuning step of Llama 2 (default: %(default)s)")
    p.add_argument("--rounds", type=int, default=3, help="timed rounds (default: %(default)s)")
