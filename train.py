"""Pretrain a transformer whose linear layers are y = B A x (sections IV.A and VI.B of the paper).

    python train.py --rank 192                                  method 1: GPT-2 on Python's own texts
    python train.py --model tiny --rank 16 --data my_books/     a small model on your own text
    python train.py --method 2 --init-from gpt2 --rank 192      start from the SVD of a pretrained model (or
                                                                without --rank from a folder of decompose.py)
    python train.py --method 3 --init-from gpt2 --rank 192      fade W out: y = a W x + (1-a) B A x
    python train.py --rank 192 --bits 4                         train the model that is rounded to 4 bits
    torchrun --nproc_per_node 8 train.py --rank 192 --data openwebtext
    torchrun --nproc_per_node 8 train.py --rank 192 --pipeline 4     4 stages x 2 replicas
    python train.py --resume                                    go on after Ctrl-C, a kill or a power cut

It leaves OUT/ as a model folder (python sample.py --model OUT), with metrics.jsonl, summary.json, loss.png
and the state to resume from; with --bits also OUT/int8 or OUT/int4, the rounded model.
"""
import importlib.util
import os
import shutil
import time
from functools import partial
from pathlib import Path

import torch

from checkpoint import decomposed_from, load_model, open_dense, own_tensors, replace_model, save_model
from common.cli import Parser, at_least_0, at_least_1, command, positive, refuse, say, seed
from common.data import eval_batches, open_corpus, prepare, train_batch
from common.device import stored_bytes
from common.loss import head_loss
from common.optimizers import learning_rate, make_optimizers, moments_of, restore_moments, step_all
from common.processes import all_reduce, distribute, in_turn, is_first, world_size
from common.run import RunFolder, begin, start
from lowrank import LowRankLinear, blend_alpha, blend_with, replace_linears, set_alpha
from model import CONFIGS, Transformer, config_for, count_parameters, flops_per_token

# Rarely changed settings, without a flag: main(argv, dropout=0.1) gives another value. A run remembers them.
SETTINGS = dict(
    weight_decay=0.1,     # of matrices; vectors have none
    grad_clip=1.0,        # the largest norm of the whole gradient; 0: any
    warmup=200,           # steps until the highest rate, at most a tenth of all
    dropout=0.0,
    start=None,           # first factors, of lowrank.init_factors (None: orthogonal with muon, else normal)
    head="lowrank",       # W^H is of low rank too, as in the paper; "dense": as it is, tied to W^E
    warm_start=0.0,       # share of the steps at full rank, before the SVD makes factors of the layers
    vocabulary=0,         # pieces of a tokenizer that is trained on the data; 0: GPT-2's, if it can be had
    eval_interval=None,   # steps between two losses on the validation text (None: a quarter of all steps)
    eval_tokens=8192,     # tokens of that text
    shape=None,           # blocks, heads and width in place of the model's (bench.py scaling)
)
# What a resumed run may not change: with another value it would be another run.
FIXED = ("model", "rank", "method", "init_from", "bits", "optimizer", "seq_len", "seed", "dropout", "start",
         "head", "warm_start", "vocabulary", "shape")

def make_parser():
    p = Parser(__doc__)
    add = p.add_argument_group("model").add_argument
    add("--model", choices=CONFIGS, default="gpt2", help="architecture")
    add("--rank", type=at_least_0, default=0, help="rank r of every linear layer; 0 is full rank")
    add("--method", type=int, choices=(1, 2, 3), help="see above (default: 1, with --init-from 2)")
    add("--init-from", help="a pretrained model to start from: a folder, a file or a known name")
    add("--bits", type=int, choices=(4, 8, 16), default=16, help="8 or 4: train and save rounded weights")
    add = p.add_argument_group("optimization").add_argument
    add("--optimizer", choices=("muon", "adamw"), help="default: muon, with --init-from adamw")
    add("--data", default="builtin", help="builtin, openwebtext, or a text file or folder")
    add("--batch-size", type=at_least_1, help="sequences a step in each replica (default: 4, on a GPU 16)")
    add("--grad-accum", type=at_least_1, default=1, help="batches whose gradients are added up for a step")
    add("--seq-len", type=at_least_1, help="tokens in a window (default: 256, on a GPU up to 1,024)")
    add("--max-iters", type=at_least_1, help="steps of the whole schedule (default: 150, on a GPU 5,000)")
    add("--stop-at", type=at_least_1, help="end after so many steps; the schedule stays that of --max-iters")
    add("--lr", type=positive, help="highest learning rate (default: 1e-3, with --init-from 1e-4 or 3e-4)")
    add("--seed", type=seed, default=1, help="of weights, batches and dropout")
    add = p.add_argument_group("machine").add_argument
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="auto: the faster one here")
    add("--compile", action="store_true", help="compile the blocks with torch.compile")
    add("--recompute", choices=("none", "sdpa", "attention", "block"), help="what the backward pass computes "
        "again (default: sdpa, in bfloat16 on a CPU attention, with --schedule gpipe block)")
    add("--pipeline", type=at_least_0, default=0, help="cut the model into this many stages; 0: no pipeline")
    add("--microbatches", type=at_least_1, help="parts of a batch in a pipeline (default: up to 4 a stage)")
    add("--schedule", default="1f1b", help="of the pipeline: gpipe, 1f1b, zb-h1, zb-v")
    add("--shard", action="store_true", help="spread parameters, gradients and moments over all processes")
    add = p.add_argument_group("output").add_argument
    add("--out-dir", default="out/train", help="folder of this run")
    add("--resume", action="store_true", help="continue the run in --out-dir")
    add("--log-interval", type=at_least_1, default=10, help="steps between two lines")
    add("--save-interval", type=at_least_1, default=500, help="steps between two checkpoints")
    return p

def main(argv=None, **settings):
    return start(train, make_parser(), argv, SETTINGS, settings)

def train(args, given):
    # The device, and the state to resume from.
    device, state_folder, state, moments = begin(args, given, FIXED)
    fill_in(args, device)
    check(args, given)

    # The model and the data. A random model may need the size of the data's vocabulary.
    place = device.torch_device
    home = torch.device("cpu") if args.shard else place  # a sharded one need not fit on a GPU
    model = tokenizer = None
    if state:
        model, tokenizer = load_model(state_folder, home)
    elif args.init_from:
        model, tokenizer = pretrained_model(args, given, home)
    corpus = open_corpus(args.data, os.environ.get("DATA_DIR", "data"))
    pieces = args.vocabulary or (4096 if args.model == "tiny" else 8192)
    tokens = in_turn(prepare, corpus, tokenizer, pieces, args.vocabulary > 0)
    say(f"data {args.data}: {len(tokens.train):,} tokens to train on, {len(tokens.val):,} to validate")
    say(f"tokenizer {tokens.tokenizer.name}")
    if model is None:
        model = random_model(args, tokens.tokenizer.vocab_size, home)
    model.train()
    context = model.config.context
    args.seq_len = args.seq_len or min(context, 1024 if place.type == "cuda" else 256)
    refuse(args.seq_len > context, f"--seq-len {args.seq_len} is longer than the model's {context}")
    tokens.check(model.config.vocab_size, args.seq_len)

    # One process or several, the optimizers, and the folder of the run.
    strategy, optimizers = set_up(model, args, device, moments)
    count = args.batch_size * args.grad_accum          # sequences a step in this replica
    rows = count * strategy.replicas                   # and in all
    folder = RunFolder(args, state, rows, tokens.meta["train"]["sha256"], device)
    warming = args.warm_start > 0 and rank_of(model) == 0

    while folder.step < folder.last_step and not folder.stopped:
        began, step = time.perf_counter(), folder.step

        # Method 3: less of W, more of B A. A warm start: from full rank to factors.
        if args.method == 3:
            replaced = set_alpha(model, blend_alpha(step, args.max_iters))
            if replaced:
                say(f"step {step}: alpha is 0, {replaced} blended layers are low-rank from now on")
        if warming and step >= int(args.warm_start * args.max_iters):
            warming, moments = False, moments_of(model, optimizers)
            say(f"step {step}: {replace_linears(model, args.rank, 2, head=args.head == 'lowrank')}")
            strategy, optimizers = set_up(model, args, device, moments)

        # One step: batch, forward and backward, clip, update.
        x, y = train_batch(tokens.train, args.seq_len, rows, args.seed, step, strategy.replica * count, count)
        batches = list(zip(x.to(place).split(args.batch_size), y.to(place).split(args.batch_size)))  # (B, T)
        loss = strategy.backward(batches, (args.seed, step))
        if args.grad_clip:
            strategy.clip(args.grad_clip)
        rate = learning_rate(step, args)
        step_all(optimizers, rate)
        folder.advance(rows * args.seq_len, began)

        # Look, and save.
        evaluates = folder.due(args.eval_interval or -(-args.max_iters // 4))
        if folder.step == 1 or evaluates or folder.stopped or folder.due(args.log_interval):
            row = dict(loss=all_reduce(loss) / strategy.replicas, lr=rate)
            if evaluates:
                held_out = eval_batches(tokens.val, args.seq_len, args.batch_size, args.eval_tokens)
                row["val_loss"] = strategy.evaluate(((x.to(place), y.to(place)), len(x)) for x, y in held_out)
            tokens_seen = folder.step * rows * args.seq_len
            folder.log(flops_per_token(model, args.seq_len, training=True), tokens=tokens_seen, **row)
        if folder.stopped or folder.due(args.save_interval):
            title = f"{args.init_from or args.model}, r = {rank_of(model)}, on {Path(args.data).name}"
            write = partial(save_model, model=model, tokenizer=tokens.tokenizer)
            folder.save(strategy, own_tensors(model), moments_of(model, optimizers), write, title)

    if folder.stopped:
        return folder.say_stopped("train.py")

    # The rounded model, summary.json, and what to type next.
    if args.bits < 16 and is_first():  # from the saved state: exactly the model whose loss was measured
        rounded, tokenizer = load_model(folder.path, bits=args.bits)
        replace_model(folder.path / f"int{args.bits}", rounded, tokenizer)
        say(f"{folder.path}/int{args.bits} has the rounded model, {stored_bytes(rounded) / 1e6:,.1f} MB")
    with torch.device("meta"):
        full_rank, parameters = count_parameters(Transformer(model.config)), count_parameters(model)
    folder.finish(folder.path, model=args.init_from or args.model, rank=rank_of(model), method=args.method,
                  bits=args.bits, parameters=parameters, parameters_full_rank=full_rank,
                  compression=full_rank / parameters)
    return 0

def fill_in(args, device):
    """Give what was not given the value that depends on the device or on other arguments."""
    gpu = device.torch_device.type == "cuda"
    muon = importlib.util.find_spec("beyond") and not args.init_from
    args.method = args.method or (2 if args.init_from else 1)
    args.optimizer = args.optimizer or ("muon" if muon else "adamw")
    args.start = args.start or ("orthogonal" if args.optimizer == "muon" else "normal")
    lr = 1e-3
    if args.init_from and args.optimizer == "adamw":  # whose first steps at 1e-3 raise the loss
        lr = 3e-4 if args.method == 3 else 1e-4
    args.lr = args.lr or lr
    args.max_iters = args.max_iters or (5000 if gpu else 150)
    batch = 16 if gpu else 4
    args.batch_size = args.batch_size or batch + -batch % (args.microbatches or 1)
    if args.pipeline and args.microbatches is None:
        args.microbatches = max(m for m in range(1, 4 * args.pipeline + 1) if args.batch_size % m == 0)
    attention = "sdpa" if args.compile else faster_attention(device)
    gpipe = args.pipeline and args.schedule == "gpipe"
    args.recompute = args.recompute or ("block" if gpipe else attention)

def faster_attention(device):
    """sdpa; in bfloat16 on a CPU, where torch's kernel takes twice as long, recompute.py's."""
    slow = device.torch_device.type == "cpu" and device.dtype == torch.bfloat16
    return "attention" if slow and importlib.util.find_spec("recompute") else "sdpa"

def check(args, given):
    """Refuse what can't go together, before anything slow begins."""
    refuse(args.init_from == "", "--init-from is empty: a folder, a file or a known name")
    decomposed = args.init_from and decomposed_from(args.init_from)
    refuse(args.method == 2 and not args.init_from,
           "--method 2 starts from the SVD of pretrained weights: say which with --init-from")
    refuse(args.method == 1 and args.init_from and args.rank,
           f"--method 1 starts from random factors, not from {args.init_from}: choose --method 2 or 3")
    refuse(args.compile and shutil.which("g++") is None, "--compile needs a C++ compiler: install g++")
    refuse(args.method == 3 and not args.rank and not args.resume and not decomposed,
           "--method 3 blends into layers of a rank: give --rank, or --init-from a folder of decompose.py")
    refuse(args.rank and decomposed,
           f"{args.init_from} has ranks already: leave --rank {args.rank} out, or start from {decomposed}")
    refuse(args.bits < 16 and args.method == 3,
           f"--bits {args.bits} and --method 3 both change how a low-rank layer computes: leave one out")
    refuse(args.shard and (world_size() == 1 or args.pipeline or args.method == 3 or args.warm_start),
           "--shard needs several processes of torchrun, and no --pipeline, --method 3 or warm_start")
    refuse(not args.pipeline and given & {"microbatches", "schedule"},
           "--microbatches and --schedule are of a pipeline: give --pipeline N")
    whole = args.compile or args.recompute == "block" or importlib.util.find_spec("beyond") is None
    refuse(args.schedule.startswith("zb") and whole, f"--schedule {args.schedule} splits a block's backward "
           "pass: it needs beyond/, and neither --compile nor --recompute block")
    refuse(args.pipeline and args.batch_size % args.microbatches,
           f"--batch-size {args.batch_size} is not divisible into {args.microbatches} microbatches")

def pretrained_model(args, given, home):
    """The model of --init-from, its layers replaced as --method says, and its tokenizer."""
    model, tokenizer = load_model(args.init_from)
    refuse(tokenizer is None, f"{args.init_from} has no tokenizer beside it: put its tokenizer.json there")
    named = config_for(args.model) if "model" in given else model.config
    for key in ("kind", "blocks", "heads", "width", "ffn"):
        refuse(getattr(named, key) != getattr(model.config, key), f"--init-from {args.init_from} is another "
               f"network than --model {args.model}: leave --model out")
    if args.rank:
        say(replace_linears(model, args.rank, args.method, head=args.head == "lowrank"))
    elif args.method == 3:
        dense = open_dense(decomposed_from(args.init_from))
        say(blend_with(model, lambda name: dense.get(f"{name}.weight")))
    model.set_dropout(args.dropout)
    return model.to(home), tokenizer

def random_model(args, vocab_size, home):
    """A model with random weights: shapes first, then memory, then values."""
    torch.manual_seed(args.seed)
    changes = dict(vocab_size=vocab_size) if args.model == "tiny" else {}  # others keep their own
    if args.shape:
        blocks, heads, width = args.shape
        changes |= dict(blocks=blocks, heads=heads, kv_heads=heads, width=width, ffn=4 * width)
    with torch.device("meta"):
        model = Transformer(config_for(args.model, dropout=args.dropout, **changes))
        line = f"full rank: {count_parameters(model) / 1e6:,.1f}M parameters"
        if args.rank and not args.warm_start:
            line = replace_linears(model, args.rank, args.method, start=args.start,
                                   head=args.head == "lowrank")
    say(line)
    size, memory = 4 * count_parameters(model), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    refuse(home.type == "cpu" and size > memory, f"--model {args.model} needs {size / 1e9:,.0f} GB, and "
           f"there are {memory / 1e9:,.0f}: give a --rank, or a smaller model")
    model.to_empty(device=home).init_weights()
    return model

def set_up(model, args, device, moments):
    """The strategy that trains the model, and its optimizers with their moments."""
    if args.recompute != "sdpa" or model.config.kind != "gpt2":
        from recompute import use_recompute
        use_recompute(model, args.recompute)
    if args.bits < 16:
        from quant import attach_fake_quantization
        count = attach_fake_quantization(model, args.bits)
        say(f"quantization-aware: {count} layers compute with weights rounded to {args.bits} bit")
    if args.compile:
        for block in model.blocks:
            block.compile()
    if args.pipeline:
        from pipeline import Pipeline
        microbatches = args.microbatches * args.grad_accum
        strategy = Pipeline(model, args.pipeline, args.schedule, microbatches, args.seq_len, device)
        say(strategy)
    else:
        def loss_of(x, y):
            return head_loss(model.head, model.hidden(x), y)
        strategy = distribute(model, loss_of, device, args.shard)
    optimizers = make_optimizers(model, args.lr, args.weight_decay, args.optimizer)
    restore_moments(model, optimizers, moments)
    return strategy, optimizers

def rank_of(model):
    """The rank of a model's layers, the largest if they differ; 0 at full rank."""
    return max((m.rank for m in model.modules() if isinstance(m, LowRankLinear)), default=0)

if __name__ == "__main__":
    command(main)
