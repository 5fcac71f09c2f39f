"""Finetune a pretrained model with LoRA on its frozen, quantized weights (sections V.B and VI.C of the paper, equation 7).

    torchrun finetune.py                                     8-bit smollm2-135m, r = 8 on q, k, v, financial sentiment; a few minutes
    python finetune.py --task fpb --bits 4 --start loftq     one task, 4 bits, A and B begin with what the rounding lost
    python finetune.py --task my_rows.json --rank 16         your own {"instruction": ..., "input": ..., "output": ...} rows
    torchrun --nproc_per_node 2 finetune.py --base llama2-7b --bits 4 --targets q,v --recompute block
    python finetune.py --resume                              go on after Ctrl-C, a kill or a power cut

It leaves OUT/ as an adapter in PEFT's format (python sample.py --model BASE --bits 8 --adapter OUT), with metrics.jsonl, summary.json,
loss.png, heldout.json (which rows were kept for testing) and the state to resume from.

Why it fits: W never changes, so it needs no gradient and no moments and may be integers; A and B are a thousandth of it. Why it is fast:

    what is not computed                        because
    gradients of W, and all below the first A   nothing there learns (autograd leaves it out by itself)
    logits of the prompt's tokens               the loss is on the answer: four of seventy tokens; a head costs as much as eight blocks
    padding, the instruction again and again    instructions.py

Data parallel under torchrun: every process has the base and its part of the batch; one sum of all gradients, 1.8 MB, goes around a step.
With --bits 16 --shard the base is spread over the processes as well (shard.py), for one of which no GPU can hold a copy.
"""
import argparse
import json
import math
import os
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import eval as evaluation
from checkpoint import load_model, locate, read_config
from common.adapters import FILES, adaptable, base_id, bits_of, load_adapter, save_adapter
from common.cli import InputError, StopSignal, check_folder, check_positive, command, say, write_atomic
from common.device import find_device, peak_memory
from common.folder import RunFolder, plot_losses
from common.formats import open_source
from common.loss import head_loss
from common.processes import rank, world_size
from common.storage import read_state, replace_state
from common.training import (
    all_reduce,
    already_done,
    check_numbers,
    check_rows,
    learning_rate,
    make_optimizers,
    not_finite,
    optimizer_tensors,
    refuse_to_save,
    restarted,
    restore_optimizers,
    restored_arguments,
    set_aside,
    set_rate,
    step_all,
)
from common.watchdog import Watchdog
from lowrank import LoRALinear, attach_lora, start_from_error
from recompute import MODES, use_recompute
from tasks import sets
from tasks.rows import Batch, encode, made_up_headlines, pick, read_alpaca

SENTIMENT = ("fpb", "fiqa", "tfns")
# What a resumed run may not change: with another value it would not be the same run.
FIXED = ("base", "bits", "rank", "alpha", "dropout", "targets", "start", "task", "seq_len", "seed")

WHOLE = ("--shard spreads parameters, and the integers of {} are none: leave it out (each process copies the base, which is small then), "
         "or give a base in 16 bit with --bits 16")


def parse(argv):
    """The arguments and the names of those that were given; what was not given is filled in by `defaults`."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    g = p.add_argument_group("model")
    g.add_argument("--base", help="the pretrained model: a known name, a folder or a file (default: smollm2-135m)")
    g.add_argument("--bits", type=int, help="of the base's weights: 16, 8 or 4 (default: 8)")
    g.add_argument("--rank", type=int, help="r of A and B (default: 8)")
    g.add_argument("--alpha", type=float, help="B A is multiplied with alpha / r (default: 32)")
    g.add_argument("--dropout", type=float, help="share of A's inputs that is dropped while training (default: 0.1)")
    g.add_argument("--targets", help="layers with an adapter, by their last names: q, k, v, o, gate, up, down, of GPT-2 qkv, o, up, down "
                   "(default: q,k,v or qkv)")
    g.add_argument("--start", choices=("lora", "loftq"), help="lora: B = 0; loftq: A and B from the SVD of what quantization lost (default: lora)")
    g = p.add_argument_group("data")
    g.add_argument("--task", help=f"sentiment (those of {', '.join(SENTIMENT)} that are at hand), {', '.join(sets.TEST_SHARE)}, alpaca, or a JSON file in "
                   "Alpaca's format (default: sentiment)")
    g.add_argument("--data-dir", help="where the sets are (default: $DATA_DIR, then data/)")
    g.add_argument("--batch-size", type=int, help="rows a step in each process (default: 16)")
    g.add_argument("--grad-accum", type=int, help="batches whose gradients are added up for one step (default: 1)")
    g.add_argument("--seq-len", type=int, help="tokens of a row at most; the middle of a longer prompt is left out (default: 512)")
    g = p.add_argument_group("optimization")
    g.add_argument("--max-iters", type=int, help="steps of the whole schedule (default: 150)")
    g.add_argument("--stop-at", type=int, help="end after this many steps, with a checkpoint; the schedule stays that of --max-iters")
    g.add_argument("--lr", type=float, help="highest learning rate (default: 1e-3)")
    g.add_argument("--warmup", type=int, help="steps to reach it (default: a tenth of --max-iters, at most 100)")
    g.add_argument("--weight-decay", type=float, help="decay of A and B (default: 0)")
    g.add_argument("--grad-clip", type=float, help="largest norm of the whole gradient; 0 leaves it as it is (default: 1)")
    g.add_argument("--seed", type=int, help="of A, the batches and dropout (default: 1)")
    g = p.add_argument_group("machine")
    g.add_argument("--dtype", help="float32, bfloat16, or auto: the one whose matrix products are faster here (default: auto)")
    g.add_argument("--recompute", choices=MODES, help="what the backward pass computes again instead of keeping it (default: sdpa)")
    g.add_argument("--shard", action="store_true", default=None, help="spread a --bits 16 base over all processes (default: each has a copy of the base)")
    g = p.add_argument_group("output")
    g.add_argument("--out-dir", help="folder of this run (default: out/finetune)")
    g.add_argument("--resume", action="store_true", default=None, help="continue the run in --out-dir")
    g.add_argument("--log-interval", type=int, help="steps between two lines (default: 10)")
    g.add_argument("--eval-interval", type=int, help="steps between two looks at the loss of held-out rows (default: a quarter of --max-iters)")
    g.add_argument("--eval-rows", type=int, help="held-out rows for that loss (default: 64)")
    g.add_argument("--eval-limit", type=int, help="held-out rows of each task for the scores before and after, a seeded sample; 0: none (default: 500)")
    g.add_argument("--save-interval", type=int, help="steps between two checkpoints (default: 50)")
    args = p.parse_args(argv)
    return args, {k for k, v in vars(args).items() if v is not None}


def defaults(args):
    """Fill in what was not given."""
    iters = args.max_iters if args.max_iters is not None else 150
    values = dict(base="smollm2-135m", bits=8, rank=8, alpha=32.0, dropout=0.1, start="lora", task="sentiment",
                  data_dir=os.environ.get("DATA_DIR", "data"), batch_size=16, grad_accum=1, seq_len=512, max_iters=iters, stop_at=iters, lr=1e-3,
                  warmup=min(100, iters // 10), weight_decay=0.0, grad_clip=1.0, seed=1, dtype="auto", recompute="sdpa", shard=False, out_dir="out/finetune",
                  resume=False, log_interval=10, eval_interval=-(-iters // 4), eval_rows=64, eval_limit=500, save_interval=50)
    for name, value in values.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def check(args):
    for name in ("rank", "batch_size", "grad_accum", "max_iters", "stop_at", "log_interval", "eval_interval", "eval_rows", "save_interval"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    check_numbers(args, "warmup", "lr", "weight_decay", "grad_clip", "seed", "eval_limit")
    check_positive(args, "alpha")
    check_folder(args.out_dir)
    if args.bits not in (4, 8, 16):
        raise InputError(f"--bits must be 4, 8 or 16, got {args.bits}")
    if not 0 <= args.dropout < 1:
        raise InputError(f"--dropout must be in 0..1 (1 excluded), got {args.dropout}")
    if args.seq_len < 8:
        raise InputError(f"--seq-len must be at least 8, got {args.seq_len}")
    if args.start == "loftq" and args.bits == 16:
        raise InputError("--start loftq begins with what quantization lost, and --bits 16 loses nothing: give --bits 8 or 4")
    if args.shard and args.bits < 16:
        raise InputError(WHOLE.format(f"a --bits {args.bits} base"))
    if args.shard and world_size() == 1:
        raise InputError("--shard spreads one model over several processes, and there is one: torchrun --nproc_per_node N finetune.py ... --shard")
    if args.task not in ("sentiment", "alpaca", *sets.TASKS) and not Path(args.task).is_file():
        raise InputError(f"--task {args.task}: neither a file nor one of sentiment, alpaca, {', '.join(sets.TEST_SHARE)}")


# ----------------------------------------------------------------------------- the model

def adapted_model(args, device, resumed):
    """The base, frozen and at its bits, with adapters that do nothing yet (or, with LoftQ, what rounding lost); and its tokenizer."""
    home = "cpu" if args.shard else device.torch_device  # a model to be sharded need not fit on one GPU
    model, tokenizer = load_model(args.base, home, device.dtype, args.bits)
    if args.shard and any(bits_of(layer) < 16 for layer in adaptable(model).values()):
        raise InputError(WHOLE.format(args.base))
    if tokenizer is None:
        raise InputError(f"{args.base} has no tokenizer beside its weights: put a tokenizer.json or tokenizer.model there")
    args.targets = args.targets or ",".join(model.config.architecture.inputs)
    names = {name.rsplit(".", 1)[-1] for name in adaptable(model)}
    if unknown := [t for t in args.targets.split(",") if t not in names]:
        raise InputError(f"--targets {args.targets}: no layer is called {unknown[0]!r}, this model has {', '.join(sorted(names))}")
    torch.manual_seed(args.seed)
    say(attach_lora(model, args.rank, args.alpha, args.targets.split(","), args.dropout))
    if args.start == "loftq" and not resumed:
        weight = original_weights(args.base)
        layers = [(name, m) for name, m in model.named_modules() if isinstance(m, LoRALinear)]
        lost = [start_from_error(layer, weight(name)) for name, layer in tqdm(layers, desc="LoftQ", unit=" layers", disable=None, leave=False)]
        say(f"LoftQ: A and B make good {1 - sum(after for _, after in lost) / sum(before for before, _ in lost):.1%} of the squared error of rounding")
    return use_recompute(model, args.recompute), tokenizer


def original_weights(base):
    """name of a layer -> W as it was before rounding, read anew so that one matrix at a time is there."""
    path = locate(base)
    if path.is_dir() and read_config(path):
        model = load_model(base)[0]
        if any(bits_of(layer) < 16 for layer in adaptable(model).values()):
            raise InputError(f"--start loftq begins with what rounding lost, and {base} holds rounded weights alone: leave it out, or give the base as it was")
        layers = adaptable(model)
        return lambda name: layers[name].weight if hasattr(layers[name], "weight") else layers[name].dense_weight()
    source = open_source(path)
    return lambda name: source.get(name + ".weight")


# ----------------------------------------------------------------------------- the data

def sets_at_hand(args):
    """The tasks that --task means."""
    if args.task != "sentiment":
        return [args.task]
    return [t for t in SENTIMENT if (Path(args.data_dir) / t).is_dir()] or ["made-up"]


def read_task(task, data_dir):
    """(training pairs (prompt, answer), test examples, held-out pairs) of one task. Where there are no labels to choose from, there are no test examples."""
    if task == "made-up":
        say(f"none of {', '.join(SENTIMENT)} is in {data_dir}: training on headlines that are made up from templates, which shows that it works and no more "
            "(--data-dir, or --task fpb to download)")
        made = made_up_headlines(1200, seed=0)
        train, test = made[300:], made[:300]
    elif task in sets.TASKS:
        train, test = (sets.load(task, data_dir, split) for split in ("train", "test"))
    else:
        path = Path(data_dir) / "alpaca" / "alpaca_data.json" if task == "alpaca" else Path(task)
        if not path.is_file():
            raise InputError(f"{path} is not there: put Alpaca's alpaca_data.json there, or give --data-dir the folder that holds alpaca/")
        pairs = read_alpaca(path)
        held, learned = sets.split_rows(len(pairs), 0.05) if len(pairs) >= 20 else ([], range(len(pairs)))
        return [pairs[i] for i in learned], [], [(i, pairs[i]) for i in held]
    return [(e.prompt, e.answer) for e in train], test, [(e.index, (e.prompt, e.answer)) for e in test]


class Data:
    """Rows to learn from, test examples by task, and the same held-out rows for every look at their loss."""

    def __init__(self, args, tokenizer, context):
        self.train, self.test, held, indices = [], {}, [], {}
        rows = partial(encode, tokenizer, context=min(context, args.seq_len))
        for task in sets_at_hand(args):
            pairs, examples, out = read_task(task, args.data_dir)
            self.train += [rows(*pair, group=pair[0].split("\n")[0] if examples else task) for pair in pairs]  # tasks have one or two instructions
            held += [(task, pair) for _, pair in out]
            indices[task] = sorted(int(i) for i, _ in out)
            if args.eval_limit and examples:
                self.test[task] = sets.draw(examples, args.eval_limit)
        if not self.train:
            raise InputError(f"--task {args.task} has no rows to learn from")
        self.held_out = [rows(*pair, group=task) for task, pair in sets.draw(held, args.eval_rows)]
        self.indices = indices
        say(f"data {', '.join(indices)}: {len(self.train):,} rows to learn from, {len(held):,} held out, "
            f"{sum(len(r.ids) for r in self.train) / len(self.train):.0f} tokens a row")


# ----------------------------------------------------------------------------- scores

def scores_of(model, tokenizer, test, device):
    """task -> weighted F1 of the most likely label and of the generated answer, with what chance and luck do beside them. NER is generated alone."""
    model.eval()
    run, found = evaluation.Run(model, tokenizer, device, None), {}
    for task, examples in test.items():
        produce, summarize = evaluation.KINDS[task if task == "ner" else "fpb"]
        with tqdm(total=len(examples), desc=f"scoring {task}", unit=" rows", disable=None if rank() == 0 else True, leave=False) as bar:
            rows = []
            for batch in produce(run, examples):
                rows += batch
                bar.update(len(batch))
        r = summarize(task, rows, examples)
        best = r.get("likeliest", r)
        found[task] = dict(f1=best["f1"], interval=best["interval"], rows=len(rows))
        if best is not r:
            found[task] |= dict(accuracy=best["accuracy"], f1_generated=r["f1"], answered=r["parsed"], majority=r["majority"])
    model.train()
    return found


def mean_f1(scores):
    return float(np.mean([s["f1"] for s in scores.values()])) if scores else None


def tell(when, scores):
    for task, s in scores.items():
        beside = f", generated {s['f1_generated']:.3f}, always the commonest label {s['majority']:.3f}" if "majority" in s else ""
        say(f"{when}: {task} weighted F1 {s['f1']:.3f} (95% {s['interval'][0]:.3f} to {s['interval'][1]:.3f}){beside}, {s['rows']} rows")


# ----------------------------------------------------------------------------- the run

def set_up(argv):
    """Everything before the first step: device, arguments, model, data, and the state to go on from."""
    args, given = parse(argv)
    state, moments = None, {}
    if world_size() > 1:  # messages on the CPU go through gloo also where tensors on GPUs go through NCCL
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    args.resume = args.resume or restarted(args.out_dir or "out/finetune")
    if args.resume:
        folder, state, moments = read_state(args.out_dir or "out/finetune", files=lambda folder: [FILES[1]])
        args = restored_arguments(args, given, state["args"], FIXED)
    check(defaults(args))
    device = find_device(args.dtype)
    args.dtype = str(device.dtype)[6:]  # a resumed run computes as it began
    say(f"device {device.name}" + (f", {world_size()} processes" if world_size() > 1 else ""))
    say(f"dtype {args.dtype} ({device.why}), {device.rate / 1e12:.2f} TFLOPS in products")
    own_id = base_id(args.base)
    model, tokenizer = adapted_model(args, device, resumed=state is not None)
    if state is not None:
        load_adapter(model, folder, own_id)
    data = Data(args, tokenizer, model.config.context)
    return args, device, model.train(), tokenizer, data, own_id, state, moments


def main(argv=None):
    try:
        parts = set_up(argv)
        with Watchdog():
            return Run(*parts).train()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


class Run:
    """One finetuning run: `train` is the loop, the rest is what it calls."""

    def __init__(self, args, device, model, tokenizer, data, own_id, state, moments):
        self.args, self.device, self.model, self.tokenizer, self.data, self.base_id = args, device, model, tokenizer, data, own_id
        self.within, place = (lambda function, *args: function(*args)), {}  # how to call what reads the model
        if args.shard:
            from common.shard import Within, gather_once, part_like, shard
            self.within, place = Within(model), dict(place=part_like)
            shard(model, self.within, device.torch_device.type)
            self.within(gather_once, model)
        self.learning = [p for p in model.parameters() if p.requires_grad]
        self.optimizers = make_optimizers(model, args.lr, args.weight_decay)
        restore_optimizers(model, self.optimizers, moments, **place)
        self.rows = args.batch_size * args.grad_accum * world_size()  # of a step, in all processes
        check_rows(state, self.rows, args)
        self.step = state["step"] if state else 0
        self.before = state["before"] if state else None
        self.seconds_before = state["seconds"] if state else 0.0
        if state is None:  # not before everything else is in order
            set_aside(args.out_dir)
        self.folder = RunFolder(args.out_dir, resume_step=self.step if state else None)
        self.saved_at, self.pace = self.step, []  # pace: (tokens, seconds) of each step
        self.started = time.perf_counter()

    def train(self):
        args, stop = self.args, StopSignal()
        last = min(args.stop_at, args.max_iters)
        if already_done(self.step, last, args.out_dir):
            return 0
        if rank() == 0:
            write_atomic(self.folder.path / "heldout.json", json.dumps(self.data.indices) + "\n")
        if self.before is None:
            self.before = self.within(scores_of, self.model, self.tokenizer, self.data.test, self.device)
        tell("before", self.before)
        bar = tqdm(total=last, initial=self.step, unit=" steps", disable=None if rank() == 0 else True, dynamic_ncols=True)
        while self.step < last and not self.any_process(stop.name is not None):
            began = time.perf_counter()
            loss, tokens = self.one_step()
            self.pace.append((tokens, time.perf_counter() - began))
            self.step += 1
            bar.update()
            if self.step == 1 or self.step % args.log_interval == 0 or self.step % args.eval_interval == 0 or self.step == last:
                self.log(loss, last, bar)
            if self.step % args.save_interval == 0 and self.step < last:
                self.save()
        bar.close()
        if self.saved_at < self.step or self.step == 0:
            self.save()
        if stop.name:
            say(f"stopped by {stop.name} after step {self.step}, saved; go on with")
            say(f"    python finetune.py --resume --out-dir {args.out_dir}")
            return 130 if stop.name == "SIGINT" else 143
        after = self.within(scores_of, self.model, self.tokenizer, self.data.test, self.device)
        tell("after", after)
        self.finish(after)
        return 0

    def one_step(self):
        """One optimizer step; returns the mean loss of the whole step's answers, and how many tokens its rows have."""
        args = self.args
        rows = pick(self.data.train, self.rows, args.seed, self.step)
        answers, total = sum(len(r.ids) - r.start for r in rows), torch.zeros((), device=self.device.torch_device)
        for i in range(rank() * args.grad_accum, (rank() + 1) * args.grad_accum):  # the i-th batch of the step, whichever process has it
            torch.manual_seed(int(np.random.SeedSequence((args.seed, self.step, i)).generate_state(1)[0]))  # of dropout
            share = args.recompute != "block" and not args.shard  # a sharded block computes in all processes at once: each goes through it once a batch
            batch = Batch(rows[i * args.batch_size:(i + 1) * args.batch_size], share, self.device.torch_device)
            loss = self.loss_of(batch) * (batch.answers / answers)
            (loss * world_size() if args.shard else loss).backward()  # fully_shard divides the sum of gradients by the number of processes
            total += loss.detach()
        loss = all_reduce(total.cpu(), self.device).item()
        if not math.isfinite(loss):
            raise not_finite(f"the loss is {loss}", args, self.step + 1, self.saved_at)
        self.add_up_gradients()
        if args.grad_clip:
            torch.nn.utils.clip_grad_norm_(self.learning, args.grad_clip)
        set_rate(self.optimizers, learning_rate(self.step, args))
        step_all(self.optimizers)
        return loss, sum(len(r.ids) for r in rows)

    def loss_of(self, batch):
        """Mean loss of a batch's answers. head_loss asks the head for the answers' places alone."""
        with self.device.autocast():
            return self.within(lambda: head_loss(self.model.head, batch.hidden(self.model), batch.targets))

    def add_up_gradients(self):
        """The sum over processes of all gradients, as one message. Every process's loss is already divided by the answers of all."""
        if world_size() == 1 or self.args.shard:
            return
        flat = torch.cat([p.grad.flatten() for p in self.learning])
        dist.all_reduce(flat)
        for p, g in zip(self.learning, flat.split([p.numel() for p in self.learning])):
            p.grad.copy_(g.view_as(p))

    def any_process(self, flag):
        """Whether any process was told to stop: all must leave the loop at the same step."""
        return bool(all_reduce(torch.tensor(float(flag)), self.device, dist.ReduceOp.MAX))

    def speed(self):
        """Tokens a second, without the first step, in which memory is touched for the first time."""
        steps = self.pace[1:] or self.pace
        return sum(tokens for tokens, _ in steps) / sum(seconds for _, seconds in steps)

    @torch.no_grad()
    def held_out_loss(self):
        self.model.eval()
        total, size = [], self.args.batch_size
        rows = sorted(self.data.held_out, key=lambda r: (r.group, len(r.ids)))
        for i in range(0, len(rows), size):
            batch = Batch(rows[i:i + size], device=self.device.torch_device)
            total.append((self.loss_of(batch).item() * batch.answers, batch.answers))
        self.model.train()
        return sum(loss for loss, _ in total) / sum(n for _, n in total) if total else None

    def log(self, loss, last, bar):
        args, step = self.args, self.step
        row = dict(step=step, loss=loss, lr=learning_rate(step - 1, args))
        if step % args.eval_interval == 0 or step == last:
            row["val_loss"] = self.held_out_loss()
        row |= dict(tokens_per_second=self.speed(), peak_memory_bytes=peak_memory(self.device.torch_device))
        self.folder.log(**row)
        seconds = (last - step) * float(np.median([seconds for _, seconds in self.pace]))
        if rank() == 0:
            bar.write(f"step {step} loss {loss:.4f} lr {row['lr']:.1e} {row['tokens_per_second']:.0f} tok/s {row['peak_memory_bytes'] / 1e9:.1f} GB "
                      f"left {time.strftime('%H:%M:%S', time.gmtime(seconds))}")
            if row.get("val_loss") is not None:
                bar.write(f"step {step} val_loss {row['val_loss']:.4f}")

    def save(self):
        args, moments = self.args, optimizer_tensors(self.model, self.optimizers)
        refuse_to_save(self.learning, self.device, args, self.step, self.saved_at)
        learned = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        if args.shard:
            from common.shard import whole
            learned, moments = whole(learned), whole(moments)
        if rank() == 0:
            bits = min(bits_of(m) for m in self.model.modules() if isinstance(m, LoRALinear)) if args.start == "loftq" else 16
            state = dict(step=self.step, rows=self.rows, args=vars(args), before=self.before, seconds=self.seconds())
            replace_state(args.out_dir, lambda folder: save_adapter(folder, self.model, args.base, self.base_id, bits, learned), moments, state)
            plot_losses(self.folder.path, f"LoRA r = {args.rank} on {args.base}, {args.bits} bit, {Path(args.task).name}")
        if world_size() > 1:
            dist.barrier()
        self.saved_at = self.step

    def seconds(self):
        return self.seconds_before + time.perf_counter() - self.started

    def finish(self, after):
        args, memory = self.args, peak_memory(self.device.torch_device)
        largest = int(all_reduce(torch.tensor(float(memory), dtype=torch.float64), self.device, dist.ReduceOp.MAX))
        total = int(all_reduce(torch.tensor(float(memory), dtype=torch.float64), self.device))
        self.folder.finish(
            base=args.base, base_id=self.base_id, bits=args.bits, rank=args.rank, f1_before=mean_f1(self.before), f1_after=mean_f1(after),
            scores_before=self.before, scores_after=after, trainable_parameters=sum(p.numel() for p in self.learning), steps=self.step,
            loss=self.folder.last("loss"), val_loss=self.folder.last("val_loss"),
            tokens_per_second=self.speed() if self.pace else self.folder.last("tokens_per_second"), peak_memory_bytes=largest,
            peak_memory_bytes_total=total, seconds=self.seconds(), devices=world_size(), device_hours=world_size() * self.seconds() / 3600,
            device=self.device.name, dtype=args.dtype, arguments=vars(args))
        say(f"{args.out_dir}/ has the adapter, metrics.jsonl, summary.json and loss.png; try")
        bits = f" --bits {args.bits}" if args.bits < 16 else ""
        say(f"    python sample.py --model {args.base}{bits} --adapter {args.out_dir} --prompt \"...\"")


if __name__ == "__main__":
    command(main)
