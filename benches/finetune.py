"""Finetuning smollm2-135m with LoRA: speed and memory against transformers + peft, and Table VIII's scores.

    python bench.py finetune                 tokens/s and peak memory, engines in turn
    python bench.py finetune --quality       weighted F1 before and after (an hour or two on two cores)

All engines train on the same rows, with the same batch, rank and dtype; tokens are those of the rows, without
padding, for every engine. peft's batches are what its users have: rows in random order, padded to the
longest, logits of all tokens. Ours are tasks.rows.Batch.
"""
import tempfile
import warnings
from functools import partial
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from benches.common import DATA_DIR, Worker, installed, interleaved, run_once, shown, table
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

TARGETS = {"q": "q_proj", "k": "k_proj", "v": "v_proj"}
# Table VIII of the paper: weighted F1 of Llama2-7B untuned and after 8-bit LoRA
PAPER = {"fpb": "0.518 -> 0.850", "fiqa": "0.686 -> 0.860", "tfns": "0.809 -> 0.894"}
QUALITY = [("fpb", 8, 8), ("fpb", 4, 8), ("fpb", 16, 8), ("fpb", 16, 4), ("fpb", 16, 16), ("fiqa", 8, 8),
           ("tfns", 8, 8)]  # task, bits, rank
DEFAULTS = dict(base="smollm2-135m", bits="16,8,4", rank=8, task="fpb", data_dir=DATA_DIR, batch_size=16,
                batches=6, rounds=3, dtype="auto", quality=False, max_iters=150, eval_limit=2000,
                out_dir="out/quality")


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
        optimizer.zero_grad()
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
        texts = [torch.tensor(r.ids, device=device.torch_device) for r in mine]
        ids, attention = pad_sequence(texts, True), pad_sequence([torch.ones_like(t) for t in texts], True)
        labels = ids.masked_fill(attention == 0, -100)
        for label, r in zip(labels, mine):
            label[:r.start] = -100
        model(input_ids=ids, attention_mask=attention, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return sum(map(len, texts))
    return step


def engine(args, name, bits, folder, rows):
    """For a Worker: a function that trains on the i-th batch, and gives (its tokens, peak memory)."""
    torch.manual_seed(0)
    device = find_device(args.dtype)
    step = our_steps(args, bits, rows, device) if name == "ours" else peft_steps(args, folder, rows, device)

    def train(i):
        tokens = step(i)
        if device.torch_device.type == "cuda":
            torch.cuda.synchronize()
        return tokens, peak_memory(device.torch_device)
    return train


def bench(args):
    device = find_device("float32" if args.quality else args.dtype)
    if args.quality:
        return device, quality(args)
    args.dtype, engines = str(device.dtype)[6:], [("ours", bits) for bits in args.bits]
    if installed("peft"):
        engines.append(("peft", 16))
    there = (Path(args.data_dir) / args.task).is_dir()
    examples, _ = read_task(args.task if there else "made-up", args.data_dir)
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = load_model(args.base)
        export(model, tokenizer, Path(folder) / "hf")
        drawn = draw(examples, args.batches * args.batch_size)
        refuse(len(drawn) < args.batches * args.batch_size, f"--batches {args.batches} of {args.batch_size} "
               f"rows are more than the {len(drawn)} there are")
        rows = [encode(tokenizer, example.prompt, example.answer, 512) for example in drawn]
        return device, measure(args, engines, Path(folder) / "hf", rows)


def measure(args, engines, folder, rows):
    """A round of an engine is all batches, one after the other."""
    workers = {key: Worker(engine, args, *key, folder, rows) for key in engines}
    tokens, peaks = {}, {}

    def train(key):
        tokens[key] = 0
        for i in range(args.batches):
            count, peaks[key] = workers[key].ask(i)
            tokens[key] += count
    seconds = interleaved({key: partial(train, key) for key in engines}, args.rounds)
    refuse(len(set(tokens.values())) > 1, f"the engines did not see the same tokens: {tokens}")
    return [dict(engine=key[0], base=args.base, bits=key[1], rank=args.rank, dtype=args.dtype,
                 batch=args.batch_size, tokens=tokens[key], peak_memory_bytes=peaks[key],
                 tokens_per_second=tokens[key] / seconds[key]) for key in engines]


def quality(args):
    """Table VIII: a run of finetune.py for each line."""
    rows = []
    for task, bits, rank in QUALITY:
        out = Path(args.out_dir) / f"{task}-{bits}bit-r{rank}-{args.max_iters}steps-{args.eval_limit}rows"
        s = run_once("finetune.py", out, "--base", args.base, "--task", task, "--bits", bits, "--rank", rank,
                     "--eval-limit", args.eval_limit, "--max-iters", args.max_iters,
                     "--data-dir", args.data_dir)
        before, after = s["scores_before"][task], s["scores_after"][task]
        rows.append(dict(
            task=task, bits=bits, rank=rank, f1_before=before["f1"], f1_after=after["f1"],
            interval=after["interval"], generated_before=before["f1_generated"],
            generated_after=after["f1_generated"], majority=after["majority"], rows=after["rows"],
            trainable_parameters=s["trainable_parameters"], seconds=s["seconds"],
            peak_memory_bytes=s["peak_memory_bytes"]))
    return rows


def report(rows):
    if "f1_after" in rows[0]:
        rows = shown(rows, interval=lambda r: "{:.3f} to {:.3f}".format(*r["interval"]),
                     generated=lambda r: f"{r['generated_before']:.3f} -> {r['generated_after']:.3f}",
                     paper=lambda r: PAPER[r["task"]] if r["bits"] == 8 else "")
        return table(rows, {
            "task": "task", "bits": "bits", "rank": "rank",
            "learned": ("trainable_parameters", "{:.2f}M", 1e6), "untuned": ("f1_before", "{:.3f}"),
            "tuned": ("f1_after", "{:.3f}"), "95%": "interval",
            "generated": "generated", "commonest": ("majority", "{:.3f}"), "paper": "paper"})
    peers = [r["tokens_per_second"] for r in rows if r["engine"] == "peft"]
    rows = shown(rows, over=lambda r: f"{r['tokens_per_second'] / peers[0]:.2f}x" if peers else "-")
    return table(rows, {
        "engine": "engine", "bits": "bits", "rank": "rank", "dtype": "dtype",
        "tokens/s": ("tokens_per_second", "{:.0f}"), "over peft": "over",
        "peak GB": ("peak_memory_bytes", "{:.2f}", 1e9)})
