"""Pretrain a transformer whose linear layers are y = B A x (sections IV.A and VI.B of the paper).

    python train.py --rank 192                                     GPT-2 on the text that comes with Python, a few minutes on a laptop
    python train.py --model tiny --rank 16 --data my_books/        a small model on your own text
    python train.py --method 2 --init-from gpt2 --rank 192         start from the SVD of a pretrained model
    python train.py --method 2 --init-from out/decomposed          ... or from what decompose.py made of it; --method 3 as well
    python train.py --method 3 --init-from gpt2 --rank 192         blend a pretrained model away: y = a W x + (1-a) B A x
    python train.py --rank 192 --bits 4                            quantization-aware: the loss is that of the model rounded to 4 bits
    torchrun --nproc_per_node 8 train.py --rank 192 --data openwebtext
    torchrun --nproc_per_node 8 --max-restarts 3 train.py --rank 192 --pipeline 4    4 stages x 2 replicas, restarted if a process is lost
    python train.py --resume                                       go on after Ctrl-C, a kill or a power cut

It leaves OUT/ as a model folder (python sample.py --model OUT), with metrics.jsonl, summary.json, loss.png and the state to resume from;
with --bits also OUT/int8 or OUT/int4, the rounded model.
"""
import argparse
import math
import os
import shutil
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from benches.account import advice, expected_memory, statement
from checkpoint import decomposed_from, load_model, open_dense, own_tensors, replace_model, save_state
from common.cli import InputError, StopSignal, check_folder, command, say
from common.data import check_length, eval_batches, open_corpus, prepare, train_batch
from common.device import find_device, matmul_rate, peak_memory
from common.folder import RunFolder, plot_losses
from common.loss import head_loss
from common.processes import local_rank, rank, world_size
from common.storage import read_state
from common.training import (
    all_reduce,
    already_done,
    check_numbers,
    check_rows,
    learning_rate,
    make_optimizers,
    moment_bytes,
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
from lowrank import STARTS, LowRankLinear, blend_alpha, blend_with, decay_products, finish_blend, replace_linears, set_alpha
from model import CONFIGS, Transformer, config_for, count_parameters, flops_per_token
from pipeline import SCHEDULES, Grid, Pipeline, check_trace, utilization, write_trace
from quant import attach_fake_quantization, stored_bytes
from recompute import MODES, use_recompute

# What a resumed run may not change: with another value it would not be the same run.
FIXED = ("model", "rank", "method", "init_from", "embedding_rank", "head", "dropout", "bits", "vocabulary", "seq_len", "seed",
         "optimizer", "warm_start")
SMALL = ("tiny", "small")  # models without a vocabulary of their own: it is as large as their tokenizer's


def parse(argv):
    """The arguments and the names of those that were given; what was not given is filled in by `defaults`."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    g = p.add_argument_group("model")
    g.add_argument("--model", help=f"architecture: {', '.join(CONFIGS)} (default: gpt2)")
    g.add_argument("--rank", type=int, help="rank r of every linear layer; 0 is full rank (default: 0)")
    g.add_argument("--method", type=int, help="1 from scratch, 2 from the SVD of --init-from, 3 blended (default: 1, with --init-from 2)")
    g.add_argument("--init-from", help="a pretrained model to start from: a folder, a file or a known name")
    g.add_argument("--embedding-rank", type=int, help="rank of the embedding W^E too; 0 leaves it dense (default: 0)")
    g.add_argument("--head", choices=("lowrank", "dense"), help="W^H: of the rank too, as in the paper, or left as it is, shared with W^E (default: lowrank)")
    g.add_argument("--dropout", type=float, help="dropout while training (default: 0)")
    g.add_argument("--bits", type=int, help="8 or 4: compute with weights rounded to so many bits, and save them so at the end (default: 16, not rounded)")
    g = p.add_argument_group("data")
    g.add_argument("--data", help="builtin, openwebtext, or a text file or folder (default: builtin)")
    g.add_argument("--data-dir", help="where named data sets are (default: $DATA_DIR, then data/)")
    g.add_argument("--vocabulary", type=int, help="train a tokenizer of so many pieces on the data; 0 takes GPT-2's (default: 0)")
    g.add_argument("--batch-size", type=int, help="sequences a step in each process (default: 4 on a CPU, 16 on a GPU, or what --microbatches divides)")
    g.add_argument("--grad-accum", type=int, help="batches whose gradients are added up for one step (default: 1)")
    g.add_argument("--seq-len", type=int, help="tokens in a training window (default: 256 on a CPU, else 1,024; at most the model's context)")
    g = p.add_argument_group("optimization")
    g.add_argument("--max-iters", type=int, help="steps of the whole schedule (default: 150 on a CPU, 5,000 on a GPU)")
    g.add_argument("--stop-at", type=int, help="end after this many steps, with a checkpoint; the schedule stays that of --max-iters")
    g.add_argument("--lr", type=float, help="highest learning rate (default: 1e-3)")
    g.add_argument("--warmup", type=int, help="steps to reach it (default: a tenth of --max-iters, at most 200)")
    g.add_argument("--weight-decay", type=float, help="decay of matrices; vectors have none (default: 0.1)")
    g.add_argument("--grad-clip", type=float, help="largest norm of the whole gradient; 0 leaves it as it is (default: 1)")
    g.add_argument("--seed", type=int, help="of weights, batches and dropout (default: 1)")
    g = p.add_argument_group("low rank from scratch (python bench.py quality compares them)")
    g.add_argument("--optimizer", choices=("muon", "adamw"), help="muon: orthogonalized steps for the matrices of the blocks, AdamW for the rest "
                   "(default: muon, with --init-from adamw)")
    g.add_argument("--start", choices=tuple(STARTS), help="first values of factors B and A (default: orthogonal with muon, else normal)")
    g.add_argument("--decay", choices=("factors", "product"), help="what weight decay shrinks: |A|^2 + |B|^2 or |B A|^2 (default: factors)")
    g.add_argument("--b-rate", type=float, help="learning rate of B over that of A (default: 1)")
    g.add_argument("--warm-start", type=float, help="share of the steps at full rank, before the SVD makes factors of the layers (default: 0)")
    g = p.add_argument_group("machine")
    g.add_argument("--dtype", help="float32, bfloat16, or auto: the one whose matrix products are faster here (default: auto)")
    g.add_argument("--recompute", choices=MODES, help="what the backward pass computes again instead of keeping it: sdpa the scores of attention, "
                   "block everything but the inputs of blocks (default: sdpa)")
    g.add_argument("--compile", action="store_true", default=None, help="compile the blocks with torch.compile")
    g.add_argument("--pipeline", type=int, help="cut the model into this many stages; further processes share the batch (default: 0, no pipeline)")
    g.add_argument("--microbatches", type=int, help="parts of a process's batch that follow each other through the stages (default: up to 4 a stage)")
    g.add_argument("--schedule", choices=SCHEDULES, help="gpipe, which recomputes blocks, or 1f1b (default: 1f1b)")
    g.add_argument("--shard", action="store_true", default=None, help="spread parameters, gradients and moments over all processes (fully sharded)")
    g.add_argument("--trace", metavar="FILE", help="write a Chrome trace of the last step of the pipeline, and its picture beside it")
    g = p.add_argument_group("output")
    g.add_argument("--out-dir", help="folder of this run (default: out/train)")
    g.add_argument("--resume", action="store_true", default=None, help="continue the run in --out-dir")
    g.add_argument("--log-interval", type=int, help="steps between two lines (default: 10)")
    g.add_argument("--eval-interval", type=int, help="steps between two looks at the validation text (default: a quarter of --max-iters)")
    g.add_argument("--eval-tokens", type=int, help="tokens of the validation text that are looked at (default: 8,192)")
    g.add_argument("--save-interval", type=int, help="steps between two checkpoints (default: 500)")
    args = p.parse_args(argv)
    return args, {k for k, v in vars(args).items() if v is not None}


def defaults(args, device):
    """Fill in what was not given."""
    gpu = device.torch_device.type == "cuda"
    iters = args.max_iters if args.max_iters is not None else 5000 if gpu else 150
    many, usual = max(1, args.microbatches or 1), 16 if gpu else 4  # the batch is divided into so many
    values = dict(model="gpt2", rank=0, method=2 if args.init_from else 1, embedding_rank=0, head="lowrank", dropout=0.0, bits=16, data="builtin", vocabulary=0,
                  data_dir=os.environ.get("DATA_DIR", "data"), batch_size=-(-usual // many) * many, grad_accum=1, max_iters=iters, stop_at=iters, lr=1e-3,
                  warmup=min(200, iters // 10), weight_decay=0.1, grad_clip=1.0, seed=1, dtype="auto",
                  optimizer="adamw" if args.init_from else "muon", start="normal" if args.init_from or args.optimizer == "adamw" else "orthogonal",
                  decay="factors", b_rate=1.0, warm_start=0.0,
                  recompute="block" if args.schedule == "gpipe" else "sdpa", compile=False, pipeline=0, microbatches=0, schedule="1f1b", shard=False, trace="",
                  out_dir="out/train", resume=False, log_interval=10, eval_interval=-(-iters // 4), eval_tokens=8192, save_interval=500)
    for name, value in values.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def check(args):
    for name in ("batch_size", "grad_accum", "max_iters", "stop_at", "log_interval", "eval_interval", "eval_tokens", "save_interval"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    check_numbers(args, "rank", "embedding_rank", "warmup", "lr", "weight_decay", "grad_clip", "seed", "pipeline", "microbatches", "vocabulary", "b_rate")
    check_folder(args.out_dir)
    if args.method not in (1, 2, 3):
        raise InputError(f"--method must be 1, 2 or 3, got {args.method}")
    if args.method == 2 and not args.init_from:
        raise InputError("--method 2 starts from the SVD of pretrained weights: say which with --init-from")
    if args.method == 1 and args.init_from and args.rank:
        raise InputError(f"--method 1 starts from random factors and would not use --init-from {args.init_from}: choose --method 2 or 3")
    if args.method == 3 and not args.rank and not args.resume and not (args.init_from and decomposed_from(args.init_from)):
        raise InputError("--method 3 blends into layers of a rank: give --rank, or a folder of decompose.py to --init-from")
    if args.rank and args.init_from and decomposed_from(args.init_from):
        raise InputError(f"{args.init_from} is decomposed and has its ranks: leave --rank {args.rank} out, or start from {decomposed_from(args.init_from)}")
    if args.embedding_rank and not args.rank:
        raise InputError(f"--embedding-rank {args.embedding_rank} is for a model whose layers are low-rank, too: give --rank as well")
    if args.bits not in (4, 8, 16):
        raise InputError(f"--bits must be 4, 8 or 16, got {args.bits}")
    if args.bits < 16 and args.method == 3:
        raise InputError(f"--bits {args.bits} and --method 3 both change how a low-rank layer computes: leave one of them out")
    if args.shard and (args.pipeline or args.method == 3 or world_size() == 1):
        why = ("a pipeline cuts the model already" if args.pipeline else "--method 3 changes its layers on the way" if args.method == 3
               else "there is one process: torchrun --nproc_per_node N train.py ... --shard")
        raise InputError(f"--shard spreads one unchanging model over several processes: {why}")
    check_start(args)
    check_pipeline(args)


def check_start(args):
    if not 0 <= args.warm_start < 1:
        raise InputError(f"--warm-start is a share of the steps, 0 to below 1, got {args.warm_start:g}")
    if args.warm_start and (args.method != 1 or not args.rank or args.pipeline or args.shard or args.bits < 16):
        raise InputError("--warm-start is of method 1 at a --rank, and changes the layers on the way: no --init-from, --pipeline, --shard or --bits with it")
    if args.decay == "product" and args.shard:
        raise InputError("--decay product multiplies whole factors, --shard spreads them: leave one of them out")
    if args.head == "dense" and args.embedding_rank:
        raise InputError(f"--head dense shares the matrix of W^E, which --embedding-rank {args.embedding_rank} replaces: leave one of them out")


def check_pipeline(args):
    if not args.pipeline:
        if args.trace or args.microbatches and not args.resume:
            raise InputError("--microbatches and --trace are of a pipeline: give --pipeline N")
        return
    if args.trace:
        check_trace(args.trace)
    args.microbatches = args.microbatches or max(m for m in range(1, 4 * args.pipeline + 1) if args.batch_size % m == 0)
    if args.batch_size % args.microbatches:
        raise InputError(f"--batch-size {args.batch_size} is not divisible into {args.microbatches} microbatches: change one of the two")
    if world_size() % args.pipeline:
        raise InputError(f"{world_size()} process{'es' * (world_size() > 1)} can't form {args.pipeline} stages: "
                         f"torchrun --nproc_per_node {args.pipeline} train.py ..., or a multiple of it")


# ----------------------------------------------------------------------------- what is trained

def new_model(args, device):
    """The model that a fresh run starts from, its tokenizer (None: none came with it) and the count of parameters at full rank."""
    if args.init_from:
        model, tokenizer = load_model(args.init_from)
        if tokenizer is None:
            raise InputError(f"{args.init_from} has no tokenizer beside its weights, and with another one they mean nothing: put its tokenizer.json there")
        with torch.device("meta"):
            full_rank = count_parameters(Transformer(model.config))
        if args.method == 3 and not args.rank:
            with open_dense(decomposed_from(args.init_from)) as dense:
                say(blend_with(model, lambda name: dense.get(f"{name}.weight")))
        if args.rank:
            bar = partial(tqdm, desc="decomposing", unit=" layers", disable=None, leave=False)
            say(replace_linears(model, args.rank, args.method, args.embedding_rank, bar, head=args.head == "lowrank"))
        model.set_dropout(args.dropout)
        return model.to(device), tokenizer, full_rank
    return None, None, None


def same_network(a, b):
    return all(getattr(a, name) == getattr(b, name) for name in ("kind", "blocks", "heads", "width", "ffn"))


def random_model(args, vocab_size, device):
    """A model of the named architecture with random weights: shapes first, then memory, then values."""
    torch.manual_seed(args.seed)
    changes = dict(vocab_size=vocab_size) if args.model in SMALL else {}
    with torch.device("meta"):
        model = Transformer(config_for(args.model, dropout=args.dropout, **changes))
        full_rank = count_parameters(model)
        line = f"full rank: {full_rank / 1e6:,.1f}M parameters"
        if args.rank and not args.warm_start:
            line = replace_linears(model, args.rank, args.method, args.embedding_rank, start=args.start, head=args.head == "lowrank")
    say(line)
    model.materialize(device).init_weights()
    return model, full_rank


class Loss(torch.nn.Module):
    """(tokens, targets) -> mean loss: the forward pass that DistributedDataParallel wraps."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens, targets):
        return head_loss(self.model.head, self.model.hidden(tokens), targets)


@torch.no_grad()
def evaluate(loss_of, val, args, device, replica, replicas):
    """Mean loss over the same windows of the validation text at every call, shared out among the replicas."""
    loss_of.eval()
    total = torch.zeros(2, dtype=torch.float64)
    for i, (x, y) in enumerate(eval_batches(val, args.seq_len, args.batch_size, args.eval_tokens)):
        if i % replicas == replica:
            with device.autocast():
                loss = loss_of(x.to(device.torch_device), y.to(device.torch_device))
            if loss is None:  # the pipeline's last stage knows it
                continue
            total += torch.tensor([loss.item() * len(x), len(x)], dtype=torch.float64)
    loss_of.train()
    total = all_reduce(total, device)
    return (total[0] / total[1]).item()


# ----------------------------------------------------------------------------- the run

def set_up(argv):
    """Everything before the first step: device, arguments, model, data, and the state to go on from."""
    args, given = parse(argv)
    state, folder, moments = None, None, {}
    if world_size() > 1:  # messages on the CPU go through gloo also where tensors on GPUs go through NCCL
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    if restarted(args.out_dir or "out/train"):
        args.resume = True
    if args.resume:
        folder, state, moments = read_state(args.out_dir or "out/train")
        state["args"].setdefault("optimizer", "adamw")  # of a run from before there was a choice
        args = restored_arguments(args, given, state["args"], FIXED)
    device = find_device(args.dtype or "auto")
    say(f"device {device.name}" + (f", {world_size()} processes" if world_size() > 1 else ""))
    say(f"dtype {str(device.dtype)[6:]} ({device.why}), {device.rate / 1e12:.2f} TFLOPS in products")
    config_for(args.model or "gpt2")  # an unknown name is refused before anything slow begins
    check(defaults(args, device))
    args.dtype = str(device.dtype)[6:]  # a resumed run computes as it began
    home = torch.device("cpu") if args.shard else device.torch_device  # a model to be sharded need not fit on one GPU
    if state is None:
        model, tokenizer, full_rank = new_model(args, home)
        if model is not None and "model" in given and not same_network(model.config, config_for(args.model)):
            raise InputError(f"--init-from {args.init_from} is another network than --model {args.model}: leave --model out")
    else:
        model, tokenizer = load_model(folder, home)
        full_rank = state["parameters_full_rank"]
    corpus = open_corpus(args.data, args.data_dir)
    for turn in range(2):  # the first process prepares the data, then the others find it
        if (rank() == 0) == (turn == 0):
            tokens = prepare(corpus, tokenizer, args.vocabulary or (8192 if args.model == "gpt2" else 4096), own=args.vocabulary > 0)
        if world_size() > 1:
            dist.barrier()
    text = tokens.meta["train"]["sha256"]
    if state and state.get("text", text) != text:
        raise InputError(f"--data {args.data} is not the text that the run began with: give that one, or start another run with another --out-dir")
    if model is None:
        model, full_rank = random_model(args, tokens.tokenizer.vocab_size, home)
    return args, device, model.train(), tokens, full_rank, state, moments


def main(argv=None):
    args, device, model, tokens, full_rank, state, moments = set_up(argv)
    say(f"data {args.data}: {len(tokens.train):,} tokens to train on, {len(tokens.val):,} to validate")
    say(f"tokenizer {tokens.tokenizer.name}")
    tokens.check_fits(model.config.vocab_size)
    args.seq_len = args.seq_len if args.seq_len is not None else min(model.config.context, 1024 if device.torch_device.type == "cuda" else 256)
    if args.seq_len < 1:
        raise InputError(f"--seq-len must be at least 1, got {args.seq_len}")
    if args.seq_len > model.config.context:
        raise InputError(f"--seq-len {args.seq_len} is longer than the model's context of {model.config.context}")
    check_length(tokens.train, args.seq_len, "training")
    try:
        with Watchdog():
            return Run(args, device, model, tokens, full_rank, state, moments).train()
    finally:
        if world_size() > 1:
            dist.destroy_process_group()


class Run:
    """One training run: `train` is the loop, the rest is what it calls."""

    def __init__(self, args, device, model, tokens, full_rank, state, moments):
        self.args, self.device, self.model, self.tokens, self.full_rank = args, device, model, tokens, full_rank
        self.replicas, self.replica = world_size() // max(1, args.pipeline), rank()
        self.shapes = dict(batch=args.batch_size, length=args.seq_len, autocast=device.dtype == torch.bfloat16, recompute=args.recompute,
                           optimizer_bytes=moment_bytes(model, args.optimizer))
        self.pipeline = None
        if args.pipeline:
            self.make_pipeline()
        else:
            say(statement(expected_memory(model, **self.shapes)))
        self.rows = args.batch_size * args.grad_accum * self.replicas  # the whole batch of a step
        check_rows(state, self.rows, args)
        self.step = state["step"] if state else 0
        self.warming = args.warm_start > 0 and not any(isinstance(layer, LowRankLinear) for layer in model.modules())
        self.seconds_before = state["seconds"] if state else 0.0
        if state is None:  # not before everything else is in order, and --init-from, which may be the same folder, has been read
            set_aside(args.out_dir)
        self.folder = RunFolder(args.out_dir, resume_step=self.step if state else None)
        self.tokens_per_step = self.rows * args.seq_len
        self.saved_at = self.step
        self.started = time.perf_counter()
        self.prepare(moments)

    def prepare(self, moments):
        """Everything around the model as its layers are now: what is recomputed, compiled and shared, and the optimizers."""
        args, model, device = self.args, self.model, self.device
        self.flops = flops_per_token(model, args.seq_len, training=True)
        use_recompute(model, args.recompute)
        if args.bits < 16:
            say(f"quantization-aware: {attach_fake_quantization(model, args.bits)} layers compute with weights rounded to {args.bits} bit")
        if args.compile:
            if shutil.which("g++") is None and device.torch_device.type == "cpu":
                raise InputError("--compile needs a C++ compiler: install g++, or leave it out")
            for block in model.blocks:
                block.compile()
        self.loss_of, place = self.pipeline or Loss(model), {}
        if args.shard:
            from common.shard import part_like, shard
            shard(model, self.loss_of, device.torch_device.type)
            place = dict(place=part_like)
        elif world_size() > 1 and not self.pipeline:
            self.loss_of = DistributedDataParallel(self.loss_of, device_ids=[local_rank()] if device.torch_device.type == "cuda" else None,
                                                   broadcast_buffers=False)
        self.optimizers = make_optimizers(model, args.lr, args.weight_decay, args.optimizer, args.b_rate, args.decay, **place)
        restore_optimizers(model, self.optimizers, moments, **place)

    def end_warm_start(self):
        """Full rank was long enough: the factors of the SVD take over, and what stays keeps its moments."""
        self.warming = False
        moments = optimizer_tensors(self.model, self.optimizers)
        say(f"step {self.step}: " + replace_linears(self.model, self.args.rank, 2, self.args.embedding_rank, head=self.args.head == "lowrank"))
        stay = dict(self.model.named_parameters())
        self.prepare({key: moment for key, moment in moments.items() if key.rsplit("#", 1)[0] in stay})

    def make_pipeline(self):
        args, grid = self.args, Grid(self.args.pipeline)
        self.pipeline = Pipeline(self.model, grid, args.schedule, args.microbatches * args.grad_accum, args.seq_len, self.device.autocast)
        self.replica = grid.replica
        say(f"pipeline {args.schedule}: {grid.stages} stages x {grid.replicas} replicas, {args.microbatches * args.grad_accum} microbatches, "
            f"utilization at most {self.pipeline.utilization:.3f}")

    def train(self):
        args, stop = self.args, StopSignal()
        last = min(args.stop_at, args.max_iters)
        if already_done(self.step, last, args.out_dir):
            return 0
        bar = tqdm(total=last, initial=self.step, unit=" steps", disable=None if rank() == 0 else True, dynamic_ncols=True)
        times = []
        while self.step < last:
            began = time.perf_counter()
            if args.trace and self.step == last - 1:
                self.pipeline.trace = []
            try:
                loss = self.one_step()
            except RuntimeError as e:  # of which torch.OutOfMemoryError is one; on a CPU it has no name of its own
                if not isinstance(e, torch.OutOfMemoryError) and "can't allocate memory" not in str(e):
                    raise
                raise InputError(advice(self.model, **self.shapes, grad_accum=args.grad_accum)) from None
            self.step += 1
            bar.update()
            times.append(time.perf_counter() - began)
            stopped = self.any_process(stop.name is not None)
            if self.step == 1 or self.step % args.log_interval == 0 or self.step % args.eval_interval == 0 or self.step == last or stopped:
                self.log(all_reduce(loss.cpu(), self.device).item() / self.replicas, times, last, bar)
            if stopped:
                break
            if self.step % args.save_interval == 0 and self.step < last:
                self.save()
        bar.close()
        if self.saved_at < self.step:
            self.save()
        rows = self.pipeline.traced() if args.trace else None
        if rows and rank() == 0:
            write_trace(rows, args.trace, f"{args.schedule}, {args.pipeline} stages, step {self.step}, measured: utilization {utilization(rows):.3f}")
        self.finish(times, stop.name)
        if stop.name:
            say(f"stopped by {stop.name} after step {self.step}, saved; go on with")
            say(f"    python train.py --resume --out-dir {args.out_dir}")
            return 130 if stop.name == "SIGINT" else 143
        return 0

    def one_step(self):
        """One optimizer step on the whole batch of this step; returns this process's mean loss (a tensor: reading it would wait for a GPU)."""
        args, step = self.args, self.step
        torch.manual_seed(int(np.random.SeedSequence((args.seed, step, rank())).generate_state(1)[0]))  # dropout depends on the step alone
        alpha = blend_alpha(step, args.max_iters)
        if args.method == 3 and set_alpha(self.model, alpha) and alpha == 0:
            say(f"step {step}: alpha is 0, {finish_blend(self.model)} blended layers are low-rank from now on")
            self.flops = flops_per_token(self.model, args.seq_len, training=True)
        if self.warming and step >= int(args.warm_start * args.max_iters):
            self.end_warm_start()
        rate = learning_rate(step, args)
        set_rate(self.optimizers, rate)
        count = args.batch_size * args.grad_accum
        x, y = train_batch(self.tokens.train, args.seq_len, self.rows, args.seed, step, first=self.replica * count, count=count)
        total = self.pipeline.step(x, y, (args.seed, step)) if self.pipeline else self.backward(x, y)
        if args.grad_clip and self.pipeline:
            self.pipeline.clip(args.grad_clip)
        elif args.grad_clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), args.grad_clip)
        if args.decay == "product":
            decay_products(self.model, rate * args.weight_decay)
        step_all(self.optimizers)
        return total

    def backward(self, x, y):
        """Gradients of the mean loss over this process's batch, a part at a time; returns that loss."""
        args = self.args
        total = torch.zeros((), device=self.device.torch_device)
        for i in range(args.grad_accum):
            part = slice(i * args.batch_size, (i + 1) * args.batch_size)
            if world_size() > 1 and not args.shard:
                self.loss_of.require_backward_grad_sync = i == args.grad_accum - 1  # gradients travel once, with the last part
            with self.device.autocast():
                loss = self.loss_of(x[part].to(self.device.torch_device), y[part].to(self.device.torch_device)) / args.grad_accum
            loss.backward()
            total += loss.detach()
        return total

    def any_process(self, flag):
        """Whether any process was told to stop: all must leave the loop at the same step."""
        return bool(all_reduce(torch.tensor(float(flag)), self.device, dist.ReduceOp.MAX))

    def log(self, loss, times, last, bar):
        args, step = self.args, self.step
        if not math.isfinite(loss):
            raise not_finite(f"the loss is {loss}", args, step, self.saved_at)
        row = dict(step=step, loss=loss, lr=learning_rate(step - 1, args), tokens=step * self.tokens_per_step)
        if step % args.eval_interval == 0 or step == last:
            replica = (0, 1) if args.shard else (self.replica, self.replicas)  # a sharded model computes in all processes at once or not at all
            row["val_loss"] = evaluate(self.loss_of, self.tokens.val, args, self.device, *replica)
            self.device.rate = max(self.device.rate, matmul_rate(self.device.torch_device, self.device.dtype))  # the first time may have been a busy one
        seconds = float(np.median(times[-args.log_interval:]))
        row |= dict(tokens_per_second=self.tokens_per_step / seconds, step_ms=seconds * 1e3, mfu=self.mfu(seconds),
                    peak_memory_bytes=peak_memory(self.device.torch_device))
        self.folder.log(**row)
        left = time.strftime("%H:%M:%S", time.gmtime((last - step) * seconds))
        if rank() == 0:
            bar.write(f"step {step} loss {loss:.4f} lr {row['lr']:.1e} {row['tokens_per_second']:.0f} tok/s {row['step_ms']:.0f} ms "
                      f"{row['peak_memory_bytes'] / 1e9:.1f} GB mfu {row['mfu']:.0%} left {left}")
            if "val_loss" in row:
                bar.write(f"step {step} val_loss {row['val_loss']:.4f}")

    def mfu(self, seconds):
        return self.flops * self.tokens_per_step / seconds / (self.device.rate * world_size())

    def save(self):
        refuse_to_save(self.model.parameters(), self.device, self.args, self.step, self.saved_at)
        tensors, moments = own_tensors(self.model), optimizer_tensors(self.model, self.optimizers)
        if self.pipeline:  # process 0 writes the whole model, whatever the number of stages
            tensors, moments = self.pipeline.gather(tensors), self.pipeline.gather(moments)
        elif self.args.shard:
            from common.shard import whole
            tensors, moments = whole(tensors), whole(moments)
        if rank() == 0:
            state = dict(step=self.step, rows=self.rows, text=self.tokens.meta["train"]["sha256"], args=vars(self.args), parameters_full_rank=self.full_rank,
                         seconds=self.seconds())
            save_state(self.args.out_dir, self.model, self.tokens.tokenizer, moments, state, tensors)
            plot_losses(self.folder.path, f"{self.args.init_from or self.args.model}, {f'r = {r}' if (r := self.rank_of_model()) else 'full rank'}, "
                        f"on {Path(self.args.data).name}")
        if world_size() > 1:
            dist.barrier()
        self.saved_at = self.step

    def rank_of_model(self):
        """--rank; of a model that came with its ranks (--init-from of a low-rank one) the largest."""
        return self.args.rank or max((m.rank for m in self.model.modules() if isinstance(m, LowRankLinear)), default=0)

    def seconds(self):
        return self.seconds_before + time.perf_counter() - self.started

    def save_rounded(self):
        """OUT/int8 or OUT/int4: the model that the loss was measured on. Returns its bytes in memory."""
        folder = Path(self.args.out_dir) / f"int{self.args.bits}"
        model, tokenizer = load_model(self.args.out_dir, bits=self.args.bits)
        replace_model(folder, model, tokenizer)
        say(f"{folder}/ has the {self.args.bits}-bit model, {stored_bytes(model) / 1e6:,.1f} MB")
        return stored_bytes(model)

    def finish(self, times, stopped):
        parameters, memory = count_parameters(self.model), peak_memory(self.device.torch_device)
        total_memory = int(all_reduce(torch.tensor(float(memory), dtype=torch.float64), self.device))
        largest = int(all_reduce(torch.tensor(float(memory), dtype=torch.float64), self.device, dist.ReduceOp.MAX))
        size = self.save_rounded() if self.args.bits < 16 and rank() == 0 else 4 * parameters
        seconds = float(np.median(times)) if times else (self.folder.last("step_ms") or 1e3 * self.seconds() / self.step) / 1e3
        self.folder.finish(
            model=self.args.init_from or self.args.model, rank=self.rank_of_model(), method=self.args.method, parameters=parameters,
            parameters_full_rank=self.full_rank, compression=self.full_rank / parameters, bits=self.args.bits, model_bytes=size, steps=self.step,
            tokens=self.step * self.tokens_per_step, loss=self.folder.last("loss"), val_loss=self.folder.last("val_loss"),
            tokens_per_second=self.tokens_per_step / seconds, step_ms=seconds * 1e3, mfu=self.mfu(seconds), peak_memory_bytes=largest,
            peak_memory_bytes_total=total_memory, seconds=self.seconds(), devices=world_size(), device_hours=world_size() * self.seconds() / 3600,
            device=self.device.name, dtype=str(self.device.dtype)[6:], stopped_by=stopped, arguments=vars(self.args))
        say(f"{self.args.out_dir}/ has the model, metrics.jsonl, summary.json and loss.png; try")
        say(f"    python sample.py --model {self.args.out_dir} --prompt \"The file\"")


if __name__ == "__main__":
    command(main)
