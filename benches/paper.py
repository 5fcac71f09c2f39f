"""The paper's Tables V, VI and IX, this project's figures beside them, on the device at hand (Tables VII and VIII: eval, finetune; III and IV: memory).

    python bench.py paper

What can't run here is counted, and the column "how" says so. A GPU measures all of it, with random weights: times and memory of GPT-2 at
every rank, finetuning and generation of Llama2-7B and 13B at 4, 8 and 16 bit. A CPU measures products and GPT-2 127M.
"""
import time

import torch

from benches.common import interleaved, table
from benches.train import gpt2_of_rank, peak_of_one, training_step
from checkpoint import random_model
from lowrank import attach_lora, replace_linears
from memory import account, by_kind, meta_model
from model import count_parameters, flops_per_token, generate
from quant import quantize, stored_bytes
from recompute import head_loss, use_recompute
from runtime import find_device, matmul_rate, peak_memory

PAPER_V = {"float32": 19.5, "float16": 312, "int8": 624, "int4": 1248}  # data sheet of an A100, TFLOPS
PAPER_VI = {  # parameters, GPU hours of method 1
    ("gpt2", 0): (127.4e6, 138.7), ("gpt2", 192): (77.5e6, 121.0), ("gpt2", 96): (58.5e6, 117.2), ("gpt2", 48): (49.0e6, 116.4),
    ("gpt2-xl", 0): (1.56e9, 546.4), ("gpt2-xl", 384): (0.59e9, 416.3), ("gpt2-xl", 192): (0.34e9, 395.6), ("gpt2-xl", 96): (0.21e9, 399.6)}
TARGETS = {"llama2-7b": ("q", "v"), "llama2-13b": ("q", "k", "v")}
PAPER_IX = {  # (model, r, bits): trainable parameters, finetuning GB, model GB, seconds of generation
    ("llama2-7b", 8, 4): (4.2e6, 11.8, 5.1, 0.23), ("llama2-7b", 8, 8): (4.2e6, 14.2, 7.9, 0.13), ("llama2-7b", 8, 16): (4.2e6, 20.3, 13.4, 0.21),
    ("llama2-7b", 4, 16): (2.1e6, 20.3, 13.4, 0.21), ("llama2-7b", 16, 16): (8.4e6, 24.3, 13.4, 0.21),
    ("llama2-13b", 8, 4): (9.8e6, 17.7, 9.8, 0.78), ("llama2-13b", 8, 8): (9.8e6, 30.4, 15.5, 0.23), ("llama2-13b", 8, 16): (9.8e6, 32.7, 26.2, 0.39),
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
    rates = {"float32": matmul_rate(device, torch.float32), "bfloat16": matmul_rate(device, torch.bfloat16), "float16": matmul_rate(device, torch.float16),
             "int8": int8_rate(device)}
    return [row("V", name, "TFLOPS of a product", rate / 1e12, PAPER_V.get(name), "measured") for name, rate in rates.items()]


def low_rank(name, rank):
    model = meta_model(name)
    if rank:
        replace_linears(model, rank)
    return model


def table_vi(device, batch, length, rounds):
    """Parameters, bytes at 8 bit, and the time of a step over that of full rank: measured where the model can be trained here."""
    rows, gpu = [], device.torch_device.type == "cuda"
    for name, ranks in (("gpt2", (0, 192, 96, 48)), ("gpt2-xl", (0, 384, 192, 96))):
        how = "measured" if gpu or name == "gpt2" else "counted"
        cost = {rank: flops_per_token(low_rank(name, rank), length, training=True) for rank in ranks}
        if how == "measured":
            steps = {rank: training_step(gpt2_of_rank(name, rank, device), device, batch, length) for rank in ranks}
            cost = interleaved({rank: lambda step=step: step(device.dtype) for rank, step in steps.items()}, rounds)
            del steps
        for rank in ranks:
            what, (numbers, hours) = f"{name} {f'r{rank}' if rank else 'full'}", PAPER_VI[name, rank]
            model = low_rank(name, rank)
            rows.append(row("VI", what, "parameters, M", count_parameters(model) / 1e6, numbers / 1e6, "counted"))
            quantize(model, 8)
            rows.append(row("VI", what, "MB at 8 bit", stored_bytes(model) / 1e6, numbers / 1e6, "counted"))
            rows.append(row("VI", what, "training speed over full rank", cost[0] / cost[rank], PAPER_VI[name, 0][1] / hours, how))
            if how == "measured":
                memory = peak_of_one(name, rank, str(device.dtype)[6:], batch, length)
                rows.append(row("VI", what, "GB of a step", memory / 1e9, None, f"measured, {batch} x {length} tokens"))
    return rows


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


def seconds_of_generation(model, device, new=100):
    """Seconds for 100 tokens after 100 others, with the cache."""
    prompt = torch.randint(model.config.vocab_size, (100,), device=device).tolist()
    for _ in range(2):  # the first time warms up
        start = time.perf_counter()
        for _ in generate(model, [prompt], new, temperature=0):
            pass
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def table_ix(device, length):
    rows = []
    for (name, r, bits), (numbers, memory, size, seconds) in PAPER_IX.items():
        what, model = f"{name} r{r} {bits} bit", meta_model(name)
        if bits < 16:
            quantize(model, bits)
        stored = stored_bytes(model) if bits < 16 else 2 * count_parameters(model)
        attach_lora(model, r, targets=TARGETS[name])
        learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
        rows.append(row("IX", what, "trainable parameters, M", learned / 1e6, numbers / 1e6, "counted"))
        rows.append(row("IX", what, "model GB", stored / 1e9, size, "counted"))
        if device.type == "cuda":
            peak, model = finetuning_step(name, bits, r, device, length)
            rows.append(row("IX", what, "finetuning GB", peak / 1e9, memory, f"measured, 1 x {length} tokens"))
            rows.append(row("IX", what, "seconds of 100 + 100 tokens", seconds_of_generation(model.eval(), device), seconds, "measured"))
            del model
        else:
            kinds = by_kind(account(model, 1, length, torch.bfloat16, recompute="block"))
            rows.append(row("IX", what, "finetuning GB", sum(kinds.values()) / 1e9, memory, f"counted, 1 x {length} tokens"))
    return rows


def bench(args):
    device = find_device(args.dtype)
    torch.manual_seed(0)
    rows = table_v(device.torch_device) + table_vi(device, args.batch_size, args.seq_len, args.rounds) + table_ix(device.torch_device, args.length)
    print(f"the paper's tables on {device.name}; its machine: 8 A100")
    return device, rows


def report(rows):
    return table(rows, {"table": lambda r: r["table"], "what": lambda r: r["what"], "quantity": lambda r: r["quantity"],
                        "here": lambda r: f"{r['value']:.2f}", "paper": lambda r: f"{r['paper']:.2f}" if r["paper"] else "", "how": lambda r: r["how"]})


def arguments(p):
    p.add_argument("--dtype", default="auto", help="of training GPT-2: float32, bfloat16 or auto (default: %(default)s)")
    p.add_argument("--batch-size", type=int, default=4, help="sequences of a training step (default: %(default)s)")
    p.add_argument("--seq-len", type=int, default=256, help="tokens of each (default: %(default)s)")
    p.add_argument("--length", type=int, default=512, help="tokens of a finetuning step of Llama 2 (default: %(default)s)")
    p.add_argument("--rounds", type=int, default=3, help="timed rounds (default: %(default)s)")
