"""Finetuning smollm2-135m with LoRA: speed and memory against transformers + peft, and Table VIII's scores.

    python bench.py finetune                 tokens/s and peak memory, engines batch by batch in turn
    python bench.py finetune --quality       weighted F1 before and after (an hour or two on two cores)

All engines train on the same rows, with the same batch, rank and dtype; tokens are those of the rows, without
padding, for every engine. peft's batches are what its users have: rows in random order, padded to the
longest, logits of all tokens. Ours are tasks.rows.Batch.
"""
import gc
import importlib.util
import json
import multiprocessing
import os
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import torch

from benches.common import run_once, table
from checkpoint import load_model
from common.cli import InputError, say
from common.device import find_device, peak_memory
from common.formats import export
from common.loss import head_loss
from common.optimizers import make_optimizers
from finetune import read_task
from lowrank import attach_lora
from recompute import use_recompute
from tasks.rows import Batch, encode, pick

TARGETS = {"q": "q_proj", "k": "k_proj", "v": "v_proj"}
# Table VIII of the paper: weighted F1 of Llama2-7B untuned and after 8-bit LoRA
PAPER = {"fpb": (0.518, 0.850), "fiqa": (0.686, 0.860), "tfns": (0.809, 0.894)}
QUALITY = [("fpb", 8, 8), ("fpb", 4, 8), ("fpb", 16, 8), ("fpb", 16, 4), ("fpb", 16, 16), ("fiqa", 8, 8),
           ("tfns", 8, 8)]  # task, bits, rank


# ----------------------------------------------------------------------------- one engine, in its own process

def our_steps(args, bits, rows, device):
    """step(i) trains on the i-th batch of our order; it returns the tokens of its rows."""
    model, _ = load_model(args.base, device.torch_device, device.dtype, bits)
    attach_lora(model, args.rank, 32, list(TARGETS), 0.1)
    use_recompute(model, "sdpa").train()
    optimizer, = make_optimizers(model, 1e-3, 0.0)

    def step(i):
        batch = Batch(pick(rows, args.batch_size, 1, i), device=device.torch_device)
        with device.autocast():
            loss = head_loss(model.head, batch.hidden(model), batch.targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        return batch.size
    return step


def peft_steps(args, folder, rows, device):
    import peft
    from transformers import AutoModelForCausalLM, logging
    warnings.simplefilter("ignore", FutureWarning)
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=device.dtype).to(device.torch_device)
    config = peft.LoraConfig(r=args.rank, lora_alpha=32, lora_dropout=0.1, task_type="CAUSAL_LM",
                             target_modules=list(TARGETS.values()))
    model = peft.get_peft_model(model, config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1)).tolist()

    def step(n):
        mine = [rows[k] for k in order[n * args.batch_size:(n + 1) * args.batch_size]]
        shape = len(mine), max(len(r.ids) for r in mine)
        ids, attention = torch.zeros(shape, dtype=torch.long), torch.zeros(shape)
        labels = torch.full(shape, -100)
        for i, r in enumerate(mine):
            ids[i, :len(r.ids)] = torch.tensor(r.ids)
            labels[i, r.start:len(r.ids)] = torch.tensor(r.ids[r.start:])
            attention[i, :len(r.ids)] = 1
        ids, attention, labels = (t.to(device.torch_device) for t in (ids, attention, labels))
        model(input_ids=ids, attention_mask=attention, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return sum(len(r.ids) for r in mine)
    return step


def engine(connection, args, name, bits, folder, rows):
    """Answers each number with (seconds, tokens) of that batch, and None with the peak memory; then ends."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = find_device(args.dtype)
    step = our_steps(args, bits, rows, device) if name == "ours" else peft_steps(args, folder, rows, device)
    gc.collect()
    while (i := connection.recv()) is not None:
        start = time.perf_counter()
        tokens = step(i)
        if device.torch_device.type == "cuda":
            torch.cuda.synchronize()
        connection.send((time.perf_counter() - start, tokens))
    connection.send(peak_memory(device.torch_device))


# ----------------------------------------------------------------------------- all of them, in turn

def bench(args):
    if args.quality:
        return find_device("float32"), quality(args)
    device = find_device(args.dtype)
    args.dtype, args.threads = str(device.dtype)[6:], torch.get_num_threads()
    engines = [("ours", bits) for bits in args.bits]
    if importlib.util.find_spec("peft"):
        engines.append(("peft", 16))
    else:
        say("peft is not installed, its row is left out (pip install -r requirements-dev.txt)")
    print(f"{args.base}, r = {args.rank} on q, k, v, {args.batches} batches of {args.batch_size} rows, "
          f"{device.name}")
    with tempfile.TemporaryDirectory() as folder:
        rows = prepare(args, Path(folder) / "hf")
        return device, measure(args, engines, Path(folder) / "hf", rows)


def prepare(args, folder):
    """The base for transformers, and the rows of all engines."""
    model, tokenizer = load_model(args.base)
    export(model, tokenizer, folder)
    examples, _ = read_task(args.task if (Path(args.data_dir) / args.task).is_dir() else "made-up",
                            args.data_dir)
    count = args.batches * args.batch_size
    if len(examples) < count:
        raise InputError(f"--batches {args.batches} of {args.batch_size} rows are more than {len(examples)} "
                         f"rows of {args.task}")
    picked = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0))[:count].tolist()
    return [encode(tokenizer, examples[i].prompt, examples[i].answer, 512) for i in picked]


def measure(args, engines, folder, rows):
    spawn, running = multiprocessing.get_context("spawn"), {}
    for name, bits in engines:
        here, there = spawn.Pipe()
        process = spawn.Process(target=engine, args=(there, args, name, bits, folder, rows), daemon=True)
        process.start()
        running[name, bits] = here
        ask(here, 0)  # a warm-up, and loading does not disturb the others
    times, tokens = {key: [0.0] * args.rounds for key in running}, {}
    for r in range(args.rounds):
        tokens = dict.fromkeys(running, 0)
        for i in range(args.batches):
            for key, connection in running.items():
                seconds, count = ask(connection, i)
                times[key][r] += seconds
                tokens[key] += count
    if len(set(tokens.values())) != 1:
        raise InputError(f"the engines did not see the same tokens: {tokens}")
    return [dict(engine=name, base=args.base, bits=bits, rank=args.rank, dtype=args.dtype,
                 batch=args.batch_size, tokens=tokens[name, bits],
                 tokens_per_second=tokens[name, bits] / statistics.median(times[name, bits]),
                 peak_memory_bytes=ask(connection, None))
            for (name, bits), connection in running.items()]


def ask(connection, what):
    connection.send(what)
    try:
        return connection.recv()
    except EOFError:
        raise InputError("a process of the benchmark ended (its own lines above say why; with too little "
                         "memory: fewer --bits at once)") from None


# ----------------------------------------------------------------------------- Table VIII

def tuned(task, bits, rank, args):
    """The folder of a run of finetune.py; one that is there already is not repeated."""
    out = Path(args.out_dir) / f"{task}-{bits}bit-r{rank}-{args.max_iters}steps-{args.eval_limit}rows"
    run_once("finetune.py", out, "--base", args.base, "--task", task, "--bits", bits, "--rank", rank,
             "--eval-limit", args.eval_limit, "--max-iters", args.max_iters, "--data-dir", args.data_dir)
    return out


def quality(args):
    """A run for each line of the table."""
    rows = []
    for task, bits, rank in QUALITY:
        s = json.loads((tuned(task, bits, rank, args) / "summary.json").read_text())
        before, after = s["scores_before"][task], s["scores_after"][task]
        rows.append(dict(task=task, bits=bits, rank=rank, f1_before=before["f1"], f1_after=after["f1"],
                         interval=after["interval"], generated_before=before["f1_generated"],
                         generated_after=after["f1_generated"], majority=after["majority"],
                         rows=after["rows"],
                         trainable_parameters=s["trainable_parameters"], seconds=s["seconds"],
                         peak_memory_bytes=s["peak_memory_bytes"]))
    return rows


def report(rows):
    if "f1_after" in rows[0]:
        return table(rows, {
            "task": lambda r: r["task"], "bits": lambda r: r["bits"], "rank": lambda r: r["rank"],
            "learned": lambda r: f"{r['trainable_parameters'] / 1e6:.2f}M",
            "untuned": lambda r: f"{r['f1_before']:.3f}",
            "tuned": lambda r: f"{r['f1_after']:.3f}",
            "95%": lambda r: "{:.3f} to {:.3f}".format(*r["interval"]),
            "generated": lambda r: f"{r['generated_before']:.3f} -> {r['generated_after']:.3f}",
            "commonest": lambda r: f"{r['majority']:.3f}",
            "paper": lambda r: "{:.3f} -> {:.3f}".format(*PAPER[r["task"]]) if r["bits"] == 8 else ""})
    peer = next((r["tokens_per_second"] for r in rows if r["engine"] == "peft"), None)
    return table(rows, {
        "engine": lambda r: r["engine"], "bits": lambda r: r["bits"], "rank": lambda r: r["rank"],
            "dtype": lambda r: r["dtype"],
        "tokens/s": lambda r: f"{r['tokens_per_second']:.0f}",
            "over peft": lambda r: f"{r['tokens_per_second'] / peer:.2f}x" if peer else "-",
        "peak GB": lambda r: f"{r['peak_memory_bytes'] / 1e9:.2f}"})


def arguments(p):
    p.add_argument("--base", default="smollm2-135m", help="the model (default: %(default)s)")
    p.add_argument("--bits", type=lambda s: [int(b) for b in s.split(",")], default=[16, 8, 4],
                   help="of our bases (default: 16,8,4)")
    p.add_argument("--rank", type=int, default=8, help="of the adapters (default: %(default)s)")
    p.add_argument("--task", default="fpb", help="where the rows are from; made-up headlines where it is not "
                                                 "at hand (default: %(default)s)")
    p.add_argument("--data-dir", default=os.environ.get("DATA_DIR", "data"),
                   help="where the sets are (default: $DATA_DIR, then data/)")
    p.add_argument("--batch-size", type=int, default=16, help="rows (default: %(default)s)")
    p.add_argument("--batches", type=int, default=6, help="of a round (default: %(default)s)")
    p.add_argument("--rounds", type=int, default=3,
                   help="over the same rows; the median counts (default: %(default)s)")
    p.add_argument("--dtype", default="auto",
                   help="float32, bfloat16, or auto: the faster one here (default: %(default)s)")
    p.add_argument("--quality", action="store_true", help="scores instead of speed")
    p.add_argument("--max-iters", type=int, default=150,
                   help="with --quality: steps of each run (default: %(default)s)")
    p.add_argument("--eval-limit", type=int, default=2000,
                   help="with --quality: rows that are scored, of each task (default: %(default)s)")
    p.add_argument("--out-dir", default="out/quality",
                   help="with --quality: the folders of the runs (default: %(default)s)")
