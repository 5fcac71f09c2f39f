"""Pipeline parallelism by hand: GPipe and 1F1B over torch.distributed (section IV.B, "Pipeline model-parallel method", and Fig. 3).

A model that is too large for one GPU is cut into N stages of neighbouring blocks, each in a process of its own. A stage passes its
activations on to the next one and, on the way back, the gradient of what it was given to the one before. With the whole batch at once,
Fig. 3(a), one stage computes while N - 1 wait. So the batch is split into M microbatches that follow each other through the stages,
Fig. 3(b); Fm and Bm are the forward and the backward pass of microbatch m:

           gpipe, N = 4, M = 4                                   1f1b, N = 4, M = 4

    clock   0  1  2  3  4  5  6  7  8  9  10 11 12 13     clock   0  1  2  3  4  5  6  7  8  9  10 11 12 13
    stage 0 F0 F1 F2 F3 .  .  .  .  .  .  B3 B2 B1 B0     stage 0 F0 F1 F2 F3 .  .  .  B0 .  B1 .  B2 .  B3
    stage 1 .  F0 F1 F2 F3 .  .  .  .  B3 B2 B1 B0 .      stage 1 .  F0 F1 F2 .  .  B0 F3 B1 .  B2 .  B3 .
    stage 2 .  .  F0 F1 F2 F3 .  .  B3 B2 B1 B0 .  .      stage 2 .  .  F0 F1 .  B0 F2 B1 F3 B2 .  B3 .  .
    stage 3 .  .  .  F0 F1 F2 F3 B3 B2 B1 B0 .  .  .      stage 3 .  .  .  F0 B0 F1 B1 F2 B2 F3 B3 .  .  .

A stage is busy in 2M of 2(N + M - 1) clocks: its utilization is M / (N + M - 1), and the dots are the bubble. Gradients add up over the
microbatches, and the weights change when the last one is back: the result is that of one process and the whole batch.

GPipe keeps the activations of all M microbatches until their backward pass, and so goes with recomputation (recompute.py, a block's
input is all that is kept). 1F1B has the same bubble, but a backward pass runs as soon as it can, and frees what its forward pass
kept: stage s holds at most N - s microbatches, however many there are.

    python pipeline.py --stages 4 --microbatches 8 --schedule gpipe      the clock table and the picture of Fig. 3
    torchrun --nproc_per_node 4 train.py --rank 192 --pipeline 4 --microbatches 8 --schedule 1f1b
    torchrun --nproc_per_node 4 train.py --pipeline 2                    2 stages x 2 replicas, which share the batch
"""
import argparse
import json
import time
from collections import deque
from contextlib import nullcontext
from datetime import timedelta
from functools import cache
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn

from common.cli import InputError, check_folder, check_positive, command
from common.loss import head_loss
from model import matmul_weights, rope_tables

SCHEDULES = ("gpipe", "1f1b")
TIMEOUT = timedelta(minutes=10)  # the longest that a process may wait for a living one: compiling and evaluating take minutes


# ----------------------------------------------------------------------------- the schedule, as data

def schedule(kind, stages, microbatches):
    """For each stage the list of its steps, ("F", m) or ("B", m), in order."""
    if kind not in SCHEDULES:
        raise InputError(f"--schedule must be one of {', '.join(SCHEDULES)}, got {kind}")
    if stages < 1 or microbatches < 1:
        raise InputError(f"there must be at least 1 stage and 1 microbatch, got {stages} and {microbatches}")
    forward, backward = [("F", m) for m in range(microbatches)], [("B", m) for m in range(microbatches)]
    if kind == "gpipe":
        return [forward + backward[::-1] for _ in range(stages)]
    lists = []
    for s in range(stages):
        ahead = min(stages - 1 - s, microbatches)  # forward passes before the first backward pass can be there
        pairs = [step for pair in zip(forward[ahead:], backward) for step in pair]
        lists.append(forward[:ahead] + pairs + backward[microbatches - ahead:])
    return lists


def simulate(lists, forward=1, backward=1, transfer=0):
    """When each step runs, if nothing but its stage and its input holds it up: [(stage, "F" or "B", m, start, end)].

    forward, backward: the time of a stage's step, one number or one for each stage; transfer: of a message.
    """
    last, at, free, ends, rows = len(lists) - 1, [0] * len(lists), [0] * len(lists), {}, []
    cost = {kind: [c] * len(lists) if np.isscalar(c) else c for kind, c in (("F", forward), ("B", backward))}
    while any(i < len(steps) for i, steps in zip(at, lists)):
        ready = []
        for s, steps in enumerate(lists):
            if at[s] == len(steps):
                continue
            kind, m = steps[at[s]]
            source = (s - 1 if kind == "F" else s + 1)  # an input comes from there, except at the two ends
            needs = (kind, m, source) if 0 <= source <= last else ("F", m, s) if kind == "B" else None
            if needs is None or needs in ends:
                ready.append((s, kind, m, max(free[s], 0 if needs is None else ends[needs] + transfer * (needs[2] != s))))
        if not ready:
            raise InputError(f"the schedule can't run: stages wait for each other at {[steps[i:i + 1] for i, steps in zip(at, lists)]}")
        for s, kind, m, start in ready:
            free[s] = ends[kind, m, s] = start + cost[kind][s]
            at[s] += 1
            rows.append((s, kind, m, start, free[s]))
    return rows


def utilization(rows):
    """The share of the stages' time, from the first start to the last end, in which they compute."""
    stages = 1 + max(s for s, *_ in rows)
    return sum(end - start for *_, start, end in rows) / stages / (max(r[4] for r in rows) - min(r[3] for r in rows))


def stored(steps):
    """The most microbatches that a stage holds activations of: started forward, not yet through backward."""
    return max(accumulate(1 if kind == "F" else -1 for kind, _ in steps))


def clock_table(lists):
    """The simulation with steps of one clock, as text."""
    rows = simulate(lists)
    clocks, width = max(r[4] for r in rows), 1 + max(len(f"{kind}{m}") for _, kind, m, *_ in rows)
    cells = [["."] * clocks for _ in lists]
    for s, kind, m, start, _ in rows:
        cells[s][start] = f"{kind}{m}"
    label = 6 + len(str(len(lists) - 1))
    lines = ["clock".ljust(label) + " " + "".join(str(c).ljust(width) for c in range(clocks))]
    lines += [f"stage {s}".ljust(label) + " " + "".join(c.ljust(width) for c in row) for s, row in enumerate(cells)]
    return "\n".join(line.rstrip() for line in lines)


def draw(rows, path, title, unit="clocks"):
    """The picture of Fig. 3: a row for each stage, a bar for each step."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    stages, begin, end = 1 + max(r[0] for r in rows), min(r[3] for r in rows), max(r[4] for r in rows)
    fig, ax = plt.subplots(figsize=(11, 0.8 + 0.5 * stages), dpi=120, layout="constrained")
    for s, kind, m, start, stop in rows:
        ax.barh(s, stop - start, 0.9, start - begin, color={"F": "#8ab6e8", "B": "#f2c078"}[kind], edgecolor="white", lw=0.6)
        if (stop - start) * 50 > end - begin:  # room for its name
            ax.text((start + stop) / 2 - begin, s, f"{kind}{m}", ha="center", va="center", fontsize=7)
    ax.set(yticks=range(stages), yticklabels=[f"stage {s}" for s in range(stages)], xlabel=unit, title=title, xlim=(0, end - begin))
    ax.invert_yaxis()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path)
    plt.close(fig)


def check_trace(path):
    """Refuse a trace that can't be written, before the run."""
    if Path(path).suffix == ".png":
        raise InputError(f"--trace {path}: the picture is written beside the trace, under this name: let the trace end in .json")
    check_folder(Path(path).parent)


def write_trace(rows, path, title):
    """Measured rows (times in seconds) as a Chrome trace, for chrome://tracing or ui.perfetto.dev, and beside it the picture."""
    begin = min(r[3] for r in rows)
    events = [dict(name=f"{kind}{m}", ph="X", pid=0, tid=s, ts=(start - begin) * 1e6, dur=(end - start) * 1e6, cname={"F": "good", "B": "bad"}[kind])
              for s, kind, m, start, end in rows]
    events += [dict(name="thread_name", ph="M", pid=0, tid=s, args=dict(name=f"stage {s}")) for s in sorted({r[0] for r in rows})]
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(traceEvents=events, displayTimeUnit="ms")))
    draw([(s, kind, m, start * 1e3, end * 1e3) for s, kind, m, start, end in rows], path.with_suffix(".png"), title, "milliseconds")


# ----------------------------------------------------------------------------- where to cut

def costs(model, length):
    """Operations a token of each piece of the model, counted: the embedding, each block, the head. In GPT-2 the head costs as much as 5 blocks."""
    attention = 2 * length * model.config.heads * model.config.head_size  # q k^T and s v look at half of the sequence on average
    return [2 * matmul_weights(model.embed), *(2 * matmul_weights(b) + attention for b in model.blocks), 2 * matmul_weights(model.head)]


def balance(costs, stages):
    """Cut the pieces into runs so that the costliest stage costs least, then the second costliest, and so on: a range for each stage."""
    if stages > len(costs) - 2:
        raise InputError(f"{stages} stages are more than the model's {len(costs) - 2} blocks: choose a smaller --pipeline")
    total = [0, *accumulate(costs)]

    @cache
    def best(end, stages):
        """(costs of the stages, the largest first; where they begin) for pieces 0..end."""
        if stages == 1:
            return (total[end],), (0,)
        options = ((best(cut, stages - 1), cut) for cut in range(stages - 1, end))
        return min((tuple(sorted((*loads, total[end] - total[cut]), reverse=True)), (*cuts, cut)) for (loads, cuts), cut in options)

    cuts = (*best(len(costs), stages)[1], len(costs))
    return [range(a, b) for a, b in zip(cuts, cuts[1:])]


def piece_of(name, blocks):
    """The piece that the parameter of this name belongs to: 0 the embedding, 1 + i block i, 1 + blocks the norm and the head."""
    first, *rest = name.split(".")
    return 0 if first in ("embed", "positions") else 1 + int(rest[0]) if first == "blocks" else 1 + blocks


def cut(model, pieces):
    """Take the memory of all parameters but those of `pieces`: on the meta device they keep their names and shapes; in place.

    So names, counts and layers stay those of the whole model. A tied matrix stays in the first and in the last stage.
    """
    named = list(model.named_parameters(remove_duplicate=False))
    own = {id(p) for name, p in named if piece_of(name, len(model.blocks)) in pieces}
    empty = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for _, p in named if id(p) not in own}
    for name, p in named:
        if id(p) in empty:
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, empty[id(p)])


# ----------------------------------------------------------------------------- processes and messages

class Grid:
    """Processes as stages x replicas: process = stage * replicas + replica, so that neighbours share the gradients, which are the larger messages."""

    def __init__(self, stages):
        world = dist.get_world_size() if dist.is_initialized() else 1
        if world % stages:
            raise InputError(f"{world} process{'es' * (world > 1)} can't form {stages} stages: start a multiple of {stages} processes, "
                             f"torchrun --nproc_per_node {stages} train.py ...")
        self.stages, self.replicas = stages, world // stages
        self.stage, self.replica = divmod(dist.get_rank() if world > 1 else 0, self.replicas)
        self.first, self.last = self.stage == 0, self.stage == stages - 1
        self.pipe = self.data = self.ends = None
        if world > 1:
            pipes = [[s * self.replicas + r for s in range(stages)] for r in range(self.replicas)]
            self.pipe = self.groups(pipes)
            self.ends = self.groups([[p[0], p[-1]] for p in pipes]) if stages > 1 else None
            self.data = self.groups([list(row) for row in zip(*pipes)])
            # a group for each direction: what two processes exchange within a group, NCCL does in order, and activations must not wait for gradients
            self.wires = {kind: self.groups(pipes) for kind in "FB"}

    @staticmethod
    def groups(lists):
        """Every process takes part in making every group; it gets its own."""
        return dist.new_subgroups_by_enumeration(lists, timeout=TIMEOUT)[0]


class Wires:
    """The messages of one stage: activations from stage - 1 and to stage + 1 ("F"), gradients the other way ("B").

    Why nobody waits forever: a send returns at once (unless N earlier ones are still under way), and messages on a wire have the order
    of the steps on both of its ends. So a step waits only for steps that come before it, and `simulate` shows that this can be. Each
    receive is posted a step ahead: data travels while the stage computes. Shapes and dtypes are known, so nothing else has to travel.
    """

    def __init__(self, grid, device):
        self.grid, self.device = grid, device
        up, down = grid.stage + 1, grid.stage - 1
        self.sources = {"F": None if grid.first else down, "B": None if grid.last else up}
        self.targets = {"F": None if grid.last else up, "B": None if grid.first else down}
        self.sent = {"F": deque(), "B": deque()}

    def begin(self, steps, shape, dtype):
        """Post the first receive on each wire."""
        self.shape, self.dtype, self.posted = shape, dtype, {}
        self.awaited = {wire: deque(m for kind, m in steps if kind == wire) for wire in "FB"}
        for wire in "FB":
            self.post(wire)

    def post(self, wire):
        if self.sources[wire] is not None and self.awaited[wire]:
            buffer = torch.empty(self.shape, dtype=self.dtype, device=self.device)
            work = dist.irecv(buffer, group=self.grid.wires[wire], group_src=self.sources[wire])
            self.posted[wire] = self.awaited[wire].popleft(), work, buffer

    def receive(self, wire, m):
        """The activation or gradient of microbatch m; None where none comes. The next one may come from now on."""
        if self.sources[wire] is None:
            return None
        posted, work, buffer = self.posted.pop(wire)
        if posted != m:
            raise InputError(f"stage {self.grid.stage} expects {wire}{m} while {wire}{posted} is on its way: the schedules of two stages differ")
        work.wait()
        self.post(wire)
        return buffer

    def send(self, wire, tensor):
        """Start sending. The tensor is kept until it is gone; of more than N sends under way, the oldest is waited for."""
        if self.targets[wire] is None:
            return
        tensor = tensor.detach().contiguous()
        self.sent[wire].append((dist.isend(tensor, group=self.grid.wires[wire], group_dst=self.targets[wire]), tensor))
        if len(self.sent[wire]) > self.grid.stages:
            self.sent[wire].popleft()[0].wait()

    def finish(self):
        for sent in self.sent.values():
            while sent:
                sent.popleft()[0].wait()


def execute(steps, forward, wires, trace=None):
    """Run one stage's steps. forward(m, x) -> y, or the scaled loss in the last stage; x is None in the first one.

    Returns the most microbatches whose activations were held at once. trace: a list that gets (stage, kind, m, start, end).
    """
    held, most = {}, 0
    for kind, m in steps:
        arrived = wires.receive(kind, m)
        start = clock(wires.device) if trace is not None else 0
        if kind == "F":
            x = arrived if arrived is None else arrived.requires_grad_()
            y = forward(m, x)
            held[m], most = (x, y), max(most, len(held) + 1)
            wires.send("F", y)
        else:
            x, y = held.pop(m)
            torch.autograd.backward(y, arrived)  # the last stage's y is the loss, and nothing arrives
            wires.send("B", None if x is None else x.grad)
        if trace is not None:
            trace.append((wires.grid.stage, kind, m, start, clock(wires.device)))
    wires.finish()
    return most


def clock(device):
    """Seconds; on a GPU after what was computed so far, but not after messages under way, which may need our next step."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    return time.time()


# ----------------------------------------------------------------------------- a model's stage

class Pipeline(nn.Module):
    """The part of a model that this process computes. Calling it gives the loss without a gradient, in the last stage; None in the others.

    pipeline = Pipeline(model, Grid(stages), "1f1b", microbatches)   cuts the model in place
    loss = pipeline.step(x, y, seed=(1, step))                       all gradients are there: scaled, and summed over replicas and tied copies
    """

    def __init__(self, model, grid, kind, microbatches, length=None, autocast=nullcontext):
        super().__init__()
        self.model, self.grid, self.microbatches, self.autocast = model, grid, microbatches, autocast
        cost = costs(model, length or model.config.context)
        runs, lists = balance(cost, grid.stages), schedule(kind, grid.stages, microbatches)
        self.pieces, self.steps = runs[grid.stage], lists[grid.stage]
        loads = [sum(cost[i] for i in run) for run in runs]
        self.utilization = utilization(simulate(lists, loads, [2 * load for load in loads]))  # what the formula says, if the stages cost the same
        self.device = next(model.parameters()).device
        with torch.no_grad(), autocast():  # the residual stream keeps the dtype that the embedding gives it
            self.dtype = model.begin(torch.zeros(1, 1, dtype=torch.long, device=self.device))[0].dtype
        self.tied = grid.stages > 1 and getattr(model.head, "weight", None) is getattr(model.embed, "weight", model)
        cut(model, self.pieces)
        self.wires = Wires(grid, self.device)
        self.most_held, self.trace = 0, None

    def own(self):
        return [p for p in self.model.parameters() if not p.is_meta]

    def run(self, tokens, x, seed=None):
        """This stage's blocks: from tokens (b, T) or activations x (b, T, C) to activations. seed: what dropout depends on."""
        T, rope, config = tokens.shape[1], None, self.model.config
        if self.grid.first:
            self.seed(seed, 0)
            x, rope, _ = self.model.begin(tokens)
        elif config.architecture.rope:
            rope = rope_tables(torch.arange(T, device=self.device), config)
        for i in range(config.blocks):
            if 1 + i in self.pieces:
                self.seed(seed, 1 + i)
                x = self.model.blocks[i](x, rope)
        return x

    def seed(self, seed, piece):
        """Each piece draws its own dropout for each microbatch, so that it does not matter which process computes it."""
        if seed is not None and self.model.training and self.model.config.dropout:
            torch.manual_seed(int(np.random.SeedSequence((*seed, piece)).generate_state(1)[0]))

    def loss(self, x, targets):
        return head_loss(self.model.head, self.model.norm(x), targets)

    def shape(self, tokens):
        return (*tokens.shape, self.model.config.width)

    def step(self, x, y, seed):
        """Forward and backward over tokens x and targets y (B, T) of this replica; returns their mean loss, 0 where it is not known."""
        M, replicas = self.microbatches, self.grid.replicas
        if len(x) % M:
            raise InputError(f"a batch of {len(x)} sequences is not divisible into {M} microbatches: change --batch-size or --microbatches")
        tokens, targets = x.to(self.device).chunk(M), y.to(self.device).chunk(M)
        losses = []

        def forward(m, x):
            with self.autocast():
                x = self.run(tokens[m], x, (*seed, self.grid.replica * M + m))
                if not self.grid.last:
                    return x
                losses.append(self.loss(x, targets[m]))
            return losses[-1] / (M * replicas)  # the mean over the whole batch

        self.wires.begin(self.steps, self.shape(tokens[0]), self.dtype)
        self.most_held = execute(self.steps, forward, self.wires, self.trace)
        self.sum_gradients()
        return torch.stack([loss.detach() for loss in losses]).mean() if losses else torch.zeros((), device=self.device)

    def sum_gradients(self):
        """Over the two copies of a tied matrix, then over the replicas."""
        if self.tied and (self.grid.first or self.grid.last):
            dist.all_reduce(self.model.embed.weight.grad, group=self.grid.ends)
        if self.grid.replicas > 1:
            works = [dist.all_reduce(p.grad, group=self.grid.data, async_op=True) for p in self.own() if p.grad is not None]
            for work in works:
                work.wait()

    @torch.no_grad()
    def clip(self, largest):
        """Scale all gradients so that their norm over all stages is at most `largest`; returns the norm."""
        twin = self.model.embed.weight if self.tied and self.grid.last else None  # counted in the first stage
        norms = [p.grad.norm() for p in self.own() if p.grad is not None and p is not twin]
        square = torch.stack(norms).norm() ** 2 if norms else torch.zeros((), device=self.device)
        if self.grid.stages > 1:
            dist.all_reduce(square, group=self.grid.pipe)
        norm = square.sqrt()
        for p in self.own():
            if p.grad is not None:
                p.grad.mul_((largest / (norm + 1e-6)).clamp(max=1))
        return norm

    @torch.no_grad()
    def forward(self, tokens, targets):
        """One batch through the stages; returns at once where it is not the last, so that the next batch follows on its heels."""
        tokens, targets = tokens.to(self.device), targets.to(self.device)
        self.wires.begin([("F", 0)], self.shape(tokens), self.dtype)
        with self.autocast():
            x = self.run(tokens, self.wires.receive("F", 0))
            if self.grid.last:
                return self.loss(x, targets)
        self.wires.send("F", x)

    def traced(self):
        """The rows of a traced step, of all stages of this pipeline."""
        if self.trace is None or self.grid.stages == 1:
            return self.trace
        lists = [None] * self.grid.stages
        dist.all_gather_object(lists, self.trace, group=self.grid.pipe)
        return sum(lists, [])

    def gather(self, tensors):
        """The tensors of all stages (name -> tensor, those that a stage does not own are left out) in process 0, on the CPU; {} elsewhere."""
        own = {name: t.detach() for name, t in tensors.items() if not t.is_meta}
        if self.grid.stages == 1 or self.grid.replica:
            return {name: t.cpu() for name, t in own.items()} if self.grid.first and not self.grid.replica else {}
        lists = [None] * self.grid.stages
        dist.all_gather_object(lists, [(name, tuple(t.shape), t.dtype) for name, t in own.items()], group=self.grid.pipe)
        if not self.grid.first:
            for t in own.values():
                dist.send(t.to(self.device).contiguous(), group=self.grid.pipe, group_dst=0)
            return {}
        whole = {name: t.cpu() for name, t in own.items()}
        for source in range(1, self.grid.stages):
            for name, shape, dtype in lists[source]:
                t = torch.empty(shape, dtype=dtype, device=self.device)
                dist.recv(t, group=self.grid.pipe, group_src=source)
                whole.setdefault(name, t.cpu())  # the tied matrix comes twice
        return whole


# ----------------------------------------------------------------------------- stages whose work is a wait, to measure the schedule itself

class Pause(torch.autograd.Function):
    """Takes `seconds` in each direction and leaves the processor to others, as a GPU's work does. `record(kind, start, end)` is told when."""

    @staticmethod
    def forward(ctx, x, seconds, record):
        ctx.seconds, ctx.record = seconds, record
        return Pause.work(x, "F", seconds, record)

    @staticmethod
    def backward(ctx, dy):
        return Pause.work(dy, "B", ctx.seconds, ctx.record), None, None

    @staticmethod
    def work(x, kind, seconds, record):
        start = time.time()
        time.sleep(seconds)
        record(kind, start, time.time())
        return x.clone()


class TimedStage(nn.Module):
    def __init__(self, stage, seconds):
        super().__init__()
        self.stage, self.seconds, self.rows = stage, seconds, []
        self.weight = nn.Parameter(torch.ones(()))

    def record(self, kind, start, end):
        self.rows.append((self.stage, kind, sum(r[1] == kind for r in self.rows), start, end))

    def forward(self, x):
        return Pause.apply(x * self.weight, self.seconds, self.record)


def timed_engines(grid, module, kind, microbatches):
    """name -> function that runs one step of `microbatches` over the timed stages: ours, and torch.distributed.pipelining's where it can."""
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
    steps, wires = schedule(kind, grid.stages, microbatches)[grid.stage], Wires(grid, torch.device("cpu"))
    batch = torch.ones(microbatches, 64, 64)
    inputs = batch.split(1)

    def loss_of(y, target):
        return (y - target).square().mean()

    def forward(m, x):
        y = module(inputs[m] if x is None else x)
        return loss_of(y, inputs[m]) if grid.last else y

    def ours():
        wires.begin(steps, inputs[0].shape, inputs[0].dtype)
        execute(steps, forward, wires)

    engines = {"ours": ours}
    if kind == "gpipe" or microbatches >= grid.stages:  # torch's 1F1B refuses fewer microbatches than stages
        stage = PipelineStage(module, grid.stage, grid.stages, torch.device("cpu"), group=grid.pipe)
        theirs = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}[kind](stage, microbatches, loss_fn=loss_of)
        engines["torch"] = lambda: theirs.step(*[batch] * grid.first, **(dict(target=batch) if grid.last else {}))
    return engines


def timed_member(rank, folder, stages, cases, seconds, rounds):
    """One process of `timed_rows`: every engine in turn, one warm-up and `rounds` rounds; its rows are left in the folder."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=stages)
    grid, results = Grid(stages), []
    for kind, microbatches in cases:
        module = TimedStage(grid.stage, seconds)
        engines = timed_engines(grid, module, kind, microbatches)
        times = {name: [] for name in engines}
        for _ in range(rounds + 1):
            for name, step in engines.items():
                dist.barrier()
                module.rows = []
                step()
                times[name].append(module.rows)
        results.append({name: t[1:] for name, t in times.items()})
    (Path(folder) / f"{rank}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


def timed_rows(stages, cases, seconds=0.05, rounds=3):
    """For each case (kind, microbatches): engine -> for each round the rows of all stages, measured in processes on this machine."""
    import tempfile
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(timed_member, (folder, stages, cases, seconds, rounds), nprocs=stages)
        parts = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(stages)]
    return [{name: [sum((part[i][name][n] for part in parts), []) for n in range(rounds)] for name in parts[0][i]} for i in range(len(cases))]


def measure(stages=4, counts=(1, 4, 8, 16), seconds=0.05, rounds=3):
    """The rows of `python bench.py pipeline`: the median utilization of each schedule, beside the formula and torch's schedule of the same name."""
    cases = [(kind, M) for kind in SCHEDULES for M in counts]
    rows = []
    for (kind, M), times in zip(cases, timed_rows(stages, cases, seconds, rounds)):
        median = {name: float(np.median([utilization(r) for r in measured])) for name, measured in times.items()}
        rows.append(dict(schedule=kind, stages=stages, microbatches=M, utilization=median["ours"], theory=M / (stages + M - 1),
                         torch_utilization=median.get("torch")))
    return rows


# ----------------------------------------------------------------------------- python pipeline.py

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, default=4, help="stages N (default: %(default)s)")
    parser.add_argument("--microbatches", type=int, default=8, help="microbatches M (default: %(default)s); 1 is Fig. 3(a)")
    parser.add_argument("--schedule", default="gpipe", help=f"{' or '.join(SCHEDULES)} (default: %(default)s)")
    parser.add_argument("--out", default="out/pipeline.png", help="the picture (default: %(default)s)")
    parser.add_argument("--trace", metavar="FILE", help="also run it in N processes whose work is a timed wait: a Chrome trace and the picture of it")
    parser.add_argument("--seconds", type=float, default=0.05, help="of a wait (default: %(default)s)")
    args = parser.parse_args(argv)
    check_positive(args, "seconds")
    check_folder(Path(args.out).parent)
    if Path(args.out).suffix not in (".png", ".pdf", ".svg"):
        raise InputError(f"--out {args.out} is no picture: let it end in .png, .pdf or .svg")
    if args.trace:
        check_trace(args.trace)
    N, M, lists = args.stages, args.microbatches, schedule(args.schedule, args.stages, args.microbatches)
    rows, theory = simulate(lists), M / (N + M - 1)
    print(clock_table(lists))
    title = f"{args.schedule}, {N} stages, {M} microbatches"
    draw(rows, args.out, f"{title}: utilization {utilization(rows):.3f}")
    print(f"{args.out}: the same as a picture; most microbatches held by a stage: {', '.join(str(stored(steps)) for steps in lists)}")
    if args.trace:
        measured = timed_rows(N, [(args.schedule, M)], args.seconds, rounds=1)[0]["ours"][0]
        names = iter(sum(lists, []))  # a stage's rows are in the order of its steps
        measured = [(s, *next(names), start, end) for s, _, _, start, end in measured]
        write_trace(measured, args.trace, f"{title}, measured: utilization {utilization(measured):.3f}")
        print(f"{args.trace} and {Path(args.trace).with_suffix('.png')}: measured utilization {utilization(measured):.3f}")
    print(f"utilization {utilization(rows):.3f} = M / (N + M - 1) = {M}/{N + M - 1} = {theory:.3f}")
    return 0


if __name__ == "__main__":
    command(main)
