"""Utilization of each schedule (Fig. 3), beside its clock table's and torch.distributed.pipelining.

    python bench.py pipeline

A stage's work is to wait 50 ms for F, for B and for W, so that it waits for others, not for a processor.
"""
import itertools
import multiprocessing
import statistics
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

import pipeline
from benches.common import table
from common.device import find_device
from pipeline import Grid, Wires, execute, process_of, schedule, utilization

DEFAULTS = {}

class Wait(torch.autograd.Function):
    """x; the backward pass waits, and notes it as a step of this kind."""

    @staticmethod
    def forward(ctx, x, kind, stage):
        ctx.kind, ctx.stage = kind, stage
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        ctx.stage.wait(ctx.kind)
        return g, None, None

class TimedStage(nn.Module):
    """y = x W^T that waits in F, B and W, and notes in `rows` when: (process, kind, start, end)."""

    def __init__(self, process, seconds, rows):
        super().__init__()
        self.process, self.seconds, self.rows = process, seconds, rows
        self.weight = nn.Parameter(torch.eye(64))

    def wait(self, kind):
        start = time.time()
        time.sleep(self.seconds)
        self.rows.append((self.process, kind, start, time.time()))

    def forward(self, x):
        self.wait("F")
        return F.linear(Wait.apply(x, "B", self), Wait.apply(self.weight, "W", self))

def engines(grid, kind, microbatches, seconds, rows):
    """name -> function that runs one step over timed stages: ours, and torch's where it has one."""
    from torch.distributed import pipelining
    device, lists = torch.device("cpu"), schedule(kind, grid.stages, microbatches)
    count, steps = pipeline.count_stages(lists), lists[grid.stage]
    mine = [s for s in range(count) if process_of(s, grid.stages) == grid.stage]
    own = {s: TimedStage(grid.stage, seconds, rows) for s in mine}
    wires, batch = Wires(grid, device, count), torch.ones(microbatches, 64, 64, requires_grad=True)
    inputs = batch.split(1)

    def forward(m, stage, x, part):
        with part:
            y = own[stage](inputs[m] if x is None else x)
        return F.mse_loss(y, torch.zeros_like(y)) if stage == count - 1 else y

    def ours():
        wires.begin(steps, inputs[0].shape, inputs[0].dtype)
        execute(steps, forward, wires)
    theirs = {"gpipe": pipelining.ScheduleGPipe, "1f1b": pipelining.Schedule1F1B,
              "zb-v": pipelining.ScheduleZBVZeroBubble}.get(kind)
    if theirs is None or kind != "gpipe" and microbatches < grid.stages:  # which torch's refuse
        return {"ours": ours}
    stages = [pipelining.PipelineStage(own[s], s, count, device, group=grid.pipe) for s in mine]
    torchs = theirs(stages if kind == "zb-v" else stages[0], microbatches, loss_fn=F.mse_loss)
    arguments = [batch] if grid.first else []
    target = dict(target=torch.zeros_like(batch)) if count - 1 in own else {}
    return {"ours": ours, "torch": lambda: torchs.step(*arguments, **target)}

def member(rank, folder, stages, counts, rounds, seconds):
    """One process. Its rows: of each schedule and number of microbatches the median utilization over the
    rounds, all engines in turn, after a warm-up."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=stages)
    grid, rows = Grid(stages), []
    for kind, M in itertools.product(pipeline.SCHEDULES, counts):
        noted, found = [], defaultdict(list)
        steps = engines(grid, kind, M, seconds, noted)
        for _ in range(rounds + 1):
            for name, step in steps.items():
                dist.barrier()
                noted.clear()
                step()
                parts = [None] * stages
                dist.all_gather_object(parts, noted)
                found[name].append(utilization(sum(parts, [])))
        median = {name: statistics.median(values[1:]) for name, values in found.items()}
        backward = 1 if kind.startswith("zb") else 2  # else it has W's part in it
        theory = utilization(pipeline.simulate(schedule(kind, stages, M), backward=backward))
        rows.append(dict(schedule=kind, stages=stages, microbatches=M, utilization=median["ours"],
                         theory=theory, torch_utilization=median.get("torch")))
    dist.destroy_process_group()
    return rows

def measure(stages=4, counts=(1, 4, 8, 16), seconds=0.05, rounds=3):
    pool = ProcessPoolExecutor(stages, multiprocessing.get_context("spawn"))
    with tempfile.TemporaryDirectory() as folder, pool:
        one = partial(member, folder=folder, stages=stages, counts=counts, rounds=rounds, seconds=seconds)
        return list(pool.map(one, range(stages)))[0]

def bench(args):
    return find_device("float32"), measure()

def report(rows):
    return table(rows, first="schedule stages microbatches", columns={
        "utilization": ("utilization", "{:.3f}"), "clock table": ("theory", "{:.3f}"),
        "torch": lambda r: f"{r['torch_utilization']:.3f}" if r["torch_utilization"] else "none"})
