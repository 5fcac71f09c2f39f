"""Finetune a pretrained model with LoRA on its frozen, quantized weights (sections V.B and VI.C, equation 7).

    torchrun finetune.py                                  8-bit smollm2-135m, r = 8 on q, k, v: minutes
    python finetune.py --task my_rows.json --bits 4       your own {"instruction", "input", "output"} rows
    python finetune.py --method full                      every weight learns, or last-block, or head
    torchrun --nproc_per_node 2 finetune.py --base llama2-7b --bits 4 --targets q,v --recompute block
    python finetune.py --resume                           go on after Ctrl-C, a kill or a power cut

It leaves OUT/ as an adapter in PEFT's format (python sample.py --model BASE --bits 8 --adapter OUT), or with
another --method as a model; with metrics.jsonl, summary.json, loss.png and the state to resume from.

Why it fits: W never changes, so it needs no gradient and no moments and may be integers; A and B are a
thousandth of it. Why it is fast: nothing is computed of the gradients of W, of logits of the prompt (four of
seventy tokens are the answer), and little of padding and repeated instructions (tasks/rows.py).
"""
import hashlib
import os
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

import eval as evaluation
from checkpoint import load_model, own_tensors, save_model
from common.adapters import adaptable, base_id, bits_of, load_adapter, save_adapter
from common.cli import Parser, at_least_0, at_least_1, command, positive, refuse, say, seed
from common.loss import head_loss
from common.optimizers import learning_rate, make_optimizers, moments_of, restore_moments, step_all
from common.processes import all_reduce, distribute, world_size
from common.run import RunFolder, begin, start
from lowrank import attach_lora
from model import count_parameters
from recompute import MODES, use_recompute
from tasks import sets
from tasks.rows import Batch, encode, made_up_headlines, pick, read_alpaca

SENTIMENT, MADE_UP = ("fpb", "fiqa", "tfns"), "made-up"
# What is rarely turned has no flag: finetune.main(argv, dropout=0) gives another value. A run remembers it.
SETTINGS = dict(
    alpha=32.0,           # B A is multiplied with alpha / r
    dropout=0.1,          # share of A's inputs that is dropped while training
    weight_decay=0.0,     # of A and B
    grad_clip=1.0,        # the largest norm of the whole gradient; 0: any
    grad_accum=1,         # batches whose gradients are added up for a step
    seq_len=512,          # tokens of a row at most; the middle of a longer prompt is left out
    warmup=100,           # steps until the highest rate, at most a tenth of all
    stop_at=None,         # end after this many steps; the schedule stays that of --max-iters
    dtype="auto",
    log_interval=10,
    eval_interval=None,   # steps between two losses on held-out rows (None: a quarter of all steps)
    eval_rows=64,         # held-out rows for that loss
)
# What a resumed run may not change: with another value it would be another run.
FIXED = ("base", "bits", "rank", "method", "targets", "task", "seed", "alpha", "dropout", "seq_len")

def make_parser():
    p = Parser(__doc__)
    add = p.add_argument_group("model").add_argument
    add("--base", default="smollm2-135m", help="the pretrained model: a known name, a folder or a file")
    add("--bits", type=int, choices=(4, 8, 16), help="of the base's weights (default: 8; 16 if they learn)")
    add("--rank", type=at_least_1, default=8, help="r of A and B")
    add("--method", choices=("lora", "full", "last-block", "head"), default="lora",
        help="what learns: A and B, every weight, those of the last block, or the head's")
    add("--targets", help="layers with an adapter, by their last names (default: q,k,v, of GPT-2 qkv)")
    add = p.add_argument_group("data").add_argument
    add("--task", default="sentiment", help=f"sentiment (those of {', '.join(SENTIMENT)} that are at hand), "
        f"{', '.join(sets.TEST_SHARE)}, alpaca, or a JSON file in Alpaca's form")
    add("--data-dir", default=os.environ.get("DATA_DIR", "data"), help="where the sets are, or $DATA_DIR")
    add("--batch-size", type=at_least_1, default=16, help="rows a step in each process")
    add = p.add_argument_group("optimization").add_argument
    add("--max-iters", type=at_least_1, default=150, help="steps of the schedule")
    add("--lr", type=positive, help="highest learning rate (default: 1e-3 for lora, else 1e-4)")
    add("--seed", type=seed, default=1, help="of A, the batches and dropout")
    add("--recompute", choices=MODES, default="sdpa", help="what the backward pass computes again")
    add("--shard", action="store_true", help="spread a --bits 16 base over all processes")
    add = p.add_argument_group("output").add_argument
    add("--out-dir", default="out/finetune", help="folder of this run")
    add("--resume", action="store_true", help="continue the run in --out-dir")
    add("--eval-limit", type=at_least_0, default=500,
        help="held-out rows of each task to score before and after; 0: none")
    add("--save-interval", type=at_least_1, default=50, help="steps between two checkpoints")
    return p

def main(argv=None, **settings):
    return start(finetune, make_parser(), argv, SETTINGS, settings)

def finetune(args, given):
    # The device, and the state to resume from.
    device, state_folder, state, moments = begin(args, given, FIXED)
    fill_in(args, given)

    # The base with what is to learn in it, and the data.
    lora, own_id = args.method == "lora", base_id(args.base)
    model, tokenizer = open_base(args, device, state_folder)
    if lora and state:
        load_adapter(model, state_folder, own_id)
    use_recompute(model, args.recompute).train()
    data = Data(args, tokenizer, model.config.context, device.torch_device)

    # One process or several, the optimizer, and the folder of the run.
    def loss_of(batch):
        return head_loss(model.head, batch.hidden(model), batch.targets)
    strategy = distribute(model, loss_of, device, args.shard)
    trainable = sum(p.numel() for p in strategy.own_parameters())
    optimizers = make_optimizers(model, args.lr, args.weight_decay)
    restore_moments(model, optimizers, moments)
    rows = args.batch_size * args.grad_accum * strategy.replicas  # of a step, in all processes
    folder = RunFolder(args, state, rows, data.text, device)
    before = state["before"] if state else scores_of("before", strategy, tokenizer, data.test)

    while folder.step < folder.last_step and not folder.stopped:
        began, step = time.perf_counter(), folder.step

        # One step: batch, forward and backward, clip, update.
        step_rows = pick(data.train, rows, args.seed, step)
        batches, weights = batches_of(step_rows, args, strategy, device)
        loss = strategy.backward(batches, (args.seed, step), weights)
        if args.grad_clip:
            strategy.clip(args.grad_clip)
        rate = learning_rate(step, args)
        step_all(optimizers, rate)
        folder.advance(sum(len(r.ids) for r in step_rows), began)

        # Look, and save.
        evaluates = folder.due(args.eval_interval or -(-args.max_iters // 4))
        if folder.step == 1 or evaluates or folder.stopped or folder.due(args.log_interval):
            row = dict(loss=all_reduce(loss) / strategy.replicas, lr=rate)
            if evaluates:
                row["val_loss"] = strategy.evaluate(data.held_out)
            folder.log(**row)
        if folder.stopped or folder.due(args.save_interval):
            save(folder, model, tokenizer, optimizers, strategy, own_id, before)

    if folder.stopped:
        return folder.say_stopped("finetune.py")

    # The scores after, summary.json, and what to type next.
    after = scores_of("after", strategy, tokenizer, data.test)
    result = f"{args.base} --bits {args.bits} --adapter {folder.path}" if lora else folder.path
    folder.finish(result, base_id=own_id, f1_before=mean_f1(before), f1_after=mean_f1(after),
                  scores_before=before, scores_after=after, trainable_parameters=trainable)
    return 0

def fill_in(args, given):
    """Give what was not given the value that depends on other arguments, and refuse what can't be."""
    refuse(args.task not in ("sentiment", "alpaca", *sets.TEST_SHARE) and not Path(args.task).is_file(),
           f"--task {args.task} is no file, and none of sentiment, alpaca, {', '.join(sets.TEST_SHARE)}")
    lora = args.method == "lora"
    args.bits = args.bits or (8 if lora else 16)
    args.lr = args.lr or (1e-3 if lora else 1e-4)
    refuse(not lora and (args.bits < 16 or given & {"rank", "targets"}),
           f"--method {args.method} changes weights: --rank, --targets and --bits below 16 are for lora")
    refuse(args.shard and world_size() == 1,
           "--shard needs several processes: torchrun --nproc_per_node N finetune.py ... --shard")

def open_base(args, device, saved):
    """The base, frozen but for what --method names, and its tokenizer. For lora it is at its bits, and has
    adapters that do nothing yet; else it is in 32 bit, or `saved`, if that is not None, is in its place."""
    lora = args.method == "lora"
    home = "cpu" if args.shard else device.torch_device  # a model to be sharded need not fit on one GPU
    wanted = (args.base, home, device.dtype, args.bits) if lora else (saved or args.base, home)
    model, tokenizer = load_model(*wanted)
    refuse(tokenizer is None, f"{args.base} has no tokenizer beside its weights: put a tokenizer.json there")
    refuse((args.shard or not lora) and bits_of(model) < 16,
           f"{'--shard' if lora else args.method} needs parameters, and the weights of {args.base} are "
           "integers: give the model that it was made from, and --bits 16")
    if lora:
        names = {name.rsplit(".", 1)[-1] for name in adaptable(model)}
        args.targets = args.targets or ("qkv" if "qkv" in names else "q,k,v")
        targets = args.targets.split(",")
        refuse(not names.issuperset(targets),
               f"--targets {args.targets}: this model has layers called {', '.join(sorted(names))}")
        torch.manual_seed(args.seed)
        say(attach_lora(model, args.rank, args.alpha, targets, args.dropout))
        return model, tokenizer
    dense = isinstance(model.head, nn.Linear) and isinstance(model.embed, nn.Embedding)
    if args.method == "head" and dense and model.head.weight is model.embed.weight:
        model.head.weight = nn.Parameter(model.head.weight.detach().clone())  # the embedding stays
        model.config = replace(model.config, tied=False)
    learning = {"full": [model], "last-block": [model.blocks[-1], model.norm], "head": [model.head]}
    model.requires_grad_(False)
    for part in learning[args.method]:
        part.requires_grad_(True)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    say(f"{args.method}: {count:,} of {count_parameters(model):,} parameters learn")
    return model, tokenizer

def batches_of(step_rows, args, strategy, device):
    """This process's batches of a step's rows, and the share that each has of the answers' tokens."""
    share_prefix = args.recompute != "block" and not args.shard  # these pass every block once a batch
    answers = sum(len(r.ids) - r.start for r in step_rows)
    first, n = strategy.replica * args.grad_accum, args.batch_size
    mine = [step_rows[i * n:(i + 1) * n] for i in range(first, first + args.grad_accum)]
    batches = [Batch(rows, share_prefix, device.torch_device) for rows in mine]
    return [(b,) for b in batches], [b.answers / answers * strategy.replicas for b in batches]

def read_task(task, data_dir):
    """(examples to learn from, held-out examples) of one task."""
    if task in sets.TASKS:
        return sets.load(task, data_dir, "train"), sets.load(task, data_dir, "test")
    if task == MADE_UP:
        say(f"none of {', '.join(SENTIMENT)} is in {data_dir}: training on headlines made up from templates, "
            "which shows that it works and no more (--data-dir, or --task fpb to download)")
        made = made_up_headlines(1200, seed=0)
        return made[300:], made[:300]
    path = Path(data_dir) / "alpaca" / "alpaca_data.json" if task == "alpaca" else Path(task)
    refuse(not path.is_file(), f"--task {task}: {path} is not there: put it there, or give a file of rows")
    examples = read_alpaca(path)
    held, learned = sets.split_rows(len(examples), 0.05 if len(examples) >= 20 else 0)
    return [examples[i] for i in learned], [examples[i] for i in held]

class Data:
    """Rows to learn from, test examples by task, and for every look at the held-out loss the same batches,
    each with the number of its answers' tokens."""

    def __init__(self, args, tokenizer, context, device="cpu"):
        self.train, self.test, self.held_out, held, digest = [], {}, [], [], hashlib.sha256()
        tasks, context = [args.task], min(context, args.seq_len)
        if args.task == "sentiment":
            tasks = [t for t in SENTIMENT if (Path(args.data_dir) / t).is_dir()] or [MADE_UP]
        for task in tasks:
            learned, out = read_task(task, args.data_dir)
            digest.update(repr((learned, out)).encode())
            labelled = task == MADE_UP or task in sets.TASKS
            for e in learned:  # rows with one instruction make batches that share it
                group = e.prompt.split("\n")[0] if labelled else task
                self.train.append(encode(tokenizer, e.prompt, e.answer, context, group))
            held += [(task, e) for e in out]
            if args.eval_limit and labelled:
                self.test[task] = sets.draw(out, args.eval_limit)
        drawn = sets.draw(held, args.eval_rows)
        rows = [encode(tokenizer, e.prompt, e.answer, context, task) for task, e in drawn]
        rows.sort(key=lambda r: (r.group, len(r.ids)))
        for i in range(0, len(rows), args.batch_size):
            batch = Batch(rows[i:i + args.batch_size], device=device)
            self.held_out.append(((batch,), batch.answers))
        self.text = digest.hexdigest()  # of all rows: a resumed run must find them again
        tokens, prompts, answers = np.sum([(len(r.ids), *np.sign(r.lost)) for r in self.train], 0)
        say(f"data {', '.join(tasks)}: {len(self.train):,} rows to learn from, {len(held):,} held out, "
            f"{tokens / len(self.train):.0f} tokens a row; to fit {context} tokens {prompts:,} prompts lose "
            f"their middle, {answers:,} answers their end")

def save(folder, model, tokenizer, optimizers, strategy, own_id, before):
    """Replace OUT/state: the adapter or the model, the moments, and what the run needs to go on."""
    args, tensors = folder.args, own_tensors(model)
    write = partial(save_model, model=model, tokenizer=tokenizer)
    if args.method == "lora":
        tensors = {name: p for name, p in model.named_parameters() if p.requires_grad}
        write = partial(save_adapter, model=model, base_name=args.base, base_id=own_id)
    folder.save(strategy, tensors, moments_of(model, optimizers), write,
                f"{args.method} on {args.base}, {args.bits} bit, {Path(args.task).name}", before=before)

@torch.no_grad()
def scores_of(when, strategy, tokenizer, test):
    """task -> weighted F1 of the likeliest label and of the generated answer, and chance beside them."""
    model, found = strategy.model.eval(), {}
    for task, examples in test.items():
        r = strategy.module(evaluation.score_task, model, tokenizer, strategy.device, task, examples)
        best = r.get("likeliest", r)  # NER is generated alone
        found[task] = dict(f1=best["f1"], interval=best["interval"], rows=len(examples),
                           majority=r["majority"])
        low, high = best["interval"]
        say(f"{when}: {task} weighted F1 {best['f1']:.3f} (95% {low:.3f} to {high:.3f}), generated "
            f"{r['f1']:.3f}, always the commonest label {r['majority']:.3f}, {len(examples)} rows")
        if "unseen" in r:
            rest = r["unseen"].get("likeliest", r["unseen"])["f1"]
            say(f"{when}: {task} {rest:.3f} without the {r['seen']} rows whose prompts training has, too")
            found[task]["f1_unseen"] = rest
    model.train()
    return found

def mean_f1(scores):
    return float(np.mean([s["f1"] for s in scores.values()])) if scores else None

if __name__ == "__main__":
    command(main)
